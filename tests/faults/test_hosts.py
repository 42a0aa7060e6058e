"""Rows A5, A6: hosts that die or hang are named, and every wait for them has a limit. With two real
processes on this machine."""

import ast
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from tests import xla_flags
from tests.faults import soak
from tests.free_port import free_address

ROOT = pathlib.Path(__file__).parent.parent.parent
BEAT = 2.0  # seconds

# What waits for other hosts, and which argument (place or name) is its limit; None: it has none.
WAITS: dict[str, tuple[int, str] | None] = {
    "wait_at_barrier": (1, "timeout_in_ms"),
    "blocking_key_value_get": (1, "timeout_in_ms"),
    "sync_global_devices": None,
    "sync_global_processes": None,
    "process_allgather": None,
    "broadcast_one_to_all": None,
    "assert_equal": None,
    "reached_preemption_sync_point": None,
}


def untimed(source: str, name: str) -> list[str]:
    """Calls that may wait forever for another host. A collective is accepted after a barrier in the
    same function."""
    found: list[str] = []
    if not any(what in source for what in WAITS):
        return found
    for function in (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.Module)
    ):
        body = [
            n for statement in function.body for n in ast.walk(statement) if isinstance(n, ast.Call)
        ]
        if isinstance(function, ast.Module):
            inner = {
                id(n)
                for f in ast.walk(function)
                if isinstance(f, ast.FunctionDef)
                for n in ast.walk(f)
            }
            body = [n for n in body if id(n) not in inner]
        last = lambda call: getattr(call.func, "attr", getattr(call.func, "id", ""))
        meets = [
            call.lineno
            for call in body
            if last(call) in ("barrier", "wait")
            and ast.unparse(call.func) in ("barriers.barrier", "parallel.wait")
        ]
        for call in body:
            what = last(call)
            if what not in WAITS or (
                what == "assert_equal" and "multihost" not in ast.unparse(call.func)
            ):
                continue
            limit = WAITS[what]
            if limit and (
                len(call.args) > limit[0] or any(k.arg == limit[1] for k in call.keywords)
            ):
                continue
            if not (limit is None and any(line < call.lineno for line in meets)):
                found.append(f"{name}:{call.lineno}: {what} without a limit")
    return found


@pytest.mark.fast
@pytest.mark.row("A6")
def test_no_barrier_is_without_a_limit() -> None:
    offenders = [
        "def f():\n    multihost_utils.sync_global_devices('a')",
        "client.wait_at_barrier('a')",
        "x = client.blocking_key_value_get('k')",
        "def f(tree):\n    return multihost_utils.broadcast_one_to_all(tree)",
        "multihost_utils.process_allgather(x)",
        "def f():\n    broadcast_one_to_all(x)\n    barriers.barrier('a')",
    ]
    lawful = [
        "client.wait_at_barrier('a', 1000)",
        "client.blocking_key_value_get('k', timeout_in_ms=5)",
        "np.testing.assert_equal(1, 1)",
        "def f(tree):\n    barriers.barrier('a')\n"
        "    return multihost_utils.broadcast_one_to_all(tree)",
    ]
    assert all(untimed(source, "a.py") for source in offenders) and not any(
        untimed(source, "a.py") for source in lawful
    )
    complaints = [
        c
        for path in sorted((ROOT / "m3i_jax").rglob("*.py"))
        for c in untimed(path.read_text(), path.relative_to(ROOT).as_posix())
    ]
    assert not complaints, "\n".join(complaints)


def start(script: pathlib.Path, *arguments: str, processes: int = 2) -> list[subprocess.Popen[str]]:
    at = free_address()
    fast = {"XLA_FLAGS": xla_flags.FASTEST}
    environment = {**os.environ, **fast, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen(
            [sys.executable, str(script), str(i), at, str(processes), *arguments],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(processes)
    ]  # fmt: skip


JOIN = """
    import os, pathlib, sys, time
    from m3i_jax.parallel import barriers, distributed
    me, hosts = int(sys.argv[1]), int(sys.argv[3])
    place = distributed.ProcessInfo(
        source="test", coordinator=sys.argv[2], processes=hosts, process=me
    )
"""
WAIT = (
    JOIN
    + """
    distributed.initialize(place, limit=60, beat=float(sys.argv[4]))
    barriers.barrier("all")
    # a read of a name from the store may wait for ever now
    barriers.host_label = lambda number: time.sleep(1000)
    print("ready", flush=True)
    barriers.barrier("never, in time" if me else "never", limit=100.0)
"""
)


def lost(tmp_path: pathlib.Path, victim: int, number: int, processes: int) -> float:
    """Send a signal to one of the hosts that wait for each other; all others must exit with its
    name. Returns the seconds until then."""
    script = tmp_path / "wait.py"
    script.write_text(textwrap.dedent(WAIT))
    all_ = start(script, str(BEAT), processes=processes)
    try:
        for process in all_:
            while "ready" not in (line := process.stdout.readline()):  # type: ignore[union-attr]
                assert line, process.stderr.read()  # type: ignore[union-attr]
        all_[victim].send_signal(number)
        before = time.monotonic()
        for i, process in enumerate(all_):
            if i != victim:
                _, err = process.communicate(timeout=90)
                assert process.returncode == 1 and f"m3i_jax: lost host {victim} (" in err, (
                    i,
                    process.returncode,
                    err[-2000:],
                )
        return time.monotonic() - before
    finally:
        for process in all_:
            process.kill()
            process.wait()


SLOW = pytest.mark.slow
CASES = [
    (1, signal.SIGKILL, 2),
    (0, signal.SIGKILL, 2),
    (1, signal.SIGSTOP, 2),
    (0, signal.SIGSTOP, 3),
    (2, signal.SIGKILL, 3),
]


@pytest.mark.fast
@pytest.mark.row("A5", "A6")
def test_a_lost_host_is_named(tmp_path: pathlib.Path, trials) -> None:
    """A killed host closes its connection; a stopped one is silent."""
    took = [lost(tmp_path, *CASES[0]), lost(tmp_path, *CASES[2])]
    trials.trials = trials.passed = len(took)
    trials.figure = (
        f"named after {took[0]:.1f} s (killed) and {took[1]:.1f} s (stopped; heartbeat"
        f" {BEAT:.0f} s)"
    )


@pytest.mark.slow
@pytest.mark.row("A5", "A6")
def test_every_host_that_may_be_lost_is_named(tmp_path: pathlib.Path, trials) -> None:
    took = [lost(tmp_path, *case) for case in CASES for _ in range(2)]
    for seconds in took:
        trials.add(seconds < BEAT + 5)
    trials.figure = (
        f"first or other, killed or stopped, of 2 or 3: named in {max(took):.1f} s at most"
        f" (heartbeat {BEAT:.0f} s)"
    )
    assert trials.passed == trials.trials == 10


REFUSE = (
    JOIN
    + """
    from m3i_jax import interrupts
    from m3i_jax.errors import UserError
    from m3i_jax.parallel import heartbeat
    distributed.initialize(place, limit=60)
    barriers.barrier("all")
    bug = sys.argv[4].startswith("bug")
    interrupts.notify_hosts(heartbeat.end_hosts)
    if "preempted" in sys.argv[4] and str(me) in sys.argv[4]:
        interrupts.exit_on_sigterm()
        os.kill(os.getpid(), 15)
    elif "interrupted" in sys.argv[4] and str(me) in sys.argv[4]:
        interrupts.exit_interrupted()
    elif str(me) in sys.argv[4]:
        try:
            with heartbeat.refuse_on_error():
                raise ValueError("a bug") if bug else UserError("'7.jpg' cannot be read")
        except Exception as error:
            sys.exit(getattr(error, "status", 1))  # as main does
    barriers.barrier("never", limit=100.0)
"""
)


@pytest.mark.row("A5", "A6")
@pytest.mark.parametrize(
    "cases",
    [("0", "bug 1", "preempted 1", "interrupted 0"), pytest.param(("1", "01"), marks=SLOW)],
)
def test_a_mistake_that_one_host_meets_ends_all(cases: tuple, tmp_path: pathlib.Path) -> None:
    """The others would wait for it, and end with its code and reason, as after SIGTERM or
    Ctrl-C before the loop. An error that all hosts have is reported by each."""
    script = tmp_path / "refuse.py"
    script.write_text(textwrap.dedent(REFUSE))
    pairs, refused = {who: start(script, who) for who in cases}, ("cannot be read", 2)
    ends = {"preempted": ("stopped by SIGTERM", 42), "interrupted": ("interrupted; run", 130)}
    try:
        for who, both in pairs.items():
            for i, process in enumerate(both):
                _, err = process.communicate(timeout=90)
                expected, why, code = f"m3i_jax: host {who[-1]} (", *ends.get(who[:-2], refused)
                if "bug" in who:
                    expected, code, why = "m3i_jax: lost host 1 (", 1, "its process ended"
                if str(i) in who:
                    expected = why = why if who[:-2] in ends else ""
                found = (who, i, process.returncode, err[-2000:])
                assert why in err and expected in err and process.returncode == code, found
    finally:
        for process in sum(pairs.values(), []):
            process.kill()
            process.wait()


SAVE = (
    JOIN
    + """
    import jax, numpy as np
    from jax.experimental import multihost_utils
    distributed.initialize(place, limit=60)
    from m3i_jax import parallel
    from m3i_jax.training.checkpoint import Checkpoints, SavesFailed
    from m3i_jax.training import checksums

    def forbidden(*_, **__):
        raise AssertionError("a barrier without a limit")

    multihost_utils.sync_global_devices = forbidden
    mesh = parallel.make_mesh((hosts, 1, 1))
    rows = parallel.data_sharding(mesh)

    def make(step):
        whole = np.random.default_rng(step).normal(size=(4 * hosts, 300)).astype(np.float32)
        everywhere = parallel.replicated(mesh)
        count = jax.make_array_from_callback((), everywhere, lambda i: np.int32(step))
        split = jax.make_array_from_callback(whole.shape, rows, lambda i: whole[i])
        return {"rows": split, "step": count}

    logged, place = [], pathlib.Path(sys.argv[4])
    one = Checkpoints(place, 2, log=logged.append)
    one.BACK_OFF = 0.0
    for step in (2, 4, 6):
        one.save(step, make(step), {"samples_seen": step})
    one.wait()
    one.close()
    print("kept", sorted(p.name for p in place.iterdir()))
    if me == 0:
        victim = max((place / "6").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
        with open(victim, "r+b") as file:
            byte = file.read(1)[0]
            file.seek(0)
            file.write(bytes([byte ^ 1]))
    parallel.barrier("damaged")
    one = Checkpoints(place, 2, log=logged.append)
    one.BACK_OFF = 0.0
    print("good", one.newest_good(), one.position(4))
    template = jax.eval_shape(lambda: make(4))
    got = one.restore(4, template, {"rows": rows, "step": parallel.replicated(mesh)})
    local = lambda x: np.concatenate([np.asarray(s.data) for s in x.addressable_shards])
    print("same", bool((local(got["rows"]) == local(make(4)["rows"])).all()))

    # One host cannot write its part: both learn of it, both go on, and the old step stays.
    if me == 1:
        def full(step, arrays):
            one._orbax.wait_until_finished()
            raise OSError(28, "No space left on device")

        one._finish = full
    one.save(8, make(8), {})
    one.wait()
    print("after", len(logged), [text for text in logged if "failed" in text])
    one.close()
"""
)


@pytest.mark.slow
@pytest.mark.row("A6", "B2", "B3")
def test_two_hosts_save_and_restore_with_limits(tmp_path: pathlib.Path) -> None:
    """Orbax's barriers between all processes have no limit: here they would raise."""
    script = tmp_path / "save.py"
    script.write_text(textwrap.dedent(SAVE))
    both = start(script, str(tmp_path / "checkpoints"))
    done = []
    try:
        for process in both:
            out, err = process.communicate(timeout=240)
            assert process.returncode == 0, err[-3000:]
            done.append({line.split(" ")[0]: line.partition(" ")[2] for line in out.splitlines()})
    finally:
        for process in both:
            process.kill()
    for output in done:
        assert (
            output["kept"] == "['4', '6']"
            and output["good"] == "4 {'samples_seen': 4}"
            and output["same"] == "True"
        )
        assert (
            "checkpoint 8: save 1 of 3 in a row failed" in output["after"]
            and "host 1" in output["after"]
            and "No space" in output["after"]
        )


# A run that prints which train steps it compiles, and takes so many seconds for each.
DELAYED = """
import sys, time
from jax._src import compiler
plain = compiler.backend_compile_and_load

def slow(backend, module, *more):
    if "train_step" in str(module.operation.attributes["sym_name"]):
        print("compiling train_step", flush=True)
        time.sleep(float(sys.argv[1]))
    return plain(backend, module, *more)

compiler.backend_compile_and_load = slow
from m3i_jax.main import main
sys.exit(main(sys.argv[2:]))
"""


def pair(
    run: pathlib.Path, steps: int, *, delays: tuple[float, ...] = ()
) -> list[subprocess.Popen[str]]:
    """Start both hosts of a small run on this machine. With `delays`, the seconds that each takes
    to compile a train step, compiled programs are cached in the working directory, as real hosts
    do."""
    at = free_address()
    # killed: its line breaks at once, whatever the heartbeat
    more = [f"train.steps={steps}", "train.save_every=4", "train.eval_every=8"]
    begin = [["-c", DELAYED, str(seconds)] for seconds in delays] or [["-m", "m3i_jax.main"]] * 2
    settings = [
        "--config",
        "configs/quickstart.py",
        *(f"--config.{s}" for s in soak.TINY + more),
        "--workdir",
        str(run),
    ]
    own = [
        [
            sys.executable,
            *begin[i],
            *settings,
            "--coordinator",
            at,
            "--processes",
            "2",
            "--process-id",
            str(i),
        ]
        for i in range(2)
    ]
    environment = soak.environment(run.parent / "cache")
    if delays:
        del environment["JAX_COMPILATION_CACHE_DIR"]
    return [
        subprocess.Popen(
            words,
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for words in own
    ]


@pytest.mark.slow
@pytest.mark.row("A5")
def test_a_lost_host_costs_no_bit(tmp_path: pathlib.Path, trials) -> None:
    """One of two hosts that train together is killed, each twice, at different steps; the other
    exits too; both restart, and the final state equals that of two undisturbed hosts. Only steps
    since the last complete save are trained again."""
    steps, at = 40, (3, 10, 17, 30)
    alone = pair(tmp_path / "alone", steps)
    outputs = [process.communicate(timeout=500)[0] for process in alone]
    assert [process.returncode for process in alone] == [0, 0], outputs
    run, lost_steps, outs = tmp_path / "killed", [], []
    for victim, when in enumerate(at):
        began, log = time.time(), run / "metrics.jsonl"
        both, victim = pair(run, steps), victim % 2
        try:
            # Rows of these processes: earlier ones may have logged later steps.
            while (
                not log.is_file()
                or log.stat().st_mtime < began
                or max((r["step"] for r in soak.rows(run) if "loss" in r), default=0) < when
            ):
                assert all(process.poll() is None for process in both), both[0].communicate()
                time.sleep(0.02)
            both[victim].kill()
            out, _ = both[1 - victim].communicate(timeout=120)
            assert trials.add(both[1 - victim].returncode not in (0, 42)), out[-2000:]
            outs.append((f"lost host {victim} (" in out, out[-1000:]))
        finally:
            for process in both:
                process.kill()
                process.wait()
        seen = max(row["step"] for row in soak.rows(run) if "loss" in row)
        lost_steps.append(seen - max(soak.committed(run), default=0))
    both = pair(run, steps)
    outputs = [process.communicate(timeout=500)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0] and "resuming at step" in outputs[
        0
    ], outputs
    cache = tmp_path / "cache"
    same = soak.state_at(run, steps, cache) == soak.state_at(tmp_path / "alone", steps, cache)
    trials.passed *= same
    # of the first host JAX itself may notice it sooner, and aborts
    named = sum(it for it, _ in outs)
    trials.figure = (
        f"{trials.passed} of {len(at)} kills of one of two hosts in training: the other ended,"
        f" {named} named it, both came back, bitwise; at most {max(lost_steps)} steps lost (saves"
        " every 4)"
    )
    assert same and named >= len(at) // 2, outs
    # a save that was under way counts for nothing
    assert max(lost_steps) <= 8 and not soak.leftovers(run), lost_steps


@pytest.mark.slow
@pytest.mark.row("A13")
def test_a_host_that_compiles_for_two_minutes_and_a_restart(tmp_path: pathlib.Path, trials) -> None:
    """Gloo gives a first collective 30 seconds. The other host waits for the compilation; after a
    kill both hosts find the program in the cache."""
    run, log = tmp_path / "run", tmp_path / "run/metrics.jsonl"
    both = pair(run, 40, delays=(0.0, 120.0))
    try:
        while (
            not log.is_file()
            or max((r["step"] for r in soak.rows(run) if "loss" in r), default=0) < 6
        ):
            assert all(process.poll() is None for process in both), both[0].communicate()
            time.sleep(0.02)
        both[1].kill()
        out, _ = both[0].communicate(timeout=120)
    finally:
        for process in both:
            process.kill()
            process.wait()
    trials.add("compiling train_step" in out and "compile train_step: waiting for host 1 (" in out)
    both = pair(run, 40, delays=(120.0, 120.0))
    again = [process.communicate(timeout=500)[0] for process in both]
    trials.add(
        [process.returncode for process in both] == [0, 0] and "resuming at step" in again[0]
    )
    trials.add(not any("compiling train_step" in text for text in again))
    trials.figure = (
        "a host compiled for 120 s: the other waited; killed and restarted, both loaded the program"
    )
    assert trials.passed == trials.trials == 3, (out[-2000:], again)

"""Several hosts: barriers and messages between two processes, and runs of two processes on this
machine (gloo), which must equal the run of one."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from m3i_jax import main
from m3i_jax.interop import tensor_files
from m3i_jax.parallel import barriers, distributed
from m3i_jax.parallel.distributed import ProcessInfo
from tests import saved, toy, xla_flags
from tests.free_port import free_port
from tests.interop.published_vit import ENCODERS, weights

ROOT = pathlib.Path(__file__).parent.parent.parent


def test_alone_nothing_waits() -> None:
    distributed.initialize(ProcessInfo(source="alone"), log=lambda text: pytest.fail(text))
    barriers.barrier("never")
    with barriers.host0_first("never"):
        pass
    assert barriers.exchange_values("never", "me") == ["me"]
    asked = []
    together = barriers.CoordinatedStop(lambda: bool(asked)).open()
    assert not together.poll()
    asked.append(1)
    assert together.poll()
    together.close()
    assert together.noticed


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "XLA_FLAGS": xla_flags.FASTEST,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }


def two(*command: str, processes: int = 2) -> list[subprocess.Popen[str]]:
    """Start `command` as several processes; {i} and {port} are filled in."""
    at = free_port()
    return [
        subprocess.Popen(
            [
                sys.executable,
                *(word.replace("{i}", str(i)).replace("{port}", str(at)) for word in command),
            ],
            cwd=ROOT,
            env=environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(processes)
    ]


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    try:
        out = [(*p.communicate(timeout=240), p) for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, a, b) for a, b, p in out]


TALK = """
    import sys, threading, time
    from m3i_jax.errors import RunStopped, UserError
    from m3i_jax.parallel import barriers, distributed
    me = int(sys.argv[1])
    info = distributed.ProcessInfo(
        source="test", coordinator=sys.argv[2], processes=2, process=me
    )
    if me:  # one host's jax.distributed is initialized by another program, as in a Ray worker
        import jax
        jax.distributed.initialize(sys.argv[2], 2, me)
        try:
            distributed.initialize(distributed.ProcessInfo(source="flags", processes=3, process=me))
        except UserError as error:
            print("other", error)
        for again in (distributed.ProcessInfo(source="alone"), info):
            distributed.initialize(again, log=lambda text: print("again", text))
    else:
        distributed.rendezvous.wait_for_processes = lambda *_, **__: None  # host 1 does not ask
        distributed.initialize(info, limit=60)
    barriers.announce_host(f"name{me}")
    print("hosts", barriers.host_names(), barriers.host_name())
    texts = [barriers.exchange_values("a", text) for text in (f"from {me}", f"again {me}")]
    print("exchange", *texts)
    barriers.NOTICE = 0.1
    with barriers.host0_first("make"):
        print("first", time.monotonic())
        time.sleep(0.0 if me else 0.3)
    barriers.NOTICE = 15.0
    for who in (0, 1):
        try:
            with barriers.host0_first("fails"):
                assert me != who, "broken"
        except (AssertionError, RunStopped) as error:
            print(f"fails{who}", type(error).__name__, error)
    for who in (0, 1):
        try:
            with barriers.host0_first("refuses"):
                if me == who:
                    raise UserError("/data: no images")
        except UserError as error:
            print(f"refuses{who}", error)
    for who in (0, 1):
        try:
            with barriers.fail_together("read"):
                if me == who:
                    raise OSError(5, "Input/output error", "/run/digests.json")
        except RunStopped as error:  # all exit with 1, and may be started again
            print(f"together{who}", error)
    with barriers.fail_together("read"):
        pass
    distributed.assert_same_on_all_hosts("start", {"code": "1", "seed": "0"})
    try:
        distributed.assert_same_on_all_hosts("start", {"code": "1", "seed": str(me), "lr": "1"})
    except UserError as error:
        print("differ", error)

    # Host 1 gets a notice while host 0 is ahead: both stop at the same poll, after the largest.
    asked = threading.Event()
    together = barriers.CoordinatedStop(asked.is_set, limit=30).open()
    if me == 0:
        for _ in range(7):
            assert not together.poll()
    barriers.barrier("ahead")
    if me == 1:
        asked.set()
        time.sleep(0.5)
    polls = 0 if me else 7
    while not together.poll():
        polls += 1
        time.sleep(0.05)
    print("stopped", polls + 1)
    together.close()

    # A run that ends without a notice.
    together = barriers.CoordinatedStop(lambda: False, limit=30).open()
    assert not together.poll()
    together.close()
    print("ended", together.noticed)
    # A notice on host 1 after its last poll.
    late = threading.Event()
    together = barriers.CoordinatedStop(late.is_set, limit=30).open()
    assert not together.poll()
    if me:
        late.set()
    together.close()
    print("late", together.noticed)

    # Host 1 does not come.
    if me == 0:
        start = time.monotonic()
        try:
            barriers.barrier("lunch", limit=1.0)
        except barriers.HostMissing as error:
            print("missing", round(time.monotonic() - start), error)
    barriers.barrier("end")
"""


@pytest.mark.row("A6")
def test_hosts_talk(tmp_path: pathlib.Path) -> None:
    """Two processes that use no device: barriers, host 0 first, differences, a common stop, and a
    missing host."""
    script = tmp_path / "talk.py"
    script.write_text(textwrap.dedent(TALK))
    done = ends(two(str(script), "{i}", "127.0.0.1:{port}"))
    assert [status for status, *_ in done] == [0, 0], done
    outputs = [
        {line.split(" ")[0]: line.partition(" ")[2] for line in out.splitlines()}
        for _, out, _ in done
    ]
    assert [s["hosts"] for s in outputs] == ["2 0", "2 1"]
    assert outputs[1]["again"].startswith("host 1 of 2, ")
    assert outputs[1]["again"].endswith("(from jax.distributed, initialized before)")
    assert "was initialized before as process 1 of 2; leave out" in outputs[1]["other"]
    assert (
        outputs[0]["exchange"]
        == outputs[1]["exchange"]
        == "['from 0', 'from 1'] ['again 0', 'again 1']"
    )
    assert float(outputs[1]["first"]) - float(outputs[0]["first"]) >= 0.3
    assert "make: waiting for host 0 (name0)" in done[1][2]
    for who in (0, 1):
        assert outputs[who][f"fails{who}"] == "AssertionError broken"
        assert (
            outputs[1 - who][f"fails{who}"]
            == f"RunStopped fails: host {who} (name{who}) failed; its output says why"
        )
        assert outputs[who][f"refuses{who}"] == "/data: no images"  # all exit with 2
        assert (
            outputs[1 - who][f"refuses{who}"]
            == f"refuses: host {who} (name{who}) failed (/data: no images)"
        )
        assert outputs[0][f"together{who}"] == outputs[1][f"together{who}"]
        assert outputs[0][f"together{who}"].startswith(
            f"host {who} (name{who}): /run/digests.json: Input/output error; "
        )
    for s in outputs:
        assert (
            "host 1 (name1): seed is 1, 0 on host 0" in s["differ"]
            and "code" not in s["differ"].partition(";")[0]
        )
        assert (s["ended"], s["late"]) == ("False", "True")
    assert outputs[0]["stopped"] == outputs[1]["stopped"] and int(outputs[0]["stopped"]) >= 8
    assert (
        "missing" not in outputs[1]
        and "host 1 (name1)" in outputs[0]["missing"]
        and int(outputs[0]["missing"].split()[0]) <= 5
    )
    assert "host 0 of 2" in done[0][1] and "from test" in done[0][1]


TINY = [
    "data.size=120",
    "data.image_size=32",
    "train.batch_size=8",
    "optim.warmup_steps=2",
    "model.encoder.width=32",
    "model.encoder.depth=1",
    "model.encoder.heads=2",
    "model.decoder.width=32",
    "model.decoder.depth=1",
    "model.decoder.heads=2",
    "model.pool.heads=2",
    "model.text.width=32",
    "model.text.heads=2",
    "model.text.depth=1",
    "data.vocabulary_size=300",
    "train.log_every=1",
    "train.panel_every=4",
    "train.eval_every=4",
    "train.save_every=4",
    "train.steps=8",
    "evaluate.batch_size=32",
]
COMMAND = [
    "-m",
    "m3i_jax.main",
    "--config",
    "configs/quickstart.py",
    *(f"--config.{item}" for item in TINY),
]
HOSTS = ["--coordinator", "127.0.0.1:{port}", "--processes", "2", "--process-id", "{i}"]


def lines(run: pathlib.Path) -> list[dict[str, float]]:
    return [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text().splitlines()
        if line.endswith("}")
    ]


@pytest.mark.slow
def test_two_hosts_train_what_one_trains(tmp_path: pathlib.Path) -> None:
    """The same global batch, in halves on two processes: the same losses, one log, one set of
    checkpoints; and one host resumes it."""
    (alone,) = ends(two(*COMMAND, "--workdir", str(tmp_path / "one"), processes=1))
    both = ends(two(*COMMAND, *HOSTS, "--workdir", str(tmp_path / "two")))
    assert alone[0] == 0 and [status for status, *_ in both] == [0, 0], (alone, both)
    one, two_ = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [row["step"] for row in one] == [row["step"] for row in two_] and [
        set(row) for row in one
    ] == [set(row) for row in two_]
    for a, b in zip(one, two_, strict=True):
        for name in (
            "loss",
            "loss/ssp",
            "loss/category",
            "loss/text",
            "balance/lambda",
            "eval/knn/top1",
        ):
            assert (name in a) == (name in b) and a.get(name, 0.0) == pytest.approx(
                b.get(name, 0.0), rel=1e-5
            ), (a["step"], name)
    panels = [
        sorted(p.name for p in (tmp_path / name / "panels").iterdir()) for name in ("one", "two")
    ]
    assert panels[0] == panels[1]
    # A checkpoint of two hosts goes on with one.
    (on,) = ends(
        two(
            *COMMAND,
            "--config.train.steps=10",
            "--allow-changes",
            "--workdir",
            str(tmp_path / "two"),
            processes=1,
        )
    )
    assert on[0] == 0 and "resuming at step 8" in on[1], on


@pytest.mark.slow
def test_another_number_of_hosts_goes_on_with_the_same_data(tmp_path: pathlib.Path) -> None:
    """One host trains eight steps; two hosts resume from its checkpoint of step 4, and their steps
    5 to 8 are the same."""
    run = tmp_path / "run"
    (alone,) = ends(two(*COMMAND, "--workdir", str(run), processes=1))
    assert alone[0] == 0, alone
    before = {row["step"]: row for row in lines(run) if "loss" in row}
    (run / "metrics.jsonl").rename(tmp_path / "alone.jsonl")
    shutil.rmtree(run / "checkpoints" / "8")
    both = ends(two(*COMMAND, *HOSTS, "--workdir", str(run)))
    assert [status for status, *_ in both] == [0, 0] and "resuming at step 4" in both[0][1], both
    after = {row["step"]: row for row in lines(run) if "loss" in row}
    assert set(after) == {5, 6, 7, 8}
    for step in range(5, 9):
        for name in ("loss", "loss/ssp", "loss/category", "loss/text", "samples_seen"):
            assert after[step][name] == pytest.approx(before[step][name], rel=1e-6), (step, name)


@pytest.mark.slow
@pytest.mark.parametrize("signalled", [0, 1])
@pytest.mark.row("A2")
def test_sigterm_on_one_host_saves_on_both(signalled: int, tmp_path: pathlib.Path) -> None:
    longer = [
        "--config.train.steps=2000",
        "--config.train.save_every=1000",
        "--config.train.eval_every=0",
        "--config.train.panel_every=0",
    ]
    command = [*COMMAND, *longer, *HOSTS, "--workdir", str(tmp_path / "run")]
    processes = two(*command)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and all(p.poll() is None for p in processes):
        if (tmp_path / "run/metrics.jsonl").is_file() and any(
            row["step"] >= 5 for row in lines(tmp_path / "run")
        ):
            break
        time.sleep(0.05)
    processes[signalled].send_signal(signal.SIGTERM)
    done = ends(processes)
    assert [status for status, *_ in done] == [42, 42], done
    assert "preempted: saved step" in done[0][1]
    last = max(row["step"] for row in lines(tmp_path / "run"))
    assert [int(p.name) for p in (tmp_path / "run/checkpoints").iterdir() if p.name.isdigit()] == [
        last
    ]


@pytest.mark.slow
@pytest.mark.row("A8")
def test_hosts_that_differ_are_named_before_anything_is_trained(tmp_path: pathlib.Path) -> None:
    at = free_port()
    where = [
        "--coordinator",
        f"127.0.0.1:{at}",
        "--processes",
        "2",
        "--workdir",
        str(tmp_path / "run"),
    ]
    (first,), (second,) = (
        two(*COMMAND, *where, "--process-id", str(i), f"--config.optim.lr={lr}", processes=1)
        for i, lr in ((0, 1e-3), (1, 2e-3))
    )
    for status, _, err in ends([first, second]):
        message = err.strip().splitlines()[-1]
        assert (
            status == 2 and "host 1" in message and "optim.lr is 0.002, 0.001 on host 0" in message
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_hosts_measure_what_one_measures(tmp_path: pathlib.Path) -> None:
    """Every evaluator on one checkpoint: each host reads half of the images, and both get all
    features."""
    short = [
        "--config.train.steps=2",
        "--config.train.eval_every=0",
        "--config.train.panel_every=0",
        "--config.evaluate.query_limit=1",
    ]
    (trained,) = ends(two(*COMMAND, *short, "--workdir", str(tmp_path / "run"), processes=1))
    assert trained[0] == 0, trained
    asked = [
        *("linear", "few_shot", "probe", "attentive", "embedding"),
        "probe_epochs=2",
        "probe_warmup=1",
        "attentive_epochs=1",
        "shots=1",
    ]
    flags = [f"--config.evaluate.{item if '=' in item else item + '=true'}" for item in asked]
    command = ["-m", "m3i_jax.main", "--mode=eval", "--workdir", str(tmp_path / "run"), *flags]
    found = []
    for hosts, processes in (([], 1), (HOSTS, 2)):
        (tmp_path / "run/eval.json").unlink(missing_ok=True)
        done = ends(two(*command, *hosts, "--config.evaluate.query_limit=50", processes=processes))
        assert [status for status, *_ in done] == [0] * processes, done
        results = json.loads((tmp_path / "run/eval.json").read_text())["results"]
        found.append({name: value for part in results.values() for name, value in part.items()})
    one, both = found
    assert len(results) == 12 and set(one) == set(both)
    for name, value in one.items():
        # two near ties of 24 images may fall the other way
        assert both[name] == pytest.approx(value, abs=0.041), name
    assert one["eval/retrieval/text_to_image/r10"] == both["eval/retrieval/text_to_image/r10"]


BEGIN = """
    import hashlib, sys
    import jax, numpy as np
    from m3i_jax.parallel import distributed
    me, hosts = int(sys.argv[1]), int(sys.argv[3])
    if hosts > 1:
        info = distributed.ProcessInfo(
            source="test", coordinator=sys.argv[2], processes=hosts, process=me
        )
        distributed.initialize(info, limit=60)
    from m3i_jax import parallel
    from m3i_jax.training.trainer import Trainer
    from tests import toy
    for shape, chosen in (((1, hosts, 1), sys.argv[4:]), ((hosts, 1, 1), sys.argv[4:5])):
        for settings in chosen:
            log, mesh = [], parallel.make_mesh(shape)
            # small, since compiling takes nearly all the time
            small = {"model__encoder__width": 64, "objective__forms": "mim"}
            more = dict(item.split("=") for item in settings.split(","))
            config = toy.settings(**small, data__captions="no", **more)
            state = Trainer(config, mesh, 0).init(log.append)
            replicate = jax.jit(lambda tree: tree, out_shardings=parallel.replicated(mesh))
            whole = replicate(state.params)
            digest = hashlib.sha256()
            for leaf in jax.tree.leaves(whole):
                digest.update(np.asarray(leaf.addressable_data(0)).tobytes())
            print("start", digest.hexdigest(), len(log), *log[:1])
"""


@pytest.mark.slow
def test_two_hosts_start_from_the_same_weights(tmp_path: pathlib.Path) -> None:
    """`init_from` of a run and of a file, replicated on both hosts or with half of every matrix on
    each: every number equals that of one host."""
    saved.run(tmp_path / "run", toy.settings(model__encoder__width=64))
    table = weights(ENCODERS["timm"], width=64, depth=2, heads=2, patch=8, grid=4)
    tensor_files.write_safetensors(tmp_path / "vit.safetensors", table)
    script = tmp_path / "begin.py"
    script.write_text(textwrap.dedent(BEGIN))
    file = (
        f"init_from={tmp_path / 'vit.safetensors'},model__encoder__positions=learned,"
        "model__encoder__final_norm=true"
    )
    sources = [
        f"init_from={tmp_path / 'run'}",
        f"init_from={tmp_path / 'run'},init__weights=ema",
        file,
        "seed=0",
    ]
    found = []
    for hosts in (1, 2):
        done = ends(
            two(str(script), "{i}", "127.0.0.1:{port}", str(hosts), *sources, processes=hosts)
        )
        assert [status for status, *_ in done] == [0] * hosts, done
        found += [
            [line for line in out.splitlines() if line.startswith("start")] for _, out, _ in done
        ]
    one, *both = found
    assert both == [one, one] and len(one) == 5 and len({line.split()[1] for line in one}) == 4


def test_a_host_that_does_not_come_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def alone(*arguments: object, **settings: object) -> None:
        raise barriers.HostMissing("compile train_step: waited 7200 seconds for host 1 (b)")

    monkeypatch.setattr(distributed, "start_distributed", alone)
    assert main.main(["--config", "configs/quickstart.py", "--workdir", "never"]) == 1
    assert (
        capsys.readouterr().err
        == "m3i_jax: stopped: compile train_step: waited 7200 seconds for host 1 (b)\n"
    )

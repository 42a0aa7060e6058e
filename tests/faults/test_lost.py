"""Row B13: checkpoints under another number, on a disk that is not mounted, and unreadable ones;
row A12: a run.lock that is not a lock."""

import errno
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import parallel, run_files
from m3i_jax.errors import RunStopped, UserError
from m3i_jax.modes import setup as jobs
from m3i_jax.modes import train
from m3i_jax.training import checkpoint_dir, checksums, saved_arrays
from m3i_jax.training.checkpoint import CheckpointDamaged, Checkpoints
from tests.faults.hostile import ROOT
from tests.faults.test_saves import small_disk  # noqa: F401 (a fixture)
from tests.test_main import environment

pytestmark = pytest.mark.fast


def state(step: int) -> dict[str, jax.Array]:
    return {
        "step": jnp.int32(step),
        "w": jnp.asarray(np.random.default_rng(step).normal(size=64), jnp.float32),
    }


def restored(one: Checkpoints, step: int) -> dict[str, jax.Array]:
    template = jax.eval_shape(lambda: state(0))
    return one.restore(
        step,
        template,
        parallel.tree_shardings(parallel.make_mesh((1, 1, 1), jax.devices()[:1]), template),
    )


@pytest.fixture
def opened(tmp_path: pathlib.Path) -> Iterator[Callable[[], tuple[Checkpoints, list[str]]]]:
    every = []

    def call() -> tuple[Checkpoints, list[str]]:
        logged: list[str] = []
        every.append(Checkpoints(tmp_path / "checkpoints", 3, log=logged.append))
        return every[-1], logged

    yield call
    for one in every:
        one.close()


@pytest.fixture
def pair(tmp_path: pathlib.Path) -> pathlib.Path:
    """The directory of checkpoints 4 and 8 of a run."""
    one = Checkpoints(tmp_path / "checkpoints", 3)
    for step in (4, 8):
        one.save(step, state(step), {"samples_seen": 10 * step})
        one.wait()
    one.close()
    return tmp_path / "checkpoints"


def names(directory: pathlib.Path) -> list[str]:
    return sorted(path.name.split("-")[0] for path in directory.iterdir())


@pytest.mark.row("B13")
def test_a_copy_under_another_number_is_not_used(pair: pathlib.Path, opened) -> None:
    shutil.copytree(pair / "4", pair / "12")
    one, logged = opened()
    assert one.newest_good() == 8 and names(pair) == ["12.bad", "4", "8"]
    assert (
        "checkpoint 12 is damaged (digests.json: belongs to checkpoint 4, which was copied or"
        " renamed)" in logged[0]
    )


@pytest.mark.row("B13")
def test_exchanged_steps_are_not_used(pair: pathlib.Path, opened) -> None:
    for old, new in (("4", "x"), ("8", "4"), ("x", "8")):
        (pair / old).rename(pair / new)
    one, logged = opened()
    with pytest.raises(UserError, match="no undamaged checkpoint is left"):
        one.newest_good()
    assert [line.split("(")[1].split(",")[0] for line in logged] == [
        f"digests.json: belongs to checkpoint {step}" for step in (4, 8)
    ]


@pytest.mark.row("B13", "B9")
@pytest.mark.parametrize("form", [3, 2])
def test_a_copy_of_an_older_format_is_noticed_by_its_arrays(
    pair: pathlib.Path, opened, form: int
) -> None:
    """Format 3 has the checksum of the step counter among those of all arrays; in format 2 the
    counter itself is compared."""
    more = {"arrays": checksums.read_checksums(pair / "4")["arrays"]} if form == 3 else {}
    (pair / "4" / checksums.NAME).unlink()
    checksums.write_checksums(pair / "4", format=form, **more)
    one, logged = opened()
    assert (
        checkpoint_dir.find_damage(pair / "4") == []
        and (restored(one, 4)["w"] == state(4)["w"]).all()
    )
    shutil.copytree(pair / "4", pair / "12")
    if form == 3:
        assert one.newest_good() == 8 and "belongs to another checkpoint" in logged[0]
        return
    assert one.newest_good() == 12
    with pytest.raises(CheckpointDamaged):
        restored(one, 12)
    assert "step: is 4, that of another checkpoint" in logged[-1] and one.newest_good() == 8


@pytest.mark.row("B13", "B9")
def test_another_run_is_verified_in_the_same_way(pair: pathlib.Path) -> None:
    """init_from, evaluation and export refuse a copy under another number, and a newer format."""
    shutil.copytree(pair / "4", pair / "12")
    with pytest.raises(UserError, match="checkpoint 12 is damaged .*belongs to checkpoint 4"):
        saved_arrays.RunWeights(str(pair.parent), "init_from")
    checksums.write_checksums(pair / "12", format=checkpoint_dir.FORMAT + 1, step=12)
    with pytest.raises(
        UserError, match="checkpoint 12: has format 5, this version of m3i_jax reads up to 4"
    ):
        saved_arrays.RunWeights(str(pair.parent), "init_from")


@pytest.mark.row("B13")
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("what", ["a file", "the digests", "the position", "the directory"])
def test_what_cannot_be_read_is_not_damaged(
    pair: pathlib.Path, opened, monkeypatch, number: int, what: str
) -> None:
    """The read is retried; then the run stops, renames nothing and uses no older step."""
    monkeypatch.setattr(checkpoint_dir, "WAITS", (0.0, 0.0))
    fails = [2]

    def failing(works: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *more: Any, **rest: Any) -> Any:
            if fails[0]:
                fails[0] -= 1
                raise OSError(number, os.strerror(number), str(path))
            return works(path, *more, **rest)

        return call

    module, name = {
        "a file": (checksums, "file_digest"),
        "the digests": (checksums, "read_checksums"),
        "the position": (run_files, "read_bytes"),
        "the directory": (checkpoint_dir, "complete_steps"),
    }[what]
    one, logged = opened()
    read = (lambda: one.position(8)["samples_seen"]) if what == "the position" else one.newest_good
    wanted = 80 if what == "the position" else 8
    monkeypatch.setattr(checksums, "THREADS", 1)
    monkeypatch.setattr(module, name, failing(getattr(module, name)))
    # of several files that are read at once, both may fail
    assert read() == wanted and 1 <= len(logged) <= 2
    assert f"cannot be read ({os.strerror(number)}); retrying in 0 seconds" in logged[0]
    fails[0] = 99
    with pytest.raises(
        UserError, match=r"may be undamaged, so nothing was renamed and no older step is used"
    ) as refusal:
        read()
    assert os.strerror(number) in str(refusal.value) and "\n" not in str(refusal.value)
    # only what a user must repair ends with 2, after which no scheduler starts the run again
    assert refusal.value.status == (2 if number == errno.EACCES else 1)
    assert names(pair) == ["4", "8"]


@pytest.mark.row("B13", "A6")
@pytest.mark.parametrize("what", ["checkpoint", "checkpoint 8", "position"])
def test_a_host_that_alone_cannot_read_ends_all(
    pair: pathlib.Path, opened, monkeypatch, what: str
) -> None:
    """All learn of it before they read together, in a collective that waits for that host."""
    one, _ = opened()
    wrong = f"1 {pair}/8/digests.json cannot be read (Input/output error)"
    monkeypatch.setattr(parallel.barriers, "host_names", lambda: 2)
    for module in (parallel, parallel.barriers):
        monkeypatch.setattr(
            module,
            "exchange_values",
            lambda name, text, **_: [text, wrong if name == what else text],
        )
    monkeypatch.setattr(one._orbax, "restore", lambda *_, **__: pytest.fail("a collective"))
    with pytest.raises(RunStopped, match=r"^host 1: .*8/digests\.json cannot be read \(Input/"):
        one.newest_good()
        one.position(8)
        restored(one, 8)
    assert names(pair) == ["4", "8"]


def interrupt_rename(pair: pathlib.Path, *, lose: bool) -> None:
    """The first save of a run, killed while a bucket without hierarchical namespace moved its files
    one by one."""
    shutil.rmtree(pair / "8")
    shutil.rmtree(pair.parent / "digests")
    (pair / "4.new" / "state").mkdir(parents=True)
    for name in ("digests.json", "state/manifest.ocdbt"):
        (pair / "4" / name).rename(pair / "4.new" / name)
    if lose:
        (pair / "4.new" / "state" / "manifest.ocdbt").unlink()


@pytest.mark.row("B13", "B1")
def test_an_interrupted_rename_is_finished(pair: pathlib.Path, opened) -> None:
    interrupt_rename(pair, lose=False)
    one, logged = opened()
    assert one.newest_good() == 4 and names(pair) == ["4"]
    assert (restored(one, 4)["w"] == state(4)["w"]).all()
    assert "the rename of checkpoint 4 was interrupted" in logged[0]


@pytest.mark.row("B13", "B1")
@pytest.mark.parametrize("saved", [False, True])
def test_a_run_whose_first_save_was_interrupted_starts_again(
    pair: pathlib.Path, opened, saved: bool
) -> None:
    """Unless something was saved: what is lost then may be on a disk that is not mounted."""
    interrupt_rename(pair, lose=True)
    if saved:
        checkpoint_dir.note_newest(pair, 4)
    one, logged = opened()
    if saved:
        with pytest.raises(UserError, match="no undamaged checkpoint is left"):
            one.newest_good()
        assert names(pair) == ["4.bad"]
        return
    assert one.newest_good() is None and names(pair) == ["4.old"]
    assert "nothing was saved yet, and the run starts again" in logged[-1]
    checkpoint_dir.refuse_lost(pair.parent, LOG)  # nor does it refuse the start after this one
    one.save(4, state(4), {"samples_seen": 40})
    one.wait()
    assert one.newest_good() == 4 and names(pair) == ["4"]


@pytest.mark.row("B2", "B13")
def test_a_rename_that_fails_half_way_goes_on(pair: pathlib.Path, opened, monkeypatch) -> None:
    rename = os.rename

    def half(new: pathlib.Path, step: pathlib.Path) -> None:
        if not str(new).endswith(".new"):
            return rename(new, step)
        (step / "state").mkdir(parents=True)
        rename(new / "state" / "manifest.ocdbt", step / "state" / "manifest.ocdbt")
        raise OSError(errno.EIO, "Input/output error")

    one, _ = opened()
    monkeypatch.setattr(checkpoint_dir.os, "rename", half)
    one.save(12, state(12), {"samples_seen": 120})
    one.wait()
    assert one.newest_good() == 12 and names(pair) == ["12", "4", "8"]


@pytest.mark.row("B13")
def test_a_damaged_step_that_cannot_be_renamed_is_named(
    pair: pathlib.Path, opened, monkeypatch
) -> None:
    (pair / "8" / "position" / "metadata").unlink()
    monkeypatch.setattr(
        checkpoint_dir.os,
        "rename",
        lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system")),
    )
    with pytest.raises(
        UserError,
        match=(
            r"checkpoint 8 is damaged \(position/metadata: is missing\), and .*8 cannot be renamed"
            r" \(Read-only"
        ),
    ):
        opened()[0].newest_good()


LOG = [{"step": step, "loss": 1.0} for step in range(1, 26)]


@pytest.mark.row("B13")
def test_a_run_whose_checkpoints_are_gone_does_not_start_from_the_beginning(
    pair: pathlib.Path, trials
) -> None:
    """The directory is absent, empty, or a link to a disk that is not mounted; the error says how
    to continue."""
    place = pair.parent
    shutil.rmtree(pair)
    for kind in ("missing", "empty", "link", "file"):
        if kind == "empty":
            pair.mkdir()
        elif kind == "link":
            pair.rmdir()
            pair.symlink_to(place / "disk")
        elif kind == "file":
            pair.unlink()
            pair.write_text("x")
        with pytest.raises(
            UserError,
            match="saved checkpoint 8; mount or restore|mount its disk|is not a directory",
        ) as refusal:
            checkpoint_dir.refuse_lost(place, LOG)
        assert trials.add(
            str(pair) in str(refusal.value)
            or "move metrics.jsonl and digests/ away" in str(refusal.value)
        ), kind
    pair.unlink()
    pair.mkdir()
    (place / "digests" / "checkpoints").write_text("damaged")  # as if it could not be read
    with pytest.raises(UserError, match="may have saved some: .*digests/checkpoints is damaged"):
        checkpoint_dir.refuse_lost(place, LOG)
    pair.rmdir()
    shutil.rmtree(place / "digests")  # a run of an older version
    with pytest.raises(
        UserError, match="checkpoints/ has no checkpoint, but the run logged 25 steps"
    ):
        checkpoint_dir.refuse_lost(place, LOG)
    pair.mkdir()  # as a run that was killed before its first save
    checkpoint_dir.refuse_lost(place, LOG)
    checkpoint_dir.refuse_lost(place / "new", [])


@pytest.mark.row("B13")
def test_a_step_that_was_saved_and_is_gone_is_named(pair: pathlib.Path, opened) -> None:
    assert checkpoint_dir.lost_since(pair.parent, 8) == 0
    shutil.rmtree(pair / "8")
    assert checkpoint_dir.lost_since(pair.parent, 4) == 8
    (pair / "8.bad-20260101-000000").mkdir()  # renamed and logged before
    assert checkpoint_dir.lost_since(pair.parent, 4) == 0


@pytest.mark.row("A12", "F2")
def test_what_is_no_lock_is_neither_written_nor_waited_for(tmp_path: pathlib.Path, trials) -> None:
    lock, victim = tmp_path / "run.lock", tmp_path / "victim"
    victim.write_text("precious")

    def hard(path: pathlib.Path) -> None:
        os.link(victim, path)

    kinds: dict[str, Callable[[pathlib.Path], object]] = {
        "a directory": pathlib.Path.mkdir,
        "a link": lambda path: path.symlink_to(victim),
        "a link to nothing": lambda path: path.symlink_to(tmp_path / "nothing"),
        "a hard link": hard,
        "a pipe": os.mkfifo,
        "a text": lambda path: path.write_text("precious"),
        "a device": lambda path: (
            os.mknod(path, stat.S_IFCHR, os.makedev(1, 3)) if not os.getuid() else os.mkfifo(path)
        ),
    }
    for kind, make in kinds.items():
        make(lock)
        with pytest.raises(UserError, match=r"run\.lock: ") as refusal, jobs.lock_workdir(tmp_path):
            pass
        assert trials.add(
            victim.read_text() == "precious" and not (tmp_path / "nothing").exists()
        ), (kind, refusal.value)
        lock.rmdir() if lock.is_dir() else lock.unlink()
    with (
        jobs.lock_workdir(tmp_path),
        pytest.raises(UserError, match=rf"another run \(process {os.getpid()}\)"),
        jobs.lock_workdir(tmp_path),
    ):
        pass
    with jobs.lock_workdir(tmp_path):  # the number of a process that ended is overwritten
        assert lock.read_text() == str(os.getpid())


@pytest.mark.row("B12")
def test_a_position_of_another_structure_is_refused(trials) -> None:
    good: dict[str, Any] = {
        "samples_seen": 8,
        "fingerprint": "f",
        "seconds": {"step": 1.5},
        "counts": {"skipped": {"empty": 0}},
    }
    assert train.checked_position(good, 4) == good
    for name, value in (
        ("samples_seen", "8"),
        ("samples_seen", -8),
        ("samples_seen", None),
        ("fingerprint", []),
        ("seconds", [1]),
        ("seconds", {"step": "1"}),
        ("counts", {"skipped": 3}),
        ("counts", {"skipped": {"empty": "0"}}),
        ("files", 7),
        ("restarts", "x"),
    ):
        with pytest.raises(UserError, match=f"checkpoint 4: its position is not valid .*{name}"):
            train.checked_position({**good, name: value}, 4)
        trials.add(True)
    with pytest.raises(UserError, match="fingerprint"):
        train.checked_position({"samples_seen": 8}, 4)


FULL = """
    import pathlib, sys
    import jax.numpy as jnp
    from m3i_jax.training.checkpoint import Checkpoints, SavesFailed
    Checkpoints.BACK_OFF = 0.0
    place = pathlib.Path(sys.argv[1])
    state = {f"{k:02d}": jnp.full(4096, float(k)) for k in range(64)}
    one = Checkpoints(place / "checkpoints", 2)
    (place / "other").write_bytes(bytes(5_500_000))
    try:
        for step in range(3):
            one.save(step, state, {})
            one.wait(state)
    except SavesFailed as error:
        print(f"stopped: {error}")
    one.close()
    async def write_fragment(): pass  # of Orbax, where a part fails before another begins
    write_fragment()
"""


@pytest.mark.row("B1")
def test_a_disk_that_fills_is_logged_in_a_line_a_save(small_disk: pathlib.Path) -> None:
    """64 arrays fail, each in its own thread: no traceback, not even after the last line."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL), str(small_disk)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["warning", "warning", "stopped"], lines
    assert all("No space left" in line or "RESOURCE_EXHAUSTED" in line for line in lines)

"""Rows B about saving: full disks and disks that refuse, other files beside the steps, retention,
layouts, donation, older versions."""

import contextlib
import errno
import os
import pathlib
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import parallel
from m3i_jax.errors import UserError
from m3i_jax.training import checkpoint, checkpoint_dir, checksums
from m3i_jax.training.checkpoint import Checkpoints, SavesFailed

GOLDEN = pathlib.Path(__file__).parent / "golden"
Make = Callable[..., Checkpoints]


def state(step: int, size: int = 4096) -> dict[str, jax.Array]:
    r = np.random.default_rng(step)
    return {
        "step": jnp.int32(step),
        "w": jnp.asarray(r.normal(size=size), jnp.float32),
        "b": jnp.ones(7, jnp.bfloat16),
    }


def shardings(tree):
    return parallel.tree_shardings(parallel.make_mesh((1, 1, 1), jax.devices()[:1]), tree)


def restored(one: Checkpoints, step: int, size: int = 4096):
    template = jax.eval_shape(lambda: state(0, size))
    return one.restore(step, template, shardings(template))


def same(got, wanted) -> bool:
    return all(np.asarray(got[k]).tobytes() == np.asarray(wanted[k]).tobytes() for k in wanted)


def names(directory: pathlib.Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def make() -> Iterator[Make]:
    opened = []

    def call(directory: pathlib.Path, keep: int = 2) -> Checkpoints:
        logged: list[str] = []
        one = Checkpoints(directory, keep, log=logged.append)
        one.logged, one.BACK_OFF = logged, 0.0  # type: ignore[attr-defined, misc]
        opened.append(one)
        return one

    yield call
    for one in opened:
        one.close()


@contextlib.contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """The kernel refuses larger files (EFBIG), as a quota or a full disk would, also in the threads
    that write arrays."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def failing(
    one: Checkpoints,
    directory: pathlib.Path,
    broken: Callable[[], contextlib.AbstractContextManager],
) -> None:
    """A good save, two that fail, a good one, then three that fail: the promised behaviour at
    each."""
    one.save(2, state(2), {})
    one.wait()
    with broken():
        for step, miss in ((4, 1), (5, 2)):
            one.save(step, state(step), {})
            one.wait()  # does not raise: training goes on
            assert (
                len(one.logged) == miss
                and f"checkpoint {step}: save {miss} of 3 in a row failed" in one.logged[-1]
            )
            assert "the newest checkpoint is 2" in one.logged[-1]
            assert one.latest() == 2 and names(directory) == ["2"]
            assert one.retry()
    one.save(6, state(6), {})
    assert not one.retry()
    one.wait()
    assert one.latest() == 6 and names(directory) == ["2", "6"] and not one.retry()
    with broken():
        one.save(8, state(8), {})
        one.wait()
        with pytest.raises(SavesFailed, match="save 3 of 3 in a row failed"):
            one.save(9, state(9), {})
            one.wait(state(9))  # the end of a run: its state is still there, and is tried again
    assert names(directory) == ["2", "6"]
    assert (
        one.newest_good() == 6
        and same(restored(one, 6), state(6))
        and same(restored(one, 2), state(2))
    )


@pytest.mark.fast
@pytest.mark.row("B2")
def test_what_a_late_thread_of_a_failed_save_writes_is_removed_too(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "4.new.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "2").mkdir()
    remove, turns = shutil.rmtree, []

    def late(path: str, **how: bool) -> None:
        remove(path, **how)
        turns.append(path)
        if len(turns) < 3:
            pathlib.Path(path).mkdir()

    monkeypatch.setattr(checkpoint_dir.shutil, "rmtree", late)
    checkpoint_dir.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["2"] and len(turns) == 3


@pytest.mark.fast
@pytest.mark.row("B2")
def test_a_disk_that_refuses_large_files(tmp_path: pathlib.Path, make: Make) -> None:
    failing(make(tmp_path / "c"), tmp_path / "c", lambda: no_file_above(2000))


@pytest.mark.fast
@pytest.mark.row("B2")
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EDQUOT])
def test_a_disk_that_fails_in_the_last_moment(
    tmp_path: pathlib.Path, make: Make, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """All arrays are written, but not the checksums: that is no checkpoint."""

    @contextlib.contextmanager
    def broken() -> Iterator[None]:
        def fail(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(checksums, "write_checksums", fail)
            yield

    failing(make(tmp_path / "c"), tmp_path / "c", broken)


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system of 6 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.fast
@pytest.mark.row("B1")
def test_a_full_disk(small_disk: pathlib.Path, make: Make) -> None:
    place, size = small_disk / "checkpoints", 300_000  # 1.2 MB a step
    one = make(place, keep=1)
    one.save(2, state(2, size), {})
    one.wait()
    (small_disk / "other").write_bytes(bytes(4 * 2**20))
    for step in (4, 5):
        one.save(step, state(step, size), {})
        one.wait()
        assert one.latest() == 2 and names(place) == ["2"], one.logged
    (small_disk / "other").unlink()
    assert one.retry()
    one.save(6, state(6, size), {})
    one.wait()
    assert names(place) == ["6"] and len(one.logged) == 2
    (small_disk / "other").write_bytes(bytes(4 * 2**20))
    one.save(8, state(8, size), {})
    with pytest.raises(SavesFailed):
        one.wait(state(8, size))
    assert one.newest_good() == 6 and same(restored(one, 6, size), state(6, size))


@pytest.mark.fast
@pytest.mark.row("B5")
def test_what_lies_beside_the_steps(tmp_path: pathlib.Path, make: Make) -> None:
    """Leftovers, foreign files, links that lead out: the newest real step is chosen, and nothing
    outside is read or changed."""
    outside, place = tmp_path / "outside", tmp_path / "checkpoints"
    for where, step in ((place, 4), (outside, 99)):
        one = make(where)
        one.save(step, state(step), {})
        one.wait()
    (place / "100").symlink_to(outside / "99")
    (place / "50").write_text("a file")
    (place / "007").mkdir()
    (place / "-3").mkdir()
    for left in (
        "60.new",
        "60.new.orbax-checkpoint-tmp",
        "61.orbax-checkpoint-tmp-1700000000",
        "3.old",
    ):
        shutil.copytree(place / "4", place / left)
    (place / "62.new").symlink_to(outside / "99")
    (place / "notes.txt").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in outside.rglob("*")}
    one = make(place)
    assert (
        one.latest() == one.newest_good() == 4
        and not one.logged
        and checkpoint_dir.complete_steps(place) == [4]
    )
    one.save(6, state(6), {})
    one.wait()
    assert names(place) == sorted(["-3", "007", "100", "4", "50", "6", "62.new", "notes.txt"])
    for step in (8, 9):
        one.save(step, state(step), {})
        one.wait()
    assert checkpoint_dir.complete_steps(place) == [8, 9] and (place / "100").is_symlink()
    assert before == {path: path.stat().st_mtime_ns for path in outside.rglob("*")}


@pytest.mark.fast
@pytest.mark.row("B6")
def test_retention_spares_what_is_read_and_the_last_good(
    tmp_path: pathlib.Path, make: Make
) -> None:
    place = tmp_path / "checkpoints"
    one = make(place, keep=1)
    one.save(2, state(2), {})
    one.wait()
    with checkpoint_dir.hold_step(place / "2"):
        one.save(4, state(4), {})
        one.wait()
        assert checkpoint_dir.complete_steps(place) == [2, 4]
        assert same(restored(one, 2), state(2))
    with no_file_above(2000):  # a save that fails deletes nothing
        one.save(6, state(6), {})
        one._saving[-1].exception()
    assert not one._finish_previous() and checkpoint_dir.complete_steps(place) == [2, 4]
    one.save(8, state(8), {})
    one.wait()
    assert names(place) == ["8"] and not [text for text in one.logged if "save 1 of 3" not in text]


@pytest.mark.slow
@pytest.mark.row("B6")
def test_a_reader_races_with_retention(tmp_path: pathlib.Path, make: Make, trials) -> None:
    """A second reader restores the newest step while a run saves and deletes: it never gets half a
    step."""
    place = tmp_path / "checkpoints"
    writer, reader, stop = make(place, keep=1), make(place), threading.Event()
    writer.save(0, state(0), {})
    writer.wait()

    def write() -> None:
        step = 0
        while not stop.is_set():
            step += 1
            writer.save(step, state(step), {})
        writer.wait()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(100):
            while True:
                step = reader.latest()
                with checkpoint_dir.hold_step(place / str(step)):
                    # it was not deleted before this lock was taken
                    if step in checkpoint_dir.complete_steps(place):
                        trials.add(
                            same(restored(reader, step), state(step))
                            and not checksums.verify_checksums(place / str(step))
                        )
                        break
    finally:
        stop.set()
        thread.join()
    trials.figure = f"{trials.passed} of {trials.trials} restores whole"
    assert trials.passed == 100


CHANGES: dict[str, tuple[Callable[[dict], dict], list[str]]] = {
    "a new head": (
        lambda t: t | {"head": {"kernel": jnp.zeros((3, 4))}},
        ["head/kernel is absent in the checkpoint, float32[3, 4] in this run"],
    ),
    "a head less": (
        lambda t: {k: v for k, v in t.items() if k != "b"},
        ["b is bfloat16[7] in the checkpoint, absent in this run"],
    ),
    "a renamed module": (
        lambda t: {("weights" if k == "w" else k): v for k, v in t.items()},
        [
            "weights is absent in the checkpoint, float32[4096] in this run",
            "w is float32[4096] in the checkpoint, absent in this run",
        ],
    ),
    "another depth": (
        lambda t: t | {"w": jnp.zeros((2, 4096))},
        ["w is float32[4096] in the checkpoint, float32[2, 4096] in this run"],
    ),
    "another precision": (
        lambda t: t | {"w": jnp.zeros(4096, jnp.bfloat16)},
        ["w is float32[4096] in the checkpoint, bfloat16[4096] in this run"],
    ),
    "everything": (
        lambda t: {f"new{k}": v for k, v in enumerate(t.values())},
        [
            "new0 is absent in the checkpoint, bfloat16[7] in this run",
            "new1 is absent in the checkpoint, int32[] in this run",
            "new2 is absent in the checkpoint, float32[4096] in this run",
        ]
        + [
            "b is bfloat16[7] in the checkpoint, absent in this run",
            "step is int32[] in the checkpoint, absent in this run",
            "w is float32[4096] in the checkpoint, absent in this run",
        ],
    ),
}


@pytest.mark.fast
@pytest.mark.row("B7")
def test_every_difference_of_a_layout_is_listed(tmp_path: pathlib.Path, make: Make, trials) -> None:
    one = make(tmp_path / "checkpoints")
    one.save(2, state(2), {})
    one.wait()
    for change, wanted in CHANGES.values():
        template = jax.eval_shape(lambda change=change: change(dict(sorted(state(0).items()))))
        (tmp_path / "layout.txt").unlink(missing_ok=True)
        with pytest.raises(UserError) as error:
            one.restore(2, template, shardings(template))
        text = str(error.value)
        listed = (tmp_path / "layout.txt").read_text().splitlines() if len(wanted) > 3 else wanted
        trials.add(
            sorted(listed) == sorted(wanted)
            and all(line in text for line in listed[:3])
            and "checkpoint 2: does not fit" in text
        )
    trials.figure = f"{trials.passed} of {trials.trials} mutations listed in full"
    assert trials.passed == len(CHANGES) == 6
    assert same(restored(one, 2), state(2))


@pytest.mark.fast
@pytest.mark.row("B8")
def test_a_donated_state_is_saved_as_it_was(tmp_path: pathlib.Path, make: Make, trials) -> None:
    """64 arrays, and 20 steps that donate them while they are written."""
    donate = jax.jit(lambda tree: jax.tree.map(lambda x: x * 1.5 + 1, tree), donate_argnums=0)
    one, tree = make(tmp_path, keep=9), {f"{k:02d}": jnp.full(4096, float(k)) for k in range(64)}
    wanted: dict[int, dict[str, bytes]] = {}
    for step in range(0, 60, 20):
        wanted[step] = {k: np.asarray(v).tobytes() for k, v in tree.items()}
        one.save(step, tree, {})
        for _ in range(20):
            tree = donate(tree)
    one.wait()
    template = jax.eval_shape(lambda: tree)
    for step, leaves in wanted.items():
        got = one.restore(step, template, shardings(template))
        for name, bits in leaves.items():
            trials.add(np.asarray(got[name]).tobytes() == bits)
    trials.figure = f"{trials.trials - trials.passed} of {trials.trials} arrays wrong"
    assert trials.passed == 3 * 64


@pytest.mark.fast
@pytest.mark.row("B9")
def test_checkpoints_of_older_versions(tmp_path: pathlib.Path, make: Make) -> None:
    """The repository has one of each format; one without checksums is distinguished from one that
    lost them."""
    for form in (1, 2, 3, 4):
        place = tmp_path / str(form) / "checkpoints"
        shutil.copytree(GOLDEN / f"format{form}", place / "3")
        one = make(place)
        assert one.newest_good() == 3 and one.position(3) == {
            "samples_seen": 24,
            "fingerprint": "golden",
        }
        assert same(restored(one, 3, 16), state(3, 16))
        assert [("older version, without checksums" in text) for text in one.logged] == (
            [True] if form == 1 else []
        )
    (place / "3" / checksums.NAME).unlink()
    with pytest.raises(UserError, match="no undamaged checkpoint is left"):
        one.newest_good()
    assert "digests.json: is missing" in one.logged[-1]


@pytest.mark.fast
@pytest.mark.row("B9")
def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path: pathlib.Path, make: Make) -> None:
    place = tmp_path / "checkpoints" / "3"
    shutil.copytree(GOLDEN / f"format{checkpoint.FORMAT}", place)
    checksums.write_checksums(place, format=checkpoint.FORMAT + 1)
    with pytest.raises(
        UserError,
        match=(
            "checkpoint 3: has format 5, this version of m3i_jax reads up to 4; use a newer version"
        ),
    ):
        make(place.parent).newest_good()
    assert place.is_dir()  # not set aside: nothing is wrong with it


def write_golden() -> None:
    """Writes tests/faults/golden, for a new format. Orbax stores the directory that it wrote to,
    which is irrelevant here."""
    one = Checkpoints(GOLDEN / "making", 1)
    one.save(3, state(3, 16), {"samples_seen": 24, "fingerprint": "golden"})
    one.wait()
    one.close()
    for path in (GOLDEN / "making" / "3").rglob("commit_success.txt"):
        path.write_text("committed\n")
    known = checksums.read_checksums(GOLDEN / "making" / "3")
    (GOLDEN / "making" / "3" / checksums.NAME).unlink()
    checksums.write_checksums(
        GOLDEN / "making" / "3", format=checkpoint.FORMAT, step=3, arrays=known["arrays"]
    )
    (GOLDEN / "making" / "3").rename(GOLDEN / f"format{checkpoint.FORMAT}")
    (GOLDEN / "making").rmdir()

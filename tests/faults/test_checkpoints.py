"""Rows B: damage to a checkpoint between its save and its restore. With a small state, real files
and real saves."""

import itertools
import os
import pathlib
import random
import shutil
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import parallel
from m3i_jax.errors import UserError
from m3i_jax.training import checksums
from m3i_jax.training.checkpoint import Checkpoints

Make = Callable[..., Checkpoints]


def state(step: int, size: int = 4096) -> dict[str, jax.Array]:
    """A small state that differs at every step, with incompressible numbers and a NaN."""
    r = np.random.default_rng(step)
    return {
        "step": jnp.int32(step),
        "w": jnp.asarray(r.normal(size=size), jnp.float32).at[3].set(jnp.nan),
        "b": jnp.ones(7, jnp.bfloat16),
    }


def restored(one: Checkpoints, step: int, size: int = 4096) -> dict[str, jax.Array]:
    template = jax.eval_shape(lambda: state(0, size))
    return one.restore(
        step,
        template,
        parallel.tree_shardings(parallel.make_mesh((1, 1, 1), jax.devices()[:1]), template),
    )


def same(got: dict[str, jax.Array], wanted: dict[str, jax.Array]) -> bool:
    return all(np.asarray(got[k]).tobytes() == np.asarray(wanted[k]).tobytes() for k in wanted)


@pytest.fixture
def make(tmp_path: pathlib.Path) -> Iterator[Make]:
    """Opens checkpoints that are closed at the end; `logged` has the warnings of each."""
    opened = []

    def call(directory: pathlib.Path | None = None, keep: int = 2) -> Checkpoints:
        logged: list[str] = []
        one = Checkpoints(directory or tmp_path / "checkpoints", keep, log=logged.append)
        one.logged, one.BACK_OFF = logged, 0.0  # type: ignore[attr-defined, misc]
        opened.append(one)
        return one

    yield call
    for one in opened:
        one.close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Two good steps, 4 and 8."""
    directory = tmp_path_factory.mktemp("pair") / "checkpoints"
    one = Checkpoints(directory, 2)
    for step in (4, 8):
        one.save(step, state(step), {"samples_seen": 10 * step})
    one.wait()
    one.close()
    return directory


def files(step: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


def flip(path: pathlib.Path, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def places(step: pathlib.Path, count: int, seed: int) -> Iterator[tuple[pathlib.Path, int]]:
    """Bits drawn from all files by their size, and at least one of every file, since small files
    would hardly be drawn."""
    r = random.Random(seed)
    every = [path for path in files(step) if path.stat().st_size]
    sizes = [path.stat().st_size for path in every]
    samples = every[:count] + r.choices(every, sizes, k=max(count - len(every), 0))
    return ((path, r.randrange(8 * path.stat().st_size)) for path in samples)


def flips(pair: pathlib.Path, make: Make, trials, count: int) -> None:
    """Flip a bit of the newest step; a restart must detect it, name the file, and resume bit for
    bit from the step before."""
    one, silent = make(pair), 0
    for path, bit in places(pair / "8", count, seed=0):
        flip(path, bit)
        try:
            found = one.newest_good()
            if found == 8:
                silent += 1
            name, line = (
                path.relative_to(pair / "8").as_posix(),
                one.logged.pop() if one.logged else "",
            )
            trials.add(found == 4 and name in line and "renamed to 8.bad-" in line)
        finally:
            for bad in pair.glob("8.bad-*"):
                bad.rename(pair / "8")
            flip(path, bit)
    trials.figure = f"{silent} of {count:,} flips silent, {trials.passed:,} of {count:,} fall back"
    assert trials.passed == count and not silent
    assert (
        one.newest_good() == 8
        and same(restored(one, 8), state(8))
        and same(restored(one, 4), state(4))
    )


@pytest.mark.fast
@pytest.mark.row("B3")
def test_a_flipped_bit_is_found(pair: pathlib.Path, make: Make, trials) -> None:
    flips(pair, make, trials, 20)


@pytest.mark.slow
@pytest.mark.row("B3")
def test_a_thousand_flipped_bits_are_found(pair: pathlib.Path, make: Make, trials) -> None:
    flips(pair, make, trials, 1000)


@pytest.mark.fast
@pytest.mark.row("B4")
def test_a_file_cut_emptied_deleted_swapped_or_a_link_is_named(
    pair: pathlib.Path, tmp_path: pathlib.Path, make: Make, trials
) -> None:
    """Every file of the step, with digests.json, with each of five faults."""

    def link(path: pathlib.Path) -> None:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")

    faults: dict[str, Callable[[pathlib.Path], object]] = {
        "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
        "emptied": lambda path: os.truncate(path, 0),
        "deleted": pathlib.Path.unlink,
        "swapped": lambda path: path.write_bytes(other(path)),
        "a link": link,
    }

    def other(path: pathlib.Path) -> bytes:
        """The content of another file of the step."""
        return next(
            p.read_bytes()
            for p in files(pair / "8")
            if p != path and p.read_bytes() != path.read_bytes()
        )

    one, names = make(pair), [path.relative_to(pair / "8") for path in files(pair / "8")]
    assert pathlib.Path(checksums.NAME) in names and len(names) >= 10
    for name, (_, fault) in itertools.product(names, faults.items()):
        path = pair / "8" / name
        before = path.read_bytes()
        if not before and fault not in (faults["deleted"], faults["swapped"], faults["a link"]):
            continue
        fault(path)
        found, line = one.newest_good(), one.logged.pop() if one.logged else ""
        trials.add(found == 4 and f"{name}: " in line)
        for bad in pair.glob("8.bad-*"):
            bad.rename(pair / "8")
        path.unlink(missing_ok=True)
        path.write_bytes(before)
    trials.figure = f"{trials.passed} of {trials.trials} found and named"
    assert trials.passed == trials.trials > 45
    assert one.newest_good() == 8


@pytest.mark.fast
@pytest.mark.row("B3")
def test_a_step_that_is_requested_by_its_number_is_verified_too(
    pair: pathlib.Path, tmp_path: pathlib.Path, make: Make
) -> None:
    """An evaluation of one step renames nothing, and does not use damaged files."""
    here = tmp_path / "checkpoints"
    shutil.copytree(pair, here)
    victim = max(files(here / "4"), key=lambda path: path.stat().st_size)
    flip(victim, 8 * 5000)
    with pytest.raises(
        UserError,
        match=(
            f"checkpoint 4: cannot be read .{victim.relative_to(here / '4')}: other bytes than were"
            " written"
        ),
    ):
        restored(make(here), 4)
    assert same(restored(make(here), 8), state(8)) and sorted(p.name for p in here.iterdir()) == [
        "4",
        "8",
    ]


@pytest.mark.fast
@pytest.mark.row("B4")
def test_when_all_are_damaged_a_person_decides(
    pair: pathlib.Path, tmp_path: pathlib.Path, make: Make
) -> None:
    """A run whose checkpoints are all damaged does not start from step 0 by itself, not even at the
    next start."""
    here = tmp_path / "checkpoints"
    shutil.copytree(pair, here)
    for step in ("4", "8"):
        (here / step / "position" / "metadata").write_text('{"samples_seen": 7}')
    one = make(here)
    for _ in range(2):
        with pytest.raises(UserError, match="no undamaged checkpoint is left .*4.bad-.*8.bad-"):
            one.newest_good()
    assert len(one.logged) == 2 and one.latest() is None  # type: ignore[attr-defined]

"""Rows B3, B8, B11: the files have what was trained, and are on the disk before a step counts.

Checksums of files cover what was written. If wrong bytes were written, or a restore gives another
array, only checksums of the arrays detect it; and a name that reaches the disk before its files is
a step that a loss of power leaves empty."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from m3i_jax import parallel
from m3i_jax.errors import UserError
from m3i_jax.modes import train
from m3i_jax.training import checksums
from m3i_jax.training.checkpoint import CheckpointDamaged, Checkpoints
from m3i_jax.training.saved_arrays import RunWeights
from tests.faults.test_saves import make, names, restored, same, state  # noqa: F401 (a fixture)


@pytest.mark.fast
@pytest.mark.row("B3")
def test_any_element_that_changes_changes_the_fingerprint(trials) -> None:
    """One bit anywhere, two exchanged elements, another shape: for every dtype of a state."""
    r = np.random.default_rng(0)
    missed = 0
    for kind in (
        np.float32,
        np.int32,
        np.uint32,
        np.float16,
        ml_dtypes.bfloat16,
        np.int8,
        np.bool_,
        np.uint8,
    ):
        x = r.integers(0, 2 if kind is np.bool_ else 100, (6, 11)).astype(kind)
        before = checksums.checksum_arrays({"x": jnp.asarray(x)}).read()
        for _ in range(25):
            y = x.copy()
            flat = y.reshape(-1).view(np.uint8)
            at = int(r.integers(len(flat)))
            flat[at] ^= 1 if kind is np.bool_ else 1 << int(r.integers(8))
            missed += not trials.add(
                checksums.checksum_arrays({"x": jnp.asarray(y)}).read() != before
            )
        a, b = np.argmax(x), np.argmin(x)
        y = x.copy().reshape(-1)
        y[a], y[b] = y[b], y[a]
        missed += not trials.add(
            checksums.checksum_arrays({"x": jnp.asarray(y.reshape(x.shape))}).read() != before
        )
    trials.figure = f"{missed} of {trials.trials} changed arrays with the same fingerprint"
    assert not missed
    one, again, other = (
        checksums.checksum_arrays({"x": jnp.asarray([np.nan, zero], jnp.float32)}).read()
        for zero in (-0.0, -0.0, 0.0)
    )
    assert one == again != other  # bits, not values


@pytest.mark.fast
@pytest.mark.row("A9")
def test_the_fingerprint_is_the_same_in_every_layout(trials) -> None:
    x = np.random.default_rng(0).normal(size=(256, 512)).astype(np.float32)
    found = set()
    for shape in ((1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)):
        devices = jax.devices()[: int(np.prod(shape))]
        tree = {
            "encoder": {"blocks": {"mlp": {"up": {"kernel": jnp.asarray(x)}}}},
            "step": jnp.int32(3),
        }
        layout = parallel.tree_shardings(parallel.make_mesh(shape, devices), tree)
        found.add(json.dumps(checksums.checksum_arrays(jax.device_put(tree, layout)).read()))
        trials.add(len(found) == 1)
    assert trials.passed == trials.trials


def wrong_write(one: Checkpoints, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """From here on the files get an array with one bit changed, as from a race of copies or faulty
    memory."""
    inner = one._orbax.save

    def save(place: Any, *, args: Any, force: bool) -> Any:
        tree = dict(args.state.item)
        bits = np.array(tree[name])
        bits.reshape(-1).view(np.uint8)[1] ^= 4
        tree[name] = jax.device_put(bits, tree[name].sharding)
        return inner(
            place,
            args=type(args)(
                state=dataclasses.replace(args.state, item=tree), position=args.position
            ),
            force=force,
        )

    monkeypatch.setattr(one._orbax, "save", save)


@pytest.mark.fast
@pytest.mark.row("B3", "B8")
@pytest.mark.parametrize("name", ["w", "b", "step"])
def test_wrong_bytes_with_right_digests_are_found(
    tmp_path: pathlib.Path, make, monkeypatch, trials, name: str
) -> None:
    one = make(tmp_path)
    one.save(1, state(1), {"samples_seen": 8})
    one.wait()
    wrong_write(one, monkeypatch, name)
    one.save(2, state(2), {"samples_seen": 16})
    one.wait()
    again = make(tmp_path)
    # the files are what was written
    assert again.newest_good() == 2 and not checksums.verify_checksums(tmp_path / "2")
    with pytest.raises(
        CheckpointDamaged,
        match=f"checkpoint 2: 1 arrays differ from what was trained, first {name}",
    ):
        restored(again, 2)
    assert trials.add(again.newest_good() == 1 and same(restored(again, 1), state(1)))
    assert [path.split("-")[0] for path in names(tmp_path)] == ["1", "2.bad"]
    assert (
        f"warning: checkpoint 2 is damaged ({name}: differs from what was trained); renamed to"
        " 2.bad-" in again.logged[0]
    )


@pytest.mark.fast
@pytest.mark.row("B3")
def test_a_run_falls_back_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    came = []

    def pretrain(*_: Any) -> int:
        came.append(len(came))
        if len(came) < 3:
            raise CheckpointDamaged("checkpoint 2")
        return 7

    monkeypatch.setattr(train, "_pretrain", pretrain)
    assert train.pretrain(None, False) == 7 and came == [0, 1, 2]  # type: ignore[arg-type]


@pytest.mark.fast
@pytest.mark.row("B9")
def test_a_step_without_fingerprints_is_used(tmp_path: pathlib.Path, make) -> None:
    one = make(tmp_path)
    one.save(1, state(1), {})
    one.wait()
    checksums.write_checksums(tmp_path / "1", format=2)
    assert same(restored(make(tmp_path), 1), state(1))


@pytest.mark.fast
@pytest.mark.row("B11")
def test_everything_is_on_the_disk_before_the_name_counts(
    tmp_path: pathlib.Path, make, monkeypatch, trials
) -> None:
    """By inode: every file and directory of a step, then its name, then the directory that contains
    the name."""
    order: list[Any] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda file: (order.append(os.fstat(file).st_ino), fsync(file))[1]
    )
    monkeypatch.setattr(
        os, "rename", lambda a, b: (order.append(pathlib.Path(b).name), rename(a, b))[1]
    )
    one = make(tmp_path, keep=1)
    for step in (1, 2):
        one.save(step, state(step), {"samples_seen": step})
        one.wait()
        named = order.index(str(step))
        inside = [path for path in (tmp_path / str(step)).rglob("*")] + [tmp_path / str(step)]
        assert len(inside) > 8
        for path in inside:
            assert trials.add(path.stat().st_ino in order[:named]), path
        after = order[named:]
        assert trials.add(tmp_path.stat().st_ino in after)
        if step == 2:  # the last good one goes when the new one is safe
            assert trials.add(after.index(tmp_path.stat().st_ino) < after.index("1.old"))
    trials.figure = (
        "every file and directory of a step, before its name and before an older one goes"
    )


@pytest.mark.fast
@pytest.mark.row("B3", "B8")
def test_wrong_bytes_are_found_by_another_run_too(
    tmp_path: pathlib.Path, make, monkeypatch
) -> None:
    """init_from, evaluation and export verify the arrays that they read."""
    one = make(tmp_path / "checkpoints")
    wrong_write(one, monkeypatch, "w")
    one.save(2, state(2), {"samples_seen": 16})
    one.wait()
    run = RunWeights(str(tmp_path), "--workdir")
    assert same(run.read({"b": None}), {"b": state(2)["b"]})
    with pytest.raises(
        UserError,
        match=(
            "--workdir: checkpoint .*2 cannot be read .w: differs from what was trained.; give"
            " another run"
        ),
    ):
        run.read({"b": None, "w": None})

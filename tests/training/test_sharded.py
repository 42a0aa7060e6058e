"""Whole runs on meshes of eight devices against one device, and runs that go on elsewhere than they
began."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import parallel
from m3i_jax.training import trainer
from m3i_jax.training.checkpoint import Checkpoints
from tests import toy

STEPS, HALF = 20, 10
SCAN = {"model__scan": True, "model__remat": "names", "model__encoder__depth": 3}


@pytest.fixture(autouse=True)
def split_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel.sharding, "SMALL", 1)  # or nothing of a toy would be worth a split


@functools.cache
def made(shape: tuple[int, int, int], **changes: object) -> trainer.Trainer:
    devices = jax.devices()[: int(np.prod(shape))]
    return trainer.Trainer(
        toy.settings(**SCAN, **changes), parallel.make_mesh(shape, devices), toy.VOCABULARY
    )


def run(one: trainer.Trainer, state, first: int, last: int):
    losses = []
    for k in range(first, last):
        state, metrics = one.step(state, parallel.to_global(one.mesh, toy.batch(one.config, k)))
        losses.append(float(metrics["loss"]))
    return state, losses


@functools.cache
def alone() -> list[float]:
    one = made((1, 1, 1))
    return run(one, one.init(), 0, STEPS)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ((1, 8, 1), {}),
        ((1, 8, 1), {"model__keep_gathered": True}),
        ((2, 4, 1), {}),
        ((2, 2, 2), {}),
        ((1, 4, 1), {"train__microbatches": 2, "objective__text_chunk": 5}),
    ],
)
def test_split_parameters_are_one_device(shape: tuple[int, int, int], changes: dict) -> None:
    one = made(shape, **changes)
    state, losses = run(one, one.init(), 0, STEPS)
    np.testing.assert_allclose(losses, alone(), rtol=1e-6)
    split = [
        x
        for x in jax.tree.leaves((state.params, state.opt))
        if x.sharding.shard_shape(x.shape) != x.shape
    ]
    assert len(split) > 50
    sizes = lambda tree: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
    assert sizes(state.opt["adamw"][0].mu) == sizes(state.params)


@pytest.mark.slow
def test_a_run_goes_on_elsewhere(tmp_path: pathlib.Path) -> None:
    """Eight devices save; eight, one, four and a 2 x 4 mesh go on with the losses that one device
    has without a break."""
    eight = made((1, 8, 1))
    state, losses = run(eight, eight.init(), 0, HALF)
    np.testing.assert_allclose(losses, alone()[:HALF], rtol=1e-6)
    saver = Checkpoints(tmp_path / "checkpoints", 1)
    saver.save(HALF, state, {"samples_seen": HALF * 16})
    saver.wait()
    saver.close()
    for shape in ((1, 8, 1), (1, 1, 1), (1, 4, 1), (2, 4, 1)):
        one, reader = made(shape), Checkpoints(tmp_path / "checkpoints", 1)
        state = reader.restore(HALF, one.template, one.shardings)
        position = reader.position(HALF)["samples_seen"] // 16
        reader.close()
        _, losses = run(one, state, position, STEPS)
        np.testing.assert_allclose(losses, alone()[HALF:], rtol=1e-6, err_msg=str(shape))


def test_what_is_computed_in_bfloat16_is_kept_in_float32() -> None:
    """Parameters, both moments, the target and the statistics; the step gives the same types back,
    and its argument's memory with them."""
    one = made((1, 8, 1), model__dtype="bfloat16")
    wide = {str(leaf.dtype) for leaf in jax.tree.leaves(one.template)}
    assert wide == {"float32", "int32"}
    batch = trainer.abstract_batch(one.config)
    with jax.sharding.use_abstract_mesh(one.mesh.abstract_mesh):
        new, _ = jax.eval_shape(one.trace, one.template, batch)
        program = one.lower(batch).as_text()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
        lambda x: (x.shape, x.dtype), one.template
    )
    # a block's kernels side by side, gathered in bfloat16
    assert program.count("tensor<32x384xbf16>") > 0
    donated = program.count("tf.aliasing_output") + program.count("jax.buffer_donor")
    assert donated >= len(jax.tree.leaves(one.template))
    assert all(
        leaf.dtype == jnp.float32
        for leaf in jax.tree.leaves((one.template.params, one.template.opt["target"].params))
    )

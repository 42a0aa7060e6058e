"""Eight AdamW steps of a tiny ViTDet Mask R-CNN by the trainer's step, against detectron2
(tests/data/make_detectron2.py): every loss, and the parameters after. It covers the encoder, the
pyramid, the heads, their gradients, layer decay, and which parameters decay."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.interop import dense_weights, vit_weights
from m3i_jax.parallel.sharding import path_text
from m3i_jax.training.detect_task import DetectTask
from m3i_jax.training.optimizer import decay_mask, lr_factor
from m3i_jax.training.step import train_step
from m3i_jax.training.task import State
from tests.models.dense import vitdet

STEPS = vitdet.arrays("vitdet_steps")
CONFIG = schema.Config(
    task="detect",
    model=vitdet.MODEL,
    data=dataclasses.replace(schema.Data(), image_size=128, classes=3),
    dense=schema.DensePrediction(
        maps=vitdet.MAPS, detect=vitdet.SETS["all"], geometry=schema.Geometry(max_objects=5)
    ),
    optim=schema.Optim(
        lr=float(STEPS["rate"]),
        b2=0.999,
        weight_decay=0.1,
        decayed="but_norms",
        layer_decay=0.7,
        schedule="steps",
        clip=0.0,
    ),
    train=schema.Train(batch_size=3),
)


def named(tree: Any) -> dict[str, np.ndarray]:
    """A tree under detectron2's names."""
    encoder = {
        path_text(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path({"encoder": tree["encoder"]})
    }
    heads = dense_weights.store_mask_rcnn(jax.tree.map(np.asarray, tree))
    return heads | vit_weights.store_vit(encoder, "detectron2", heads=2, prefix="backbone.net.")


def test_rates_and_decay_are_those_of_detectron2() -> None:
    params = vitdet.tree_of(vitdet.state("state/"))
    decays = named(
        jax.tree.map(
            lambda leaf, decays: np.full(leaf.shape, 0.1 * decays, np.float32),
            params,
            decay_mask(params, rule=CONFIG.optim.decayed),
        )
    )

    def factor(path: Any, leaf: Any) -> np.ndarray:
        one = np.asarray(lr_factor(CONFIG, path_text(path), leaf.shape), np.float32)
        return np.broadcast_to(one.reshape(one.shape + (1,) * (leaf.ndim - one.ndim)), leaf.shape)

    factors = named(jax.tree_util.tree_map_with_path(factor, params))
    groups = vitdet.state("group/", "vitdet_steps")
    assert groups.keys() == factors.keys() == decays.keys()
    for name, (rate, decay) in groups.items():
        np.testing.assert_allclose(factors[name], rate, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(decays[name], decay, rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_eight_steps_are_those_of_detectron2() -> None:
    task = DetectTask(CONFIG)
    tx = task.optimizer(steps=1000, warmup=0)
    given = vitdet.arrays("vitdet")
    batch = {name: given[name] for name in ("image", "size", "boxes", "classes", "masks")}
    batch["position"] = np.zeros((3, 2), np.uint32)  # nothing is sampled away
    before = vitdet.tree_of(vitdet.state("state/"))
    params = jax.tree.map(jnp.asarray, before)
    state = State(step=jnp.int32(0), params=params, opt=jax.jit(tx.init)(params))
    step = jax.jit(lambda state: train_step(task, tx, state, batch))
    for i, losses in enumerate(STEPS["losses"]):
        state, metrics = step(state)
        got = [float(metrics[f"loss/{name}"]) for name in vitdet.LOSSES]
        np.testing.assert_allclose(got, losses.mean(0), rtol=2e-5, atol=2e-6, err_msg=str(i))
    after, start = named(state.params), named(before)
    for name, (norm, mixed) in vitdet.state("moved/", "vitdet_steps").items():
        moved = (after[name].astype(float) - start[name]).ravel()
        if name.endswith("qkv.bias"):  # the keys' has no gradient but rounding
            continue
        np.testing.assert_allclose(np.linalg.norm(moved), norm, rtol=1e-3, err_msg=name)
        assert abs(moved @ np.cos(np.arange(moved.size)) - mixed) < 3e-3 * norm, name
        if (whole := STEPS.get(f"after/{name}")) is not None:
            np.testing.assert_allclose(after[name], whole, atol=3e-5, err_msg=name)

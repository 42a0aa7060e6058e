"""Groups of parameters and eight AdamW steps of the references themselves, by the one trainer:
detectron2's Mask R-CNN and mmsegmentation's UperNet (tests/data/dense/README.md)."""

import copy
import functools
from typing import Any

import jax
import numpy as np
import pytest

from m3i_jax import parallel
from m3i_jax.parallel.sharding import path_text
from m3i_jax.training import optimizer, trainer
from tests.training import dense_reference as reference

STEPS = 8


def flat(tree: Any) -> dict[str, np.ndarray]:
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {path_text(path): np.asarray(leaf) for path, leaf in found}


@functools.cache
def trained(system: str) -> tuple[list[dict[str, float]], Any, Any]:
    """(metrics of every step, the first parameters, the last state)"""
    config = reference.reference_settings(system)
    one = trainer.Trainer(config, parallel.make_mesh((1, 1, 1), jax.devices()[:1]), 0)
    state = one.init()
    tree = reference.reference_tree(system, reference.starting(system, "state/"))
    statistics = tree.pop("statistics", {})
    params = jax.device_put(tree, one.shardings.params)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, state.params)
    opt = copy.copy(state.opt)
    if statistics:
        assert jax.tree.structure(statistics) == jax.tree.structure(opt["running"].statistics)
        statistics = jax.device_put(statistics, one.shardings.opt["running"].statistics)
        opt["running"] = opt["running"]._replace(statistics=statistics)
    state, metrics = state.replace(params=params, opt=opt), []
    for _ in range(STEPS):
        batch = parallel.to_global(one.mesh, reference.reference_batch(system))
        state, values = one.step(state, batch)
        metrics.append({name: float(value) for name, value in jax.device_get(values).items()})
    return metrics, tree, jax.device_get(state)


@pytest.mark.parametrize("system", reference.SYSTEMS)
def test_every_parameter_is_in_the_group_of_the_reference(system: str) -> None:
    config = reference.reference_settings(system)
    stored = reference.starting(f"{system}_steps", "group/")
    wanted = [
        flat(reference.filled(system, {name: group[i] for name, group in stored.items()}))
        for i in (0, 1)
    ]
    params = {path: leaf for path, leaf in wanted[0].items() if "statistics/" not in path}
    mask = optimizer.decay_mask(params, rule=config.optim.decayed)
    for path, factors in params.items():
        got = np.asarray(optimizer.lr_factor(config, path, factors.shape), np.float32)
        got = np.broadcast_to(
            got.reshape(got.shape + (1,) * (factors.ndim - got.ndim)), factors.shape
        )
        np.testing.assert_allclose(got, factors, rtol=1e-6, err_msg=path)
        decay = config.optim.weight_decay * mask[path]
        np.testing.assert_allclose(wanted[1][path], decay, rtol=1e-6, err_msg=path)
    assert {True, False} == set(mask.values())


# eight steps of vitdet are compared with detectron2's in models/dense/test_vitdet_steps.py
of_trained = pytest.mark.parametrize(
    "system",
    [pytest.param(s, marks=pytest.mark.slow if s == "vitdet" else ()) for s in reference.SYSTEMS],
)


@of_trained
def test_losses_of_eight_steps_are_those_of_the_reference(system: str) -> None:
    stored = reference.arrays(f"{system}_steps")["losses"]
    wanted = stored.mean(1) if system == "vitdet" else stored  # per image
    got = np.array(
        [[step[f"loss/{name}"] for name in reference.LOSSES[system]] for step in trained(system)[0]]
    )
    np.testing.assert_allclose(got[:3], wanted[:3], rtol=0, atol=1e-4)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-3)
    assert got[-1].sum() < 0.9 * got[0].sum()


@of_trained
def test_parameters_after_eight_steps_are_those_of_the_reference(system: str) -> None:
    """The smaller ones whole; of all, how far they have moved. Not those whose gradient is 0 but
    for rounding."""
    _, first, state = trained(system)
    stored = {
        kind: {
            name: value
            for name, value in reference.starting(f"{system}_steps", f"{kind}/").items()
            if not name.endswith(reference.ROUNDING)
        }
        for kind in ("after", "moved")
    }
    after, before = flat(state.params), flat(first)
    wanted, checked = flat(reference.filled(system, stored["after"])), 0
    for path, value in after.items():
        known = wanted[path] != reference.UNKNOWN
        np.testing.assert_allclose(
            value[known], wanted[path][known], rtol=0, atol=5e-4, err_msg=path
        )
        checked += known.sum()
    assert checked > 2000
    norms = {name: value[0] for name, value in stored["moved"].items()}
    distance, checked = flat(reference.filled(system, norms)), 0
    for path, value in after.items():
        moved = value - before[path]
        for norm in np.unique(distance[path][distance[path] != reference.UNKNOWN]):
            got = np.linalg.norm(moved[distance[path] == norm])
            np.testing.assert_allclose(got, norm, rtol=0.02, err_msg=path)
            checked += 1
    assert checked == len(norms)
    if system == "upernet":
        wanted = {path.removeprefix("statistics/"): value for path, value in wanted.items()}
        for path, value in flat(state.opt["running"].statistics).items():
            np.testing.assert_allclose(value, wanted[path], rtol=0, atol=5e-4, err_msg=path)

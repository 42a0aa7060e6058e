"""Workdirs of runs that never ran: random parameters, saved as a run saves them."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import config as configuration
from m3i_jax import parallel, schema
from m3i_jax.models import m3i
from m3i_jax.objective import ema
from m3i_jax.parallel.sharding import path_text
from m3i_jax.training import plan, task
from m3i_jax.training.checkpoint import Checkpoints
from tests import toy


def random(config: schema.Config, seed: int = 0) -> Any:
    """Parameters of a configuration, all of them N(0, 0.3^2)."""
    terms = plan.build_plan(config).terms
    make = lambda key: m3i.init(
        config, key, terms, classes=config.data.classes, vocabulary=toy.VOCABULARY
    )
    r = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray((0.3 * r.normal(size=leaf.shape)).astype(leaf.dtype))
    return jax.tree.map(draw, jax.eval_shape(make, jax.random.key(0)))


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {
        path_text(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def run(
    workdir: pathlib.Path, config: schema.Config, *, seed: int = 1, devices: int = 1
) -> tuple[Any, Any]:
    """A run that saved at step 4 from so many devices; its (parameters, momentum average)."""
    params = random(config, seed)
    average = {"encoder": jax.tree.map(lambda leaf: np.asarray(leaf) + 0.1, params["encoder"])}
    made = task.State(
        step=jnp.int32(4), params=params, opt={"target": ema.TargetState(jnp.int32(4), average)}
    )
    laid = jax.device_put(
        made,
        parallel.tree_shardings(parallel.make_mesh((1, devices, 1), jax.devices()[:devices]), made),
    )
    assert devices == 1 or any(
        not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(laid.params["encoder"])
    )
    checkpoints = Checkpoints(workdir / "checkpoints", 2)
    checkpoints.save(4, laid, {"samples_seen": 64, "fingerprint": "x"})
    checkpoints.wait()
    checkpoints.close()
    (workdir / "config.txt").write_text(configuration.config_to_text(config))
    return params, average

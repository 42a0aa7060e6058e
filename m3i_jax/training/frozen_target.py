"""The encoder of another run as the frozen target of a run: `objective.target_checkpoint`."""

import pathlib
from typing import Any

import jax
import numpy as np

from m3i_jax import config as configuration
from m3i_jax import parallel, schema
from m3i_jax.errors import UserError
from m3i_jax.parallel import distributed
from m3i_jax.parallel.sharding import path_text
from m3i_jax.training import saved_arrays, silent_settings, weight_source


def load_encoder(workdir: str, config: schema.Config, template: Any, shardings: Any) -> Any:
    """Returns the encoder of the newest checkpoint of another run, as that run is evaluated, for a
    frozen target.

    Args:
      workdir: directory of that run.
      config: settings of this run.
      template, shardings: of the encoder of this run, which must have the same shapes.

    Raises:
      UserError: there is no checkpoint, or its encoder has other shapes, arrays or settings, or is
        not finite.
    """
    key = "config.objective.target_checkpoint"
    with parallel.fail_together(key):
        run, theirs = saved_arrays.RunWeights(workdir, key), schema.Config()
        others: list[str] = []
        if (pathlib.Path(workdir) / "config.txt").is_file():
            theirs = configuration.resolve(configuration.load_from_workdir(workdir, key))
            others = _other_settings(theirs, config)
        weights = weight_source.evaluated_weights(theirs)
        paths = weight_source.paths_in_state(run, weights, theirs)
    distributed.assert_same_on_all_hosts(key, {key: f"{workdir} (step {run.step:,}, {weights})"})
    leaves, structure = jax.tree_util.tree_flatten_with_path(template)
    own = {"encoder/" + path_text(path): leaf.shape for path, leaf in leaves}
    shapes = {path: run.shapes[of] for path, of in paths.items() if path.startswith("encoder/")}
    # a target reads no mask token, which may be on one side alone
    unread = {path for path in (*own, *shapes) if path.endswith("/mask_token")}
    if differences := [
        f"{path} {shapes.get(path, 'absent')} in the checkpoint, {own.get(path, 'absent')} in this"
        " run"
        for path in dict.fromkeys([*own, *shapes])
        if shapes.get(path) != own.get(path) and path not in unread
    ]:
        raise UserError(
            f"{key}: {workdir!r}: its encoder has other shapes ({len(differences)} arrays differ,"
            f" first {differences[0]}); use the same model settings"
        )
    if others:
        raise UserError(
            f"{key}: {workdir!r}: its encoder was trained with {', '.join(others)}; set these"
            " values here, too: it reads the views of this run"
        )
    layouts = dict(zip(own, jax.tree.leaves(shardings), strict=True))
    arrays = weight_source.read_trained(
        run, {p: (paths[p], layout) for p, layout in layouts.items() if p not in unread}
    )
    for path in unread & layouts.keys():
        zeros = np.zeros(own[path], np.float32)
        arrays[path] = jax.make_array_from_callback(zeros.shape, layouts[path], zeros.__getitem__)
    return jax.tree.unflatten(structure, [arrays[path] for path in own])


def _other_settings(theirs: schema.Config, config: schema.Config) -> list[str]:
    """Settings of a run that no shape of its encoder shows, that change what it computes of an
    image, and that differ from these."""
    pairs = silent_settings.setting_differences(theirs, config)
    for name in ("mean", "std"):
        values = (getattr(theirs.data.augment, name), getattr(config.data.augment, name))
        if values[0] != values[1]:
            pairs[f"data.augment.{name}"] = values
    return [f"{name}={value} ({own} in this run)" for name, (value, own) in pairs.items()]

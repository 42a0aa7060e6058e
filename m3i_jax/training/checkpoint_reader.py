"""Reading single arrays from the newest checkpoint of another run, by path and on any mesh, for
`init_from`, evaluation and export."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from m3i_jax import library_errors
from m3i_jax.errors import UserError
from m3i_jax.parallel.sharding import path_text
from m3i_jax.training import array_checksums, checkpoint_dir, file_checksums


class RunWeights:
    """The newest checkpoint of a run, read array by array.

    Args:
      workdir: directory of the run.
      key: the flag or setting that gave it, for error messages.

    Attributes:
      step: of the checkpoint.
      shapes: {path: shape} of its state, such as `params/encoder/patch_embed/kernel`.

    Raises:
      UserError: there is no checkpoint, or it cannot be read.
    """

    def __init__(self, workdir: str, key: str):
        directory, where = pathlib.Path(workdir) / "checkpoints", f"{key}: {workdir!r}"
        if not directory.is_dir():
            raise UserError(
                f"{where} has no checkpoints; give the --workdir of a run that saved one"
            )
        steps = checkpoint_dir.complete_steps(directory)
        if not steps:
            raise UserError(
                f"{where} has no complete checkpoint; give the --workdir of a run that saved one"
            )
        self.step, self._key = steps[-1], key
        self._path = directory.absolute() / str(self.step)
        library_errors.drop_repeated_errors()
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "position": ocp.JsonCheckpointHandler()}
        self._reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))
        with checkpoint_dir.hold_step(self._path):
            if problems := checkpoint_dir.retry_read(
                lambda: checkpoint_dir.find_damage(self._path), self._path, print
            ):
                raise UserError(
                    f"{where}: its checkpoint {self.step} is damaged ({problems[0]}); move it away"
                    " to use the one before, or give another run"
                )
            try:
                tree = self._reader.metadata(self._path).item_metadata["state"].tree
            except Exception as error:  # Orbax has no exception class for a damaged file
                raise self._damaged(error) from error
        self.shapes = {
            path_text(path): tuple(leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    def _damaged(self, error: Exception) -> UserError:
        return UserError(
            f"{self._key}: checkpoint {self._path} cannot be read"
            f" ({' '.join(str(error).split())[:200]}); give another run"
        )

    def read(self, shardings: Mapping[str, Any]) -> dict[str, Any]:
        """Read arrays by path. Raises UserError if one differs from what was trained.

        Args:
          shardings: {path: sharding}; None: as a numpy array on every host.
        """
        item: dict[str, Any] = {}
        restore_args: dict[str, Any] = {}
        for path, sharding in shardings.items():
            plain = ocp.RestoreArgs(restore_type=np.ndarray)
            set_leaf(item, path, jax.ShapeDtypeStruct(self.shapes[path], np.float32))
            set_leaf(
                restore_args,
                path,
                (
                    plain
                    if sharding is None
                    else ocp.ArrayRestoreArgs(sharding=sharding, global_shape=self.shapes[path])
                ),
            )
        restore = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
        with checkpoint_dir.hold_step(self._path):
            try:
                tree = self._reader.restore(self._path, args=ocp.args.Composite(state=restore))[
                    "state"
                ]
            except Exception as error:
                raise self._damaged(error) from error
        out = {path_text(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        # a step of an older version has no checksums of its arrays
        saved = (file_checksums.read_checksums(self._path) or {}).get("arrays")
        if saved is not None and (changed := array_checksums.changed_arrays(out, saved)):
            raise self._damaged(ValueError(f"{changed[0]}: differs from what was trained"))
        return out


def load_encoder(workdir: str, template: Any, shardings: Any) -> Any:
    """The online encoder of the newest checkpoint of another run, for a frozen target.

    Args:
      workdir: directory of that run.
      template, shardings: of the encoder of this run, which must have the same shapes.

    Raises:
      UserError: there is no checkpoint, or its encoder has other shapes.
    """
    key = "config.objective.target_checkpoint"
    run = RunWeights(workdir, key)
    leaves, structure = jax.tree_util.tree_flatten_with_path(template)
    own = {"params/encoder/" + path_text(path): leaf.shape for path, leaf in leaves}
    if differences := [
        f"{path} {run.shapes.get(path, 'absent')} in the checkpoint, {shape} in this run"
        for path, shape in own.items()
        if run.shapes.get(path) != shape
    ]:
        raise UserError(
            f"{key}: {workdir!r}: its encoder has other shapes ({len(differences)} arrays differ,"
            f" first {differences[0]}); use the same model settings"
        )
    arrays = run.read(dict(zip(own, jax.tree.leaves(shardings), strict=True)))
    return jax.tree.unflatten(structure, [arrays[path] for path in own])


def set_leaf(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set a leaf of a nested dict by its path.

    >>> tree = {}; set_leaf(tree, "a/b", 1); tree
    {'a': {'b': 1}}
    """
    *parents, last = path.split("/")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[last] = value

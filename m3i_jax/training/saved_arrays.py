"""Arrays that Orbax wrote, read by path: those of the newest checkpoint of a run (`RunWeights`),
and the parameters of an export (`ExportedArrays`). Shapes come from the metadata, and a read takes
the arrays that are asked for alone."""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from m3i_jax import library_errors
from m3i_jax.errors import UserError, one_line
from m3i_jax.parallel.sharding import path_text
from m3i_jax.training import checkpoint_dir, checksums

Shapes = dict[str, tuple[int, ...]]


def _newest_step(workdir: str, key: str) -> pathlib.Path:
    """The newest complete step of a run. Raises UserError without one."""
    directory, where = pathlib.Path(workdir) / "checkpoints", f"{key}: {workdir!r}"
    if not directory.is_dir():
        raise UserError(f"{where} has no checkpoints; give the --workdir of a run that saved one")
    steps = checkpoint_dir.complete_steps(directory)
    if not steps:
        raise UserError(
            f"{where} has no complete checkpoint; give the --workdir of a run that saved one"
        )
    return directory.absolute() / str(steps[-1])


def _step_reader() -> ocp.Checkpointer:
    library_errors.drop_repeated_errors()
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "position": ocp.JsonCheckpointHandler()}
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))


def _damaged(step: pathlib.Path, key: str, error: Exception) -> UserError:
    return UserError(
        f"{key}: checkpoint {step} cannot be read ({one_line(error, 200)}); give another run"
    )


def _step_shapes(reader: ocp.Checkpointer, step: pathlib.Path, key: str) -> Shapes:
    try:
        tree = reader.metadata(step).item_metadata["state"].tree
    except Exception as error:  # Orbax has no exception class for a damaged file
        raise _damaged(step, key, error) from error
    return _shapes_of(tree)


def _shapes_of(tree: Any) -> Shapes:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_text(path): tuple(leaf.shape) for path, leaf in leaves}


def _flat(tree: Any) -> dict[str, Any]:
    return {path_text(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _partial_restore(shapes: Shapes, shardings: Mapping[str, Any]) -> Any:
    """Orbax's arguments for some arrays of a tree; a sharding of None: as numpy."""
    item: dict[str, Any] = {}
    restore_args: dict[str, Any] = {}
    for path, sharding in shardings.items():
        how = (
            ocp.RestoreArgs(restore_type=np.ndarray)
            if sharding is None
            else ocp.ArrayRestoreArgs(sharding=sharding, global_shape=shapes[path])
        )
        set_leaf(item, path, jax.ShapeDtypeStruct(shapes[path], np.float32))
        set_leaf(restore_args, path, how)
    return ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)


def saved_shapes(workdir: str, key: str) -> Shapes:
    """Returns {path: shape} of the state that a run saved last, as `RunWeights.shapes`, of which no
    file is verified: what reads the arrays does that.

    Args:
      workdir: directory of the run.
      key: the flag or setting that gave it, for error messages.

    Raises:
      UserError: there is no checkpoint, or its metadata cannot be read.
    """
    step = _newest_step(workdir, key)
    with checkpoint_dir.hold_step(step):
        try:
            return _step_shapes(_step_reader(), step, key)
        except UserError:
            return RunWeights(workdir, key).shapes  # names the damaged file, or the format


class RunWeights:
    """The newest checkpoint of a run, verified, and read array by array.

    Args:
      workdir: directory of the run.
      key: the flag or setting that gave it, for error messages.

    Attributes:
      workdir, key: as given.
      step: of the checkpoint.
      shapes: {path: shape} of its state, such as `params/encoder/patch_embed/kernel`.

    Raises:
      UserError: there is no checkpoint, or it cannot be read.
    """

    def __init__(self, workdir: str, key: str):
        self._path = _newest_step(workdir, key)
        self.step, self.workdir, self.key = int(self._path.name), workdir, key
        self._reader = _step_reader()
        with checkpoint_dir.hold_step(self._path):
            if problems := checkpoint_dir.retry_read(
                lambda: checkpoint_dir.find_damage(self._path), self._path, print
            ):
                raise UserError(
                    f"{key}: {workdir!r}: its checkpoint {self.step} is damaged ({problems[0]});"
                    " move it away to use the one before, or give another run"
                )
            self.shapes = _step_shapes(self._reader, self._path, key)

    def read(self, shardings: Mapping[str, Any]) -> dict[str, Any]:
        """Read arrays by path. Raises UserError if one differs from what was trained.

        Args:
          shardings: {path: sharding}; None: as a numpy array on every host.
        """
        restore = _partial_restore(self.shapes, shardings)
        with checkpoint_dir.hold_step(self._path):
            # before the hosts read together: the others would wait for one that cannot read this
            saved = checkpoint_dir.saved_checksums(self._path, print).get("arrays")
            try:
                tree = self._reader.restore(self._path, args=ocp.args.Composite(state=restore))[
                    "state"
                ]
            except Exception as error:
                raise _damaged(self._path, self.key, error) from error
        out = _flat(tree)
        # a step of an older version has no checksums of its arrays
        if saved is not None and (changed := checksums.changed_arrays(out, saved)):
            differs = ValueError(f"{changed[0]}: differs from what was trained")
            raise _damaged(self._path, self.key, differs)
        return out


class ExportedArrays:
    """A tree of parameters of an export, read on demand.

    Args:
      directory: that `checkpoint.write_tree` wrote.
      where: names the export, for error messages.

    Attributes:
      shapes: {path: shape} of all arrays.

    Raises:
      UserError: the metadata cannot be read.
    """

    def __init__(self, directory: pathlib.Path, where: str):
        library_errors.drop_repeated_errors()
        self._directory, self._where = directory.absolute(), where
        self._reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        try:
            metadata = self._reader.metadata(self._directory).item_metadata
            if metadata is None:  # Orbax logs the error of a missing or broken file
                raise FileNotFoundError("its file _METADATA is missing or damaged")
            self.shapes = _shapes_of(metadata.tree)
        except Exception as error:  # Orbax has no exception class for a damaged file
            raise self._damaged(error) from error

    def read(self, paths: Iterable[str]) -> dict[str, np.ndarray]:
        """Returns arrays by path. Raises UserError if they cannot be read."""
        if not (wanted := dict.fromkeys(paths)):
            return {}
        try:
            args = _partial_restore(self.shapes, wanted)
            return _flat(self._reader.restore(self._directory, args=args))
        except Exception as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> UserError:
        return UserError(f"{self._where} cannot be read ({one_line(error, 200)}); export it again")


def set_leaf(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set a leaf of a nested dict by its path.

    >>> tree = {}; set_leaf(tree, "a/b", 1); tree
    {'a': {'b': 1}}
    """
    *parents, last = path.split("/")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[last] = value

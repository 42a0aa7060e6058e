"""Checkpoints: the only place that knows Orbax. A checkpoint is the state (params, optimizer with target and balance statistics) and a
small JSON with the data position. Where a run starts, in this order:

    1. the newest complete step under <workdir>/checkpoints
    2. else the initial parameters of the configuration
"""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from m3i_jax.errors import UserError
from m3i_jax.parallel.rules import path_of


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: <workdir>/checkpoints, made if absent.
      keep: how many are kept.
    """

    def __init__(self, directory: pathlib.Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True)
        handlers = {"state": ocp.StandardCheckpointHandler(), "position": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options, item_handlers=handlers)

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Copies the state to the host and returns; the write goes on behind. A step that is already there is not written again."""
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)), force=True
        )

    def position(self, step: int) -> dict[str, Any]:
        """The JSON saved beside a state. Raises UserError if it cannot be read."""
        try:
            return self._manager.restore(step, args=ocp.args.Composite(position=ocp.args.JsonRestore()))["position"]
        except Exception as error:  # Orbax has no class of its own for a damaged file
            raise self._damaged(step, error) from error

    def _damaged(self, step: int, error: Exception) -> UserError:
        reason, place = " ".join(str(error).split())[:200], self._manager.directory / str(step)
        return UserError(f"checkpoint {step}: cannot be read ({reason}); if it is damaged, delete {place} and run again")

    def restore(self, step: int, template: Any, shardings: Any) -> Any:
        """The state of a step, laid out as this run wants it, on any number of devices.

        Args:
          step: a complete step.
          template: tree of jax.ShapeDtypeStruct.
          shardings: tree of shardings of the same structure.

        Raises:
          UserError: if the layout of the saved state is another one, or it cannot be read.
        """
        abstract = jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), template, shardings)
        try:
            different = self._difference(step, template)  # asked first: a read that fails leaves Orbax's other reads complaining
            if not different:
                return self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))["state"]
        except Exception as error:
            raise self._damaged(step, error) from error
        raise UserError(
            f"checkpoint {step}: does not fit this configuration ({different}); use another --workdir or the configuration of that run"
        )

    def _difference(self, step: int, template: Any) -> str:
        """The first arrays that are of another shape or type in the saved state, by path."""
        saved = self._manager.item_metadata(step)["state"]
        there, here = (
            {path_of(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
            for tree in (getattr(saved, "tree", saved), template)
        )
        paths = [path for path in {**here, **there} if here.get(path) != there.get(path)]
        paths.sort(key=lambda path: path.startswith("opt/"))  # moments and target only repeat what the parameters say
        told = [f"{path} is {there.get(path, 'absent')} there, {here.get(path, 'absent')} here" for path in paths[:3]]
        return ", ".join(told) + (f", and {len(paths) - 3} more" if len(paths) > 3 else "")

    def wait(self) -> None:
        """Until every save is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def encoder_of(workdir: str, template: Any, shardings: Any) -> Any:
    """The online encoder of the newest checkpoint of another run, for a frozen target.

    Args:
      workdir: directory of that run.
      template, shardings: of the encoder here, which must be of the same shape.

    Raises:
      UserError: if there is no checkpoint, or its encoder is another one.
    """
    place = pathlib.Path(workdir) / "checkpoints"
    where = f"config.objective.target_checkpoint: {workdir!r}"
    if not place.is_dir():
        raise UserError(f"{where} has no checkpoints; give the --workdir of a run that saved one")
    manager = ocp.CheckpointManager(place.absolute(), item_handlers={"state": ocp.PyTreeCheckpointHandler()})
    step = manager.latest_step()
    if step is None:
        raise UserError(f"{where} has no complete checkpoint; give the --workdir of a run that saved one")
    saved = {
        path_of(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(manager.item_metadata(step)["state"].tree)
    }
    here = {"params/encoder/" + path_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(template)}
    if wrong := [f"{path} {saved.get(path, 'absent')} there, {shape} here" for path, shape in here.items() if saved.get(path) != shape]:
        raise UserError(f"{where}: its encoder is another one ({len(wrong)} arrays differ, first {wrong[0]}); use the same model settings")
    abstract = jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), template, shardings)
    item = {"params": {"encoder": abstract}}
    restore = ocp.args.PyTreeRestore(item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True)
    out = manager.restore(step, args=ocp.args.Composite(state=restore))["state"]["params"]["encoder"]
    manager.close()
    return out

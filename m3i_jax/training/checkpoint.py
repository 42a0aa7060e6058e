"""Checkpoints: the only place that knows Orbax. A checkpoint is the state (params, optimizer with
target and balance statistics), a small JSON with the data position, and digests of all its files
and arrays and of its step. Where a run starts, in this order:

    1. the newest whole step under <workdir>/checkpoints
    2. else config.init_from: weights of another run, or of another project (training/init_from.py)
    3. else the initial parameters of the configuration

The way of a save: Orbax writes <step>.new behind the training, then its files are digested, and
only then it becomes <step>: a rename, so that a step is there whole or not at all. What is damaged
when a run starts becomes <step>.bad-<time>, and the step before is used. What
cannot be read is not damaged: the run waits for it, then stops, and renames nothing.
"""

import concurrent.futures
import contextlib
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from m3i_jax import parallel
from m3i_jax.errors import UserError
from m3i_jax.parallel.sharding import path_text
from m3i_jax.training import array_checksums, checkpoint_dir, file_checksums, malloc, orbax_errors

FORMAT = checkpoint_dir.FORMAT


class SavesFailed(RuntimeError):
    """Several saves in a row failed: a run that cannot be resumed is not worth going on with."""


class CheckpointDamaged(UserError):
    """What was read is not what was trained; the step was set aside, so that the one before is the
    newest now."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: <workdir>/checkpoints, made if absent.
      keep: how many are kept.
      say: prints a line; warnings go there.
    """

    MISSES = 3  # saves in a row that may fail before the run ends
    BACK_OFF = 10.0  # seconds before a failed save is tried again; twice as long each time
    LIMIT = 1800.0  # seconds that hosts wait for each other in a save or a restore
    # bytes of a file after which the next is begun: while a disk takes the one, a processor makes
    # the other
    FILE = 2**27

    def __init__(self, directory: pathlib.Path, keep: int, *, say: Callable[[str], None] = print):
        self._directory, self._keep, self._say = directory.absolute(), keep, say
        self._hosts, self._first = jax.process_count(), jax.process_index() == 0
        malloc.patch_tensorstore()
        orbax_errors.quiet_orbax()
        # Named processes: Orbax's barriers between all of them have no limit, those between named
        # ones do.
        together = ocp.options.MultiprocessingOptions(
            active_processes=set(range(self._hosts)) if self._hosts > 1 else None
        )
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(multiprocessing_options=together),
            # Random bits of float32 do not compress: trying takes longer than writing them.
            state=ocp.PyTreeCheckpointHandler(
                multiprocessing_options=together, use_compression=False
            ),
            position=ocp.JsonCheckpointHandler(multiprocessing_options=together),
        )
        self._orbax = ocp.AsyncCheckpointer(
            handler,
            multiprocessing_options=together,
            async_options=ocp.options.AsyncOptions(timeout_secs=int(self.LIMIT)),
        )
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, dict[str, Any], concurrent.futures.Future[None]] | None = None
        self._misses, self._again = 0, 0.0  # failed saves in a row; when to try again, 0: no need
        self._cleaned, self._there = False, -1  # the newest step that all hosts know to be there
        self._whole: set[int] = set()  # steps whose files were looked at
        if self._first:
            checkpoint_dir.make(self._directory)

    # What is there

    def latest(self) -> int | None:
        """The newest complete step on the disk, whether it is damaged or not; None without one."""
        return max(checkpoint_dir.complete_steps(self._directory), default=None)

    def newest_good(self) -> int | None:
        """The newest step whose files all are as they were written, None if there never was a step.
        What is damaged is set aside under another name, with a warning that names the file. All
        hosts get the same answer: the first looks.

        Raises: UserError: there are steps, but no good one: to start anew then is for a person to
          decide. Or one cannot be read.
        """
        good = parallel.exchange_values(
            "checkpoint", self._look() if self._first else "", limit=6 * 3600.0
        )[0]
        bad = sorted(p.name for p in self._directory.glob("*.bad-*"))
        if not good and bad:
            raise UserError(
                f"{self._directory}: no whole checkpoint is left ({', '.join(bad)[:200]}); move the"
                " directory away to start anew"
            )
        if good:
            self._whole.add(int(good))
        return int(good) if good else None

    def _look(self) -> str:
        """The newest whole step, "" without one; damaged ones are set aside on the way."""
        for step in reversed(
            checkpoint_dir.patiently(
                lambda: checkpoint_dir.complete_steps(self._directory), self._directory, self._say
            )
        ):
            place = self._directory / str(step)
            if not (wrong := self._complaints(step)):
                return str(step)
            self._say(checkpoint_dir.quarantine_step(place, wrong))
        return ""

    def _complaints(self, step: int) -> list[str]:
        place = self._directory / str(step)

        def look() -> list[str]:
            with checkpoint_dir.hold_step(place):
                return checkpoint_dir.complaints(place, self._say)

        return checkpoint_dir.patiently(look, place, self._say)

    # Saving

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Copies the state to the host and returns; the write goes on behind. A step that is
        already there is not written again.

        Raises:
          SavesFailed: the save before was one too many that failed.
        """
        self._settle()
        # One host's view of a shared disk may be behind: it alone would begin, and wait for all.
        if step not in (self._there, *checkpoint_dir.complete_steps(self._directory)):
            self._start(step, state, position)

    def retry(self) -> bool:
        """Whether a save failed and it is time to try again. Of several hosts, they do with the
        next regular save, which all come to."""
        if self._hosts > 1:
            return False
        if self._saving and self._saving[-1].done() and self._saving[-1].exception():
            self._settle()
        return bool(self._again) and time.monotonic() >= self._again

    def wait(self, state: Any = None) -> None:
        """Until every save is on disk. One that failed is tried again if its state is given. Raises
        SavesFailed."""
        while self._saving:
            step, position, _ = self._saving
            if self._settle() or state is None:
                return
            time.sleep(max(self._again - time.monotonic(), 0.0))
            self._start(step, state, position)

    def close(self) -> None:
        self._thread.shutdown()
        self._orbax.close()

    def _start(self, step: int, state: Any, position: dict[str, Any]) -> None:
        self._again = 0.0
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        try:
            if self._first and not self._cleaned:
                checkpoint_dir.remove_leftovers(self._directory)
            self._cleaned = True
            # sent before the state is given away, fetched behind
            arrays = array_checksums.checksum_arrays(state)
            whole = ocp.args.PyTreeSave(state, ocdbt_target_data_file_size=self.FILE)
            args = ocp.args.Composite(
                state=whole, position=ocp.args.JsonSave(position | {"format": FORMAT})
            )
            self._orbax.save(self._directory / f"{step}.new", args=args, force=True)
            done = self._thread.submit(self._finish, step, arrays)
            # the step has its name by then: nobody waits for it
            self._thread.submit(malloc.malloc_trim)
        except Exception as error:  # a full disk or no permission: told when the hosts next meet, as if it came later
            done.set_exception(error)
        self._saving = step, position, done

    def _finish(self, step: int, arrays: array_checksums.ArrayChecksums) -> None:
        """Behind the training: wait for the files, digest them, let them count."""
        self._orbax.wait_until_finished()
        if not self._first:
            return
        new = self._directory / f"{step}.new"
        file_checksums.write_checksums(new, format=FORMAT, step=step, arrays=arrays.read())
        os.rename(new, self._directory / str(step))
        checkpoint_dir.fsync_dir(self._directory)
        with contextlib.suppress(UserError):  # it only guards against the loss of all checkpoints
            checkpoint_dir.note_newest(self._directory, step)
        checkpoint_dir.retain_newest(self._directory, self._keep, self._say)

    def _settle(self) -> bool:
        """Wait for the save before. True if it is there now, or there was none."""
        if not self._saving:
            return True
        (step, _, done), self._saving = self._saving, None
        error = done.exception()
        reason = "" if error is None else " ".join(f"{type(error).__name__}: {error}".split())[:300]
        failed = {
            parallel.host_label(number): why
            for number, why in enumerate(
                parallel.exchange_values("saved", reason, limit=self.LIMIT)
            )
            if why
        }
        if not failed:
            self._misses, self._there = 0, step
            return True
        self._misses += 1
        if self._first:
            checkpoint_dir.remove_leftovers(self._directory)
        wait = self.BACK_OFF * 2 ** (self._misses - 1)
        self._again = time.monotonic() + wait
        why = (
            reason
            if self._hosts == 1
            else "; ".join(f"{host}: {text}" for host, text in failed.items())[:300]
        )
        told = f"checkpoint {step}: save {self._misses} of {self.MISSES} in a row failed ({why})"
        if self._misses >= self.MISSES:
            raise SavesFailed(told)
        self._say(
            f"warning: {told}; {self.latest() or 'no step'} is still there, it is tried again in"
            f" {wait:.0f} seconds or with the next"
        )
        return False

    # Restoring

    def position(self, step: int) -> dict[str, Any]:
        """The JSON saved beside a state. Raises UserError if it cannot be read."""
        place = self._directory / str(step)
        try:
            found = checkpoint_dir.patiently(
                lambda: checkpoint_dir.position(place), place, self._say
            )
        except ValueError as error:
            raise self._damaged(step, error) from error
        return {name: value for name, value in found.items() if name != "format"}

    def _damaged(self, step: int, error: Exception) -> UserError:
        reason, place = " ".join(str(error).split())[:200], self._directory / str(step)
        return UserError(
            f"checkpoint {step}: cannot be read ({reason}); if it is damaged, delete {place} and"
            " run again"
        )

    def restore(self, step: int, template: Any, shardings: Any) -> Any:
        """The state of a step, laid out as this run wants it, on any number of devices.

        Args:
          step: a complete step.
          template: tree of jax.ShapeDtypeStruct.
          shardings: tree of shardings of the same structure.

        Raises: UserError: if the layout of the saved state is another one, or it cannot be read.
          All differences are in <workdir>/layout.txt. Damaged: an array is not the one that was
          trained.
        """
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            template,
            shardings,
        )
        place = self._directory / str(step)
        try:
            with checkpoint_dir.hold_step(place):
                self._verify(step)
                # asked first: a read that fails leaves Orbax's other reads complaining
                different = self._difference(step, template)
                if not different:
                    how = ocp.checkpoint_utils.construct_restore_args(abstract)
                    args = ocp.args.Composite(
                        state=ocp.args.PyTreeRestore(abstract, restore_args=how)
                    )
                    state = self._orbax.restore(place, args=args)["state"]
        except UserError:
            raise
        except Exception as error:
            raise self._damaged(step, error) from error
        if not different:
            return self._compared(step, state)
        more, file = "", self._directory.parent / "layout.txt"
        if len(different) > 3:
            more = f", and {len(different) - 3} more: {file}"
            with contextlib.suppress(OSError):
                if self._first:
                    file.write_text("".join(f"{line}\n" for line in different), encoding="utf-8")
        raise UserError(
            f"checkpoint {step}: does not fit this configuration"
            f" ({', '.join(different[:3])}{more}); use another --workdir or the configuration of"
            " that run"
        )

    def _compared(self, step: int, state: Any) -> Any:
        """Arrays against the fingerprints that were taken of them; a step of an older version has
        none."""
        found = file_checksums.read_checksums(self._directory / str(step)) or {}
        wrong = array_checksums.changed_arrays(state, found["arrays"]) if "arrays" in found else []
        told = [f"{path}: is not what was trained" for path in wrong]
        counters = [
            leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)
            if path_text(path) == "step"
        ]
        # a copy of another step, of an older format
        if "step" not in found and any(int(counter) != step for counter in counters):
            wrong, told = (
                wrong or ["step"],
                told or [f"step: is {int(counters[0])}, that of another checkpoint"],
            )
        if not wrong:
            return state
        if self._first:
            self._say(checkpoint_dir.quarantine_step(self._directory / str(step), told))
        raise CheckpointDamaged(
            f"checkpoint {step}: {len(wrong)} arrays are not what was trained, first {wrong[0]}; it"
            " was set aside, run again"
        )

    def _verify(self, step: int) -> None:
        """Look at the files of a step that was not looked at yet: the first host does, for all."""
        if step in self._whole:
            return
        wrong = parallel.exchange_values(
            "verify", "; ".join(self._complaints(step)[:3]) if self._first else "", limit=6 * 3600.0
        )[0]
        if wrong:
            raise ValueError(wrong)
        self._whole.add(step)

    def _difference(self, step: int, template: Any) -> list[str]:
        """Every array that is missing in the saved state or here, or of another shape or type, by
        path."""
        saved = self._orbax.metadata(self._directory / str(step)).item_metadata["state"]
        there, here = (
            {
                path_text(path): f"{leaf.dtype}{list(leaf.shape)}"
                for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            }
            for tree in (getattr(saved, "tree", saved), template)
        )
        paths = [path for path in {**here, **there} if here.get(path) != there.get(path)]
        # moments and target only repeat what the parameters say
        paths.sort(key=lambda path: path.startswith("opt/"))
        return [
            f"{path} is {there.get(path, 'absent')} there, {here.get(path, 'absent')} here"
            for path in paths
        ]


class RunWeights:
    """The newest checkpoint of a run, read array by array: what `init_from`, evaluation and export
    take from it.

    Args:
      workdir: directory of the run.
      key: the flag or setting that named it, for error messages.

    Attributes:
      step: of the checkpoint.
      shapes: {path: shape} of its state, such as `params/encoder/patch_embed/kernel`.

    Raises:
      UserError: there is no checkpoint, or it cannot be read.
    """

    def __init__(self, workdir: str, key: str):
        place, where = pathlib.Path(workdir) / "checkpoints", f"{key}: {workdir!r}"
        if not place.is_dir():
            raise UserError(
                f"{where} has no checkpoints; give the --workdir of a run that saved one"
            )
        listed = checkpoint_dir.complete_steps(place)
        if not listed:
            raise UserError(
                f"{where} has no complete checkpoint; give the --workdir of a run that saved one"
            )
        self.step, self._at, self._key = listed[-1], place.absolute() / str(listed[-1]), key
        orbax_errors.quiet_orbax()
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "position": ocp.JsonCheckpointHandler()}
        self._reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))
        with checkpoint_dir.hold_step(self._at):
            if wrong := checkpoint_dir.patiently(
                lambda: checkpoint_dir.complaints(self._at), self._at, print
            ):
                raise UserError(
                    f"{where}: its checkpoint {self.step} is damaged ({wrong[0]}); set it aside and"
                    " give the one before, or another run"
                )
            try:
                tree = self._reader.metadata(self._at).item_metadata["state"].tree
            except Exception as error:  # Orbax has no class of its own for a damaged file
                raise self._damaged(error) from error
        self.shapes = {
            path_text(path): tuple(leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    def _damaged(self, error: Exception) -> UserError:
        return UserError(
            f"{self._key}: checkpoint {self._at} cannot be read"
            f" ({' '.join(str(error).split())[:200]}); give another run"
        )

    def read(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Arrays by path.

        Args:
          wanted: {path: sharding}; None: as a numpy array on every host.
        """
        item: dict[str, Any] = {}
        how: dict[str, Any] = {}
        for path, sharding in wanted.items():
            plain = ocp.RestoreArgs(restore_type=np.ndarray)
            set_leaf(item, path, jax.ShapeDtypeStruct(self.shapes[path], np.float32))
            set_leaf(
                how,
                path,
                (
                    plain
                    if sharding is None
                    else ocp.ArrayRestoreArgs(sharding=sharding, global_shape=self.shapes[path])
                ),
            )
        restore = ocp.args.PyTreeRestore(item, restore_args=how, partial_restore=True)
        with checkpoint_dir.hold_step(self._at):
            try:
                got = self._reader.restore(self._at, args=ocp.args.Composite(state=restore))[
                    "state"
                ]
            except Exception as error:
                raise self._damaged(error) from error
        out = {path_text(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(got)}
        # a step of an older version has none
        noted = (file_checksums.read_checksums(self._at) or {}).get("arrays")
        if noted is not None and (wrong := array_checksums.changed_arrays(out, noted)):
            raise self._damaged(ValueError(f"{wrong[0]}: is not what was trained"))
        return out


def load_encoder(workdir: str, template: Any, shardings: Any) -> Any:
    """The online encoder of the newest checkpoint of another run, for a frozen target.

    Args:
      workdir: directory of that run.
      template, shardings: of the encoder here, which must be of the same shape.

    Raises:
      UserError: if there is no checkpoint, or its encoder is another one.
    """
    key = "config.objective.target_checkpoint"
    run = RunWeights(workdir, key)
    leaves, structure = jax.tree_util.tree_flatten_with_path(template)
    here = {"params/encoder/" + path_text(path): leaf.shape for path, leaf in leaves}
    if wrong := [
        f"{p} {run.shapes.get(p, 'absent')} there, {shape} here"
        for p, shape in here.items()
        if run.shapes.get(p) != shape
    ]:
        raise UserError(
            f"{key}: {workdir!r}: its encoder is another one ({len(wrong)} arrays differ, first"
            f" {wrong[0]}); use the same model settings"
        )
    got = run.read(dict(zip(here, jax.tree.leaves(shardings), strict=True)))
    return jax.tree.unflatten(structure, [got[path] for path in here])


def set_leaf(tree: dict[str, Any], path: str, value: Any) -> None:
    """Sets one leaf of a nested dict by its path.

    >>> tree = {}; set_leaf(tree, "a/b", 1); tree
    {'a': {'b': 1}}
    """
    *way, last = path.split("/")
    for part in way:
        tree = tree.setdefault(part, {})
    tree[last] = value


def write_tree(directory: pathlib.Path, tree: Any) -> None:
    """A tree of arrays as a checkpoint of its own, without anything of a run, for
    `ocp.StandardCheckpointer().restore(directory)`."""
    shutil.rmtree(directory, ignore_errors=True)
    with ocp.StandardCheckpointer() as writer:
        writer.save(directory.absolute(), tree)

"""Saving and restoring the checkpoints of a run with Orbax. A checkpoint holds the state (params,
optimizer with target and balance statistics), a small JSON with the data position, and checksums of
its files, its arrays and its step number. A run starts from the first of these:

    1. the newest undamaged step under <workdir>/checkpoints
    2. config.init_from: weights of another run or another project (training/init_from.py)
    3. the initial parameters of the configuration

A save writes <step>.new in the background, computes the checksums of its files, and renames it to
<step>, so that a step is complete or absent. In a bucket without hierarchical namespace the rename
moves file by file; one that was interrupted is finished at the next start. At a start, a damaged
step is renamed to <step>.bad-<time> and the step before it is used. A step that cannot be read
counts as undamaged: the run retries, then stops, and renames nothing. What a host alone meets is
raised on all.
"""

import concurrent.futures
import contextlib
import json
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from m3i_jax import library_errors, parallel
from m3i_jax.errors import RunStopped, UserError
from m3i_jax.parallel.sharding import path_text
from m3i_jax.training import checkpoint_dir, checksums, malloc

FORMAT = checkpoint_dir.FORMAT


class SavesFailed(RuntimeError):
    """Several saves in a row failed: the run could not be resumed, so it ends."""


class CheckpointDamaged(UserError):
    """Restored arrays differ from those that were trained. The step was set aside, so the one
    before it is now the newest."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: <workdir>/checkpoints, created if absent.
      keep: number of steps to keep.
      log: logs a line; gets the warnings.
    """

    MAX_FAILURES = 3  # failed saves in a row that end the run
    BACK_OFF = 10.0  # seconds before a failed save is retried; doubles with each failure
    LIMIT = 1800.0  # seconds that hosts wait for each other in a save or a restore
    FILE_SIZE = 2**27  # bytes of a file of arrays: the disk writes one while the next is encoded

    def __init__(self, directory: pathlib.Path, keep: int, *, log: Callable[[str], None] = print):
        self._directory, self._keep, self._log = directory.absolute(), keep, log
        self._hosts, self._first = jax.process_count(), jax.process_index() == 0
        malloc.patch_tensorstore()
        library_errors.drop_repeated_errors()
        # Orbax's barriers between all processes have no time limit, those between named ones do.
        multiprocessing = ocp.options.MultiprocessingOptions(
            active_processes=set(range(self._hosts)) if self._hosts > 1 else None
        )
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(multiprocessing_options=multiprocessing),
            # float32 weights do not compress: trying takes longer than writing them
            state=ocp.PyTreeCheckpointHandler(
                multiprocessing_options=multiprocessing, use_compression=False
            ),
            position=ocp.JsonCheckpointHandler(multiprocessing_options=multiprocessing),
        )
        self._orbax = ocp.AsyncCheckpointer(
            handler,
            multiprocessing_options=multiprocessing,
            async_options=ocp.options.AsyncOptions(timeout_secs=int(self.LIMIT)),
        )
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, dict[str, Any], concurrent.futures.Future[None]] | None = None
        self._failures, self._retry_at = 0, 0.0  # failed saves in a row; 0: no retry is due
        self._cleaned, self._saved = False, -1  # the newest step that all hosts know to be saved
        self._verified: set[int] = set()  # steps whose files were verified
        if self._first:
            checkpoint_dir.make_checkpoint_dir(self._directory)

    # Listing

    def latest(self) -> int | None:
        """Returns the newest complete step on the disk, even if it is damaged; None without one."""
        return max(checkpoint_dir.complete_steps(self._directory), default=None)

    def newest_good(self) -> int | None:
        """Returns the newest step whose files are as they were written; None if there never was a
        step. Damaged steps are renamed, with a warning that names the file. Host 0 verifies, and
        all hosts get its answer.

        Raises: UserError: all steps are damaged, so a person must decide to start again; or a step
          cannot be read.
        """
        good = self._ask_first("checkpoint", self._find_good)
        if good:
            self._verified.add(int(good))
        return int(good) if good else None

    def _ask_first(self, name: str, ask: Callable[[], str], limit: float = 6 * 3600.0) -> str:
        """The answer of host 0 on every host, or its error."""
        answer = ""
        with parallel.fail_together(name, limit=limit):
            if self._first:
                answer = ask()
        return parallel.exchange_values(f"{name}, answer", answer, limit=self.LIMIT)[0]

    def _find_good(self) -> str:
        """The newest undamaged step, "" without one; sets newer ones aside."""
        steps = checkpoint_dir.retry_read(
            lambda: checkpoint_dir.complete_steps(self._directory), self._directory, self._log
        )
        for step in reversed(steps):
            path = self._directory / str(step)
            if not (problems := self._find_damage(step)):
                return str(step)
            if checkpoint_dir.finish_rename(path, self._log):
                if not (problems := self._find_damage(step)):
                    return str(step)
                if len(steps) == 1 and checkpoint_dir.never_saved(self._directory):
                    self._log(checkpoint_dir.drop_first(path, problems))
                    return ""
            self._log(checkpoint_dir.quarantine_step(path, problems))
        if bad := sorted(path.name for path in self._directory.glob("*.bad-*")):
            raise UserError(
                f"{self._directory}: no undamaged checkpoint is left ({', '.join(bad)[:200]});"
                " restore one, or choose another --workdir to start from step 0"
            )
        return ""

    def _find_damage(self, step: int) -> list[str]:
        path = self._directory / str(step)

        def verify() -> list[str]:
            with checkpoint_dir.hold_step(path):
                return checkpoint_dir.find_damage(path, self._log)

        return checkpoint_dir.retry_read(verify, path, self._log)

    # Saving

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Copy the state to the host and return; files are written in the background. A step that
        is already saved is not written again.

        Raises:
          SavesFailed: the previous save failed, as the last of MAX_FAILURES in a row.
        """
        self._finish_previous()
        # The view that one host has of a shared disk may be old: it alone would start a save, or
        # none. The first host decides.
        there = step == self._saved
        with contextlib.suppress(OSError):  # a disk that fails: the save fails too, and is retried
            there = there or step in checkpoint_dir.complete_steps(self._directory)
        answers = parallel.exchange_values("save", "there" if there else "", limit=self.LIMIT)
        if not answers[0]:
            self._start(step, state, position)

    def retry(self) -> bool:
        """Returns whether a save failed and its retry is due. Several hosts retry with the next
        regular save, which all of them reach."""
        if self._hosts > 1:
            return False
        if self._saving and self._saving[-1].done() and self._saving[-1].exception():
            self._finish_previous()
        return bool(self._retry_at) and time.monotonic() >= self._retry_at

    def wait(self, state: Any = None) -> None:
        """Wait until every save is on disk. A failed save is retried if its state is given. Raises
        SavesFailed."""
        while self._saving:
            step, position, _ = self._saving
            if self._finish_previous() or state is None:
                return
            time.sleep(max(self._retry_at - time.monotonic(), 0.0))
            self._start(step, state, position)

    def close(self) -> None:
        self._thread.shutdown()
        self._orbax.close()

    def _start(self, step: int, state: Any, position: dict[str, Any]) -> None:
        self._retry_at = 0.0
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        try:
            if self._first and not self._cleaned:
                checkpoint_dir.remove_leftovers(self._directory)
            # again before the save after the next: threads of one that failed may write on
            self._cleaned = self._failures == 0
            # dispatched before the next step donates the state's buffers, fetched in the background
            arrays = checksums.checksum_arrays(state)
            tree = ocp.args.PyTreeSave(state, ocdbt_target_data_file_size=self.FILE_SIZE)
            args = ocp.args.Composite(
                state=tree, position=ocp.args.JsonSave(position | {"format": FORMAT})
            )
            self._orbax.save(self._directory / f"{step}.new", args=args, force=True)
            done = self._thread.submit(self._finish, step, arrays)
            self._thread.submit(malloc.malloc_trim)  # after the rename: no save waits for it
        except Exception as error:
            # a full disk or no permission: reported at the next save, like a later failure
            done.set_exception(error)
        self._saving = step, position, done

    def _finish(self, step: int, arrays: checksums.ArrayChecksums) -> None:
        """In the background: wait for the files, write their checksums, rename the step."""
        self._orbax.wait_until_finished()
        if not self._first:
            return
        new = self._directory / f"{step}.new"
        checksums.write_checksums(new, format=FORMAT, step=step, arrays=arrays.read())
        checkpoint_dir.rename_step(new, self._directory / str(step))
        with contextlib.suppress(UserError):  # the note only guards against a lost directory
            checkpoint_dir.note_newest(self._directory, step)
        checkpoint_dir.retain_newest(self._directory, self._keep, self._log)

    def _finish_previous(self) -> bool:
        """Wait for the previous save on all hosts. True if it succeeded, or there was none."""
        if not self._saving:
            return True
        (step, _, done), self._saving = self._saving, None
        error = done.exception()
        reason = "" if error is None else " ".join(f"{type(error).__name__}: {error}".split())[:300]
        failed = {
            parallel.host_label(host): text
            for host, text in enumerate(parallel.exchange_values("saved", reason, limit=self.LIMIT))
            if text
        }
        if not failed:
            self._failures, self._saved = 0, step
            return True
        self._failures, self._cleaned = self._failures + 1, False
        newest = "not known"
        with contextlib.suppress(OSError):  # the disk may still fail
            if self._first:
                checkpoint_dir.remove_leftovers(self._directory)
            step_ = self.latest()
            newest = "none" if step_ is None else str(step_)
        wait = self.BACK_OFF * 2 ** (self._failures - 1)
        self._retry_at = time.monotonic() + wait
        reasons = (
            reason
            if self._hosts == 1
            else "; ".join(f"{host}: {text}" for host, text in failed.items())[:300]
        )
        message = (
            f"checkpoint {step}: save {self._failures} of {self.MAX_FAILURES} in a row failed"
            f" ({reasons})"
        )
        if self._failures >= self.MAX_FAILURES:
            raise SavesFailed(message)
        self._log(
            f"warning: {message}; the newest checkpoint is {newest}, the save is retried in"
            f" {wait:.0f} seconds or with the next one"
        )
        return False

    # Restoring

    def position(self, step: int) -> dict[str, Any]:
        """Returns the JSON that was saved with a state, as host 0 reads it. Raises UserError if it
        cannot be read."""
        path = self._directory / str(step)

        def read() -> str:
            try:
                saved = checkpoint_dir.retry_read(
                    lambda: checkpoint_dir.position(path), path, self._log
                )
            except ValueError as error:
                raise self._damaged(step, error) from error
            return json.dumps({name: value for name, value in saved.items() if name != "format"})

        saved: dict[str, Any] = json.loads(self._ask_first("position", read))
        return saved

    def _damaged(self, step: int, error: Exception) -> UserError:
        reason, path = " ".join(str(error).split())[:200], self._directory / str(step)
        return UserError(
            f"checkpoint {step}: cannot be read ({reason}); if it is damaged, delete {path} and"
            " run again"
        )

    def restore(self, step: int, template: Any, shardings: Any) -> Any:
        """Returns the state of a step with the shardings of this run, which may have other devices.

        Args:
          step: a complete step.
          template: tree of jax.ShapeDtypeStruct.
          shardings: tree of shardings of the same structure.

        Raises:
          UserError: the saved state has other arrays, all of which <workdir>/layout.txt lists, or
            cannot be read.
          CheckpointDamaged: an array differs from the one that was trained.
        """
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            template,
            shardings,
        )
        path = self._directory / str(step)
        try:
            with checkpoint_dir.hold_step(path):
                self._verify(step)
                # before the collectives, in which the others would wait for a host that cannot
                # read; and after one failed read, Orbax logs errors of all others
                with parallel.fail_together(f"checkpoint {step}", limit=self.LIMIT):
                    saved = checkpoint_dir.saved_checksums(path, self._log)
                    try:
                        differences = self._differences(step, template)
                    except Exception as error:
                        raise self._damaged(step, error) from error
                if not differences:
                    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
                    args = ocp.args.Composite(
                        state=ocp.args.PyTreeRestore(abstract, restore_args=restore_args)
                    )
                    state = self._orbax.restore(path, args=args)["state"]
        except (UserError, RunStopped):
            raise
        except Exception as error:
            raise self._damaged(step, error) from error
        if not differences:
            return self._verify_arrays(step, state, saved)
        more, file = "", self._directory.parent / "layout.txt"
        if len(differences) > 3:
            more = f", and {len(differences) - 3} more: {file}"
            with contextlib.suppress(OSError):
                if self._first:
                    file.write_text("".join(f"{line}\n" for line in differences), encoding="utf-8")
        raise UserError(
            f"checkpoint {step}: does not fit this configuration"
            f" ({', '.join(differences[:3])}{more}); use another --workdir or the configuration of"
            " that run"
        )

    def _verify_arrays(self, step: int, state: Any, saved: dict[str, Any]) -> Any:
        """The state, if its arrays have the checksums that were saved with them; a step of an older
        version has none."""
        changed = checksums.changed_arrays(state, saved["arrays"]) if "arrays" in saved else []
        problems = [f"{path}: differs from what was trained" for path in changed]
        counters = [
            leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)
            if path_text(path) == "step"
        ]
        # a copy of another step, in an older format
        if "step" not in saved and any(int(counter) != step for counter in counters):
            changed = changed or ["step"]
            problems = problems or [f"step: is {int(counters[0])}, that of another checkpoint"]
        if not changed:
            return state
        with parallel.fail_together("set aside", limit=self.LIMIT):
            if self._first:
                self._log(checkpoint_dir.quarantine_step(self._directory / str(step), problems))
        raise CheckpointDamaged(
            f"checkpoint {step}: {len(changed)} arrays differ from what was trained, first"
            f" {changed[0]}; it was set aside, run again"
        )

    def _verify(self, step: int) -> None:
        """Verify the files of a step once; host 0 does it for all."""
        if step in self._verified:
            return
        problems = self._ask_first("verify", lambda: "; ".join(self._find_damage(step)[:3]))
        if problems:
            raise ValueError(problems)
        self._verified.add(step)

    def _differences(self, step: int, template: Any) -> list[str]:
        """Arrays that are absent from the saved state or from this run, or differ in shape or
        dtype."""
        metadata = self._orbax.metadata(self._directory / str(step)).item_metadata["state"]
        saved, own = (
            {
                path_text(path): f"{leaf.dtype}{list(leaf.shape)}"
                for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            }
            for tree in (getattr(metadata, "tree", metadata), template)
        )
        paths = [path for path in {**own, **saved} if own.get(path) != saved.get(path)]
        # parameters first: moments and target repeat their differences
        paths.sort(key=lambda path: path.startswith("opt/"))
        return [
            f"{path} is {saved.get(path, 'absent')} in the checkpoint,"
            f" {own.get(path, 'absent')} in this run"
            for path in paths
        ]


def write_tree(directory: pathlib.Path, tree: Any) -> None:
    """Write a tree of arrays as a plain Orbax checkpoint, which
    `ocp.StandardCheckpointer().restore(directory)` reads."""
    shutil.rmtree(directory, ignore_errors=True)
    with ocp.StandardCheckpointer() as writer:
        writer.save(directory.absolute(), tree)

"""A dump of a step that went wrong, for --mode=replay: the state before it, its batch, the
configuration and its metrics. All randomness of a step is keyed by the seed and the positions in
the batch, so nothing else is needed.

    dumps/<step>/step.json          step, metrics, versions
    dumps/<step>/config.txt         the completed configuration
    dumps/<step>/batch-<host>.npz   the rows of each host
    dumps/<step>/state/<step - 1>   a checkpoint
    dumps/<step>/digests/*          of the first three
"""

import io
import math
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import config as configuration
from m3i_jax import parallel, run_files, version
from m3i_jax.errors import UserError
from m3i_jax.parallel.sharding import path_text
from m3i_jax.run_files import write_json_atomic, write_text_atomic
from m3i_jax.training import step as step_module
from m3i_jax.training import targets
from m3i_jax.training.checkpoint import Checkpoints
from m3i_jax.training.task import State, make_task
from m3i_jax.training.trainer import Trainer

_REMEDY = "restore the dump, or delete it to replay the one before"


def write_dump(
    directory: pathlib.Path,
    trainer: Trainer,
    state: State,
    batch: Mapping[str, np.ndarray],
    step: int,
    values: Mapping[str, float],
) -> pathlib.Path:
    """Write the dump of a step whose update was skipped. Every host of the run calls this.

    Args:
      directory: <workdir>/dumps.
      trainer: of the run.
      state: after the step, which changed only the counter.
      batch: this host's rows.
      step: the number of the step in the log.
      values: its metrics.

    Returns:
      the directory of the dump.

    Raises:
      OSError, or the errors of a save.
    """
    dump = directory / str(step)
    with parallel.fail_together("dump, rows"):  # all save the state, or none
        dump.mkdir(mode=0o700, parents=True, exist_ok=True)
        rows = dump / f"batch-{jax.process_index()}.npz"
        np.savez(rows, **dict[str, Any](batch))
        run_files.note_mark(rows, run_files.file_mark(rows.read_bytes()))
        if jax.process_index() == 0:
            write_text_atomic(
                dump / "config.txt", configuration.config_to_text(trainer.config), noted=True
            )
    before = State(step=state.step - 1, params=state.params, opt=state.opt)
    checkpoints = Checkpoints(dump / "state", 1)
    try:
        checkpoints.save(step - 1, before, {})
        checkpoints.wait(before)
    finally:
        checkpoints.close()
    description = {
        "step": step,
        "metrics": {name: repr(float(value)) for name, value in values.items()},
        "hosts": jax.process_count(),
        "vocabulary": trainer.vocabulary,
        "category_counts": list(trainer.task.category_counts),
        "m3i_jax": version.__version__,
        "jax": jax.__version__,
        "devices": jax.device_count(),
    }
    parallel.barrier("dump")  # a dump is complete once all hosts have written their batch
    if jax.process_index() == 0:
        write_json_atomic(dump / "step.json", description, noted=True)
    return dump


def newest_dump(workdir: pathlib.Path) -> pathlib.Path:
    """Returns the newest complete dump of a run.

    Raises:
      UserError: the run has no dump.
    """
    dumps = [
        path.parent
        for path in (workdir / "dumps").glob("*/step.json")
        if path.parent.name.isdecimal()
    ]
    if not dumps:
        raise UserError(
            f"--workdir {workdir}: has no dumps/<step>; a run writes one when"
            f" {step_module.MOST_NOT_FINITE} steps in a row are not finite"
        )
    return max(dumps, key=lambda path: int(path.name))


def nonfinite_arrays(tree: Any) -> dict[str, str]:
    """Returns {path: counts of NaN and Inf} of the arrays of a tree that are not finite everywhere.

    >>> nonfinite_arrays({"a": np.array([1.0, np.nan, -np.inf]), "b": np.zeros(2)})
    {'a': '1 NaN and 1 Inf of 3'}
    """
    out = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        nan, inf = (int(jnp.sum(count(jnp.asarray(leaf)))) for count in (jnp.isnan, jnp.isinf))
        if nan or inf:
            out[path_text(path)] = (
                " and ".join(f"{n:,} {what}" for n, what in ((nan, "NaN"), (inf, "Inf")) if n)
                + f" of {leaf.size:,}"
            )
    return out


def replay_step(
    trainer: Trainer, state: State, batch: dict[str, jax.Array]
) -> tuple[dict[str, float], dict[str, str]]:
    """Repeat the step of a dump.

    Args:
      trainer: of the dump's configuration.
      state: before the step; it is donated.
      batch: the global batch.

    Returns:
      (metrics, `nonfinite_arrays` of batch, parameters, optimizer state and gradients).
    """
    nonfinite = nonfinite_arrays({"batch": batch, "params": state.params, "opt": state.opt})
    with jax.set_mesh(trainer.mesh):
        gradients = parallel.Program(
            lambda state, batch: trainer.task.gradients(state.params, state.opt, batch).grads,
            name="gradients",
        )
        grads = gradients(state, batch)
    nonfinite |= nonfinite_arrays({"gradient": grads})
    _, metrics = trainer.step(state, batch)
    metrics.pop(targets.MOMENT, None)
    return {name: float(value) for name, value in jax.device_get(metrics).items()}, nonfinite


def same_outcome(before: Mapping[str, str], after: Mapping[str, float]) -> bool:
    """Returns whether the same metrics are not finite in a replayed step as in the dump.

    >>> same_outcome({"loss": "nan", "lr": "0.1"}, {"loss": math.nan})
    True
    >>> same_outcome({"loss": "nan"}, {"loss": 0.5})
    False
    """
    return all(
        math.isfinite(float(before[name])) == math.isfinite(value)
        for name, value in after.items()
        if name in before
    )


def load_dump(
    dump: pathlib.Path, log: Callable[[str], None]
) -> tuple[dict[str, Any], Trainer, State, dict[str, jax.Array]]:
    """Returns (contents of step.json, trainer, state, global batch) of a dump, on the current
    devices.

    Raises:
      UserError: the dump has no readable state.
    """
    description = run_files.read_run_json(dump / "step.json", _REMEDY)
    kinds = {
        "step": int,
        "hosts": int,
        "vocabulary": int,
        "devices": int,
        "m3i_jax": str,
        "metrics": dict,
    }
    if wrong := [name for name, kind in kinds.items() if type(description.get(name)) is not kind]:
        raise UserError(f"{dump / 'step.json'}: is not of a dump ({', '.join(wrong)}); {_REMEDY}")
    settings = configuration.resolve(configuration.load_from_workdir(str(dump), "--workdir"))
    mesh = _mesh(settings, log)
    counts = tuple(description.get("category_counts", ()))  # absent in dumps of version 0.1
    vocabulary = description["vocabulary"]
    trainer = Trainer(settings, mesh, vocabulary, make_task(settings, vocabulary, counts))
    checkpoints = Checkpoints(dump / "state", 1, log=log)
    try:
        step = checkpoints.newest_good()
        if step is None:
            raise UserError(f"{dump}: has no readable state; replay another dump")
        state = checkpoints.restore(step, trainer.template, trainer.shardings)
    finally:
        checkpoints.close()
    parts = []
    for host in range(description["hosts"]):
        rows = dump / f"batch-{host}.npz"
        try:
            with np.load(
                io.BytesIO(run_files.read_run_file(rows, _REMEDY, limit=2**40)), allow_pickle=False
            ) as file:
                parts.append({name: file[name] for name in file.files})
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{rows}: cannot be read ({error}); {_REMEDY}") from error
    batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return description, trainer, state, parallel.to_global(mesh, batch)


def _mesh(settings: Any, log: Callable[[str], None]) -> jax.sharding.Mesh:
    """The mesh of the run if these devices can form it and split its batch, else one device."""
    try:
        mesh = parallel.make_mesh(settings.parallel.mesh)
        if (
            settings.train.batch_size
            % (
                (1 + settings.traits.pairs)
                * mesh.shape["replica"]
                * mesh.shape["fsdp"]
                * settings.train.microbatches
            )
            == 0
        ):
            return mesh
    except UserError:
        pass
    log(f"replaying on one of {jax.device_count()} devices, which cannot form the mesh of the run")
    return parallel.make_mesh((1, 1, 1), jax.devices()[:1])

"""A step that went wrong, kept so that it can be taken again alone: the state before it, its batch,
the configuration and what came out. All randomness of a step is keyed by the seed and the positions
in the batch, so nothing else is needed. `--mode=replay` reads it.

    dumps/<step>/step.json          step, metrics, versions
    dumps/<step>/config.txt         the completed configuration
    dumps/<step>/batch-<host>.npz   the rows of each host
    dumps/<step>/state/<step - 1>   a checkpoint
    dumps/<step>/digests/*          of the first three
"""

import io
import json
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
from m3i_jax.reporting.atomic_write import write_text_atomic
from m3i_jax.training import step as steps
from m3i_jax.training.checkpoint import Checkpoints
from m3i_jax.training.state import State
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
    """Keep a step whose update was skipped; every host of the run calls this.

    Args:
      directory: <workdir>/dumps.
      trainer: of the run.
      state: after the step, which changed nothing but the counter.
      batch: this host's rows.
      step: the number of the step, that of its line in the log.
      values: its metrics.

    Returns: where it is now. Raises OSError or what a save raises.
    """
    place = directory / str(step)
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    rows = place / f"batch-{jax.process_index()}.npz"
    np.savez(rows, **dict[str, Any](batch))
    run_files.note_mark(rows, run_files.file_mark(rows.read_bytes()))
    if jax.process_index() == 0:
        write_text_atomic(
            place / "config.txt", configuration.config_to_text(trainer.config), noted=True
        )
    before = State(step=state.step - 1, params=state.params, opt=state.opt)
    saved = Checkpoints(place / "state", 1)
    try:
        saved.save(step - 1, before, {})
        saved.wait(before)
    finally:
        saved.close()
    about = {
        "step": step, "metrics": {name: repr(float(value)) for name, value in values.items()}, "hosts": jax.process_count(),
        "vocabulary": trainer.vocabulary, "m3i_jax": version.__version__, "jax": jax.__version__, "devices": jax.device_count(),
    }  # fmt: skip
    parallel.barrier("dump")  # all batches are there before it counts
    if jax.process_index() == 0:
        write_text_atomic(place / "step.json", json.dumps(about, indent=1), noted=True)
    return place


def newest_dump(workdir: pathlib.Path) -> pathlib.Path:
    """The newest whole dump of a run. Raises UserError if there is none."""
    found = [
        path.parent
        for path in (workdir / "dumps").glob("*/step.json")
        if path.parent.name.isdecimal()
    ]
    if not found:
        raise UserError(
            f"--workdir {workdir}: no dumps/<step> there; a run writes one when"
            f" {steps.MOST_NOT_FINITE} steps in a row are bad"
        )
    return max(found, key=lambda path: int(path.name))


def nonfinite_arrays(tree: Any) -> dict[str, str]:
    """Path -> how much of it, of all arrays of a tree that are not finite everywhere.

    >>> nonfinite_arrays({"a": np.array([1.0, np.nan, -np.inf]), "b": np.zeros(2), "c": np.array([7])})
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
    """Take the step of a dump.

    Args:
      trainer: of the dump's configuration.
      state: before the step; its arrays are gone afterwards.
      batch: the global batch.

    Returns:
      (metrics, path -> how much is not finite, over batch, parameters, optimizer and gradients).
    """
    broken = nonfinite_arrays({"batch": batch, "params": state.params, "opt": state.opt})
    with jax.set_mesh(trainer.mesh):
        gradients = parallel.Program(
            lambda state, batch: steps.gradients_of(trainer.plan, state, batch)[0], name="gradients"
        )
        grads = gradients(state, batch)
    broken |= nonfinite_arrays({"gradient": grads})
    _, metrics = trainer.step(state, batch)
    metrics.pop(steps.MOMENT, None)
    return {name: float(value) for name, value in jax.device_get(metrics).items()}, broken


def same_outcome(before: Mapping[str, str], after: Mapping[str, float]) -> bool:
    """Whether a replayed step has the same metrics that are not finite as the one that was dumped.

    >>> same_outcome({"loss": "nan", "lr": "0.1"}, {"loss": math.nan}), same_outcome({"loss": "nan"}, {"loss": 0.5})
    (True, False)
    """
    return all(
        math.isfinite(float(before[name])) == math.isfinite(value)
        for name, value in after.items()
        if name in before
    )


def load_dump(
    place: pathlib.Path, say: Callable[[str], None]
) -> tuple[dict[str, Any], Trainer, State, dict[str, jax.Array]]:
    """(what step.json says, trainer, state, global batch) of a dump, on the devices that are here.

    Raises:
      UserError: it cannot be read.
    """
    about = run_files.read_run_json(place / "step.json", _REMEDY)
    kinds = {
        "step": int,
        "hosts": int,
        "vocabulary": int,
        "devices": int,
        "m3i_jax": str,
        "metrics": dict,
    }
    if wrong := [name for name, kind in kinds.items() if type(about.get(name)) is not kind]:
        raise UserError(f"{place / 'step.json'}: is not of a dump ({', '.join(wrong)}); {_REMEDY}")
    settings = configuration.resolve(configuration.load_from_workdir(str(place), "--workdir"))
    mesh = _mesh(settings, say)
    trainer = Trainer(settings, mesh, about["vocabulary"])
    saved = Checkpoints(place / "state", 1, say=say)
    try:
        at = saved.newest_good()
        if at is None:
            raise UserError(f"{place}: has no state")
        state = saved.restore(at, trainer.template, trainer.shardings)
    finally:
        saved.close()
    parts = []
    for host in range(about["hosts"]):
        rows = place / f"batch-{host}.npz"
        try:
            with np.load(
                io.BytesIO(run_files.read_run_file(rows, _REMEDY, limit=2**40)), allow_pickle=False
            ) as file:
                parts.append({name: file[name] for name in file.files})
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{rows}: cannot be read ({error}); {_REMEDY}") from error
    batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return about, trainer, state, parallel.to_global(mesh, batch)


def _mesh(settings: Any, say: Callable[[str], None]) -> jax.sharding.Mesh:
    """The mesh of the run if these devices can make it and share its batch, else one device."""
    try:
        mesh = parallel.make_mesh(settings.parallel.mesh)
        if (
            settings.train.batch_size
            % (2 * mesh.shape["replica"] * mesh.shape["fsdp"] * settings.train.microbatches)
            == 0
        ):
            return mesh
    except UserError:
        pass
    say(f"on one of {jax.device_count()} devices: they do not make the mesh of that run")
    return parallel.make_mesh((1, 1, 1), jax.devices()[:1])

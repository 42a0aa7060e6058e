"""--mode=export of a run of detection or segmentation: the whole model as one StableHLO program,
suppression included, or its arrays."""

import json
import pathlib
import shutil
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import config as configuration
from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.evaluation import load
from m3i_jax.evaluation.load_dense import LoadedDense
from m3i_jax.interop import tensor_files
from m3i_jax.modes import output
from m3i_jax.parallel import kernel_calls
from m3i_jax.parallel.sharding import path_text
from m3i_jax.reporting.atomic_write import write_text_atomic
from m3i_jax.training import checkpoint

PLATFORMS = ("cpu", "cuda", "tpu")
LARGEST = 2**31 - 2**20  # bytes of a serialized program


def run(config: schema.Config, *, workdir: str, format: str) -> int:
    """Write WORKDIR/export/<format>.

    Args:
      config: settings of the run; `evaluate.encoder` chooses the weights.
      workdir: of the run.
      format: stablehlo, npz or orbax.

    Raises:
      UserError: another format, which has no place for pyramid and head.
    """
    if format not in _WRITERS:
        raise UserError(
            f"--format={format}: has no place for the head of config.task={config.task}; use"
            f" {', '.join(_WRITERS)}"
        )
    directory = pathlib.Path(workdir) / "export" / format
    output.check_writable(
        directory.parent,
        f"--workdir {workdir}",
        "exports are written to WORKDIR/export; copy config.txt and checkpoints to another"
        " directory and export from there",
    )
    model = load.load(workdir, weights=config.evaluate.encoder)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    lines = _WRITERS[format](directory, model)
    write_text_atomic(directory / "config.txt", configuration.config_to_text(model.config))
    described = {"classes": model.names, "task": config.task, "input": _input(model)}
    write_text_atomic(directory / "model.json", json.dumps(described, indent=1) + "\n")
    print(f"{model.name} -> {directory}")
    for line in lines:
        print(line)
    return 0


def _input(model: LoadedDense) -> str:
    side = model.config.data.image_size
    return (
        f"RGB uint8 [1, {side}, {side}, 3], zeros at the right and at the bottom, and the size of"
        " the content, int32 [1, 2] (height, width)"
    )


def _to_stablehlo(directory: pathlib.Path, model: LoadedDense) -> list[str]:
    params, task, side = model.params, model.task, model.config.data.image_size
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if total > LARGEST:
        raise UserError(
            f"--format=stablehlo: {total / 2**30:.1f} GiB of weights do not go into one program of"
            " 2 GiB; use orbax and jax.export"
        )

    def predict(images: jax.Array, sizes: jax.Array) -> dict[str, jax.Array]:
        return task.predict(params, params["running"], {"image": images, "size": sizes})

    function = jax.jit(predict)
    with kernel_calls.without_kernels():
        exported = jax.export.export(function, platforms=PLATFORMS)(
            jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8),
            jax.ShapeDtypeStruct((1, 2), jnp.int32),
        )
    file = directory / "model.stablehlo"
    with tensor_files.atomic_replace(file) as out:
        out.write(exported.serialize())
    again = jax.export.deserialize(bytearray(file.read_bytes()))
    images = np.random.default_rng(0).integers(0, 256, (1, side, side, 3)).astype(np.uint8)
    sizes = np.array([[side, side]], np.int32)
    ours, theirs = function(images, sizes), again.call(images, sizes)
    largest = max(
        float(jnp.abs(ours[name].astype(jnp.float32) - theirs[name].astype(jnp.float32)).max())
        for name in ours
    )
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in ours.items())
    return [
        f"{_input(model)} -> {shapes}, for {', '.join(PLATFORMS)}",
        "run it with: jax.export.deserialize(bytearray(open('model.stablehlo',"
        " 'rb').read())).call(images, sizes)",
        f"largest difference of the exported program from the model: {largest:.3g}",
    ]


def _flat(model: LoadedDense) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(model.params)
    return {path_text(path): np.asarray(leaf) for path, leaf in leaves}


def _to_npz(directory: pathlib.Path, model: LoadedDense) -> list[str]:
    arrays = _flat(model)
    tensor_files.write_npz(directory / "model.npz", arrays)
    return [f"{len(arrays)} arrays by their paths, running statistics below running/"]


def _to_orbax(directory: pathlib.Path, model: LoadedDense) -> list[str]:
    checkpoint.write_tree(directory / "parameters", jax.tree.map(np.asarray, model.params))
    return [
        f"{len(_flat(model))} arrays; read them with"
        " orbax.checkpoint.StandardCheckpointer().restore(DIRECTORY)"
    ]


_WRITERS: dict[str, Callable[[pathlib.Path, LoadedDense], list[str]]] = {
    "stablehlo": _to_stablehlo,
    "npz": _to_npz,
    "orbax": _to_orbax,
}

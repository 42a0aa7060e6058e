"""--mode=export of a run of detection or segmentation: encoder, pyramid and head as one program, or
as their arrays."""

import dataclasses
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import schema
from m3i_jax.data.preprocessing import with_evaluation
from m3i_jax.errors import UserError
from m3i_jax.evaluation import load
from m3i_jax.evaluation.load_dense import LoadedDense
from m3i_jax.interop import tensor_files
from m3i_jax.modes import export_files, model_card, monitoring
from m3i_jax.parallel.sharding import path_text
from m3i_jax.run_files import write_json_atomic, write_text_atomic
from m3i_jax.training import checkpoint, checkpoint_dir

_PLATFORMS = ("cpu", "cuda", "tpu")


def export_model(config: schema.Config, *, workdir: str, format: str) -> int:
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
    directory = export_files.export_directory(workdir, format)
    model = load.load(workdir, weights=config.evaluate.encoder)
    model.config = dataclasses.replace(model.config, report=config.report)
    asked = dataclasses.replace(model, config=with_evaluation(model.config, config))
    with export_files.replaced_directory(directory) as temporary:
        lines = _WRITERS[format](temporary, model)
        write_text_atomic(temporary / "config.txt", model_card.portable_settings(model.config))
        described = {"classes": model.names, "task": config.task, "input": _input(model)}
        write_json_atomic(temporary / checkpoint_dir.DESCRIPTION, described)
        write_text_atomic(
            temporary / model_card.FILE,
            model_card.model_card_text(asked, pathlib.Path(workdir), format),
        )
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
    params, side = model.params, model.config.data.image_size
    task = dataclasses.replace(model, config=monitoring.without_remat(model.config)).task

    def predict(images: jax.Array, sizes: jax.Array) -> dict[str, jax.Array]:
        return task.predict(params, params["running"], {"image": images, "size": sizes})

    _, ours, theirs = export_files.write_program(
        directory / "model.stablehlo",
        predict,
        shapes=(
            jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8),
            jax.ShapeDtypeStruct((1, 2), jnp.int32),
        ),
        arguments=(export_files.random_images(1, side), np.array([[side, side]], np.int32)),
        parameters=params,
        platforms=_PLATFORMS,
    )
    largest = max(
        float(jnp.abs(ours[name].astype(jnp.float32) - theirs[name].astype(jnp.float32)).max())
        for name in ours
    )
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in ours.items())
    return [
        f"{_input(model)} -> {shapes}, for {', '.join(_PLATFORMS)}",
        "run it with: jax.export.deserialize(bytearray(open('model.stablehlo',"
        " 'rb').read())).call(images, sizes)",
        f"largest difference of the exported program from the model: {largest:.3g}",
    ]


def _flat(model: LoadedDense) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(model.params)
    return {path_text(path): np.asarray(leaf) for path, leaf in leaves}


def _to_npz(directory: pathlib.Path, model: LoadedDense) -> list[str]:
    arrays = _flat(model)
    tensor_files.write_npz(directory / checkpoint_dir.ARRAYS, arrays)
    return [f"{len(arrays)} arrays by their paths, running statistics below running/"]


def _to_orbax(directory: pathlib.Path, model: LoadedDense) -> list[str]:
    checkpoint.write_tree(
        directory / checkpoint_dir.PARAMETERS, jax.tree.map(np.asarray, model.params)
    )
    return [
        f"{len(_flat(model))} arrays; read them with"
        " orbax.checkpoint.StandardCheckpointer().restore(DIRECTORY)"
    ]


_WRITERS: dict[str, Callable[[pathlib.Path, LoadedDense], list[str]]] = {
    "stablehlo": _to_stablehlo,
    "npz": _to_npz,
    "orbax": _to_orbax,
}

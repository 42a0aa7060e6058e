"""--mode=export --format=NAME: write the encoder of a run, or the whole model of a run of detection
or segmentation, for other libraries to WORKDIR/export/NAME, with a model card.

timm: model.safetensors and config.json, for timm.create_model(...).load_state_dict. Not for an
  InternImage, which timm does not have.
hf: model.safetensors, config.json and preprocessor_config.json, for
  transformers.ViTModel.from_pretrained, whose final LayerNorm `m3i_jax.load` leaves out if the
  encoder has none. For an InternImage the first and the last, with the names
  of its authors' Hugging Face repositories.
npz: vit.npz with the names of Google's vision_transformer, or intern_image.npz with the names of
  InternImage's PyTorch files.
stablehlo: features.stablehlo, images [b, S, S, 3] uint8 -> features [b, D] for any b, by
  jax.export; runs without this package.
orbax: parameters, the parameter tree of this package, by Orbax.

A detector or segmenter is written by the last three: as one program, suppression included, or as
its arrays; model.json has its classes and its input.

The directory of an encoder also has preprocessing.json, the preprocessing of the run's evaluations
and what the arrays of a ViT do not show, activation and eps, so that `m3i_jax.load` of the
directory has the features of the run; the files for timm and Hugging Face describe the same
preprocessing. Beside arrays under names of this package, config.txt has the settings that `load`
reads. README.md is the model card. Neither has paths of this machine, so that the directory can be
pushed to a hub as it is:

    huggingface_hub.upload_folder(repo_id="OWNER/NAME", folder_path="RUN/export/hf")"""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import config as configuration
from m3i_jax import progress, schema
from m3i_jax.augment import photometric
from m3i_jax.data import preprocessing
from m3i_jax.errors import UserError
from m3i_jax.evaluation import feature_extraction, load
from m3i_jax.interop import export_formats, intern_image_weights, tensor_files, vit_weights
from m3i_jax.models import backbones
from m3i_jax.modes import export_dense, export_files, model_card, monitoring
from m3i_jax.parallel.sharding import path_text
from m3i_jax.run_files import write_text_atomic
from m3i_jax.training import checkpoint, checkpoint_dir, saved_arrays, weight_source

FORMATS = ("timm", "hf", "stablehlo", "npz", "orbax")
# largest difference over the largest value; two libraries round differently in every layer
_CLOSE = 1e-4
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def run(config: schema.Config, *, workdir: str, format: str) -> int:
    if format not in FORMATS:
        raise UserError(
            f"--format: {format!r} is not one of {', '.join(FORMATS)}; give one of these"
            if format
            else f"--format: is missing; give one of {', '.join(FORMATS)}"
        )
    if format == "stablehlo" and importlib.util.find_spec("flatbuffers") is None:
        raise UserError(
            "--format=stablehlo needs the package flatbuffers: pip install 'm3i-jax[export]'"
        )
    config = settings_of(config, workdir)
    if not config.traits.views:
        return export_dense.export_model(config, workdir=workdir, format=format)
    write = {**_FORMATS, **_FORMATS_OF_LAYOUT.get(backbones.get_backbone(config.model).layout, {})}
    if format not in write:
        raise UserError(
            f"--format={format}: has no model for the backbone {config.model.backbone}; use"
            f" {', '.join(write)}"
        )
    directory = export_files.export_directory(workdir, format)
    with progress.progress_bar(f"exporting {format}", total=3, unit="parts") as advance:
        lines = _export(config, workdir, directory, format, write[format], advance)
    for line in lines:
        print(line)
    return 0


def _export(
    config: schema.Config,
    workdir: str,
    directory: pathlib.Path,
    format: str,
    write: Callable[..., list[str]],
    advance: Callable[[int], None],
) -> list[str]:
    """Write the directory of a format; returns the lines about it."""
    model = load.load(
        workdir,
        weights=config.evaluate.encoder,
        dtype="" if format in ("stablehlo", "orbax") else "float32",
    )
    advance(1)
    asked = preprocessing.with_evaluation(model.config, config)
    model = dataclasses.replace(model, config=dataclasses.replace(asked, report=config.report))
    with export_files.replaced_directory(directory) as temporary:
        lines = write(temporary, model, workdir)
        advance(1)
        encoder, seen = _described(model)
        is_vit = backbones.get_backbone(model.config.model).layout == "vit"
        export_formats.description(temporary, seen, encoder if is_vit else None)
        lines.append(_preprocessing_line(model))
        write_text_atomic(
            temporary / model_card.FILE,
            model_card.model_card_text(model, pathlib.Path(workdir), format),
        )
    advance(1)
    return [f"{model.name} -> {directory}", *lines]


def _preprocessing_line(model: load.LoadedEncoder) -> str:
    seen = model.preprocessing
    return (
        f"preprocessing, as in {tensor_files.PREPROCESSING}: resize"
        f" {'each side' if seen.squash else 'the short side'} to {seen.short_side}"
        f" ({seen.interpolation}), centre crop {seen.image_size}"
    )


def settings_of(config: schema.Config, workdir: str) -> schema.Config:
    """Returns the settings of the run, with `evaluate` (encoder, crop) and `report` (licence) from
    the command line; no other setting may change the trained model."""
    trained = configuration.resolve(configuration.load_from_workdir(workdir, "--workdir"))
    return dataclasses.replace(trained, evaluate=config.evaluate, report=config.report)


def tree_of(model: load.LoadedEncoder) -> dict[str, np.ndarray]:
    """Returns the encoder as the flat tree {path: float32 array} of `interop`, with computed arrays
    that other projects store, such as the fixed position table of a ViT."""
    named = jax.tree_util.tree_leaves_with_path({"encoder": model.params["encoder"]})
    flat = {path_text(path): np.asarray(leaf, np.float32) for path, leaf in named}
    backbone = backbones.get_backbone(model.config.model)
    fixed = backbone.fixed_arrays(model.config.model, model.config.grid)
    return {**flat, **{f"encoder/{path}": array for path, array in fixed.items()}}


def _to_timm(directory: pathlib.Path, model: load.LoadedEncoder, workdir: str) -> list[str]:
    encoder, seen = _described(model)
    size = model.config.data.image_size
    export_formats.timm_config(directory, tree_of(model), encoder, seen)
    name, arguments = export_formats.timm_arguments(encoder, size)
    words = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    lines = [
        f"open it with: model = timm.create_model({name!r}, {words});"
        " model.load_state_dict(safetensors.torch.load_file(...))"
    ]
    if encoder["norm_eps"] != 1e-6:
        lines.append(
            f"add norm_layer=functools.partial(torch.nn.LayerNorm, eps={encoder['norm_eps']}),"
            " which timm's config.json cannot store"
        )
    normal = _random_images(model)
    return lines + _compared(
        model, normal, export_formats.timm_output(directory, encoder, size, normal), "timm"
    )


def _to_hugging_face(directory: pathlib.Path, model: load.LoadedEncoder, workdir: str) -> list[str]:
    encoder, seen = _described(model)
    kind = export_formats.hugging_face_config(directory, tree_of(model), encoder, seen)
    place = str(pathlib.Path(workdir) / export_files.EXPORTS / "hf")  # `directory` is temporary
    lines = [f"open it with: transformers.{kind}.from_pretrained({place!r})"]
    if kind == "ViTModel" and not encoder["final_norm"]:
        lines.append(
            "the model ends in an untrained LayerNorm (scale 1, offset 0): the features of the run"
            " are hidden_states[-1], before it"
        )
    normal = _random_images(model)
    return lines + _compared(
        model,
        normal,
        export_formats.hugging_face_output(directory, kind, encoder["final_norm"], normal),
        "Transformers",
    )


def _to_npz(directory: pathlib.Path, model: load.LoadedEncoder, workdir: str) -> list[str]:
    e = model.config.model.encoder
    export_formats.refuse_options("npz", dataclasses.asdict(e))
    table = vit_weights.store_vit(tree_of(model), "google", heads=e.heads)
    tensor_files.write_npz(directory / "vit.npz", table)
    _check_round_trip(directory / "vit.npz", model)
    gelu = (
        ""
        if e.activation == "gelu_tanh"
        else f"; its MLPs use {e.activation}, Google's code the tanh form of GELU"
    )
    return [
        f"{len(table)} arrays under the names of Google's vision_transformer, read back bit by"
        f" bit{gelu}"
    ]


def _to_intern_image_hugging_face(
    directory: pathlib.Path, model: load.LoadedEncoder, workdir: str
) -> list[str]:
    _check_round_trip(
        file := export_formats.hugging_face_intern_image_config(
            directory, tree_of(model), model.preprocessing.described()
        ),
        model,
    )
    return [
        _of_intern_image(
            model, len(tensor_files.read_tensors(file)), "its authors' Hugging Face repositories"
        )
    ]


def _to_intern_image_npz(
    directory: pathlib.Path, model: load.LoadedEncoder, workdir: str
) -> list[str]:
    table = intern_image_weights.store_intern_image(tree_of(model))
    tensor_files.write_npz(directory / "intern_image.npz", table)
    _check_round_trip(directory / "intern_image.npz", model)
    return [_of_intern_image(model, len(table), "its authors' PyTorch files")]


def _of_intern_image(model: load.LoadedEncoder, arrays: int, whose: str) -> str:
    strides = model.config.model.intern_image.stem_strides
    stem = "" if strides == (2, 2) else f"; its stem has strides {strides}, theirs (2, 2)"
    return (
        f"{arrays} arrays under the names of {whose}, read back bit for bit; the encoder alone,"
        f" without a classifier{stem}"
    )


def _check_round_trip(file: pathlib.Path, model: load.LoadedEncoder) -> None:
    """Raise RuntimeError unless the arrays read from the file equal those of the encoder. The mask
    token is in none of these formats."""
    back = vit_weights.load_vit(tensor_files.read_tensors(file)).arrays
    if not all(
        np.array_equal(back[path], array)
        for path, array in tree_of(model).items()
        if path != "encoder/mask_token"
    ):
        raise RuntimeError(f"{file}: the arrays read from it differ from those that were written")


def _to_stablehlo(directory: pathlib.Path, model: load.LoadedEncoder, workdir: str) -> list[str]:
    size, parameters = model.config.data.image_size, model.params
    plain = monitoring.without_remat(model.config)  # its chunks need a known number of images
    (rows,) = jax.export.symbolic_shape("b")
    program, expected, result = export_files.write_program(
        directory / "features.stablehlo",
        lambda pixels: feature_extraction.extract_features(plain, model.pool, parameters, pixels),
        shapes=(jax.ShapeDtypeStruct((rows, size, size, 3), jnp.uint8),),
        arguments=(export_files.random_images(3, size),),
        parameters=parameters,
        platforms=_PLATFORMS,
    )
    shape = ", ".join(map(str, program.out_avals[0].shape))
    return [
        f"features ({model.pool}) of uint8 images [b, {size}, {size}, 3] as float32 [{shape}], for "
        + ", ".join(_PLATFORMS),
        (
            "run it with: jax.export.deserialize(bytearray(open('features.stablehlo',"
            " 'rb').read())).call(images)"
        ),
        _difference(
            "the features of the exported program", np.asarray(expected), np.asarray(result)
        ),
    ]


def _to_orbax(directory: pathlib.Path, model: load.LoadedEncoder, workdir: str) -> list[str]:
    source = weight_source.open_weights(
        workdir, weights=model.config.evaluate.encoder, key="--workdir"
    )
    tree: dict[str, Any] = {}
    for path, array in source.read(dict.fromkeys(source.shapes)).items():
        saved_arrays.set_leaf(tree, path, array)
    checkpoint.write_tree(directory / checkpoint_dir.PARAMETERS, tree)
    write_text_atomic(directory / "config.txt", model_card.portable_settings(model.config))
    return [
        f"{len(source.shapes)} arrays of {', '.join(tree)}; read them with"
        " orbax.checkpoint.StandardCheckpointer().restore(DIRECTORY)"
    ]


_FORMATS = {"stablehlo": _to_stablehlo, "orbax": _to_orbax}  # of any backbone
# by `Backbone.layout`
_FORMATS_OF_LAYOUT: dict[str, dict[str, Any]] = {
    "vit": {"timm": _to_timm, "hf": _to_hugging_face, "npz": _to_npz},
    "intern_image": {"hf": _to_intern_image_hugging_face, "npz": _to_intern_image_npz},
}


def _described(model: load.LoadedEncoder) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of the encoder, and its preprocessing."""
    return dataclasses.asdict(model.config.model.encoder), model.preprocessing.described()


def _random_images(model: load.LoadedEncoder) -> np.ndarray:
    """Two normalised random images [2, S, S, 3], for the comparison."""
    size = model.config.data.image_size
    raw = jnp.asarray(export_files.random_images(2, size))
    return np.asarray(photometric.normalize(raw, model.config.data.augment))


def _compared(
    model: load.LoadedEncoder, normal: np.ndarray, theirs: np.ndarray | None, library: str
) -> list[str]:
    if theirs is None:
        return [
            f"not compared with {library}, which is not installed; to compare: pip install"
            " 'm3i-jax[torch]'"
        ]
    from m3i_jax.models import m3i
    from m3i_jax.models.vit import patchify

    with jax.default_matmul_precision("highest"):
        ours = m3i.encode(
            model.config,
            model.params["encoder"],
            patchify(jnp.asarray(normal), model.config.model.encoder.patch_size),
        )
    return [_difference(f"tokens of {library}", np.asarray(ours, np.float32), theirs)]


def _difference(what: str, ours: np.ndarray, theirs: np.ndarray) -> str:
    if ours.shape != theirs.shape:
        raise RuntimeError(f"{what} have shape {theirs.shape}, ours {ours.shape}")
    difference, largest = float(np.abs(ours - theirs).max()), float(np.abs(ours).max())
    if not difference <= _CLOSE * largest:
        raise RuntimeError(
            f"{what} differ from ours by up to {difference:.2g}, where the largest value is"
            f" {largest:.2g}: the export is wrong"
        )
    return (
        f"{what} and those of the run differ by at most {difference:.2g}, the largest value is"
        f" {largest:.2g}: equal"
    )

"""--mode=export --format=NAME: the encoder of a run for other people's tools, in
WORKDIR/export/NAME, with a model card.

timm        model.safetensors and config.json; timm.create_model(...).load_state_dict; not of an
InternImage, which timm does not have hf          model.safetensors, config.json,
preprocessor_config.json; transformers.ViTModel.from_pretrained. Of an InternImage the first and the
last, with the names of its authors' Hugging Face repositories
npz         vit.npz with the names of Google's vision_transformer; intern_image.npz with those of
InternImage's PyTorch files stablehlo   features.stablehlo: images [b, S, S, 3] uint8 -> features
[b, D] for any b, by jax.export; runs without this package orbax       parameters: our own tree, by
Orbax

Each has preprocessing.json too: how the run's evaluations see images. timm's and Hugging Face's own
files say the same."""

import dataclasses
import importlib.util
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import config as configuration
from m3i_jax import schema
from m3i_jax.augment import photometric
from m3i_jax.errors import UserError
from m3i_jax.evaluation import feature_extraction, load
from m3i_jax.interop import export_formats, intern_image_weights, tensor_files, vit_weights
from m3i_jax.models import backbones
from m3i_jax.modes import model_card, output
from m3i_jax.reporting.atomic_write import write_text_atomic
from m3i_jax.training import checkpoint, init_from

FORMATS = ("timm", "hf", "stablehlo", "npz", "orbax")
# largest difference over the largest number; two libraries round differently, layer for layer
_CLOSE = 1e-4
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_LARGEST = 2**31 - 2**24  # bytes of one exported program


def run(config: schema.Config, *, workdir: str, format: str) -> int:
    if format not in FORMATS:
        raise UserError(
            f"--format: {format!r} is none of {', '.join(FORMATS)}"
            if format
            else f"--format: is missing; {', '.join(FORMATS)}"
        )
    if format == "stablehlo" and importlib.util.find_spec("flatbuffers") is None:
        raise UserError(
            "--format=stablehlo needs the package flatbuffers: pip install 'm3i-jax[export]'"
        )
    config = settings_of(config, workdir)
    write = {**_FORMATS, **_OF_LAYOUT[backbones.get_backbone(config.model).layout]}
    if format not in write:
        raise UserError(
            f"--format={format}: has no model for {config.model.backbone}, which this encoder is;"
            f" use {', '.join(write)}"
        )
    place = pathlib.Path(workdir) / "export" / format
    output.check_writable(
        place.parent,
        f"--workdir {workdir}",
        "exports go to WORKDIR/export; copy config.txt and checkpoints elsewhere",
    )
    model = load.load(
        workdir,
        weights=config.evaluate.encoder,
        dtype="" if format in ("stablehlo", "orbax") else "float32",
    )
    model = dataclasses.replace(
        model,
        config=dataclasses.replace(model.config, evaluate=config.evaluate, report=config.report),
    )
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    told = write[format](place, model, workdir)
    export_formats.description(place, model.preprocessing.described())
    told.append(_seen(model))
    write_text_atomic(
        place / "model_card.md", model_card.model_card_text(model, pathlib.Path(workdir), format)
    )
    print(f"{model.name} -> {place}")
    for line in told:
        print(line)
    return 0


def _seen(model: load.LoadedEncoder) -> str:
    seen = model.preprocessing
    return (
        f"images are seen as {tensor_files.PREPROCESSING} says: short side {seen.short_side}, of"
        f" that {seen.image_size} from the centre"
    )


def settings_of(config: schema.Config, workdir: str) -> schema.Config:
    """What the command line says of the encoder (evaluate.encoder, evaluate.crop) and the card
    (report.licence), over the settings of the run itself: no other setting may change what was
    trained."""
    there = configuration.resolve(configuration.load_from_workdir(workdir, "--workdir"))
    return dataclasses.replace(there, evaluate=config.evaluate, report=config.report)


def tree_of(model: load.LoadedEncoder) -> dict[str, np.ndarray]:
    """The encoder as interop's flat tree, float32, with the arrays that it computes and other
    projects store: the fixed position table of a ViT."""
    named = jax.tree_util.tree_leaves_with_path({"encoder": model.params["encoder"]})
    flat = {init_from.path_text(path): np.asarray(leaf, np.float32) for path, leaf in named}
    backbone = backbones.get_backbone(model.config.model)
    fixed = backbone.fixed_arrays(model.config.model, model.config.grid)
    return {**flat, **{f"encoder/{path}": array for path, array in fixed.items()}}


def _to_timm(place: pathlib.Path, model: load.LoadedEncoder, workdir: str) -> list[str]:
    encoder, preprocessing = _described(model)
    size = model.config.data.image_size
    export_formats.timm_config(place, tree_of(model), encoder, preprocessing)
    name, arguments = export_formats.timm_arguments(encoder, size)
    words = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    told = [
        f"open it with: model = timm.create_model({name!r}, {words});"
        " model.load_state_dict(safetensors.torch.load_file(...))"
    ]
    if encoder["norm_eps"] != 1e-6:
        told.append(
            f"and norm_layer=functools.partial(torch.nn.LayerNorm, eps={encoder['norm_eps']}),"
            " which no file of timm's can hold"
        )
    normal = _pictures(model)
    return told + _compared(
        model, normal, export_formats.timm_output(place, encoder, size, normal), "timm"
    )


def _to_hugging_face(place: pathlib.Path, model: load.LoadedEncoder, workdir: str) -> list[str]:
    encoder, preprocessing = _described(model)
    kind = export_formats.hugging_face_config(place, tree_of(model), encoder, preprocessing)
    told = [f"open it with: transformers.{kind}.from_pretrained({str(place)!r})"]
    if kind == "ViTModel" and not encoder["final_norm"]:
        told.append(
            "it ends in a LayerNorm that was not trained (scale 1, offset 0): our features are"
            " hidden_states[-1], before it"
        )
    normal = _pictures(model)
    return told + _compared(
        model,
        normal,
        export_formats.hugging_face_output(place, kind, encoder["final_norm"], normal),
        "Transformers",
    )


def _to_npz(place: pathlib.Path, model: load.LoadedEncoder, workdir: str) -> list[str]:
    e = model.config.model.encoder
    table = vit_weights.store_vit(tree_of(model), "google", heads=e.heads)
    tensor_files.write_npz(place / "vit.npz", table)
    _same(place / "vit.npz", model)
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
    place: pathlib.Path, model: load.LoadedEncoder, workdir: str
) -> list[str]:
    _same(
        file := export_formats.hugging_face_intern_image_config(
            place, tree_of(model), model.preprocessing.described()
        ),
        model,
    )
    return [
        _of_intern_image(
            model, len(tensor_files.read_tensors(file)), "its authors' Hugging Face repositories"
        )
    ]


def _to_intern_image_npz(place: pathlib.Path, model: load.LoadedEncoder, workdir: str) -> list[str]:
    table = intern_image_weights.store_intern_image(tree_of(model))
    tensor_files.write_npz(place / "intern_image.npz", table)
    _same(place / "intern_image.npz", model)
    return [_of_intern_image(model, len(table), "its authors' PyTorch files")]


def _of_intern_image(model: load.LoadedEncoder, arrays: int, whose: str) -> str:
    strides = model.config.model.intern_image.stem_strides
    stem = "" if strides == (2, 2) else f"; its stem has strides {strides}, theirs (2, 2)"
    return (
        f"{arrays} arrays under the names of {whose}, read back bit by bit; the encoder alone,"
        f" without a classifier{stem}"
    )


def _same(file: pathlib.Path, model: load.LoadedEncoder) -> None:
    """Raise RuntimeError unless the file gives back the arrays of the encoder. The mask token has
    no place in any of them."""
    back = vit_weights.load_vit(tensor_files.read_tensors(file)).arrays
    if not all(
        np.array_equal(back[path], array)
        for path, array in tree_of(model).items()
        if path != "encoder/mask_token"
    ):
        raise RuntimeError(f"{file} does not give back the arrays that were written")


def _to_stablehlo(place: pathlib.Path, model: load.LoadedEncoder, workdir: str) -> list[str]:
    size, parameters = model.config.data.image_size, model.params
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(parameters))
    if total > _LARGEST:
        raise UserError(
            f"--format=stablehlo: {total / 2**30:.1f} GiB of weights do not go into one program of"
            " 2 GiB; use orbax and jax.export"
        )
    (rows,) = jax.export.symbolic_shape("b")
    function = jax.jit(
        lambda pixels: feature_extraction.extract_features(
            model.config, model.pool, parameters, pixels
        )
    )
    made = jax.export.export(function, platforms=_PLATFORMS)(
        jax.ShapeDtypeStruct((rows, size, size, 3), jnp.uint8)
    )
    with tensor_files.atomic_replace(place / "features.stablehlo") as file:
        file.write(made.serialize())
    again = jax.export.deserialize(bytearray((place / "features.stablehlo").read_bytes()))
    few = np.random.default_rng(0).integers(0, 256, (3, size, size, 3)).astype(np.uint8)
    expected, got = np.asarray(function(few)), np.asarray(again.call(few))
    shape = ", ".join(map(str, again.out_avals[0].shape))
    return [
        f"features ({model.pool}) of uint8 images [b, {size}, {size}, 3] as float32 [{shape}], for "
        + ", ".join(_PLATFORMS),
        (
            "run it with: jax.export.deserialize(bytearray(open('features.stablehlo',"
            " 'rb').read())).call(images)"
        ),
        _difference("the file, read back,", expected, got),
    ]


def _to_orbax(place: pathlib.Path, model: load.LoadedEncoder, workdir: str) -> list[str]:
    source = init_from.open_weights(workdir, weights=model.config.evaluate.encoder, key="--workdir")
    tree: dict[str, Any] = {}
    for path, array in source.read(dict.fromkeys(source.shapes)).items():
        checkpoint.set_leaf(tree, path, array)
    checkpoint.write_tree(place / "parameters", tree)
    write_text_atomic(place / "config.txt", configuration.config_to_text(model.config))
    return [
        f"{len(source.shapes)} arrays of {', '.join(tree)}; read them with"
        " orbax.checkpoint.StandardCheckpointer().restore(DIRECTORY)"
    ]


_FORMATS = {"stablehlo": _to_stablehlo, "orbax": _to_orbax}  # of any backbone
# by Backbone.layout
_OF_LAYOUT: dict[str, dict[str, Any]] = {
    "": {},
    "vit": {"timm": _to_timm, "hf": _to_hugging_face, "npz": _to_npz},
    "intern_image": {"hf": _to_intern_image_hugging_face, "npz": _to_intern_image_npz},
}


def _described(model: load.LoadedEncoder) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of the encoder, and of how it sees images."""
    return dataclasses.asdict(model.config.model.encoder), model.preprocessing.described()


def _pictures(model: load.LoadedEncoder) -> np.ndarray:
    """Two normalised random images to compare with."""
    size = model.config.data.image_size
    raw = np.random.default_rng(0).integers(0, 256, (2, size, size, 3)).astype(np.uint8)
    return np.asarray(photometric.normalize(jnp.asarray(raw), model.config.data.augment))


def _compared(
    model: load.LoadedEncoder, normal: np.ndarray, theirs: np.ndarray | None, library: str
) -> list[str]:
    if theirs is None:
        return [
            f"not compared with {library}, which is not installed: pip install 'm3i-jax[torch]'"
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
    apart, largest = float(np.abs(ours - theirs).max()), float(np.abs(ours).max())
    if not apart <= _CLOSE * largest:
        raise RuntimeError(
            f"{what} differ from ours by up to {apart:.2g}, where the largest number is"
            f" {largest:.2g}: the export is wrong"
        )
    return (
        f"{what} and ours differ by at most {apart:.2g}, the largest number is {largest:.2g}: equal"
    )

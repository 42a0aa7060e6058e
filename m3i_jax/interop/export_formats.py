"""Directories of exported weights that timm (`timm.create_model("local-dir:...")`) and Transformers
(`from_pretrained`) load, InternImage under its published names, and the outputs of these libraries
for a comparison."""

import functools
import importlib
import importlib.util
import json
import math
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from m3i_jax.errors import UserError
from m3i_jax.interop import intern_image_weights, sidecar_configs, tensor_files, vit_weights

# timm's entry points by width: every setting is passed too, so that the name only has to exist
_TIMM = {
    192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224", 768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224", 1280: "vit_huge_patch14_224",
}  # fmt: skip
_HF_GELU = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}


def refuse_options(format: str, encoder: Mapping[str, Any]) -> None:
    """Raise UserError for the first setting of `model.encoder` that a format has no names for.

    >>> refuse_options("npz", {"registers": 0})
    """
    for name, plain in (
        ("registers", 0),
        ("qk_norm", False),
        ("norm", "layer"),
        ("layer_scale", 0.0),
    ):
        if encoder.get(name, plain) != plain:
            raise _no_names(format, name, encoder[name])
    for name, value in (("positions", "rope"), ("activation", "swiglu")):
        if encoder.get(name) == value:
            raise _no_names(format, name, value)


def _no_names(format: str, name: str, value: Any) -> UserError:
    return UserError(
        f"--format={format}: has no names for an encoder with model.encoder.{name}={value}; use"
        " stablehlo or orbax"
    )


def timm_arguments(encoder: Mapping[str, Any], image_size: int) -> tuple[str, dict[str, Any]]:
    """Returns (name, arguments) of `timm.create_model` for an encoder with these settings of
    `model.encoder`.

    The output of the model is the mean of the patch tokens. An eps other than timm's 1e-6 needs
    `norm_layer`, which JSON cannot store."""
    arguments = {
        "img_size": image_size,
        "patch_size": encoder["patch_size"],
        "embed_dim": encoder["width"],
        "depth": encoder["depth"],
        "num_heads": encoder["heads"],
        "mlp_ratio": timm_mlp_ratio(encoder["width"], encoder["mlp_ratio"]),
        "class_token": encoder["cls_token"],
        "pre_norm": encoder["embedding_norm"],
        "final_norm": encoder["final_norm"],
        "fc_norm": False,
        "act_layer": encoder["activation"],
        "global_pool": "avg",
        "num_classes": 0,
    }
    return _TIMM.get(encoder["width"], _TIMM[768]), arguments


def timm_mlp_ratio(width: int, mlp_ratio: float) -> float:
    """Returns the `mlp_ratio` of timm, which rounds the hidden width down, for a hidden width that
    is rounded to the nearest number.

    >>> int(32 * 2.8), int(32 * timm_mlp_ratio(32, 2.8)), timm_mlp_ratio(768, 4.0)
    (89, 90, 4.0)
    """
    hidden = round(width * mlp_ratio)
    if int(width * mlp_ratio) == hidden:
        return mlp_ratio
    share = hidden / width
    return share if int(width * share) == hidden else math.nextafter(share, math.inf)


def timm_config(
    directory: pathlib.Path,
    tree: Mapping[str, np.ndarray],
    encoder: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
) -> None:
    """Write model.safetensors and timm's config.json.

    Args:
      directory: where to write.
      tree: {path: array}.
      encoder: settings of `model.encoder`.
      preprocessing: `Preprocessing.described` of `data.preprocessing`.
    """
    refuse_options("timm", encoder)
    image_size = preprocessing["image_size"]
    name, arguments = timm_arguments(encoder, image_size)
    table = vit_weights.store_vit(tree, "timm", heads=encoder["heads"])
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": encoder["width"],
        "global_pool": "avg",
        # of the keys above timm takes the number of classes alone
        "model_args": {key: value for key, value in arguments.items() if key != "num_classes"},
        "pretrained_cfg": {
            "input_size": [3, image_size, image_size],
            "fixed_input_size": True,
            "interpolation": preprocessing["interpolation"],
            "crop_pct": crop_pct(image_size, preprocessing["short_side"]),
            "crop_mode": "squash" if preprocessing["squash"] else "center",
            "mean": list(preprocessing["mean"]),
            "std": list(preprocessing["std"]),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    tensor_files.write_safetensors(directory / "model.safetensors", table, {"format": "pt"})
    _json(directory / "config.json", config)


def crop_pct(image_size: int, short_side: int) -> float:
    """Returns the `crop_pct` of timm with which floor(image_size / crop_pct) is this short side.

    >>> crop_pct(224, 256), math.floor(32 / crop_pct(32, 37)), math.floor(49 / crop_pct(49, 49))
    (0.875, 37, 49)
    """
    share = image_size / short_side
    return share if math.floor(image_size / share) == short_side else math.nextafter(share, 0.0)


def hugging_face_config(
    directory: pathlib.Path,
    tree: Mapping[str, np.ndarray],
    encoder: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
) -> str:
    """Write model.safetensors, config.json and preprocessor_config.json; returns the class that
    loads them: ViTModel, or CLIPVisionModel for an encoder with a norm before the first block.
    Arguments as for `timm_config`."""
    refuse_options("hf", encoder)
    if not encoder["cls_token"]:
        raise UserError(
            "--format=hf: vision transformers of Transformers always have a cls token, this encoder"
            " has none; use timm or npz"
        )
    clip = bool(encoder["embedding_norm"])
    config = {
        "architectures": ["CLIPVisionModel" if clip else "ViTModel"],
        "model_type": "clip_vision_model" if clip else "vit",
        "hidden_size": encoder["width"],
        "num_hidden_layers": encoder["depth"],
        "num_attention_heads": encoder["heads"],
        "intermediate_size": round(encoder["width"] * encoder["mlp_ratio"]),
        "hidden_act": _HF_GELU[encoder["activation"]],
        "layer_norm_eps": encoder["norm_eps"],
        "image_size": preprocessing["image_size"],
        "patch_size": encoder["patch_size"],
        "num_channels": 3,
        "torch_dtype": "float32",
        "m3i_jax": {"final_norm": encoder["final_norm"]},
    }
    config |= (
        {"attention_dropout": 0.0}
        if clip
        else {"qkv_bias": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    )
    # Transformers 4 has this part in the names of a CLIPVisionModel; 5 reads both forms
    layout, prefix = ("clip", "vision_model.") if clip else ("hf", "")
    table = vit_weights.store_vit(tree, layout, heads=encoder["heads"], prefix=prefix)
    tensor_files.write_safetensors(directory / "model.safetensors", table, {"format": "pt"})
    _json(directory / "config.json", config)
    _json(directory / "preprocessor_config.json", _processor(preprocessing))
    return "CLIPVisionModel" if clip else "ViTModel"


def hugging_face_intern_image_config(
    directory: pathlib.Path, tree: Mapping[str, Any], preprocessing: Mapping[str, Any]
) -> pathlib.Path:
    """Write model.safetensors, with the names in the Hugging Face repositories of InternImage's
    authors, and preprocessor_config.json; returns the path of the former. The config.json belongs
    to the code in those repositories."""
    tensor_files.write_safetensors(
        directory / "model.safetensors",
        intern_image_weights.store_intern_image(tree, hugging_face=True),
        {"format": "pt"},
    )
    _json(directory / "preprocessor_config.json", _processor(preprocessing))
    return directory / "model.safetensors"


def _processor(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    side, resized = preprocessing["image_size"], preprocessing["short_side"]
    return {
        # the processor that resizes the short side, or both to a square, and crops the centre
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": (
            {"height": resized, "width": resized}
            if preprocessing["squash"]
            else {"shortest_edge": resized}
        ),
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "resample": sidecar_configs.RESAMPLE.index(preprocessing["interpolation"]),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing["mean"]),
        "image_std": list(preprocessing["std"]),
        "do_convert_rgb": True,
    }


def description(
    directory: pathlib.Path, preprocessing: Mapping[str, Any], encoder: Mapping[str, Any] | None
) -> None:
    """Write preprocessing.json, for formats whose files do not store the preprocessing, nor the
    activation and eps of a ViT. `sidecar_configs.read_sidecar_configs` reads it.

    Args:
      directory: where to write.
      preprocessing: as of `timm_config`.
      encoder: settings of `model.encoder`; None: not of a ViT.
    """
    content = {
        "resample": preprocessing["interpolation"],
        "rescale_factor": 1 / 255,
        **preprocessing,
    }
    if encoder is not None:
        content["encoder"] = {name: encoder[name] for name in ("activation", "norm_eps")}
    _json(directory / tensor_files.PREPROCESSING, content)


def _json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def _library(name: str) -> Any:
    """A module of the extra `torch`, or None if it is not installed."""
    os.environ.setdefault("USE_TF", "0")
    try:
        return (
            importlib.import_module(name)
            if name in sys.modules or importlib.util.find_spec(name)
            else None
        )
    except ImportError:
        return None


def timm_output(
    directory: pathlib.Path, encoder: Mapping[str, Any], image_size: int, normal_BxSxSx3: np.ndarray
) -> np.ndarray | None:
    """Returns tokens [B, T, D] of normalised images, computed by timm from the exported file; None
    if timm is not installed."""
    torch, library = _library("torch"), _library("timm")
    if torch is None or library is None:
        return None
    name, arguments = timm_arguments(encoder, image_size)
    if encoder["norm_eps"] != 1e-6:
        arguments["norm_layer"] = functools.partial(torch.nn.LayerNorm, eps=encoder["norm_eps"])
    model = library.create_model(name, pretrained=False, **arguments)
    table = {
        name: torch.from_numpy(np.array(array))
        for name, array in tensor_files.read_tensors(directory / "model.safetensors").items()
    }
    model.load_state_dict(table)  # strict: the names must be equal
    with torch.no_grad():
        out = model.eval().forward_features(
            torch.from_numpy(np.ascontiguousarray(normal_BxSxSx3.transpose(0, 3, 1, 2)))
        )
    return out.numpy()


def hugging_face_output(
    directory: pathlib.Path, kind: str, final_norm: bool, normal_BxSxSx3: np.ndarray
) -> np.ndarray | None:
    """Returns tokens [B, T, D] of normalised images, computed by Transformers from the exported
    directory: the last hidden state for an encoder with a final norm, else the state before the
    final norm. None if Transformers is not installed."""
    torch, library = _library("torch"), _library("transformers")
    if torch is None or library is None:
        return None
    kwargs = {} if kind == "CLIPVisionModel" else {"add_pooling_layer": False}
    model, report = getattr(library, kind).from_pretrained(
        str(directory), output_loading_info=True, **kwargs
    )
    if wrong := {name: names for name, names in report.items() if names}:
        raise UserError(f"{directory}: Transformers did not load every array: {wrong}")
    with torch.no_grad():
        pixels = torch.from_numpy(np.ascontiguousarray(normal_BxSxSx3.transpose(0, 3, 1, 2)))
        out = model.eval()(pixel_values=pixels, output_hidden_states=True)
        if kind == "ViTModel":
            return (out.last_hidden_state if final_norm else out.hidden_states[-1]).numpy()
        vision = getattr(model, "vision_model", model)  # Transformers 5 has no such part any more
        return (
            vision.post_layernorm(out.last_hidden_state) if final_norm else out.last_hidden_state
        ).numpy()

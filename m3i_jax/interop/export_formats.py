"""What timm and Transformers need beside the arrays to open exported weights, and what they make of
them: directories that `timm.create_model("local-dir:...")` and `from_pretrained` load, and the same
images through both. And InternImage under its published names."""

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
from m3i_jax.interop import intern_image_weights, tensor_files, vit_weights

# timm's entry points by (width, patch): every setting is given besides, the name only has to exist.
_TIMM = {192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224", 768: "vit_base_patch16_224", 1024: "vit_large_patch16_224",
         1280: "vit_huge_patch14_224"}  # fmt: skip
_HF_GELU = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}


def timm_arguments(encoder: Mapping[str, Any], image_size: int) -> tuple[str, dict[str, Any]]:
    """(name, arguments) of `timm.create_model` for an encoder with these settings of
    `model.encoder`.

    The model's output is the mean of the patch tokens. An eps other than timm's 1e-6 goes in by
    `norm_layer`, which no JSON can hold."""
    arguments = {
        "img_size": image_size,
        "patch_size": encoder["patch_size"],
        "embed_dim": encoder["width"],
        "depth": encoder["depth"],
        "num_heads": encoder["heads"],
        "mlp_ratio": encoder["mlp_ratio"],
        "class_token": encoder["cls_token"],
        "pre_norm": encoder["embedding_norm"],
        "final_norm": encoder["final_norm"],
        "fc_norm": False,
        "act_layer": encoder["activation"],
        "global_pool": "avg",
        "num_classes": 0,
    }
    return _TIMM.get(encoder["width"], _TIMM[768]), arguments


def timm_config(
    place: pathlib.Path,
    tree: Mapping[str, np.ndarray],
    encoder: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
) -> None:
    """Writes model.safetensors and timm's config.json.

    Args:
      place: a directory.
      tree: {path: array}.
      encoder: settings of `model.encoder`.
      preprocessing: image_size, short_side, mean and std of `data.preprocessing`.
    """
    image_size = preprocessing["image_size"]
    name, arguments = timm_arguments(encoder, image_size)
    table = vit_weights.store_vit(tree, "timm", heads=encoder["heads"])
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": encoder["width"],
        "global_pool": "avg",
        "model_args": {
            name: value
            for name, value in arguments.items()
            if name not in ("num_classes", "global_pool")
        },
        "pretrained_cfg": {
            "input_size": [3, image_size, image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": crop_pct(image_size, preprocessing["short_side"]),
            "crop_mode": "center",
            "mean": list(preprocessing["mean"]),
            "std": list(preprocessing["std"]),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    tensor_files.write_safetensors(place / "model.safetensors", table, {"format": "pt"})
    _json(place / "config.json", config)


def crop_pct(image_size: int, short_side: int) -> float:
    """timm's setting with which its short side, floor(image_size / crop_pct), is this one.

    >>> crop_pct(224, 256), math.floor(32 / crop_pct(32, 37)), math.floor(49 / crop_pct(49, 49))
    (0.875, 37, 49)
    """
    share = image_size / short_side
    return share if math.floor(image_size / share) == short_side else math.nextafter(share, 0.0)


def hugging_face_config(
    place: pathlib.Path,
    tree: Mapping[str, np.ndarray],
    encoder: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
) -> str:
    """Writes model.safetensors, config.json and preprocessor_config.json; returns the class that
    reads them: ViTModel, or CLIPVisionModel where there is a norm before the first block. The
    arguments are those of `timm_config`."""
    if not encoder["cls_token"]:
        raise UserError(
            "--format=hf: Transformers' vision transformers always have a cls token, and this"
            " encoder has none; use timm or npz"
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
    }
    config |= (
        {"attention_dropout": 0.0}
        if clip
        else {"qkv_bias": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    )
    table = vit_weights.store_vit(tree, "clip" if clip else "hf", heads=encoder["heads"])
    tensor_files.write_safetensors(place / "model.safetensors", table, {"format": "pt"})
    _json(place / "config.json", config)
    _json(place / "preprocessor_config.json", _processor(preprocessing))
    return "CLIPVisionModel" if clip else "ViTModel"


def hugging_face_intern_image_config(
    place: pathlib.Path, tree: Mapping[str, Any], preprocessing: Mapping[str, Any]
) -> pathlib.Path:
    """Writes model.safetensors, with the names of the Hugging Face repositories of InternImage's
    authors, and preprocessor_config.json; returns the former. A config.json belongs to the code in
    those repositories."""
    tensor_files.write_safetensors(
        place / "model.safetensors",
        intern_image_weights.store_intern_image(tree, hugging_face=True),
        {"format": "pt"},
    )
    _json(place / "preprocessor_config.json", _processor(preprocessing))
    return place / "model.safetensors"


def _processor(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    side = preprocessing["image_size"]
    return {
        # the one that resizes the short side and cuts the centre out
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": preprocessing["short_side"]},
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing["mean"]),
        "image_std": list(preprocessing["std"]),
        "do_convert_rgb": True,
    }


def description(place: pathlib.Path, preprocessing: Mapping[str, Any]) -> None:
    """Writes preprocessing.json, which stands beside weights whose own files cannot say how images
    are seen. `vit_weights.read_sidecar_configs` reads it."""
    told = {"resample": "bicubic", "rescale_factor": 1 / 255, **preprocessing}
    _json(place / tensor_files.PREPROCESSING, told)


def _json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def _library(name: str) -> Any:
    """A module that only the extra `torch` brings, or None."""
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
    place: pathlib.Path, encoder: Mapping[str, Any], image_size: int, normal_BxSxSx3: np.ndarray
) -> np.ndarray | None:
    """Tokens [B, T, D] that timm's model makes of normalised images with the exported file; None
    where timm is not installed."""
    torch, library = _library("torch"), _library("timm")
    if torch is None or library is None:
        return None
    name, arguments = timm_arguments(encoder, image_size)
    if encoder["norm_eps"] != 1e-6:
        arguments["norm_layer"] = functools.partial(torch.nn.LayerNorm, eps=encoder["norm_eps"])
    model = library.create_model(name, pretrained=False, **arguments)
    table = {
        name: torch.from_numpy(np.array(array))
        for name, array in tensor_files.read_tensors(place / "model.safetensors").items()
    }
    model.load_state_dict(table)  # strict: every name, and no other
    with torch.no_grad():
        out = model.eval().forward_features(
            torch.from_numpy(np.ascontiguousarray(normal_BxSxSx3.transpose(0, 3, 1, 2)))
        )
    return out.numpy()


def hugging_face_output(
    place: pathlib.Path, kind: str, final_norm: bool, normal_BxSxSx3: np.ndarray
) -> np.ndarray | None:
    """Tokens [B, T, D] that Transformers' model makes of normalised images with the exported
    directory: with our final norm its last hidden state, else the one before the norm that it
    always has. None where Transformers is not installed."""
    torch, library = _library("torch"), _library("transformers")
    if torch is None or library is None:
        return None
    kwargs = {} if kind == "CLIPVisionModel" else {"add_pooling_layer": False}
    model, report = getattr(library, kind).from_pretrained(
        str(place), output_loading_info=True, **kwargs
    )
    if wrong := {name: found for name, found in report.items() if found}:
        raise UserError(f"{place}: Transformers did not take every array: {wrong}")
    with torch.no_grad():
        pixels = torch.from_numpy(np.ascontiguousarray(normal_BxSxSx3.transpose(0, 3, 1, 2)))
        out = model.eval()(pixel_values=pixels, output_hidden_states=True)
        if kind == "ViTModel":
            return (out.last_hidden_state if final_norm else out.hidden_states[-1]).numpy()
        vision = getattr(model, "vision_model", model)  # Transformers 5 has no such part any more
        return (
            vision.post_layernorm(out.last_hidden_state) if final_norm else out.last_hidden_state
        ).numpy()

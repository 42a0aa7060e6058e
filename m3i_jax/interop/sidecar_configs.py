"""Settings in the JSON files beside published weights: config.json, preprocessor_config.json and
processor_config.json of Hugging Face, config.json of timm, and preprocessing.json of our
exports."""

import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

from m3i_jax.errors import UserError
from m3i_jax.interop import tensor_files
from m3i_jax.interop.layout_entries import IMAGENET

_GELUS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
# the SigLIPs of timm whose entry points have the tanh form of GELU; the others have the exact one
_TANH_OF_TIMM = re.compile(
    r"(patch32|so400m_patch16|giantopt_patch16)_siglip_|large_patch16_siglip_(gap_)?512"
)
# of timm, with the arrays of a ViT: rotary positions beside a table or in other units, norms after
# the branches
_FOREIGN = re.compile(r"^eva02_|^vit_pe_|_rope_|_rpn_")
# families of Hugging Face whose names of arrays are those of its ViT, trained with ImageNet's mean
_OF_IMAGENET = {"deit": "DeiT", "vit_mae": "ViTMAE", "vit_msn": "ViTMSN"}
# of Pillow, which numbers its filters; all names are values of evaluate.interpolation
RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
# processors of Hugging Face that are bilinear where a file does not say; the second group reads a
# bare number as the side of a square
_BILINEAR = ("ViTImage", "ViTFeature", "DINOv3ViT")
_SQUARE = (*_BILINEAR, "DeiT")
_WHOLE = "Siglip2Image"  # of NaFlex: images are not cropped, and have as many patches as fit
_PROCESSOR = "processor_config.json"
_TIMM_CROP = 0.875  # of files without crop_pct


def sidecar_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings stored in a config.json: keys of Hugging Face, or `model_args` and
    `pretrained_cfg` of timm.

    >>> config = {"num_attention_heads": 2, "image_mean": [0.5, 0.5, 0.5], "hidden_act": ["gelu"]}
    >>> sidecar_settings(config)
    {'heads': 2, 'mean': (0.5, 0.5, 0.5)}
    >>> sidecar_settings({"architecture": "vit_base_patch32_clip_quickgelu_224"})
    {'norm_eps': 1e-05, 'activation': 'quick_gelu'}
    >>> sidecar_settings({"architecture": "vit_so400m_patch16_siglip_256"})
    {'activation': 'gelu_tanh'}
    """
    whole, config = config, config_section(config, "vision_config") or config
    args = config_section(config, "model_args")
    out: dict[str, Any] = {}
    for heads in (config.get("num_attention_heads"), args.get("num_heads")):
        if _is_size(heads):
            out["heads"] = heads
    for act in (config.get("hidden_act"), args.get("act_layer")):
        if isinstance(act, str) and act in _GELUS and "activation" not in out:
            out["activation"] = _GELUS[act]
    if isinstance(name := config.get("architecture"), str):  # of timm
        if name.startswith("vit_") and "_clip_" in name:
            out["norm_eps"] = 1e-5
            if "quickgelu" in name:
                out.setdefault("activation", "quick_gelu")
        elif _TANH_OF_TIMM.search(name):
            out.setdefault("activation", "gelu_tanh")
    if isinstance(eps := config.get("layer_norm_eps"), float) and 0 < eps < 1:
        out["norm_eps"] = eps
    if _is_number(base := config.get("rope_theta")) and base > 1:
        out["rope_base"] = float(base)
    size = config_section(config, "pretrained_cfg").get("input_size")
    if isinstance(size, list | tuple) and len(size) == 3 and _is_size(size[-1]):
        out["image_size"] = size[-1]
    if _is_size(side := config.get("image_size")):  # unless a processor or a table says otherwise
        out["image_size"] = side
    if _is_of_imagenet(config):  # unless a processor says otherwise
        out |= IMAGENET
    # of our exports, whose layouts have other values than the run
    ours = config_section(config_section(whole, tensor_files.PREPROCESSING), "encoder")
    if isinstance(act := ours.get("activation"), str) and act in _GELUS:
        out["activation"] = _GELUS[act]
    if isinstance(eps := ours.get("norm_eps"), float) and 0 < eps < 1:
        out["norm_eps"] = eps
    return out | preprocessing_settings(whole)  # a processor is beside `vision_config`, not in it


def foreign_encoder(config: Mapping[str, Any], *, gated: bool) -> str:
    """Why an encoder of ours with the arrays beside a config.json computes something else; "" if
    it does not.

    Args:
      config: content of the file.
      gated: the MLPs are gated, and so their activation is known.

    >>> foreign_encoder({"architecture": "vit_pe_core_base_patch16_224"}, gated=False)
    'its architecture, vit_pe_core_base_patch16_224, has rotary positions or norms in other places'
    >>> foreign_encoder({"vision_config": {"hidden_act": "relu"}}, gated=False)
    "its activation is 'relu', which m3i_jax does not have"
    """
    name = config.get("architecture")
    if isinstance(name, str) and _FOREIGN.search(name):
        return f"its architecture, {name}, has rotary positions or norms in other places"
    vision = config_section(config, "vision_config") or config
    acts = (vision.get("hidden_act"), config_section(config, "model_args").get("act_layer"))
    for act in acts:
        if isinstance(act, str) and act not in _GELUS and not gated:
            return f"its activation is {act!r}, which m3i_jax does not have"
    return ""


def _is_of_imagenet(config: Mapping[str, Any]) -> bool:
    """Whether a config.json of Hugging Face is of a family with ImageNet's mean and deviation."""
    classes = config.get("architectures")
    names = [name for name in classes if isinstance(name, str)] if _is_list(classes) else []
    return any(
        config.get("model_type") == family or any(name.startswith(start) for name in names)
        for family, start in _OF_IMAGENET.items()
    )


def preprocessing_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the preprocessing: from the processor of Hugging Face or the `pretrained_cfg` of
    timm, then from our preprocessing.json.

    Raises:
      UserError: they name a filter that is none of Pillow's, borders around images, a long side, a
        size that is no square, or that images are not resized or not scaled.

    >>> preprocessing_settings({"crop_size": 224, "size": {"shortest_edge": 256}, "resample": 2})
    {'interpolation': 'bilinear', 'crop': 0.875, 'image_size': 224}
    >>> preprocessing_settings({"size": {"height": 224, "width": 224}, "resample": 3})
    {'interpolation': 'bicubic', 'crop': 1.0, 'squash': True}
    >>> preprocessing_settings({"pretrained_cfg": {"input_size": [3, 32, 32], "crop_pct": 0.9}})
    {'crop': 0.9142857142857143}
    """
    for step in ("do_resize", "do_rescale"):
        if config.get(step) is False:
            raise UserError(
                f"the preprocessing of the weights has {step}=false, but evaluations always resize"
                " images and scale their values to 0..1: remove it from the"
                " preprocessor_config.json beside them if the weights expect such images"
            )
    factor = config.get("rescale_factor")
    if _is_number(factor) and not math.isclose(factor, 1 / 255, rel_tol=1e-3):
        raise UserError(
            f"the preprocessing of the weights has rescale_factor={factor}, but evaluations scale"
            " values to 0..1: use 1/255 in the preprocessor_config.json beside them, with the"
            " 'image_mean' and 'image_std' of such values"
        )
    pretrained = config_section(config, "pretrained_cfg")
    ours = config_section(config, tensor_files.PREPROCESSING)
    out: dict[str, Any] = {}
    for name, theirs in (("mean", "image_mean"), ("std", "image_std")):
        for value in (config.get(theirs), pretrained.get(name), ours.get(name)):
            if name not in out and _is_number(value):  # of every channel
                out[name] = (float(value),) * 3
            if (
                name not in out
                and _is_list(value)
                and len(value) == 3
                and all(_is_number(x) for x in value)
            ):
                out[name] = tuple(float(x) for x in value)
    if config.get("do_normalize") is False:
        out |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    kind = _processor_kind(config)
    if name := (
        _filter("resample", config.get("resample"))
        or ("bilinear" if kind.startswith(_BILINEAR) else "")
        or _filter("pretrained_cfg.interpolation", pretrained.get("interpolation"))
        or _filter("interpolation", ours.get("interpolation"))
    ):
        out["interpolation"] = name
    _check_size(config.get("size"))
    cropped = 0 if config.get("do_center_crop") is False else _side(config.get("crop_size"))
    squash = _squashes(config, kind)
    resized = _side(config.get("size"), "height" if squash else "shortest_edge")
    if cropped and resized and cropped <= resized:
        out["crop"] = cropped / resized
    elif not cropped and _side(config.get("size")):  # ViT's processor, which does not crop
        out["crop"] = 1.0
    if squash and cropped <= resized:
        out["squash"] = True
    if kind.startswith(_WHOLE) and "size" not in config:
        out |= {"crop": 1.0, "squash": True}
    out |= _timm_crop(pretrained)
    if _is_number(share := ours.get("crop")) and 0 < share <= 1:
        out.setdefault("crop", share)
    if isinstance(value := ours.get("squash"), bool):
        out.setdefault("squash", value)
    if _is_size(side := cropped or ours.get("image_size")):
        out["image_size"] = side
    if isinstance(gray := ours.get("background"), int) and 0 <= gray <= 255:
        out["background"] = gray
    return out


def _check_size(size: Any) -> None:
    """Refuses a size of a processor to which no evaluation resizes."""
    if not isinstance(size, Mapping) or _side(size, "shortest_edge"):
        return
    height, width = _side(size), _side(size, "width")
    if _side(size, "longest_edge") or (height and width and height != width):
        raise UserError(
            f"the preprocessing of the weights has size={dict(size)!r}, but images are resized to a"
            " square or by their short side: use 'height' and 'width', or 'shortest_edge', in the"
            " preprocessor_config.json beside them"
        )


def _filter(key: str, value: Any) -> str:
    """The name of a filter of Pillow by its number or name; "" for None.

    >>> _filter("resample", 1), _filter("interpolation", "box"), _filter("resample", None)
    ('lanczos', 'box', '')
    """
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(RESAMPLE):
        return RESAMPLE[value]
    if isinstance(value, str) and value in RESAMPLE:
        return value
    raise UserError(
        f"the preprocessing of the weights has {key}={value!r}, which is no filter to resize images"
        f" with: use one of {', '.join(RESAMPLE)} in the JSON file beside them"
    )


def _timm_crop(pretrained: Mapping[str, Any]) -> dict[str, Any]:
    """The crop of a `pretrained_cfg`, of the length that timm resizes to, which is rounded down.

    >>> 384 / _timm_crop({"input_size": [3, 384, 384]})["crop"]
    438.0
    """
    size, share = pretrained.get("input_size"), pretrained.get("crop_pct")
    share = _TIMM_CROP if share is None else share
    if not (
        _is_list(size)
        and len(size) == 3
        and _is_size(size[-1])
        and _is_number(share)
        and 0 < share <= 1
    ):
        return {}
    if pretrained.get("crop_mode") == "border":
        raise UserError(
            "the preprocessing of the weights has pretrained_cfg.crop_mode='border', borders around"
            " the whole image, which evaluations do not draw: use 'center' or 'squash' in the"
            " config.json beside them"
        )
    squash = {"squash": True} if pretrained.get("crop_mode") == "squash" else {}
    return {"crop": size[-1] / math.floor(size[-1] / share), **squash}


def _processor_kind(config: Mapping[str, Any]) -> str:
    """The class of a processor of Hugging Face; "" if the file does not name it."""
    names = (config.get("image_processor_type"), config.get("feature_extractor_type"))
    return next((name for name in names if isinstance(name, str)), "")


def _squashes(config: Mapping[str, Any], kind: str) -> bool:
    """Whether a processor resizes to a square: by its size, or by its class if that is a bare
    number.

    >>> _squashes({"size": 224}, "ViTFeatureExtractor"), _squashes({"size": 224}, "CLIPProcessor")
    (True, False)
    """
    size = config.get("size")
    if isinstance(size, Mapping):
        return bool(_side(size)) and _side(size) == _side(size, "width")
    if not _is_size(size):
        return False
    return kind.startswith(_SQUARE) if kind else "crop_size" not in config


def config_section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Returns a section of a configuration; {} if it is not a mapping.

    >>> config_section({"a": {"b": 1}, "c": 2}, "a"), config_section({"a": {"b": 1}, "c": 2}, "c")
    ({'b': 1}, {})
    """
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 16


def _is_number(value: Any) -> TypeGuard[float]:
    # false for NaN too
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6


def _is_list(value: Any) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    return isinstance(value, list | tuple)


def _side(size: Any, key: str = "height") -> int:
    """Pixels of a size as processors store it, a number or {key: number}; 0 for anything else."""
    side = size.get(key) if isinstance(size, Mapping) else size
    return side if _is_size(side) else 0


def read_sidecar_configs(path: str) -> dict[str, Any]:
    """Returns the content of config.json and preprocessor_config.json next to a file of weights
    (of processor_config.json, if that has an image processor), merged, and, under its name, that of
    our preprocessing.json; {} without such files.

    Raises:
      UserError: one of them is not a JSON object.
    """
    directory = pathlib.Path(path)
    directory = directory if directory.is_dir() else directory.parent
    out: dict[str, Any] = {}
    if (directory / "preprocessor_config.json").is_file():
        out |= tensor_files.read_json(directory / "preprocessor_config.json")
    if (directory / _PROCESSOR).is_file():
        # the processor of a model of images and texts, as Transformers 5 saves and prefers it
        whole = tensor_files.read_json(directory / _PROCESSOR)
        out = dict(config_section(whole, "image_processor")) or out
    if (directory / "config.json").is_file():
        out |= tensor_files.read_json(directory / "config.json")
    if (directory / tensor_files.PREPROCESSING).is_file():
        out[tensor_files.PREPROCESSING] = tensor_files.read_json(
            directory / tensor_files.PREPROCESSING
        )
    return out

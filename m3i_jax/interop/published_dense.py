"""Whole detectors and segmenters in the files of InternImage's repository, which has the names of
mmdetection and mmsegmentation, as our flat tree of encoder and head, with the settings that names
and shapes imply; and the heads of files whose encoders this package does not have.

| names | system | what is read |
|---|---|---|
| `bbox_head.transformer.` | DINO, also on a composite backbone (CBNet) | all |
| `decode_head.psp_modules.` | UperNet | all, with running statistics |
| `decode_head.pixel_decoder.` | Mask2Former | all |
| other heads on an InternImage | Mask R-CNN, Cascade, SegFormer | the encoder |
| `model.pixel_level_module.` | Mask2Former of Transformers (Swin) | the head |
| `transformer.tgt_embed.` | DINO of its authors (ResNet, Swin) | the head |

C channels, D width."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from m3i_jax.errors import UserError
from m3i_jax.interop import dino_weights, intern_image_weights, mask2former_weights, tensor_files
from m3i_jax.interop.vit_layouts import IMAGENET
from m3i_jax.interop.vit_weights import PublishedWeights

RUNNING = "running/"  # of running statistics, beside the parameters
_STRIDES = (4, 8, 16, 32)
_POOLS = (1, 2, 3, 6)
_HEAD_CHANNELS = 32  # of an attention head, in all published heads
_KNOWN_BY = {
    "dino": "bbox_head.transformer.query_embed.weight",
    "upernet": "decode_head.psp_modules.0.1.conv.weight",
    "mask2former": "decode_head.pixel_decoder.mask_feature.weight",
    "mask2former of Transformers": "model.pixel_level_module.decoder.mask_projection.weight",
    "dino of its authors": "transformer.tgt_embed.weight",
}
_TASKS = {"dino": "detect", "upernet": "segment", "mask2former": "segment"}
_DEFORMABLE_DETR = (
    "model.decoder.layers.0.encoder_attn.sampling_offsets.weight",  # Transformers
    "transformer.pos_trans.weight",  # its authors, with two stages
    "bbox_head.transformer.pos_trans.weight",  # mmdetection
)
_STEM = "patch_embed.conv1.weight"
_FIRST, _SECOND = "backbone.cb_modules.0.", "backbone.cb_modules.1."


def dense_head(names: Mapping[str, Any]) -> str:
    """Returns the head of a file by its names, a key of the table above; "" if it has none of
    these.

    >>> dense_head({"decode_head.psp_modules.0.1.conv.weight": 0})
    'upernet'
    """
    return next((head for head, name in _KNOWN_BY.items() if name in names), "")


def dense_task(names: Mapping[str, Any]) -> str:
    """Returns the task that a whole file of this module is for, detect or segment; "" for other
    files.

    >>> dense_task({"bbox_head.transformer.query_embed.weight": 0, f"backbone.{_STEM}": 0})
    'detect'
    """
    return _TASKS.get(dense_head(names), "") if _encoder_prefix(names) else ""


def _encoder_prefix(names: Mapping[str, Any]) -> str:
    """Where the names of an InternImage begin; "" if the file has none below `backbone.`."""
    found = (prefix for prefix in ("backbone.", _FIRST) if f"{prefix}{_STEM}" in names)
    return next(found, "")


def load_published_dense(table: Mapping[str, Any]) -> PublishedWeights | None:
    """Converts a file of this module; None for another file.

    Args:
      table: {name: array}.

    Returns:
      `arrays` below `encoder/`, `head/` and `running/`; `settings`, those of the images and
      "detect" or "segment", fields of these sections of `dense`, "maps", "classes", and those of
      the published evaluation: "dense_size", the side of its images or windows, and of detectors
      "dense_short", of segmenters "geometry", fields of this section.

    Raises:
      UserError: weights of Deformable DETR, whose queries are made in another way; names that the
        recognised system does not have, or lacks.

    >>> load_published_dense({"blocks.0.norm1.weight": np.ones(3)}) is None
    True
    """
    if any(name in table for name in _DEFORMABLE_DETR):
        raise UserError(
            "these are weights of Deformable DETR, which m3i_jax does not have (its decoder makes"
            " queries of proposals, or has them without boxes); give weights of DINO"
        )
    prefix, head = _encoder_prefix(table), dense_head(table)
    if not prefix and not head.endswith(("Transformers", "authors")):
        return None
    table = {name: table[name] for name in table if not name.startswith("ema_")}
    arrays: dict[str, np.ndarray] = {}
    settings: dict[str, Any] = dict(IMAGENET)
    unused: dict[str, int] = {}
    if prefix:
        arrays |= _encoder(table, prefix)
        if prefix == _FIRST:
            settings["maps"] = {"composite": 2}
    others = {name: a for name, a in table.items() if not name.startswith("backbone.")}
    if head.startswith("dino"):
        tree = (
            dino_weights.load_mmdet_dino(others)
            if head == "dino"
            else dino_weights.load_dino(table, finest=8)
        )
        arrays |= _flat(tree["head"], "head/")
        settings |= {"detect": _dino_settings(tree["head"]), "classes": _rows(tree, "labels")}
    elif head.startswith("mask2former"):
        tree = mask2former_weights.load_mask2former(others)
        arrays |= _flat(tree, "head/")
        settings["segment"] = _mask2former_settings(tree)
        settings["classes"] = tree["decoder"]["classes"]["kernel"].shape[1] - 1
    elif head == "upernet":
        arrays |= _upernet(others)
        settings["segment"] = _upernet_settings(arrays)
        settings["classes"] = arrays["head/classifier/bias"].shape[0]
    elif others:
        unused[f"of heads that are not read, such as {next(iter(others))}"] = len(others)
    theirs = [n for n in table if n.startswith(("backbone.", "model.pixel_level_module.encoder."))]
    if not prefix:
        name = theirs[0] if theirs else "none"
        unused[f"of an encoder that this package does not have, such as {name}"] = len(theirs)
    notes: list[str] = []
    if prefix and head:
        width = arrays["encoder/stem/conv2/bias"].shape[0]
        if "detect" in settings:
            # the long side is rounded to a multiple of 32
            long, short = (2016, 1000) if width >= 320 else (1344, 800)
            settings |= {"dense_size": long, "dense_short": short}
        else:
            notes = _add_evaluation(settings, width)
    name = f"InternImage with {head}" if prefix and head else head or "InternImage"
    return PublishedWeights(name, arrays, settings, unused, [], notes)


class _Evaluation(NamedTuple):
    """How a segmenter is evaluated as published.

    Attributes:
      data: what it was trained on.
      size: side of a window, or of the crops of its training.
      long, short: limits of the sides of an image.
      stride: of the windows; 0: images are whole.
    """

    data: str
    size: int
    long: int
    short: int
    stride: int = 0


# by head and number of categories, from the configurations of InternImage's repository
_EVALUATIONS = {
    ("upernet", 19): _Evaluation("Cityscapes", 1024, 2048, 1024),
    ("mask2former", 19): _Evaluation("Cityscapes", 1024, 2048, 1024, 512),
    ("mask2former", 40): _Evaluation("NYU Depth V2", 480, 640, 480),
    ("mask2former", 59): _Evaluation("Pascal Context", 480, 4096, 520),
}
_BY_WIDTH = (("upernet", 150), ("mask2former", 150))  # of ADE20K


def _add_evaluation(settings: dict[str, Any], width: int) -> list[str]:
    """Adds sizes and windows of the published evaluation of a segmenter; returns a note where the
    file may be of other data.

    Args:
      settings: of the file, changed in place.
      width: channels of the encoder's stem.
    """
    kind = settings["segment"]["head"], settings["classes"]
    short = 896 if width >= 320 else 640 if width >= 160 else 512
    found = _EVALUATIONS.get(kind, _Evaluation("ADE20K", short, 4 * short, short))
    settings["dense_size"] = found.size
    settings["geometry"] = {"rule": "range", "long": found.long, "short": found.short}
    if found.stride:
        settings["segment"] |= {"test_whole": 0, "test_stride": found.stride}
    if kind in _EVALUATIONS or kind in _BY_WIDTH:
        return []
    return [
        f"the file does not say how its {kind[0]} of {kind[1]} categories is evaluated: as that of"
        f" ADE20K, with images of {found.long} x {found.short}; other sizes are"
        " dense.geometry.long and short"
    ]


def _encoder(table: Mapping[str, Any], prefix: str) -> dict[str, np.ndarray]:
    def below(start: str) -> dict[str, Any]:
        return {n.removeprefix(start): a for n, a in table.items() if n.startswith(start)}

    if prefix != _FIRST:
        return _flat(intern_image_weights.load_intern_image(below(prefix)))
    first = intern_image_weights.load_intern_image(below(_FIRST))
    arrays, second = _flat(first), below(_SECOND)
    for name in [name for name in second if re.fullmatch(r"gamma\d", name)]:
        arrays[f"encoder/gamma/stage{name[-1]}"] = tensor_files.weights(name, second.pop(name))
    own = intern_image_weights.load_intern_image(second)
    arrays |= _flat(own["encoder"], "encoder/second/")
    for name, array in below("backbone.cb_linears.").items():
        stage, step, leaf = name.split(".")
        value = tensor_files.weights(name, array)
        path = f"encoder/links/stage{stage}/from{int(stage) + int(step)}"
        if leaf == "weight":
            arrays[f"{path}/kernel"] = np.ascontiguousarray(value[:, :, 0, 0].T)
        else:
            arrays[f"{path}/bias"] = value
    return arrays


def _flat(tree: Mapping[str, Any], path: str = "") -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    for name, node in tree.items():
        out |= _flat(node, f"{path}{name}/") if isinstance(node, Mapping) else {path + name: node}
    return out


def _rows(tree: Mapping[str, Any], name: str) -> int:
    return int(tree["head"][name].shape[0])


def _dino_settings(head: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `schema.Detect`; what arrays do not tell is as published."""
    encoder, decoder = head["encoder"], head["decoder"]
    strides = sorted(int(name.removeprefix("stride_")) for name in encoder["projections"])
    width = head["content"].shape[1]
    heads = max(1, width // _HEAD_CHANNELS)
    places = encoder["layers"]["attention"]["weights"]["bias"].shape[1]
    first = encoder["projections"][f"stride_{strides[0]}"]["conv"]
    return {
        "head": "dino",
        "masks": False,
        "strides": tuple(strides),
        "width": width,
        "score_threshold": 0.0,
        "detections": 300,
        "dino": {
            "queries": head["content"].shape[0],
            "heads": heads,
            "sampled": places // (heads * len(strides)),
            "encoder_depth": len(encoder["layers"]["fc1"]["bias"]),
            "depth": len(decoder["layers"]["fc1"]["bias"]),
            "hidden": encoder["layers"]["fc1"]["bias"].shape[1],
            "shared_heads": "layers" not in decoder["heads"],
            "projection_bias": "bias" in first,
            "denoising": 1000,
            "box_noise": 1.0,
        },
    }


def _mask2former_settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `schema.Segment`; what arrays do not tell is as published."""
    pixel, decoder = tree["pixel"], tree["decoder"]
    queries, width = decoder["queries"].shape
    heads = max(1, width // _HEAD_CHANNELS)
    levels = len(decoder["levels"])
    return {
        "head": "mask2former",
        "strides": _STRIDES[: levels + 1],
        "width": width,
        "test_whole": 32,
        "test_average": "softmax",
        "mask2former": {
            "queries": queries,
            "heads": heads,
            "sampled": pixel["encoder"]["attention"]["weights"]["bias"].shape[1]
            // (heads * levels),
            "encoder_depth": len(pixel["encoder"]["fc1"]["bias"]),
            "encoder_hidden": pixel["encoder"]["fc1"]["bias"].shape[1],
            "depth": sum(name.startswith("layer_") for name in decoder),
            "hidden": decoder["layer_0"]["hidden"]["bias"].shape[0],
        },
    }


def _upernet_layers(laterals: int, pools: int) -> dict[str, str]:
    """Their layers and ours; a layer is a convolution with a batch norm, or a classifier."""
    layers = {f"decode_head.psp_modules.{i}.1": f"pool_{_POOLS[i]}" for i in range(pools)}
    for i in range(laterals):
        layers[f"decode_head.lateral_convs.{i}"] = f"lateral_{_STRIDES[i]}"
        layers[f"decode_head.fpn_convs.{i}"] = f"output_{_STRIDES[i]}"
    return layers | {
        "decode_head.bottleneck": "pooled",
        "decode_head.fpn_bottleneck": "fuse",
        "decode_head.conv_seg": "classifier",
        "auxiliary_head.convs.0": "aux",
        "auxiliary_head.conv_seg": "aux_classifier",
    }


def _upernet(table: Mapping[str, Any]) -> dict[str, np.ndarray]:
    def count(pattern: str) -> int:
        return len({match[1] for name in table if (match := re.match(pattern, name))})

    laterals = count(r"decode_head\.lateral_convs\.(\d+)\.")
    pools = count(r"decode_head\.psp_modules\.(\d+)\.")
    if laterals >= len(_STRIDES) or pools > len(_POOLS):
        raise UserError(
            f"an UperNet of {laterals + 1} maps and {pools} pooled ones is not one of"
            f" InternImage's, which have {len(_STRIDES)} and {len(_POOLS)}"
        )
    layers = _upernet_layers(laterals, pools)
    leaves = {
        "bn.weight": ("head/", "scale"),
        "bn.bias": ("head/", "bias"),
        "bn.running_mean": (f"{RUNNING}head/", "mean"),
        "bn.running_var": (f"{RUNNING}head/", "variance"),
        "bias": ("head/", "bias"),
    }
    arrays: dict[str, np.ndarray] = {}
    unknown = []
    for name, array in table.items():
        if name.endswith("num_batches_tracked"):
            continue
        theirs = next((each for each in layers if name.startswith(f"{each}.")), "")
        leaf = name.removeprefix(f"{theirs}.")
        if theirs and leaf in ("weight", "conv.weight"):
            kernel = tensor_files.weights(name, array).transpose(2, 3, 1, 0)
            kernel = kernel[0, 0] if kernel.shape[:2] == (1, 1) else kernel
            arrays[f"head/{layers[theirs]}/kernel"] = np.ascontiguousarray(kernel)
        elif theirs and leaf in leaves:
            part, ours = leaves[leaf]
            arrays[f"{part}{layers[theirs]}/{ours}"] = tensor_files.weights(name, array)
        else:
            unknown.append(name)
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UserError(
            f"these are not weights of UperNet: unknown names {', '.join(unknown[:3])}{more}; give"
            " a file of InternImage's repository"
        )
    return arrays


def _upernet_settings(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Fields of `schema.Segment`; what arrays do not tell is as published."""
    parts = {name.split("/")[1] for name in arrays if name.startswith("head/")}
    pools = sorted(int(name.removeprefix("pool_")) for name in parts if name.startswith("pool_"))
    laterals = sum(name.startswith("lateral_") for name in parts)
    return {
        "head": "upernet",
        "strides": _STRIDES[: laterals + 1],
        "width": arrays["head/pooled/scale"].shape[0],
        "pool_scales": tuple(pools),
        "aux_width": arrays["head/aux/scale"].shape[0] if "aux" in parts else 0,
        "test_whole": 32,
    }

"""The tiny Mask R-CNN of detectron2 and the tiny UperNet of mmsegmentation (tests/data/dense) as
runs of this project: settings, batch, and trees of any table with their names."""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from m3i_jax import schema
from m3i_jax.interop import dense_weights, vit_weights
from tests import toy

DENSE = pathlib.Path(__file__).parents[1] / "data" / "dense"
SHARED = {
    "model.encoder.patch_size": 16,
    "model.encoder.depth": 4,
    "model.encoder.positions": "learned",
    "model.encoder.drop_path": 0.0,
    "model.encoder.final_norm": "false",
    "model.encoder.freeze_patch_embed": "false",
    "data.captions": "no",
    "optim.warmup_steps": 0,
    "optim.schedule": "constant",
    "optim.b2": 0.999,
    "optim.clip": 0.0,
    "optim.ema": 1.0,
}
VITDET = {
    "model.encoder.width": 32,
    "data.image_size": 128,
    "data.classes": 3,
    "train.batch_size": 3,
    "dense.maps.window": 3,
    "dense.maps.global_blocks": (1, 3),
    "dense.maps.relative": "decomposed",
    "dense.maps.image_size": 64,
    "dense.geometry.max_objects": 5,
    "dense.detect.anchor_sizes": (8, 16, 32, 64, 96),
    "dense.detect.width": 8,
    "dense.detect.rpn_samples": 4092,
    "dense.detect.proposals": (16, 32),
    "dense.detect.rois": 37,
    "dense.detect.roi_foreground": 0.5,
    "dense.detect.box_convs": 2,
    "dense.detect.box_hidden": 32,
    "dense.detect.mask_convs": 2,
    "dense.detect.canonical": (32, 16),
    "optim.lr": 5e-4,
    "optim.weight_decay": 0.1,
    "optim.decayed": "but_norms",
    "optim.layer_decay": 0.7,
}
UPERNET = {
    "model.encoder.width": 24,
    "data.image_size": 96,
    "data.classes": 5,
    "train.batch_size": 4,
    "dense.maps.relative": "table",
    "dense.maps.layer_scale": 1.0,
    "dense.maps.blocks": (0, 1, 2, 3),
    "dense.segment.width": 16,
    "dense.segment.aux_width": 8,
    "dense.segment.dropout": 0.0,
    "optim.lr": 1e-3,
    "optim.weight_decay": 0.05,
    "optim.decayed": "ranks",
    "optim.layer_decay": 0.65,
}
SYSTEMS = {"vitdet": ("detect", VITDET), "upernet": ("segment", UPERNET)}
LOSSES = {
    "vitdet": ("rpn_cls", "rpn_loc", "cls", "box_reg", "mask"),
    "upernet": ("pixels", "auxiliary"),
}
STATISTICS = {"running_mean": "mean", "running_var": "variance"}
UNKNOWN = -99.0
# A few gradients are 0 but for rounding, of which Adam makes whole steps: those of biases before a
# batch norm, and of the keys' biases.
ROUNDING = ("upsample_2x.0.bias", "upsample_4x.0.bias", "upsample_4x.3.bias", "qkv.bias")


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(DENSE / f"{name}.npz") as file:
        return dict(file)


def starting(name: str, prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose names start with a prefix, without it."""
    found = arrays(name).items()
    return {key.removeprefix(prefix): value for key, value in found if key.startswith(prefix)}


def reference_settings(system: str) -> schema.Config:
    task, values = SYSTEMS[system]
    texts = {key.replace(".", "__"): str(value) for key, value in (SHARED | values).items()}
    return toy.settings(task=task, **texts)


def reference_batch(system: str) -> dict[str, np.ndarray]:
    given = arrays(system)
    rows = len(given["image"])
    batch = {"position": np.stack([np.zeros(rows), np.arange(rows)], -1).astype(np.uint32)}
    if system == "vitdet":
        return batch | {n: given[n] for n in ("image", "size", "boxes", "classes", "masks")}
    size = np.full((rows, 2), given["image"].shape[1], np.int32)
    return batch | {"image": given["image"], "map": given["map"], "size": size}


def reference_tree(system: str, table: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters of a table with all names of the reference; UperNet's with "statistics"."""
    if system == "vitdet":
        tree = dense_weights.load_mask_rcnn(table)
        table = {key: value for key, value in table.items() if key.startswith("backbone.net.")}
    else:
        tree = _upernet_head(table)
    found = vit_weights.load_vit(table)
    assert not found.unknown
    for path, value in found.arrays.items():
        _put(tree, path, value)
    return tree


def _put(tree: dict[str, Any], path: str, value: np.ndarray) -> None:
    *parents, last = path.split("/")
    functools.reduce(lambda node, part: node.setdefault(part, {}), parents, tree)[last] = value


def _upernet_layers() -> dict[str, str]:
    """{layer of mmsegmentation: ours}"""
    layers = {
        "neck.upsample_4x.0": "pyramid/stride_4/deconv_0",
        "neck.upsample_4x.1": "pyramid/stride_4/scale_norm_0",
        "neck.upsample_4x.3": "pyramid/stride_4/deconv_1",
        "neck.upsample_2x.0": "pyramid/stride_8/deconv_0",
        "decode_head.bottleneck": "head/pooled",
        "decode_head.fpn_bottleneck": "head/fuse",
        "decode_head.conv_seg": "head/classifier",
        "auxiliary_head.convs.0": "head/aux",
        "auxiliary_head.conv_seg": "head/aux_classifier",
    }
    for i, (scale, stride) in enumerate(zip((1, 2, 3, 6), (4, 8, 16, None), strict=True)):
        layers[f"decode_head.psp_modules.{i}.1"] = f"head/pool_{scale}"
        if stride:
            layers[f"decode_head.lateral_convs.{i}"] = f"head/lateral_{stride}"
            layers[f"decode_head.fpn_convs.{i}"] = f"head/output_{stride}"
    return layers


def _upernet_head(table: Mapping[str, np.ndarray]) -> dict[str, Any]:
    layers, tree = _upernet_layers(), dict[str, Any]()
    for name, value in table.items():
        if name.startswith("backbone."):
            continue
        layer, last = name.removesuffix(".weight"), "kernel"
        for end in ("bias", *STATISTICS):
            if name.endswith(f".{end}"):
                layer, last = name.removesuffix(f".{end}"), end
        norm = layer.endswith((".bn", "upsample_4x.1"))
        path = layers[layer.removesuffix(".conv").removesuffix(".bn")]
        if last in STATISTICS:
            path, last = f"statistics/{path}", STATISTICS[last]
        elif last == "kernel" and norm:
            last = "scale"
        elif last == "kernel" and "deconv" in path:
            value = value.transpose(0, 2, 3, 1).reshape(len(value), -1)
        elif last == "kernel":
            value = value.transpose(2, 3, 1, 0)
            value = value[0, 0] if value.shape[:2] == (1, 1) else value
        _put(tree, f"{path}/{last}", np.asarray(value))
    return tree


def filled(system: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of parameters, in which every entry has the value of its array in the reference;
    UNKNOWN where there is none. A value may be an array of the shape of the reference's."""
    table = {
        name: np.broadcast_to(np.asarray(values.get(name, UNKNOWN), np.float32), value.shape)
        for name, value in starting(system, "state/").items()
    }
    return reference_tree(system, table)

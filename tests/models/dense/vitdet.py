"""The tiny ViTDet Mask R-CNN whose values detectron2 made (tests/data/dense/README.md), as settings
and trees of this project."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import schema
from m3i_jax.interop import dense_weights, vit_weights
from m3i_jax.models.dense import pyramid

DENSE = pathlib.Path(__file__).parents[2] / "data" / "dense"
STRIDES = (4, 8, 16, 32, 64)
PYRAMID = pyramid.PyramidConfig(kind="simple", strides=STRIDES, sources=((16, 32),), width=8)
LOSSES = ("rpn_cls", "rpn_loc", "cls", "box_reg", "mask")
MODEL = schema.Model(
    encoder=schema.Encoder(
        patch_size=16,
        width=32,
        depth=4,
        heads=2,
        positions="learned",
        freeze_patch_embed=False,
        final_norm=False,
        drop_path=0.0,
    ),
    dtype="float32",
)
MAPS = schema.Maps(window=3, global_blocks=(1, 3), relative="decomposed", image_size=64)


def _settings(rpn_samples: int, rois: int, roi_foreground: float) -> schema.Detect:
    return schema.Detect(
        anchor_sizes=(8, 16, 32, 64, 96),
        width=8,
        rpn_samples=rpn_samples,
        proposals=(16, 32),
        test_proposals=(16, 32),
        rois=rois,
        roi_foreground=roi_foreground,
        box_convs=2,
        box_hidden=32,
        mask_convs=2,
        score_threshold=0.4,
        candidates=96,
        detections=6,
        canonical=(32, 16),
    )


# nothing is sampled away; six anchors and 16 RoIs
SETS = {"all": _settings(4092, 37, 0.5), "few": _settings(6, 16, 0.25)}


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(DENSE / f"{name}.npz"))


def batch() -> tuple[np.ndarray, ...]:
    """size, boxes, classes and masks, as arguments of the losses."""
    given = arrays("vitdet")
    return tuple(given[name] for name in ("size", "boxes", "classes", "masks"))


def draws() -> dict[str, np.ndarray]:
    given = arrays("vitdet")
    return {"anchors": given["uniform/rpn"], "regions": given["uniform/roi"]}


def state(prefix: str, name: str = "vitdet") -> dict[str, np.ndarray]:
    """{name of detectron2: array} of those with a prefix."""
    return {
        key.removeprefix(prefix): value
        for key, value in arrays(name).items()
        if key.startswith(prefix)
    }


def tree_of(weights: dict[str, np.ndarray]) -> dict[str, Any]:
    """{"encoder", "pyramid", "head"} of a table of detectron2."""
    encoder = {name: value for name, value in weights.items() if name.startswith("backbone.net.")}
    found = vit_weights.load_vit(encoder)
    assert not found.unknown
    tree = dense_weights.load_mask_rcnn(weights)
    for path, value in found.arrays.items():
        *parents, last = path.split("/")
        functools.reduce(lambda node, part: node.setdefault(part, {}), parents, tree)[last] = value
    return tree


def images() -> jax.Array:
    """[3, 128, 128, 3], normalised, then zeros around the content."""
    given = arrays("vitdet")
    image = jnp.asarray(given["image"], jnp.float32)
    mean, std = jnp.array([123.675, 116.28, 103.53]), jnp.array([58.395, 57.12, 57.375])
    inside = jnp.arange(128) < given["size"][..., None]
    shown = inside[:, 0, :, None, None] & inside[:, 1, None, :, None]
    return jnp.where(shown, (image - mean) / std, 0.0)


def maps_of(params: Any, backbone_BxHxWxC: jax.Array) -> dict[int, jax.Array]:
    return pyramid.apply(PYRAMID, params["pyramid"], {}, {16: backbone_BxHxWxC}, train=True)[0]


def stored_backbone() -> jax.Array:
    return jnp.asarray(arrays("vitdet_maps")["backbone"].transpose(0, 2, 3, 1))


def close(got: Any, wanted: Any, tolerance: float, name: str = "") -> None:
    """Within a share of the largest wanted value."""
    wanted = np.asarray(wanted)
    scale = max(float(np.abs(wanted).max(initial=0)), 1e-12)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * scale, err_msg=name)

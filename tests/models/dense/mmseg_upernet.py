"""The tiny UperNet whose values mmsegmentation made (tests/data/dense/README.md), as trees of this
project."""

import functools
import pathlib
from typing import Any

import numpy as np

from m3i_jax.interop import vit_weights

DENSE = pathlib.Path(__file__).parents[2] / "data" / "dense"
STRIDES, POOLS = (4, 8, 16, 32), (1, 2, 3, 6)
_LAYERS = {  # a convolution with its batch norm: ours for theirs
    **{f"decode_head.psp_modules.{i}.1": f"head/pool_{n}" for i, n in enumerate(POOLS)},
    **{f"decode_head.lateral_convs.{i}": f"head/lateral_{n}" for i, n in enumerate(STRIDES[:-1])},
    **{f"decode_head.fpn_convs.{i}": f"head/output_{n}" for i, n in enumerate(STRIDES[:-1])},
    "decode_head.bottleneck": "head/pooled",
    "decode_head.fpn_bottleneck": "head/fuse",
    "auxiliary_head.convs.0": "head/aux",
}
_OTHERS = {
    "decode_head.conv_seg": "head/classifier",
    "auxiliary_head.conv_seg": "head/aux_classifier",
    "neck.upsample_4x.0": "pyramid/stride_4/deconv_0",
    "neck.upsample_4x.1": "pyramid/stride_4/scale_norm_0",
    "neck.upsample_4x.3": "pyramid/stride_4/deconv_1",
    "neck.upsample_2x.0": "pyramid/stride_8/deconv_0",
}
_STATISTICS = {"running_mean": "mean", "running_var": "variance"}


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(DENSE / f"{name}.npz"))


def state(prefix: str, name: str = "upernet") -> dict[str, np.ndarray]:
    """{name of mmsegmentation: array} of those with a prefix."""
    return {k.removeprefix(prefix): v for k, v in arrays(name).items() if k.startswith(prefix)}


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    functools.reduce(lambda node, part: node.setdefault(part, {}), parents, tree)[last] = value


def path_of(name: str) -> str:
    """Our path of a name of neck or heads, with its statistics."""
    layer, last = name.rsplit(".", 1)
    norm = layer.endswith(".bn") or layer == "neck.upsample_4x.1"
    ours = _OTHERS.get(layer) or _LAYERS[layer.removesuffix(".bn").removesuffix(".conv")]
    if last == "weight":
        last = "scale" if norm else "kernel"
    return f"{ours}/{_STATISTICS.get(last, last)}"


def changed(path: str, a: np.ndarray) -> np.ndarray:
    """A weight in our layout."""
    if a.ndim < 4:
        return a
    if "deconv" in path:
        return a.transpose(0, 2, 3, 1).reshape(len(a), -1)
    return a[:, :, 0, 0].T if a.shape[-1] == 1 else a.transpose(2, 3, 1, 0)


def trees(table: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, Any]]:
    """({"encoder", "pyramid", "head"}, {"pyramid", "head"}): parameters and running statistics."""
    params: dict[str, Any] = {}
    statistics: dict[str, Any] = {}
    encoder = {name: value for name, value in table.items() if name.startswith("backbone.")}
    if encoder:
        found = vit_weights.load_vit(encoder)
        assert not found.unknown
        for path, value in found.arrays.items():
            put(params, path, value)
    for name in table.keys() - encoder.keys():
        path = path_of(name)
        into = statistics if path.rsplit("/", 1)[1] in _STATISTICS.values() else params
        put(into, path, changed(path, table[name]))
    return params, statistics

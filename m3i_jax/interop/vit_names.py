"""Names of vision transformers that a table of `vit_layouts` cannot express: two matrices of SwiGLU
in one array, layers numbered within chunks, biases with a mask or of queries and values alone."""

import re
from collections.abc import Mapping

import numpy as np

_PACKED = re.compile(r"(?P<mlp>.*\.mlp)\.(weights_in|w12)\.(?P<part>weight|bias)$")
_CHUNKED = re.compile(r"^blocks\.\d+\.(\d+)\.")
# DINOv3's own files, and timm's
_RENAMED = (
    (re.compile(r"^storage_tokens$"), "reg_token"),
    (re.compile(r"^(blocks\.\d+)\.gamma_([12])$"), r"\1.ls\2.gamma"),
    (re.compile(r"^(blocks\.\d+\.mlp)\.(?:w1|fc1_g)\."), r"\1.gate."),
    (re.compile(r"^(blocks\.\d+\.mlp)\.(?:w2|fc1_x)\."), r"\1.fc1."),
    (re.compile(r"^(blocks\.\d+\.mlp)\.w3\."), r"\1.fc2."),
)
_DINOV3 = re.compile(
    r"^storage_tokens$|^blocks\.0\.(gamma_1|attn\.q_bias|mlp\.(w1|fc1_g)\.weight)$"
)


def plain_names(arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """The arrays under names of one array each: `mlp.gate`, `mlp.fc1` and `mlp.fc2` of SwiGLU, from
    DINOv2's files (`w12`, `w3`; in chunks), those of Transformers (`weights_in`, `weights_out`) and
    of timm (`fc1` with twice the rows). The gate comes first.

    Arrays without such names are returned as they are.

    >>> two = np.arange(4.0).reshape(4, 1)
    >>> plain_names({"blocks.0.1.mlp.w12.weight": two})["blocks.1.mlp.fc1.weight"].tolist()
    [[2.0], [3.0]]
    """
    if any(_DINOV3.match(name) for name in arrays):
        arrays = _of_dinov3(arrays)
    names = list(arrays)
    packed_fc1 = [name for name in names if name.endswith(".mlp.fc1.weight")][:1]
    doubled = False
    if packed_fc1 and (fc2 := packed_fc1[0].replace("fc1", "fc2")) in arrays:
        doubled = arrays[packed_fc1[0]].shape[0] == 2 * arrays[fc2].shape[1]
    chunked = any(_CHUNKED.match(name) for name in names)
    if not doubled and not chunked and not any(_PACKED.match(name) for name in names):
        return arrays
    out: dict[str, np.ndarray] = {}
    for name in names:
        array = np.asarray(arrays[name])
        plain = _CHUNKED.sub(r"blocks.\1.", name) if chunked else name
        plain = re.sub(r"\.mlp\.(weights_out|w3)\.", ".mlp.fc2.", plain)
        hit = _PACKED.match(plain) or (
            re.match(r"(?P<mlp>.*\.mlp)\.fc1\.(?P<part>weight|bias)$", plain) if doubled else None
        )
        if hit:
            for which, part in zip(("gate", "fc1"), np.split(array, 2), strict=True):
                out[f"{hit['mlp']}.{which}.{hit['part']}"] = part
        else:
            out[plain] = array
    return out


def _of_dinov3(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """DINOv3's arrays under names of timm's ViT. The bias of qkv is multiplied by its mask, which
    is 0 for keys; biases of queries and values become one; periods are computed."""
    out: dict[str, np.ndarray] = {}
    for name in arrays:
        if name.endswith(("rope_embed.periods", "rope.periods", "attn.bias_mask", "attn.v_bias")):
            continue
        if name.endswith("qkv.bias_mask"):
            continue
        array = np.asarray(arrays[name])
        if (mask := f"{name}_mask") in arrays:
            array = np.where(np.asarray(arrays[mask]) == 1, array, 0)
        if name.endswith("attn.q_bias"):
            value = np.asarray(arrays[name.replace("q_bias", "v_bias")])
            name, array = (
                name.replace("q_bias", "qkv.bias"),
                np.concatenate([array, np.zeros_like(array), value]),
            )
        for pattern, plain in _RENAMED:
            name = pattern.sub(plain, name)
        out[name] = array
    return out


def packed_names(table: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """DINOv2's arrays of SwiGLU as Transformers stores them, from `mlp.gate`, `fc1` and `fc2`.

    >>> parts = {f"0.mlp.{n}.bias": np.full(1, i) for i, n in enumerate(("gate", "fc1", "fc2"))}
    >>> {name: array.tolist() for name, array in packed_names(parts).items()}
    {'0.mlp.weights_in.bias': [0, 1], '0.mlp.weights_out.bias': [2]}
    """
    out: dict[str, np.ndarray] = {}
    for name, array in table.items():
        mlp, _, rest = name.partition(".mlp.")
        which, _, part = rest.partition(".")
        gate = f"{mlp}.mlp.gate.{part}"
        if not rest or gate not in table:
            out[name] = array
        elif which == "fc2":
            out[f"{mlp}.mlp.weights_out.{part}"] = array
        elif which == "fc1":
            out[f"{mlp}.mlp.weights_in.{part}"] = np.concatenate([table[gate], array])
    return out

"""Rows of the tables of `vit_layouts`: how arrays of PyTorch become ours. Names that no row can
express are replaced beforehand by `plain_names`: two matrices of SwiGLU in one array, layers
numbered within chunks, biases with a mask or of queries and values alone.

L blocks, D width, h heads, p pixels a patch.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from m3i_jax.errors import UserError

_Load = Callable[..., np.ndarray]
_Store = Callable[[np.ndarray, int], tuple[np.ndarray, ...]]
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


@dataclasses.dataclass(frozen=True)
class LayoutEntry:
    """A row of a table: arrays of a file and the array of our tree that they correspond to.

    Attributes:
      theirs: names in the file, with {l} for the number of a layer. Several names are parts of one
        array of ours, such as query, key and value.
      ours: path in our tree. With {l}, every layer has an array of its own, which is not stacked.
      load: their arrays (of one layer) -> ours.
      store: (ours of one layer, heads) -> theirs.
    """

    theirs: tuple[str, ...]
    ours: str
    load: _Load
    store: _Store

    @property
    def stacked(self) -> bool:
        return "{l}" in self.theirs[0] and "{l}" not in self.ours


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """The layout in which a project stores a vision transformer.

    Attributes:
      name: name of the layout.
      known_by: pattern of an array name that identifies the layout; the first layout of `LAYOUTS`
        that matches is used.
      table: how each array is converted.
      prefix: pattern of an optional prefix of the names of the encoder.
      unused: {pattern: description} of arrays that our models do not have.
      settings: default settings of `model.encoder` and `data.augment` for this layout, for what a
        file does not store.
      momentum: prefix of the momentum copy, if files have one.
      patch_bias: whether the patch embedding has a bias.
      resizes: whether the project resizes the position table to images of any size, so that a
        processor may cut others than those of the table.
    """

    name: str
    known_by: str
    table: tuple[LayoutEntry, ...]
    prefix: str = ""
    unused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    momentum: str = ""
    patch_bias: bool = True
    resizes: bool = False


def patch_side(kernel_PxD: np.ndarray) -> int:
    return round((kernel_PxD.shape[0] // 3) ** 0.5)


def require_rgb_patches(shape: tuple[int, ...], channels: int, *sides: int) -> None:
    """Raises UserError unless a convolution reads square patches of RGB images.

    >>> require_rgb_patches((768, 3, 16, 16), 3, 16, 16)
    """
    if channels != 3 or len(sides) != 2 or sides[0] != sides[1]:
        raise UserError(
            f"the patch embedding has shape {shape}, of {channels} channels and patches of"
            f" {' x '.join(map(str, sides))}; m3i_jax reads square patches of RGB images: give"
            " weights of such an encoder"
        )


def flat_table(a: np.ndarray) -> np.ndarray:
    """Returns a table of positions [1, R, D]; that of a map, [1, h, w, D] (SAM), by rows. Raises
    UserError for a map that is no square.

    >>> flat_table(np.ones((1, 8, 8, 3))).shape, flat_table(np.ones((1, 65, 3))).shape
    ((1, 64, 3), (1, 65, 3))
    """
    if a.ndim != 4:
        return a
    if a.shape[1] != a.shape[2]:
        raise UserError(
            f"the table of positions has shape {a.shape}; m3i_jax reads those of square images:"
            " give weights of such an encoder"
        )
    return a.reshape(1, -1, a.shape[3])


def _convolution_to_matrix(a_Dx3xpxp: np.ndarray) -> np.ndarray:
    if a_Dx3xpxp.ndim == 2:  # a linear layer of patches (row, column, channel): SigLIP 2 NaFlex
        return a_Dx3xpxp.T
    require_rgb_patches(a_Dx3xpxp.shape, *a_Dx3xpxp.shape[1:])
    return a_Dx3xpxp.transpose(2, 3, 1, 0).reshape(-1, a_Dx3xpxp.shape[0])


def _matrix_to_convolution(a_PxD: np.ndarray, heads: int) -> tuple[np.ndarray]:
    del heads
    side = patch_side(a_PxD)
    return (a_PxD.reshape(side, side, 3, -1).transpose(3, 2, 0, 1),)


def single_array(
    theirs: str, ours: str, load: _Load = lambda a: a, store: _Load = lambda a: a
) -> LayoutEntry:
    return LayoutEntry((theirs,), ours, load, lambda a, heads: (store(a),))


def norm_weights(
    theirs: str, ours: str, names: tuple[str, str] = ("weight", "bias")
) -> list[LayoutEntry]:
    return [
        single_array(f"{theirs}{names[0]}", f"{ours}/scale"),
        single_array(f"{theirs}{names[1]}", f"{ours}/bias"),
    ]


def linear_weight(theirs: str, ours: str) -> list[LayoutEntry]:
    """Returns the entries of a linear layer of PyTorch, whose weight is [out, in]."""
    return [
        single_array(f"{theirs}.weight", f"{ours}/kernel", np.transpose, np.transpose),
        single_array(f"{theirs}.bias", f"{ours}/bias"),
    ]


def query_value_bias(theirs: tuple[str, str], ours: str) -> LayoutEntry:
    """Biases of queries and values as that of one matrix, [3 D]: keys have none."""
    return LayoutEntry(
        theirs,
        ours,
        lambda q, v: np.concatenate([q, np.zeros_like(q), v]),
        lambda a, heads: (np.split(a, 3)[0], np.split(a, 3)[2]),
    )


def patch_weight(theirs: str, *, bias: bool = True) -> list[LayoutEntry]:
    """Returns the entries of a convolution of PyTorch [D, 3, p, p] as the matrix [p p 3, D] for
    `vit.patchify`."""
    kernel = LayoutEntry(
        (f"{theirs}.weight",),
        "encoder/patch_embed/kernel",
        _convolution_to_matrix,
        _matrix_to_convolution,
    )
    return (
        [kernel, single_array(f"{theirs}.bias", "encoder/patch_embed/bias")] if bias else [kernel]
    )


def joined_qkv(theirs: tuple[str, str, str], ours: str) -> list[LayoutEntry]:
    """Three linear layers of PyTorch, query, key and value, as one matrix [D, 3 D]."""
    weights, biases = (tuple(f"{name}.{part}" for name in theirs) for part in ("weight", "bias"))
    return [
        LayoutEntry(
            weights,
            f"{ours}/kernel",
            lambda *a: np.concatenate(a).T,
            lambda a, heads: tuple(np.split(a.T, 3)),
        ),
        LayoutEntry(
            biases,
            f"{ours}/bias",
            lambda *a: np.concatenate(a),
            lambda a, heads: tuple(np.split(a, 3)),
        ),
    ]


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALVES = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def plain_names(arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Returns the arrays under names of one array each: `mlp.gate`, `mlp.fc1` and `mlp.fc2` of
    SwiGLU, from DINOv2's files (`w12`, `w3`; in chunks), those of Transformers (`weights_in`,
    `weights_out`) and of timm (`fc1` with twice the rows). The gate comes first.

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

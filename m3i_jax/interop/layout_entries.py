"""Rows of the tables of `vit_layouts`: how arrays of PyTorch become arrays of ours.

L blocks, D width, h heads, p pixels a patch.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_Load = Callable[..., np.ndarray]
_Store = Callable[[np.ndarray, int], tuple[np.ndarray, ...]]


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
    """How a project stores a vision transformer.

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
    """

    name: str
    known_by: str
    table: tuple[LayoutEntry, ...]
    prefix: str = ""
    unused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    momentum: str = ""
    patch_bias: bool = True


def patch_side(kernel_PxD: np.ndarray) -> int:
    return round((kernel_PxD.shape[0] // 3) ** 0.5)


def _convolution_to_matrix(a_Dx3xpxp: np.ndarray) -> np.ndarray:
    if a_Dx3xpxp.ndim == 2:  # a linear layer of patches (row, column, channel): SigLIP 2 NaFlex
        return a_Dx3xpxp.T
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
    """A linear layer of PyTorch, whose weight is [out, in]."""
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
    """A convolution of PyTorch [D, 3, p, p] as the matrix [p p 3, D] for `vit.patchify`."""
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

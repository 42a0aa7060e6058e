"""Weights of the head DINO under the names of its authors' code, IDEA-Research/DINO, which keeps
linear layers as [out, in] and convolutions as [out, in, height, width]."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from m3i_jax.errors import UserError
from m3i_jax.interop import tensor_files

Tree = dict[str, Any]
_ENCODER = "backbone."
_PROJECTION = re.compile(r"^input_proj\.(\d+)\.0\.weight$")


class _Table:
    """A table of arrays by name that knows which were read."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.state, self.read = state, set[str]()

    def array(self, name: str) -> np.ndarray:
        if name not in self.state:
            raise UserError(
                f"these are not all weights of DINO's head: {name} is missing; give a file of"
                " IDEA-Research/DINO with two stages and heads that the decoder's layers share"
            )
        self.read.add(name)
        return np.asarray(tensor_files.weights(name, self.state[name]))

    def linear(self, name: str) -> Tree:
        return {"kernel": self.array(f"{name}.weight").T, "bias": self.array(f"{name}.bias")}

    def norm(self, name: str) -> Tree:
        return {"scale": self.array(f"{name}.weight"), "bias": self.array(f"{name}.bias")}

    def heads(self, classes: str, boxes: str) -> Tree:
        layers = {f"fc{i + 1}": self.linear(f"{boxes}.layers.{i}") for i in range(3)}
        return {"classes": self.linear(classes), "boxes": layers}

    def deformable(self, name: str) -> Tree:
        names = {
            "offsets": "sampling_offsets",
            "weights": "attention_weights",
            "value": "value_proj",
            "output": "output_proj",
        }
        return {ours: self.linear(f"{name}.{theirs}") for ours, theirs in names.items()}

    def attention(self, name: str) -> Tree:
        kernels = np.split(self.array(f"{name}.in_proj_weight"), 3)
        biases = np.split(self.array(f"{name}.in_proj_bias"), 3)
        parts = zip(("query", "key", "value"), kernels, biases, strict=True)
        made = {part: {"kernel": kernel.T, "bias": bias} for part, kernel, bias in parts}
        return made | {"out": self.linear(f"{name}.out_proj")}


def _encoder_layer(table: _Table, name: str) -> Tree:
    return {
        "attention": table.deformable(f"{name}.self_attn"),
        "norm1": table.norm(f"{name}.norm1"),
        "fc1": table.linear(f"{name}.linear1"),
        "fc2": table.linear(f"{name}.linear2"),
        "norm2": table.norm(f"{name}.norm2"),
    }


def _decoder_layer(table: _Table, name: str) -> Tree:
    # their norms are numbered by the order in which the code declares them
    return {
        "attention": table.attention(f"{name}.self_attn"),
        "norm1": table.norm(f"{name}.norm2"),
        "reading": table.deformable(f"{name}.cross_attn"),
        "norm2": table.norm(f"{name}.norm1"),
        "fc1": table.linear(f"{name}.linear1"),
        "fc2": table.linear(f"{name}.linear2"),
        "norm3": table.norm(f"{name}.norm3"),
    }


def _stack(trees: list[Tree]) -> Tree:
    first = trees[0]
    return {
        name: _stack([tree[name] for tree in trees])
        if isinstance(first[name], dict)
        else np.stack([tree[name] for tree in trees])
        for name in first
    }


def _layers(table: _Table, part: str, read: Any) -> Tree:
    pattern = re.compile(rf"^transformer\.{part}\.layers\.(\d+)\.")
    count = len({match[1] for name in table.state if (match := pattern.match(name))})
    if not count:
        raise UserError(
            f"these are not weights of DINO's head: there is no layer transformer.{part}.layers;"
            " give a file of IDEA-Research/DINO"
        )
    return _stack([read(table, f"transformer.{part}.layers.{i}") for i in range(count)])


def load_dino(state: Mapping[str, Any], *, finest: int = 8) -> Tree:
    """Weights of IDEA-Research/DINO as a tree with `head`, for `dense.detect.head=dino` with
    `shared_heads`. Those of the backbone are left out.

    Args:
      state: {name: array}, or the content of a file, with this table under `model`.
      finest: stride of the first level, of which each following is the double; 4 for their models
        of five levels.

    Raises:
      UserError: a weight is missing, or is not one of this head.

    >>> load_dino({"fc.weight": np.zeros((2, 2))})  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    UserError: these are not weights of DINO's head
    """
    if isinstance(state.get("model"), Mapping):
        state = state["model"]
    table = _Table({name: x for name, x in state.items() if not name.startswith(_ENCODER)})
    levels = sorted(int(match[1]) for name in table.state if (match := _PROJECTION.match(name)))
    projections: Tree = {}
    for level in levels:
        name = f"input_proj.{level}"
        kernel = table.array(f"{name}.0.weight").transpose(2, 3, 1, 0)
        kernel = kernel[0, 0] if kernel.shape[:2] == (1, 1) else kernel
        conv = {"kernel": kernel, "bias": table.array(f"{name}.0.bias")}
        part = {"conv": conv, "norm": table.norm(f"{name}.1")}
        projections[f"stride_{finest * 2**level}"] = part
    decoder, outer = "transformer.decoder", "transformer"
    position = {f"fc{i + 1}": table.linear(f"{decoder}.ref_point_head.layers.{i}") for i in (0, 1)}
    head = {
        "encoder": {
            "layers": _layers(table, "encoder", _encoder_layer),
            "projections": projections,
            "level_embedding": table.array(f"{outer}.level_embed"),
            "proposals": {
                "dense": table.linear(f"{outer}.enc_output"),
                "norm": table.norm(f"{outer}.enc_output_norm"),
                "heads": table.heads(f"{outer}.enc_out_class_embed", f"{outer}.enc_out_bbox_embed"),
            },
        },
        "decoder": {
            "layers": _layers(table, "decoder", _decoder_layer),
            "position": position,
            "norm": table.norm(f"{decoder}.norm"),
            "heads": table.heads(f"{decoder}.class_embed.0", f"{decoder}.bbox_embed.0"),
        },
        "content": table.array(f"{outer}.tgt_embed.weight"),
        "labels": table.array("label_enc.weight")[:-1],  # the last row is of no class
    }
    # the same heads under the names of every layer that shares them
    again = re.compile(r"^(transformer\.decoder\.)?(class|bbox)_embed\.\d+\.")
    unknown = [name for name in table.state if name not in table.read and not again.match(name)]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UserError(
            f"these are not weights of DINO's head: unknown names {', '.join(unknown[:3])}{more};"
            " give a file of IDEA-Research/DINO"
        )
    return {"head": head}

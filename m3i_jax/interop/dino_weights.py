"""Weights of the head DINO under the names of its authors' code, IDEA-Research/DINO, and under
those of mmdetection, as in InternImage's published detectors. Both keep linear layers as [out, in]
and convolutions as [out, in, height, width]."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from m3i_jax.errors import UserError
from m3i_jax.interop import tensor_files

Tree = dict[str, Any]
_ENCODER = "backbone."
_PROJECTION = re.compile(r"^input_proj\.(\d+)\.0\.weight$")
_AUTHORS = "IDEA-Research/DINO with two stages and heads that the decoder's layers share"
_MMDET = "InternImage's repository with DINO"


class _Table:
    """A table of arrays by name that knows which were read."""

    def __init__(self, state: Mapping[str, Any], kind: str) -> None:
        self.state, self.kind, self.read = state, kind, set[str]()

    def array(self, name: str) -> np.ndarray:
        if name not in self.state:
            raise UserError(
                f"these are not all weights of DINO's head: {name} is missing; give a file of"
                f" {self.kind}"
            )
        self.read.add(name)
        return np.asarray(tensor_files.weights(name, self.state[name]))

    def linear(self, name: str) -> Tree:
        return {"kernel": self.array(f"{name}.weight").T, "bias": self.array(f"{name}.bias")}

    def norm(self, name: str) -> Tree:
        return {"scale": self.array(f"{name}.weight"), "bias": self.array(f"{name}.bias")}

    def heads(self, classes: str, boxes: str, places: tuple[str, ...]) -> Tree:
        layers = {f"fc{i + 1}": self.linear(f"{boxes}.{x}") for i, x in enumerate(places)}
        return {"classes": self.linear(classes), "boxes": layers}

    def projection(self, conv: str, norm: str) -> Tree:
        kernel = self.array(f"{conv}.weight").transpose(2, 3, 1, 0)
        kernel = kernel[0, 0] if kernel.shape[:2] == (1, 1) else kernel
        bias = {"bias": self.array(f"{conv}.bias")} if f"{conv}.bias" in self.state else {}
        return {"conv": {"kernel": kernel} | bias, "norm": self.norm(norm)}

    def numbers(self, pattern: str) -> list[int]:
        """Returns the different values of a group in names, rising."""
        found = (re.match(pattern, name) for name in self.state)
        return sorted({int(match[1]) for match in found if match})

    def refuse_unknown(self, shared: re.Pattern[str] | None = None) -> None:
        """Raises UserError unless all names were read, or are those of shared weights."""
        unknown = [
            name
            for name in self.state
            if name not in self.read and not (shared and shared.match(name))
        ]
        if unknown:
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            raise UserError(
                f"these are not weights of DINO's head: unknown names {', '.join(unknown[:3])}"
                f"{more}; give a file of {self.kind}"
            )

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
    count = len(table.numbers(rf"^{re.escape(part)}\.layers\.(\d+)\."))
    if not count:
        raise UserError(
            f"these are not weights of DINO's head: there is no layer {part}.layers; give a file"
            f" of {table.kind}"
        )
    return _stack([read(table, f"{part}.layers.{i}") for i in range(count)])


def load_dino(state: Mapping[str, Any], *, finest: int = 8) -> Tree:
    """Returns weights of IDEA-Research/DINO as a tree with `head`, for `dense.detect.head=dino`
    with `shared_heads`. Those of the backbone are left out.

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
    own = {name: x for name, x in state.items() if not name.startswith(_ENCODER)}
    table = _Table(own, _AUTHORS)
    projections = {
        f"stride_{finest * 2**level}": table.projection(
            f"input_proj.{level}.0", f"input_proj.{level}.1"
        )
        for level in table.numbers(_PROJECTION.pattern)
    }
    mlp = ("layers.0", "layers.1", "layers.2")
    decoder, outer = "transformer.decoder", "transformer"
    position = {f"fc{i + 1}": table.linear(f"{decoder}.ref_point_head.layers.{i}") for i in (0, 1)}
    head = {
        "encoder": {
            "layers": _layers(table, "transformer.encoder", _encoder_layer),
            "projections": projections,
            "level_embedding": table.array(f"{outer}.level_embed"),
            "proposals": {
                "dense": table.linear(f"{outer}.enc_output"),
                "norm": table.norm(f"{outer}.enc_output_norm"),
                "heads": table.heads(
                    f"{outer}.enc_out_class_embed", f"{outer}.enc_out_bbox_embed", mlp
                ),
            },
        },
        "decoder": {
            "layers": _layers(table, "transformer.decoder", _decoder_layer),
            "position": position,
            "norm": table.norm(f"{decoder}.norm"),
            "heads": table.heads(f"{decoder}.class_embed.0", f"{decoder}.bbox_embed.0", mlp),
        },
        "content": table.array(f"{outer}.tgt_embed.weight"),
        "labels": table.array("label_enc.weight")[:-1],  # the last row is of no class
    }
    # the same heads under the names of every layer that shares them
    table.refuse_unknown(re.compile(r"^(transformer\.decoder\.)?(class|bbox)_embed\.\d+\."))
    return {"head": head}


def _mmdet_encoder_layer(table: _Table, name: str) -> Tree:
    return {
        "attention": table.deformable(f"{name}.attentions.0"),
        "norm1": table.norm(f"{name}.norms.0"),
        "fc1": table.linear(f"{name}.ffns.0.layers.0.0"),
        "fc2": table.linear(f"{name}.ffns.0.layers.1"),
        "norm2": table.norm(f"{name}.norms.1"),
    }


def _mmdet_decoder_layer(table: _Table, name: str) -> Tree:
    return {
        "attention": table.attention(f"{name}.attentions.0.attn"),
        "norm1": table.norm(f"{name}.norms.0"),
        "reading": table.deformable(f"{name}.attentions.1"),
        "norm2": table.norm(f"{name}.norms.1"),
        "fc1": table.linear(f"{name}.ffns.0.layers.0.0"),
        "fc2": table.linear(f"{name}.ffns.0.layers.1"),
        "norm3": table.norm(f"{name}.norms.2"),
    }


def load_mmdet_dino(state: Mapping[str, Any], *, finest: int = 8) -> Tree:
    """Returns weights of neck and head of mmdetection's DINO, as in InternImage's detectors, as a
    tree with `head`, for `dense.detect.head=dino` without `shared_heads`.

    Args:
      state: {name: array} of `neck.` and `bbox_head.`; a neck of a composite backbone is `neck.0.`.
      finest: stride of the first level, of which each following is the double.

    Raises:
      UserError: a weight is missing, or is not one of this head.

    >>> load_mmdet_dino({"neck.fc.bias": np.zeros(2)})  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    UserError: these are not weights of DINO's head
    """
    table = _Table({re.sub(r"^neck\.0\.", "neck.", name): x for name, x in state.items()}, _MMDET)
    convs = [
        f"neck.{part}.{i}"
        for part in ("convs", "extra_convs")
        for i in table.numbers(rf"^neck\.{part}\.(\d+)\.")
    ]
    outer, mlp = "bbox_head.transformer", ("0", "2", "4")
    layers = _layers(table, f"{outer}.decoder", _mmdet_decoder_layer)
    pairs = [
        table.heads(f"bbox_head.cls_branches.{i}", f"bbox_head.reg_branches.{i}", mlp)
        for i in range(len(layers["fc1"]["bias"]) + 1)  # the last is the encoder's
    ]
    head = {
        "encoder": {
            "layers": _layers(table, f"{outer}.encoder", _mmdet_encoder_layer),
            "projections": {
                f"stride_{finest * 2**i}": table.projection(f"{name}.conv", f"{name}.gn")
                for i, name in enumerate(convs)
            },
            "level_embedding": table.array(f"{outer}.level_embeds"),
            "proposals": {
                "dense": table.linear(f"{outer}.enc_output"),
                "norm": table.norm(f"{outer}.enc_output_norm"),
                "heads": pairs[-1],
            },
        },
        "decoder": {
            "layers": layers,
            "position": {
                f"fc{i + 1}": table.linear(f"{outer}.decoder.ref_point_head.{2 * i}")
                for i in (0, 1)
            },
            "norm": table.norm(f"{outer}.decoder.norm"),
            "heads": {"layers": _stack(pairs[:-1])},
        },
        "content": table.array(f"{outer}.query_embed.weight"),
        "labels": table.array("bbox_head.label_embedding.weight"),
    }
    table.refuse_unknown()
    return {"head": head}

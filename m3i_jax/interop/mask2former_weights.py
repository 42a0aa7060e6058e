"""Weights of Mask2Former under the names of Hugging Face's Transformers, or under those of
mmsegmentation as in InternImage's published segmenters, as our tree of a head.

Weights are a flat table {name: array} in PyTorch's layouts, of a
`Mask2FormerForUniversalSegmentation` with mask features and queries of one width. The names of the
encoder, `model.pixel_level_module.encoder.` and `backbone.`, are not read here.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from m3i_jax.errors import UserError
from m3i_jax.interop import tensor_files

_PIXELS = r"model\.pixel_level_module\.decoder\."
_QUERIES = r"model\.transformer_module\."
_SKIPPED = re.compile(r"model\.pixel_level_module\.encoder\.|criterion\.|backbone\.")
_LEAVES = {"weight": "kernel", "bias": "bias"}
_NORM_LEAVES = {"weight": "scale", "bias": "bias"}


# Beginnings of mmsegmentation's names and those of Transformers, where N is a number
_DECODER, _TRANSFORMER = "model.pixel_level_module.decoder.", "model.transformer_module."
_MMSEG: tuple[tuple[str, str], ...] = tuple(
    (re.escape(f"decode_head.{theirs}").replace("N", r"(\d+)"), ours.replace("N", r"\1"))
    for theirs, ours in (
        ("pixel_decoder.input_convs.N.conv", f"{_DECODER}input_projections.N.0"),
        ("pixel_decoder.input_convs.N.gn", f"{_DECODER}input_projections.N.1"),
        ("pixel_decoder.encoder.layers.N.attentions.0", f"{_DECODER}encoder.layers.N.self_attn"),
        ("pixel_decoder.encoder.layers.N.ffns.0.layers.0.0", f"{_DECODER}encoder.layers.N.fc1"),
        ("pixel_decoder.encoder.layers.N.ffns.0.layers.1", f"{_DECODER}encoder.layers.N.fc2"),
        (
            "pixel_decoder.encoder.layers.N.norms.0",
            f"{_DECODER}encoder.layers.N.self_attn_layer_norm",
        ),
        ("pixel_decoder.encoder.layers.N.norms.1", f"{_DECODER}encoder.layers.N.final_layer_norm"),
        ("pixel_decoder.level_encoding.weight", f"{_DECODER}level_embed"),
        ("pixel_decoder.lateral_convs.0.conv", f"{_DECODER}adapter_1.0"),
        ("pixel_decoder.lateral_convs.0.gn", f"{_DECODER}adapter_1.1"),
        ("pixel_decoder.output_convs.0.conv", f"{_DECODER}layer_1.0"),
        ("pixel_decoder.output_convs.0.gn", f"{_DECODER}layer_1.1"),
        ("pixel_decoder.mask_feature", f"{_DECODER}mask_projection"),
        *(
            (f"transformer_decoder.layers.N.{theirs}", f"{_TRANSFORMER}decoder.layers.N.{ours}")
            for theirs, ours in (
                ("attentions.0.attn", "cross_attn"),
                ("attentions.1.attn", "self_attn"),
                ("ffns.0.layers.0.0", "fc1"),
                ("ffns.0.layers.1", "fc2"),
                ("norms.0", "cross_attn_layer_norm"),
                ("norms.1", "self_attn_layer_norm"),
                ("norms.2", "final_layer_norm"),
            )
        ),
        ("transformer_decoder.post_norm", f"{_TRANSFORMER}decoder.layernorm"),
        ("query_embed", f"{_TRANSFORMER}queries_embedder"),
        ("query_feat", f"{_TRANSFORMER}queries_features"),
        ("level_embed", f"{_TRANSFORMER}level_embed"),
        ("cls_embed", "class_predictor"),
        *(
            (f"mask_embed.{2 * i}", f"{_TRANSFORMER}decoder.mask_predictor.mask_embedder.{i}.0")
            for i in range(3)
        ),
    )
)


def _of_transformers(name: str) -> str:
    """A name of mmsegmentation as that of Transformers; others stay."""
    for theirs, ours in _MMSEG:
        if match := re.match(rf"{theirs}(?=\.|$)", name):
            return match.expand(ours) + name[match.end() :]
    return name


def _same(a: np.ndarray) -> np.ndarray:
    return a


def _matrix(a: np.ndarray) -> np.ndarray:
    """A linear layer or a convolution, whose inputs come first here, a 1 x 1 one as a matrix."""
    if a.ndim == 4:
        a = a[:, :, 0, 0] if a.shape[2:] == (1, 1) else a.transpose(2, 3, 1, 0)
    return a.T if a.ndim == 2 else a


_ATTENTION = {"q": "query", "k": "key", "v": "value", "out": "output"}
_DEFORMABLE = {
    "sampling_offsets": "offsets",
    "attention_weights": "weights",
    "value_proj": "value",
    "output_proj": "output",
}
# (their name, our path, whether it is a norm); {0} and so on are the groups of the name
_LAYERS: tuple[tuple[str, str, bool], ...] = (
    (_PIXELS + r"input_projections\.(\d+)\.0", "pixel/input_{stride}", False),
    (_PIXELS + r"input_projections\.(\d+)\.1", "pixel/input_norm_{stride}", True),
    *(
        (_PIXELS + rf"encoder\.layers\.(\d+)\.{theirs}", f"pixel/encoder/{{0}}/{ours}", norm)
        for theirs, ours, norm in (
            *((rf"self_attn\.{a}", f"attention/{b}", False) for a, b in _DEFORMABLE.items()),
            ("self_attn_layer_norm", "norm1", True),
            ("fc1", "fc1", False),
            ("fc2", "fc2", False),
            ("final_layer_norm", "norm2", True),
        )
    ),
    (_PIXELS + r"adapter_1\.0", "pixel/lateral", False),
    (_PIXELS + r"adapter_1\.1", "pixel/lateral_norm", True),
    (_PIXELS + r"layer_1\.0", "pixel/output", False),
    (_PIXELS + r"layer_1\.1", "pixel/output_norm", True),
    (_PIXELS + "mask_projection", "pixel/features", False),
    *(
        (_QUERIES + rf"decoder\.layers\.(\d+)\.{theirs}", f"decoder/layer_{{0}}/{ours}", norm)
        for theirs, ours, norm in (
            *((rf"self_attn\.{a}_proj", f"self/{b}", False) for a, b in _ATTENTION.items()),
            *((rf"cross_attn\.{a}_proj", f"cross/{b}", False) for a, b in _ATTENTION.items()),
            ("self_attn_layer_norm", "self_norm", True),
            ("cross_attn_layer_norm", "cross_norm", True),
            ("fc1", "hidden", False),
            ("fc2", "output", False),
            ("final_layer_norm", "norm", True),
        )
    ),
    (_QUERIES + r"decoder\.layernorm", "decoder/norm", True),
    (
        _QUERIES + r"decoder\.mask_predictor\.mask_embedder\.(\d+)\.0",
        "decoder/mask_{0}",
        False,
    ),
    ("class_predictor", "decoder/classes", False),
)
_TABLES: tuple[tuple[str, str], ...] = (
    (_PIXELS + "level_embed", "pixel/levels"),
    (_QUERIES + r"queries_features\.weight", "decoder/queries"),
    (_QUERIES + r"queries_embedder\.weight", "decoder/positions"),
    (_QUERIES + r"level_embed\.weight", "decoder/levels"),
)
_Change = Callable[[np.ndarray], np.ndarray]


def _place(name: str, attending: Sequence[int]) -> tuple[str, _Change] | None:
    """Our path of a name, and the change of layout; None for an unknown name."""
    for theirs, ours in _TABLES:
        if re.fullmatch(theirs, name):
            return ours, _same
    layer, _, leaf = name.rpartition(".")
    for theirs, ours, norm in _LAYERS:
        if (match := re.fullmatch(theirs, layer)) and leaf in _LEAVES:
            if "{stride}" in ours:  # coarse to fine
                number = int(match[1])
                if number >= len(attending):
                    return None
                ours = ours.format(stride=attending[::-1][number])
            path = ours.format(*match.groups())
            if norm:
                return f"{path}/{_NORM_LEAVES[leaf]}", _same
            return f"{path}/{_LEAVES[leaf]}", _matrix if leaf == "weight" else _same
    return None


def _split_projections(state: Mapping[str, Any]) -> dict[str, Any]:
    """The joint projections of PyTorch's attention under the names of single ones."""
    table: dict[str, Any] = {}
    for name, array in state.items():
        match = re.fullmatch(r"(.*\.(?:cross|self)_attn)\.in_proj_(weight|bias)", name)
        if match is None:
            table[name] = array
            continue
        parts = np.split(np.asarray(tensor_files.weights(name, array)), 3)
        for letter, part in zip("qkv", parts, strict=True):
            table[f"{match[1]}.{letter}_proj.{match[2]}"] = part
    return table


def load_mask2former(
    state: Mapping[str, Any], strides: Sequence[int] = (4, 8, 16, 32)
) -> dict[str, Any]:
    """The head of a table of Transformers or mmsegmentation, {"pixel", "decoder"}, as
    `mask2former.init` makes it.

    Args:
      state: {name: array}, or the content of a file, with this table under `state_dict`.
      strides: of the maps that the head reads; masks are made at the first.

    Raises:
      UserError: names that Mask2Former does not have, layers of another width, or a pyramid of more
        steps.

    >>> name = "class_predictor.weight"
    >>> load_mask2former({name: np.zeros((151, 256))})["decoder"]["classes"]["kernel"].shape
    (256, 151)
    """
    if isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    state = {_of_transformers(name): array for name, array in state.items()}
    tree: dict[str, Any] = {}
    unknown: list[str] = []
    for name, array in _split_projections(state).items():
        if _SKIPPED.match(name):
            continue
        found = _place(name, strides[1:])
        if found is None:
            unknown.append(name)
            continue
        path, change = found
        *way, last = path.split("/")
        node = tree
        for part in way:
            node = node.setdefault(part, {})
        node[last] = np.ascontiguousarray(change(np.asarray(tensor_files.weights(name, array))))
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UserError(
            f"these are not weights of Mask2Former: unknown names {', '.join(unknown[:3])}{more};"
            " give a table of Transformers' Mask2FormerForUniversalSegmentation or of an"
            " mmsegmentation segmenter with this head"
        )
    layers = tree.get("pixel", {}).get("encoder")
    if layers:
        tree["pixel"]["encoder"] = _stacked([layers[str(i)] for i in range(len(layers))])
    return tree


def _stacked(layers: list[Any]) -> Any:
    if isinstance(layers[0], Mapping):
        return {name: _stacked([layer[name] for layer in layers]) for name in layers[0]}
    return np.stack(layers)

"""Conversion between weights of ViTDet's Mask R-CNN (detectron2) and our trees of pyramid and head.

Weights are a flat table {name: array} in PyTorch's layouts. The names of the encoder,
`backbone.net.`, are not read here. detectron2 publishes pickles of numpy arrays, which neither this
project nor PyTorch's safe loader opens: save the table of one, its entry "model", as .npz or
.safetensors first.

C channels, T side of the pooled maps, K categories."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from m3i_jax.errors import UserError
from m3i_jax.interop import tensor_files

Tree = dict[str, Any]
_Change = Callable[[np.ndarray], np.ndarray]
_ENCODER = "backbone.net."
_PIXELS = ("pixel_mean", "pixel_std")  # buffers of some versions
_SIDE = 7  # of the maps that the box head flattens
_OBJECTNESS = "proposal_generator.rpn_head.objectness_logits.weight"
_SCORES = "roi_heads.box_predictor.cls_score.weight"
_FLATTENED = "roi_heads.box_head.fc1.weight"
LVIS_CLASSES = 1203


class _Rule(NamedTuple):
    """Names and paths share the number {i}, which is one less in ours where `first` is 1."""

    theirs: str
    ours: str
    load: _Change
    store: _Change
    first: int = 0


def _same(a: np.ndarray) -> np.ndarray:
    return a


def _flatten_last(a: np.ndarray) -> np.ndarray:
    """A matrix whose columns are (C, T, T) to one whose rows are (T, T, C)."""
    out = len(a)
    return a.reshape(out, -1, _SIDE, _SIDE).transpose(2, 3, 1, 0).reshape(-1, out)


def _flatten_first(a: np.ndarray) -> np.ndarray:
    out = a.shape[1]
    return a.reshape(_SIDE, _SIDE, -1, out).transpose(3, 2, 0, 1).reshape(out, -1)


def _to_cells(a: np.ndarray) -> np.ndarray:
    """A 2 x 2 transposed convolution [in, out, 2, 2] to [in, (row, column, out)]."""
    return a.transpose(0, 2, 3, 1).reshape(len(a), -1)


def _from_cells(a: np.ndarray) -> np.ndarray:
    return a.reshape(len(a), 2, 2, -1).transpose(0, 3, 1, 2)


_LAYOUTS: dict[str, tuple[_Change, _Change]] = {
    "unchanged": (_same, _same),
    "linear": (np.transpose, np.transpose),
    "convolution": (lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1)),
    "1x1": (lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None]),
    "flatten": (_flatten_last, _flatten_first),
    "transposed": (_to_cells, _from_cells),
}


def _head_rules() -> Iterator[_Rule]:
    def layer(
        theirs: str, ours: str, layout: str, *, bias: bool = True, first: int = 0
    ) -> Iterator[_Rule]:
        yield _Rule(f"{theirs}.weight", f"{ours}/kernel", *_LAYOUTS[layout], first)
        if bias:
            yield _Rule(f"{theirs}.bias", f"{ours}/bias", _same, _same, first)

    rpn = "proposal_generator.rpn_head"
    yield from layer(f"{rpn}.conv.conv{{i}}", "head/rpn/conv_{i}", "convolution")
    yield from layer(f"{rpn}.objectness_logits", "head/rpn/logits", "1x1")
    yield from layer(f"{rpn}.anchor_deltas", "head/rpn/deltas", "1x1")
    for theirs, ours in (("box_head.conv", "box"), ("mask_head.mask_fcn", "mask")):
        name = f"roi_heads.{theirs}{{i}}"
        yield from layer(name, f"head/{ours}/conv_{{i}}", "convolution", bias=False, first=1)
        for a, b in (("weight", "scale"), ("bias", "bias")):
            yield _Rule(f"{name}.norm.{a}", f"head/{ours}/norm_{{i}}/{b}", _same, _same, 1)
    yield from layer("roi_heads.box_head.fc1", "head/box/hidden", "flatten")
    yield from layer("roi_heads.box_predictor.cls_score", "head/box/classes", "linear")
    yield from layer("roi_heads.box_predictor.bbox_pred", "head/box/deltas", "linear")
    yield from layer("roi_heads.mask_head.deconv", "head/mask/deconv", "transposed")
    yield from layer("roi_heads.mask_head.predictor", "head/mask/masks", "1x1")


def _pyramid_rules(level: str, deconvs: int, pooled: bool) -> Iterator[_Rule]:
    """Rules of one map: its layers are a list, where activations and pooling have numbers, too."""
    theirs, ours = f"backbone.simfp_{level}", f"pyramid/stride_{2 ** int(level)}"
    places = [0, 3][:deconvs]
    for i, place in enumerate(places):
        path = f"{ours}/deconv_{i}"
        yield _Rule(f"{theirs}.{place}.weight", f"{path}/kernel", *_LAYOUTS["transposed"])
        yield _Rule(f"{theirs}.{place}.bias", f"{path}/bias", _same, _same)
    if deconvs == 2:
        for a, b in (("weight", "scale"), ("bias", "bias")):
            yield _Rule(f"{theirs}.1.{a}", f"{ours}/scale_norm_0/{b}", _same, _same)
    start = places[-1] + 1 if places else int(pooled)
    for i, layout in enumerate(("1x1", "convolution")):
        name = f"{theirs}.{start + i}"
        yield _Rule(f"{name}.weight", f"{ours}/conv_{i}/kernel", *_LAYOUTS[layout])
        for a, b in (("weight", "scale"), ("bias", "bias")):
            yield _Rule(f"{name}.norm.{a}", f"{ours}/norm_{i}/{b}", _same, _same)


_HEAD = tuple(_head_rules())


def _number(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)") + "$")


def _rename(name: str, of: str, to: str, shift: int) -> str | None:
    match = _number(of).match(name)
    if match is None:
        return None
    number = match.groupdict().get("i")
    return to.format(i=int(number) + shift) if number else to


def load_mask_rcnn(state: Mapping[str, Any]) -> Tree:
    """Returns weights of detectron2 as a tree with `pyramid` and `head`, those that the table has.

    Args:
      state: {name: array}, or the content of a file, with this table under `model`.

    Raises:
      UserError: names that ViTDet's Mask R-CNN does not have.

    >>> name = "roi_heads.box_predictor.cls_score.weight"
    >>> tree = load_mask_rcnn({name: np.zeros((81, 1024))})
    >>> tree["head"]["box"]["classes"]["kernel"].shape
    (1024, 81)
    """
    if isinstance(state.get("model"), Mapping):
        state = state["model"]
    # RPN heads of one convolution number it not
    single = "proposal_generator.rpn_head.conv."
    rules = [*_HEAD, *(rule for level in _levels(state) for rule in _pyramid_rules(*level))]
    tree: Tree = {}
    unknown = []
    for given, array in state.items():
        if given.startswith(_ENCODER) or given in _PIXELS:
            continue
        name = given
        if name in (single + "weight", single + "bias"):
            name = name.replace(single, single + "conv0.")
        found = ((_rename(name, rule.theirs, rule.ours, -rule.first), rule) for rule in rules)
        path, rule = next(((path, rule) for path, rule in found if path), (None, None))
        if path is None or rule is None:
            unknown.append(given)
            continue
        _put(tree, path, np.ascontiguousarray(rule.load(tensor_files.weights(given, array))))
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UserError(
            "these are not weights of ViTDet's Mask R-CNN: unknown names"
            f" {', '.join(unknown[:3])}{more}; give a file of that project"
        )
    return tree


def has_mask_rcnn(names: Mapping[str, Any]) -> bool:
    """Returns whether a table of detectron2 has a whole Faster or Mask R-CNN, and not an encoder
    alone, or a cascade of heads.

    >>> has_mask_rcnn({"backbone.net.blocks.0.attn.rel_pos_h": 0})
    False
    """
    return _SCORES in names and _OBJECTNESS in names and _FLATTENED in names


def mask_rcnn_settings(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Returns settings that the names and shapes of a table of `has_mask_rcnn` imply, with the
    values of detectron2's ViTDet project where they imply none: anchors, canonical box and
    thresholds.

    Args:
      shapes: {name: shape}.

    Returns:
      "detect", fields of `schema.Detect`, and "classes", the number of categories. With the 1,203
      categories of LVIS, loss and thresholds are those of LVIS.
    """

    def convs(template: str) -> int:
        return sum(bool(_number(template).match(name)) for name in shapes)

    levels = sorted(int(level) for level, _, _ in _levels(shapes))
    strides = tuple(2**level for level in (*levels, levels[-1] + 1))  # the last is a pooled one
    classes = shapes[_SCORES][0] - 1
    detect: dict[str, Any] = {
        "strides": strides,
        "anchor_sizes": tuple(8 * stride for stride in strides),
        "width": shapes[_OBJECTNESS][1],
        "rpn_convs": convs("proposal_generator.rpn_head.conv.conv{i}.weight") or 1,
        "box_convs": convs("roi_heads.box_head.conv{i}.weight"),
        "box_hidden": shapes[_FLATTENED][0],
        "masks": "roi_heads.mask_head.predictor.weight" in shapes,
    }
    if detect["masks"]:
        detect["mask_convs"] = convs("roi_heads.mask_head.mask_fcn{i}.weight")
    if classes == LVIS_CLASSES:
        detect |= {
            "loss": "federated",
            "score_threshold": 0.02,
            "detections": 300,
            "candidates": 4096,
        }
    return {"detect": detect, "classes": classes}


def store_mask_rcnn(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Inverts `load_mask_rcnn`: pyramid and head under detectron2's names. RPN heads of one
    convolution number it all the same.

    Args:
      tree: with `pyramid` and `head`, of arrays that numpy can read.

    Raises:
      UserError: a parameter that ViTDet's Mask R-CNN does not have.

    >>> tree = {"head": {"rpn": {"logits": {"bias": np.zeros(3)}}}}
    >>> list(store_mask_rcnn(tree))
    ['proposal_generator.rpn_head.objectness_logits.bias']
    """
    pyramid = tree.get("pyramid", {})
    counts = {
        int(name.removeprefix("stride_")): sum(layer.startswith("deconv") for layer in part)
        for name, part in pyramid.items()
    }
    source = min((stride for stride, deconvs in counts.items() if not deconvs), default=0)
    rules = [*_HEAD]
    for stride, deconvs in counts.items():
        level = str(stride.bit_length() - 1)
        rules += _pyramid_rules(level, deconvs, not deconvs and stride > source)
    table: dict[str, np.ndarray] = {}
    for path, leaf in _leaves({"pyramid": pyramid, "head": tree.get("head", {})}):
        found = ((_rename(path, rule.ours, rule.theirs, rule.first), rule) for rule in rules)
        name, rule = next(((name, rule) for name, rule in found if name), (None, None))
        if name is None or rule is None:
            raise UserError(
                f"{path} is not a parameter of ViTDet's Mask R-CNN; a simple feature pyramid and a"
                " head of detection can be stored under detectron2's names"
            )
        table[name] = np.ascontiguousarray(rule.store(np.asarray(leaf)))
    return table


def _levels(state: Mapping[str, Any]) -> list[tuple[str, int, bool]]:
    """(level, doublings, whether it is pooled) of every map of the pyramid of a table."""
    layers: dict[str, set[tuple[int, bool]]] = {}
    for name in state:
        if match := re.match(r"backbone\.simfp_(\d+)\.(\d+)\.(norm\.)?weight$", name):
            layers.setdefault(match[1], set()).add((int(match[2]), bool(match[3])))
    found = []
    for level, places in layers.items():
        normed = min((place for place, norm in places if norm), default=0)
        deconvs = sum(not norm and place in (0, 3) and place < normed for place, norm in places)
        found.append((level, deconvs, normed == 1 and not deconvs))
    return found


def _put(tree: Tree, path: str, value: np.ndarray) -> None:
    *way, last = path.split("/")
    for part in way:
        tree = tree.setdefault(part, {})
    tree[last] = value


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, node in tree.items():
        below = f"{path}/{name}" if path else name
        if isinstance(node, Mapping):
            yield from _leaves(node, below)
        else:
            yield below, node

"""Conversion between published InternImage weights (github.com/OpenGVLab/InternImage, and its
Hugging Face repositories) and our trees.

A published file is a flat table {name: array} in PyTorch's layouts. One table maps its names to our
paths, in both directions. The names in Hugging Face files have the prefix `model.`, and the layer
scales are called `layer_scale1`, `layer_scale2`.

Arrays may be of any library that numpy can read. `tensor_files.read_tensors` opens the files (a
`.pth` needs PyTorch). `m3i_jax.load(FILE)` and `init_from` use this module."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from m3i_jax.errors import UserError
from m3i_jax.interop import tensor_files

Tree = dict[str, Any]
_Change = Callable[[np.ndarray], np.ndarray]


class _Entry(NamedTuple):
    """`theirs` and `ours` share the numbers {i} (stage) and {j} (index on the stacked axis)."""

    theirs: str
    ours: str
    load: _Change
    store: _Change


def _same(a: np.ndarray) -> np.ndarray:
    return a


def _split_pairs(a: np.ndarray) -> np.ndarray:
    """Reorder rows of offsets from (group, point, x or y) to (group, x or y, point); all published
    models have 9 points."""
    return a.reshape(-1, 9, 2, *a.shape[1:]).swapaxes(1, 2).reshape(a.shape)


def _join_pairs(a: np.ndarray) -> np.ndarray:
    return a.reshape(-1, 2, 9, *a.shape[1:]).swapaxes(1, 2).reshape(a.shape)


_LAYOUTS: dict[str, tuple[_Change, _Change]] = {
    "unchanged": (_same, _same),
    "linear": (np.transpose, np.transpose),
    "convolution": (lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1)),
    "depthwise": (lambda a: a[:, 0].transpose(1, 2, 0), lambda a: a.transpose(2, 0, 1)[:, None]),
    "offset": (lambda a: _split_pairs(a).T, lambda a: _join_pairs(a.T)),
    "1x1": (lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None]),
}


def _table() -> tuple[_Entry, ...]:
    entries: list[_Entry] = []

    def one(theirs: str, ours: str, layout: str = "unchanged") -> None:
        entries.append(_Entry(theirs, ours, *_LAYOUTS[layout]))

    def norm(theirs: str, ours: str) -> None:
        one(f"{theirs}.weight", f"{ours}/scale")
        one(f"{theirs}.bias", f"{ours}/bias")

    def dense(theirs: str, ours: str, layout: str = "linear") -> None:
        one(f"{theirs}.weight", f"{ours}/kernel", layout)
        one(f"{theirs}.bias", f"{ours}/bias", layout if layout == "offset" else "unchanged")

    for n in (1, 2):
        dense(f"patch_embed.conv{n}", f"encoder/stem/conv{n}", "convolution")
        norm(f"patch_embed.norm{n}.1", f"encoder/stem/norm{n}")
    theirs, ours = "levels.{i}.blocks.{j}", "encoder/stage{i}/layers"
    for n in (1, 2):
        norm(f"{theirs}.norm{n}.0", f"{ours}/norm{n}")
        norm(f"{theirs}.res_post_norm{n}.0", f"{ours}/res_norm{n}")
        one(f"{theirs}.gamma{n}", f"{ours}/gamma{n}")
        dense(f"{theirs}.mlp.fc{n}", f"{ours}/mlp/fc{n}")
    dense(f"{theirs}.dcn.dw_conv.0", f"{ours}/dcn/depthwise", "depthwise")
    norm(f"{theirs}.dcn.dw_conv.1.1", f"{ours}/dcn/norm")
    dense(f"{theirs}.dcn.offset", f"{ours}/dcn/offsets", "offset")
    for a, b in (("mask", "mask"), ("input_proj", "input"), ("output_proj", "output")):
        dense(f"{theirs}.dcn.{a}", f"{ours}/dcn/{b}")
    one(f"{theirs}.dcn.center_feature_scale_proj_weight", f"{ours}/dcn/center/kernel", "linear")
    one(f"{theirs}.dcn.center_feature_scale_proj_bias", f"{ours}/dcn/center/bias")
    norm("levels.{i}.post_norms.{j}.0", "encoder/stage{i}/extra_norms")
    norm("levels.{i}.norm.0", "encoder/stage{i}/norm")
    one("levels.{i}.downsample.conv.weight", "encoder/stage{i}/down/conv/kernel", "convolution")
    norm("levels.{i}.downsample.norm.1", "encoder/stage{i}/down/norm")
    dense("dcnv3_head_x4.0", "encoder/fusion/deep", "1x1")
    dense("dcnv3_head_x3", "encoder/fusion/shallow", "1x1")
    for a, b in (("q", "query"), ("k", "key"), ("v", "value")):
        norm(f"clip_projector.norm1_{a}.0", f"pool/norm_{b}")
        one(f"clip_projector.cross_dcn.{a}.weight", f"pool/{b}/kernel", "linear")
        one(f"clip_projector.cross_dcn.{a}_bias", f"pool/{b}/bias")
    dense("clip_projector.cross_dcn.proj", "pool/out")
    norm("fc_norm.0", "classifier/norm")
    one("conv_head.0.weight", "classifier/convolution/kernel", "1x1")
    norm("conv_head.1.0", "classifier/batch_norm")
    one("conv_head.1.0.running_mean", "classifier/batch_norm/mean")
    one("conv_head.1.0.running_var", "classifier/batch_norm/variance")
    dense("head", "classifier/linear")
    return tuple(entries)


_TABLE = _table()
_UNUSED = re.compile(r"num_batches_tracked$")


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(
        re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{j\}", r"(?P<j>\d+)") + "$"
    )


_THEIRS = [(_pattern(entry.theirs), entry) for entry in _TABLE]
_OURS = [(_pattern(entry.ours), entry) for entry in _TABLE]


def published_name(name: str) -> str:
    """Returns the PyTorch name of a name in a Hugging Face file; PyTorch names are returned
    unchanged.

    >>> published_name("model.levels.0.blocks.1.layer_scale1"), published_name("head.bias")
    ('levels.0.blocks.1.gamma1', 'head.bias')
    """
    return re.sub(r"\.layer_scale([12])$", r".gamma\1", name.removeprefix("model."))


def hugging_face_name(name: str) -> str:
    """Inverts `published_name`.

    >>> hugging_face_name("levels.0.blocks.1.gamma1")
    'model.levels.0.blocks.1.layer_scale1'
    """
    return "model." + re.sub(r"\.gamma([12])$", r".layer_scale\1", name)


def _put(tree: Tree, path: str, value: np.ndarray) -> None:
    *way, last = path.split("/")
    for part in way:
        tree = tree.setdefault(part, {})
    tree[last] = value


def _leaves(tree: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    hit = []
    for name, node in tree.items():
        below = f"{path}/{name}" if path else name
        hit += _leaves(node, below) if isinstance(node, Mapping) else [(below, node)]
    return hit


def load_intern_image(state: Mapping[str, Any]) -> Tree:
    """Convert published weights to a tree with those of `encoder` (with `fusion` for H and G),
    `pool` (H and G) and `classifier` that the file has.

    Args:
      state: {name: array} with the names of PyTorch or Hugging Face files, or the content of a
        file, with this table under `model`.

    Raises:
      UserError: names that InternImage does not have, layers that are missing or differ in shape.

    >>> stem, gamma = np.zeros((32, 3, 3, 3)), np.zeros(64)
    >>> tree = load_intern_image(
    ...     {"patch_embed.conv1.weight": stem, "levels.0.blocks.0.gamma1": gamma}
    ... )
    >>> tree["encoder"]["stem"]["conv1"]["kernel"].shape
    (3, 3, 3, 32)
    >>> tree["encoder"]["stage0"]["layers"]["gamma1"].shape
    (1, 64)
    """
    if isinstance(state.get("model"), Mapping):
        state = state["model"]
    tree: Tree = {}
    stacks: dict[str, dict[int, np.ndarray]] = {}
    unknown = []
    for given, array in state.items():
        name = published_name(given)
        if _UNUSED.search(name):
            continue
        matches = ((pattern.match(name), entry) for pattern, entry in _THEIRS)
        match, entry = next(((hit, entry) for hit, entry in matches if hit), (None, None))
        if match is None or entry is None:
            unknown.append(given)
            continue
        numbers = match.groupdict()
        path, value = entry.ours.format(**numbers), entry.load(tensor_files.weights(given, array))
        if "j" in numbers:
            stacks.setdefault(path, {})[int(numbers["j"])] = value
        else:
            _put(tree, path, value)
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UserError(
            f"these are not weights of InternImage: unknown names {', '.join(unknown[:3])}{more};"
            " give a file of that project"
        )
    depths: dict[str, int] = {}
    for path, parts in stacks.items():
        owner = "/".join(path.split("/")[:3])
        depths[owner] = max(depths.get(owner, 0), max(parts) + 1)
    for path, parts in stacks.items():
        depth = depths["/".join(path.split("/")[:3])]
        missing = [j for j in range(depth) if j not in parts]
        if missing:
            raise UserError(
                f"the weights of {path} are missing for layer {missing[0]} of {depth}: the file is"
                " incomplete, use another one"
            )
        shapes = {value.shape for value in parts.values()}
        if len(shapes) > 1:
            raise UserError(
                f"the weights of {path} differ in shape between layers"
                f" ({', '.join(map(str, sorted(shapes)))}): the file is damaged, use another one"
            )
        _put(tree, path, np.stack([parts[j] for j in range(depth)]))
    return tree


def store_intern_image(
    tree: Mapping[str, Any], *, hugging_face: bool = False
) -> dict[str, np.ndarray]:
    """Inverts `load_intern_image`: a tree of `encoder`, and `pool` and `classifier` if given, as a
    table with published names. The mask token, which the published net does not have, is left out.

    Args:
      tree: parts with arrays that numpy can read.
      hugging_face: use the names of the Hugging Face repositories.

    Raises:
      UserError: a parameter that InternImage does not have.

    >>> tree = {"encoder": {"stage2": {"extra_norms": {"scale": np.ones((5, 8))}}}}
    >>> table = store_intern_image(tree, hugging_face=True)
    >>> len(table), table["model.levels.2.post_norms.4.0.weight"].shape
    (5, (8,))
    """
    table: dict[str, np.ndarray] = {}
    for path, leaf in _leaves(tree):
        if path == "encoder/mask_token":
            continue
        matches = ((pattern.match(path), entry) for pattern, entry in _OURS)
        match, entry = next(((hit, entry) for hit, entry in matches if hit), (None, None))
        if match is None or entry is None:
            raise UserError(
                f"{path} is not a parameter of InternImage; only encoder, pool and classifier can"
                " be stored under published names"
            )
        array = np.asarray(leaf)
        if "{j}" in entry.theirs:
            for j, value in enumerate(array):
                table[entry.theirs.format(**match.groupdict(), j=j)] = entry.store(value)
        else:
            table[entry.theirs.format(**match.groupdict())] = entry.store(array)
    return {
        hugging_face_name(name) if hugging_face else name: np.ascontiguousarray(value)
        for name, value in table.items()
    }

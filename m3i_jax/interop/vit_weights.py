"""Weights from other projects as our flat tree, and back: of vision transformers what `layouts`
says, for a whole file; of InternImage what `intern_image_weights` says.

found = load(tensor_files.read_tensors("vit.safetensors"))
found.arrays["encoder/blocks/attention/qkv/kernel"].shape            # (12, 768, 2304) table =
store(found.arrays, "timm", heads=12)                        # {"blocks.0.attn.qkv.weight": ...}"""

import collections
import dataclasses
import difflib
import functools
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np

from m3i_jax.errors import UserError
from m3i_jax.interop import intern_image_weights, position_tables, tensor_files
from m3i_jax.interop.vit_layouts import IMAGENET, LAYOUTS, Layout, LayoutEntry, layout_of

Flat = dict[str, np.ndarray]
_GELUS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}


@dataclasses.dataclass
class PublishedWeights:
    """What a file has of our tree.

    Attributes: layout: whose names these are. arrays: {path: array}; `encoder/positions` as it
      stands there. settings: what the weights want of `model.encoder` and of the pixels (mean, std,
      image_size, crop, background): from the file, its config.json, or the layout. Of an
      InternImage only what is said of the pixels: its sizes are those of a preset, which models
      know.
      unused: {what it is: arrays} that have no place here.
      unknown: names that no table knows.
      notes: what was changed on the way.
    """

    layout: str
    arrays: Flat
    settings: dict[str, Any]
    unused: dict[str, int]
    unknown: list[str]
    notes: list[str]


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{l\}", r"(\d+)") + "$")


@functools.cache
def _patterns(layout: str) -> tuple[tuple[re.Pattern[str], LayoutEntry, int], ...]:
    return tuple(
        (_pattern(name), entry, n)
        for entry in LAYOUTS[layout].table
        for n, name in enumerate(entry.theirs)
    )


def load_vit(
    arrays: Mapping[str, np.ndarray],
    *,
    momentum: bool = False,
    config: Mapping[str, Any] | None = None,
) -> PublishedWeights:
    """A file of any layout that is known as our flat tree.

    Args: arrays: named arrays, as of `tensor_files.read_tensors`. momentum: of a file that has
      both, the momentum copy instead of the trained encoder; only SiameseIM's has. config: what
      stood in the config.json beside it (Hugging Face, timm).

    Raises: UserError: no layout that is known, a file without a momentum copy, layers that are
      missing or differ in shape.
    """
    if "patch_embed.conv1.weight" in arrays or "model.patch_embed.conv1.weight" in arrays:
        return _intern_image(arrays, momentum, config or {})
    layout = layout_of(arrays)
    if layout is None:
        some = ", ".join(list(arrays)[:3])
        raise UserError(
            f"these names are of no layout that is known ({some}, ...); known are"
            f" {', '.join(LAYOUTS)} and InternImage"
        )
    if momentum and not (
        layout.momentum and any(name.startswith(layout.momentum) for name in arrays)
    ):
        raise _no_copy(layout.name)
    unused: collections.Counter[str] = collections.Counter()
    unknown: list[str] = []
    gathered: dict[str, dict[int, dict[int, np.ndarray]]] = {}  # ours -> layer -> part
    entries: dict[str, LayoutEntry] = {}
    names = {
        name: name for name in arrays if not (layout.momentum and name.startswith(layout.momentum))
    }
    if copies := [name for name in arrays if name not in names]:
        if momentum:
            names |= {name.removeprefix(layout.momentum): name for name in copies}
        else:
            unused["momentum copy"] = len(copies)
    for name, there in names.items():
        short = re.sub(layout.prefix, "", name) if layout.prefix else name
        hit = next(
            (
                (m, entry, n)
                for pattern, entry, n in _patterns(layout.name)
                if (m := pattern.match(short))
            ),
            None,
        )
        if hit is None:
            what = next(
                (text for pattern, text in layout.unused.items() if re.search(pattern, short)), None
            )
            unused.update([what] if what else [])
            unknown += [] if what else [name]
            continue
        match, entry, n = hit
        layer = int(match[1]) if entry.stacked else 0
        entries[entry.ours] = entry
        gathered.setdefault(entry.ours, {}).setdefault(layer, {})[n] = tensor_files.weights(
            there, arrays[there]
        )
    found = _stacked(gathered, entries)
    notes = _fold_scales(found) + _row_for_cls(found)
    # CLIP, and timm's models of CLIP
    if "encoder/patch_embed/kernel" in found and "encoder/patch_embed/bias" not in found:
        found["encoder/patch_embed/bias"] = np.zeros(
            found["encoder/patch_embed/kernel"].shape[-1], np.float32
        )
    settings = {**layout.settings, **_told(config or {}), **_shape_settings(found, layout, arrays)}
    return PublishedWeights(layout.name, found, settings, dict(unused), unknown, notes)


def _stacked(
    gathered: Mapping[str, Mapping[int, Mapping[int, np.ndarray]]],
    entries: Mapping[str, LayoutEntry],
) -> Flat:
    """Parts joined and layers stacked; refuses holes."""
    depths: dict[str, int] = {}
    for path, layers in gathered.items():
        stack = "/".join(path.split("/")[:2])
        depths[stack] = max(depths.get(stack, 0), max(layers) + 1)
    out: Flat = {}
    for path, layers in gathered.items():
        entry, depth = (
            entries[path],
            (depths["/".join(path.split("/")[:2])] if entries[path].stacked else 1),
        )
        for layer in range(depth):
            lacking = [n for n in range(len(entry.theirs)) if n not in layers.get(layer, {})]
            if lacking:
                raise UserError(
                    f"the weights are not complete: {entry.theirs[lacking[0]].format(l=layer)} is"
                    f" missing of {depth} layers"
                )
        values = [
            entry.load(*(layers[layer][n] for n in range(len(entry.theirs))))
            for layer in range(depth)
        ]
        if len({value.shape for value in values}) > 1:
            raise UserError(
                f"the weights are broken: {entry.theirs[0]} differs in shape from layer to layer"
            )
        out[path] = np.stack(values) if entry.stacked else values[0]
    return out


def _fold_scales(found: Flat) -> list[str]:
    """Multiplies LayerScale into the matrix before it."""
    notes = []
    for n, matrix in ((1, "encoder/blocks/attention/out"), (2, "encoder/blocks/mlp/fc2")):
        scale = found.pop(f"encoder/blocks/scale{n}", None)
        if scale is None:
            continue
        found[f"{matrix}/kernel"] = found[f"{matrix}/kernel"] * scale[:, None]
        found[f"{matrix}/bias"] = found[f"{matrix}/bias"] * scale
        notes.append(f"LayerScale {n} is multiplied into {matrix}")
    return notes


def _row_for_cls(found: Flat) -> list[str]:
    """A row of zeros for cls in front of a table that has none (DeiT III): here a learned table has
    a row for every token."""
    table = found.get("encoder/positions")
    if (
        table is None
        or "encoder/cls_token" not in found
        or position_tables.table_grid(table.shape[1]) ** 2 != table.shape[1]
    ):
        return []
    found["encoder/positions"] = np.concatenate([np.zeros_like(table[:, :1]), table], 1)
    return ["the position table has no row for cls there: it gets one of zeros"]


def _shape_settings(
    found: Flat, layout: Layout, arrays: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Settings of `model.encoder` that shapes tell."""
    kernel, fc1 = (
        found.get("encoder/patch_embed/kernel"),
        found.get("encoder/blocks/mlp/fc1/kernel"),
    )
    if kernel is None or fc1 is None:
        return {}
    width = kernel.shape[-1]
    out = {
        "patch_size": round(math.sqrt(kernel.shape[0] / 3)),
        "width": width,
        "depth": fc1.shape[0],
        "mlp_ratio": fc1.shape[-1] / width,
        "cls_token": "encoder/cls_token" in found,
        "embedding_norm": "encoder/embedding_norm/scale" in found,
        "final_norm": "encoder/norm/scale" in found,
    }
    if (table := found.get("encoder/positions")) is not None:
        out["image_size"] = position_tables.table_grid(table.shape[1]) * out["patch_size"]
    if layout.name == "google":
        name = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"
        out["heads"] = np.asarray(arrays[name]).shape[1]
    return out


def _told(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that a config.json tells: Hugging Face's keys, timm's `model_args` and
    `pretrained_cfg`.

    >>> _told({"num_attention_heads": 2, "image_mean": [0.5, 0.5, 0.5], "hidden_act": ["gelu"]})
    {'heads': 2, 'mean': (0.5, 0.5, 0.5)}
    """
    config = _part(config, "vision_config") or config
    args = _part(config, "model_args")
    out: dict[str, Any] = {}
    for heads in (config.get("num_attention_heads"), args.get("num_heads")):
        if _is_size(heads):
            out["heads"] = heads
    for act in (config.get("hidden_act"), args.get("act_layer")):
        if isinstance(act, str) and act in _GELUS and "activation" not in out:
            out["activation"] = _GELUS[act]
    if isinstance(eps := config.get("layer_norm_eps"), float) and 0 < eps < 1:
        out["norm_eps"] = eps
    return out | _pixels(config)


def _pixels(config: Mapping[str, Any]) -> dict[str, Any]:
    """How images are seen: Hugging Face's processor and timm's `pretrained_cfg`, then our own
    preprocessing.json.

    >>> _pixels({"crop_size": 224, "size": {"shortest_edge": 256}})
    {'crop': 0.875, 'image_size': 224}
    >>> _pixels({"pretrained_cfg": {"input_size": [3, 32, 32], "crop_pct": 0.9}})
    {'crop': 0.9142857142857143}
    """
    pretrained, ours = _part(config, "pretrained_cfg"), _part(config, tensor_files.PREPROCESSING)
    out: dict[str, Any] = {}
    for name, theirs in (("mean", "image_mean"), ("std", "image_std")):
        for value in (config.get(theirs), pretrained.get(name), ours.get(name)):
            if (
                name not in out
                and isinstance(value, list | tuple)
                and len(value) == 3
                and all(_is_number(x) for x in value)
            ):
                out[name] = tuple(float(x) for x in value)
    sides = (
        _side(config.get("crop_size")),
        _side(config.get("size"), "shortest_edge"),
        _side(config.get("size")),
    )
    if sides[0] and sides[1] and sides[0] <= sides[1]:  # CLIP's processor
        out["crop"] = sides[0] / sides[1]
    elif not sides[0] and sides[2]:  # that of ViT, which keeps all of an image
        out["crop"] = 1.0
    size, share = pretrained.get("input_size"), pretrained.get("crop_pct")
    if (
        isinstance(size, list | tuple)
        and len(size) == 3
        and _is_size(size[-1])
        and _is_number(share)
        and 0 < share <= 1
    ):
        out["crop"] = size[-1] / math.floor(size[-1] / share)
    if _is_number(share := ours.get("crop")) and 0 < share <= 1:
        out.setdefault("crop", share)
    if _is_size(side := sides[0] or ours.get("image_size")):
        out["image_size"] = side
    if isinstance(gray := ours.get("background"), int) and 0 <= gray <= 255:
        out["background"] = gray
    return out


def _part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of a configuration; {} where there is something else."""
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 16


def _is_number(value: Any) -> TypeGuard[float]:
    # nor NaN
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6


def _side(size: Any, key: str = "height") -> int:
    """Pixels of a size as processors write it, a number or {key: number}; 0 where there is none."""
    side = size.get(key) if isinstance(size, Mapping) else size
    return side if _is_size(side) else 0


def read_sidecar_configs(path: str) -> dict[str, Any]:
    """What config.json and preprocessor_config.json in the directory of a file of weights say, and,
    by its name, our own preprocessing.json; {} without them.

    Raises:
      UserError: one of them is no JSON object.
    """
    place = pathlib.Path(path)
    place = place if place.is_dir() else place.parent
    out: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "config.json"):
        if (place / name).is_file():
            out |= tensor_files.read_json(place / name)
    if (place / tensor_files.PREPROCESSING).is_file():
        out[tensor_files.PREPROCESSING] = tensor_files.read_json(place / tensor_files.PREPROCESSING)
    return out


def _no_copy(layout: str) -> UserError:
    return UserError(
        f"the weights have the names of {layout} and no momentum copy: use init.weights=online"
    )


def _intern_image(
    arrays: Mapping[str, np.ndarray], momentum: bool, config: Mapping[str, Any]
) -> PublishedWeights:
    if momentum:
        raise _no_copy("InternImage")

    def flat(tree: Mapping[str, Any], path: str = "") -> Flat:
        out: Flat = {}
        for name, node in tree.items():
            below = f"{path}/{name}" if path else name
            out |= flat(node, below) if isinstance(node, Mapping) else {below: node}
        return out

    settings = IMAGENET | _pixels(config)
    return PublishedWeights(
        "intern_image",
        flat(intern_image_weights.load_intern_image({name: arrays[name] for name in arrays})),
        settings,
        {},
        [],
        [],
    )


def store_vit(tree: Mapping[str, np.ndarray], layout: str, *, heads: int, prefix: str = "") -> Flat:
    """Inverse of `load_vit`: our flat tree under the names of a layout.

    The learned fill of hidden cells, `encoder/mask_token`, has no place there and is left out.
    Without `encoder/norm`, timm's and Google's tables have no final norm either; Hugging Face's
    models always have one, which gets scale 1 and offset 0. Where there is no bias of the patch
    embedding (CLIP, and timm before a norm), ours is added to the rows of the position table.

    Args:
      tree: {path: array}; `encoder/positions` [1, R, D] has to be there, the fixed table too.
      layout: one of LAYOUTS.
      heads: of attention.
      prefix: put before every name.

    Raises:
      UserError: a parameter that the layout has no name for.

    >>> list(store_vit({"encoder/norm/scale": np.ones(4)}, "google", heads=2))
    ['Transformer/encoder_norm/scale']
    """
    described, tree = (
        LAYOUTS[layout],
        {path: array for path, array in tree.items() if path != "encoder/mask_token"},
    )
    no_bias = not described.patch_bias or "encoder/embedding_norm/scale" in tree
    if no_bias and "encoder/patch_embed/bias" in tree:
        bias, table = tree.pop("encoder/patch_embed/bias"), np.array(tree["encoder/positions"])
        table[:, int("encoder/cls_token" in tree) :] += bias
        tree["encoder/positions"] = table
    if (
        layout in ("hf", "clip")
        and "encoder/patch_embed/kernel" in tree
        and "encoder/norm/scale" not in tree
    ):
        width = tree["encoder/patch_embed/kernel"].shape[-1]
        tree |= {
            "encoder/norm/scale": np.ones(width, np.float32),
            "encoder/norm/bias": np.zeros(width, np.float32),
        }
    by_path: dict[str, LayoutEntry] = {}
    for entry in described.table:
        by_path.setdefault(entry.ours, entry)
    out: Flat = {}
    for path, array in tree.items():
        known = by_path.get(path)
        if known is None:
            raise UserError(
                f"{path} has no name in the layout {layout}; nearest is"
                f" {', '.join(nearest_names(path, by_path)) or 'nothing'}"
            )
        for layer, value in enumerate(array) if known.stacked else [(0, array)]:
            for name, part in zip(known.theirs, known.store(np.asarray(value), heads), strict=True):
                out[prefix + name.format(l=layer)] = np.ascontiguousarray(part)
    return out


def nearest_names(path: str, known: Mapping[str, Any], count: int = 2) -> list[str]:
    """Names that are most like one.

    >>> nearest_names("encoder/norm/scale", {"encoder/norm/bias": 0, "x": 0})
    ['encoder/norm/bias']
    """
    return difflib.get_close_matches(path, list(known), count, 0.6)

"""Conversion of whole files of weights between other projects and our flat tree: vision
transformers by the tables of `vit_layouts`, InternImage by `intern_image_weights`.

    weights = load_vit(tensor_files.read_tensors("vit.safetensors"))
    weights.arrays["encoder/blocks/attention/qkv/kernel"].shape  # (12, 768, 2304)
    table = store_vit(weights.arrays, "timm", heads=12)  # {"blocks.0.attn.qkv.weight": ...}
"""

import collections
import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from m3i_jax.errors import UserError
from m3i_jax.interop import intern_image_weights, sidecar_configs, tensor_files
from m3i_jax.interop.layout_entries import IMAGENET, Layout, LayoutEntry, packed_names, plain_names
from m3i_jax.interop.vit_layouts import LAYOUTS, layout_of
from m3i_jax.objective import positions

Flat = dict[str, np.ndarray]


@dataclasses.dataclass
class PublishedWeights:
    """The content of a file, converted to our tree.

    Attributes:
      layout: name of the layout of the file.
      arrays: {path: array}; `encoder/positions` as in the file.
      settings: settings of `model.encoder` and of the preprocessing (mean, std, image_size, crop,
        interpolation, squash, background) that the weights need, from the file, its config.json, or
        the layout; `view_size`, where images are not of the size of the position table. Of an
        InternImage only the preprocessing: its sizes are those of a preset.
      unused: {description: number of arrays} that our models do not have.
      unknown: names that are in no table.
      notes: changes made to the weights.
      foreign: why an encoder of ours with these arrays computes something else, "" if it does not.
    """

    layout: str
    arrays: Flat
    settings: dict[str, Any]
    unused: dict[str, int]
    unknown: list[str]
    notes: list[str]
    foreign: str = ""


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
    """Convert the arrays of a file of any known layout to our flat tree.

    Args:
      arrays: named arrays, for instance from `tensor_files.read_tensors`.
      momentum: take the momentum copy instead of the trained encoder; only SiameseIM files have
        one.
      config: content of the config.json next to the file (Hugging Face, timm).

    Raises:
      UserError: an unknown layout, a file without momentum copy, a second class token, layers that
        are missing or differ in shape.
    """
    if "patch_embed.conv1.weight" in arrays or "model.patch_embed.conv1.weight" in arrays:
        return _intern_image(arrays, momentum, config or {})
    given, arrays = arrays, plain_names(arrays)
    layout = layout_of(arrays)
    if layout is None:
        some = ", ".join(list(arrays)[:3])
        raise UserError(
            f"the array names ({some}, ...) are of no known layout; known are"
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
    for name, full_name in names.items():
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
        path = entry.ours.format(l=match[1]) if "{l}" in entry.ours else entry.ours
        entries[path] = entry
        gathered.setdefault(path, {}).setdefault(layer, {})[n] = tensor_files.weights(
            full_name, arrays[full_name]
        )
    for name in unknown:
        if name.endswith(("dist_token", "distillation_token")):  # of timm, of Transformers
            raise UserError(
                f"{name} is a second class token, of a distilled DeiT; encoders of m3i_jax have"
                " one: take a DeiT without distillation, or DeiT III"
            )
    flat = _stack_layers(gathered, entries)
    notes = _fold_layer_scale(flat) + _add_cls_row(flat)
    if sidecar_configs.config_section(config or {}, "m3i_jax").get("final_norm") is False:
        # the format has a norm after the last block, and our export of an encoder without one says
        # that it is not part of it
        flat = {k: v for k, v in flat.items() if not k.startswith("encoder/norm/")}
    # CLIP, and CLIP models of timm, have no bias; DINOv3's largest has none of queries
    for part in ("patch_embed", "blocks/attention/qkv"):
        kernel = flat.get(f"encoder/{part}/kernel")
        if kernel is not None and f"encoder/{part}/bias" not in flat:
            zeros = np.zeros((*kernel.shape[:-2], kernel.shape[-1]), np.float32)
            flat[f"encoder/{part}/bias"] = zeros
    beside = sidecar_configs.sidecar_settings(config or {})
    settings = {
        **layout.settings,
        **_pixels_of_satellites(arrays, flat),
        **beside,
        **_shape_settings(flat, layout, arrays),
    }
    if not layout.resizes:
        notes += _crop_to_patches(settings, beside.get("image_size", 0))
    if settings.get("positions") == "rope":
        settings.setdefault("image_size", 224)
    side = sidecar_configs.preprocessing_settings(config or {}).get("image_size", 0)
    if layout.resizes and side and "encoder/positions" in flat and "patch_size" in settings:
        fits = side % settings["patch_size"] == 0
        settings |= {"view_size": side} if fits and side != settings["image_size"] else {}
    foreign = _foreign(layout, given, flat, unknown) or sidecar_configs.foreign_encoder(
        config or {}, gated=settings.get("activation") == "swiglu"
    )
    return PublishedWeights(layout.name, flat, settings, dict(unused), unknown, notes, foreign)


def _foreign(
    layout: Layout, arrays: Mapping[str, np.ndarray], flat: Flat, unknown: list[str]
) -> str:
    """Why the names of a file are those of an encoder that computes something else than ours."""
    stems = {
        entry.theirs[0].partition("{l}")[0]
        for entry in layout.table
        if entry.stacked and entry.ours.startswith("encoder/")
    }
    of_layer = re.compile("|".join(rf"{re.escape(stem)}\d" for stem in sorted(stems)))
    for name in unknown:
        if of_layer.match(re.sub(layout.prefix, "", name) if layout.prefix else name):
            return f"its layers have arrays that those of m3i_jax do not ({name})"
    if layout.name != "timm" or "encoder/patch_embed/kernel" not in flat:
        return ""
    table = "encoder/positions" in flat
    if not table and not _is_dinov3(flat):
        return "it has neither a table of positions nor the cls token and registers of DINOv3"
    if table and "blocks.0.mlp.fc1_g.weight" in arrays:
        return "its positions are rotary beside a table (EVA-02)"
    return ""


def _is_dinov3(flat: Flat) -> bool:
    """Whether a timm file without a table of positions is of DINOv3: other encoders of timm
    without one have relative positions, or rotary ones in other units."""
    return "encoder/cls_token" in flat and "encoder/registers" in flat


def _stack_layers(
    gathered: Mapping[str, Mapping[int, Mapping[int, np.ndarray]]],
    entries: Mapping[str, LayoutEntry],
) -> Flat:
    """Join the parts of each array and stack the layers. Raises UserError for missing layers."""
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
            missing = [n for n in range(len(entry.theirs)) if n not in layers.get(layer, {})]
            if missing:
                raise UserError(
                    f"the weights are incomplete: {entry.theirs[missing[0]].format(l=layer)} is"
                    f" missing ({depth} layers); use another file"
                )
        values = [
            entry.load(*(layers[layer][n] for n in range(len(entry.theirs))))
            for layer in range(depth)
        ]
        if len({value.shape for value in values}) > 1:
            raise UserError(
                f"the weights are damaged: {entry.theirs[0]} differs in shape between layers"
            )
        out[path] = np.stack(values) if entry.stacked else values[0]
    return out


def _fold_layer_scale(flat: Flat) -> list[str]:
    """Multiply LayerScale into the preceding matrix, in float32: in the precision of a file its
    small factors would make numbers that this does not have. Returns notes."""
    notes = []
    for n, matrix in ((1, "encoder/blocks/attention/out"), (2, "encoder/blocks/mlp/fc2")):
        scale = flat.pop(f"encoder/blocks/scale{n}", None)
        if scale is None:
            continue
        scale = scale.astype(np.float32)
        flat[f"{matrix}/kernel"] = flat[f"{matrix}/kernel"].astype(np.float32) * scale[:, None]
        flat[f"{matrix}/bias"] = flat[f"{matrix}/bias"].astype(np.float32) * scale
        notes.append(f"LayerScale {n} is multiplied into {matrix}")
    return notes


def _add_cls_row(flat: Flat) -> list[str]:
    """Prepend a row of zeros for cls to a position table without one (DeiT III): our learned tables
    have a row for every token. Returns notes."""
    table = flat.get("encoder/positions")
    if (
        table is None
        or "encoder/cls_token" not in flat
        or positions.table_grid(table.shape[1]) ** 2 != table.shape[1]
    ):
        return []
    flat["encoder/positions"] = np.concatenate([np.zeros_like(table[:, :1]), table], 1)
    return ["the position table of the file has no row for cls: a row of zeros is added"]


def _shape_settings(flat: Flat, layout: Layout, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Settings of `model.encoder` that follow from shapes."""
    kernel = flat.get("encoder/patch_embed/kernel")
    fc1 = flat.get("encoder/blocks/mlp/fc1/kernel")
    if kernel is None or fc1 is None:
        return {}
    width = kernel.shape[-1]
    out = {
        "patch_size": round(math.sqrt(kernel.shape[0] / 3)),
        "width": width,
        "depth": fc1.shape[0],
        "mlp_ratio": fc1.shape[-1] / width,
        "cls_token": "encoder/cls_token" in flat,
        "embedding_norm": "encoder/embedding_norm/scale" in flat,
        "final_norm": "encoder/norm/scale" in flat,
    }
    if "encoder/positions" not in flat and layout.name == "timm" and _is_dinov3(flat):
        out |= {"positions": "rope", "norm_eps": 1e-5}
    if "encoder/blocks/mlp/gate/kernel" in flat:
        out["activation"] = "swiglu"
    if (registers := flat.get("encoder/registers")) is not None:
        out["registers"] = registers.shape[1]
    if "encoder/blocks/gamma1" in flat and layout.name in ("dinov2", "dinov3"):
        out["layer_scale"] = 1e-5  # its first value, which is not used
    if "encoder/blocks/attention/norm_q/scale" in flat:
        out["qk_norm"] = True
    if "encoder/blocks/norm1/bias" not in flat and "encoder/blocks/norm1/scale" in flat:
        out["norm"] = "rms"
    if (table := flat.get("encoder/positions")) is not None:
        out["image_size"] = positions.table_grid(table.shape[1]) * out["patch_size"]
    if layout.name == "google":
        name = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"
        out["heads"] = np.asarray(arrays[name]).shape[1]
    return out


def _pixels_of_satellites(names: Mapping[str, Any], flat: Flat) -> dict[str, Any]:
    """Mean and deviation of DINOv3's ViT-L of satellite images, which alone of its ViT-Ls has a
    norm for small views; {} for other files. Both of the 7B models have it."""
    kernel = flat.get("encoder/patch_embed/kernel")
    if "local_cls_norm.weight" not in names or kernel is None or kernel.shape[-1] != 1024:
        return {}
    return {"mean": (0.430, 0.411, 0.296), "std": (0.213, 0.156, 0.143)}


def _crop_to_patches(settings: dict[str, Any], side: int) -> list[str]:
    """Lessens the crop where images have more pixels than their patches: 27 of 14 pixels, of images
    of 384 (SigLIP). Returns notes.

    Args:
      settings: those of a file, changed in place; `image_size` is that of its position table.
      side: of its images, as stated beside it.
    """
    patch, read = settings.get("patch_size", 0), settings.get("image_size", 0)
    if not patch or side == read or side // patch * patch != read or "crop" not in settings:
        return []
    settings["crop"] *= read / side
    return [
        f"images are resized for {side} pixels, of which patches of {patch} cover {read}: the crop"
        f" is {settings['crop']:.4f}, of the centre, where the original leaves out the last rows"
        " and columns"
    ]


def _no_copy(layout: str) -> UserError:
    return UserError(
        f"the weights have the layout {layout} and no momentum copy: take the online ones"
        ' (init.weights=online; weights="online" of m3i_jax.load)'
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

    settings = IMAGENET | sidecar_configs.preprocessing_settings(config)
    return PublishedWeights(
        "intern_image",
        flat(intern_image_weights.load_intern_image({name: arrays[name] for name in arrays})),
        settings,
        {},
        [],
        [],
    )


def store_vit(tree: Mapping[str, np.ndarray], layout: str, *, heads: int, prefix: str = "") -> Flat:
    """Inverts `load_vit`: our flat tree under the names of a layout.

    The mask token, `encoder/mask_token`, is left out: no layout has it. Without `encoder/norm`, the
    files for timm and Google have no final norm either; Hugging Face models always have one, which
    gets scale 1 and offset 0. In layouts without a bias of the patch embedding (CLIP, and timm
    before a norm), ours is added to the rows of the position table.

    Args:
      tree: {path: array}; with `encoder/positions` [1, R, D], even for a fixed table.
      layout: one of LAYOUTS.
      heads: attention heads.
      prefix: prepended to every name.

    Raises:
      UserError: the layout has no name for a parameter.

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
        number = re.search(r"(?<=/block)\d+(?=/)", path)
        known = by_path.get(re.sub(r"(?<=/block)\d+(?=/)", "{l}", path))
        if known is None:
            raise UserError(
                f"{path} has no name in the layout {layout}; the nearest are"
                f" {', '.join(nearest_names(path, by_path)) or 'nothing'}"
            )
        first = int(number[0]) if number else 0
        for layer, value in enumerate(array) if known.stacked else [(first, array)]:
            for name, part in zip(known.theirs, known.store(np.asarray(value), heads), strict=True):
                out[prefix + name.format(l=layer)] = np.ascontiguousarray(part)
    return packed_names(out) if layout == "dinov2" else out


def nearest_names(path: str, known: Mapping[str, Any], count: int = 2) -> list[str]:
    """Returns the known names that are most similar to a path.

    >>> nearest_names("encoder/norm/scale", {"encoder/norm/bias": 0, "x": 0})
    ['encoder/norm/bias']
    """
    return difflib.get_close_matches(path, list(known), count, 0.6)

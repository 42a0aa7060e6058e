"""The interface of an encoder: everything that the rest of the framework asks of one, as one value.

A backbone reads an image as rows of patches, mixed or not, and returns one dense feature per patch,
cls first where there is one. A ViT drops the cells that a pass does not read. A convolution cannot:
it sees a learned vector in their place, and only the features of the cells that are read go on.
(With M3I's mixing of pixels no cell is filled; methods without a partner image fill some.)

B images, H W size of an image or map, N patches, P = 3 p p numbers of a patch, K cells read,
T tokens, D width, C channels, L layers of the encoder.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from m3i_jax import schema
from m3i_jax.models.layers import Params
from m3i_jax.models.transfer import DenseRates, Finetuning
from m3i_jax.parallel.sharding import ShardingRules

Preset = Mapping[str, Any]  # settings of a configuration's `model`, nested


def _nothing(*_: Any) -> tuple[Any, ...]:
    return ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backbone:
    """One kind of encoder. The first five fields are required; the others default to the least.
    Below, `model` is a `schema.Model` and `path` a parameter's path below `encoder/`.

    The network:
      init(model, rng, *, mask_token, grid): parameters; with `mask_token`, also the vector that
        stands for hidden cells, without which no objective with mask tokens can be trained. grid:
        cells a side, for learned positions.
      apply(model, params, patches_BxNxP, *, grid, index_BxK, keep_BxLx2, hidden_BxN, blocks):
        features [B, T, D]. The arguments are those of `vit.apply`.
      depth(model): number of layers L, for stochastic depth.
      layers_above(model, path): layers above a parameter, for layer-wise learning rates: a number,
        or one per layer of a stacked parameter.
      map_layers_above: the same for dense tasks, with the head as the uppermost layer. None: there
        is no difference.
      describe(model): a few words for reports.
      stages(model, params, images_BxHxWx3, *, maps, size, keep_BxLx2, before): maps for dense
        tasks, a tuple of [B, H / stride, W / stride, C], of normalised images of any height and
        width that the largest stride divides. `maps`: a `schema.Maps`. `size`: side in pixels of
        the images of the run, to which the positions of the encoder belong (or to
        `maps.image_size`); they are resized to the map. `before`: `before(stage, x_BxhxwxC)` is
        called with the input of each stage, and the stage reads what it returns; None: itself.
        A backbone whose stages lack it cannot be composed. None: the backbone has no maps.
      copies: the same, for the maps of both copies of a composed backbone, of which those of
        `stages` are the last. None: it is not composed.
      map_strides(model, maps): the stride of each map in pixels.
      init_maps(model, maps, params, *, size): the parameters that `stages` reads with these
        settings, made of those of `init`: with what only maps have, without what they do not read.
        What it adds can be added to a pre-trained encoder, at first values that are settings or
        without effect; `map_parameters` has the prefixes of these paths.
      attention(model, params, patches_BxNxP, *, grid): attention weights of the last block, [B, H,
        T, T]. None: it has no attention.

    What it can do:
      side_unit(model): pixels of which the side of an image must be a multiple.
      can_drop_tokens: cells that a pass does not read cost nothing; otherwise they are filled.
      can_isolate: the two images of a mixed input can be kept from seeing each other.
      can_average_blocks: dense features can be a mean over the outputs of several last blocks.
      has_cls_token: `model.encoder.cls_token` may be set; otherwise it is refused.
      resizes_positions: it has positions of a grid, which are resized for images of other sizes:
        `model.encoder.position_grid` and `dense.maps.image_size` may be set.
      reads_maps: `dense.maps` describes its maps: windows, global blocks, relative positions and
        the blocks whose outputs become maps. Otherwise only a composition can be set there.

    Settings:
      validate(config): raises UserError for the first setting that it cannot work with.
      sections: names of the sections of `model` that belong to it alone.
      presets: sizes by name. Names are unique over all backbones.
      clip: norm to which gradients are clipped in its published recipe; None: the usual one.
      finetuning: how it is fine-tuned on categories.
      dense_rates(model): how its authors train this size on dense tasks; None: it has the settings
        of a ViT, or of the smallest published size.
      dense_settings: {key: value} of all sizes on dense tasks.
      scans_from: layers from which recipes of dense tasks run blocks in a scan, without which
        compile time grows with depth; None: as its preset says.
      lr_settings: pairs (part of a path, key of `optim` with the factor of its learning rate).
      sharding_rules: rows for `parallel.sharding`, tried before the general ones.

    Weights of other projects and of other runs:
      layout: which writers of --mode=export know its parameters; "": none but the general ones.
      recognize(shapes): settings of `model`, `model.encoder` and its sections in one dict, from
        {path: shape} of an encoder; None: the arrays are not of this backbone.
      shape_settings: keys of `model.encoder` that determine the shapes of its parameters.
      silent_settings: keys of `model.encoder` that change its output and no shape.
      init_settings: keys of its sections that only matter for first values.
      added_parameters: prefixes of paths that pre-training adds to a published encoder.
      map_parameters: prefixes of paths that `init_maps` adds.
      stem_parameters: names at the root of the parameters of what makes the first stage's input.
      without_added(model): how to configure the encoder without them, for an error message.
      fixed_arrays(model, grid): {path: array} that it computes and other projects store.
      card(model): rows (name, value) of the model card.
    """

    init: Callable[..., Params]
    apply: Callable[..., jax.Array]
    depth: Callable[[schema.Model], int]
    layers_above: Callable[[schema.Model, str], int | np.ndarray]
    describe: Callable[[schema.Model], str]
    map_layers_above: Callable[[schema.Model, str], int | np.ndarray] | None = None
    stages: Callable[..., tuple[jax.Array, ...]] | None = None
    copies: Callable[..., tuple[tuple[jax.Array, ...], ...]] | None = None
    map_strides: Callable[[schema.Model, schema.Maps], tuple[int, ...]] | None = None
    init_maps: Callable[..., Params] = lambda model, maps, params, *, size: params
    attention: Callable[..., jax.Array] | None = None

    side_unit: Callable[[schema.Model], int] = lambda model: model.encoder.patch_size
    can_drop_tokens: bool = False
    can_isolate: bool = False
    can_average_blocks: bool = False
    has_cls_token: bool = False
    resizes_positions: bool = False
    reads_maps: bool = False

    validate: Callable[[schema.Config], object] = _nothing
    sections: tuple[str, ...] = ()
    presets: Mapping[str, Preset] = dataclasses.field(default_factory=dict)
    clip: float | None = None
    finetuning: Finetuning = Finetuning()
    dense_rates: Callable[[schema.Model], DenseRates | None] = lambda _: None
    dense_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scans_from: int | None = None
    lr_settings: tuple[tuple[str, str], ...] = ()
    sharding_rules: ShardingRules = ()

    layout: str = ""
    recognize: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any] | None] = lambda _: None
    shape_settings: tuple[str, ...] = ("patch_size", "width", "depth", "mlp_ratio")
    silent_settings: tuple[str, ...] = ()
    init_settings: tuple[str, ...] = ()
    added_parameters: tuple[str, ...] = ("mask_token",)
    map_parameters: tuple[str, ...] = ()
    stem_parameters: tuple[str, ...] = ()
    without_added: Callable[[schema.Model], str] = lambda _: "use weights that have it"
    fixed_arrays: Callable[[schema.Model, int], Mapping[str, np.ndarray]] = lambda *_: {}
    card: Callable[[schema.Model], Any] = _nothing


def as_toy(preset: Preset, *, decoder: int, heads: int) -> dict[str, Any]:
    """Returns a preset with the small decoder and text tower of the toys, in float32.

    >>> as_toy({"scan": False}, decoder=96, heads=3)["decoder"]
    {'width': 96, 'depth': 2, 'heads': 3}
    """
    return {
        **preset,
        "decoder": {"width": decoder, "depth": 2, "heads": heads},
        "text": {"width": 96, "depth": 2, "heads": 3, "embed": 96},
        "captioner": {"width": 96, "depth": 2, "heads": 3},
        "dtype": "float32",
    }

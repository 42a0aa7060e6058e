"""CBNet: a backbone made of two copies of another (Liang et al., CBNetV2, 2022), as InternImage-H
has it for detection.

The first copy runs as it is, and its maps f_0 .. f_n feed the second, which has no stem: it starts
from the stem's output of the first, and before its stage i adds

    gamma_i * (f_i + sum over j > i of nearest(conv_ij(f_j)))

with 1 x 1 convolutions, resized to the stage's input, and a gamma per channel that starts at 0: at
the start the second copy is the first. Heads read its maps; in training the losses on those of the
first are added with a weight of their own (`dense.maps.composite_weight`).

Parameters are those of the backbone, the first copy, so that a pre-trained encoder fits; `second`,
the same without the stem; `links`, `stage<i>/from<j>`, and `gamma`, `stage<i>`.

B images, h w size of a map, C channels, L layers of one copy.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.models import backbones
from m3i_jax.models.backbone import Backbone
from m3i_jax.models.initializers import InitSpec, fill
from m3i_jax.models.intern_image_layer import dense_layer
from m3i_jax.models.layers import Params

SECOND = "second/"
OWN_PARTS = ("second", "links", "gamma")  # of the parameters
StageMaps = tuple[jax.Array, ...]


def of_run(config: schema.Config) -> Backbone:
    """Returns the backbone of a dense run: composed if `dense.maps.composite` says so.

    Raises:
      UserError: the composition is to be frozen.

    >>> of_run(schema.Config()) is backbones.get_backbone(schema.Model())
    True
    """
    backbone = backbones.get_backbone(config.model)
    if config.dense.maps.composite == 1:
        return backbone
    if config.model.encoder.freeze:
        raise UserError(
            f"config.model.encoder.freeze=true: with config.dense.maps.composite="
            f"{config.dense.maps.composite} the weights that join the two copies would stay at"
            " their first values, with which the second copy is the first; use"
            " config.dense.maps.composite=1, or config.optim.layer_decay to train the copies slowly"
        )
    return compose(backbone, config.dense.maps, size=config.data.image_size)


def compose(backbone: Backbone, maps: schema.Maps, *, size: int) -> Backbone:
    """Returns the composition of two copies of a backbone. Its `copies` gives the maps of both.

    Args:
      backbone: one with `stages`.
      maps, size: as of `Backbone.stages`.

    >>> model = schema.Model()
    >>> vit = backbones.get_backbone(model)
    >>> two = compose(vit, schema.Maps(), size=32)
    >>> two.layers_above(model, "second/blocks/norm1/scale")[:3].tolist(), two.describe(model)
    ([12, 11, 10], 'two composed copies of 12 blocks of 768')
    """
    if backbone.stages is None:
        raise ValueError("a backbone without stages cannot be composed")

    def init(model: schema.Model, rng: jax.Array, **settings: Any) -> Params:
        first = backbone.init(model, rng, **settings)
        again, of_links = jax.random.split(jax.random.fold_in(rng, 2))
        shapes = _channels(backbone, model, maps, size)
        return {**first, "second": backbone.init(model, again, **settings)} | _init_links(
            of_links, shapes
        )

    def init_maps(model: schema.Model, maps: schema.Maps, params: Params, *, size: int) -> Params:
        first, second, own = _parts(params)
        both = [backbone.init_maps(model, maps, tree, size=size) for tree in (first, second)]
        kept = {n: leaf for n, leaf in both[1].items() if n not in backbone.stem_parameters}
        return {**both[0], **own, "second": kept}

    def copies(
        model: schema.Model,
        params: Params,
        images_BxHxWx3: jax.Array,
        *,
        keep_BxLx2: jax.Array | None = None,
        **settings: Any,
    ) -> tuple[StageMaps, StageMaps]:
        return _run(backbone, model, params, images_BxHxWx3, keep_BxLx2, settings)

    def layers_above(model: schema.Model, path: str) -> int | np.ndarray:
        if path.startswith(("links/", "gamma/")):
            return 0
        above = backbone.map_layers_above or backbone.layers_above
        return above(model, path.removeprefix(SECOND))

    return dataclasses.replace(
        backbone,
        init=init,
        init_maps=init_maps,
        stages=lambda *args, **settings: copies(*args, **settings)[1],
        copies=copies,
        layers_above=layers_above,
        map_layers_above=None,
        describe=lambda model: f"two composed copies of {backbone.describe(model)}",
        map_parameters=(*backbone.map_parameters, SECOND, "links/", "gamma/"),
    )


def _parts(params: Params) -> tuple[Params, Params, dict[str, Any]]:
    """Parameters of the first copy, of the second, and what the composition has."""
    first = {name: leaf for name, leaf in params.items() if name not in OWN_PARTS}
    return first, params["second"], {name: params[name] for name in ("links", "gamma")}


def _channels(
    backbone: Backbone, model: schema.Model, maps: schema.Maps, size: int
) -> tuple[int, ...]:
    """Channels of the maps of one copy."""

    def run(key: jax.Array) -> StageMaps:
        grid = (maps.image_size or size) // model.encoder.patch_size
        params = backbone.init(model, key, mask_token=False, grid=grid)
        params = backbone.init_maps(model, maps, params, size=size)
        assert backbone.stages is not None
        return backbone.stages(model, params, jnp.zeros((1, size, size, 3)), maps=maps, size=size)

    return tuple(x.shape[-1] for x in jax.eval_shape(run, jax.random.key(0)))


def _init_links(rng: jax.Array, channels: tuple[int, ...]) -> dict[str, Any]:
    """Convolutions and biases uniform within 1 / sqrt(fan in), PyTorch's default; gamma 0."""
    links = {
        f"stage{i}": {
            f"from{j}": {"kernel": (channels[j], c), "bias": (c,)}
            for j in range(i + 1, len(channels))
        }
        for i, c in enumerate(channels[:-1])
    }
    gamma = {f"stage{i}": (c,) for i, c in enumerate(channels)}

    def rule(path: str, shape: tuple[int, ...]) -> InitSpec:
        if path.startswith("gamma"):
            return "constant", 0.0
        return "uniform", channels[int(path.split("/")[2].removeprefix("from"))] ** -0.5

    return fill(rng, {"links": links, "gamma": gamma}, rule)


def nearest(x_BxHxWxC: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Returns a map at another (height, width), each cell the value of the cell that it lies in
    (torch's `interpolate` with mode nearest).

    >>> nearest(jnp.array([1.0, 2.0]).reshape(1, 1, 2, 1), (2, 4))[0, :, :, 0].tolist()
    [[1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0]]
    """
    for axis, wanted in zip((1, 2), size, strict=True):
        now = x_BxHxWxC.shape[axis]
        if wanted % now == 0:
            x_BxHxWxC = x_BxHxWxC.repeat(wanted // now, axis)
        else:
            x_BxHxWxC = x_BxHxWxC.take(np.arange(wanted) * now // wanted, axis)
    return x_BxHxWxC


def _run(
    backbone: Backbone,
    model: schema.Model,
    params: Params,
    images_BxHxWx3: jax.Array,
    keep_BxLx2: jax.Array | None,
    settings: Mapping[str, Any],
) -> tuple[StageMaps, StageMaps]:
    assert backbone.stages is not None
    first, second, own = _parts(params)
    stem = {name: first[name] for name in backbone.stem_parameters if name in first}
    keep = (None, None) if keep_BxLx2 is None else jnp.split(keep_BxLx2, 2, 1)
    start: list[jax.Array] = []

    def record(stage: int, x_BxHxWxC: jax.Array) -> jax.Array:
        if stage == 0:
            start.append(x_BxHxWxC)
        return x_BxHxWxC

    fed = backbone.stages(
        model, first, images_BxHxWx3, keep_BxLx2=keep[0], before=record, **settings
    )

    def add(stage: int, x_BxHxWxC: jax.Array) -> jax.Array:
        # the second copy's own stem is not read, and so not computed
        x_BxHxWxC = start[0] if stage == 0 else x_BxHxWxC
        more = fed[stage]
        for name, link in own["links"].get(f"stage{stage}", {}).items():
            deeper = dense_layer(link, fed[int(name.removeprefix("from"))])
            more = more + nearest(deeper, (more.shape[1], more.shape[2]))
        more = nearest(more, (x_BxHxWxC.shape[1], x_BxHxWxC.shape[2]))
        return x_BxHxWxC + own["gamma"][f"stage{stage}"].astype(more.dtype) * more

    tree = {**second, **stem}
    out = backbone.stages(model, tree, images_BxHxWx3, keep_BxLx2=keep[1], before=add, **settings)
    return fed, out

"""Pyramids: what turns the maps of an encoder into maps at the strides that heads read.

simple   the simple feature pyramid of ViTDet: every stride from one map, by transposed convolutions
         or max pooling, then two convolutions with channel norms
rescale  mmsegmentation's neck of a plain ViT: a map per stride, each from its own block or all from
         one, by transposed convolutions or max pooling alone
lateral  a feature pyramid network: a backbone's own maps of several strides, brought to one width
         and added from coarse to fine
none     the encoder's maps as they are

The scale factors follow from the strides, so a ViT of any patch will do: one of 8 pixels doubles
its map once for stride 4, one of 16 twice. In simple, and in lateral where the encoder has no map
of the coarsest stride, that map is every second cell of the one before.

B images, H W size of a map, C channels, D width.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax.models.dense.map_norms import initial_statistics, norm_shapes, running_batch_norm
from m3i_jax.models.initializers import InitSpec, fill
from m3i_jax.models.intern_image_layer import convolve, dense_layer, norm_layer
from m3i_jax.models.layers import Params, gelu

KINDS = ("simple", "rescale", "lateral", "none")
Pyramid = Mapping[int, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidConfig:
    """The maps that a pyramid reads, and those that it makes.

    Attributes:
      kind: one of KINDS.
      strides: of the maps that it makes, in pixels, rising.
      sources: (stride, channels) of every map of the encoder, in order. simple: one; rescale: one,
        or one per stride; lateral and none: any of rising strides.
      width: channels of the maps of simple and lateral.

    Raises:
      ValueError: strides that do not follow from those of the sources.

    >>> PyramidConfig(kind="simple", strides=(4, 8, 16), sources=((8, 96),), width=48).channels
    {4: 48, 8: 48, 16: 48}
    """

    kind: str
    strides: tuple[int, ...]
    sources: tuple[tuple[int, int], ...]
    width: int = 256

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"the pyramid is {self.kind!r}; it must be one of {', '.join(KINDS)}")
        of = [stride for stride, _ in self.sources]
        if self.kind in ("simple", "rescale"):
            allowed = (1,) if self.kind == "simple" else (1, len(self.strides))
            if len(of) not in allowed or len(set(of)) != 1:
                raise ValueError(
                    f"the pyramid {self.kind} reads {' or '.join(map(str, allowed))} maps of one"
                    f" stride; the encoder gives maps of the strides {of}"
                )
            for stride in self.strides:
                _steps(of[0], stride)
        else:
            extra = [stride for stride in self.strides if stride not in of]
            last = self.kind == "lateral" and extra == [2 * of[-1]] == [self.strides[-1]]
            if extra and not last:
                raise ValueError(
                    f"the pyramid {self.kind} makes no maps of the strides {extra}; the encoder"
                    f" gives {of}"
                )
        # lateral adds every map to the next finer one, simple makes the last of the one before
        neighbours = list(zip(self.strides, self.strides[1:], strict=False))
        read = {"lateral": neighbours, "simple": neighbours[-1:]}.get(self.kind, [])
        if wrong := [(fine, coarse) for fine, coarse in read if coarse != 2 * fine]:
            raise ValueError(
                f"the pyramid {self.kind} needs each stride twice the one before, and"
                f" {wrong[0][1]} follows {wrong[0][0]}"
            )

    @property
    def channels(self) -> dict[int, int]:
        """{stride: channels} of the maps that the pyramid makes."""
        if self.kind in ("simple", "lateral"):
            return dict.fromkeys(self.strides, self.width)
        if self.kind == "rescale":
            many = self.sources * len(self.strides) if len(self.sources) == 1 else self.sources
            return {stride: c for stride, (_, c) in zip(self.strides, many, strict=True)}
        given = dict(self.sources)
        return {stride: given[stride] for stride in self.strides}


def _steps(source: int, stride: int) -> int:
    """How often a map is doubled (> 0) or halved (< 0) for another stride."""
    large, small = max(source, stride), min(source, stride)
    factor = large // small
    if large % small or factor & (factor - 1):
        raise ValueError(
            f"a map of stride {stride} cannot be made from one of {source}: the ratio must be a"
            " power of two"
        )
    steps = factor.bit_length() - 1
    return steps if source > stride else -steps


def _doubling(channels: int, out: int) -> dict[str, tuple[int, ...]]:
    return {"kernel": (channels, 4 * out), "bias": (out,)}


def transposed_conv(params: Params, x_BxHxWxC: jax.Array) -> jax.Array:
    """2 x 2 transposed convolution of stride 2, [B, 2 H, 2 W, D]: every cell becomes four.

    Args:
      params: `kernel` [C, 4 D], whose columns are (row, column, channel) of the four cells, and
        `bias` [D].
      x_BxHxWxC: the map.

    >>> params = {"kernel": jnp.arange(4.0).reshape(1, 4), "bias": jnp.zeros(1)}
    >>> transposed_conv(params, jnp.ones((1, 1, 1, 1)))[0, :, :, 0].tolist()
    [[0.0, 1.0], [2.0, 3.0]]
    """
    b, h, w, _ = x_BxHxWxC.shape
    y = dense_layer({**params, "bias": jnp.tile(params["bias"], 4)}, x_BxHxWxC)
    d = params["bias"].shape[0]
    return y.reshape(b, h, w, 2, 2, d).swapaxes(2, 3).reshape(b, 2 * h, 2 * w, d)


def _max_pool(x_BxHxWxC: jax.Array, steps: int) -> jax.Array:
    """The largest of every 2^steps x 2^steps cells. Its gradient goes to the first of the largest,
    by its place: that of `max` compares values, which a compiler may have computed twice with
    different rounding, and is then 0 / 0."""
    b, h, w, c = x_BxHxWxC.shape
    f = 2**steps
    whole = x_BxHxWxC[:, : h // f * f, : w // f * f].reshape(b, h // f, f, w // f, f, c)
    cells = whole.swapaxes(2, 3).reshape(b, h // f, w // f, f * f, c)
    first = jnp.argmax(jax.lax.stop_gradient(cells), 3, keepdims=True)
    return jnp.where(first == jnp.arange(f * f)[:, None], cells, 0).sum(3)


def _scaled_shapes(channels: int, steps: int, *, halve: bool) -> tuple[dict[str, Any], int]:
    """Layers that double a map `steps` times, and the channels after them."""
    shapes: dict[str, Any] = {}
    for i in range(max(steps, 0)):
        out = channels // 2 if halve else channels
        if not out:
            raise ValueError("the encoder has too few channels to halve them at every doubling")
        shapes[f"deconv_{i}"] = _doubling(channels, out)
        if i < steps - 1:
            shapes[f"scale_norm_{i}"] = norm_shapes(out)
        channels = out
    return shapes, channels


def pyramid_shapes(config: PyramidConfig) -> dict[str, Any]:
    """Returns the tree of parameters, as shapes.

    >>> config = PyramidConfig(kind="rescale", strides=(4, 8, 16, 32), sources=((16, 8),))
    >>> {name: sorted(part) for name, part in pyramid_shapes(config).items()}
    {'stride_4': ['deconv_0', 'deconv_1', 'scale_norm_0'], 'stride_8': ['deconv_0']}
    """
    tree: dict[str, Any] = {}
    width = config.width
    if config.kind == "simple":
        source, channels = config.sources[0]
        for stride in config.strides[:-1] or config.strides:
            part, c = _scaled_shapes(channels, _steps(source, stride), halve=True)
            tree[f"stride_{stride}"] = part | {
                "conv_0": {"kernel": (c, width)},
                "norm_0": norm_shapes(width),
                "conv_1": {"kernel": (3, 3, width, width)},
                "norm_1": norm_shapes(width),
            }
    elif config.kind == "rescale":
        for stride, c in config.channels.items():
            part, _ = _scaled_shapes(c, _steps(config.sources[0][0], stride), halve=False)
            if part:
                tree[f"stride_{stride}"] = part
    elif config.kind == "lateral":
        for stride, c in config.sources:
            if stride in config.strides:
                tree[f"stride_{stride}"] = {
                    "lateral": {"kernel": (c, width), "bias": (width,)},
                    "output": {"kernel": (3, 3, width, width), "bias": (width,)},
                }
    return tree


def _first_values(kind: str, fan: Mapping[str, int], path: str, shape: tuple[int, ...]) -> InitSpec:
    layer, last = path.split("/")[-2:]
    if "norm" in layer:
        return "constant", float(last == "scale")
    if kind == "lateral":  # detectron2's, and the networks' own papers leave it open
        if last == "bias":
            return "constant", 0.0
        return "uniform", math.sqrt(3 / math.prod(shape[:-1]))
    # PyTorch's default, also for biases; it takes the output of a transposed convolution for its
    # input
    return "uniform", fan[path.rsplit("/", 1)[0]] ** -0.5


def init(config: PyramidConfig, rng: jax.Array) -> tuple[Params, Params]:
    """Returns parameters `stride_<n>` and running statistics of batch norm, which only rescale has.

    Convolutions and transposed convolutions with their biases are uniform within 1 / sqrt(fan in),
    the fan of a transposed one being 4 x its outputs; lateral within sqrt(3 / fan in), biases 0.

    >>> settings = {"strides": (4, 8, 16, 32, 64), "sources": ((16, 768),)}
    >>> call = lambda key: init(PyramidConfig(kind="simple", **settings), key)
    >>> params, statistics = jax.eval_shape(call, jax.random.key(0))
    >>> sum(leaf.size for leaf in jax.tree.leaves(params)), statistics
    (5560000, {})
    """
    tree, fan = pyramid_shapes(config), {}
    for name, part in tree.items():
        for layer, leaves in part.items():
            if "kernel" in leaves:
                kernel = leaves["kernel"]
                fan[f"{name}/{layer}"] = (
                    kernel[-1] if layer.startswith("deconv") else math.prod(kernel[:-1])
                )
    statistics = {
        name: {
            layer: initial_statistics(leaves["scale"][0])
            for layer, leaves in part.items()
            if layer.startswith("scale_norm")
        }
        for name, part in tree.items()
        if config.kind == "rescale" and any(layer.startswith("scale_norm") for layer in part)
    }
    return fill(rng, tree, functools.partial(_first_values, config.kind, fan)), statistics


def _scaled(
    config: PyramidConfig,
    params: Params,
    statistics: Params,
    x_BxHxWxC: jax.Array,
    steps: int,
    train: bool,
    momentum: float,
) -> tuple[jax.Array, dict[str, Any]]:
    """A map doubled `steps` times by learned layers, or halved by max pooling."""
    new: dict[str, Any] = {}
    if steps < 0:
        return _max_pool(x_BxHxWxC, -steps), new
    for i in range(steps):
        x_BxHxWxC = transposed_conv(params[f"deconv_{i}"], x_BxHxWxC)
        if i == steps - 1:
            continue
        name = f"scale_norm_{i}"
        if config.kind == "simple":
            x_BxHxWxC = norm_layer(params[name], x_BxHxWxC)
        else:
            x_BxHxWxC, new[name] = running_batch_norm(
                params[name], statistics[name], x_BxHxWxC, train=train, momentum=momentum
            )
        x_BxHxWxC = gelu(x_BxHxWxC)
    return x_BxHxWxC, new


def _doubled(x_BxHxWxC: jax.Array, size: tuple[int, int]) -> jax.Array:
    return x_BxHxWxC.repeat(2, 1).repeat(2, 2)[:, : size[0], : size[1]]


def _lateral(config: PyramidConfig, params: Params, maps: Pyramid) -> dict[int, jax.Array]:
    made, above = {}, None
    for stride in reversed([stride for stride in config.strides if f"stride_{stride}" in params]):
        part = params[f"stride_{stride}"]
        y = dense_layer(part["lateral"], maps[stride])
        above = y if above is None else y + _doubled(above, (y.shape[1], y.shape[2]))
        made[stride] = convolve(part["output"], above, 1)
    return made


def apply(
    config: PyramidConfig,
    params: Params,
    statistics: Params,
    maps: Pyramid | Sequence[jax.Array],
    *,
    train: bool,
    momentum: float = 0.1,
) -> tuple[dict[int, jax.Array], Params]:
    """Returns the maps {stride: [B, H, W, C]} that heads read, in the type of the encoder's; and
    the statistics after them.

    Args:
      config: of which maps what is made.
      params, statistics: as of `init`.
      maps: the encoder's, {stride: [B, H, W, C]} or, where several have one stride, a sequence in
        the order of `config.sources`.
      train: whether batch norm uses and updates with this batch.
      momentum: share of the batch in new statistics.

    >>> config = PyramidConfig(kind="simple", strides=(4, 8, 16, 32), sources=((8, 6),), width=2)
    >>> shapes = jax.eval_shape(lambda key: init(config, key), jax.random.key(0))
    >>> call = lambda tree: apply(config, *tree, {8: jnp.zeros((1, 6, 4, 6))}, train=False)[0]
    >>> {stride: x.shape for stride, x in jax.eval_shape(call, shapes).items()}
    {4: (1, 12, 8, 2), 8: (1, 6, 4, 2), 16: (1, 3, 2, 2), 32: (1, 2, 1, 2)}
    """
    given = list(maps.values()) if isinstance(maps, Mapping) else list(maps)
    made: dict[int, jax.Array] = {}
    new: dict[str, Any] = {}
    if config.kind in ("lateral", "none"):
        by_stride = dict(zip((stride for stride, _ in config.sources), given, strict=True))
        if config.kind == "none":
            return {stride: by_stride[stride] for stride in config.strides}, statistics
        made = _lateral(config, params, by_stride)
    else:
        if len(given) == 1:
            given = given * len(config.strides)
        for stride, x_BxHxWxC in zip(config.strides, given, strict=True):
            name = f"stride_{stride}"
            if config.kind == "simple" and name not in params:
                continue  # the coarsest
            part, steps = params.get(name, {}), _steps(config.sources[0][0], stride)
            y, changed = _scaled(
                config, part, statistics.get(name, {}), x_BxHxWxC, steps, train, momentum
            )
            if changed:
                new[name] = changed
            if config.kind == "simple":
                y = norm_layer(part["norm_0"], dense_layer(part["conv_0"], y))
                y = norm_layer(part["norm_1"], convolve(part["conv_1"], y, 1))
            made[stride] = y
    for before, stride in zip(config.strides, config.strides[1:], strict=False):
        if stride not in made:
            made[stride] = made[before][:, ::2, ::2]
    return {stride: made[stride] for stride in config.strides}, new

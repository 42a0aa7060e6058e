"""InternImage (Wang et al., 2023), T to H and G: the convolutional backbone of the paper's largest
run; and a toy size.

A stem, four stages of DCNv3 layers with a stride of two between them, and, for M3I, one map of
dense features at the stride of stage 3: stages 3 and 4 are mapped to the same width, the deeper one
with four sub-pixels a cell, and added (the released InternImage-H). There are no tokens to drop and
no positions: cells that are hidden without mixing are filled at the stem's output with a learned
vector.

The layers of a stage are one tree with a leading axis [L, ...], run by a loop or by `lax.scan`.

B images, S pixels a side, H W size of a map, C its channels, G groups, P points, L layers, N cells,
D width of the dense features."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax import parallel, schema
from m3i_jax.models import initializers
from m3i_jax.models.intern_image_layer import Layer, convolve, dense_layer, norm_layer, run_layers
from m3i_jax.models.layers import Params, gelu


@dataclasses.dataclass(frozen=True, kw_only=True)
class InternImageConfig(schema.InternImage):
    """Settings of the network: those of `model.intern_image`, and those that a run sets for every
    backbone. The defaults are InternImage-H.

    Stages end with a norm unless `norm` is post and there is no centre scale. `extra_norm` is
    the "level-2 post-norm" of the release.

    Attributes:
      fused: width of the fused dense features; 0: no fusion, the dense features are the last
        stage's map.
      drop_path, drop_path_rule: rate of stochastic depth, linear from 0 or uniform.
    """

    fused: int = 1024
    drop_path: float = 0.2
    drop_path_rule: str = "uniform"

    @property
    def stride(self) -> int:
        """Pixels per cell of the dense features.

        >>> InternImageConfig().stride, InternImageConfig(fused=0).stride
        (16, 32)
        """
        return math.prod(self.stem_strides) * (4 if self.fused else 8)

    @property
    def dense_width(self) -> int:
        """Channels of the dense features.

        >>> InternImageConfig().dense_width, InternImageConfig(fused=0).dense_width
        (1024, 2560)
        """
        return self.fused or 8 * self.width

    @property
    def trailing_norm(self) -> bool:
        """Whether stages end with a norm.

        >>> InternImageConfig().trailing_norm
        True
        """
        return self.norm != "post" or self.center_scale


def _size(width: int, depths: tuple[int, ...], groups: int, **changes: Any) -> InternImageConfig:
    common: dict[str, Any] = {
        "norm": "post",
        "layer_scale": 1e-5,
        "kernel": 3,
        "center_scale": False,
        "extra_norm": 0,
    }
    sizes = {"width": width, "depths": depths, "groups": tuple(groups * 2**i for i in range(4))}
    return InternImageConfig(**{**common, **sizes, "drop_path_rule": "linear", **changes})


# T to XL are published as classifiers without the fused map; here it is added, as wide as the
# deepest stage and at most as InternImage-H's.
PRESETS: dict[str, InternImageConfig] = {
    "internimage_pico": _size(
        32,
        (1, 1, 2, 1),
        2,
        norm="pre",
        layer_scale=0.0,
        drop_path=0.0,
        fused=128,
        stem_strides=(2, 1),
        mlp_std=0.0,
    ),
    "internimage_t": _size(
        64, (4, 4, 18, 4), 4, norm="pre", layer_scale=0.0, drop_path=0.1, fused=512
    ),
    "internimage_s": _size(80, (4, 4, 21, 4), 5, drop_path=0.4, fused=640),
    "internimage_b": _size(112, (4, 4, 21, 4), 7, drop_path=0.5, fused=896),
    "internimage_l": _size(160, (5, 5, 22, 5), 10, offset_scale=2.0, drop_path=0.1),
    "internimage_xl": _size(192, (5, 5, 24, 5), 12, offset_scale=2.0, drop_path=0.2),
    "internimage_h": InternImageConfig(),
    "internimage_g": InternImageConfig(
        width=512,
        depths=(2, 2, 48, 4),
        groups=(16, 32, 64, 128),
        norm="post",
        drop_path=0.4,
        drop_path_rule="linear",
    ),
}


def _layer(model: InternImageConfig, stage: int) -> Layer:
    return Layer(
        width=model.width * 2**stage,
        groups=model.groups[stage],
        norm=model.norm,
        layer_scale=model.layer_scale,
        offset_scale=model.offset_scale,
        kernel=model.kernel,
        center_scale=model.center_scale,
        hidden=round(model.width * 2**stage * model.mlp_ratio),
    )


def _extra_norms(model: InternImageConfig, stage: int) -> int:
    return model.depths[stage] // model.extra_norm if stage == 2 and model.extra_norm else 0


def _affine(width: int, *leading: int) -> dict[str, tuple[int, ...]]:
    return {"scale": (*leading, width), "bias": (*leading, width)}


def shapes(model: InternImageConfig) -> dict[str, Any]:
    """Returns the tree of parameters, as shapes.

    >>> tree = shapes(PRESETS["internimage_t"])
    >>> sorted(tree), tree["stage2"]["layers"]["dcn"]["offsets"]["kernel"]
    (['fusion', 'stage0', 'stage1', 'stage2', 'stage3', 'stem'], (18, 256, 288))
    """
    c = model.width
    tree: dict[str, Any] = {
        "stem": {
            "conv1": {"kernel": (3, 3, 3, c // 2), "bias": (c // 2,)},
            "norm1": _affine(c // 2),
            "conv2": {"kernel": (3, 3, c // 2, c), "bias": (c,)},
            "norm2": _affine(c),
        }
    }
    for stage, depth in enumerate(model.depths):
        width = c * 2**stage
        part: dict[str, Any] = {"layers": _stacked(_layer(model, stage).shapes(), depth)}
        if extra := _extra_norms(model, stage):
            part["extra_norms"] = _affine(width, extra)
        if model.trailing_norm:
            part["norm"] = _affine(width)
        if stage < 3:
            part["down"] = {
                "conv": {"kernel": (3, 3, width, 2 * width)},
                "norm": _affine(2 * width),
            }
        tree[f"stage{stage}"] = part
    if model.fused:
        tree["fusion"] = {
            "deep": {"kernel": (8 * c, 4 * model.fused), "bias": (4 * model.fused,)},
            "shallow": {"kernel": (4 * c, model.fused), "bias": (model.fused,)},
        }
    return tree


def _stacked(tree: Any, depth: int) -> Any:
    return jax.tree.map(
        lambda shape: (depth, *shape), tree, is_leaf=lambda node: isinstance(node, tuple)
    )


def parameter_count(model: InternImageConfig) -> int:
    """Counts the parameters without the fusion: the backbone as published.

    >>> parameter_count(PRESETS["internimage_t"]), parameter_count(PRESETS["internimage_h"])
    (28754672, 1073122480)
    """
    tree = {name: part for name, part in shapes(model).items() if name != "fusion"}
    return sum(
        math.prod(shape)
        for shape in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, tuple))
    )


def _init_spec(
    model: InternImageConfig, path: str, shape: tuple[int, ...]
) -> initializers.InitSpec:
    """Distribution of a parameter's first values. `shape` is that of one layer."""
    last, owner = path.split("/")[-1], path.split("/")[-2] if "/" in path else ""
    if last == "scale":
        return "constant", 1.0
    if last in ("gamma1", "gamma2"):
        return "constant", model.layer_scale
    if owner in ("offsets", "mask", "center"):
        return "constant", 0.0
    if last == "mask_token":
        return "normal", 0.02
    convolution = {
        "conv1": 27,
        "conv2": 9 * model.width // 2,
        "conv": 9 * shape[-1] // 2,
        "depthwise": model.kernel**2,
    }
    convolution |= {"deep": 8 * model.width, "shallow": 4 * model.width}
    if owner in convolution:  # PyTorch's default, also for biases
        return "uniform", convolution[owner] ** -0.5
    if last == "bias":
        return "constant", 0.0
    if owner in ("input", "output"):
        return "uniform", math.sqrt(6 / sum(shape))
    return "normal", model.mlp_std or shape[0] ** -0.5


def init(model: InternImageConfig, rng: jax.Array, *, mask_token: bool = False) -> Params:
    """Returns the initial parameters: `stem`, `stage0` to `stage3` (`layers` stacked on [L, ...],
    `extra_norms`, `norm_layer`, `down`), `fusion`.

    As published: dense N(0, `mlp_std`^2), in and out of DCNv3 Xavier-uniform, convolutions and
    their biases uniform with bound 1 / sqrt(fan in); offsets, masks and centre scale 0, so that
    DCNv3 starts as a box filter.

    Args:
      model: settings.
      rng: key.
      mask_token: add `mask_token` [1, 1, 1, C], which stands for hidden cells. The others start the
        same without it.

    >>> params = jax.eval_shape(lambda key: init(InternImageConfig(), key), jax.random.key(0))
    >>> sum(leaf.size for leaf in jax.tree.leaves(params))  # with the fusion
    1084924080
    """
    rule = functools.partial(_init_spec, model)
    of_layers, of_rest, of_token = jax.random.split(rng, 3)
    tree = shapes(model)
    params = initializers.fill(
        of_rest,
        {name: {k: v for k, v in part.items() if k != "layers"} for name, part in tree.items()},
        rule,
    )
    for stage, (depth, key) in enumerate(
        zip(model.depths, jax.random.split(of_layers, 4), strict=True)
    ):
        one = _layer(model, stage).shapes()
        params[f"stage{stage}"]["layers"] = jax.lax.map(
            lambda key, one=one: initializers.fill(key, one, rule), jax.random.split(key, depth)
        )
    if mask_token:
        params |= initializers.fill(of_token, {"mask_token": (1, 1, 1, model.width)}, rule)
    return params


def init_dcn(layer: Layer, rng: jax.Array) -> Params:
    """Returns parameters of the DCNv3 of one layer, as `init` draws them.

    >>> layer = Layer(8, 2, "pre", 0.0, 1.0, 3, False, 32)
    >>> float(init_dcn(layer, jax.random.key(0))["offsets"]["kernel"].max())  # a box filter
    0.0
    """
    rule = functools.partial(_init_spec, InternImageConfig(kernel=layer.kernel))
    return initializers.fill(rng, layer.shapes()["dcn"], rule)


def pixel_shuffle(x_BxHxWx4D: jax.Array) -> jax.Array:
    """Rearranges [B, H, W, 4 D] -> [B, 2 H, 2 W, D]: channel 4 d + 2 a + b of a cell is channel d
    of its sub-cell (a, b).

    >>> pixel_shuffle(jnp.arange(8).reshape(1, 1, 1, 8))[0, :, :, 0].tolist()
    [[0, 1], [2, 3]]
    """
    b, h, w, c = x_BxHxWx4D.shape
    return (
        x_BxHxWx4D.reshape(b, h, w, c // 4, 2, 2)
        .transpose(0, 1, 4, 2, 5, 3)
        .reshape(b, 2 * h, 2 * w, c // 4)
    )


def unpatchify(patches_BxNxP: jax.Array, grid: int) -> jax.Array:
    """Inverts `vit.patchify` for images of three channels: [B, grid p, grid p, 3].

    >>> unpatchify(jnp.arange(12).reshape(1, 4, 3), 2)[0, :, :, 0].tolist()
    [[0, 3], [6, 9]]
    """
    b, _, size = patches_BxNxP.shape
    p = math.isqrt(size // 3)
    return (
        patches_BxNxP.reshape(b, grid, grid, p, p, 3)
        .swapaxes(2, 3)
        .reshape(b, grid * p, grid * p, 3)
    )


def _fill(x_BxHxWxC: jax.Array, token: jax.Array, hidden_BxN: jax.Array) -> jax.Array:
    grid = math.isqrt(hidden_BxN.shape[1])
    b, height, width, _ = x_BxHxWxC.shape
    if grid * grid != hidden_BxN.shape[1] or height % grid or width % grid:
        size = f"{height}x{width}"
        raise ValueError(
            f"hidden cells have shape {hidden_BxN.shape}; they must be a square grid that divides"
            f" the stem's {size} map"
        )
    hidden = hidden_BxN.reshape(b, grid, grid).repeat(height // grid, 1).repeat(width // grid, 2)
    return jnp.where(hidden[..., None], token.astype(x_BxHxWxC.dtype), x_BxHxWxC)


def _gathered(
    function: Callable[..., jax.Array], params: Params, x_BxHxWxC: jax.Array, *settings: Any
) -> jax.Array:
    """`function(params, x, ...)`, which on a mesh with an fsdp axis every device computes for its
    own rows, with all of the weights."""
    run = lambda opened, params, x, *_: function(opened(params), x, *settings)
    return parallel.with_fsdp_gather(run, params, x_BxHxWxC, dtype=x_BxHxWxC.dtype, stacked=False)


def feature_maps(
    model: InternImageConfig,
    params: Params,
    images_BxSxSx3: jax.Array,
    *,
    keep_BxLx2: jax.Array | None = None,
    hidden_BxN: jax.Array | None = None,
    dtype: str = "float32",
    scan: bool = False,
    remat: str = "none",
    keep_gathered: bool = False,
    method: str = "auto",
    before: Callable[[int, jax.Array], jax.Array] | None = None,
) -> list[jax.Array]:
    """Returns the maps at the ends of the four stages, [B, H, W, C 2^i], each half as large as the
    one before.

    Args:
      model, params: as of `init`.
      images_BxSxSx3: normalised images, mixed or not; height and width are multiples of 8 strides
        of the stem.
      keep_BxLx2: stochastic depth as factors 0 or 1 / (1 - p) of the (DCNv3, MLP) branch of every
        layer of all stages; None: off.
      hidden_BxN: bool, cells of a square grid over the image that `mask_token` fills at the stem's
        output; None: none.
      dtype: precision of products and of the maps between layers; norms, softmax and sampling
        positions are float32.
      scan: the layers of a stage in a `lax.scan` instead of a loop. Same numbers; compile time does
        not grow with depth.
      remat: remat policy of a layer: none, dots, names or full.
      keep_gathered: on a mesh with an fsdp axis, whether the backward pass keeps the gathered
        weights or gathers them again.
      method: form of DCNv3, as of `dcnv3.dcnv3`.
      before: a function of the number of a stage and its input; the stage reads what it returns.

    Raises:
      ValueError: sizes that do not fit.

    >>> model = PRESETS["internimage_pico"]
    >>> tree = jax.eval_shape(lambda key: init(model, key), jax.random.key(0))
    >>> call = lambda params: feature_maps(model, params, jnp.zeros((1, 32, 64, 3)))
    >>> [x.shape for x in jax.eval_shape(call, tree)]
    [(1, 16, 32, 32), (1, 8, 16, 64), (1, 4, 8, 128), (1, 2, 4, 256)]
    """
    least = 8 * math.prod(model.stem_strides)
    if images_BxSxSx3.shape[1] % least or images_BxSxSx3.shape[2] % least:
        raise ValueError(
            f"images have shape {images_BxSxSx3.shape}; height and width must be multiples of"
            f" {least}"
        )
    if keep_BxLx2 is not None and keep_BxLx2.shape[1:] != (sum(model.depths), 2):
        raise ValueError(
            f"keep factors have shape {keep_BxLx2.shape}; they must be [B, {sum(model.depths)}, 2]:"
            " [B, L, 2]"
        )
    stem = params["stem"]
    with jax.named_scope("stem"):
        x = _gathered(convolve, stem["conv1"], images_BxSxSx3.astype(dtype), model.stem_strides[0])
        x = gelu(norm_layer(stem["norm1"], x))
        x = norm_layer(stem["norm2"], _gathered(convolve, stem["conv2"], x, model.stem_strides[1]))
    if hidden_BxN is not None:
        x = _fill(x, params["mask_token"], hidden_BxN)
    maps, start = [], 0
    for stage, depth in enumerate(model.depths):
        part = params[f"stage{stage}"]
        x = before(stage, x) if before else x
        keep = None if keep_BxLx2 is None else keep_BxLx2[:, start : start + depth]
        every = model.extra_norm if _extra_norms(model, stage) else 0
        settings: dict[str, Any] = {
            "scan": scan,
            "remat": remat,
            "keep_gathered": keep_gathered,
            "method": method,
            "every": every,
        }
        with jax.named_scope(f"stage{stage}"):
            x = run_layers(
                _layer(model, stage),
                part["layers"],
                x,
                keep_BxLx2=keep,
                extra_norms=part.get("extra_norms"),
                **settings,
            )
            if "norm" in part:
                x = norm_layer(part["norm"], x)
        maps.append(x)
        start += depth
        if "down" in part:
            with jax.named_scope("down"):
                x = norm_layer(
                    part["down"]["norm"], _gathered(convolve, part["down"]["conv"], x, 2)
                )
    return maps


def fuse(model: InternImageConfig, params: Params, maps: list[jax.Array]) -> jax.Array:
    """Returns dense features [B, N, D], row-major, of the last two maps of `feature_maps`, at the
    size of the third.

    Raises:
      ValueError: a model without the fusion.

    >>> model = PRESETS["internimage_pico"]
    >>> tree = jax.eval_shape(lambda key: init(model, key), jax.random.key(0))
    >>> sizes = ((16, 32), (8, 64), (4, 128), (2, 256))
    >>> maps = [jnp.zeros((2, side, side, width)) for side, width in sizes]
    >>> jax.eval_shape(lambda p: fuse(model, p, maps), tree).shape
    (2, 16, 128)
    """
    if not model.fused:
        raise ValueError(
            "this InternImage has fused=0, no fused dense features; read `feature_maps`"
        )
    fusion = params["fusion"]
    z = pixel_shuffle(_gathered(dense_layer, fusion["deep"], maps[3])) + _gathered(
        dense_layer, fusion["shallow"], maps[2]
    )
    return z.reshape(z.shape[0], -1, model.fused)


def apply(
    model: InternImageConfig, params: Params, images_BxSxSx3: jax.Array, **settings: Any
) -> jax.Array:
    """Returns dense features of every cell of `model.stride` pixels, row-major: [B, N, D], 144 x
    1024 for InternImage-H at 192 pixels; without the fusion the last stage's map, 36 x 2560.

    Arguments and errors as of `feature_maps` and `fuse`.

    >>> tree = jax.eval_shape(lambda key: init(InternImageConfig(), key), jax.random.key(0))
    >>> call = lambda p: apply(InternImageConfig(), p, jnp.zeros((2, 192, 192, 3)), scan=True)
    >>> jax.eval_shape(call, tree).shape
    (2, 144, 1024)
    """
    maps = feature_maps(model, params, images_BxSxSx3, **settings)
    return (
        fuse(model, params, maps)
        if model.fused
        else maps[3].reshape(len(maps[3]), -1, model.dense_width)
    )

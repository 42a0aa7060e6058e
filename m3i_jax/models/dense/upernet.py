"""UperNet (Xiao et al., 2018) as in mmsegmentation: pyramid pooling on the coarsest map, a feature
pyramid from coarse to fine, and one classifier on all of its maps; beside it, in training, an
auxiliary classifier on the second coarsest map.

Every convolution before a batch norm is without bias; ReLU after each. Maps are resized bilinearly.
Those that meet in a 3 x 3 convolution are convolved one by one and before they are enlarged
(`convolve_resized`), which is the same sum for half of the head's multiply-adds: interpolation acts
on cells and a kernel on channels, so their order is free.

B images, H W size of a map, C channels, D width of the head, K categories.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import parallel, schema
from m3i_jax.models.cpu_codegen import matmul
from m3i_jax.models.dcnv3_dense import widen
from m3i_jax.models.dense.map_norms import initial_statistics, norm_shapes, running_batch_norm
from m3i_jax.models.dense.map_sampling import adaptive_mean, resize_bilinear, resize_matrix
from m3i_jax.models.initializers import InitSpec, fill
from m3i_jax.models.intern_image_layer import convolve, dense_layer
from m3i_jax.models.layers import Params


def _layer(*kernel: int) -> dict[str, Any]:
    """A convolution and its batch norm."""
    return {"kernel": kernel, **norm_shapes(kernel[-1])}


def upernet_shapes(
    settings: schema.Segment, channels: Mapping[int, int], classes: int
) -> dict[str, Any]:
    """Returns the tree of parameters, as shapes.

    >>> settings = schema.Segment(strides=(8, 16), width=4, aux_width=0, pool_scales=(1, 2))
    >>> sorted(upernet_shapes(settings, {8: 2, 16: 3}, 5))
    ['classifier', 'fuse', 'lateral_8', 'output_8', 'pool_1', 'pool_2', 'pooled']
    """
    d, fine = settings.width, settings.strides[:-1]
    top = channels[settings.strides[-1]]
    tree = {f"pool_{scale}": _layer(top, d) for scale in settings.pool_scales}
    tree["pooled"] = _layer(3, 3, top + len(settings.pool_scales) * d, d)
    for stride in fine:
        tree[f"lateral_{stride}"] = _layer(channels[stride], d)
        tree[f"output_{stride}"] = _layer(3, 3, d, d)
    tree["fuse"] = _layer(3, 3, len(settings.strides) * d, d)
    tree["classifier"] = {"kernel": (d, classes), "bias": (classes,)}
    if settings.aux_width:
        tree["aux"] = _layer(3, 3, channels[_aux_stride(settings)], settings.aux_width)
        tree["aux_classifier"] = {"kernel": (settings.aux_width, classes), "bias": (classes,)}
    return tree


def _aux_stride(settings: schema.Segment) -> int:
    return settings.strides[max(len(settings.strides) - 2, 0)]


def _first_values(classifier_std: float, path: str, shape: tuple[int, ...]) -> InitSpec:
    layer, last = path.split("/")[-2:]
    if last in ("scale", "bias"):
        return "constant", float(last == "scale")
    if layer.endswith("classifier"):
        return "normal", classifier_std
    return "normal", math.sqrt(2 / math.prod((*shape[:-2], shape[-1])))


def init(
    settings: schema.Segment, channels: Mapping[int, int], classes: int, rng: jax.Array
) -> tuple[Params, Params]:
    """Returns parameters, and the running statistics of the batch norms.

    Convolutions are N(0, 2 / fan out), classifiers N(0, classifier_std^2), biases 0.

    Args:
      settings: `strides`, `width`, `pool_scales`, `aux_width` and `classifier_std` are read.
      channels: {stride: channels} of the maps.
      classes: categories.
      rng: key.

    >>> channels = dict.fromkeys((4, 8, 16, 32), 768)
    >>> call = lambda key: init(schema.Segment(), channels, 150, key)
    >>> params, statistics = jax.eval_shape(call, jax.random.key(0))
    >>> aux = sum(leaf.size for name in params for leaf in jax.tree.leaves(params[name])
    ...     if name.startswith("aux"))
    >>> sum(leaf.size for leaf in jax.tree.leaves(params)) - aux, aux
    (67963542, 1808534)
    """
    tree = upernet_shapes(settings, channels, classes)
    statistics = {
        name: initial_statistics(part["scale"][0]) for name, part in tree.items() if "scale" in part
    }
    rule = functools.partial(_first_values, settings.classifier_std)
    return fill(rng, tree, rule), statistics


def drop_channels(x_BxHxWxC: jax.Array, uniform_BxC: jax.Array, rate: float) -> jax.Array:
    """Whole channels of an image set to 0 where the uniform number is below the rate, the others
    divided by 1 - rate (torch's Dropout2d).

    >>> uniform = jnp.array([[0.1, 0.3]])
    >>> drop_channels(jnp.ones((1, 1, 1, 2)), uniform, 0.2).ravel().tolist()
    [0.0, 1.25]
    """
    factor_BxC = jnp.where(uniform_BxC < rate, 0, 1 / (1 - rate))
    return (x_BxHxWxC.astype(jnp.float32) * factor_BxC[:, None, None]).astype(x_BxHxWxC.dtype)


def dropout_width(settings: schema.Segment) -> int:
    """Returns how many uniform numbers per image `apply` reads for dropout.

    >>> dropout_width(schema.Segment())
    1024
    """
    return settings.width + settings.aux_width


def apply(
    settings: schema.Segment,
    params: Params,
    statistics: Params,
    maps: Mapping[int, jax.Array],
    *,
    train: bool,
    uniform_BxC: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None, Params]:
    """Returns logits of every cell.

    Args:
      settings: also `dropout` and `norm_momentum` are read.
      params, statistics: as of `init`.
      maps: {stride: [B, H, W, C]}.
      train: batch norm by the batch, dropout and the auxiliary head.
      uniform_BxC: numbers in [0, 1) for dropout, `dropout_width` for each image; None: no
        dropout.

    Returns:
      logits [B, H, W, K] at the finest stride and, in training, those of the auxiliary head at the
      second coarsest, float32; the new statistics.

    >>> settings = schema.Segment(strides=(4, 8), width=4, aux_width=2)
    >>> tree = jax.eval_shape(lambda key: init(settings, {4: 3, 8: 3}, 5, key), jax.random.key(0))
    >>> maps = {4: jnp.zeros((2, 6, 8, 3)), 8: jnp.zeros((2, 3, 4, 3))}
    >>> call = lambda tree: apply(settings, *tree, maps, train=True)
    >>> logits, aux, _ = jax.eval_shape(call, tree)
    >>> logits.shape, aux.shape
    ((2, 6, 8, 5), (2, 6, 8, 5))
    """
    new = dict(statistics)

    def layer(name: str, *parts: jax.Array) -> jax.Array:
        """ReLU of the norm of a convolution of maps side by side, at the size of the first."""
        kernel = params[name]["kernel"]
        if kernel.ndim == 2:
            x = dense_layer({"kernel": kernel}, *parts)
        else:
            kernels = jax.lax.split(kernel, [part.shape[-1] for part in parts], 2)
            size = parts[0].shape[1], parts[0].shape[2]
            terms = [convolve_resized(k, y, size) for k, y in zip(kernels, parts, strict=True)]
            wide = [term.astype(jnp.float32) for term in terms]
            x = functools.reduce(jnp.add, wide).astype(parts[0].dtype)
        y, new[name] = running_batch_norm(
            params[name],
            statistics[name],
            x,
            train=train,
            momentum=settings.norm_momentum,
            relu=True,
        )
        return y

    def classify(name: str, x: jax.Array, channels: slice) -> jax.Array:
        if train and uniform_BxC is not None:
            x = drop_channels(x, uniform_BxC[:, channels], settings.dropout)
        return dense_layer(params[name], x, jnp.float32)

    *fine, coarsest = settings.strides
    top = maps[coarsest]
    pools = [layer(f"pool_{scale}", adaptive_mean(top, scale)) for scale in settings.pool_scales]
    above = layer("pooled", top, *pools)
    made = [above]
    for stride in reversed(fine):
        lateral = layer(f"lateral_{stride}", maps[stride])
        above = lateral + resize_bilinear(above, (lateral.shape[1], lateral.shape[2]))
        made.insert(0, layer(f"output_{stride}", above))
    logits = classify("classifier", layer("fuse", *made), slice(settings.width))
    if not (train and settings.aux_width):
        return logits, None, new
    x = layer("aux", maps[_aux_stride(settings)])
    return logits, classify("aux_classifier", x, slice(settings.width, None)), new


def _taps(size: int, out: int) -> np.ndarray:
    """Weights [out, size, 3] of the cells that a tap of the kernel meets at each place, zero where
    it is outside of the large map."""
    padded = np.pad(resize_matrix(size, out), ((1, 1), (0, 0)))
    return np.stack([padded[tap : tap + out] for tap in range(3)], -1)


def _apply_matrix(matrix_UxK: np.ndarray, x_NxKxD: jax.Array) -> jax.Array:
    """The matrix times every [K, D], in the type of x; sums are float32."""
    settings: dict[str, Any] = {
        "precision": None if x_NxKxD.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST,
        "preferred_element_type": widen(x_NxKxD.dtype),
    }
    matrix = jnp.asarray(matrix_UxK, x_NxKxD.dtype)
    if parallel.platform() == "cpu":  # else the compiler would transpose the product
        repeated = jnp.broadcast_to(matrix, (x_NxKxD.shape[0], *matrix.shape))
        y = jnp.einsum("nuk,nkd->nud", repeated, x_NxKxD, **settings)
    else:
        y = jnp.einsum("uk,nkd->nud", matrix, x_NxKxD, **settings)
    return y.astype(x_NxKxD.dtype)


def convolve_resized(
    kernel_3x3xCxD: jax.Array, x_BxHxWxC: jax.Array, size: tuple[int, int]
) -> jax.Array:
    """`convolve` of `map_sampling.resize_bilinear(x, size)`: 3 x 3, stride 1, padding 1, without
    bias, [B, U, V, D] in the type of x.

    Args:
      kernel_3x3xCxD: the kernel.
      x_BxHxWxC: the small map; one of the size itself is convolved as it is.
      size: (U, V) of the large map.

    >>> x = jnp.array([0.0, 4.0]).reshape(1, 1, 2, 1)
    >>> convolve_resized(jnp.ones((3, 3, 1, 1)), x, (1, 4)).ravel().tolist()  # of 0 1 3 4
    [1.0, 4.0, 8.0, 7.0]
    """
    b, h, w, c = x_BxHxWxC.shape
    if (h, w) == tuple(size):
        return convolve({"kernel": kernel_3x3xCxD}, x_BxHxWxC, 1)
    d = kernel_3x3xCxD.shape[-1]
    kernel = kernel_3x3xCxD.astype(x_BxHxWxC.dtype)
    columns_Vx3W = _taps(w, size[1]).reshape(size[1], 3 * w)
    rows_Ux3H = _taps(h, size[0]).reshape(size[0], 3 * h)
    by_row = []
    for row in range(3):
        mixed = matmul(x_BxHxWxC.reshape(-1, c), kernel[row].swapaxes(0, 1).reshape(c, 3 * d))
        by_row.append(_apply_matrix(columns_Vx3W, mixed.reshape(-1, 3 * w, d)))
    stacked = jnp.stack([y.reshape(b, h, size[1] * d) for y in by_row], 2)
    return _apply_matrix(rows_Ux3H, stacked.reshape(b, 3 * h, -1)).reshape(b, *size, d)

"""One layer of InternImage: DCNv3 with its projections, then an MLP, each a residual branch whose
norms depend on the variant.

B images, H W size of the map, R = B H W rows, C channels, G groups, P points, F hidden width of the
MLP, L layers.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from m3i_jax import parallel
from m3i_jax.models import depthwise_gpu
from m3i_jax.models.cpu_codegen import fusion_barrier, matmul
from m3i_jax.models.dcnv3 import dcnv3
from m3i_jax.models.layers import Params, gelu, layer_norm
from m3i_jax.models.scan_blocks import chunk_count, deal_rows, join_rows, split_blocks, with_remat
from m3i_jax.objective.manual_axes import custom_vjp, vary_like
from m3i_jax.parallel.chips import CHIPS

_POINTS = 9
SMALL = 16  # cells; smaller maps are convolved as a product of patches
CHUNK = 3 * 2**20  # bytes of a map; a chunk of images has about as many
GRADIENTS = CHIPS["v5e"].scratchpad * 3 // 4  # bytes; a v6e has as much VMEM


def dense_layer(params: Params, x_xC: jax.Array, out: Any = None) -> jax.Array:
    """`x W + b` over the last axis, as one [rows, C] matrix; `b` may be missing. `out`: type of the
    result; None: that of x.

    >>> dense_layer({"kernel": jnp.eye(2), "bias": jnp.ones(2)}, jnp.zeros((1, 3, 2))).tolist()
    [[[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]]
    """
    kernel, out = params["kernel"].astype(x_xC.dtype), out or x_xC.dtype
    y = matmul(x_xC.reshape(-1, x_xC.shape[-1]), kernel, out)
    if "bias" in params:
        y += params["bias"].astype(out)
    return y.reshape(*x_xC.shape[:-1], -1)


def norm_layer(params: Params, x_xC: jax.Array) -> jax.Array:
    """`layers.layer_norm` with the parameters `scale` and `bias`.

    >>> params = {"scale": jnp.ones(2), "bias": jnp.zeros(2)}
    >>> norm_layer(params, jnp.array([1.0, 3.0])).round(3).tolist()
    [-1.0, 1.0]
    """
    return layer_norm(x_xC, params["scale"], params["bias"])


def convolve(params: Params, x_BxHxWxC: jax.Array, stride: int) -> jax.Array:
    """3 x 3 convolution with padding 1, in the type of x. (Padding "SAME" would shift even sizes at
    stride 2.)

    >>> convolve({"kernel": jnp.ones((3, 3, 1, 1))}, jnp.ones((1, 4, 4, 1)), 2)[0, :, :, 0].tolist()
    [[4.0, 6.0], [6.0, 9.0]]
    """
    kernel, (_, h, w, c) = params["kernel"].astype(x_BxHxWxC.dtype), x_BxHxWxC.shape
    # as a product of patches: on a CPU the gradient of the convolution takes ten times as long
    if h * w <= SMALL:
        padded = jnp.pad(x_BxHxWxC, ((0, 0), (1, 1), (1, 1), (0, 0)))
        patches = [
            padded[:, i : i + h : stride, j : j + w : stride] for i in range(3) for j in range(3)
        ]
        y = jnp.concatenate(patches, -1) @ kernel.reshape(9 * c, -1)
    else:
        across = (stride, stride), [(1, 1), (1, 1)]
        y = jax.lax.conv_general_dilated(
            x_BxHxWxC, kernel, *across, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    return y + params["bias"].astype(y.dtype) if "bias" in params else y


def _padded(x_BxHxWxC: jax.Array, kernel: int) -> jax.Array:
    reach = kernel // 2
    return jnp.pad(x_BxHxWxC, ((0, 0), (reach, reach), (reach, reach), (0, 0))).astype(jnp.float32)


def _shifted_sum(x_BxHxWxC: jax.Array, kernel_KxKxC: jax.Array, bias_C: jax.Array) -> jax.Array:
    def form(x_BxHxWxC: jax.Array, kernel_KxKxC: jax.Array, bias_C: jax.Array) -> jax.Array:
        (_, h, w, _), k, padded = (
            x_BxHxWxC.shape,
            kernel_KxKxC.shape[0],
            _padded(x_BxHxWxC, kernel_KxKxC.shape[0]),
        )
        taps = (
            padded[:, i : i + h, j : j + w] * kernel_KxKxC[i, j] for i in range(k) for j in range(k)
        )
        return (sum(taps) + bias_C).astype(x_BxHxWxC.dtype)

    # Otherwise the CPU compiler computes it for each of mean, variance and value of the norm after.
    return fusion_barrier(form, x_BxHxWxC, kernel_KxKxC, bias_C)


def _by_shift(padded: jax.Array, g_BxHxWxC: jax.Array, k: int) -> list[jax.Array]:
    _, h, w, _ = g_BxHxWxC.shape
    return [
        (padded[:, i : i + h, j : j + w] * g_BxHxWxC).sum((0, 1, 2))
        for i in range(k)
        for j in range(k)
    ]


def _by_row(padded: jax.Array, g_BxHxWxC: jax.Array, k: int) -> list[jax.Array]:
    """All K^2 sums at once, row by row of the maps: the CPU compiler stores every shift of a whole
    map."""
    b, h, w, c = g_BxHxWxC.shape

    def row(i: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
        window = jax.lax.dynamic_slice_in_dim(padded, i, k, 1)
        g_BxWxC = jax.lax.dynamic_index_in_dim(g_BxHxWxC, i, 1, keepdims=False)
        return [
            total + window[:, n // k, n % k : n % k + w] * g_BxWxC for n, total in enumerate(sums)
        ]

    start = [vary_like(jnp.zeros((b, w, c), jnp.float32), (padded, g_BxHxWxC))] * k**2
    return [total.sum((0, 1)) for total in jax.lax.fori_loop(0, h, row, start)]


def _shifted_sum_backward(
    sums: Callable[..., list[jax.Array]],
    x_BxHxWxC: jax.Array,
    kernel_KxKxC: jax.Array,
    g_BxHxWxC: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    dx = _shifted_sum(g_BxHxWxC, kernel_KxKxC[::-1, ::-1], jnp.zeros(x_BxHxWxC.shape[-1]))
    k = kernel_KxKxC.shape[0]
    return dx, jnp.stack(sums(_padded(x_BxHxWxC, k), g_BxHxWxC.astype(jnp.float32), k)).reshape(
        kernel_KxKxC.shape
    )


def _convolved(x_BxHxWxC: jax.Array, kernel_KxKxC: jax.Array, bias_C: jax.Array) -> jax.Array:
    reach, c = kernel_KxKxC.shape[0] // 2, x_BxHxWxC.shape[-1]
    y_BxHxWxC = jax.lax.conv_general_dilated(
        x_BxHxWxC,
        kernel_KxKxC[:, :, None].astype(x_BxHxWxC.dtype),
        (1, 1),
        [(reach, reach)] * 2,
        feature_group_count=c,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=jnp.float32,
        precision=None if x_BxHxWxC.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST,
    )
    return (y_BxHxWxC + bias_C).astype(x_BxHxWxC.dtype)


def _convolved_backward(
    x_BxHxWxC: jax.Array, kernel_KxKxC: jax.Array, g_BxHxWxC: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return jax.vjp(
        lambda x, kernel: _convolved(x, kernel, jnp.zeros(x.shape[-1])), x_BxHxWxC, kernel_KxKxC
    )[1](g_BxHxWxC)


def depthwise(x_BxHxWxC: jax.Array, kernel_KxKxC: jax.Array, bias_C: jax.Array) -> jax.Array:
    """Depth-wise convolution of odd side K, stride 1, zero padding; sums in float32, result in the
    type of x.

    Computed as K^2 shifted products in one fused pass: as convolutions, value and gradients take
    ten times as long on a CPU. On a TPU it is a convolution: the shifts would be copies of nine
    times the bytes. On a GPU a kernel computes the gradients of kernel and bias.

    Raises:
      ValueError: an even side.

    >>> depthwise(jnp.ones((1, 2, 3, 1)), jnp.ones((3, 3, 1)), jnp.zeros(1))[0, :, :, 0].tolist()
    [[4.0, 6.0, 4.0], [4.0, 6.0, 4.0]]
    """
    if len(kernel_KxKxC) % 2 == 0:
        raise ValueError(
            f"a depth-wise kernel of side {len(kernel_KxKxC)} has no centre, at which its result"
            " is; use an odd side"
        )
    # float32 also of parameters that a caller keeps in bfloat16, whose gradients are then bfloat16
    wide = jnp.float32
    return _depthwise(x_BxHxWxC, kernel_KxKxC.astype(wide), bias_C.astype(wide))


@custom_vjp
def _depthwise(x_BxHxWxC: jax.Array, kernel_KxKxC: jax.Array, bias_C: jax.Array) -> jax.Array:
    forms: dict[str, Any] = {"tpu": _convolved, "default": _shifted_sum}
    return jax.lax.platform_dependent(x_BxHxWxC, kernel_KxKxC, bias_C, **forms)


def _depthwise_backward(
    residuals: Any, g_BxHxWxC: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    forms: dict[str, Any] = {
        "cpu": functools.partial(_shifted_sum_backward, _by_row),
        "default": functools.partial(_shifted_sum_backward, _by_shift),
    }
    forms["tpu"] = _convolved_backward
    x_BxHxWxC, kernel_KxKxC = residuals
    if depthwise_gpu.is_trusted(x_BxHxWxC, len(kernel_KxKxC)):
        dx = _shifted_sum(g_BxHxWxC, kernel_KxKxC[::-1, ::-1], jnp.zeros(x_BxHxWxC.shape[-1]))
        return dx, *depthwise_gpu.kernel_gradient(x_BxHxWxC, g_BxHxWxC, len(kernel_KxKxC))
    dx, dkernel = jax.lax.platform_dependent(*residuals, g_BxHxWxC, **forms)
    return dx, dkernel, g_BxHxWxC.astype(jnp.float32).sum((0, 1, 2))


_depthwise.defvjp(
    lambda x, kernel, bias: (_depthwise(x, kernel, bias), (x, kernel)), _depthwise_backward
)


class Layer(NamedTuple):
    """Settings of the layers of one stage; see `intern_image.InternImageConfig`."""

    width: int
    groups: int
    norm: str
    layer_scale: float
    offset_scale: float
    kernel: int
    center_scale: bool
    hidden: int

    def shapes(self) -> dict[str, Any]:
        """Returns the parameters of one layer, as shapes.

        >>> layer = Layer(8, 2, "pre", 0.0, 1.0, 3, False, 32)
        >>> sorted(layer.shapes()), layer.shapes()["dcn"]["depthwise"]
        (['dcn', 'mlp', 'norm1', 'norm2'], {'kernel': (3, 3, 8), 'bias': (8,)})
        """
        c = self.width

        def linear(n: int, m: int) -> dict[str, tuple[int, ...]]:
            return {"kernel": (n, m), "bias": (m,)}

        affine = {"scale": (c,), "bias": (c,)}
        dcn = {
            "input": linear(c, c),
            "depthwise": {"kernel": (self.kernel, self.kernel, c), "bias": (c,)},
            "norm": affine,
            "offsets": linear(c, self.groups * _POINTS * 2),
            "mask": linear(c, self.groups * _POINTS),
            "output": linear(c, c),
        }
        if self.center_scale:
            dcn["center"] = linear(c, self.groups)
        mlp = {"fc1": linear(c, self.hidden), "fc2": linear(self.hidden, c)}
        tree: dict[str, Any] = {"norm1": affine, "dcn": dcn, "norm2": affine, "mlp": mlp}
        if self.norm == "res_post":
            tree |= {"res_norm1": affine, "res_norm2": affine}
        if self.layer_scale:
            tree |= {"gamma1": (c,), "gamma2": (c,)}
        return tree


def dcn(layer: Layer, params: Params, x_BxHxWxC: jax.Array, method: str = "auto") -> jax.Array:
    """DCNv3 with its projections, [B, H, W, C]: offsets and masks are computed from a depth-wise
    convolution of the input.

    Offsets and masks are float32 from the product on. The columns of the offsets are, for each
    group, x of every point and then y of every point (published: x, y for each point), so that
    neither has to be taken out of pairs.

    >>> layer = Layer(2, 1, "pre", 0.0, 1.0, 3, False, 8)
    >>> is_shape = lambda node: isinstance(node, tuple)
    >>> params = jax.tree.map(jnp.zeros, layer.shapes()["dcn"], is_leaf=is_shape)
    >>> identity = {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}
    >>> params |= {"input": identity, "output": identity}
    >>> run = jax.jit(functools.partial(dcn, layer))
    >>> y = run(params, jnp.ones((1, 3, 3, 2)))  # at the start: the mean, zeros outside
    >>> y[0, :, :, 0].round(3).tolist()
    [[0.444..., 0.667..., 0.444...], [0.667..., 1.0, 0.667...], [0.444..., 0.667..., 0.444...]]
    """
    wide, (b, height, width, c) = jnp.float32, x_BxHxWxC.shape
    # Rows of one matrix between the products: with the axes of the map, a TPU would put them where
    # the convolution wants them, and move every array twice.
    x_RxC = x_BxHxWxC.reshape(-1, c)
    v_RxC = checkpoint_name(dense_layer(params["input"], x_RxC), "qkv")
    local = depthwise(x_BxHxWxC, params["depthwise"]["kernel"], params["depthwise"]["bias"])
    h = gelu(norm_layer(params["norm"], local.reshape(-1, c)))
    # The names of `scan_blocks.NAMES`, by the counterpart in attention: inputs of the operator are
    # qkv, its output is attended.
    offset = checkpoint_name(dense_layer(params["offsets"], h, wide), "qkv")
    logits = checkpoint_name(dense_layer(params["mask"], h, wide), "qkv")
    # Cells as one axis: a TPU would otherwise put rows of twelve along lanes of 128.
    groups = (layer.groups, _POINTS)
    offset = (
        offset.reshape(b, -1, layer.groups, 2, _POINTS)
        .swapaxes(-1, -2)
        .reshape(b, height, width, *groups, 2)
    )
    mask = jax.nn.softmax(logits.reshape(b, -1, *groups)).reshape(b, height, width, *groups)
    y = dcnv3(
        v_RxC.reshape(x_BxHxWxC.shape),
        offset,
        mask,
        groups=layer.groups,
        offset_scale=layer.offset_scale,
        method=method,
    )
    y = checkpoint_name(y.reshape(-1, c), "attended")
    if layer.center_scale:
        share = jax.nn.sigmoid(
            checkpoint_name(dense_layer(params["center"], h, wide), "qkv")
        ).astype(y.dtype)
        # The share of its group for every channel, as a product with ones: a broadcast would need a
        # change of layout.
        spread = np.repeat(np.eye(layer.groups, dtype=y.dtype), c // layer.groups, 1)
        share = jnp.dot(share, spread, precision=jax.lax.Precision.HIGHEST)
        y = y * (1 - share) + v_RxC * share
    return dense_layer(params["output"], y).reshape(x_BxHxWxC.shape)


def apply(
    layer: Layer,
    params: Params,
    x_BxHxWxC: jax.Array,
    keep_Bx2: jax.Array | None = None,
    method: str = "auto",
) -> jax.Array:
    """Applies the two residual branches; `keep_Bx2`: factors of stochastic depth.

    >>> layer = Layer(4, 1, "post", 1e-5, 1.0, 3, True, 8)
    >>> is_shape = lambda node: isinstance(node, tuple)
    >>> params = jax.tree.map(jnp.zeros, layer.shapes(), is_leaf=is_shape)
    >>> jax.eval_shape(lambda p: apply(layer, p, jnp.ones((1, 2, 2, 4))), params).shape
    (1, 2, 2, 4)
    """

    size, shape = x_BxHxWxC[0, ..., 0].size, x_BxHxWxC.shape

    def branch(x_RxC: jax.Array, which: int) -> jax.Array:
        name = f"norm{which + 1}"
        y = x_RxC if layer.norm == "post" else norm_layer(params[name], x_RxC)
        if which == 0:
            y = dcn(layer, params["dcn"], y.reshape(shape), method).reshape(x_RxC.shape)
        else:
            y = gelu(checkpoint_name(dense_layer(params["mlp"]["fc1"], y), "fc1"))
            y = dense_layer(params["mlp"]["fc2"], y)
        y = checkpoint_name(y, "branch")
        if layer.norm != "pre":
            y = norm_layer(params[name if layer.norm == "post" else f"res_{name}"], y)
        if layer.layer_scale:
            y = y * params[f"gamma{which + 1}"].astype(y.dtype)
        if keep_Bx2 is None:
            return x_RxC + y
        # in float32: 1 / (1 - p) rounded to bfloat16 would scale every kept branch
        keep = jnp.repeat(keep_Bx2[:, which].astype(jnp.float32), size)[:, None]
        return (x_RxC.astype(jnp.float32) + keep * y.astype(jnp.float32)).astype(x_RxC.dtype)

    return branch(branch(x_BxHxWxC.reshape(-1, shape[-1]), 0), 1).reshape(shape)


def run_layers(
    layer: Layer,
    stacked: Params,
    x_BxHxWxC: jax.Array,
    *,
    keep_BxLx2: jax.Array | None = None,
    extra_norms: Params | None = None,
    every: int = 0,
    scan: bool = False,
    remat: str = "none",
    keep_gathered: bool = False,
    method: str = "auto",
) -> jax.Array:
    """Runs stacked layers one after the other, with a norm of `extra_norms` [n, C] after each
    `every` of the first n * every layers.

    On a mesh with an fsdp axis every device gathers the weights of one layer at a time, as in
    `scan_blocks.run_blocks`.

    >>> layer = Layer(4, 1, "pre", 0.0, 1.0, 3, False, 8)
    >>> stacked = jax.tree.map(
    ...     lambda shape: jnp.zeros((3, *shape)),
    ...     layer.shapes(),
    ...     is_leaf=lambda node: isinstance(node, tuple),
    ... )
    >>> call = lambda params: run_layers(layer, params, jnp.ones((1, 2, 2, 4)), scan=True)
    >>> jax.eval_shape(call, stacked).shape
    (1, 2, 2, 4)
    """
    depth = jax.tree.leaves(stacked)[0].shape[0]
    keep_LxBx2 = None if keep_BxLx2 is None else keep_BxLx2.swapaxes(0, 1)
    norms, last = (None, None) if extra_norms is None else _norms_before(extra_norms, depth, every)
    at_once = None if remat == "none" else chunk_rows(layer, x_BxHxWxC)

    def rows(
        gather: Callable[[Any], Any], trees: Any, x: jax.Array, keep_LxBx2: Any, _: Any
    ) -> jax.Array:
        count = chunk_count(parallel.rows_of_device(x.shape[0]), at_once) if at_once else 1
        x, keep_LxPxBx2 = deal_rows(x, count), deal_rows(keep_LxBx2, count, 1)

        def call(params: Any, x: jax.Array, keep_Bx2: Any) -> jax.Array:
            own, norm = params
            if norm is not None:
                x = jnp.where(norm["here"] > 0, norm_layer(norm, x), x)
            return apply(layer, own, x, keep_Bx2, method)

        def one(x: jax.Array, some: Any) -> jax.Array:
            params, keep = gather(some[0]), some[1]
            if count == 1:
                return call(params, x, keep)
            # in float32, so that the gradients of the chunks are added in it
            params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
            part = with_remat(lambda *chunk: call(params, *chunk), remat, scan=True)
            return jax.lax.map(lambda chunk: part(*chunk), (x, keep))

        step = with_remat(one, remat, scan=scan, keep_gathered=keep_gathered)
        layers = (trees, keep_LxPxBx2)
        if scan:
            x, _ = jax.lax.scan(lambda x, some: (step(x, some), None), x, layers)
            return join_rows(x, count)
        for some in split_blocks(layers, [1] * depth):
            x = step(x, jax.tree.map(lambda leaf: leaf[0], some))
        return join_rows(x, count)

    x_BxHxWxC = parallel.with_fsdp_gather(
        rows, (stacked, norms), x_BxHxWxC, keep_LxBx2, dtype=x_BxHxWxC.dtype, stacked=True
    )
    return x_BxHxWxC if last is None else norm_layer(last, x_BxHxWxC)


def chunk_rows(layer: Layer, x_BxHxWxC: jax.Array) -> float | None:
    """Images that a layer which recomputes takes at once; None: all.

    On a TPU as many as have a map of CHUNK bytes: what is computed between the products then stays
    in the chip's scratchpad, with the gradients of the weights, which all chunks add to. Memory
    sees the stream between layers, and the weights once a chunk. Gradients that the scratchpad
    cannot hold would be read and written for every chunk.

    >>> chunk_rows(Layer(8, 1, "pre", 0.0, 1.0, 3, False, 32), jnp.zeros((4, 2, 2, 8)))  # a CPU
    """
    leaves = jax.tree.leaves(layer.shapes(), is_leaf=lambda node: isinstance(node, tuple))
    if parallel.platform() != "tpu" or 4 * sum(map(math.prod, leaves)) > GRADIENTS:
        return None
    return CHUNK / (math.prod(x_BxHxWxC.shape[1:]) * x_BxHxWxC.dtype.itemsize)


def _norms_before(norms: Params, depth: int, every: int) -> tuple[Params, Params | None]:
    """The norm before each layer, [L, ...], with `here`, 1 where there is one and else 0; and that
    after the last layer, if there is one. (A scan of scans would copy what the inner ones keep.)"""
    places = np.arange(every, depth, every)[: len(norms["scale"])]
    before = {
        name: jnp.ones((depth, *leaf.shape[1:]), leaf.dtype).at[places].set(leaf[: len(places)])
        for name, leaf in norms.items()
    }
    before["here"] = jnp.zeros(depth).at[places].set(1)
    over = len(norms["scale"]) > len(places)
    return before, jax.tree.map(lambda leaf: leaf[-1], norms) if over else None

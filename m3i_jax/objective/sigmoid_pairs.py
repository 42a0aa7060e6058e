"""The sigmoid loss of images and captions (SigLIP), one block of the matrix of all pairs at a time.

With rows split over devices, every device keeps its images and passes its captions to the next one
in a ring; no device holds the captions of another longer than it compares them, nor the whole
matrix. The loss is a sum over pairs, so its gradients are summed on the same way: captions travel
with their gradients, and the backward pass only scales what the forward pass kept.

B images of the batch, R of one device, C captions at a time, E width.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from m3i_jax.objective.manual_axes import custom_vjp
from m3i_jax.objective.numerics import (
    ABSENT,
    EXACT,
    assert_equal_shape,
    assert_rank,
    float32,
    l2_normalize,
    weighted_sum,
    zero_masked_rows,
)

_lax: Any = jax.lax  # its collectives have no types
_spec: Any = PartitionSpec


def text_sigmoid(
    image_BxE: ArrayLike,
    text_BxE: ArrayLike,
    log_scale: ArrayLike,
    bias: ArrayLike,
    where_B: ArrayLike | None = None,
    *,
    group_B: ArrayLike | None = None,
    chunk: int = 0,
    axes: tuple[str, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """Computes the sigmoid posterior of captions: every pair of an image and a caption is a binary
    decision whether they belong together (SigLIP).

    `sum_j -log sigmoid(s_ij l_ij)` an image, with `l = exp(log_scale) u.v + bias` of embeddings u,
    v of length 1 and s = 1 for its own caption, -1 for all others. The sum runs over all captions
    of the batch, so a cost grows with the batch. It is no bound of the information; `nll` of
    `text_sigmoid_sums` is the cost of a softmax over the same products, which is one.

    Args:
      image_BxE: image embeddings; row b belongs to row b of `text_BxE`.
      text_BxE: text embeddings. Both receive gradients.
      log_scale: scalar, the logarithm of the scale; SigLIP starts at log 10, without a limit.
      bias: scalar; SigLIP starts at -10, LiT with a frozen tower at -2.71.
      where_B: weight of a pair, bool or float >= 0; a pair of weight 0 is neither an image nor a
        caption of others. None counts every pair once.
      group_B: integers; different pairs of equal number, such as those of equal captions, are not
        compared. None: all are.
      chunk: captions compared with the images of a device at a time; 0: those of one device.
      axes: axes of the mesh (`jax.set_mesh`) that split the rows, for the ring; (): no ring, the
        partitioner decides.

    Returns:
      (sum over images of weight * cost in nats, sum of weights), float32 scalars; (0, 0) if no pair
      counts.

    Raises:
      ValueError: shapes that do not belong together, a scale or bias of several numbers, axes that
        the mesh does not have, or rows that the devices do not divide.

    >>> import jax.numpy as jnp
    >>> total, count = text_sigmoid(jnp.eye(2), jnp.eye(2), 0.0, 0.0)
    >>> print(f"{total / count:.4f}")  # log(1 + exp(-1)) + log 2
    1.0064
    """
    total, count, _ = text_sigmoid_sums(
        image_BxE, text_BxE, log_scale, bias, where_B, group_B=group_B, chunk=chunk, axes=axes
    )
    return total, count


def text_sigmoid_sums(
    image_BxE: ArrayLike,
    text_BxE: ArrayLike,
    log_scale: ArrayLike,
    bias: ArrayLike,
    where_B: ArrayLike | None = None,
    *,
    group_B: ArrayLike | None = None,
    chunk: int = 0,
    axes: tuple[str, ...] = (),
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes `text_sigmoid` and, from the same products, the sum over images of weight * `-log
    softmax` of the own caption among all captions, in nats, without gradient.

    Args, Raises:
      as of `text_sigmoid`.

    Returns:
      (sum of the loss, sum of weights, sum of the softmax cost), float32 scalars.

    >>> import jax.numpy as jnp
    >>> _, count, nll = text_sigmoid_sums(jnp.eye(2), jnp.eye(2), jnp.log(2.0), 0.0)
    >>> print(f"{nll / count:.4f}")  # log(1 + exp(-2))
    0.1269
    """
    u_BxE, v_BxE = float32(image_BxE), float32(text_BxE)
    assert_equal_shape([u_BxE, v_BxE], custom_message="image and text")
    assert_rank(u_BxE, 2, custom_message="image and text must be [B, E]")
    u_BxE, v_BxE, weight_B = zero_masked_rows(u_BxE, v_BxE, where_B)
    rows = u_BxE.shape[0]
    if group_B is not None:
        group_B = jnp.asarray(group_B)
        assert_equal_shape([group_B, weight_B], custom_message="group: one per row")
    mesh = jax.sharding.get_abstract_mesh()
    if missing := [axis for axis in axes if axis not in mesh.shape]:
        raise ValueError(
            f"axes are {axes}, and the mesh {dict(mesh.shape)} has no {missing[0]!r}; set the mesh"
            " that splits the rows by jax.set_mesh, or give axes=()"
        )
    if not rows:
        return weight_B.sum(), weight_B.sum(), weight_B.sum()
    devices = math.prod(mesh.shape[axis] for axis in axes)
    if rows % devices:
        raise ValueError(f"{rows} rows do not divide over {devices} devices of {axes}")
    pairs = Captions(jnp.arange(rows), weight_B > 0, group_B)
    scalars = _scalar(log_scale, "log_scale"), _scalar(bias, "bias")
    settings = (axes, chunk if 0 < chunk < rows // devices else rows // devices)
    total, nll = _sums(settings, l2_normalize(u_BxE), l2_normalize(v_BxE), scalars, weight_B, pairs)
    return total, weight_B.sum(), nll


def _scalar(x: ArrayLike, name: str) -> jax.Array:
    """float32; one number in an array of any shape, as a module keeps it, is that number."""
    x = float32(x)
    if x.size != 1:
        raise ValueError(f"{name} has shape {list(x.shape)}; pass one number")
    return x.reshape(()) if x.ndim else x


class Captions(NamedTuple):
    """Rows of captions: their number, whether they count, and their group or None."""

    row: jax.Array
    counts: jax.Array
    group: jax.Array | None


Scalars = tuple[jax.Array, jax.Array]
Settings = tuple[tuple[str, ...], int]


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def _sums(
    settings: Settings,
    u_BxE: jax.Array,
    v_BxE: jax.Array,
    scalars: Scalars,
    weight_B: jax.Array,
    pairs: Captions,
) -> tuple[jax.Array, jax.Array]:
    return _forward(settings, u_BxE, v_BxE, scalars, weight_B, pairs)[0]


def _forward(
    settings: Settings,
    u_BxE: jax.Array,
    v_BxE: jax.Array,
    scalars: Scalars,
    weight_B: jax.Array,
    pairs: Captions,
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    """((loss, softmax cost), (gradients of the loss by u, v, scalars and weights, pairs))."""
    axes, chunk = settings
    run = functools.partial(_ring, axes, chunk)
    if axes:
        split, whole = _spec(axes), _spec()
        run = jax.shard_map(
            run,
            in_specs=(split, split, whole, split, split),
            out_specs=(whole, whole, (split, split, whole, split)),
            check_vma=False,
        )
    total, nll, gradients = run(u_BxE, v_BxE, scalars, weight_B, pairs)
    return (total, nll), (gradients, pairs)


def _backward(settings: Settings, kept: Any, cotangents: Any) -> tuple[Any, ...]:
    gradients, pairs = kept
    du_BxE, dv_BxE, of_scalars, dweight_B = jax.tree.map(lambda x: cotangents[0] * x, gradients)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, jax.dtypes.float0), pairs)
    return du_BxE, dv_BxE, of_scalars, dweight_B, nothing


_sums.defvjp(_forward, _backward)


class _Running(NamedTuple):
    """Sums over the captions so far: of the images of a device, and of their gradients."""

    loss_R: jax.Array
    own_R: jax.Array
    largest_R: jax.Array
    sum_R: jax.Array
    du_RxE: jax.Array
    of_scalars: Scalars


def _ring(
    axes: tuple[str, ...],
    chunk: int,
    u_RxE: jax.Array,
    v_RxE: jax.Array,
    scalars: Scalars,
    weight_R: jax.Array,
    pairs: Captions,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array, Scalars, jax.Array]]:
    """(loss, softmax cost, gradients of the loss), of one device's images and all captions."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(mesh.shape[axis] for axis in axes)
    zero_R = u_RxE[:, 0] * 0
    start = _Running(
        zero_R, zero_R, zero_R + 2 * ABSENT, zero_R, jnp.zeros_like(u_RxE), (zero_R.sum(),) * 2
    )
    compare = functools.partial(_compare, chunk, u_RxE, scalars, weight_R, pairs)
    dv_RxE = jnp.zeros_like(v_RxE)
    if devices == 1:
        running, dv_RxE = compare(start, v_RxE, pairs, dv_RxE)
    else:
        following = [(i, (i + 1) % devices) for i in range(devices)]

        def visit(_: jax.Array, carry: Any) -> Any:
            running, v_RxE, of_v, dv_RxE = carry
            # captions move on while they are compared, their gradients afterwards
            move = functools.partial(jax.tree.map, lambda x: _lax.ppermute(x, axes, following))
            next_v = move((v_RxE, of_v))
            running, dv_RxE = compare(running, v_RxE, of_v, dv_RxE)
            return running, *next_v, move(dv_RxE)

        # once around: after as many moves as devices the gradients are home
        carry = start, v_RxE, pairs, dv_RxE
        running, _, _, dv_RxE = jax.lax.fori_loop(0, devices, visit, carry)
    nll_R = jax.nn.softplus(running.largest_R + jnp.log(running.sum_R) - running.own_R)
    loss, nll = weighted_sum(running.loss_R, weight_R), weighted_sum(nll_R, weight_R)
    of_scalars = running.of_scalars
    if axes:
        loss, nll, of_scalars = _lax.psum((loss, nll, of_scalars), axes)
    # a row's cost is the gradient by its weight, 0 where that is 0
    return loss, nll, (running.du_RxE, dv_RxE, of_scalars, running.loss_R)


def _compare(
    chunk: int,
    u_RxE: jax.Array,
    scalars: Scalars,
    weight_R: jax.Array,
    of_u: Captions,
    running: _Running,
    v_RxE: jax.Array,
    of_v: Captions,
    dv_RxE: jax.Array,
) -> tuple[_Running, jax.Array]:
    """Sums after the captions of one device, a chunk of them at a time."""
    one = functools.partial(_add, u_RxE, scalars, weight_R, of_u)
    rows = v_RxE.shape[0]
    if chunk == rows:
        return one(running, (v_RxE, of_v, dv_RxE))
    full = rows - rows % chunk
    parts = (v_RxE, of_v, dv_RxE)
    cut = jax.tree.map(lambda x: x[:full].reshape(-1, chunk, *x.shape[1:]), parts)
    running, done = jax.lax.scan(one, running, cut)
    done = done.reshape(full, -1)
    if full < rows:
        running, last = one(running, jax.tree.map(lambda x: x[full:], parts))
        done = jnp.concatenate([done, last])
    return running, done


def _add(
    u_RxE: jax.Array,
    scalars: Scalars,
    weight_R: jax.Array,
    of_u: Captions,
    running: _Running,
    part: tuple[jax.Array, Captions, jax.Array],
) -> tuple[_Running, jax.Array]:
    (v_CxE, of_v, dv_CxE), (log_scale, bias) = part, scalars
    scale = jnp.exp(log_scale)
    scaled_RxC = scale * jnp.matmul(u_RxE, v_CxE.T, precision=EXACT)
    logits_RxC = scaled_RxC + bias
    own_RxC = of_u.row[:, None] == of_v.row
    exists_RxC = (weight_R > 0)[:, None] & of_v.counts
    if of_u.group is not None:
        exists_RxC &= own_RxC | (of_u.group[:, None] != of_v.group)
    signed_RxC = jnp.where(own_RxC, -logits_RxC, logits_RxC)
    cost_RxC = jnp.where(exists_RxC, jax.nn.softplus(signed_RxC), 0.0)
    slope_RxC = jnp.where(own_RxC, -1.0, 1.0) * jax.nn.sigmoid(signed_RxC)
    slope_RxC = jnp.where(exists_RxC, slope_RxC, 0.0) * weight_R[:, None]
    # the softmax over the other captions, for the bits
    others_RxC = jnp.where(exists_RxC & ~own_RxC, scaled_RxC, ABSENT)
    largest_R = jnp.maximum(running.largest_R, others_RxC.max(1))
    sum_R = running.sum_R * jnp.exp(running.largest_R - largest_R)
    sum_R += jnp.exp(others_RxC - largest_R[:, None]).sum(1)
    gradient_RxC = scale * slope_RxC
    return _Running(
        running.loss_R + cost_RxC.sum(1),
        running.own_R + jnp.where(own_RxC, scaled_RxC, 0.0).sum(1),
        largest_R,
        sum_R,
        running.du_RxE + jnp.matmul(gradient_RxC, v_CxE, precision=EXACT),
        (
            running.of_scalars[0] + (slope_RxC * scaled_RxC).sum(),
            running.of_scalars[1] + slope_RxC.sum(),
        ),
    ), dv_CxE + jnp.matmul(gradient_RxC.T, u_RxE, precision=EXACT)

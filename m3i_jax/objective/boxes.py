"""Boxes: areas, overlaps, the codec of box regression, anchors, and non-maximum suppression.

A box is x0, y0, x1, y1 in continuous pixels of an image whose top left corner is 0, 0: a box around
all of it is 0, 0, width, height, and no 1 is added anywhere. Everything is computed in float32,
whatever the input: bfloat16 has steps of 4 pixels at 1024. Shapes are static, and every function
works under `jax.jit` and `jax.vmap`.

N, M boxes; R anchors per cell of a map."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from m3i_jax.objective.manual_axes import vary_like
from m3i_jax.objective.numerics import assert_equal_shape, assert_shape, float32

LARGEST_LOG_SCALE = math.log(1000 / 16)
"""Upper limit of a decoded log of width or height, against overflow: as in Mask R-CNN."""
_FINITE = float(np.finfo(np.float32).max)
_BITS = 32  # of a word


def box_area(boxes_Nx4: ArrayLike) -> jax.Array:
    """Returns the area of each box, in square pixels.

    Args:
      boxes_Nx4: boxes, with any leading axes.

    Returns:
      float32 [N]; 0 for a box whose right or lower side is not beyond its other one.

    Raises:
      ValueError: the last axis is not 4.

    >>> box_area([[0, 0, 4, 3], [2, 2, 2, 9]]).tolist()
    [12.0, 0.0]
    """
    boxes_Nx4 = _boxes(boxes_Nx4, "boxes")
    side_Nx2 = jnp.maximum(boxes_Nx4[..., 2:] - boxes_Nx4[..., :2], 0)
    return _product(side_Nx2[..., 0], side_Nx2[..., 1])


def box_iou(a_Nx4: ArrayLike, b_Mx4: ArrayLike) -> jax.Array:
    """Computes the intersection over union of every box of a with every box of b.

    The value of a pair is rounded as torch and numpy round it, and is the same wherever a program
    computes it: no product is fused into a sum. So comparisons with a threshold, and for equality,
    have the result that these libraries have.

    Args:
      a_Nx4: boxes, with any leading axes.
      b_Mx4: boxes, with the same leading axes.

    Returns:
      float32 [N, M] in 0..1, without a unit; 0 for boxes that do not overlap, also if both have no
      area.

    Raises:
      ValueError: a last axis is not 4.

    >>> box_iou([[0, 0, 2, 2]], [[0, 0, 2, 2], [1, 0, 3, 2], [5, 5, 6, 6]]).round(4).tolist()
    [[1.0, 0.3333, 0.0]]
    """
    intersection_NxM, union_NxM = _overlap(_boxes(a_Nx4, "a"), _boxes(b_Mx4, "b"))
    return _ratio(intersection_NxM, union_NxM)


def generalized_box_iou(a_Nx4: ArrayLike, b_Mx4: ArrayLike) -> jax.Array:
    """Computes the generalised IoU (Rezatofighi et al., CVPR 2019) of every box of a with every box
    of b: IoU minus the share of their common bounding box that neither covers. Unlike IoU it has a
    gradient where boxes do not overlap; `1 - generalized_box_iou` is the loss of DETR and DINO.

    Args:
      a_Nx4: boxes, with any leading axes.
      b_Mx4: boxes, with the same leading axes.

    Returns:
      float32 [N, M] in -1..1, without a unit. It and its gradient are finite for boxes of no area.

    Raises:
      ValueError: a last axis is not 4.

    >>> generalized_box_iou([[0, 0, 2, 2]], [[0, 0, 2, 2], [4, 0, 6, 2]]).round(4).tolist()
    [[1.0, -0.3333]]
    """
    a_Nx4, b_Mx4 = _boxes(a_Nx4, "a"), _boxes(b_Mx4, "b")
    intersection_NxM, union_NxM = _overlap(a_Nx4, b_Mx4)
    low_NxMx2 = jnp.minimum(a_Nx4[..., :, None, :2], b_Mx4[..., None, :, :2])
    high_NxMx2 = jnp.maximum(a_Nx4[..., :, None, 2:], b_Mx4[..., None, :, 2:])
    side_NxMx2 = jnp.maximum(high_NxMx2 - low_NxMx2, 0)
    hull_NxM = _product(side_NxMx2[..., 0], side_NxMx2[..., 1])
    return _ratio(intersection_NxM, union_NxM) - _ratio(hull_NxM - union_NxM, hull_NxM)


def encode_boxes(
    boxes_Nx4: ArrayLike,
    anchors_Nx4: ArrayLike,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
) -> jax.Array:
    """Returns the targets of box regression: how to move and scale each anchor onto its box (R-CNN,
    Girshick et al. 2014): `(dx / w, dy / h, ln(w' / w), ln(h' / h))` times the weights, where w and
    h are of the anchor, w' and h' of the box, dx and dy between the centres.

    Args:
      boxes_Nx4: boxes to reach.
      anchors_Nx4: anchors or proposals to start from; broadcasts against the boxes.
      weights: of x, y, width and height; (1, 1, 1, 1) in the region proposal network, (10, 10, 5,
        5) in the box head.

    Returns:
      float32 [N, 4], without a unit, finite also where a box or an anchor has no area (padding),
      which the caller must weigh with 0.

    Raises:
      ValueError: a last axis is not 4, or there are not four weights.

    >>> encode_boxes([[2, 2, 6, 10]], [[0, 0, 4, 4]]).round(4).tolist()
    [[0.5, 1.0, 0.0, 0.6931]]
    """
    size_Nx2, center_Nx2 = _size_center(_boxes(boxes_Nx4, "boxes"))
    from_Nx2, origin_Nx2 = _size_center(_boxes(anchors_Nx4, "anchors"))
    from_Nx2 = jnp.where(from_Nx2 > 0, from_Nx2, 1.0)
    move_Nx2 = (center_Nx2 - origin_Nx2) / from_Nx2
    scale_Nx2 = jnp.log(jnp.where(size_Nx2 > 0, size_Nx2, from_Nx2) / from_Nx2)
    return jnp.concatenate([move_Nx2, scale_Nx2], -1) * _weights(weights)


def decode_boxes(
    deltas_Nx4: ArrayLike,
    anchors_Nx4: ArrayLike,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
) -> jax.Array:
    """Returns the boxes that predicted deltas mean: the inverse of `encode_boxes`. A log of width
    or height is at most ln(1000 / 16); it has no lower limit.

    Args:
      deltas_Nx4: predictions.
      anchors_Nx4: anchors or proposals; broadcasts against the deltas, so that `[N, 1, 4]` with
        deltas `[N, K, 4]` decodes one box per category.
      weights: those of `encode_boxes`.

    Returns:
      float32 [N, 4], boxes in pixels, not clipped to the image.

    Raises:
      ValueError: a last axis is not 4, or there are not four weights.

    >>> anchor = [[0., 0., 4., 4.]]
    >>> decode_boxes(encode_boxes([[2, 2, 6, 10]], anchor), anchor).round(4).tolist()
    [[2.0, 2.0, 6.0, 10.0]]
    """
    deltas_Nx4 = _boxes(deltas_Nx4, "deltas") / _weights(weights)
    from_Nx2, origin_Nx2 = _size_center(_boxes(anchors_Nx4, "anchors"))
    size_Nx2 = jnp.exp(jnp.minimum(deltas_Nx4[..., 2:], LARGEST_LOG_SCALE)) * from_Nx2
    center_Nx2 = deltas_Nx4[..., :2] * from_Nx2 + origin_Nx2
    return jnp.concatenate([center_Nx2 - 0.5 * size_Nx2, center_Nx2 + 0.5 * size_Nx2], -1)


def center_boxes(boxes_Nx4: ArrayLike) -> jax.Array:
    """Returns boxes as centre and sides, (x, y, width, height), the form in which DETR predicts
    them.

    >>> center_boxes([[0, 0, 4, 2]]).tolist()
    [[2.0, 1.0, 4.0, 2.0]]
    """
    size_Nx2, center_Nx2 = _size_center(_boxes(boxes_Nx4, "boxes"))
    return jnp.concatenate([center_Nx2, size_Nx2], -1)


def corner_boxes(centers_Nx4: ArrayLike) -> jax.Array:
    """Returns the inverse of `center_boxes`.

    >>> corner_boxes([[2, 1, 4, 2]]).tolist()
    [[0.0, 0.0, 4.0, 2.0]]
    """
    boxes_Nx4 = _boxes(centers_Nx4, "boxes")
    center_Nx2, half_Nx2 = boxes_Nx4[..., :2], 0.5 * boxes_Nx4[..., 2:]
    return jnp.concatenate([center_Nx2 - half_Nx2, center_Nx2 + half_Nx2], -1)


def clip_boxes(boxes_Nx4: ArrayLike, size_2: ArrayLike) -> jax.Array:
    """Returns boxes cut to an image. A box outside becomes one of no area on the border.

    Args:
      boxes_Nx4: boxes.
      size_2: height and width of the image in pixels, in this order.

    Returns:
      float32 [N, 4].

    Raises:
      ValueError: the last axis is not 4, or the size is not two numbers.

    >>> clip_boxes([[-5, 1, 30, 9]], (8, 20)).tolist()
    [[0.0, 1.0, 20.0, 8.0]]
    """
    boxes_Nx4, size_2 = _boxes(boxes_Nx4, "boxes"), float32(size_2)
    assert_shape(size_2, (2,), custom_message="size_2 must be (height, width)")
    return jnp.clip(boxes_Nx4, 0.0, jnp.tile(size_2[::-1], 2))


def anchors(
    grid: tuple[int, int], stride: int, sizes: Sequence[float], ratios: Sequence[float]
) -> jax.Array:
    """Returns the anchors of one map: boxes of fixed sizes and shapes around the place of every
    cell.

    Cell (row i, column j) has its anchors around x = j stride, y = i stride: the offset 0 of
    detectron2, where the first anchors lie around the corner of the image. An anchor of size s and
    ratio r has the area s^2 and the height over width r.

    Args:
      grid: rows and columns of the map.
      stride: pixels from a cell to the next.
      sizes: square roots of the areas, in pixels.
      ratios: heights over widths.

    Returns:
      float32 [rows * columns * R, 4] with R = len(sizes) * len(ratios), in the order of rows,
      columns, sizes, ratios. Anchors beyond the image are not cut.

    >>> anchors((1, 2), 8, sizes=(4,), ratios=(0.25, 1.0)).tolist()
    [[-4.0, -1.0, 4.0, 1.0], [-2.0, -2.0, 2.0, 2.0], [4.0, -1.0, 12.0, 1.0], [6.0, -2.0, 10.0, 2.0]]
    """
    widths = [(math.sqrt(s * s / r), r) for s in sizes for r in ratios]
    cell_Rx4 = np.array([(-w / 2, -r * w / 2, w / 2, r * w / 2) for w, r in widths], np.float32)
    y, x = (stride * jnp.arange(n, dtype=jnp.float32) for n in grid)
    place_HxWx2 = jnp.stack(jnp.broadcast_arrays(x[None, :], y[:, None]), -1)
    return (jnp.tile(place_HxWx2, 2)[:, :, None] + cell_Rx4).reshape(-1, 4)


def nms(
    boxes_Nx4: ArrayLike,
    scores_N: ArrayLike,
    threshold: float | jax.Array,
    groups_N: ArrayLike | None = None,
    valid_N: ArrayLike | None = None,
) -> jax.Array:
    """Applies non-maximum suppression: which boxes stay if, from the best score to the worst, each
    box that stays removes the later ones whose IoU with it is above the threshold.

    The result is that of the sequential algorithm (torchvision's `nms`), also with equal scores, of
    which the first box comes first. It is found as a fixed point: all boxes are tried at once
    against those that stay, again and again until nothing changes. After k rounds the first k boxes
    are right; overlaps seldom chain, and real detections take 2 to 7 rounds.

    Groups are compared, not shifted apart by coordinates, so that no precision is lost. The IoU of
    all pairs is in memory, 4 N^2 bytes: 0.4 GB for 10,000 boxes.

    Args:
      boxes_Nx4: boxes.
      scores_N: any order; NaN comes last.
      threshold: IoU above which the lower box goes, 0..1. A Python number is compared as such: the
        float32 IoU 0.3 is a little above 0.3, and so it is in torchvision on a CPU.
      groups_N: integers, such as categories or levels; boxes of different groups do not remove each
        other. None: one group.
      valid_N: bool; a box that is not valid (padding) does not stay and removes nothing. None: all.

    Returns:
      bool [N], in the order of the input.

    Raises:
      ValueError: shapes that do not belong together.

    >>> boxes = [[0, 0, 4, 4], [0, 0, 4, 5], [9, 9, 12, 12], [0, 0, 4, 4]]
    >>> nms(boxes, [0.8, 0.9, 0.1, 0.7], 0.5).tolist()
    [False, True, True, False]
    >>> nms(boxes, [0.8, 0.9, 0.1, 0.7], 0.5, groups_N=[0, 0, 0, 1]).tolist()
    [False, True, True, True]
    """
    boxes_Nx4, scores_N = _boxes(boxes_Nx4, "boxes"), float32(scores_N)
    assert_shape(scores_N, boxes_Nx4.shape[:-1], custom_message="one score per box")
    if not scores_N.size:
        return jnp.zeros(scores_N.shape, bool)
    order_N = jnp.argsort(-scores_N, stable=True)
    boxes_Nx4 = boxes_Nx4[order_N]
    rank_N = jnp.arange(len(order_N))
    padding = (0, -len(order_N) % _BITS)
    before_PxN = jnp.arange(len(order_N) + padding[1])[:, None] < rank_N
    iou_PxN = box_iou(jnp.pad(boxes_Nx4, (padding, (0, 0))), boxes_Nx4)
    removes_PxN = (iou_PxN > _rounded_down(threshold)) & before_PxN
    if groups_N is not None:
        groups_N = jnp.asarray(groups_N)
        assert_equal_shape([groups_N, scores_N], custom_message="one group per box")
        groups_N = groups_N[order_N]
        removes_PxN &= jnp.pad(groups_N, padding)[:, None] == groups_N
    if valid_N is None:
        valid_N = jnp.ones(scores_N.shape, bool)
    else:
        valid_N = jnp.asarray(valid_N, bool)
        assert_equal_shape([valid_N, scores_N], custom_message="one `valid` per box")
        valid_N = valid_N[order_N]
    removes_WxN = _bits(removes_PxN)  # 32 boxes a word: a round reads little memory

    def changes(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        return carry[1]

    def one_round(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        keep_N, _ = carry
        keep_Wx1 = _bits(jnp.pad(keep_N, padding)[:, None])
        next_N = valid_N & ~((removes_WxN & keep_Wx1) != 0).any(0)
        return next_N, (next_N != keep_N).any()

    start = vary_like((valid_N, jnp.array(True)), (valid_N, removes_WxN))
    keep_N, _ = jax.lax.while_loop(changes, one_round, start)
    return jnp.zeros_like(keep_N).at[order_N].set(keep_N, unique_indices=True)


def _bits(x_PxN: jax.Array) -> jax.Array:
    """Rows of bool, 32 of them in a word: uint32 [P / 32, N]."""
    x_WxBxN = x_PxN.reshape(-1, _BITS, x_PxN.shape[1]).astype(jnp.uint32)
    place_Bx1 = jnp.arange(_BITS, dtype=jnp.uint32)[:, None]
    return (x_WxBxN << place_Bx1).sum(1, dtype=jnp.uint32)


def _boxes(boxes: ArrayLike, name: str) -> jax.Array:
    boxes = float32(boxes)
    if boxes.ndim < 1 or boxes.shape[-1] != 4:
        raise ValueError(f"{name} have shape {list(boxes.shape)}; the last axis must be 4")
    return boxes


def _weights(weights: Sequence[float]) -> jax.Array:
    weights_4 = jnp.asarray(weights, jnp.float32)
    assert_shape(weights_4, (4,), custom_message="weights must be four numbers")
    return weights_4


def _size_center(boxes_Nx4: jax.Array) -> tuple[jax.Array, jax.Array]:
    size_Nx2 = boxes_Nx4[..., 2:] - boxes_Nx4[..., :2]
    return size_Nx2, boxes_Nx4[..., :2] + 0.5 * size_Nx2


def _overlap(a_Nx4: jax.Array, b_Mx4: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(intersection, union), [N, M] square pixels each."""
    low_NxMx2 = jnp.maximum(a_Nx4[..., :, None, :2], b_Mx4[..., None, :, :2])
    high_NxMx2 = jnp.minimum(a_Nx4[..., :, None, 2:], b_Mx4[..., None, :, 2:])
    side_NxMx2 = jnp.maximum(high_NxMx2 - low_NxMx2, 0)
    intersection_NxM = _product(side_NxMx2[..., 0], side_NxMx2[..., 1])
    both_NxM = box_area(a_Nx4)[..., :, None] + box_area(b_Mx4)[..., None, :]
    return intersection_NxM, both_NxM - intersection_NxM


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a * b, rounded. Without the minimum, compilers fuse the product with a sum that follows, in
    some places of a program and not in others; the results then differ in the last bit."""
    return jnp.minimum(a * b, _FINITE)


def _rounded_down(threshold: float | jax.Array) -> float | jax.Array:
    """The greatest float32 that is not above a Python number: a float32 is above the one if it is
    above the other."""
    if not isinstance(threshold, int | float):
        return threshold
    nearest = np.float32(threshold)
    above = float(nearest) > threshold  # as float64: numpy compares with a Python number in float32
    return float(np.nextafter(nearest, np.float32(-np.inf)) if above else nearest)


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b; 0 where b is 0, in the gradient, too."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)

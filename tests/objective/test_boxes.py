"""Boxes against torchvision's arrays (tests/data/make_dense_boxes.py) and loops in numpy."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax.objective import boxes as box_functions
from tests.data.make_dense_boxes import THRESHOLDS, WEIGHTS, crowded_boxes, grid_boxes
from tests.objective import numeric

TORCH = dict(np.load(pathlib.Path(__file__).parents[1] / "data" / "dense" / "boxes.npz"))
boxes = numeric.compiled(
    box_functions,
    box_area=(),
    box_iou=(),
    generalized_box_iou=(),
    encode_boxes=(),
    decode_boxes=(),
    clip_boxes=(),
    anchors=("grid", "stride", "sizes", "ratios"),
    nms=("threshold",),
)
CODECS = {"one": (1.0, 1.0, 1.0, 1.0), "head": WEIGHTS}


def numpy_iou(a, b):
    low, high = np.maximum(a[:, None, :2], b[:, :2]), np.minimum(a[:, None, 2:], b[:, 2:])
    inner = np.maximum(high - low, 0).prod(-1)
    area = [np.maximum(x[:, 2:] - x[:, :2], 0).prod(-1) for x in (a, b)]
    union = area[0][:, None] + area[1] - inner
    return np.divide(inner, union, out=np.zeros_like(inner), where=union > 0)


def test_areas_and_overlaps_have_the_bits_of_torchvision():
    a, b = TORCH["a"], TORCH["b"]
    np.testing.assert_array_equal(boxes.box_area(b), TORCH["area"])
    both = jax.jit(lambda a, b: (boxes.box_iou(a, b), boxes.generalized_box_iou(a, b)))
    iou, giou = both(a, b)
    undefined = np.isnan(TORCH["iou"])  # two boxes of no area, apart
    assert undefined.sum() == 1
    np.testing.assert_array_equal(iou, np.where(undefined, 0, TORCH["iou"]))
    np.testing.assert_allclose(giou, np.where(undefined, -1, TORCH["giou"]), atol=1e-6)
    assert (np.asarray(iou) <= 1).all() and np.asarray(giou).min() < -0.5


def test_overlaps_are_the_same_in_every_program():
    """A fused product would change the last bit of one in fifteen of these pairs."""
    a, b = crowded_boxes(np.random.default_rng(0), 2000).reshape(2, 1000, 4)
    expected = numpy_iou(a, b)

    def compiled(function, *arrays):
        # as users compile: the tests' own settings switch the fusing off
        options = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
        return jax.jit(function).lower(*arrays).compile(compiler_options=options)(*arrays)

    np.testing.assert_array_equal(compiled(boxes.box_iou, a, b), expected)
    best = compiled(jax.vmap(lambda a, b: boxes.box_iou(a, b).max(1)), a[None], b[None])[0]
    np.testing.assert_array_equal(best, expected.max(1))


def test_generalized_iou_has_the_gradient_of_torchvision():
    def loss(a, b):
        return (1 - jnp.diagonal(boxes.generalized_box_iou(a, b))).sum()

    by_a, by_b = jax.jit(jax.grad(loss, (0, 1)))(TORCH["pairs"], TORCH["goals"])
    np.testing.assert_allclose(by_a, TORCH["pairs/gradient"], atol=1e-6)
    np.testing.assert_allclose(by_b, TORCH["goals/gradient"], atol=1e-6)


def test_boxes_of_no_area_have_finite_values_and_gradients():
    nothing, deltas = np.zeros((2, 4), np.float32), np.ones((2, 4), np.float32)

    def loss(a, b):
        overlap = boxes.generalized_box_iou(a, b).sum() + boxes.box_iou(a, b).sum()
        return overlap + boxes.encode_boxes(a, b).sum() + boxes.decode_boxes(deltas, b).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss, (0, 1)))(nothing, nothing)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradient)


@pytest.mark.parametrize("name", CODECS)
def test_the_codec_is_that_of_torchvision(name):
    encode, decode = jax.jit(boxes.encode_boxes), jax.jit(boxes.decode_boxes)
    weights, starts = CODECS[name], TORCH["starts"]
    encoded = encode(TORCH["pairs"], starts, weights)
    np.testing.assert_allclose(encoded, TORCH[f"encoded/{name}"], rtol=1e-5, atol=1e-5)
    decoded, expected = decode(TORCH[f"deltas/{name}"], starts, weights), TORCH[f"decoded/{name}"]
    np.testing.assert_allclose(decoded, expected, rtol=1e-5, atol=1e-4)
    back = decode(encoded, starts, weights)
    np.testing.assert_allclose(back, TORCH["pairs"], atol=1e-4)


def test_a_scale_has_an_upper_limit_and_no_lower_one():
    anchor = np.float32([[0, 0, 16, 16]])
    large, small = boxes.decode_boxes([[0, 0, 99, 99], [0, 0, -9, -9]], anchor)
    np.testing.assert_allclose(large, [-492, -492, 508, 508], rtol=1e-5)
    np.testing.assert_allclose(small[2:] - small[:2], 16 * np.exp(-9), rtol=1e-2)


def test_one_box_per_category_is_decoded_by_broadcasting():
    deltas, starts = np.random.default_rng(0).normal(size=(5, 3, 4)), TORCH["starts"][:5]
    together = boxes.decode_boxes(deltas, starts[:, None], WEIGHTS)
    assert together.shape == (5, 3, 4)
    np.testing.assert_allclose(
        together[:, 1], boxes.decode_boxes(deltas[:, 1], starts, WEIGHTS), rtol=1e-6
    )


def test_boxes_are_clipped_to_height_and_width():
    np.testing.assert_array_equal(boxes.clip_boxes(TORCH["b"] - 10, (40, 56)), TORCH["clipped"])


def test_anchors_are_those_of_a_loop():
    grid, stride, sizes, ratios = (3, 5), 16, (32, 48), (0.5, 1.0, 2.0)
    expected = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            for size in sizes:
                for ratio in ratios:
                    width = np.sqrt(size * size / ratio)
                    x, y, height = column * stride, row * stride, ratio * width
                    corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
                    expected.append(corners)
    made = boxes.anchors(grid, stride, sizes, ratios)
    assert made.shape == (3 * 5 * 6, 4) and made.dtype == jnp.float32
    np.testing.assert_allclose(made, expected, atol=1e-5)


def test_vitdet_has_261888_anchors():
    shapes = [jax.eval_shape(lambda n=n: boxes.anchors((n, n), 1024 // n, (1,), (0.5, 1, 2))) for n
              in (256, 128, 64, 32, 16)]  # fmt: skip
    assert sum(shape.shape[0] for shape in shapes) == 261_888


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("name", ["random", "crowded", "ties"])
def test_suppression_keeps_what_torchvision_keeps(name, threshold):
    place, score, group = (TORCH[f"nms/{name}/{key}"] for key in ("boxes", "scores", "groups"))
    suppress = jax.jit(lambda *given: boxes.nms(place, score, threshold, *given))
    np.testing.assert_array_equal(suppress(), TORCH[f"nms/{name}/{threshold}"])
    np.testing.assert_array_equal(suppress(group), TORCH[f"nms/{name}/{threshold}/grouped"])


def sequential_nms(boxes_Nx4, scores, threshold):
    """The textbook loop, in float32."""
    overlap = numpy_iou(boxes_Nx4, boxes_Nx4)
    keep, gone = np.zeros(len(scores), bool), np.zeros(len(scores), bool)
    for here in np.argsort(-scores, kind="stable"):
        if not gone[here]:
            keep[here] = True
            gone |= overlap[here] > threshold
    return keep


def test_many_suppressions_at_once_and_padding():
    rng, shape = np.random.default_rng(1), (40, 60)
    makers = (crowded_boxes, grid_boxes)
    boxes_BxNx4 = np.stack([makers[i % 2](rng, shape[1]) for i in range(shape[0])])
    scores_BxN = rng.integers(0, 12, shape).astype(np.float32)
    valid_BxN = rng.random(shape) < rng.uniform(0, 1.1, (shape[0], 1))
    boxes_BxNx4[~valid_BxN] = np.nan
    suppress = jax.jit(jax.vmap(lambda b, s, v: boxes.nms(b, s, 0.5, valid_N=v)))
    keep_BxN = np.asarray(suppress(boxes_BxNx4, scores_BxN, valid_BxN))
    assert not keep_BxN[~valid_BxN].any() and 0.05 < keep_BxN.mean() < 0.5
    for keep_N, boxes_Nx4, scores_N, valid_N in zip(
        keep_BxN, boxes_BxNx4, scores_BxN, valid_BxN, strict=True
    ):
        if valid_N.any():
            expected = sequential_nms(boxes_Nx4[valid_N], scores_N[valid_N], 0.5)
            np.testing.assert_array_equal(keep_N[valid_N], expected)


def test_no_box_at_all():
    assert boxes.nms(np.zeros((0, 4)), np.zeros(0), 0.5, np.zeros(0), np.zeros(0)).shape == (0,)


def test_a_chain_of_boxes_is_settled_from_the_first():
    """Every box removes the next: only every other one stays, after as many rounds as boxes."""
    x = np.arange(50, dtype=np.float32)
    chain = np.stack([x, 0 * x, x + 4, 0 * x + 4], 1)
    keep = jax.jit(lambda b, s: boxes.nms(b, s, 0.5))(chain, -x)
    np.testing.assert_array_equal(keep, np.arange(50) % 2 == 0)


def test_float32_whatever_the_input():
    half = jnp.array([[1000.0, 1000.0, 1004.0, 1008.0]], jnp.bfloat16)
    assert boxes.box_area(half).dtype == boxes.decode_boxes(half * 0, half).dtype == jnp.float32
    np.testing.assert_array_equal(boxes.decode_boxes(half * 0, half), np.float32(half))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: boxes.box_area(np.zeros((3, 5))), r"boxes have shape \[3, 5\]; the last axis"),
        (lambda: boxes.box_iou(np.zeros((3, 4)), np.zeros(3)), "b have shape"),
        (lambda: boxes.encode_boxes(*np.zeros((2, 3, 4)), (1, 1)), "four numbers"),
        (lambda: boxes.clip_boxes(np.zeros((3, 4)), 5), "height, width"),
        (lambda: boxes.nms(np.zeros((3, 4)), np.zeros(4), 0.5), "one score per box"),
        (lambda: boxes.nms(np.zeros((3, 4)), np.zeros(3), 0.5, np.zeros(2)), "one group per box"),
    ],
)
def test_wrong_shapes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

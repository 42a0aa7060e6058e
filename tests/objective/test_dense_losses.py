"""Losses of segmentation and detection against values and gradients of torch
(tests/data/make_dense_losses.py) and loops in numpy."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax.objective import box_matching, dense_losses
from tests.data.make_dense_losses import FOCAL
from tests.objective.numeric import compiled

TORCH = dict(np.load(pathlib.Path(__file__).parents[1] / "data" / "dense" / "losses.npz"))
losses = compiled(
    dense_losses,
    pixel_cross_entropy=(),
    binary_cross_entropy=(),
    sigmoid_focal=("alpha", "gamma"),
    dice=(),
    federated_categories=("count",),
    federated_cross_entropy=("count",),
)
LOGITS, SOFT, HARD = (TORCH[f"elements/{name}"] for name in ("logits", "soft", "hard"))


def check(name, loss, logits, counts):
    """Value, gradient and counts of `loss(logits)` against torch's."""

    def total(x):
        first, *rest = loss(x)
        return first, rest

    program = jax.jit(jax.value_and_grad(total, has_aux=True))
    (value, rest), gradient = program(logits)
    np.testing.assert_allclose(value, TORCH[f"{name}/value"], rtol=1e-5)
    expected = TORCH[f"{name}/gradient"]
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    assert np.abs(expected).max() > 0.04
    np.testing.assert_allclose(rest, counts)


def test_pixels_cost_what_torch_says_with_both_divisors():
    labels = TORCH["pixel/labels"]
    counts = [(labels != 255).sum(), labels.size]
    assert counts[0] < 0.8 * counts[1]
    check("pixel", lambda x: losses.pixel_cross_entropy(x, labels), TORCH["pixel/logits"], counts)


def test_ignored_pixels_may_be_anything():
    logits, labels = np.zeros((1, 1, 2, 3), np.float32), np.array([[[1, 255]]], np.uint8)
    logits[0, 0, 1] = np.nan
    value, gradient = jax.value_and_grad(lambda x: losses.pixel_cross_entropy(x, labels)[0])(logits)
    assert value == pytest.approx(np.log(3)) and np.isfinite(gradient).all()
    nothing = losses.pixel_cross_entropy(logits, np.full((1, 1, 2), 255))
    assert [float(x) for x in nothing] == [0, 0, 2]
    assert np.isnan(losses.pixel_cross_entropy(np.zeros((1, 1, 2, 3)), np.array([[[1, 7]]]))[0])


def test_a_category_of_number_255_costs_what_others_cost():
    total, labelled, _ = losses.pixel_cross_entropy(np.zeros((2, 256)), [255, -1], ignore=-1)
    np.testing.assert_allclose([total, labelled], [np.log(256), 1], rtol=1e-6)


def test_binary_cross_entropy_is_that_of_torch():
    check("binary", lambda x: losses.binary_cross_entropy(x, SOFT), LOGITS, [SOFT.size])


@pytest.mark.parametrize("name", FOCAL)
def test_focal_loss_is_that_of_torchvision(name):
    alpha, gamma = FOCAL[name]
    check(
        f"focal/{name}",
        lambda x: losses.sigmoid_focal(x, HARD, alpha=alpha, gamma=gamma),
        LOGITS,
        [HARD.sum()],
    )


@pytest.mark.parametrize("rows", [(2, 3), (3, 2)])  # of classes, of weights
def test_focal_loss_of_classes_has_a_class_and_a_weight_per_row(rows):
    with pytest.raises(ValueError, match="one (class|weight) per row"):
        box_matching.focal_class_loss(np.zeros((3, 2)), np.zeros(rows[0], int), np.ones(rows[1]))


def test_dice_is_that_of_torch():
    check("dice", lambda x: losses.dice(x, HARD), LOGITS, [9])


@pytest.mark.parametrize(
    "loss",
    [losses.binary_cross_entropy, losses.sigmoid_focal, losses.dice],
    ids=lambda f: f.__name__,
)
def test_rows_of_weight_0_are_not_there(loss):
    weight = np.float32([1, 0, 2, 0, 1, 1, 0, 0, 1])
    bad = np.where(weight[:, None] > 0, LOGITS, np.nan)

    def total(x, w):
        return loss(x, HARD, w)[0]

    value, gradient = jax.jit(jax.value_and_grad(total))(bad, weight)
    rows = [loss(LOGITS[r : r + 1], HARD[r : r + 1]) for r in range(9)]
    np.testing.assert_allclose(value, weight @ [float(s) for s, _ in rows], rtol=1e-5)
    np.testing.assert_allclose(
        loss(bad, HARD, weight)[1], weight @ [float(n) for _, n in rows], rtol=1e-6
    )
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[weight == 0].any()


def test_weights_of_elements_and_of_leading_axes_are_the_same():
    weight = np.float32([1, 0, 2, 0, 1, 1, 0, 0, 1])
    both = [
        losses.binary_cross_entropy(LOGITS, SOFT, w)
        for w in (weight, np.tile(weight[:, None], (1, 11)))
    ]
    np.testing.assert_allclose(*both, rtol=1e-6)


def test_sure_predictions_have_finite_losses_and_gradients():
    logits = np.float32([[200, -200, 200, -200, 0]])
    targets = np.float32([[1, 0, 0, 1, 1]])
    for options in ({}, {"gamma": 0.5}, {"gamma": 0.0}):
        value, gradient = jax.value_and_grad(
            lambda x, options=options: losses.sigmoid_focal(x, targets, **options)[0]
        )(logits)
        assert np.isfinite(value) and np.isfinite(gradient).all() and value > 199
    value, gradient = jax.value_and_grad(lambda x: losses.binary_cross_entropy(x, targets)[0])(
        logits
    )
    assert value == pytest.approx(400 + np.log(2))
    np.testing.assert_allclose(gradient, [[0, 0, 1, -1, -0.5]], atol=1e-6)


def test_the_federated_loss_is_that_of_torch_for_its_categories():
    logits, classes = TORCH["federated/logits"], TORCH["federated/classes"]
    kept = TORCH["federated/kept"]
    # large numbers draw the seven others
    uniform = np.where(kept, 0.9, 0.1).astype(np.float32)
    count = len(np.unique(classes)) + 7  # background is among the first
    check(
        "federated",
        lambda x: losses.federated_cross_entropy(x, classes, uniform_K=uniform, count=count),
        logits,
        [20],
    )
    np.testing.assert_array_equal(
        losses.federated_categories(classes, None, uniform, count=count), kept
    )


def test_slots_that_are_not_filled_bring_no_category():
    classes, weight = np.array([3, 9, 4, 7]), np.float32([1, 1, 0, 0])
    uniform = np.zeros(9, np.float32)
    kept = losses.federated_categories(classes, weight, uniform, count=2)
    assert np.flatnonzero(kept).tolist() == [3]
    logits = np.full((4, 9), np.nan, np.float32)
    logits[:2] = 0
    total, regions = losses.federated_cross_entropy(
        logits, classes, weight, uniform_K=uniform, count=2
    )
    assert total == pytest.approx(2 * np.log(2)) and regions == 2


def test_49_categories_beside_background():
    classes = np.array([1, 2, 2, 1203])
    uniform = np.random.default_rng(0).random(1203).astype(np.float32)
    kept = np.asarray(losses.federated_categories(classes, None, uniform))
    assert kept.sum() == 49 and kept[[1, 2]].all()
    assert losses.federated_categories(classes[:3], None, uniform).sum() == 50
    many = np.arange(60)  # none is drawn, none is dropped
    np.testing.assert_array_equal(
        losses.federated_categories(many, None, uniform), np.arange(1203) < 60
    )


def test_categories_are_drawn_as_without_replacement():
    """Against drawing one after the other in numpy, as torch.multinomial does."""
    frequency = np.array([1, 4, 9, 16, 25, 0, 100, 400], np.float32)
    classes, draws = np.array([2, 8]), 6000
    uniform = np.random.default_rng(0).random((draws, 8)).astype(np.float32)
    program = jax.jit(
        jax.vmap(lambda u: losses.federated_categories(classes, None, u, frequency, count=5))
    )
    share = np.asarray(program(uniform)).mean(0)
    weight = frequency**0.5
    weight[2] = 0
    rng, expected = np.random.default_rng(1), np.zeros(8)
    for _ in range(draws):
        expected[rng.choice(8, 3, replace=False, p=weight / weight.sum())] += 1 / draws
    assert share[2] == 1 and share[5] == 0
    expected[2] = 1
    np.testing.assert_allclose(share, expected, atol=5 * (0.5 / draws) ** 0.5)
    # never drawn, even if nothing else is left
    everything = losses.federated_categories(classes, None, uniform[0], frequency, count=50)
    assert everything.sum() == 7 and not everything[5]


def test_bfloat16_is_computed_in_float32():
    half = jnp.asarray(LOGITS, jnp.bfloat16)
    for loss in (losses.binary_cross_entropy, losses.sigmoid_focal, losses.dice):
        got, expected = loss(half, HARD), loss(np.float32(half), HARD)
        assert got[0].dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.pixel_cross_entropy(np.zeros((1, 2, 2, 3)), np.zeros((1, 2, 3))), "pixel"),
        (lambda: losses.pixel_cross_entropy(np.zeros((2, 256)), np.full(2, 255)), "255 is ignored"),
        (lambda: losses.binary_cross_entropy(np.zeros(3), np.zeros(2)), "logits and targets"),
        (
            lambda: losses.binary_cross_entropy(np.zeros((3, 2)), np.zeros((3, 2)), np.ones(2)),
            "lea",
        ),
        (lambda: losses.sigmoid_focal(np.zeros(3), np.zeros(3), gamma=-1), "gamma is -1"),
        (lambda: losses.dice(np.zeros(()), np.zeros(())), "scalars"),
        (
            lambda: losses.federated_categories(np.zeros(2, int), None, np.zeros(4), np.ones(3)),
            "one frequency per category",
        ),
        (
            lambda: losses.federated_cross_entropy(
                np.zeros((2, 4)), np.zeros(3, int), uniform_K=np.zeros(4)
            ),
            "one category per row",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

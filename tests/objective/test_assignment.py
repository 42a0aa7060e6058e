"""Labels by IoU and samples against torchvision's arrays and loops in numpy; optimal assignments
against scipy."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from m3i_jax.objective import assignment
from m3i_jax.objective.boxes import box_iou
from tests.data.make_dense_boxes import crowded_boxes

TORCH = dict(np.load(pathlib.Path(__file__).parents[1] / "data" / "dense" / "boxes.npz"))
KINDS = {
    "rpn": {"low": 0.3, "high": 0.7, "keep_best": True},
    "head": {"low": 0.5, "high": 0.5, "keep_best": False},
}


def match(objects, priors, valid, kind):
    """As a program does it: overlaps and labels in one."""
    program = jax.jit(lambda a, b, v: assignment.match_boxes(box_iou(a, b), v, **KINDS[kind]))
    return [np.asarray(x) for x in program(objects, priors, valid)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ties", "alone", "random"])
def test_labels_are_those_of_torchvision(name, kind):
    objects, priors = TORCH[f"match/{name}/objects"], TORCH[f"match/{name}/priors"]
    reference = TORCH[f"match/{name}/{kind}"]  # the object, or -1 background, -2 between
    padded = np.concatenate([objects, np.full((3, 4), 7, np.float32)])
    label, index = match(padded, priors, np.arange(len(padded)) < len(objects), kind)
    np.testing.assert_array_equal(label, np.select([reference >= 0, reference == -1], [1, 0], -1))
    np.testing.assert_array_equal(index, TORCH[f"match/{name}/index"])
    np.testing.assert_array_equal(index[label == 1], reference[label == 1])


@pytest.mark.parametrize("kind", KINDS)
def test_without_objects_all_is_background(kind):
    for objects in (0, 4):
        iou, valid = np.full((objects, 9), 0.9, np.float32), np.zeros(objects, bool)
        label, index = assignment.match_boxes(iou, valid, **KINDS[kind])
        assert label.tolist() == index.tolist() == [0] * 9
    no_anchor = assignment.match_boxes(np.zeros((3, 0)), np.ones(3, bool), **KINDS[kind])
    assert [x.shape for x in no_anchor] == [(0,), (0,)]


def test_every_object_keeps_its_best_anchors_in_one_compiled_program():
    """Equality holds between a program's own overlaps, whatever it fuses."""
    rng = np.random.default_rng(2)
    objects, priors = crowded_boxes(rng, 30 * 7).reshape(30, 7, 4), crowded_boxes(rng, 999)
    valid = np.ones((30, 7), bool)
    program = jax.jit(
        jax.vmap(
            lambda a, v: assignment.match_boxes(box_iou(a, priors), v, **KINDS["rpn"]),
        )
    )
    label, _ = program(objects, valid)
    overlap = np.asarray(jax.jit(jax.vmap(lambda a: box_iou(a, priors)))(objects))
    best = overlap == overlap.max(2, keepdims=True)
    best &= (objects[..., 2:] > objects[..., :2]).all(-1)[..., None]
    assert (np.asarray(label)[best.any(1)] == 1).all() and best.any(1).sum() >= 30 * 6


def test_a_lone_object_makes_foreground_of_all_that_miss_it():
    """As in the reference; the padding must not do the same."""
    iou = np.float32([[0.6, 0.2, 0.0], [0.0, 0.0, 0.0]])
    both = assignment.match_boxes(iou, np.array([True, True]), **KINDS["rpn"])[0]
    one = assignment.match_boxes(iou, np.array([True, False]), **KINDS["rpn"])[0]
    assert both.tolist() == [1, 1, 1] and one.tolist() == [1, 0, 0]


@pytest.mark.parametrize(("positives", "negatives"), [(9, 40), (3, 40), (20, 2), (0, 40), (0, 0)])
def test_a_sample_has_its_shares(positives, negatives):
    rng, count, most = np.random.default_rng(0), 16, 6
    label = rng.permutation(np.repeat([1, 0, -1], [positives, negatives, 11]))
    uniform = rng.random(len(label)).astype(np.float32)
    sample = jax.jit(assignment.sample_labels, static_argnums=(2, 3))
    index, is_foreground, weight = (np.asarray(x) for x in sample(label, uniform, count, most))
    front = min(positives, most)
    back = min(negatives, count - front)
    assert index.shape == is_foreground.shape == weight.shape == (count,)
    assert is_foreground.tolist() == [True] * front + [False] * (count - front)
    assert weight.tolist() == [1.0] * (front + back) + [0.0] * (count - front - back)
    assert (label[index[:front]] == 1).all() and (label[index[front : front + back]] == 0).all()
    assert len(set(index[: front + back])) == front + back
    assert index.min() >= 0 and index.max() < len(label)
    for kind, chosen in ((1, index[:front]), (0, index[front : front + back])):
        # those with the greatest numbers
        others = np.setdiff1d(np.flatnonzero(label == kind), chosen)
        if len(others) and len(chosen):
            assert uniform[chosen].min() >= uniform[others].max()


def test_every_anchor_is_drawn_equally_often():
    label = jnp.array([1] * 4 + [0] * 8 + [-1] * 3)
    uniform = jax.random.uniform(jax.random.key(0), (4000, 15))
    index, _, weight = jax.jit(
        jax.vmap(lambda u: assignment.sample_labels(label, u, count=6, foreground=2))
    )(uniform)
    assert (weight == 1).all()
    share = np.bincount(np.asarray(index).ravel(), minlength=15) / 4000
    np.testing.assert_allclose(share, [0.5] * 12 + [0] * 3, atol=0.03)


def test_fewer_anchors_than_slots():
    index, is_foreground, weight = assignment.sample_labels(
        np.array([0, 1]), np.array([0.5, 0.5]), 5, 3
    )
    assert index[:2].tolist() == [1, 0] and is_foreground.sum() == 1
    assert weight.tolist() == [1, 1, 0, 0, 0]


def costs(rng, kind, rows, columns):
    """One cost matrix: normal, with many equal costs, or with forbidden pairs."""
    if kind == 0:
        return rng.normal(size=(rows, columns)).astype(np.float32)
    if kind == 1:
        return rng.integers(0, 6, (rows, columns)).astype(np.float32)
    free = rng.random((rows, columns)) < 0.7
    free[np.arange(rows), rng.permutation(columns)[:rows]] = True
    return np.where(free, rng.normal(0, 10, (rows, columns)), np.inf).astype(np.float32)


def check_assignments(cases, rows, columns):
    rng = np.random.default_rng(rows)
    cost = np.stack([costs(rng, i % 3, rows, columns) for i in range(cases)])
    valid = rng.permuted(np.arange(rows) < rng.integers(0, rows + 1, (cases, 1)), axis=1)
    cost[~valid] = np.nan  # padding is never read
    program = jax.jit(jax.vmap(assignment.hungarian))
    column = np.concatenate([np.asarray(program(*x)) for x in zip(
        np.split(cost, cases // 50), np.split(valid, cases // 50), strict=True)])  # fmt: skip
    assert (column[~valid] == -1).all()
    for here, taken, exists in zip(cost.astype(np.float64), column, valid, strict=True):
        part, taken = here[exists], taken[exists]
        assert len(set(taken)) == len(taken) and (taken >= 0).all()
        least = part[linear_sum_assignment(part)].sum()
        assert abs(part[np.arange(len(part)), taken].sum() - least) <= 1e-5 * max(1, abs(least))


@pytest.mark.parametrize(("rows", "columns"), [(8, 20), (12, 12), (1, 3)])
def test_assignments_cost_what_those_of_scipy_cost(rows, columns):
    check_assignments(150, rows, columns)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "columns"), [(10, 40), (30, 30)])
def test_ten_thousand_assignments_cost_what_those_of_scipy_cost(rows, columns):
    check_assignments(5000, rows, columns)


def test_forbidden_pairs_are_taken_only_where_nothing_else_is_left():
    inf = np.inf
    assert assignment.hungarian(np.float32([[5, inf, 9], [4, inf, inf]])).tolist() == [2, 0]
    column = assignment.hungarian(np.float32([[inf, inf, 7], [inf, inf, 3]]))
    assert sorted(column.tolist())[1] == 2 and column[1] == 2
    everywhere = assignment.hungarian(np.full((2, 3), np.nan, np.float32))
    assert len(set(everywhere.tolist())) == 2 and everywhere.min() >= 0
    assert assignment.hungarian(np.zeros((0, 3), np.float32)).shape == (0,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: assignment.match_boxes(
                np.zeros((2, 3)), np.ones(3), low=0.3, high=0.7, keep_best=True
            ),
            "one `valid` per row",
        ),
        (
            lambda: assignment.match_boxes(
                np.zeros((2, 3)), np.ones(2), low=0.7, high=0.3, keep_best=True
            ),
            "low 0.7 is greater than high 0.3",
        ),
        (
            lambda: assignment.sample_labels(np.zeros(3), np.zeros(2), 2, 1),
            "one random number per label",
        ),
        (lambda: assignment.sample_labels(np.zeros(3), np.zeros(3), 2, 3), "foreground 3 is not"),
        (lambda: assignment.sample_labels(np.zeros(0), np.zeros(0), 2, 1), "no label"),
        (lambda: assignment.hungarian(np.zeros((3, 2))), "3 rows and 2 columns"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

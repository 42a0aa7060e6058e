"""Neighbours and maps compared with brute force, and their images."""

import builtins
import sys
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.evaluation import registry
from m3i_jax.modes import figure_evaluators as figure_evaluators  # registers its evaluators
from m3i_jax.reporting import embedding_map


def unit(rows: int, width: int = 6, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(rows, width))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def test_neighbours_are_those_of_a_loop() -> None:
    x = unit(30)
    found, cosine = embedding_map.nearest_neighbors(x, [4, 29], 5)
    for row, asked in enumerate((4, 29)):
        order = sorted((i for i in range(30) if i != asked), key=lambda i: -float(x[i] @ x[asked]))
        assert found[row].tolist() == order[:5]
        np.testing.assert_allclose(cosine[row], [x[i] @ x[asked] for i in order[:5]], rtol=1e-6)
    assert embedding_map.nearest_neighbors(x[:3], [0], 8)[0].shape == (1, 2)


def sorted_neighbours(x: np.ndarray, rows: Sequence[int], count: int) -> np.ndarray:
    """By whole rows, sorted stably."""
    cosine = x[rows] @ x.T
    cosine[np.arange(len(rows)), rows] = -np.inf
    return np.argsort(-cosine, axis=1, kind="stable")[:, :count]


@pytest.mark.parametrize("count", [1, 2, 7, 99])
@pytest.mark.parametrize("block", [1, 700, 1 << 26])
def test_neighbours_are_those_of_a_stable_sort(
    count: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors of small integers: many are equal, and no rounding depends on the block."""
    monkeypatch.setattr(embedding_map, "_BLOCK", block)
    x, polls = np.random.default_rng(3).integers(-1, 2, (100, 4)).astype(np.float32), []
    rows = list(range(0, 100, 3))
    found, cosine = embedding_map.nearest_neighbors(x, rows, count, lambda: polls.append(1))
    wanted = sorted_neighbours(x, rows, count)
    assert np.array_equal(found, wanted) and len(polls) == -(-len(rows) // max(1, block // 100))
    assert np.array_equal(cosine, np.take_along_axis(x[rows] @ x.T, wanted, 1))


def test_agreement_sorts_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One neighbour is a maximum: at 50,000 images a sort takes minutes."""
    x, label = np.random.default_rng(3).integers(-1, 2, (99, 4)), np.arange(99) % 3
    right = label[sorted_neighbours(x.astype(np.float32), range(99), 1)[:, 0]] == label
    monkeypatch.setattr(np, "argsort", None)
    assert embedding_map.neighbor_agreement(x.astype(np.float32), label) == right.mean()


@pytest.mark.parametrize("block", [200, 1 << 26])
def test_agreement_leaves_out_the_unlabelled(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_map, "_BLOCK", block)
    x, label = unit(40), np.random.default_rng(1).integers(-1, 3, 40)
    known = np.flatnonzero(label >= 0)
    right = []
    for i in known:
        others = [j for j in known if j != i]
        right.append(label[max(others, key=lambda j: float(x[j] @ x[i]))] == label[i])
    assert (
        embedding_map.neighbor_agreement(x, label) == pytest.approx(np.mean(right))
        and 0 < np.mean(right) < 1
    )
    assert embedding_map.neighbor_agreement(x, np.full(40, -1)) is None


def test_the_map_is_the_first_two_components() -> None:
    x = np.random.default_rng(2).normal(size=(50, 7)) * np.array([9, 1, 5, 1, 1, 0.5, 0.1]) + 3
    u, s, _ = np.linalg.svd(x - x.mean(0))
    wanted, got = u[:, :2] * s[:2], embedding_map.project_to_2d(x)
    np.testing.assert_allclose(np.abs(got), np.abs(wanted), rtol=1e-6, atol=1e-6)
    # no sign by chance
    np.testing.assert_allclose(embedding_map.project_to_2d(x[::-1].copy()), got[::-1], atol=1e-6)


def test_tsne_is_asked_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Tsne:
        def __init__(self, **settings: Any) -> None:
            asked.append(settings)

        def fit_transform(self, x: np.ndarray) -> np.ndarray:
            asked.append(x)
            return x[:, :2]

    manifold = types.ModuleType("sklearn.manifold")
    manifold.TSNE = Tsne  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sklearn", types.ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.manifold", manifold)
    assert embedding_map.project_to_2d(unit(9) + 3, "tsne").shape == (9, 2)
    settings, given = asked
    assert settings["perplexity"] == pytest.approx(8 / 3) and settings["random_state"] == 0
    assert given.dtype == np.float32 and np.abs(given.mean(0)).max() < 1e-6


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name, *rest, **more):
        if name.split(".")[0] == "sklearn":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"config.evaluate.map: .*m3i-jax\[maps\]"):
        embedding_map.project_to_2d(unit(9), "tsne")
    config = schema.Config(evaluate=schema.Evaluate(map="tsne"))
    (embedding,) = (each for each in registry.evaluators() if each.name == "embedding")
    with pytest.raises(UserError, match=r"config.evaluate.map: .*m3i-jax\[maps\]"):
        embedding.build(types.SimpleNamespace(config=config))  # at the start of a run


def test_every_point_of_a_map_has_the_colour_of_its_class() -> None:
    image, key = embedding_map.embedding_image(
        np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 5.0]]),
        np.array([0, 1, -1]),
        ["cat", "dog", "never"],
    )
    colours = [embedding_map.class_color(0, 2), embedding_map.class_color(1, 2), embedding_map.NONE]
    assert key == list(zip(("cat", "dog", "no class"), colours, strict=True))
    shown = np.asarray(image)
    at = [np.argwhere((shown == np.array(colour)).all(-1)).mean(0) for colour in colours]
    # from left to right, and from the bottom up
    np.testing.assert_allclose([x for _, x in at], [10, 360, 710], atol=1)
    np.testing.assert_allclose([y for y, _ in at], [710, 570, 10], atol=1)


def test_many_classes_and_none() -> None:
    points, label = np.random.default_rng(0).normal(size=(90, 2)), np.arange(90) % 30
    _, key = embedding_map.embedding_image(points, label, [str(i) for i in range(30)])
    assert len(key) == embedding_map.LEGEND + 1 and key[-1][0] == "and 6 more"
    assert embedding_map.embedding_image(points, np.full(90, -1), [])[1] == []

"""The category head as a classifier: ranks compared with a sort, ties counted as wrong, logits
equal to those of the model."""

import types

import jax
import numpy as np
import pytest

from m3i_jax import parallel
from m3i_jax.evaluation import category_head, feature_extraction
from m3i_jax.models import m3i
from m3i_jax.modes import evaluators
from m3i_jax.objective.terms import FORMS
from m3i_jax.training import plan
from tests import toy


def test_ranks_equal_those_of_a_sort() -> None:
    r = np.random.default_rng(0)
    logits, label = r.normal(size=(50, 9)), r.integers(0, 9, 50)
    order = np.argsort(-logits, axis=1)
    assert category_head.top_k_hits(logits, label).tolist() == [
        row.tolist().index(one) for row, one in zip(order, label, strict=True)
    ]


def test_a_tie_or_nan_is_not_a_hit() -> None:
    assert category_head.top_k_hits(np.zeros((2, 3)), np.array([0, 2])).tolist() == [2, 2]
    assert category_head.top_k_hits(
        np.array([[np.nan, 0.0], [np.nan, 0.0]]), np.array([0, 1])
    ).tolist() == [1, 1]


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_the_metric_applies_the_head_to_raw_features(norm: str) -> None:
    """The features are not normalised; batch norm uses the mean and variance of the index."""
    config = toy.settings(
        data__classes=7,
        model__pool__kind="mean",
        model__pool__norm=norm,
        model__pool__projection="false",
    )
    params = jax.jit(
        lambda: m3i.init(config, jax.random.key(0), FORMS["supervised"], classes=7, vocabulary=0)
    )()
    r = np.random.default_rng(2)
    raw, label = 5 * r.normal(size=(40, 32)) + 1, r.integers(-1, 9, 40).astype(np.int32)
    index = (3 * r.normal(size=(60, 32)) + 2).astype(np.float32)

    def as_features(x: np.ndarray, label: np.ndarray) -> feature_extraction.ImageFeatures:
        length = np.linalg.norm(x, axis=1)
        return feature_extraction.ImageFeatures(
            (x / length[:, None]).astype(np.float32),
            label,
            np.arange(len(x)),
            length.astype(np.float32),
        )

    sets = {
        "q": lambda p, poll: (as_features(raw, label), {}),
        "i": lambda p, poll: (as_features(index, np.zeros(60, np.int32)), {}),
    }
    ask = category_head.head_predictions(
        config, image_set="q", statistics_set="i" if norm == "batch" else ""
    )
    context = feature_extraction.EvalContext(sets, params, lambda: None)
    got = dict(category_head.measure(config, ask)(context))
    known = (label >= 0) & (label < 7)
    assert 0 < known.sum() < 38
    x = (raw - index.mean(0)) / np.sqrt(index.var(0) + 1e-6) if norm == "batch" else raw
    logits = x[known] @ np.asarray(params["category"]["kernel"]) + np.asarray(
        params["category"]["bias"]
    )
    order = np.argsort(-logits, axis=1)
    answers, _ = ask(context)
    np.testing.assert_array_equal(answers.labels, label[known])
    np.testing.assert_array_equal(answers.guesses, order[:, 0])
    for top in (1, 5):
        assert got[f"eval/direct/top{top}"] == pytest.approx(
            (order[:, :top] == label[known][:, None]).any(1).mean()
        )


@pytest.mark.parametrize(
    ("norm", "features", "wanted"),
    [
        # what kNN reads, what the head reads, and where its statistics come from
        ("batch", "auto", ("mean", "mean", "mean")),
        ("batch", "cls", ("cls", "mean", "mean")),
        ("layer", "cls", ("cls", "attention", "")),
        ("layer", "auto", ("attention", "attention", "")),
    ],
)
def test_heads_read_what_they_were_trained_on(
    norm: str, features: str, wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever feature the other evaluators read. Batch norm is left to the head."""
    monkeypatch.setattr(feature_extraction, "Extractor", lambda config, mesh, *, pool: pool)
    monkeypatch.setattr(feature_extraction, "image_sets", lambda extract, *_: extract)
    config = toy.settings(
        objective__forms=("supervised",),
        model__encoder__cls_token="true",
        model__pool__kind="mean",
        model__pool__norm=norm,
        model__pool__projection="false",
        evaluate__features=features,
    )
    mesh = parallel.make_mesh((1, 1, 1), jax.devices()[:1])
    setup = types.SimpleNamespace(
        config=config,
        mesh=mesh,
        classes=("a", "b"),
        tokenizer=None,
        held_out=[],
        train=[],
        task=None,
    )
    task = types.SimpleNamespace(plan=plan.build_plan(config))
    inputs, sets = evaluators._feature_inputs(setup, task, None, heads=True)
    found = sets["queries"], sets[inputs.pooled_set], sets.get(inputs.statistics_set, "")
    assert found == wanted and sets["index"] == wanted[0]

"""The attentive probe: it uses information that the mean of the tokens hides, and trains on the
tokens of the frozen encoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import parallel
from m3i_jax.errors import UserError
from m3i_jax.evaluation import attentive_probe, feature_extraction
from m3i_jax.models import vit
from tests import toy


def settings(**more: object):
    return toy.settings(data__image_size=16, model__encoder__depth=1, data__classes=2, **more)


def test_the_probe_uses_the_one_informative_token() -> None:
    """The class is the sign of the second channel of one token, which the first channel marks; the
    other tokens cancel the mean."""
    config = settings(
        evaluate__attentive_epochs=40,
        evaluate__attentive_lr=3e-3,
        model__encoder__cls_token="false",
    )
    r, rows = np.random.default_rng(0), 96
    tokens = (0.3 * r.normal(size=(2 * rows, 4, 32))).astype(np.float32)
    label = (np.arange(2 * rows) % 2).astype(np.int32)
    token = r.integers(0, 4, 2 * rows)
    tokens[..., :2] = 0
    tokens[np.arange(2 * rows), token, 0] = 6
    tokens[..., 1] = (label - 0.5)[:, None] * -2
    tokens[np.arange(2 * rows), token, 1] = (label - 0.5) * 6  # the mean of channel 1 is 0
    assert np.abs(tokens[..., 1].mean(1)).max() < 1e-6
    probe = attentive_probe.AttentiveProbe(config, parallel.make_mesh((2, 2, 1), jax.devices()[:4]))
    head = probe.fit(tokens[:rows], label[:rows], 2, 32, lambda: None)
    right = (
        np.asarray(jax.jit(probe.logits)(head, jnp.asarray(tokens[rows:]))).argmax(1)
        == label[rows:]
    )
    assert right.mean() > 0.9


def test_the_metric_reads_both_sources_and_counts_labelled_images() -> None:
    """Dark and light images, some without a label, in batches with invalid last rows."""
    config = settings(evaluate__attentive_epochs=6, evaluate__attentive_lr=3e-3)
    mesh = parallel.make_mesh((1, 1, 1), jax.devices()[:1])
    params = {"encoder": jax.jit(lambda: vit.init(config.model, jax.random.key(3)))()}

    def batches(count: int, seed: int):
        r = np.random.default_rng(seed)

        class Batches(list):
            skipped = {"small": 2}

        out = Batches()
        for k in range(count):
            label = r.integers(-1, 2, 8).astype(np.int32)
            views = np.clip(
                r.normal(size=(8, 16, 16, 3)) * 20 + (60 + 120 * (label > 0))[:, None, None, None],
                0,
                255,
            ).astype(np.uint8)
            out.append(
                {
                    "views": views,
                    "label": label,
                    "index": np.arange(8),
                    "valid": np.arange(8) < (8 if k else 5),
                }
            )
        return out

    measure = attentive_probe.measure(config, mesh, lambda: batches(6, 0), lambda: batches(3, 1), 8)
    found = feature_extraction.ImageFeatures(np.zeros((0, 4)), np.zeros(0), np.zeros(0))
    sets = {name: lambda p, poll: (found, {"small": 2}) for name in ("index", "pooled queries")}
    context = feature_extraction.EvalContext(sets, params, lambda: None)
    context("index"), context("pooled queries")  # of other evaluators
    got = dict(measure(context))
    assert list(got) == ["eval/attentive/top1"] and got["eval/attentive/top1"] > 0.9
    asked = sum((b["valid"] & (b["label"] >= 0)).sum() for b in batches(3, 1))
    assert (got["eval/attentive/top1"] * asked) % 1 < 1e-6
    assert context.skipped == {"small": 4}  # two of the index, and two of the queries
    others = batches(3, 1)
    for batch in others:  # a class that the index does not have
        batch["label"][batch["label"] == 1] = 7
    unseen = attentive_probe.measure(config, mesh, lambda: batches(6, 0), lambda: others, 8)
    context = feature_extraction.EvalContext({}, params, lambda: None)
    share = sum((b["valid"] & (b["label"] == 0)).sum() for b in others) / asked
    assert 0.8 * share < dict(unseen(context))["eval/attentive/top1"] <= share < 0.7
    diverged = {"encoder": jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params["encoder"])}
    context = feature_extraction.EvalContext({}, diverged, lambda: None)
    with pytest.raises(UserError, match="record 0: the features"):
        dict(measure(context))
    nothing = attentive_probe.measure(config, mesh, lambda: [], lambda: batches(1, 1), 8)
    assert list(nothing(feature_extraction.EvalContext({}, params, lambda: None))) == []

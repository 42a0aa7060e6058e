"""SigLIP 2 and TIPS, which join captions with self-distillation: whole losses against numpy
(float64)."""

import numpy as np
import pytest

from m3i_jax.objective.terms import FULL
from m3i_jax.training import predictions, views
from tests.objective import entropy_reference as reference
from tests.training.forward import forward, plan_of
from tests.training.test_caption_rows import nll_of
from tests.training.test_prototype_rows import (
    HEAD,
    cross_entropy,
    head_logits,
    softmax,
    state_of,
    teacher_tokens,
)


def softmax_of_pairs(images, captions, log_scale):
    """CLIP's loss: the mean of both directions."""
    z = np.exp(log_scale) * reference.unit(images) @ reference.unit(captions).T
    rows = [-np.log(softmax(x).diagonal()).mean() for x in (z, z.T)]
    return np.mean(rows)


def pairs(got):
    """Embeddings of the images that have a caption, and of their captions."""
    vectors = predictions.pool_images(got.plan, got.params, got.z, got.inputs)
    images, captions = predictions.contrastive_embeddings(got.plan, got.params, vectors, got.batch)
    keep = np.asarray(got.batch["length"]) > 0
    assert 2 < keep.sum() < len(keep)
    (of_images,) = images.values()
    return (np.asarray(x, np.float64)[keep] for x in (of_images, captions))


@pytest.mark.parametrize(("row", "weight"), [("siglip2", 0.25), ("tips", 2.0)])
def test_the_loss_is_that_of_captions_and_of_assignments(row, weight):
    plan = plan_of(row, data__small_views="2 x 16 at 0.2-0.5", data__mask_ratio=0.25, **HEAD)
    centers = {
        name: np.linspace(-0.2, 0.3, 12).astype(np.float32) * sign
        for name, sign in (("global_pooled", 1), ("global_tokens", -1))
    }
    got = forward(plan, state=state_of(centers, rise=0.5))
    u, v = pairs(got)
    if row == "siglip2":
        scalars = {k: float(x) for k, x in got.params["scalars"]["text"].items()}
        text = reference.text_sigmoid(u, v, scalars["logit_scale"], scalars["logit_bias"])
        drawn = np.asarray(views.parallel_captions(plan.config, got.batch["position"], 0.5))
        memory = np.asarray(got.z[FULL][:, 1:], np.float64)
        costs = nll_of(got.params["captioner"], got.batch, memory, drawn)
        caption = np.mean([n.mean() for n in costs if len(n)])
        assert got.losses["loss/caption"] == pytest.approx(caption, rel=1e-4)
        of_texts = (text + caption) / 2
    else:
        of_texts = text = softmax_of_pairs(u, v, float(got.params["logit_scale"]))
    assert got.losses["loss/text"] == pytest.approx(text, rel=1e-4)
    assert got.losses["loss/sp"] == pytest.approx(of_texts, rel=1e-4)

    tau = 0.055  # half way from 0.04 to 0.07
    online, ema = got.params["heads"]["global"], got.trees["ema"]["heads"]["global"]
    clean, reads = teacher_tokens(got)[0], {p: p for p in plan.passes}
    q = softmax((head_logits(ema, clean[:, 0]) - centers["global_pooled"]) / tau)
    small = [head_logits(online, got.z[p][:, 0]) for p in reads if p.view >= 2]
    assert len(small) == 2
    of_images = np.mean([cross_entropy(q, z).mean() for z in small])
    hidden = ~np.asarray(got.batch["mask"])
    (masked,) = (p for p in reads if p.masked)
    tokens = head_logits(online, got.z[masked][:, 1:])[hidden]
    targets = head_logits(ema, clean[:, 1:])[hidden] - centers["global_tokens"]
    of_tokens = cross_entropy(softmax(targets / tau), tokens).mean()
    assert got.losses["loss/global"] == pytest.approx(of_images, rel=1e-4)
    assert got.losses["loss/dense"] == pytest.approx(of_tokens, rel=1e-4)
    both = (of_images + weight * of_tokens) / (1 + weight)
    assert got.losses["loss/ssp"] == pytest.approx(both, rel=1e-4)

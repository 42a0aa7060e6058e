"""DINO, iBOT and DINOv2 as rows: whole losses against numpy float64, and that centres, constraints
and gradients do not depend on how a batch is divided."""

import math

import numpy as np
import pytest

from m3i_jax.models import m3i
from m3i_jax.objective.prototype_targets import PrototypeState
from m3i_jax.objective.terms import FULL, Pass
from m3i_jax.training import views
from tests.training.forward import forward, plan_of

HEAD = {"model__head__prototypes": 12, "model__head__hidden": 20, "model__head__width": 8}
MASK_TOKENS = Pass(masked=True, mask_tokens=True)
_erf = np.vectorize(math.erf)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def head_logits(tree, x):
    """Three layers with exact GELU, length 1, prototypes of length 1 or of a trained one."""
    x = np.asarray(x, np.float64)
    for layer in range(3):
        part = tree["projector"][f"layer_{layer}"]
        x = x @ np.asarray(part["kernel"], np.float64) + np.asarray(part["bias"], np.float64)
        if layer < 2:
            x = 0.5 * x * (1 + _erf(x / math.sqrt(2)))
    rows = unit(np.asarray(tree["prototypes"], np.float64))
    if "prototype_norms" in tree:
        rows = rows * np.asarray(tree["prototype_norms"], np.float64)[:, None]
    return unit(x) @ rows.T


def balanced(z, tau):
    q = np.exp(z / tau)
    for _ in range(3):
        q /= q.sum(0, keepdims=True)
        q /= q.sum(1, keepdims=True)
    return q


def cross_entropy(q, z):
    return -(q * np.log(softmax(z / 0.1))).sum(-1)


def teacher_tokens(got):
    crops = views.augmented_patches(got.plan.config, got.batch, (0, 1))
    encoder = got.trees["ema"]["encoder"]
    return [np.asarray(m3i.encode(got.plan.config, encoder, crops[v])) for v in (0, 1)]


def state_of(centers, rise=0.0):
    return PrototypeState(np.int32(0), np.float32(rise), centers)


@pytest.mark.parametrize("constraint", ["centering", "sinkhorn"])
def test_dino_is_the_cross_entropy_of_both_large_views(constraint: str) -> None:
    plan = plan_of("dino", objective__prototype_targets=constraint, **HEAD)
    center = np.linspace(-0.2, 0.3, 12).astype(np.float32)
    got = forward(plan, state=state_of({"global_pooled": center}))
    online, ema = got.params["heads"]["global"], got.trees["ema"]["heads"]["global"]
    student = [head_logits(online, got.z[p][:, 0]) for p in (FULL, Pass(view=1))]
    teacher = [head_logits(ema, z[:, 0]) for z in teacher_tokens(got)]
    if constraint == "centering":
        q = [softmax((z - center) / 0.04) for z in teacher]
    else:  # both views are one problem
        q = np.split(balanced(np.concatenate(teacher), 0.04), 2)
    want = (cross_entropy(q[1], student[0]).mean() + cross_entropy(q[0], student[1]).mean()) / 2
    assert got.losses["loss/global"] == pytest.approx(want, rel=1e-4)
    assert got.losses["loss/ssp"] == pytest.approx(want, rel=1e-4)
    mean = np.concatenate(q).mean(0)
    bits = (-(mean * np.log(mean)).sum() - want) / math.log(2)
    assert got.losses["info/global"] == pytest.approx(bits, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("constraint", ["centering", "sinkhorn"])
def test_ibot_adds_the_hidden_tokens_of_the_masked_view(constraint: str) -> None:
    plan = plan_of("ibot", objective__prototype_targets=constraint, data__mask_ratio=0.25, **HEAD)
    of_images, of_tokens = np.linspace(-0.2, 0.3, 12), np.linspace(0.1, -0.1, 12)
    centers = {"global_pooled": of_images, "global_tokens": of_tokens}
    got = forward(
        plan, state=state_of({k: v.astype(np.float32) for k, v in centers.items()}, rise=0.5)
    )
    online, ema = got.params["heads"]["global"], got.trees["ema"]["heads"]["global"]
    clean = teacher_tokens(got)
    student = [head_logits(online, got.z[p][:, 0]) for p in (MASK_TOKENS, Pass(view=1))]
    teacher = [head_logits(ema, z[:, 0]) for z in clean]
    hidden = ~np.asarray(got.batch["mask"])
    assert (hidden.sum(1) == plan.config.hidden).all() and plan.config.hidden == 4
    tokens = head_logits(online, got.z[MASK_TOKENS][:, 1:])[hidden]
    token_targets = head_logits(ema, clean[0][:, 1:])[hidden]
    if constraint == "centering":
        q = [softmax((z - of_images) / 0.04) for z in teacher]
        q_tokens = softmax((token_targets - of_tokens) / 0.055)  # half way from .04 to .07
    else:
        q = np.split(balanced(np.concatenate(teacher), 0.04), 2)
        q_tokens = balanced(token_targets, 0.055)  # of all images, hidden cells alone
    of_cls = (cross_entropy(q[1], student[0]).mean() + cross_entropy(q[0], student[1]).mean()) / 2
    of_patches = cross_entropy(q_tokens, tokens).mean()
    assert got.losses["loss/global"] == pytest.approx(of_cls, rel=1e-4)
    assert got.losses["loss/dense"] == pytest.approx(of_patches, rel=1e-4)
    # the sum of both, the second over two crops of which one is masked, up to a common factor
    assert got.losses["loss/ssp"] == pytest.approx((of_cls + of_patches / 2) / 1.5, rel=1e-4)

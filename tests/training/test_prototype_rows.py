"""DINO, iBOT and DINOv2 as rows: whole losses against numpy float64, and that centres, constraints
and gradients do not depend on how a batch is divided."""

import math
import pathlib

import jax
import numpy as np
import pytest

from m3i_jax import parallel, validation
from m3i_jax.errors import UserError
from m3i_jax.objective.prototype_targets import PrototypeState
from m3i_jax.objective.terms import FULL, Pass
from m3i_jax.training import trainer, unused_settings
from m3i_jax.training.checkpoint import Checkpoints
from tests import toy
from tests.training.forward import augmented_patches, encode, forward, plan_of

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
    crops = augmented_patches(got.plan.config, got.batch, (0, 1))
    encoder = got.trees["ema"]["encoder"]
    return [np.asarray(encode(got.plan.config, encoder, crops[v])) for v in (0, 1)]


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


@pytest.mark.parametrize(
    "constraint", ["centering", pytest.param("sinkhorn", marks=pytest.mark.slow)]
)
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
        q = [softmax((z - of_images) / 0.055) for z in teacher]  # half way from .04 to .07
        q_tokens = softmax((token_targets - of_tokens) / 0.055)
    else:
        q = np.split(balanced(np.concatenate(teacher), 0.055), 2)
        q_tokens = balanced(token_targets, 0.055)  # of all images, hidden cells alone
    of_cls = (cross_entropy(q[1], student[0]).mean() + cross_entropy(q[0], student[1]).mean()) / 2
    of_patches = cross_entropy(q_tokens, tokens).mean()
    assert got.losses["loss/global"] == pytest.approx(of_cls, rel=1e-4)
    assert got.losses["loss/dense"] == pytest.approx(of_patches, rel=1e-4)
    # the sum of both, the second over two crops of which one is masked, up to a common factor
    assert got.losses["loss/ssp"] == pytest.approx((of_cls + of_patches / 2) / 1.5, rel=1e-4)


def koleo(z):
    u = unit(np.asarray(z, np.float64))
    distance = np.linalg.norm(u[:, None] - u[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    return -np.log(distance.min(1)).mean()


def test_dinov2_is_dino_ibot_and_koleo_of_both_large_views() -> None:
    plan = plan_of("dinov2", data__small_views="2 x 16 at 0.1-0.3", data__mask_ratio=0.25, **HEAD)
    got = forward(plan)
    online, ema = got.params["heads"]["global"], got.trees["ema"]["heads"]["global"]
    assert np.ptp(online["prototype_norms"]) > 0.01  # trained lengths, of which the EMA has a copy
    assert np.allclose(ema["prototype_norms"], 0.9 * np.asarray(online["prototype_norms"]))
    clean, reads = teacher_tokens(got), {p.view: p for p in plan.passes}
    assert reads[0] == MASK_TOKENS and sorted(reads) == [0, 1, 2, 3]
    q = [softmax(head_logits(ema, z[:, 0]) / 0.04) for z in clean]
    student = {v: head_logits(online, got.z[p][:, 0]) for v, p in reads.items()}
    pairs = [(v, t) for v in student for t in (0, 1) if v != t]
    of_cls = np.mean([cross_entropy(q[t], student[v]).mean() for v, t in pairs])
    hidden = ~np.asarray(got.batch["mask"])
    q_tokens = softmax(head_logits(ema, clean[0][:, 1:])[hidden] / 0.04)
    tokens = head_logits(online, got.z[MASK_TOKENS][:, 1:])[hidden]
    of_patches = cross_entropy(q_tokens, tokens).mean()
    spread = [koleo(got.z[reads[v]][:, 0]) for v in (0, 1)]
    assert got.losses["loss/global"] == pytest.approx(of_cls, rel=1e-4)
    assert got.losses["loss/dense"] == pytest.approx(of_patches, rel=1e-4)
    assert got.losses["loss/koleo"] == pytest.approx(np.mean(spread), rel=1e-3)
    total = of_cls + of_patches / 2 + 0.1 * sum(spread)
    assert got.losses["loss/ssp"] == pytest.approx(total / 1.5, rel=1e-3)


def test_small_views_predict_both_large_ones_and_share_the_weight() -> None:
    plan = plan_of("dino", data__small_views="3 x 16 at 0.1-0.3", **HEAD)
    assert len(plan.terms) == 8 and plan.views == (0, 1, 2, 3, 4)
    got = forward(plan)
    online, ema = got.params["heads"]["global"], got.trees["ema"]["heads"]["global"]
    student = {p.view: head_logits(online, got.z[p][:, 0]) for p in plan.passes}
    q = [softmax(head_logits(ema, z[:, 0]) / 0.04) for z in teacher_tokens(got)]
    pairs = [(v, t) for v in student for t in (0, 1) if v != t]
    assert len(pairs) == 2 + 2 * 3
    want = np.mean([cross_entropy(q[t], student[v]).mean() for v, t in pairs])
    assert got.losses["loss/global"] == pytest.approx(want, rel=1e-4)
    assert got.losses["loss/ssp"] == pytest.approx(want, rel=1e-4)


def trained(plan, mesh, steps, first=0, state=None):
    one = trainer.Trainer(
        plan.config, parallel.make_mesh(mesh, jax.devices()[: math.prod(mesh)]), toy.VOCABULARY
    )
    state, out = one.init() if state is None else state(one), []
    for k in range(first, steps):
        batch = parallel.to_global(one.mesh, toy.batch(plan.config, k))
        state, metrics = one.step(state, batch)
        out.append({key: np.asarray(value) for key, value in metrics.items()})
    return state, out


def same(got: list[dict], want: list[dict], rtol: float = 2e-5) -> None:
    for a, b in zip(got, want, strict=True):
        for key in ("loss", "grad_norm", *(k for k in b if k.startswith(("loss/", "collapse/m")))):
            np.testing.assert_allclose(a[key], b[key], rtol=rtol, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "constraint"),
    [("dino", "sinkhorn"), ("ibot", "centering"), ("ibot", "sinkhorn"), ("dinov2", "sinkhorn")],
)
def test_division_of_the_batch_and_a_restart_change_nothing(
    row: str, constraint: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two microbatches, eight devices, and a run that is saved and goes on have the losses of one
    device without a break; with them, the centres, the temperature and the balance of the whole
    batch."""
    monkeypatch.setattr(parallel.sharding, "SMALL", 1)
    changes = {
        "data__small_views": "2 x 16 at 0.1-0.3",
        "objective__prototype_targets": constraint,
        "objective__target_temperature": "0.04,0.07",
        "model__encoder__drop_path": 0.1,
        "optim__freeze_prototypes": 0.1,  # 2 of 20 steps
        "train__batch_size": 16,
        **HEAD,
        "model__head__prototypes": 16,
    }
    plan = plan_of(row, **changes)
    alone, whole = trained(plan, (1, 1, 1), 4)
    assert float(alone.opt["prototypes"].rise) > 0.5
    _, parts = trained(plan_of(row, train__microbatches=2, **changes), (1, 1, 1), 4)
    same(parts, whole)
    many, split = trained(plan, (1, 8, 1), 4)
    same(split, whole)
    for name, center in alone.opt["prototypes"].centers.items():
        np.testing.assert_allclose(center, many.opt["prototypes"].centers[name], atol=1e-5)
        assert float(np.abs(center).max()) > 0
    saver = Checkpoints(tmp_path / "checkpoints", 1)
    half, _ = trained(plan, (1, 1, 1), 2)
    (first, _), head = trained(plan, (1, 1, 1), 0), "global"
    for part in first.params["heads"][head]:
        tree = [x.params["heads"][head][part] for x in (first, half, alone)]
        start, held, moved = (
            np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in tree
        )
        assert (start == held).all() == part.startswith("prototype"), part
        assert (held != moved).any(), part
    saver.save(2, half, {"samples_seen": 32})
    saver.wait()
    saver.close()

    def restore(one):
        reader = Checkpoints(tmp_path / "checkpoints", 1)
        state = reader.restore(2, one.template, one.shardings)
        reader.close()
        return state

    again, rest = trained(plan, (1, 1, 1), 4, first=2, state=restore)
    for a, b in zip(rest, whole[2:], strict=True):
        assert all((a[key] == b[key]).all() for key in b)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("forms", "changes", "words"),
    [
        ("dino", {"model__encoder__cls_token": False}, ("cls token",)),
        ("dino", {"data__small_views": "8 by 98"}, ("data.small_views", "8 x 98 at 0.05-0.32")),
        ("dino", {"data__small_views": "8 x 4 at 0.1-0.3"}, ("smaller than a patch of 8 pixels",)),
        ("dino", {"data__small_views": "8 x 12 at 0.1-0.3"}, ("multiple", "patch_size, 8")),
        ("dino", {"data__small_views": "8 x 16 at 0.3-0.1"}, ("the smaller first",)),
        ("dino", {"data__small_views": "65 x 16 at 0.1-0.3"}, ("1 to 64",)),
        (
            "dinov2",
            {"train__batch_size": 72},
            ("train.batch_size: 72", "groups of 64", "koleo"),
        ),
        (
            "dino",
            {"model__head__prototypes": 1},
            ("model.head.prototypes: 1", "at least 2"),
        ),
    ],
)
def test_what_cannot_work_is_one_line(forms: str, changes: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        plan_of(forms, **changes)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), (
        error.value
    )


def test_what_no_objective_reads_is_refused() -> None:
    for changes, words in (
        ({"data__small_views": "2 x 16 at 0.1-0.3"}, "data.small_views.*no small view"),
        ({"objective__prototype_targets": "sinkhorn"}, "prototype_targets.*no assignment"),
        ({"objective__target_temperature": "0.1,0.1"}, "target_temperature.*no assignment"),
        ({"optim__freeze_prototypes": 0.1}, "freeze_prototypes.*no assignment"),
    ):
        with pytest.raises(UserError, match=words):
            unused_settings.reject_unused_settings(toy.settings(**changes), [("byol",)])


def test_more_devices_than_prototypes_is_one_line() -> None:
    config = plan_of(
        "dino", **{**HEAD, "model__head__prototypes": 4, "train__batch_size": 16}
    ).config
    validation.validate_devices(config, (2, 4, 1))
    with pytest.raises(UserError, match=r"model\.head\.prototypes: 4 .* 8 devices"):
        validation.validate_devices(config, (1, 8, 1))

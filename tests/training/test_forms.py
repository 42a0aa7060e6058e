"""Every row of Table 1 and every option of an objective: what it computes against the same written
out by hand, and its degenerate cases. Losses are compared forwards only; that gradients are those
of the plain sum is shown in test_step.py for any set of terms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import parallel, published_settings
from m3i_jax.errors import UserError
from m3i_jax.models import m3i
from m3i_jax.objective import losses, mixing, terms
from m3i_jax.objective import published as published_methods
from m3i_jax.objective.terms import (
    FULL,
    MASKED,
    MIXED,
    MlpShape,
    Pass,
    ProjectionHead,
    pooled_term,
    token_term,
)
from m3i_jax.training import plan as plans
from m3i_jax.training import step, targets, term_losses, trainer, views
from tests import toy

NEEDS = {
    "milan": {"objective__target_checkpoint": "x"},
    "feature_distillation": {"objective__target_checkpoint": "x"},
}
ROWS = [*terms.FORMS, *published_methods.PUBLISHED]
SMALL = {
    "model__encoder__depth": 1,
    "model__encoder__drop_path": 0.0,
    "train__batch_size": 8,
    "model__text__depth": 1,
}


def plan_of(forms: str | terms.Terms, **changes: object) -> plans.Plan:
    config = toy.settings(**{**SMALL, **changes})
    if isinstance(forms, str):
        return plans.build_plan(
            dataclasses.replace(
                config,
                objective=dataclasses.replace(config.objective, forms=tuple(forms.split(","))),
            )
        )
    return plans.Plan(config, forms)


def parameters(plan: plans.Plan):
    params = m3i.init(
        plan.config, jax.random.key(0), plan.terms, classes=toy.CLASSES, vocabulary=toy.VOCABULARY
    )
    # Not where heads of zero bias and unit scale start, where many a wrong composition would give
    # the same numbers.
    leaves, tree = jax.tree.flatten(params)
    r = np.random.default_rng(1)
    return jax.tree.unflatten(
        tree, [leaf + 0.02 * r.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    )


def batch_of(plan: plans.Plan, **changes: object) -> dict:
    return {k: jnp.asarray(v) for k, v in {**toy.batch(plan.config), **changes}.items()}


@dataclasses.dataclass
class Forward:
    plan: plans.Plan
    params: dict
    trees: dict
    batch: dict
    z: dict
    goals: dict
    losses: dict


def forward(plan: plans.Plan, batch=None, params=None) -> Forward:
    """Losses by name, and the arrays on the way to them, without any gradient."""
    batch, params = batch or batch_of(plan), params or parameters(plan)
    parts = m3i.target_parts(plan.config, plan.terms, params)
    trees = {
        "ema": jax.tree.map(lambda a: a * 0.9, parts),
        "frozen": jax.tree.map(lambda a: a * 1.1, parts),
        "shared": parts,
    }

    @jax.jit
    def run(params, trees, batch):
        crops = views.augmented_patches(plan.config, batch, plan.crops, exact=plan.exact)
        goals = targets.target_features(plan, trees, crops)
        z = views.encode_passes(plan.config, plan.passes, batch, crops, params["encoder"])
        seen = term_losses.TargetBundle(
            goals=goals, keys=goals, index=None, moments=targets.target_moments(plan, goals)
        )
        tally, factors = term_losses.loss_weights(plan, batch)
        made = [
            term_losses.group_loss(plan, g, factors=factors, batch=batch, seen=seen, cached=None)(
                params, z
            )[1]
            for g in ("ssp", "sp")
        ]
        return z, goals, step._losses(plan, made[0] | made[1], tally, factors)

    z, goals, losses = run(params, trees, batch)
    return Forward(plan, params, trees, batch, z, goals, {k: float(v) for k, v in losses.items()})


# ---- the table itself
# -------------------------------------------------------------------------------------------------------------------


def test_the_letters_are_the_rows_of_the_papers_tables() -> None:
    """Table 3: a-f predict the own view, g-l another one; b, e, h, k dense features; c, f, i, l a
    global one; d-f and j-l are masked."""
    for letter, name in terms.LETTERS.items():
        if len(letter) > 1:
            continue
        (term,) = terms.FORMS[name]
        at = "abcdefghijkl".index(letter)
        assert (term.target.crop, term.reads.masked) == (int(at >= 6), at % 6 >= 3), letter
        assert term.target.of == ("pixels", "tokens", "pooled")[at % 3], letter
        assert term.target.encoder == ("identity", "ema", "ema")[at % 3], letter
        assert (type(term.posterior).__name__ == "Boltzmann") == (letter in "chil"), letter
    assert [t.target.of for t in terms.FORMS[terms.LETTERS["ic"]]] == ["category"]


@pytest.mark.slow
@pytest.mark.parametrize("row", [*ROWS, "byol,moco_v3"])
def test_every_row_trains(row: str) -> None:
    changes = NEEDS.get(row, {})
    if row in published_methods.PUBLISHED:
        settings = published_settings.SETTINGS[row]
        kept = (
            "decoder.positions",
            "decoder.cls",
            "decoder.norm",
            "decoder.projector_depth",
            "pool.kind",
        )
        changes = changes | {
            f"model__{k.replace('.', '__')}": settings[f"model.{k}"]
            for k in kept
            if f"model.{k}" in settings
        }
    plan = plan_of(row, **changes)
    one = trainer.Trainer(
        plan.config, parallel.make_mesh((1, 1, 1), jax.devices()[:1]), toy.VOCABULARY
    )
    state = jax.jit(one._create)()  # a frozen target stays the copy that it starts as
    state, first = one.step(state, toy.batch(plan.config))
    state, second = one.step(state, toy.batch(plan.config))
    for name, value in second.items():
        assert np.isfinite(value).all(), name
    assert float(first["grad_norm"]) > 0 and float(second["skipped/not_finite"]) == 0
    assert any(name.startswith("info/") for name in first) or row == "barlow_twins"


def test_sets_share_passes() -> None:
    assert [t.name for t in plan_of("mim,clip").terms] == ["intra", "text"]
    assert plan_of("mim,clip").passes == (MASKED,)
    assert plan_of("mim,clip", objective__annotation_input="own").passes == (FULL, MASKED)
    both = plan_of("sim,supervised,clip")
    assert both.passes == (MASKED,) and [(v.encoder, v.crop) for v in both.views] == [("ema", 1)]
    assert plan_of("m3i,m3i").terms == plan_of("m3i").terms
    assert {
        t.image
        for t in terms.merge(terms.FORMS["m3i"][:2], terms.FORMS["supervised"])
        if t.name == "category"
    } == {
        "own",
        "partner",
    }
    assert plan_of("instance,dense_instance").views == (("ema", 1, 1),)


def test_annotations_of_a_row_that_reads_one_input_have_none_of_their_own() -> None:
    with pytest.raises(UserError, match="config.objective.annotation_input: 'own'.*sim,supervised"):
        plan_of("m3i", objective__annotation_input="own")
    assert plan_of("supervised", objective__annotation_input="own").passes == (FULL,)


def test_a_target_with_a_gradient_is_a_pass_of_its_own() -> None:
    plan = plan_of("simclr")
    assert plan.passes == (FULL, Pass(crop=1)) and plan.views == ()


def test_second_group_is_any_set_of_names() -> None:
    assert [t.group for t in plan_of("instance,mim", objective__second_group="global").terms] == [
        "sp",
        "ssp",
    ]


@pytest.mark.parametrize(
    ("forms", "changes", "words"),
    [
        ("sim", {"model__decoder__positions": "absolute"}, ("model.decoder.positions", "relative")),
        ("milan", {}, ("objective.target_checkpoint", "workdir")),
        ("msn", {"model__encoder__cls_token": False}, ("cls token",)),
        (
            "clip",
            {"model__encoder__cls_token": False, "model__pool__kind": "cls"},
            ("model.pool.kind", "cls token"),
        ),
        ("beit", {}, ("'beit' is not here", "discrete VAE")),
        (
            "m3i",
            {"objective__isolate": True, "data__mask_ratio": 0.25},
            ("objective.isolate", "0.5"),
        ),
    ],
)
def test_what_cannot_go_together_is_refused(
    forms: str, changes: dict, words: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as error:
        plan_of(forms, **changes)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), (
        error.value
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: Pass(masked=True, mixed=True),
        lambda: Pass(filled=True),
        lambda: terms.Target(of="tokens"),
        lambda: terms.Target(of="pixels", crop=0, encoder="ema"),
        lambda: terms.Target(of="tokens", crop=0),
        lambda: token_term(FULL, 0, image="partner"),
        lambda: token_term(FULL, 0, head=terms.PooledHead()),
        lambda: pooled_term(FULL, 0, head=terms.DecoderHead()),
    ],
)
def test_rows_that_mean_nothing_cannot_be_written(make) -> None:
    with pytest.raises(ValueError):
        make()


# ---- what the rows compute
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.2, 0.5])
def test_instance_is_infonce_of_two_pooled_projections(temperature: float) -> None:
    got = forward(plan_of("instance", objective__temperature=temperature))
    config, head = got.plan.config, got.plan.terms[0].head
    query = m3i.predict(config, got.params["heads"], head, got.z[FULL][:, 1:].mean(1))
    crops = views.augmented_patches(config, got.batch, (1,))
    key = m3i.project(
        config,
        got.trees["ema"]["heads"],
        head,
        m3i.encode(config, got.trees["ema"]["encoder"], crops[1])[:, 1:].mean(1),
    )
    q, k = (
        np.asarray(x, np.float64) / np.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key)
    )
    logits = q @ k.T / temperature
    nll = np.log(np.exp(logits).sum(1)) - np.diag(logits)
    assert got.losses["loss/global"] == pytest.approx(nll.mean(), rel=1e-4)
    assert got.losses["info/global"] == pytest.approx(
        (np.log(len(q)) - nll.mean()) / np.log(2), rel=1e-4, abs=1e-5
    )
    assert got.losses["collapse/alignment"] == pytest.approx(
        np.square(q - k).sum(-1).mean(), rel=1e-4
    )


def test_pixels_are_normalised_by_patch_and_only_hidden_ones_count() -> None:
    got = forward(plan_of("mim_pixel"))
    config = got.plan.config
    crops = views.augmented_patches(config, got.batch, (0,), exact=True)
    prediction = term_losses.predictions(got.plan, got.params, got.z, got.batch, (0,))[0]
    x = np.asarray(crops[0], np.float64)
    want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, ddof=1, keepdims=True) + 1e-6)
    error = np.square(np.asarray(prediction) - want).mean(-1)
    hidden = ~np.asarray(got.batch["mask"])
    assert got.losses["loss/pixel"] == pytest.approx(error[hidden].mean(), rel=1e-4)
    everything = forward(plan_of("auto_encoder"))
    assert everything.plan.passes == (FULL,) and not everything.plan.terms[0].hidden


def test_mae_decodes_hidden_cells_alone() -> None:
    plan = plan_of("mae", model__decoder__positions="absolute", model__decoder__cls="yes")
    got = forward(plan)
    shape = term_losses.predictions(plan, got.params, got.z, got.batch, (0,))[0].shape
    assert shape == (8, plan.config.hidden, 192)
    inputs = term_losses.decoder_inputs(plan, got.params, got.z, got.batch, (0,))[0]
    np.testing.assert_array_equal(
        inputs[1], mixing.split(got.batch["mask"], plan.config.tokens - plan.config.hidden)[0]
    )
    assert inputs[3] is not None  # the cls token


def test_data2vec_averages_blocks_and_reads_mask_tokens() -> None:
    plan = plan_of("data2vec", model__encoder__depth=2)
    got = forward(plan)
    (read,) = plan.passes
    assert read.filled and got.z[read].shape[1] == 1 + plan.config.tokens
    config = plan.config
    crops = views.augmented_patches(config, got.batch, (0,))
    mean = m3i.encode(config, got.trees["ema"]["encoder"], crops[0], blocks=2)[:, 1:]
    target = losses.layer_normalize(mean)
    prediction = m3i.linear(config, got.params, got.z[read][:, 1:], "tokens")
    d = np.abs(np.asarray(prediction - target, np.float64))
    cost = np.where(d < 2, d**2 / 4, d - 1).mean(-1)[~np.asarray(got.batch["mask"])]
    assert got.losses["loss/intra"] == pytest.approx(cost.mean(), rel=1e-4)


def test_densecl_matches_the_most_alike_token() -> None:
    got = forward(plan_of("densecl"))
    config, (_, term) = got.plan.config, got.plan.terms
    z = np.asarray(got.z[FULL][:, 1:], np.float64)
    features = np.asarray(got.goals[plans.TargetKey(term.target, None)], np.float64)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    match = np.einsum("bnd,bmd->bnm", unit(z), unit(features)).argmax(-1)
    keys = np.asarray(got.goals[got.plan.goal(term)], np.float64)
    p = unit(
        np.asarray(
            m3i.predict(config, got.params["heads"], term.head, got.z[FULL][:, 1:]), np.float64
        )
    )
    positive = np.take_along_axis(keys, match[..., None], 1)
    away = unit(keys.mean(1))  # of all cells, not of the matched ones
    logits = np.einsum("bnd,kd->bnk", p, away) / 0.2
    own = (p * unit(positive)).sum(-1) / 0.2
    b = np.arange(len(z))
    logits[b, :, b] = own
    assert got.losses["loss/dense"] == pytest.approx(
        (np.log(np.exp(logits).sum(-1)) - own).mean(), rel=1e-4
    )


def test_siamese_im_projects_the_target_too() -> None:
    plan = plan_of(
        "siamese_im",
        model__decoder__norm="batch",
        model__decoder__projector_depth=1,
        model__decoder__cls="yes",
    )
    got = forward(plan)
    (goal,) = plan.goals
    assert goal.space == "decoder"
    crops = views.augmented_patches(plan.config, got.batch, (1,))
    z = m3i.encode(plan.config, got.trees["ema"]["encoder"], crops[1])
    want = m3i.target_projection(plan.config, got.trees["ema"]["decoder"], z)[:, 1:]
    np.testing.assert_allclose(got.goals[goal], want, atol=1e-5)


# ---- degenerate cases
# -------------------------------------------------------------------------------------------------------------------


def test_a_mask_of_ones_is_the_unmixed_form() -> None:
    """M3I with every cell own (the partner's role switched off) is dense distillation of image
    i."""
    config = toy.settings(**SMALL)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, mask_ratio=0.0))
    mixed, whole = (plans.Plan(config, (token_term(read, 0),)) for read in (MIXED, FULL))
    whole = plans.Plan(
        dataclasses.replace(
            config,
            model=dataclasses.replace(
                config.model, decoder=dataclasses.replace(config.model.decoder, cls="no")
            ),
        ),
        whole.terms,
    )
    params = parameters(mixed)
    batch = batch_of(mixed, mask=np.ones((8, config.tokens), bool))
    a, b = forward(mixed, batch, params), forward(whole, batch, params)
    assert a.losses["loss/intra"] == pytest.approx(b.losses["loss/intra"], rel=1e-6)


def test_mixing_pixels_is_mixing_patch_embeddings() -> None:
    plan = plan_of((token_term(MIXED, 0),))
    got = forward(plan)
    crops = views.augmented_patches(plan.config, got.batch, (0,))
    kernel, bias = (got.params["encoder"]["patch_embed"][n] for n in ("kernel", "bias"))
    late = mixing.mix(crops[0] @ kernel + bias, got.batch["mask"])
    early = mixing.mix(crops[0], got.batch["mask"]) @ kernel + bias
    np.testing.assert_array_equal(late, early)


# ---- options
# ----------------------------------------------------------------------------------------------------------------------------


def test_isolated_images_are_two_masked_inputs() -> None:
    plan = plan_of((token_term(MIXED, 0),), objective__isolate=True)
    got = forward(plan)
    config = plan.config
    own, other = mixing.split(got.batch["mask"], config.tokens - config.hidden)
    crops = views.augmented_patches(config, got.batch, (0,))
    for index, image in ((own, crops[0]), (other, mixing.partner(crops[0]))):
        alone = m3i.encode(config, got.params["encoder"], image, index=index)[:, 1:]
        np.testing.assert_allclose(mixing.gather(got.z[MIXED][:, 1:], index), alone, atol=2e-5)
    open_to_both = forward(plan_of((token_term(MIXED, 0),)))
    assert np.abs(np.asarray(open_to_both.z[MIXED] - got.z[MIXED])).max() > 1e-3


def test_halves_are_every_other_row_of_flip() -> None:
    rows = tuple(t for t in terms.FORMS["m3i"] if t.name != "text")
    flip, halves = (
        forward(plan_of(rows, objective__pairing=which)) for which in ("flip", "halves")
    )
    assert halves.z[MIXED].shape[0] == 4
    np.testing.assert_allclose(halves.z[MIXED], flip.z[MIXED][::2], atol=1e-5)
    for place in (0, 1):
        a, b = (
            term_losses.predictions(f.plan, f.params, f.z, f.batch, (place,))[place]
            for f in (flip, halves)
        )
        np.testing.assert_allclose(a[::2], b, atol=1e-5)
    label = np.asarray(flip.batch["label"])
    tally = dict(
        zip(
            [(t.name, t.image) for t in halves.plan.terms],
            term_losses.loss_weights(halves.plan, halves.batch)[0],
            strict=True,
        )
    )
    assert (int(tally["category", "own"]), int(tally["category", "partner"])) == (
        (label[::2] >= 0).sum(),
        (label[1::2] >= 0).sum(),
    )


def test_joint_soft_label_reads_all_tokens_once() -> None:
    got = forward(plan_of("m3i", objective__soft_label="joint"))
    config = got.plan.config
    logits = np.asarray(
        m3i.category_logits(config, got.params, m3i.pool(config, got.params, got.z[MIXED][:, 1:])),
        np.float64,
    )
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    labels = [np.asarray(got.batch["label"]), np.asarray(mixing.partner(got.batch["label"]))]
    costs = [-(0.9 * log_p[np.arange(8), y] + 0.1 * log_p.mean(-1))[y >= 0] for y in labels]
    assert got.losses["loss/category"] == pytest.approx(np.concatenate(costs).mean(), rel=1e-4)


def test_symmetric_is_the_mean_of_both_directions() -> None:
    one = (token_term(FULL, 1),)
    both = terms.with_options(one, symmetric=True)
    batch = batch_of(plan_of(one))
    exchanged = {**batch, **{k: batch[k][:, ::-1] for k in ("views", "box", "flip")}}
    params = parameters(plan_of(one))
    # The moment C is that of both views then, so the error alone is compared.
    changes = {"objective__second_moment": 0.0}
    got = forward(plan_of(both, **changes), batch, params).losses["loss/inter"]
    there, back = (
        forward(plan_of(one, **changes), b, params).losses["loss/inter"] for b in (batch, exchanged)
    )
    assert got == pytest.approx((there + back) / 2, rel=1e-5)


def test_equal_captions_are_no_negatives() -> None:
    batch = batch_of(plan_of("clip"))
    batch["length"] = jnp.full_like(batch["length"], 5)
    batch["tokens"] = batch["tokens"].at[3].set(batch["tokens"][0])
    kept, ignored = (
        forward(plan_of("clip", objective__equal_captions=which), batch)
        for which in ("negatives", "ignored")
    )
    config, params = kept.plan.config, kept.params
    u = m3i.image_embedding(config, params, m3i.pool(config, params, kept.z[FULL][:, 1:]))
    v = m3i.text_embedding(config, params, batch["tokens"], batch["length"])
    u, v = (np.asarray(x, np.float64) / np.linalg.norm(x, axis=-1, keepdims=True) for x in (u, v))
    logits = np.exp(float(params["logit_scale"])) * u @ v.T
    for got, absent in ((kept, ()), (ignored, ((0, 3), (3, 0)))):
        left = logits.copy()
        for at in absent:
            left[at] = -np.inf
        cost = (np.log(np.exp(left).sum(0)) + np.log(np.exp(left).sum(1))) / 2 - np.diag(logits)
        assert got.losses["loss/text"] == pytest.approx(cost.mean(), rel=1e-4)


def test_shared_target_is_the_online_encoder() -> None:
    plan = plan_of("sim", objective__target_encoder="shared")
    got = forward(plan)
    crops = views.augmented_patches(plan.config, got.batch, (1,))
    (goal,) = plan.goals
    np.testing.assert_allclose(
        got.goals[goal], m3i.encode(plan.config, got.params["encoder"], crops[1])[:, 1:], atol=1e-5
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model__pool__query", "learned"),
        ("model__pool__kind", "mean"),
        ("model__pool__kind", "cls"),
    ],
)
def test_other_poolings_predict_annotations(option: str, value: str) -> None:
    plain, other = forward(plan_of("supervised")), forward(plan_of("supervised", **{option: value}))
    assert (
        np.isfinite(other.losses["loss/category"])
        and other.losses["loss/category"] != plain.losses["loss/category"]
    )


def test_a_constant_momentum_stays() -> None:
    one = trainer.optimizer.momentum(
        toy.settings(optim__ema=0.9, optim__ema_schedule="constant").optim, steps=10
    )
    assert [one(k) for k in (0, 5, 10)] == pytest.approx([0.9] * 3)


@functools.cache
def _contrast_gradients(count: int):
    """InfoNCE against the keys of the whole batch, and dense InfoNCE, in `count` microbatches."""
    head = ProjectionHead(
        projector=MlpShape(layers=2, norm="none"), predictor=MlpShape(layers=2, norm="none")
    )
    rows = (pooled_term(FULL, 1, head=head), token_term(FULL, 1, posterior=terms.Boltzmann()))
    plan = plan_of(rows, train__microbatches=count)
    params = parameters(plan)
    trees = {
        "ema": jax.tree.map(lambda a: a * 0.9, m3i.target_parts(plan.config, plan.terms, params))
    }
    return jax.jit(lambda p, t, b: step.objective_gradients(plan, p, t, b, jnp.float32(1)))(
        params, trees, batch_of(plan)
    )


def test_microbatches_contrast_with_the_whole_batch() -> None:
    (one, metrics, norms), (parts, metrics_2, norms_2) = (
        _contrast_gradients(1),
        _contrast_gradients(2),
    )
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))
    for name in ("loss/global", "loss/inter", "info/global", "info/inter"):
        np.testing.assert_allclose(metrics_2[name], metrics[name], rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(norms_2, norms, rtol=1e-4)

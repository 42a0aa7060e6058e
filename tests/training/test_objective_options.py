"""Options and degenerate cases of an objective, against the same written out by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax.models import m3i, pooling, text
from m3i_jax.objective import derived_terms, mixing, registry, terms
from m3i_jax.objective.terms import FULL, MIXED, MlpShape, ProjectionHead, pooled_term, token_term
from m3i_jax.training import plan as plans
from m3i_jax.training import predictions, pretrain_task, term_losses, trainer, views
from tests import toy
from tests.training.forward import (
    HEAD,
    SMALL,
    augmented_patches,
    batch_of,
    encode,
    forward,
    parameters,
    plan_of,
)


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
    crops = augmented_patches(plan.config, got.batch, (0,))
    kernel, bias = (got.params["encoder"]["patch_embed"][n] for n in ("kernel", "bias"))
    late = mixing.mix(crops[0] @ kernel + bias, got.batch["mask"])
    early = mixing.mix(crops[0], got.batch["mask"]) @ kernel + bias
    np.testing.assert_array_equal(late, early)


def test_isolated_images_are_two_masked_inputs() -> None:
    plan = plan_of((token_term(MIXED, 0),), objective__isolate=True)
    got = forward(plan)
    config = plan.config
    own, other = mixing.split(got.batch["mask"], config.tokens - config.hidden)
    crops = augmented_patches(config, got.batch, (0,))
    for index, image in ((own, crops[0]), (other, mixing.partner(crops[0]))):
        alone = encode(config, got.params["encoder"], image, index=index)[:, 1:]
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
    for i in (0, 1):
        a, b = (
            jax.jit(
                lambda p, z, inputs, f=f, i=i: predictions.predict_images(
                    f.plan, p, z, inputs, (i,)
                )[i]
            )(f.params, f.z, f.inputs)
            for f in (flip, halves)
        )
        np.testing.assert_allclose(a[::2], b, atol=1e-5)
    label = np.asarray(flip.batch["label"])
    counts = dict(
        zip(
            [(t.name, t.image) for t in halves.plan.terms],
            term_losses.loss_weights(halves.plan, halves.inputs)[0],
            strict=True,
        )
    )
    assert (int(counts["category", "own"]), int(counts["category", "partner"])) == (
        (label[::2] >= 0).sum(),
        (label[1::2] >= 0).sum(),
    )


def test_joint_soft_label_reads_all_tokens_once() -> None:
    got = forward(plan_of("m3i", objective__soft_label="joint"))
    config = got.plan.config
    predict = jax.jit(
        lambda params, z: m3i.category_logits(
            params, pooling.apply(config.model, params["pool"], z)
        )
    )
    logits = np.asarray(predict(got.params, got.z[MIXED][:, 1:]), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    labels = [np.asarray(got.batch["label"]), np.asarray(mixing.partner(got.batch["label"]))]
    costs = [-(0.9 * log_p[np.arange(8), y] + 0.1 * log_p.mean(-1))[y >= 0] for y in labels]
    assert got.losses["loss/category"] == pytest.approx(np.concatenate(costs).mean(), rel=1e-4)


def test_symmetric_is_the_mean_of_both_directions() -> None:
    one = (token_term(FULL, 1),)
    both = derived_terms.with_options(one, symmetric=True)
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
    u, v = jax.jit(
        lambda params, z, batch: (
            m3i.image_embedding(config, params, pooling.apply(config.model, params["pool"], z)),
            text.apply(config.model, params["text"], batch["tokens"], batch["length"]),
        )
    )(params, kept.z[FULL][:, 1:], batch)
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
    crops = augmented_patches(plan.config, got.batch, (1,))
    (key,) = plan.target_keys
    np.testing.assert_allclose(
        got.targets[key], encode(plan.config, got.params["encoder"], crops[1])[:, 1:], atol=1e-5
    )


@functools.cache
def supervised():
    return forward(plan_of("supervised"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model__pool__query", "learned"),
        ("model__pool__kind", "mean"),
        ("model__pool__kind", "cls"),
    ],
)
def test_other_poolings_predict_annotations(option: str, value: str) -> None:
    plain, other = supervised(), forward(plan_of("supervised", **{option: value}))
    assert other.losses["loss/category"] != plain.losses["loss/category"]
    config, (read,) = other.plan.config, other.plan.passes

    def logits_of(params, z_BxTxD):
        tokens, cls = z_BxTxD[:, 1:], z_BxTxD[:, 0]
        pooled = pooling.apply(config.model, params["pool"], tokens, cls_BxD=cls)
        return m3i.category_logits(params, pooled)

    logits = np.asarray(jax.jit(logits_of)(other.params, other.z[read]), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    label = np.asarray(other.batch["label"])
    cost = -(0.9 * log_p[np.arange(len(label)), label] + 0.1 * log_p.mean(-1))[label >= 0]
    assert other.losses["loss/category"] == pytest.approx(cost.mean(), rel=1e-4)


def test_a_constant_momentum_stays() -> None:
    one = trainer.optimizer.ema_momentum(
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
    plan = plan_of(rows, train__microbatches=count, **HEAD)
    params = parameters(plan)
    trees = {
        "ema": jax.tree.map(
            lambda a: a * np.float32(0.9), m3i.target_parts(plan.config, plan.terms, params)
        )
    }
    return jax.jit(
        lambda p, t, b: pretrain_task.objective_gradients(plan, p, t, b, jnp.float32(1))
    )(params, trees, batch_of(plan))


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


def test_weights_are_ratios_and_a_term_of_weight_0_alone_has_no_loss() -> None:
    """It may be the only one of its group, to be seen in the log: 0, and not 0 / 0. A small weight
    is that of a mean, too, also where it makes less than one row of all of them."""
    light = dataclasses.replace(terms.text_term(terms.FULL), weight=1e-3)
    registry.register_form("light", (terms.token_term(terms.FULL, 0, weight=0.0), light))
    plan = plan_of("light")
    batch = {k: jnp.asarray(v) for k, v in toy.batch(plan.config).items()}
    inputs = views.pass_inputs(plan.config, plan.passes, batch)
    counts, weights = term_losses.loss_weights(plan, inputs)
    assert float(weights[0]) == 0 and float(counts[1]) > 1
    assert float(weights[1] * counts[1]) == pytest.approx(1)

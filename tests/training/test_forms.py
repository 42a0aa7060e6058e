"""What the rows of Table 1 and the published methods compute, against the same written out by hand.
Losses are compared forwards only; test_step.py shows that gradients are those of the plain sum."""

import numpy as np
import pytest

from m3i_jax.models import decoder, heads
from m3i_jax.objective import losses, mixing
from m3i_jax.objective.terms import FULL
from m3i_jax.training import plan as plans
from m3i_jax.training import predictions
from tests.training.forward import HEAD, augmented_patches, encode, forward, plan_of


@pytest.mark.parametrize("temperature", [0.2, pytest.param(0.5, marks=pytest.mark.slow)])
def test_instance_is_infonce_of_two_pooled_projections(temperature: float) -> None:
    got = forward(plan_of("instance", objective__temperature=temperature, **HEAD))
    config, head = got.plan.config, got.plan.terms[0].head
    query = heads.apply_predictor(
        config.model, got.params["heads"]["global"], head, got.z[FULL][:, 1:].mean(1)
    )
    crops = augmented_patches(config, got.batch, (1,))
    key = heads.apply_projector(
        config.model,
        got.trees["ema"]["heads"]["global"],
        head,
        encode(config, got.trees["ema"]["encoder"], crops[1])[:, 1:].mean(1),
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
    crops = augmented_patches(config, got.batch, (0,), exact=True)
    prediction = predictions.predict_images(got.plan, got.params, got.z, got.inputs, (0,))[0]
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
    shape = predictions.predict_images(plan, got.params, got.z, got.inputs, (0,))[0].shape
    assert shape == (8, plan.config.hidden, 192)
    inputs = predictions.decoder_inputs(plan, got.params, got.z, got.inputs, (0,))[0]
    np.testing.assert_array_equal(
        inputs[1], mixing.split(got.batch["mask"], plan.config.tokens - plan.config.hidden)[0]
    )
    assert inputs[3] is not None  # the cls token


def test_data2vec_averages_blocks_and_reads_mask_tokens() -> None:
    plan = plan_of("data2vec", model__encoder__depth=2)
    got = forward(plan)
    (read,) = plan.passes
    assert read.mask_tokens and got.z[read].shape[1] == 1 + plan.config.tokens
    config = plan.config
    crops = augmented_patches(config, got.batch, (0,))
    mean = encode(config, got.trees["ema"]["encoder"], crops[0], blocks=2)[:, 1:]
    target = losses.layer_normalize(mean)
    prediction = heads.apply_linear(
        config.model, got.params["heads"]["linear_tokens"], got.z[read][:, 1:]
    )
    d = np.abs(np.asarray(prediction - target, np.float64))
    cost = np.where(d < 2, d**2 / 4, d - 1).mean(-1)[~np.asarray(got.batch["mask"])]
    assert got.losses["loss/intra"] == pytest.approx(cost.mean(), rel=1e-4)


def test_densecl_matches_the_most_alike_token() -> None:
    got = forward(plan_of("densecl"))
    config, (_, term) = got.plan.config, got.plan.terms
    z = np.asarray(got.z[FULL][:, 1:], np.float64)
    features = np.asarray(got.targets[plans.TargetKey(term.target, None)], np.float64)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    match = np.einsum("bnd,bmd->bnm", unit(z), unit(features)).argmax(-1)
    keys = np.asarray(got.targets[got.plan.target_key(term)], np.float64)
    p = unit(
        np.asarray(
            heads.apply_predictor(
                config.model, got.params["heads"]["dense"], term.head, got.z[FULL][:, 1:]
            ),
            np.float64,
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
    (key,) = plan.target_keys
    assert key.space == "decoder"
    crops = augmented_patches(plan.config, got.batch, (1,))
    z = encode(plan.config, got.trees["ema"]["encoder"], crops[1])
    want = decoder.project_targets(plan.config.model, got.trees["ema"]["decoder"], z)[:, 1:]
    np.testing.assert_allclose(got.targets[key], want, atol=1e-5)

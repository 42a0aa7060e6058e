"""Fine-tuning through the step of pre-training: the loss is the cross-entropy of blended targets, a
frozen encoder stays, LARS is used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import parallel
from m3i_jax.augment import mixup, photometric
from m3i_jax.models import m3i, vit
from m3i_jax.training import plan, pretrain_task
from m3i_jax.training.trainer import Trainer, abstract_batch
from tests import toy
from tests.training.forward import augmented_patches

FINE = {
    "objective__forms": "finetune",
    "data__captions": "no",
    "model__encoder__depth": 1,
    "model__encoder__drop_path": 0.0,
    "model__pool__kind": "mean",
    "model__pool__projection": False,
    "model__category_std": 0.5,
    "data__augment__mixup": 0.8,
    "data__augment__cutmix": 1.0,
}


def smoothed(label: np.ndarray, classes: int, smoothing: float) -> np.ndarray:
    return np.where(
        np.arange(classes) == label[:, None],
        1 - smoothing + smoothing / classes,
        smoothing / classes,
    )


def test_the_input_view_alone_is_erased() -> None:
    config = toy.settings(**FINE, data__augment__erase_p=1.0)
    batch = {name: jnp.asarray(x) for name, x in toy.batch(config).items()}
    got = augmented_patches(config, batch, (0, 1), exact=True)
    for view in (0, 1):
        x = photometric.mirror(batch["views"][:, view], batch["flip"][:, view])
        x = photometric.augment(
            x, batch["position"], seed=config.seed, view=view, settings=config.data.augment
        )
        x = photometric.normalize(x, config.data.augment)
        if view == 0:
            x = mixup.random_erase(x, batch["position"], seed=config.seed, probability=1.0)
        wanted = vit.patchify(x, config.model.encoder.patch_size)
        np.testing.assert_allclose(got[view], wanted, atol=1e-5)


@pytest.mark.parametrize("microbatches", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_loss_is_that_of_blended_images_and_targets(microbatches: int) -> None:
    """Pixels blended in numpy before they are cut into patches; soft targets as timm makes them,
    cross-entropy over them."""
    config = toy.settings(**FINE, train__microbatches=microbatches)
    batch = {name: jnp.asarray(x) for name, x in toy.batch(config).items()}
    made = plan.build_plan(config)
    params = jax.jit(
        lambda: m3i.init(config, jax.random.key(0), made.terms, classes=toy.CLASSES, vocabulary=0)
    )()
    _, metrics, _ = jax.jit(
        lambda p, b: pretrain_task.objective_gradients(
            made, p, {"ema": {"encoder": p["encoder"]}}, b, 1.0
        )
    )(params, batch)

    how = jax.device_get(
        mixup.draw_mixup(batch["position"], seed=config.seed, size=32, settings=config.data.augment)
    )
    assert how.cut.any() and not how.cut.all()
    shown = np.where(
        np.asarray(batch["flip"])[:, 0, None, None, None],
        batch["views"][:, 0, :, ::-1],
        batch["views"][:, 0],
    )
    pixels = np.asarray(photometric.normalize(shown, config.data.augment))
    blended = np.empty_like(pixels)
    for row, (share, (top, left, bottom, right), cut) in enumerate(zip(*how, strict=True)):
        blended[row] = pixels[row] if cut else share * pixels[row] + (1 - share) * pixels[row ^ 1]
        blended[row, top:bottom, left:right] = pixels[row ^ 1, top:bottom, left:right]
    z = jax.jit(lambda p, x: vit.apply(config.model, p, vit.patchify(x, 8), grid=4))(
        params["encoder"], blended
    )
    mean = np.asarray(z, np.float64)[:, 1:].mean(1)
    unit = (mean - mean.mean(1, keepdims=True)) / np.sqrt(mean.var(1, keepdims=True) + 1e-6)
    logits = unit @ np.asarray(params["category"]["kernel"]) + np.asarray(
        params["category"]["bias"]
    )
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    label, weight = np.asarray(batch["label"]), np.zeros(16)
    target = np.zeros((16, toy.CLASSES))
    for who, share in ((np.arange(16), how.share), (np.arange(16) ^ 1, 1 - how.share)):
        known = label[who] >= 0
        target += (share * known)[:, None] * smoothed(label[who], toy.CLASSES, 0.1)
        weight += share * known
    wanted = -(target * log_p).sum() / weight.sum()
    assert weight.min() < 0.99  # rows without a category are there
    np.testing.assert_allclose(float(metrics["loss/category"]), wanted, rtol=1e-4)


def test_a_frozen_encoder_stays_and_the_head_learns_by_lars() -> None:
    config = toy.settings(
        **FINE
        | {
            "objective__forms": "supervised",
            "model__pool__norm": "batch",
            "model__category_std": 0.3,
        },
        model__encoder__freeze=True,
        optim__rule="lars",
        optim__weight_decay=0.01,
        optim__lr=1.0,
        optim__warmup_steps=0,
        optim__clip=0.0,
        optim__ema_of="all",
    )
    trainer = Trainer(config, parallel.make_mesh((1, 1, 1), jax.devices()[:1]), 0)
    state = trainer.init()
    before = jax.device_get(state.params)
    assert "pool" not in before and set(before) == {"encoder", "category"} == set(
        state.opt["target"].params
    )
    batch = parallel.to_global(trainer.mesh, toy.batch(config))
    losses = []
    for _ in range(40):
        state, metrics = trainer.step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0], losses
    after = jax.device_get(state.params)
    for old, new in zip(
        jax.tree.leaves(before["encoder"]), jax.tree.leaves(after["encoder"]), strict=True
    ):
        np.testing.assert_array_equal(old, new)  # neither gradient nor decay
    assert list(state.opt) == ["balance", "clip", "lars", "bounds", "target"]
    average = np.asarray(state.opt["target"].params["category"]["kernel"])
    assert (
        0
        < np.abs(average - before["category"]["kernel"]).max()
        < np.abs(after["category"]["kernel"] - before["category"]["kernel"]).max()
    )


def test_a_batch_need_not_hold_what_only_the_step_draws() -> None:
    """The plan of a step is counted from the shapes of a batch of the pipeline."""
    config = toy.settings(**FINE)
    trainer = Trainer(config, parallel.make_mesh((1, 1, 1), jax.devices()[:1]), 0)
    out = jax.eval_shape(trainer.trace, trainer.template, abstract_batch(config))
    assert "loss/category" in out[1]

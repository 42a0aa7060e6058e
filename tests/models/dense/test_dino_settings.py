"""DINO's variants: the federated loss, heads of their own for every layer, activations that are
computed again, suppression; and denoising against a rendering in numpy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.models.dense import denoising, dino, dino_decoder
from m3i_jax.objective import box_matching
from m3i_jax.objective.boxes import box_iou, center_boxes, corner_boxes
from m3i_jax.objective.dense_losses import federated_categories

SMALL = {"heads": 2, "sampled": 1, "hidden": 8, "queries": 6, "encoder_depth": 1, "depth": 2}
CLASSES = 7


def settings(**changes: Any) -> schema.Detect:
    own = {key: changes.pop(key) for key in list(changes) if key in schema.Dino.__annotations__}
    return schema.Detect(
        **{"head": "dino", "masks": False, "strides": (8, 16), "width": 8, **changes},
        dino=schema.Dino(**{**SMALL, "denoising": 4, **own}),
    )


def decoded(made: schema.Detect, params: Any) -> Any:
    r = np.random.default_rng(0)
    content, memory = (jnp.asarray(r.normal(size=(2, n, 8)), jnp.float32) for n in (6, 20))
    boxes = jnp.asarray(r.uniform(0.2, 0.8, (2, 6, 4)), jnp.float32)
    cells = jnp.array([[[4, 4], [2, 2]], [[3, 4], [2, 2]]])
    visible = jnp.asarray(r.random((2, 6, 6)) < 0.7) | jnp.eye(6, dtype=bool)

    def value(params: Any) -> Any:
        logits, found = dino_decoder.decode(
            made, params, content, boxes, memory, ((4, 4), (2, 2)), cells, visible
        )
        return jnp.square(logits).sum() + found.sum(), (logits, found)

    (_, out), grads = jax.jit(jax.value_and_grad(value, has_aux=True))(params)
    return out, grads


def noisy(params: Any) -> Any:
    r = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.1 * r.normal(size=x.shape).astype(np.float32), params)


@pytest.mark.slow
def test_heads_of_every_layer_and_activations_computed_again() -> None:
    """Equal heads in every layer predict as shared ones do, and the gradient of the shared ones is
    the sum of theirs; computed again, nothing changes."""
    shared = settings()
    params = noisy(dino_decoder.init_decoder(shared, 2, CLASSES, jax.random.key(0)))
    own = settings(shared_heads=False, remat=True)
    assert jax.tree.map(
        jnp.shape, dino_decoder.init_decoder(own, 2, CLASSES, jax.random.key(0))["heads"]["layers"]
    ) == jax.tree.map(lambda x: (2, *x.shape), params["heads"])
    twice = params | {
        "heads": {"layers": jax.tree.map(lambda x: jnp.stack([x] * 2), params["heads"])}
    }
    (out, grads), (other, parts) = decoded(shared, params), decoded(own, twice)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), out, other)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b.sum(0), rtol=1e-4, atol=1e-4),
        grads["heads"],
        parts["heads"]["layers"],
    )


def focal(logits: np.ndarray, target: np.ndarray) -> np.ndarray:
    p = 1 / (1 + np.exp(-logits))
    right, weight = np.where(target, p, 1 - p), np.where(target, 0.25, 0.75)
    return -weight * (1 - right) ** 2 * np.log(right)


def test_the_federated_loss_counts_the_kept_categories_alone() -> None:
    """Those of the image's objects and others by the root of their frequency; background is one of
    the number."""
    r = np.random.default_rng(2)
    classes = jnp.array([[2, 5, -1], [-1, -1, -1]])
    draws = {
        "categories": jnp.asarray(r.random((2, CLASSES)), jnp.float32),
        "frequency": jnp.broadcast_to(jnp.array([9.0, 4, 1, 0, 2, 1, 7]), (2, CLASSES)),
    }
    made = settings(loss="federated", federated_classes=5)
    kept = np.asarray(dino._kept_categories(made, classes, draws))
    assert kept[0, [2, 5]].all() and kept.sum(1).tolist() == [4, 4] and not kept[:, 3].any()
    want = federated_categories(
        [2, 5, CLASSES], None, draws["categories"][0], draws["frequency"][0], count=5
    )
    np.testing.assert_array_equal(kept[0], want)
    assert dino._kept_categories(settings(), classes, draws) is None

    logits, learned = r.normal(size=(4, CLASSES)), np.array([2, -1, 5, -1])
    cost = focal(logits, learned[:, None] == np.arange(CLASSES)) * np.array([[1, 1, 0, 1]]).T
    got = box_matching.focal_class_loss(logits, learned, np.array([1, 1, 0, 1]), kept[0])
    np.testing.assert_allclose(got, cost[:, kept[0]].sum(), rtol=1e-5)
    counts = [3.0] * CLASSES
    shapes = jax.eval_shape(
        lambda key: dino.losses(
            made,
            dino.init(made, {8: 5}, CLASSES, key),
            {8: jnp.zeros((2, 4, 4, 5))},
            jnp.full((2, 2), 32),
            jnp.zeros((2, 3, 4)),
            classes,
            None,
            jax.random.split(key, 2),
            frequency_K=counts,
        ),
        jax.random.key(0),
    )
    assert {"dn_cls", "enc_giou"} <= set(shapes[0])


def test_noise_in_numpy() -> None:
    """Corners of positive slots move by less than, of negative ones by half a side or more of the
    scale; classes change with the given probability; nothing leaves the image."""
    boxes = center_boxes(np.array([[0.1, 0.2, 0.5, 0.9], [0.0, 0.0, 0.3, 0.2], [0, 0, 0, 0]]))
    classes, slots = jnp.array([1, 6, -1]), denoising.denoising_slots(200, 3)
    draws = denoising.denoising_draws(jax.random.key(3), slots)
    noised = denoising.noise_objects(
        boxes, classes, draws, number=200, classes=CLASSES, label_noise=0.25, box_noise=0.4
    )
    host = jax.device_get(noised)
    assert int(noised.groups) == 100 and (host.group_S == np.arange(400) // 4).all()
    place = np.arange(400) % 4
    np.testing.assert_array_equal(host.object_S, place % 2)
    np.testing.assert_array_equal(host.positive_S, place < 2)
    change, other = np.asarray(draws["relabel"]) < 0.25, np.asarray(draws["category"]) * CLASSES
    wanted = np.where(change, other.astype(int), np.asarray(classes)[host.object_S])
    np.testing.assert_array_equal(host.class_S, wanted)
    assert 0.15 < change.mean() < 0.35 and set(host.class_S[change]) == set(range(CLASSES))
    corners = np.asarray(corner_boxes(boxes))[host.object_S]
    half = np.tile((corners[:, 2:] - corners[:, :2]) / 2, 2)
    share = np.asarray(draws["move"]) + ~host.positive_S[:, None]
    sign = np.where(np.asarray(draws["sign"]) < 0.5, -1, 1)
    moved = np.clip(corners + sign * share * half * 0.4, 0, 1)
    np.testing.assert_allclose(corner_boxes(noised.boxes_Sx4), moved, atol=1e-6)
    crowded = denoising.noise_objects(
        boxes, classes, draws, number=1, classes=CLASSES, label_noise=0.0, box_noise=0.0
    )
    assert int(crowded.groups) == 1 and int((crowded.group_S >= 0).sum()) == 4


def test_suppression_of_detections() -> None:
    """Two queries at one place: the lower of the same class goes where `nms` is set."""
    made = {"detections": 12, "score_threshold": 0.0}
    params = dino.init(settings(**made), {8: 5}, CLASSES, jax.random.key(0))
    last = params["decoder"]["heads"]["boxes"]["fc3"]
    last["bias"] = jnp.array([0.0, 0.0, 4.0, 4.0])  # boxes that overlap
    maps, size = {8: jnp.ones((1, 4, 4, 5))}, jnp.array([[32, 32]])
    run = lambda **more: jax.jit(
        lambda params: dino.detect(settings(**made, **more), params, maps, size)
    )(params)
    every, few = run(), run(nms=0.2)
    assert bool(every["valid"].all()) and 0 < int(few["valid"].sum()) < 12
    boxes, classes = np.asarray(every["boxes"][0]), np.asarray(every["classes"][0])
    iou_12x12, kept = np.asarray(box_iou(boxes, boxes)), []
    for i in range(12):
        if all(classes[i] != classes[j] or iou_12x12[i, j] <= 0.2 for j in kept):
            kept.append(i)
    assert np.flatnonzero(few["valid"][0]).tolist() == kept
    scores = (np.asarray(found["scores"][0])[kept] for found in (few, every))
    np.testing.assert_array_equal(*scores)

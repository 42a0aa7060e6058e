"""DINO against its authors' own code: selected tokens, every layer's predictions, matches, losses,
noised objects, gradients and detections, from arrays of tests/data/make_dino.py."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.interop.dino_weights import load_dino
from m3i_jax.models.dense import denoising, dino, dino_decoder, dino_encoder
from m3i_jax.objective import box_matching
from m3i_jax.objective.boxes import center_boxes
from tests.data import dino_reference as case

FILE = pathlib.Path(__file__).parents[2] / "data" / "dense" / "dino.npz"
SETTINGS = schema.Detect(
    head="dino",
    masks=False,
    strides=(8, 16, 32),
    width=case.WIDTH,
    score_threshold=0.0,
    detections=case.DETECTIONS,
    dino=schema.Dino(
        queries=case.QUERIES,
        heads=case.HEADS,
        sampled=case.POINTS,
        encoder_depth=case.ENCODER_DEPTH,
        depth=case.DEPTH,
        hidden=case.HIDDEN,
        denoising=case.DENOISING,
        label_noise=case.LABEL_NOISE,
        box_noise=case.BOX_NOISE,
    ),
)
IMAGES = range(3)


@functools.cache
def wanted() -> dict[str, np.ndarray]:
    with np.load(FILE) as file:
        return {name: file[name] for name in file.files}


@functools.cache
def names() -> dict[str, tuple[int, ...]]:
    """Shapes of the reference's parameters by name, from those of the head."""
    d, hidden, k = case.WIDTH, case.HIDDEN, case.CLASSES
    places = case.HEADS * 3 * case.POINTS
    linear = {
        "sampling_offsets": (2 * places, d),
        "attention_weights": (places, d),
        "linear1": (hidden, d),
        "linear2": (d, hidden),
        "class_embed.0": (k, d),
        "enc_out_class_embed": (k, d),
        "ref_point_head.layers.0": (d, 2 * d),
        "bbox_embed.0.layers.2": (4, d),
        "enc_out_bbox_embed.layers.2": (4, d),
        "input_proj.0.0": (d, case.CHANNELS[0], 1, 1),
        "input_proj.1.0": (d, case.CHANNELS[1], 1, 1),
        "input_proj.2.0": (d, case.CHANNELS[1], 3, 3),
    }
    whole = {
        "transformer.level_embed": (3, d),
        "transformer.tgt_embed.weight": (case.QUERIES, d),
        "label_enc.weight": (k + 1, d),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for key in (key for key in wanted() if key.startswith("gradient/")):
        name = key.removeprefix("gradient/")
        layer, _, kind = name.rpartition(".")
        norm = ".norm" in layer or "_norm" in layer or layer.endswith(".1") and "proj" in layer
        shape = next((s for end, s in linear.items() if layer.endswith(end)), (d, d))
        if name in whole:
            shapes[name] = whole[name]
        elif kind.startswith("in_proj"):
            shapes[name] = (3 * d, d) if kind.endswith("weight") else (3 * d,)
        else:
            shapes[name] = (d,) if norm else shape if kind == "weight" else shape[:1]
    return shapes


@functools.cache
def params() -> Any:
    table = {name: case.parameter(name, shape) for name, shape in names().items()}
    tree = load_dino(table)["head"]
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


@functools.cache
def batch() -> Any:
    given = case.inputs()
    maps = dict(zip(case.STRIDES, map(jnp.asarray, given["maps"]), strict=True))
    draws = {"denoising": {name: jnp.asarray(x) for name, x in given["draws"].items()}}
    return maps, given["size"], given["boxes"], given["classes"], draws


def close(got: Any, want: np.ndarray, tolerance: float, name: str) -> None:
    scale = max(float(np.abs(want).max()), 1e-6)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale, err_msg=name)


def total(tree: Any, maps: Any, boxes: Any, classes: Any) -> Any:
    """The sum of the losses over the objects, as the task divides it, and its parts."""
    _, size, *_, draws = batch()
    sums, _ = dino.losses_from_noise(SETTINGS, tree, maps, size, boxes, classes, draws)
    weighted = sum(dino.WEIGHTS[name.rpartition("_")[2]] * x.sum() for name, x in sums.items())
    return weighted / dino.object_divisor(classes), sums


value_and_gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))


@functools.cache
def made() -> Any:
    maps, _, boxes, classes, _ = batch()
    return value_and_gradients(params(), maps, boxes, classes)


def test_the_tree_of_the_weights_is_that_of_the_head() -> None:
    channels = dict(zip(case.STRIDES, case.CHANNELS, strict=True))
    own = jax.eval_shape(
        lambda key: dino.init(SETTINGS, channels, case.CLASSES, key), jax.random.key(0)
    )
    shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)
    assert shapes(own) == shapes(params())


@pytest.mark.parametrize("image", IMAGES)
def test_losses_of_every_layer(image: int) -> None:
    (_, sums), _ = made()
    for name in ("cls", "l1", "giou", "dn_cls", "dn_l1", "dn_giou", "enc_cls", "enc_l1"):
        close(sums[name][image], wanted()[f"{image}/{name}"], 1e-5, name)


@functools.cache
def predicted() -> Any:
    """(selected tokens, logits and boxes of matched queries in all layers) without noised
    objects, which matched queries do not see."""

    def run(tree: Any, maps: Any, size: Any) -> Any:
        memory, shapes, valid = dino_encoder.encode_levels(SETTINGS, tree["encoder"], maps, size)
        found = dino_encoder.select_tokens(SETTINGS, tree["encoder"], memory, shapes, valid)
        content, start = dino._matched_queries(tree, found)
        decoded = dino_decoder.decode(
            SETTINGS, tree["decoder"], content, start, memory, shapes, valid
        )
        return found, decoded

    maps, size, *_ = batch()
    return jax.jit(run)(params(), maps, size)


@pytest.mark.parametrize("image", IMAGES)
def test_predictions_of_every_layer_and_their_matches(image: int) -> None:
    found, (logits, boxes) = predicted()
    all_logits = jnp.concatenate([logits[image], found.logits_BxQxK[image][None]])
    all_boxes = jnp.concatenate([boxes[image], found.boxes_BxQx4[image][None]])
    close(all_logits, wanted()[f"{image}/logits"], 1e-5, "logits")
    close(all_boxes, wanted()[f"{image}/boxes"], 1e-5, "boxes")
    _, size, targets, classes, _ = batch()
    target = center_boxes(targets[image] / np.tile(size[image, ::-1], 2).astype(np.float32))
    match = jax.jit(jax.vmap(box_matching.match_predictions, (0, 0, None, None)))(
        all_logits, all_boxes, classes[image], target
    )
    np.testing.assert_array_equal(match, wanted()[f"{image}/match"])


def test_gradients() -> None:
    """Of every parameter, and of the maps."""
    _, (of_params, of_maps) = made()
    for i, stride in enumerate(case.STRIDES):
        close(of_maps[stride], wanted()[f"gradient_of_map/{i}"], 1e-4, f"map {stride}")
    # the table of an array whose numbers are positions finds where each of theirs went
    places, offset = {}, 0
    for name, shape in names().items():
        count = int(np.prod(shape))
        places[name] = (offset + np.arange(count, dtype=np.float64)).reshape(shape)
        offset += count
    index = load_dino(places)["head"]
    flat = np.zeros(offset)
    for where, grad in zip(jax.tree.leaves(index), jax.tree.leaves(of_params), strict=True):
        flat[where.astype(int)] = grad
    for name, where in places.items():
        got, want = flat[where.astype(int)], wanted()[f"gradient/{name}"]
        scale = max(float(want[0]), 1e-3)
        np.testing.assert_allclose(case.summary(got), want, rtol=0, atol=1e-4 * scale, err_msg=name)
        if f"whole_gradient/{name}" in wanted():
            close(got, wanted()[f"whole_gradient/{name}"], 1e-4, name)


def test_detections() -> None:
    maps, size, *_ = batch()
    found = jax.jit(lambda tree, maps: dino.detect(SETTINGS, tree, maps, size))(params(), maps)
    for image in IMAGES:
        assert bool(found["valid"][image].all())
        close(found["scores"][image], wanted()[f"{image}/detect_scores"], 1e-5, "scores")
        np.testing.assert_array_equal(found["classes"][image], wanted()[f"{image}/detect_labels"])
        limit = np.tile(size[image, ::-1], 2)
        boxes = np.clip(wanted()[f"{image}/detect_boxes"], 0, limit)  # theirs are not cut
        close(found["boxes"][image], boxes, 1e-5, "boxes")
    some = dataclasses.replace(SETTINGS, score_threshold=float(found["scores"][0, :2].mean()))
    few = jax.jit(lambda tree, maps: dino.detect(some, tree, maps, size))(params(), maps)
    assert few["valid"][0].tolist() == [True] + [False] * (len(few["valid"][0]) - 1)


def test_noised_objects_do_not_change_the_others() -> None:
    """And an image without an object has none; its losses are finite."""
    maps, _, boxes, classes, _ = batch()
    none = np.full_like(classes, -1)
    (value, sums), (grads, _) = value_and_gradients(params(), maps, 0 * boxes, none)
    assert float(value) > 0 and not any(
        sums[name].any() for name in ("l1", "giou", "dn_cls", "dn_l1", "dn_giou", "enc_l1")
    )
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(grads))


def test_objects_need_not_come_first() -> None:
    """The slots of noised objects follow the objects, wherever padding is."""
    _, size, boxes, classes, draws = batch()
    target = center_boxes(boxes[0] / np.tile(size[0, ::-1], 2).astype(np.float32))
    settings = {"number": 50, "classes": 5, "label_noise": 0.25, "box_noise": 0.4}
    one = {name: x[0] for name, x in draws["denoising"].items()}
    first = denoising.noise_objects(target, jnp.asarray(classes[0]), one, **settings)
    order = np.array([3, 0, 1, 2])  # the padding first
    other = denoising.noise_objects(target[order], jnp.asarray(classes[0][order]), one, **settings)
    assert float(first.groups) == 16 and int(first.group_S.max()) == 15
    used = first.group_S >= 0
    assert int(used.sum()) == 96 and int(first.positive_S.sum()) == 48
    np.testing.assert_array_equal(order[other.object_S][used], first.object_S[used])
    np.testing.assert_array_equal(other.boxes_Sx4[used], first.boxes_Sx4[used])


def test_other_tables_of_weights_are_refused() -> None:
    table = {name: case.parameter(name, shape) for name, shape in names().items()}
    # as in a file: the heads under the names of every layer, and a backbone
    again = {"class_embed.1.bias": table["transformer.decoder.class_embed.0.bias"]}
    backbone = {"backbone.0.body.conv1.weight": np.zeros((4, 3, 7, 7))}
    same = load_dino({"model": table | again | backbone})["head"]
    jax.tree.map(np.testing.assert_array_equal, same, load_dino(table)["head"])
    with pytest.raises(UserError, match="unknown names extra"):
        load_dino(table | {"extra": np.zeros(1)})
    with pytest.raises(UserError, match=r"transformer.level_embed is missing"):
        load_dino({k: v for k, v in table.items() if k != "transformer.level_embed"})

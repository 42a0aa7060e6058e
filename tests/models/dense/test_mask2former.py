"""Mask2Former against transformers' (`tests/data/make_mask2former.py`): predictions, assignments,
losses and gradients; and its points and class maps against plain renderings."""

import functools
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.interop.mask2former_weights import load_mask2former
from m3i_jax.models.dense import mask2former, mask2former_task
from m3i_jax.models.dense.map_sampling import sample_points
from m3i_jax.models.dense.mask2former_losses import (
    MaskPoints,
    class_masks,
    class_shares,
    draw_points,
    mask2former_losses,
    present_classes,
)
from m3i_jax.models.dense.masked_decoder import QueryPredictions
from m3i_jax.models.dense.pixel_decoder import decode_pixels
from m3i_jax.objective.mask_matching import mask_costs, match_masks

FILE = pathlib.Path(__file__).parents[2] / "data" / "dense" / "mask2former.npz"
STRIDES, CLASSES = (4, 8, 16, 32), 5
SETTINGS = schema.Segment(
    head="mask2former",
    strides=STRIDES,
    width=64,
    mask2former=schema.Mask2Former(
        queries=7,
        heads=4,
        encoder_depth=2,
        encoder_hidden=32,
        depth=4,
        hidden=48,
        points=40,
    ),
)


@functools.cache
def stored() -> dict[str, np.ndarray]:
    with np.load(FILE) as file:
        return dict(file)


def table(part: str) -> dict[str, np.ndarray]:
    """{name: array} of the names below a part."""
    return {k.removeprefix(part): v for k, v in stored().items() if k.startswith(part)}


def params() -> Any:
    state = {name: array.astype("f4") for name, array in table("state/").items()}
    return load_mask2former(state, STRIDES)


def maps() -> dict[int, np.ndarray]:
    given = (stored()[f"map/{i}"].astype("f4") for i in range(4))
    return {s: x.transpose(0, 2, 3, 1) for s, x in zip(STRIDES, given, strict=True)}


def points() -> MaskPoints:
    return MaskPoints(*(stored()[f"points/{name}"] for name in ("match", "candidates", "fresh")))


def weighted(tree: Any, given: Any) -> tuple[jax.Array, Any]:
    """The whole loss, as its authors divide it, and (predictions, sums, queries)."""
    labels = jnp.asarray(stored()["labels"], jnp.int32)
    made = mask2former.apply(SETTINGS, tree, given)
    keys = jax.random.split(jax.random.key(0), len(labels))
    sums, query = mask2former_losses(
        SETTINGS, made, class_masks(SETTINGS, labels, CLASSES), keys, points()
    )
    divisors = mask2former_task.mask_divisors(SETTINGS, labels, CLASSES)
    means = sums / jnp.stack([divisors[kind] for kind in ("class", "mask", "dice")])
    return (means * jnp.array([2.0, 5.0, 5.0])).sum(), (made, means, query)


@functools.cache
def ours() -> Any:
    run = jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True)
    return jax.device_get(jax.jit(run)(params(), maps()))


def close(got: Any, wanted: np.ndarray, tolerance: float, name: str = "") -> None:
    """Relative to the largest entry."""
    scale = float(np.abs(wanted).max())
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * scale, err_msg=name)


def test_the_tree_is_that_of_init() -> None:
    channels = {s: x.shape[-1] for s, x in maps().items()}
    call = lambda key: mask2former.init(SETTINGS, channels, CLASSES, key)[0]
    wanted = jax.eval_shape(call, jax.random.key(0))
    got = jax.tree.map(jnp.shape, params())
    assert jax.tree.map(jnp.shape, wanted) == got


def test_pixels_are_those_of_transformers() -> None:
    made = jax.jit(functools.partial(decode_pixels, SETTINGS))(params()["pixel"], maps())
    for i, x in enumerate(made.maps):
        close(x.transpose(0, 3, 1, 2), stored()[f"pixels/{i}"], 1e-5)
    close(made.features.transpose(0, 3, 1, 2)[:, ::4], stored()["features"], 1e-5)


def test_predictions_are_those_of_transformers() -> None:
    made = ours()[0][1][0]
    close(made.classes_SxBxQxK1, stored()["classes"], 1e-5)
    close(made.masks_SxBxhxwxQ.transpose(0, 1, 4, 2, 3), stored()["masks"], 1e-5)
    scores = mask2former.semantic_scores(made[0][-1], made[1][-1], (64, 96))
    close(scores[:, ::8, ::8].transpose(0, 3, 1, 2), stored()["scores"], 1e-5)


def test_assignments_and_losses_are_those_of_transformers() -> None:
    """Three images of four, one and no categories; every set is matched by itself."""
    (total, (_, means, query)), _ = ours()
    np.testing.assert_array_equal(query, stored()["query"])
    close(means, stored()["losses"], 1e-5)
    wanted = (stored()["losses"] * [2, 5, 5]).sum()
    np.testing.assert_allclose(total, wanted, rtol=1e-5)


def test_gradients_are_those_of_transformers() -> None:
    """Up to 500 numbers of every parameter, and those of the maps. Where a number of theirs is in
    our tree follows from tables of their own numbers."""
    tree, of_maps = ours()[1]
    wanted, shapes = table("gradient/"), {k: v.shape for k, v in table("state/").items()}
    named = {name: np.full(shapes[name], i, "f4") for i, name in enumerate(wanted)}
    placed = {k: np.arange(np.prod(v), dtype="f4").reshape(v) for k, v in shapes.items()}
    names, floor = list(wanted), 1e-4 * max(float(np.abs(x).max()) for x in wanted.values())
    seen = 0
    for got, numbers, places in zip(
        *map(jax.tree.leaves, (tree, load_mask2former(named), load_mask2former(placed))),
        strict=True,
    ):
        for i in np.unique(numbers).astype(int):
            step = max(1, int(np.prod(shapes[names[i]])) // 500)
            here = (numbers == i) & (places % step == 0)
            theirs = wanted[names[i]][(places[here] / step).astype(int)]
            scale = float(np.abs(wanted[names[i]]).max()) + floor
            np.testing.assert_allclose(got[here], theirs, rtol=0, atol=1e-4 * scale)
            seen += theirs.size
    assert seen == sum(x.size for x in wanted.values())
    for i, s in enumerate(STRIDES):
        close(of_maps[s].transpose(0, 3, 1, 2), stored()[f"gradient_map/{i}"], 1e-4)


def test_the_backward_pass_does_not_match_again() -> None:
    """One loop over sets in each direction; that of the backward pass reads what was kept."""
    truth = class_masks(SETTINGS, jnp.zeros((1, 64, 96), jnp.int32), CLASSES)
    keys = jax.random.split(jax.random.key(0), 1)

    def loss(made: QueryPredictions) -> jax.Array:
        return mask2former_losses(SETTINGS, made, truth, keys)[0].sum()

    made = QueryPredictions(jnp.zeros((2, 1, 7, 6)), jnp.zeros((2, 1, 16, 24, 7)))
    traced = str(jax.make_jaxpr(jax.grad(loss))(made))
    assert traced.count("top_k[") == 1
    assert traced.count("while[") < 6  # `hungarian` has three


def test_masks_at_points_are_maps_at_points() -> None:
    r = np.random.default_rng(0)
    labels, places = r.integers(0, 4, (9, 7)), r.uniform(-0.05, 1.05, (200, 2)).astype("f4")
    masks = (labels[..., None] == np.arange(4)).astype("f4")
    got = jax.jit(class_shares)(labels, places, np.array([2, 0, -1]))
    np.testing.assert_allclose(got[:, :2], sample_points(masks, places)[:, [2, 0]], atol=1e-6)
    assert not np.any(got[:, 2])


def test_the_largest_categories_of_an_image_have_masks() -> None:
    r = np.random.default_rng(1)
    for _ in range(20):
        labels = r.choice([*range(6), 255], (5, 6), p=r.dirichlet(np.ones(7)))
        counts = np.bincount(labels.ravel(), minlength=256)[:6]
        classes, count = present_classes(jnp.asarray(labels), 6, 4)
        order = [k for k in np.argsort(-counts, kind="stable") if counts[k]]
        assert classes.tolist() == (order + [-1] * 4)[:4] and count == len(order)


def test_points_differ_between_images_and_sets_and_come_again() -> None:
    keys = [jax.random.fold_in(jax.random.key(1), i) for i in (0, 0, 1)]
    a, again, other = (draw_points(SETTINGS, key, 3) for key in keys)
    assert all(np.array_equal(x, y) for x, y in zip(a, again, strict=True))
    assert not any(np.any(x == y) for x, y in zip(a, other, strict=True))
    everything = np.concatenate([np.ravel(x) for x in a])
    assert len(set(everything.tolist())) == everything.size  # no number serves twice
    assert everything.min() >= 0 and everything.max() < 1


def test_costs_are_those_of_a_loop_over_pairs() -> None:
    r = np.random.default_rng(2)
    logits, x = r.normal(size=(4, 3)), r.normal(size=(30, 4)) * 3
    t, classes = r.random((30, 2)), np.array([1, 0])
    got = mask_costs(logits, x, t, classes)
    p, p_class = 1 / (1 + np.exp(-x)), np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for m in range(2):
        for q in range(4):
            entropy = -(t[:, m] * np.log(p[:, q]) + (1 - t[:, m]) * np.log(1 - p[:, q])).mean()
            both, sizes = (t[:, m] * p[:, q]).sum(), t[:, m].sum() + p[:, q].sum()
            dice = 1 - (2 * both + 1) / (sizes + 1)
            wanted = 5 * entropy + 5 * dice - 2 * p_class[q, classes[m]]
            np.testing.assert_allclose(got[m, q], wanted, rtol=1e-5)


def test_logits_that_are_not_finite_are_taken_last() -> None:
    x = np.zeros((6, 3), "f4")
    x[:, 0] = np.nan
    query = match_masks(np.zeros((3, 4)), x, np.ones((6, 2)), np.array([1, 2]))
    assert sorted(query.tolist()) == [1, 2]


def in_mmseg() -> dict[str, np.ndarray]:
    """The stored weights as InternImage's segmenters have them."""
    pixels, queries = "model.pixel_level_module.decoder.", "model.transformer_module."
    own, there = "decode_head.pixel_decoder.", "decode_head.transformer_decoder."
    rules = (
        (pixels + r"input_projections\.(\d)\.0", own + r"input_convs.\1.conv"),
        (pixels + r"input_projections\.(\d)\.1", own + r"input_convs.\1.gn"),
        (pixels + r"(.*)\.self_attn\.", own + r"\1.attentions.0."),
        (pixels + r"(.*)\.fc1", own + r"\1.ffns.0.layers.0.0"),
        (pixels + r"(.*)\.fc2", own + r"\1.ffns.0.layers.1"),
        (pixels + r"(.*)\.self_attn_layer_norm", own + r"\1.norms.0"),
        (pixels + r"(.*)\.final_layer_norm", own + r"\1.norms.1"),
        (pixels + "level_embed", own + "level_encoding.weight"),
        (pixels + r"adapter_1\.0", own + "lateral_convs.0.conv"),
        (pixels + r"adapter_1\.1", own + "lateral_convs.0.gn"),
        (pixels + r"layer_1\.0", own + "output_convs.0.conv"),
        (pixels + r"layer_1\.1", own + "output_convs.0.gn"),
        (pixels + "mask_projection", own + "mask_feature"),
        (queries + r"decoder\.(layers\.\d)\.cross_attn\.", there + r"\1.attentions.0.attn."),
        (queries + r"decoder\.(layers\.\d)\.self_attn\.", there + r"\1.attentions.1.attn."),
        (queries + r"decoder\.(layers\.\d)\.fc1", there + r"\1.ffns.0.layers.0.0"),
        (queries + r"decoder\.(layers\.\d)\.fc2", there + r"\1.ffns.0.layers.1"),
        (queries + r"decoder\.(layers\.\d)\.cross_attn_layer_norm", there + r"\1.norms.0"),
        (queries + r"decoder\.(layers\.\d)\.self_attn_layer_norm", there + r"\1.norms.1"),
        (queries + r"decoder\.(layers\.\d)\.final_layer_norm", there + r"\1.norms.2"),
        (queries + r"decoder\.layernorm", there + "post_norm"),
        (queries + "queries_embedder", "decode_head.query_embed"),
        (queries + "queries_features", "decode_head.query_feat"),
        (queries + "level_embed", "decode_head.level_embed"),
        (queries + r"decoder\.mask_predictor\.mask_embedder\.0\.0", "decode_head.mask_embed.0"),
        (queries + r"decoder\.mask_predictor\.mask_embedder\.1\.0", "decode_head.mask_embed.2"),
        (queries + r"decoder\.mask_predictor\.mask_embedder\.2\.0", "decode_head.mask_embed.4"),
        ("class_predictor", "decode_head.cls_embed"),
    )
    out, joint = {}, {}
    for name, array in table("state/").items():
        for a, b in rules:
            if re.match(rf"{a}(?=\.|$|(?<=\.))", name):
                name = re.sub(rf"^{a}", b, name)
                break
        if match := re.fullmatch(r"(.*\.attn)\.([qkv])_proj\.(weight|bias)", name):
            joint.setdefault(f"{match[1]}.in_proj_{match[3]}", {})[match[2]] = array
        else:
            out[name] = array
    return out | {name: np.concatenate([p[x] for x in "qkv"]) for name, p in joint.items()}


def test_weights_of_mmsegmentation_are_the_same_tree() -> None:
    given = in_mmseg()
    assert all(name.startswith("decode_head.") for name in given)
    assert "decode_head.transformer_decoder.layers.3.attentions.1.attn.in_proj_weight" in given
    got = load_mask2former({"state_dict": given | {"backbone.a": np.zeros(2)}})
    jax.tree.map(np.testing.assert_array_equal, got, load_mask2former(table("state/")))


def test_weights_of_another_model_are_refused() -> None:
    with pytest.raises(UserError, match="not weights of Mask2Former: unknown names x.weight"):
        load_mask2former({"x.weight": np.zeros(2)})
    deep = "model.pixel_level_module.decoder.input_projections.3.0.bias"
    with pytest.raises(UserError, match="unknown names"):
        load_mask2former({deep: np.zeros(2)})
    assert load_mask2former({"model.pixel_level_module.encoder.a": np.zeros(2)}) == {}

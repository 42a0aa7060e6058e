"""Attention maps: equal to the weights that the network uses, on any mesh, for every backbone with
attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import parallel
from m3i_jax.augment import photometric
from m3i_jax.evaluation import feature_extraction
from m3i_jax.models import attention, layers, m3i, pooling, vit
from m3i_jax.objective.terms import FORMS
from tests import toy

SETTINGS = {"data__classes": 4, "data__captions": "no"}


def views(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, 32, 32, 3)).astype(np.uint8)


def started(config):
    @jax.jit
    def noisy():
        params = m3i.init(config, jax.random.key(3), FORMS["supervised"], classes=4, vocabulary=0)
        return jax.tree.map(
            lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params
        )

    return noisy()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__encoder__cls_token": "false", "model__encoder__depth": 1},
        {"model__scan": "true"},
    ],
)
def test_the_last_block_computed_with_the_shown_weights_gives_the_encoder_output(
    changes: dict,
) -> None:
    """The block computed with the weights of the map gives the output of the encoder."""
    config = toy.settings(**SETTINGS, **changes)
    e, params = config.model.encoder, started(config)
    pixels = photometric.normalize(views(2).astype(np.float32) / 255, config.data.augment)
    patches = vit.patchify(jnp.asarray(pixels), e.patch_size)

    @jax.jit
    def computed(encoder, patches):
        weights = vit.last_attention(config.model, encoder, patches, grid=config.grid)
        z = vit._embed_square(config.model, encoder, patches, config.grid, None, None)
        for i in range(e.depth - 1):
            z = vit.encoder_modules(config.model)[1].apply(
                {"params": jax.tree.map(lambda x, i=i: x[i], encoder["blocks"])}, z
            )
        last = jax.tree.map(lambda x: x[-1], encoder["blocks"])
        qkv = last["attention"]["qkv"]
        v = attention.to_heads(
            layers.layer_norm(z, *(last["norm1"][n] for n in ("scale", "bias"))) @ qkv["kernel"]
            + qkv["bias"],
            3,
            e.heads,
        )[2]
        z = (
            z
            + attention.from_heads(weights @ v) @ last["attention"]["out"]["kernel"]
            + last["attention"]["out"]["bias"]
        )
        h = layers.layer_norm(z, last["norm2"]["scale"], last["norm2"]["bias"])
        h = jax.nn.gelu(
            h @ last["mlp"]["fc1"]["kernel"] + last["mlp"]["fc1"]["bias"], approximate=False
        )
        z = z + h @ last["mlp"]["fc2"]["kernel"] + last["mlp"]["fc2"]["bias"]
        return weights, z, m3i.encode(config, encoder, patches)

    weights, ours, encoded = computed(params["encoder"], patches)
    assert weights.shape == (2, e.heads, 16 + e.cls_token, 16 + e.cls_token)
    np.testing.assert_allclose(ours, encoded, atol=2e-4, rtol=2e-4)


def test_the_pooled_vector_is_the_weighted_mean_of_the_values() -> None:
    """The pooled vector is the mean of the projected values, weighted by the map of each head."""
    config = toy.settings(**SETTINGS)
    params, p = started(config), config.model.pool
    x = jax.random.normal(jax.random.key(1), (3, 16, 32))

    @jax.jit
    def computed(part, x):
        weights = pooling.pooling_weights(config.model, part, x)
        value = (
            layers.layer_norm(x, part["norm_value"]["scale"], part["norm_value"]["bias"])
            @ part["value"]["kernel"]
            + part["value"]["bias"]
        )
        (heads,) = attention.to_heads(value, 1, p.heads)
        mixed = jnp.einsum("bhk,bhke->bhe", weights, heads).reshape(3, -1)
        ours = mixed @ part["out"]["kernel"] + part["out"]["bias"]
        return ours, pooling.apply(config.model, part, x)

    ours, pooled = computed(params["pool"], x)
    np.testing.assert_allclose(ours, pooled, atol=2e-5)


@pytest.mark.parametrize("changes", [{}, pytest.param(toy.INTERN, marks=pytest.mark.slow)])
def test_maps_on_a_mesh_equal_those_of_one_device(changes: dict) -> None:
    """With sharded rows and weights, an incomplete last batch and invalid rows; an InternImage has
    no attention."""
    config = toy.settings(**{**changes, **SETTINGS, "model__encoder__width": 64})
    params, images = started(config), views(6)
    maps = jax.jit(functools.partial(feature_extraction.attention_maps, config, True))
    wanted = maps(params, jnp.asarray(images))
    assert set(wanted) == {"features", "pooling"} | (set() if changes else {"last"})
    np.testing.assert_allclose(wanted["pooling"].sum(1), 1, atol=1e-5)
    mesh = parallel.make_mesh((2, 2, 1), jax.devices()[:4])
    laid = jax.device_put(params, parallel.tree_shardings(mesh, params))
    look = feature_extraction.compile_maps(config, mesh, pooled=True)
    batches = [
        {
            "views": np.pad(images[at : at + 4], [(0, max(0, at - 2))] + [(0, 0)] * 3),
            "label": np.arange(4),
            "index": at + np.arange(4),
            "valid": at + np.arange(4) < 6,
        }
        for at in (0, 4)
    ]
    found = [
        made for made, _ in feature_extraction.extract_set(mesh, look, laid, batches, lambda: None)
    ]
    for name, array in wanted.items():
        np.testing.assert_allclose(
            np.concatenate([each[name] for each in found]),
            array,
            atol=1e-4,
            rtol=1e-4,
            err_msg=name,
        )

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.models import decoder, layers
from m3i_jax.objective import positions

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiling is what takes the time here

MODEL = schema.Model(encoder=schema.Encoder(width=12), decoder=schema.Decoder(width=8, depth=2, heads=2, mlp_ratio=2.0), dtype="float32")
INDEX = np.array([[4, 0, 7], [1, 2, 8]])


def with_decoder(**changes):
    return dataclasses.replace(MODEL, decoder=dataclasses.replace(MODEL.decoder, **changes))


def random_tree(model, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: decoder.init(model, key), jax.random.key(0))
    return jax.tree.map(lambda s: jnp.asarray(0.5 * rng.normal(size=s.shape), jnp.float32), shapes)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.cache
def run(model):
    return jit(lambda params, z, index, query: decoder.apply(model, params, z, index, query, grid=3))


@jit
def queries(params, raw):
    return decoder.queries(MODEL, params, raw)


def plain(model):
    """The same decoder with every row of every block computed, then sliced."""
    d = model.decoder
    one = layers.block(d.width, d.heads, d.mlp_ratio, model.dtype)
    dense = lambda p, x: x @ p["kernel"] + p["bias"]  # noqa: E731

    def function(params, z, index, query):
        own = dense(params["embed"], z) + positions.sincos_2d(3, d.width)[index]
        x = jnp.concatenate([own, query], 1)
        for layer in range(d.depth):
            x = one.apply({"params": jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])}, x)
        return dense(params["head"], x)[:, z.shape[1] :]

    return function


@pytest.mark.parametrize("depth,scan", [(1, False), (2, False), (2, True)])
def test_leaving_out_dead_rows_changes_no_number_and_no_gradient(depth, scan):
    model = dataclasses.replace(with_decoder(depth=depth), scan=scan)
    params, z, query, g = random_tree(model), normal(1, 2, 3, 12), normal(2, 2, 9, 8), normal(3, 2, 9, 12)

    def both(function):
        def loss(params, z, query):
            y = function(params, z, INDEX, query)
            return (y * g).sum(), y

        return jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(params, z, query)

    got, want = both(lambda p, z, i, q: decoder.apply(model, p, z, jnp.asarray(i), q, grid=3)), both(plain(model))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), got, want)
    learns = {jax.tree_util.keystr(path): np.asarray(leaf).any() for path, leaf in jax.tree_util.tree_leaves_with_path(got[1])}
    idle = {name for name, moves in learns.items() if not moves}
    assert all("position_map" in name or "mask_token" in name for name in idle), idle  # those two learn through the queries


def test_queries_are_the_mask_token_plus_the_map_and_pass_no_gradient_to_the_geometry():
    params, raw = random_tree(MODEL), normal(1, 2, 9, 16)
    expected = params["mask_token"] + raw @ params["position_map"]["kernel"] + params["position_map"]["bias"]
    np.testing.assert_allclose(queries(params, raw), expected, rtol=1e-5, atol=1e-5)
    of_params, of_raw = jit(jax.grad(lambda p, r: decoder.queries(MODEL, p, r).sum(), (0, 1)))(params, raw)
    assert not np.asarray(of_raw).any()
    assert np.asarray(of_params["mask_token"]).all() and np.asarray(of_params["position_map"]["kernel"]).all()


def test_equal_views_have_the_queries_of_the_identity_and_one_row_stands_for_all():
    params, z = random_tree(MODEL), normal(1, 2, 3, 12)
    box, flip = jnp.array([[3.0, 4, 50, 60], [0, 0, 20, 10]]), jnp.array([False, False])
    relative = queries(params, jit(lambda b, f: positions.relative(b, f, b, f, grid=3, width=8))(box, flip))
    shared = queries(params, positions.identity(3, 8))
    assert shared.shape == (9, 8)
    np.testing.assert_allclose(relative, np.broadcast_to(shared, (2, 9, 8)), atol=2e-5)
    np.testing.assert_allclose(run(MODEL)(params, z, INDEX, shared), run(MODEL)(params, z, INDEX, relative), atol=2e-4)


def test_visible_tokens_are_a_set_of_tokens_with_places():
    params, z, query = random_tree(MODEL), normal(1, 2, 3, 12), normal(2, 2, 9, 8)
    prediction, order = run(MODEL)(params, z, INDEX, query), np.array([2, 0, 1])
    np.testing.assert_allclose(run(MODEL)(params, z[:, order], INDEX[:, order], query), prediction, rtol=1e-4, atol=1e-4)
    assert np.abs(run(MODEL)(params, z, INDEX[:, order], query) - prediction).max() > 0.01


def test_the_head_reads_the_residual_stream_without_a_norm():
    params, query = random_tree(MODEL), normal(2, 2, 9, 8)
    params["blocks"] = jax.tree.map(jnp.zeros_like, params["blocks"])
    expected = query @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(run(MODEL)(params, normal(1, 2, 3, 12), INDEX, query), expected, rtol=1e-5, atol=1e-5)


def test_parameters_of_the_paper_and_their_first_values():
    shapes = jax.eval_shape(lambda key: decoder.init(schema.Model(), key), jax.random.key(0))
    blocks = 4 * (12 * 768**2 + 13 * 768)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == blocks + 2 * (768**2 + 768) + (2 * 768**2 + 768) + 768
    model = schema.Model(decoder=schema.Decoder(depth=1, mlp_ratio=0.01))
    params = jit(lambda key: decoder.init(model, key))(jax.random.key(0))
    assert np.std(params["position_map"]["kernel"]) == pytest.approx(0.02946, rel=3e-3)  # golden
    assert np.std(params["embed"]["kernel"]) == pytest.approx(0.03608, rel=3e-3)  # golden
    assert np.std(params["mask_token"]) == pytest.approx(0.02, rel=0.1)
    assert not any(np.asarray(params[part]["bias"]).any() for part in ("embed", "position_map", "head"))


def test_bfloat16():
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    params, z, query = random_tree(MODEL), normal(1, 2, 3, 12), normal(2, 2, 9, 8)
    got, exact = run(model)(params, z, INDEX, query), np.asarray(run(MODEL)(params, z, INDEX, query))
    assert got.dtype == jnp.bfloat16
    assert np.abs(np.asarray(got, np.float32) - exact).mean() < 0.02 * np.abs(exact).mean()


def test_tokens_and_indices_must_match():
    with pytest.raises(ValueError, match=r"\(2, 3, 12\).*\(2, 4\)"):
        decoder.apply(MODEL, {}, jnp.zeros((2, 3, 12)), jnp.zeros((2, 4), int), jnp.zeros((9, 8)), grid=3)

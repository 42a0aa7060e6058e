import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.models import decoder, layers
from m3i_jax.objective import positions

# compiling is what takes the time here
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

MODEL = schema.Model(
    encoder=schema.Encoder(width=12),
    decoder=schema.Decoder(width=8, depth=2, heads=2, mlp_ratio=2.0),
    dtype="float32",
)
INDEX = np.array([[4, 0, 7], [1, 2, 8]])


def with_decoder(**changes):
    return dataclasses.replace(MODEL, decoder=dataclasses.replace(MODEL.decoder, **changes))


def random_tree(model, seed=0, of=("tokens",)):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: decoder.init(model, key, of=of), jax.random.key(0))
    return jax.tree.map(lambda s: jnp.asarray(0.5 * rng.normal(size=s.shape), jnp.float32), shapes)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.cache
def run(model):
    return jit(
        lambda params, z, index, query, cls=None: predict(model, params, z, index, query, cls)
    )


def predict(model, params, z, index, query, cls=None):
    return decoder.prediction_head(
        model, params, decoder.apply(model, params, z, index, query, grid=3, cls_BxD=cls), "tokens"
    )


@jit
def queries(params, raw):
    return decoder.decoder_queries(MODEL, params, raw)


def plain(model):
    """The same decoder with every row of every block computed, then sliced."""
    d = model.decoder
    one = layers.block(d.width, d.heads, d.mlp_ratio, model.dtype, d.norm)
    dense = lambda p, x: x @ p["kernel"] + p["bias"]

    def run_all(stacked, x):
        for layer in range(stacked["norm1"]["scale"].shape[0]):
            x = one.apply(
                {"params": jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked)}, x
            )
        return x

    def function(params, z, index, query, cls=None):
        table = jnp.broadcast_to(
            jnp.asarray(positions.sincos_2d(3, d.width))[index], (*index.shape, d.width)
        )
        if cls is not None:
            z, table = (
                jnp.concatenate([cls[:, None], z], 1),
                jnp.pad(table, ((0, 0), (1, 0), (0, 0))),
            )
        own = dense(params["embed"], z)
        own = run_all(params["projector"], own) if d.projector_depth else own
        x = run_all(params["blocks"], jnp.concatenate([own + table, query], 1))
        return dense(params["head"], x)[:, z.shape[1] :]

    return function


@pytest.mark.parametrize("depth,scan", [(1, False), (2, False), (2, True)])
def test_leaving_out_dead_rows_changes_no_number_and_no_gradient(depth, scan):
    model = dataclasses.replace(with_decoder(depth=depth), scan=scan)
    params, z, query, g = (
        random_tree(model),
        normal(1, 2, 3, 12),
        normal(2, 2, 9, 8),
        normal(3, 2, 9, 12),
    )

    def both(function):
        def loss(params, z, query):
            y = function(params, z, INDEX, query)
            return (y * g).sum(), y

        return jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(params, z, query)

    got, want = both(lambda p, z, i, q: predict(model, p, z, jnp.asarray(i), q)), both(plain(model))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), got, want)
    learns = {
        jax.tree_util.keystr(path): np.asarray(leaf).any()
        for path, leaf in jax.tree_util.tree_leaves_with_path(got[1])
    }
    idle = {name for name, moves in learns.items() if not moves}
    # those two learn through the queries
    assert all("position_map" in name or "mask_token" in name for name in idle), idle


def test_queries_are_the_mask_token_plus_the_map_and_pass_no_gradient_to_the_geometry():
    params, raw = random_tree(MODEL), normal(1, 2, 9, 16)
    expected = (
        params["mask_token"]
        + raw @ params["position_map"]["kernel"]
        + params["position_map"]["bias"]
    )
    np.testing.assert_allclose(queries(params, raw), expected, rtol=1e-5, atol=1e-5)
    of_params, of_raw = jit(
        jax.grad(lambda p, r: decoder.decoder_queries(MODEL, p, r).sum(), (0, 1))
    )(params, raw)
    assert not np.asarray(of_raw).any()
    assert (
        np.asarray(of_params["mask_token"]).all()
        and np.asarray(of_params["position_map"]["kernel"]).all()
    )


def test_equal_views_have_the_queries_of_the_identity_and_one_row_stands_for_all():
    params, z = random_tree(MODEL), normal(1, 2, 3, 12)
    box, flip = jnp.array([[3.0, 4, 50, 60], [0, 0, 20, 10]]), jnp.array([False, False])
    relative = queries(
        params,
        jit(lambda b, f: positions.relative_positions(b, f, b, f, grid=3, width=8))(box, flip),
    )
    shared = queries(params, positions.same_view_positions(3, 8))
    assert shared.shape == (9, 8)
    np.testing.assert_allclose(relative, np.broadcast_to(shared, (2, 9, 8)), atol=2e-5)
    np.testing.assert_allclose(
        run(MODEL)(params, z, INDEX, shared), run(MODEL)(params, z, INDEX, relative), atol=2e-4
    )


def test_visible_tokens_are_a_set_of_tokens_with_places():
    params, z, query = random_tree(MODEL), normal(1, 2, 3, 12), normal(2, 2, 9, 8)
    prediction, order = run(MODEL)(params, z, INDEX, query), np.array([2, 0, 1])
    np.testing.assert_allclose(
        run(MODEL)(params, z[:, order], INDEX[:, order], query), prediction, rtol=1e-4, atol=1e-4
    )
    assert np.abs(run(MODEL)(params, z, INDEX[:, order], query) - prediction).max() > 0.01


def test_the_head_reads_the_residual_stream_without_a_norm():
    params, query = random_tree(MODEL), normal(2, 2, 9, 8)
    params["blocks"] = jax.tree.map(jnp.zeros_like, params["blocks"])
    expected = query @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(
        run(MODEL)(params, normal(1, 2, 3, 12), INDEX, query), expected, rtol=1e-5, atol=1e-5
    )


def test_parameters_of_the_paper_and_their_first_values():
    shapes = jax.eval_shape(lambda key: decoder.init(schema.Model(), key), jax.random.key(0))
    blocks = 4 * (12 * 768**2 + 13 * 768)
    assert (
        sum(leaf.size for leaf in jax.tree.leaves(shapes))
        == blocks + 2 * (768**2 + 768) + (2 * 768**2 + 768) + 768
    )
    model = schema.Model(decoder=schema.Decoder(depth=1, mlp_ratio=0.01))
    params = jit(lambda key: decoder.init(model, key))(jax.random.key(0))
    assert np.std(params["position_map"]["kernel"]) == pytest.approx(0.02946, rel=3e-3)  # golden
    assert np.std(params["embed"]["kernel"]) == pytest.approx(0.03608, rel=3e-3)  # golden
    assert np.std(params["mask_token"]) == pytest.approx(0.02, rel=0.1)
    assert not any(
        np.asarray(params[part]["bias"]).any() for part in ("embed", "position_map", "head")
    )


def test_bfloat16():
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    params, z, query = random_tree(MODEL), normal(1, 2, 3, 12), normal(2, 2, 9, 8)
    got, exact = (
        run(model)(params, z, INDEX, query),
        np.asarray(run(MODEL)(params, z, INDEX, query)),
    )
    assert got.dtype == jnp.bfloat16
    assert np.abs(np.asarray(got, np.float32) - exact).mean() < 0.02 * np.abs(exact).mean()


SIM = with_decoder(norm="batch", projector_depth=1, depth=1)


def test_the_decoder_of_siamese_im_equals_its_parts_one_after_the_other():
    """Projector, batch norm and cls together, with scan and recomputation against neither."""
    model = dataclasses.replace(SIM, scan=True, remat="full")
    params, z, query, g = (
        random_tree(model),
        normal(1, 2, 3, 12),
        normal(2, 2, 9, 8),
        normal(3, 2, 9, 8),
    )
    cls = normal(4, 2, 12)

    def both(function):
        def loss(params, z, query):
            y = function(params, z, INDEX, query, cls)
            return (y * g).sum(), y

        return jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(params, z, query)

    got, want = (
        both(lambda p, z, i, q, c: predict(model, p, z, jnp.asarray(i), q, c)),
        both(plain(model)),
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=5e-4), got, want)
    assert got[0][1].shape == (2, 9, 8)  # the width of the projector, not of the encoder


def test_cls_is_one_more_visible_token_without_a_place():
    params, z, query, cls = (
        random_tree(MODEL),
        normal(1, 2, 3, 12),
        normal(2, 2, 9, 8),
        normal(4, 2, 12),
    )
    got = run(MODEL)(params, z, INDEX, query, cls)
    np.testing.assert_allclose(
        got, jit(plain(MODEL))(params, z, INDEX, query, cls), rtol=2e-4, atol=2e-4
    )
    assert np.abs(got - run(MODEL)(params, z, INDEX, query)).max() > 0.01


def test_without_a_projector_the_features_themselves_are_the_target():
    z = normal(1, 2, 10, 12)
    assert decoder.project_targets(MODEL, {}, z) is z


def test_a_projector_changes_the_start_of_nothing_else_but_the_head():
    init = jit(
        lambda key: tuple(decoder.init(m, key) for m in (with_decoder(projector_depth=2), MODEL))
    )
    with_projector, without = init(jax.random.key(0))
    assert with_projector["projector"]["norm1"]["scale"].shape == (2, 8) and with_projector["head"][
        "kernel"
    ].shape == (8, 8)
    same = ("blocks", "embed")
    jax.tree.map(
        np.testing.assert_array_equal,
        {k: with_projector[k] for k in same},
        {k: without[k] for k in same},
    )
    assert not np.array_equal(
        with_projector["projector"]["mlp"]["fc1"]["kernel"][0],
        with_projector["blocks"]["mlp"]["fc1"]["kernel"][0],
    )


def test_only_the_heads_asked_for_are_made_and_the_rest_starts_the_same():
    kinds = (("pixels", "tokens"), ("tokens",), ("pixels",))
    both, tokens, pixels = jit(lambda key: tuple(decoder.init(MODEL, key, of=of) for of in kinds))(
        jax.random.key(0)
    )
    assert set(both) - set(tokens) == {"pixel_norm", "pixel_head"} and set(both) - set(pixels) == {
        "head"
    }
    for fewer in (tokens, pixels):
        jax.tree.map(np.testing.assert_array_equal, {k: both[k] for k in fewer}, fewer)


def test_pixels_are_a_linear_map_of_the_normed_rows():
    params, rows = random_tree(MODEL, of=("pixels",)), normal(1, 2, 4, 8)
    got = jit(lambda p, x: decoder.prediction_head(MODEL, p, x, "pixels"))(params, rows)
    wide = np.asarray(rows, np.float64)
    unit = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    normed = unit * params["pixel_norm"]["scale"] + params["pixel_norm"]["bias"]
    np.testing.assert_allclose(
        got,
        normed @ params["pixel_head"]["kernel"] + params["pixel_head"]["bias"],
        rtol=1e-4,
        atol=1e-3,
    )
    assert got.shape == (2, 4, 3 * 16 * 16)
    with pytest.raises(ValueError, match="'pooled'"):
        decoder.prediction_head(MODEL, params, rows, "pooled")


def test_absolute_queries_are_the_mask_token_and_the_table_of_the_grid():
    model = with_decoder(positions="absolute")
    params = random_tree(model)
    assert "position_map" not in params
    got = decoder.decoder_queries(model, params, positions.same_view_positions(3, 8))
    np.testing.assert_allclose(
        got, params["mask_token"].reshape(-1) + positions.sincos_2d(3, 8), atol=1e-6
    )
    relative, absolute = jit(lambda key: tuple(decoder.init(m, key) for m in (MODEL, model)))(
        jax.random.key(0)
    )
    jax.tree.map(np.testing.assert_array_equal, {k: relative[k] for k in absolute}, absolute)


def test_queries_of_some_cells_alone_see_the_visible_tokens_and_each_other():
    params, z, hidden = (
        random_tree(MODEL),
        normal(1, 2, 3, 12),
        np.array([[1, 2, 3, 5, 6, 8], [0, 3, 4, 5, 6, 7]]),
    )
    query = queries(params, positions.same_view_positions(3, 8))[hidden]
    got = run(MODEL)(params, z, INDEX, query)
    assert got.shape == (2, 6, 12)
    np.testing.assert_allclose(
        got, jit(plain(MODEL))(params, z, INDEX, query), rtol=2e-4, atol=2e-4
    )


def test_tokens_and_indices_must_match():
    with pytest.raises(ValueError, match=r"\(2, 3, 12\).*\(2, 4\)"):
        decoder.apply(
            MODEL, {}, jnp.zeros((2, 3, 12)), jnp.zeros((2, 4), int), jnp.zeros((9, 8)), grid=3
        )

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.models import pooling

# compiling is what takes the time here
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

MODEL = schema.Model(
    encoder=schema.Encoder(width=12), pool=schema.Pool(width=10, heads=4), dtype="float32"
)


def with_pool(**changes):
    return dataclasses.replace(MODEL, pool=dataclasses.replace(MODEL.pool, **changes))


def random_tree(seed=0, model=MODEL):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: pooling.init(model, key), jax.random.key(0))
    return jax.tree.map(lambda s: jnp.asarray(0.5 * rng.normal(size=s.shape), jnp.float32), shapes)


X = np.random.default_rng(1).normal(size=(2, 6, 12)).astype(np.float32)
MASK = np.array([[1, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 1]], bool)


@functools.cache
def run(model=MODEL):
    return jit(lambda params, x, mask=None, cls=None: pooling.apply(model, params, x, mask, cls))


def test_a_mask_is_the_gathered_tokens_alone():
    params = random_tree()
    gathered = run()(params, X[MASK].reshape(2, 3, 12))
    np.testing.assert_allclose(run()(params, X, MASK), gathered, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(
        run()(params, np.where(MASK[..., None], X, 1e3), MASK), run()(params, X, MASK)
    )


def test_gradients_of_masked_and_gathered_tokens_agree_and_hidden_tokens_get_none():
    params, g = random_tree(), np.random.default_rng(2).normal(size=(2, 10))
    grad = jit(
        jax.grad(lambda p, x, mask=None: (pooling.apply(MODEL, p, x, mask) * g).sum(), (0, 1))
    )
    (of_params, of_x), (other_params, other_x) = (
        grad(params, X, MASK),
        grad(params, X[MASK].reshape(2, 3, 12)),
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), of_params, other_params
    )
    np.testing.assert_allclose(
        np.asarray(of_x)[MASK].reshape(2, 3, 12), other_x, rtol=1e-3, atol=1e-4
    )
    assert not np.asarray(of_x)[~MASK].any()
    # The bias of the keys shifts all logits alike: softmax does not see it.
    assert all(
        np.abs(leaf).max() > 1e-3
        for path, leaf in jax.tree_util.tree_leaves_with_path(of_params)
        if "'key'" not in str(path) and "norm_key" not in str(path)
    )
    assert np.abs(of_params["key"]["kernel"]).max() > 1e-3


def test_no_token_at_all_is_finite():
    params, none = random_tree(), np.zeros((2, 6), bool)
    assert np.isfinite(run()(params, X, none)).all()
    grads = jit(
        jax.grad(lambda p: pooling.apply(MODEL, p, jnp.asarray(X), jnp.asarray(none)).sum())
    )(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("width,count", [(768, 2_366_976), (1024, 3_942_144)])
def test_parameter_counts(width, count):  # golden
    model = schema.Model(encoder=schema.Encoder(width=width))
    shapes = jax.eval_shape(lambda key: pooling.init(model, key), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_matrices_start_normal_and_biases_at_zero():
    model = schema.Model(encoder=schema.Encoder(width=128), pool=schema.Pool(width=100))
    params = jit(lambda key: pooling.init(model, key))(jax.random.key(0))
    for part in ("query", "key", "value", "out"):
        kernel = np.asarray(params[part]["kernel"])
        assert kernel.std() == pytest.approx(0.02, rel=0.03) and np.abs(kernel).max() > 0.06
        assert not np.asarray(params[part]["bias"]).any()


def test_bfloat16():
    params, model = random_tree(), dataclasses.replace(MODEL, dtype="bfloat16")
    got, exact = (
        run(model)(params, X.astype(jnp.bfloat16), MASK),
        np.asarray(run()(params, X, MASK)),
    )
    assert got.dtype == jnp.bfloat16
    assert np.abs(np.asarray(got, np.float32) - exact).mean() < 0.03 * np.abs(exact).mean()


def test_a_learned_query_is_one_token_for_all_images():
    model = with_pool(query="learned")
    params = random_tree(model=model)
    assert params["query_token"].shape == (1, 1, 12)
    masked = run(model)(params, X, MASK)
    np.testing.assert_allclose(
        masked, run(model)(params, X[MASK].reshape(2, 3, 12)), rtol=1e-5, atol=1e-5
    )
    dense = lambda part, x: (
        x @ np.asarray(params[part]["kernel"], np.float64) + np.asarray(params[part]["bias"])
    )

    def norm(part, x):
        unit = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return unit * np.asarray(params[part]["scale"]) + np.asarray(params[part]["bias"])

    query = dense("query", norm("norm_query", np.asarray(params["query_token"][0, 0], np.float64)))
    for row in range(2):
        tokens, pooled = X[row][MASK[row]].astype(np.float64), np.zeros(12)
        keys, values = (dense(part, norm(f"norm_{part}", tokens)) for part in ("key", "value"))
        for head in np.split(np.arange(12), 4):
            weights = np.exp(keys[:, head] @ query[head] / np.sqrt(3))
            pooled[head] = weights / weights.sum() @ values[:, head]
        np.testing.assert_allclose(masked[row], dense("out", pooled), rtol=1e-4, atol=1e-4)


def test_a_learned_query_starts_small_and_learns():
    model = schema.Model(
        encoder=schema.Encoder(width=768, heads=12), pool=schema.Pool(width=4, query="learned")
    )
    token = jit(lambda key: pooling.init(model, key)["query_token"])(jax.random.key(0))
    assert np.std(token) == pytest.approx(0.02, rel=0.1)
    learned = with_pool(query="learned")
    grads = jit(
        jax.grad(lambda p: pooling.apply(learned, p, jnp.asarray(X), jnp.asarray(MASK)).sum())
    )(random_tree(model=learned))
    assert np.asarray(grads["query_token"]).all()


@pytest.mark.parametrize("kind", ["mean", "cls"])
def test_mean_and_cls_are_one_token_normed_and_mapped(kind):
    model, cls = (
        with_pool(kind=kind),
        np.random.default_rng(3).normal(size=(2, 12)).astype(np.float32),
    )
    params = random_tree(model=model)
    assert set(params) == {"norm", "out"}
    token = cls if kind == "cls" else X[MASK].reshape(2, 3, 12).mean(1)
    unit = (token - token.mean(-1, keepdims=True)) / np.sqrt(token.var(-1, keepdims=True) + 1e-6)
    expected = (unit * params["norm"]["scale"] + params["norm"]["bias"]) @ params["out"][
        "kernel"
    ] + params["out"]["bias"]
    np.testing.assert_allclose(run(model)(params, X, MASK, cls), expected, rtol=1e-4, atol=1e-5)


def test_the_mean_of_all_tokens_without_a_mask_and_zeros_of_none():
    np.testing.assert_allclose(pooling.mean_token(jnp.asarray(X)), X.mean(1), rtol=1e-5, atol=1e-6)
    assert not np.asarray(pooling.mean_token(jnp.asarray(X), jnp.zeros((2, 6), bool))).any()


def test_cls_pooling_without_a_cls_token_is_refused():
    with pytest.raises(ValueError, match="model.pool.kind is cls"):
        pooling.apply(with_pool(kind="cls"), {}, jnp.asarray(X))


def test_first_matrices_have_the_deviation_that_is_asked_for():
    model = dataclasses.replace(MODEL, encoder=schema.Encoder(width=256))
    for std, expected in ((0.02, 0.02), (0.3, 0.3), (0.0, 1 / 16)):
        params = pooling.init(
            dataclasses.replace(model, pool=schema.Pool(width=128, std=std, query="learned")),
            jax.random.key(0),
        )
        for name in ("query", "key", "value", "out"):
            np.testing.assert_allclose(params[name]["kernel"].std(), expected, rtol=0.03)
        np.testing.assert_allclose(params["query_token"].std(), 0.02, rtol=0.2)

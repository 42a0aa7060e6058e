import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.models import text

# compiling is what takes the time here
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

MODEL = schema.Model(
    text=schema.Text(width=8, depth=2, heads=2, mlp_ratio=2.0, embed=6), dtype="float32"
)
TOKENS = np.array(
    [[9, 3, 0, 10, 0, 0], [9, 1, 2, 3, 4, 10], [9, 10, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
)
LENGTH = np.array([4, 6, 2, 0])


def pooled(pool):
    return dataclasses.replace(MODEL, text=dataclasses.replace(MODEL.text, pool=pool))


def random_tree(seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(
        lambda key: text.init(MODEL, key, vocabulary=11, length=6), jax.random.key(0)
    )
    return jax.tree.map(lambda s: jnp.asarray(0.5 * rng.normal(size=s.shape), jnp.float32), shapes)


@functools.cache
def run(model=MODEL):
    return jit(lambda params, tokens, length: text.apply(model, params, tokens, length))


def test_parameters_of_the_paper():
    shapes = jax.eval_shape(
        lambda key: text.init(schema.Model(), key, vocabulary=49_408, length=77), jax.random.key(0)
    )
    count = {
        name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in shapes.items()
    }
    assert count["blocks"] == 85_054_464 and count["projection"] == 768**2
    assert sum(count.values()) == 123_650_304  # golden, tables, final norm and projection included


@pytest.mark.parametrize("pool", ["first", "last", "mean"])
def test_what_stands_after_the_end_does_not_matter(pool):
    params, go = random_tree(), run(pooled(pool))
    embedding = go(params, TOKENS, LENGTH)
    other = np.where(np.arange(6) < np.maximum(LENGTH, 1)[:, None], TOKENS, 7)
    assert (other != TOKENS).any()
    np.testing.assert_array_equal(go(params, other, LENGTH), embedding)
    # words do matter
    assert (
        np.abs(go(params, np.where(np.arange(6) == 1, 5, TOKENS), LENGTH) - embedding)[:3]
        .max(-1)
        .min()
        > 1e-3
    )


def test_shorter_padding_gives_the_same_captions():
    params, rows = random_tree(), np.array([0, 2])
    np.testing.assert_allclose(
        run()(params, TOKENS[rows, :4], LENGTH[rows]),
        run()(params, TOKENS, LENGTH)[rows],
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_missing_caption_is_finite_and_so_are_its_gradients():
    model = pooled("mean")  # a plain mean over no token would divide by zero
    loss = lambda p: jnp.linalg.norm(
        text.apply(model, p, jnp.asarray(TOKENS[3:]), jnp.asarray(LENGTH[3:]))
    )
    value, grads = jit(jax.value_and_grad(loss))(random_tree())
    assert value > 0 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_word_order_and_both_directions_count():
    params = random_tree()
    base, swapped = (
        run()(params, TOKENS, LENGTH)[1],
        run()(params, TOKENS[:, [0, 2, 1, 3, 4, 5]], LENGTH)[1],
    )
    # the first token sees what comes later, and where it stands
    assert np.abs(base - swapped).max() > 1e-3


def test_scan_equals_loop():
    params, scan = random_tree(), dataclasses.replace(MODEL, scan=True)
    np.testing.assert_allclose(
        run(scan)(params, TOKENS, LENGTH), run()(params, TOKENS, LENGTH), rtol=1e-5, atol=1e-5
    )


def test_every_parameter_learns():
    g = np.random.default_rng(3).normal(size=(4, 6))
    grads = jit(
        jax.grad(
            lambda p: (text.apply(MODEL, p, jnp.asarray(TOKENS), jnp.asarray(LENGTH)) * g).sum()
        )
    )(random_tree())
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))
    used = np.unique(np.concatenate([TOKENS[row, : max(n, 1)] for row, n in enumerate(LENGTH)]))
    touched = np.flatnonzero(np.asarray(grads["token_table"]).any(-1))
    np.testing.assert_array_equal(touched, used)


def test_first_values_are_scaled_by_width_and_depth():
    model = schema.Model(text=schema.Text(width=64, depth=8, heads=4, embed=64))
    params = jit(lambda key: text.init(model, key, vocabulary=500, length=77))(jax.random.key(0))
    std = {"token_table": 0.02, "positions": 0.01, "projection/kernel": 64**-0.5}
    std |= {
        "blocks/attention/qkv/kernel": 64**-0.5,
        "blocks/attention/out/kernel": 64**-0.5 * 16**-0.5,
    }
    std |= {"blocks/mlp/fc1/kernel": 128**-0.5, "blocks/mlp/fc2/kernel": 64**-0.5 * 16**-0.5}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in std:
            assert np.std(leaf) == pytest.approx(std.pop(name), rel=0.03), name
        else:
            assert (np.asarray(leaf) == (1 if name.endswith("scale") else 0)).all(), name
    assert not std and "bias" not in params["projection"]


def test_bfloat16_gives_float32_embeddings():
    params, model = random_tree(), dataclasses.replace(MODEL, dtype="bfloat16")
    got, exact = run(model)(params, TOKENS, LENGTH), np.asarray(run()(params, TOKENS, LENGTH))
    assert got.dtype == jnp.float32
    assert np.abs(got - exact).mean() < 0.03 * np.abs(exact).mean()


def test_too_many_tokens_are_named():
    with pytest.raises(ValueError, match=r"\(2, 7\).*there are 6 positions"):
        text.apply(MODEL, random_tree(), jnp.zeros((2, 7), int), jnp.ones(2, int))

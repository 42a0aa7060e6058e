import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from m3i_jax import schema
from m3i_jax.models import initial, layers

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiling is what takes the time here


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def close(a, b, tolerance=2e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=tolerance, atol=tolerance), a, b
    )


def test_layer_norm_equals_numpy_and_its_gradient_equals_autodiff():
    x, scale, bias, g = normal(0, 3, 5, 8) * 2 + 1, normal(1, 8), normal(2, 8), normal(3, 3, 5, 8)
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6) * np.asarray(scale) + np.asarray(bias)
    close(layers.layer_norm(x, scale, bias), expected)

    def plain(x, scale, bias):
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale + bias

    got, want = (jit(jax.grad(lambda *a, f=f: (f(*a) * g).sum(), (0, 1, 2)))(x, scale, bias) for f in (layers.layer_norm, plain))
    close(got, want)


def test_layer_norm_works_in_float32_inside_and_keeps_the_type():
    x = (normal(0, 4, 64) + 100).astype(jnp.bfloat16)  # in bfloat16 arithmetic the mean alone would be off by up to 0.25
    y = layers.layer_norm(x, jnp.ones(64), jnp.zeros(64))
    wide = np.asarray(x, np.float64)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True), atol=0.01)


def test_batch_norm_equals_numpy_and_its_gradient_equals_autodiff():
    x, scale, bias, g = normal(0, 3, 5, 8) * 2 + 1, normal(1, 8), normal(2, 8), normal(3, 3, 5, 8)
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean((0, 1))) / np.sqrt(wide.var((0, 1)) + 1e-5) * np.asarray(scale) + np.asarray(bias)
    close(layers.batch_norm(x, scale, bias), expected)

    def plain(x, scale, bias):
        return (x - x.mean((0, 1))) / jnp.sqrt(x.var((0, 1)) + 1e-5) * scale + bias

    got, want = (jit(jax.grad(lambda *a, f=f: (f(*a) * g).sum(), (0, 1, 2)))(x, scale, bias) for f in (layers.batch_norm, plain))
    close(got, want)


def test_batch_norm_works_in_float32_inside_and_keeps_the_type():
    x = (normal(0, 16, 4, 8) + 100).astype(jnp.bfloat16)
    y = layers.batch_norm(x, jnp.ones(8), jnp.zeros(8))
    wide = np.asarray(x, np.float64)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), (wide - wide.mean((0, 1))) / wide.std((0, 1)), atol=0.01)


def test_gelu_is_exact_and_so_is_its_slope():
    x = jnp.linspace(-6, 6, 241)
    wide = np.asarray(x, np.float64)
    np.testing.assert_allclose(layers.gelu(x), wide * special.ndtr(wide), rtol=1e-5, atol=1e-7)
    slope = special.ndtr(wide) + wide * stats.norm.pdf(wide)
    np.testing.assert_allclose(jit(jax.grad(lambda x: layers.gelu(x).sum()))(x), slope, rtol=1e-5, atol=1e-6)
    assert layers.gelu(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("masked", [False, True])
def test_attention_and_its_gradient_equal_autodiff_of_the_plain_formula(masked):
    q, k, v, g = (normal(i, 2, 3, n, 4) for i, n in enumerate((2, 5, 5, 2)))
    where = jnp.array([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]], bool) if masked else None

    def plain(q, k, v):
        logits = jnp.einsum("bhqe,bhte->bhqt", q, k) / 2.0
        if where is not None:
            logits = jnp.where(where[:, None, None], logits, -jnp.inf)
        return jnp.einsum("bhqt,bhte->bhqe", jax.nn.softmax(logits), v)

    close(layers.attend(q, k, v, where), plain(q, k, v))
    got, want = (jit(jax.grad(lambda *a, f=f: (f(*a) * g).sum(), (0, 1, 2)))(q, k, v) for f in (lambda *a: layers.attend(*a, where), plain))
    close(got, want)
    if masked:
        assert not np.asarray(got[1])[0, :, [1, 4]].any() and not np.asarray(got[2])[0, :, [1, 4]].any()


def test_attention_without_any_key_is_the_mean_and_finite():
    q, k, v = (normal(i, 1, 2, 3, 4) for i in range(3))
    none = jnp.zeros((1, 3), bool)
    close(layers.attend(q, k, v, none), jnp.broadcast_to(v.mean(2, keepdims=True), v.shape))
    grads = jit(jax.grad(lambda *a: layers.attend(*a, none).sum(), (0, 1, 2)))(q, k, v)
    assert not np.asarray(grads[0]).any() and np.isfinite(np.asarray(grads[2])).all()


def test_heads_are_cut_part_by_part_then_head_by_head():
    x = jnp.arange(2 * 3 * 24.0).reshape(2, 3, 24)
    q, k, v = layers.to_heads(x, 3, 2)
    np.testing.assert_array_equal(k[1, 1, 2], x[1, 2, 12:16])
    np.testing.assert_array_equal(layers.from_heads(v), x[..., 16:])
    np.testing.assert_array_equal(layers.from_heads(q), x[..., :8])


# ---- stacked blocks ----
BLOCK = layers.block(8, 2, 2.0, "float32")


@pytest.fixture(scope="module")
def stacked():
    shapes = jax.eval_shape(lambda key: initial.init_blocks(BLOCK, key, width=8, depth=3), jax.random.key(0))
    return jax.tree.map(lambda s: 0.5 * normal(s.size, *s.shape), shapes)  # norms of one and biases of zero would hide mistakes


def run(**settings):
    return lambda params, x: layers.run_blocks(BLOCK, params, x, **settings)


def value_and_gradients(function, params, x):
    def weighted(params, x):
        y = function(params, x)
        return (y * normal(9, *y.shape)).sum(), y

    return jit(jax.value_and_grad(weighted, (0, 1), has_aux=True))(params, x)


@pytest.mark.parametrize("rows", [None, slice(4, None)])
def test_scan_and_remat_change_no_number_and_no_gradient(stacked, rows):
    x, keep = normal(1, 2, 6, 8), jnp.asarray(np.random.default_rng(2).choice([0.0, 1.25], (2, 3, 2)), jnp.float32)
    where = jnp.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 1, 1]], bool)
    loop = value_and_gradients(run(keep_BxLx2=keep, where_BxT=where, rows=rows), stacked, x)
    for scan, remat in ((True, "none"), (False, "full")) if rows is None else ((True, "full"),):
        close(value_and_gradients(run(keep_BxLx2=keep, where_BxT=where, rows=rows, scan=scan, remat=remat), stacked, x), loop)


@pytest.mark.parametrize("depth,rows", [(1, slice(0, 1)), (2, slice(4, None))])
def test_wanted_rows_are_those_of_the_full_output(stacked, rows, depth):
    params, x = jax.tree.map(lambda leaf: leaf[:depth], stacked), normal(1, 2, 6, 8)
    full = value_and_gradients(lambda p, x: run()(p, x)[:, rows], params, x)
    close(value_and_gradients(run(rows=rows), params, x), full)
    if depth == 1:
        close(value_and_gradients(run(rows=rows, scan=True), params, x), full)


def test_a_block_with_batch_norm_normalises_channels_over_batch_and_tokens(stacked):
    """Attention of one head and MLP written out in numpy; every head of a block of width 8 would only repeat test_reference."""
    one = layers.block(8, 1, 2.0, "float32", "batch")
    first, x = jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float64), stacked), np.asarray(normal(1, 2, 6, 8), np.float64)
    got = jit(lambda p, x: one.apply({"params": p}, x))(jax.tree.map(jnp.float32, first), jnp.float32(x))
    norm = lambda p, x: (x - x.mean((0, 1))) / np.sqrt(x.var((0, 1)) + 1e-5) * p["scale"] + p["bias"]  # noqa: E731
    dense = lambda p, x: x @ p["kernel"] + p["bias"]  # noqa: E731
    q, k, v = np.split(dense(first["attention"]["qkv"], norm(first["norm1"], x)), 3, -1)
    x = x + dense(first["attention"]["out"], special.softmax(q @ k.swapaxes(1, 2) / np.sqrt(8), -1) @ v)
    hidden = dense(first["mlp"]["fc1"], norm(first["norm2"], x))
    close(got, x + dense(first["mlp"]["fc2"], hidden * special.ndtr(hidden)), 1e-4)


def test_wanted_rows_with_batch_norm_keep_the_statistics_of_all_rows(stacked):
    params, one, rows = jax.tree.map(lambda leaf: leaf[:2], stacked), layers.block(8, 2, 2.0, "float32", "batch"), slice(4, None)
    full, x = jit(lambda p, x: layers.run_blocks(one, p, x)[:, rows]), normal(1, 2, 6, 8)
    for scan, remat in ((False, "none"), (True, "full")):
        close(jit(lambda p, x, s=scan, r=remat: layers.run_blocks(one, p, x, rows=rows, scan=s, remat=r))(params, x), full(params, x), 1e-4)


def test_keep_factors_scale_each_branch_of_each_row(stacked):
    x, none = normal(1, 2, 6, 8), jnp.zeros((2, 3, 2))
    dropping = jit(lambda keep: run(keep_BxLx2=keep)(stacked, x))
    np.testing.assert_array_equal(dropping(none), x)
    close(dropping(none + 1), jit(run())(stacked, x))

    @jit
    def mlp_branch(first):
        h = layers.layer_norm(x, first["norm2"]["scale"], first["norm2"]["bias"])
        h = h @ first["mlp"]["fc1"]["kernel"] + first["mlp"]["fc1"]["bias"]
        return jax.nn.gelu(h, approximate=False) @ first["mlp"]["fc2"]["kernel"] + first["mlp"]["fc2"]["bias"]

    branch = mlp_branch(jax.tree.map(lambda leaf: leaf[0], stacked))
    keep = none.at[1, 0, 1].set(1.25)  # the MLP of the first block, in the second row alone
    close(dropping(keep), x.at[1].add(1.25 * branch[1]))


def test_keep_factors_of_a_wrong_shape_are_named(stacked):
    with pytest.raises(ValueError, match=r"\(2, 2, 2\).*\(2, 3, 2\)"):
        run(keep_BxLx2=jnp.ones((2, 2, 2)))(stacked, jnp.zeros((2, 6, 8)))


def test_keep_factors_are_not_rounded_to_the_compute_precision():
    one = layers.block(8, 2, 2.0, "bfloat16")
    shapes = jax.eval_shape(lambda key: initial.init_blocks(one, key, width=8, depth=1), jax.random.key(0))
    params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    params["mlp"]["fc2"]["bias"] += 270.0  # exact in bfloat16, and times 10/9 it is 300, also exact
    y = jit(lambda p, x: layers.run_blocks(one, p, x, keep_BxLx2=jnp.array([[[0.0, 10 / 9]]])))(params, jnp.zeros((1, 2, 8), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and (np.asarray(y, np.float32) == 300).all()


def test_gradient_of_stacked_blocks_needs_no_padding(stacked):
    x = normal(1, 2, 6, 8)
    assert " pad[" not in str(jax.make_jaxpr(jax.grad(lambda p: run()(p, x).sum()))(stacked))


def test_drop_rates():
    np.testing.assert_allclose(layers.drop_rates(schema.Encoder(depth=12, drop_path=0.1)), 0.1 * np.arange(12) / 11, rtol=1e-6)
    np.testing.assert_allclose(layers.drop_rates(schema.Encoder(depth=4, drop_path=0.2, drop_path_rule="uniform")), [0.2] * 4, rtol=1e-6)
    assert layers.drop_rates(schema.Encoder(depth=1, drop_path=0.2)).tolist() == [0.0]

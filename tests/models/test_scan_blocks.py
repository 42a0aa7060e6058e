"""Blocks that are run one after the other: loops, scans, wanted rows, and what the backward pass
keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from m3i_jax.models import initializers, layers
from m3i_jax.models import scan_blocks as stacked_blocks
from m3i_jax.profiling import flops
from tests.models.test_layers import close, jit, normal

BLOCK = layers.block(8, 2, 2.0, "float32")


@pytest.fixture(scope="module")
def stacked():
    shapes = jax.eval_shape(
        lambda key: initializers.init_blocks(BLOCK, key, width=8, depth=3), jax.random.key(0)
    )
    # norms of one and biases of zero would hide mistakes
    return jax.tree.map(lambda s: 0.5 * normal(s.size, *s.shape), shapes)


def run(**settings):
    return lambda params, x: stacked_blocks.run_blocks(BLOCK, params, x, **settings)


def value_and_gradients(function, params, x):
    def weighted(params, x):
        y = function(params, x)
        return (y * normal(9, *y.shape)).sum(), y

    return jit(jax.value_and_grad(weighted, (0, 1), has_aux=True))(params, x)


@pytest.mark.parametrize("rows", [None, pytest.param(slice(4, None), marks=pytest.mark.slow)])
def test_scan_and_remat_change_no_number_and_no_gradient(stacked, rows):
    x, keep = (
        normal(1, 2, 6, 8),
        jnp.asarray(np.random.default_rng(2).choice([0.0, 1.25], (2, 3, 2)), jnp.float32),
    )
    where = jnp.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 1, 1]], bool)
    loop = value_and_gradients(run(keep_BxLx2=keep, where_BxT=where, rows=rows), stacked, x)
    for scan, remat in (
        ((True, "none"), (False, "full"), (True, "dots"))
        if rows is None
        else ((True, "full"), (False, "names"))
    ):
        close(
            value_and_gradients(
                run(keep_BxLx2=keep, where_BxT=where, rows=rows, scan=scan, remat=remat), stacked, x
            ),
            loop,
        )


@pytest.mark.parametrize("remat,rows", [("half", None), ("names", slice(4, None))])
def test_pieces_change_no_number_and_no_gradient(stacked, monkeypatch, remat, rows):
    x, keep = (
        normal(1, 6, 6, 8),
        jnp.asarray(np.random.default_rng(2).choice([0.0, 1.25], (6, 3, 2)), jnp.float32),
    )
    where = jnp.asarray(np.random.default_rng(3).random((6, 6)) < 0.7)
    whole = value_and_gradients(
        run(keep_BxLx2=keep, where_BxT=where, rows=rows, scan=True), stacked, x
    )
    monkeypatch.setattr(stacked_blocks, "ROWS", 2)
    in_parts = run(keep_BxLx2=keep, where_BxT=where, rows=rows, scan=True, remat=remat)
    # over blocks, and over pieces inside
    assert str(jax.make_jaxpr(in_parts)(stacked, x)).count("scan[") > 1
    close(value_and_gradients(in_parts, stacked, x), whole)


@pytest.mark.parametrize("depth,rows", [(1, slice(0, 1)), (2, slice(4, None))])
def test_wanted_rows_are_those_of_the_full_output(stacked, rows, depth):
    params, x = jax.tree.map(lambda leaf: leaf[:depth], stacked), normal(1, 2, 6, 8)
    full = value_and_gradients(lambda p, x: run()(p, x)[:, rows], params, x)
    close(value_and_gradients(run(rows=rows), params, x), full)
    if depth == 1:
        close(value_and_gradients(run(rows=rows, scan=True), params, x), full)


def test_a_block_with_batch_norm_normalises_channels_over_batch_and_tokens(stacked):
    """Attention of one head and MLP written out in numpy; every head of a block of width 8 would
    only repeat test_reference."""
    one = layers.block(8, 1, 2.0, "float32", "batch")
    first, x = (
        jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float64), stacked),
        np.asarray(normal(1, 2, 6, 8), np.float64),
    )
    got = jit(lambda p, x: one.apply({"params": p}, x))(
        jax.tree.map(jnp.float32, first), jnp.float32(x)
    )
    norm = lambda p, x: (
        (x - x.mean((0, 1))) / np.sqrt(x.var((0, 1)) + 1e-5) * p["scale"] + p["bias"]
    )
    dense = lambda p, x: x @ p["kernel"] + p["bias"]
    q, k, v = np.split(dense(first["attention"]["qkv"], norm(first["norm1"], x)), 3, -1)
    x = x + dense(
        first["attention"]["out"], special.softmax(q @ k.swapaxes(1, 2) / np.sqrt(8), -1) @ v
    )
    hidden = dense(first["mlp"]["fc1"], norm(first["norm2"], x))
    close(got, x + dense(first["mlp"]["fc2"], hidden * special.ndtr(hidden)), 1e-4)


def test_wanted_rows_with_batch_norm_keep_the_statistics_of_all_rows(stacked):
    params, one, rows = (
        jax.tree.map(lambda leaf: leaf[:2], stacked),
        layers.block(8, 2, 2.0, "float32", "batch"),
        slice(4, None),
    )
    full, x = jit(lambda p, x: stacked_blocks.run_blocks(one, p, x)[:, rows]), normal(1, 2, 6, 8)
    for scan, remat in ((False, "none"), (True, "full")):
        close(
            jit(
                lambda p, x, s=scan, r=remat: stacked_blocks.run_blocks(
                    one, p, x, rows=rows, scan=s, remat=r
                )
            )(params, x),
            full(params, x),
            1e-4,
        )


def test_keep_factors_scale_each_branch_of_each_row(stacked):
    x, none = normal(1, 2, 6, 8), jnp.zeros((2, 3, 2))
    dropping = jit(lambda keep: run(keep_BxLx2=keep)(stacked, x))
    np.testing.assert_array_equal(dropping(none), x)
    close(dropping(none + 1), jit(run())(stacked, x))

    @jit
    def mlp_branch(first):
        h = layers.layer_norm(x, first["norm2"]["scale"], first["norm2"]["bias"])
        h = h @ first["mlp"]["fc1"]["kernel"] + first["mlp"]["fc1"]["bias"]
        return (
            jax.nn.gelu(h, approximate=False) @ first["mlp"]["fc2"]["kernel"]
            + first["mlp"]["fc2"]["bias"]
        )

    branch = mlp_branch(jax.tree.map(lambda leaf: leaf[0], stacked))
    keep = none.at[1, 0, 1].set(1.25)  # the MLP of the first block, in the second row alone
    close(dropping(keep), x.at[1].add(1.25 * branch[1]))


def test_keep_factors_of_a_wrong_shape_are_named(stacked):
    with pytest.raises(ValueError, match=r"\(2, 2, 2\).*\(2, 3, 2\)"):
        run(keep_BxLx2=jnp.ones((2, 2, 2)))(stacked, jnp.zeros((2, 6, 8)))


def test_keep_factors_are_not_rounded_to_the_compute_precision():
    one = layers.block(8, 2, 2.0, "bfloat16")
    shapes = jax.eval_shape(
        lambda key: initializers.init_blocks(one, key, width=8, depth=1), jax.random.key(0)
    )
    params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    params["mlp"]["fc2"]["bias"] += 270.0  # exact in bfloat16, and times 10/9 it is 300, also exact
    y = jit(
        lambda p, x: stacked_blocks.run_blocks(one, p, x, keep_BxLx2=jnp.array([[[0.0, 10 / 9]]]))
    )(params, jnp.zeros((1, 2, 8), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and (np.asarray(y, np.float32) == 300).all()


def test_gradient_of_stacked_blocks_needs_no_padding(stacked):
    x = normal(1, 2, 6, 8)
    assert " pad[" not in str(jax.make_jaxpr(jax.grad(lambda p: run()(p, x).sum()))(stacked))


# ---- what the backward pass keeps ----
DEPTH, ROWS, TOKENS, WIDTH = 6, 4, 32, 64


@functools.cache
def of_policy(remat, scan=True, heads=2, at_once=ROWS):
    """(gradients, compiled, operations of matrix products) of a stack of blocks."""
    one = layers.block(WIDTH, heads, 4.0, "float32")
    params = initializers.init_blocks(one, jax.random.key(1), width=WIDTH, depth=DEPTH)
    gradient = jax.grad(
        lambda p, x: jnp.square(stacked_blocks.run_blocks(one, p, x, scan=scan, remat=remat)).sum(),
        (0, 1),
    )
    arguments = params, normal(1, ROWS, TOKENS, WIDTH)
    compiled = jit(gradient).lower(*arguments).compile()
    return (
        compiled(*arguments),
        compiled.memory_analysis().temp_size_in_bytes,
        flops.count_flops(gradient, *arguments).dot,
    )


@pytest.mark.parametrize("remat", stacked_blocks.POLICIES)
def test_what_is_kept_changes_no_gradient(remat):
    close(of_policy(remat)[0], of_policy("none")[0], 1e-4)


def test_the_less_is_kept_the_less_memory_and_the_more_products():
    memory, products = (
        {remat: of_policy(remat)[i] for remat in ("none", "dots", "names", "half", "full")}
        for i in (1, 2)
    )
    assert memory["none"] > memory["dots"] > memory["names"] > memory["half"] > memory["full"]
    blocks, attention = DEPTH * ROWS * 2, TOKENS**2 * WIDTH
    assert products["dots"] == products["none"]
    # q k' of every block once more
    assert products["names"] == products["none"] + blocks * attention
    # And attention's other product, and the matrix before the GELU.
    assert products["half"] == products["none"] + blocks * (4 * TOKENS * WIDTH**2 + 2 * attention)
    # All of a block once more, but the last product, which nothing needs.
    assert products["full"] == products["none"] + blocks * (8 * TOKENS * WIDTH**2 + 2 * attention)


@pytest.mark.parametrize("remat,numbers", [("names", 9), ("half", 4)])
def test_what_a_policy_keeps_is_what_it_says(remat, numbers):
    """Between forward and backward a block of so many times D numbers a token and its input, and no
    more."""
    saved = of_policy(remat)[1] - of_policy("full")[1]
    named = DEPTH * ROWS * TOKENS * numbers * WIDTH * 4
    assert 0.8 * named < saved < 1.2 * named


def test_pieces_hold_what_is_computed_again_in_parts(monkeypatch):
    """A block's own temporaries: the weights of attention, here eight times as many numbers as the
    stream, and their gradients."""
    whole = of_policy("half", heads=16)
    monkeypatch.setattr(stacked_blocks, "ROWS", 1)
    parts = of_policy("half", heads=16, at_once=1)
    own = ROWS * TOKENS * WIDTH * 4
    assert parts[2] == whole[2] and parts[1] < whole[1] - 3 * own
    close(parts[0], whole[0], 1e-4)

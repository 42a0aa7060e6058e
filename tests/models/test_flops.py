"""The multiply-adds of every tower's matrix products are those of the formula, not one more:
forward, and backward twice as many."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.models import captioner, decoder, heads, pooling, text, vit
from m3i_jax.objective.terms import MlpShape

# widths of encoder and decoder, their blocks, target cells, visible cells, patch elements
D, W, L, M, N, K, P = 24, 16, 3, 2, 9, 4, 48
MODEL = schema.Model(
    encoder=schema.Encoder(patch_size=4, width=D, depth=L, heads=3),
    decoder=schema.Decoder(width=W, depth=M, heads=2),
    pool=schema.Pool(width=20, heads=4),
    text=schema.Text(width=W, depth=M, heads=2, embed=12),
    captioner=schema.Captioner(width=W, depth=M, heads=2),
    dtype="float32",
)


def inner(value):
    """Programs inside an equation's parameters."""
    if isinstance(value, (tuple, list)):
        return [program for item in value for program in inner(item)]
    value = getattr(value, "jaxpr", value)
    return [value] if hasattr(value, "eqns") else []


def macs(program):
    total = 0
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += equation.outvars[0].aval.size * int(
                np.prod([shape[axis] for axis in contracted])
            )
        repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += repeats * sum(macs(p) for value in equation.params.values() for p in inner(value))
    return total


def of(function, *arguments):
    return macs(jax.make_jaxpr(function)(*arguments).jaxpr)


def block(rows, width, wanted=None):
    """12 T D^2 + 2 T^2 D, or with only some rows wanted: keys and values for all, everything else
    for those."""
    wanted = rows if wanted is None else wanted
    return 2 * rows * width**2 + 10 * wanted * width**2 + 2 * rows * wanted * width


def shapes(init):
    return jax.eval_shape(init, jax.random.key(0))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_encoder(scan, dtype):
    model = schema.Model(encoder=MODEL.encoder, dtype=dtype, scan=scan)
    params, x = shapes(lambda key: vit.init(model, key)), jnp.zeros((2, N, P))
    assert of(lambda p: vit.apply(model, p, x, grid=3), params) == 2 * (
        L * block(N + 1, D) + N * P * D
    )
    assert of(
        lambda p: vit.apply(model, p, x, grid=3, index_BxK=jnp.zeros((2, K), int)), params
    ) == 2 * (L * block(K + 1, D) + K * P * D)


def test_mask_tokens_and_the_mean_over_blocks_cost_no_product():
    params, x = shapes(lambda key: vit.init(MODEL, key, mask_token=True)), jnp.zeros((2, N, P))
    options = {"hidden_BxN": jnp.zeros((2, N), bool), "blocks": 2}
    assert of(lambda p: vit.apply(MODEL, p, x, grid=3, **options), params) == 2 * (
        L * block(N + 1, D) + N * P * D
    )


@pytest.mark.parametrize("freeze", [True, False])
def test_encoder_backward(freeze):
    model = schema.Model(
        encoder=schema.Encoder(patch_size=4, width=D, depth=L, heads=3, freeze_patch_embed=freeze)
    )
    params, x = shapes(lambda key: vit.init(model, key)), jnp.zeros((2, N, P))
    got = of(jax.grad(lambda p: vit.apply(model, p, x, grid=3).astype(jnp.float32).sum()), params)
    assert got == 2 * (3 * L * block(N + 1, D) + (1 if freeze else 2) * N * P * D)


def decode(model, wanted="tokens", cls=None):
    def run(params, z, query):
        return decoder.prediction_head(
            model,
            params,
            decoder.apply(model, params, z, jnp.zeros((2, K), int), query, grid=3, cls_BxD=cls),
            wanted,
        )

    return run


INPUTS = jnp.zeros((2, K, D)), jnp.zeros((2, N, W))


@pytest.mark.parametrize("scan", [False, True])
def test_decoder_leaves_out_dead_rows(scan):
    model = schema.Model(encoder=MODEL.encoder, decoder=MODEL.decoder, dtype="float32", scan=scan)
    params = shapes(lambda key: decoder.init(model, key))
    forward = 2 * (K * D * W + (M - 1) * block(K + N, W) + block(K + N, W, wanted=N) + N * W * D)
    assert of(decode(model), params, *INPUTS) == forward
    assert of(jax.grad(lambda *a: decode(model)(*a).sum(), (0, 1)), params, *INPUTS) == 3 * forward


def test_fewer_queries_cls_and_pixels():
    params = shapes(lambda key: decoder.init(MODEL, key, of=("pixels",)))
    got = of(decode(MODEL, "pixels", jnp.zeros((2, D))), params, INPUTS[0], INPUTS[1][:, :5])
    visible = K + 1
    assert got == 2 * (
        visible * D * W
        + (M - 1) * block(visible + 5, W)
        + block(visible + 5, W, wanted=5)
        + 5 * W * P
    )


def test_projector_and_the_dead_rows_that_batch_norm_needs():
    for norm in ("layer", "batch"):
        model = dataclasses.replace(
            MODEL, decoder=dataclasses.replace(MODEL.decoder, projector_depth=1, norm=norm)
        )
        params = shapes(lambda key, model=model: decoder.init(model, key))
        last = block(K + N, W, wanted=N) if norm == "layer" else block(K + N, W)
        got = of(decode(model), params, *INPUTS)
        assert got == 2 * (K * D * W + block(K, W) + (M - 1) * block(K + N, W) + last + N * W * W)


@pytest.mark.parametrize("of_target,width", [("tokens", D), ("pixels", P)])
def test_linear_head(of_target, width):
    params = shapes(lambda key: heads.init_linear(MODEL, key, of_target))
    assert (
        of(lambda p: heads.apply_linear(MODEL, p, jnp.zeros((2, N, D))), params)
        == 2 * N * D * width
    )


def test_mlp():
    model, mlp = (
        dataclasses.replace(MODEL, head=schema.Head(hidden=30)),
        MlpShape(layers=3, last_norm=True),
    )
    params = shapes(lambda key: heads.init_mlp(model, key, mlp, D, 7))
    assert of(lambda p: heads.apply_mlp(model, p, mlp, jnp.zeros((5, D))), params) == 5 * (
        D * 30 + 30 * 30 + 30 * 7
    )


def test_queries_of_equal_views_are_mapped_once():
    params = shapes(lambda key: decoder.init(MODEL, key))
    assert (
        of(lambda p: decoder.decoder_queries(MODEL, p, jnp.zeros((N, 2 * W))), params)
        == N * 2 * W * W
    )
    assert (
        of(lambda p: decoder.decoder_queries(MODEL, p, jnp.zeros((5, N, 2 * W))), params)
        == 5 * N * 2 * W * W
    )


def test_attention_pool():
    params = shapes(lambda key: pooling.init(MODEL, key))
    assert of(lambda p: pooling.apply(MODEL, p, jnp.zeros((5, K, D))), params) == 5 * (
        (2 * K + 1) * D**2 + 2 * K * D + 20 * D
    )


def test_a_learned_query_is_mapped_once_for_the_batch():
    model = dataclasses.replace(MODEL, pool=dataclasses.replace(MODEL.pool, query="learned"))
    params = shapes(lambda key: pooling.init(model, key))
    got = of(lambda p: pooling.apply(model, p, jnp.zeros((5, K, D))), params)
    assert got == D**2 + 5 * (2 * K * D**2 + 2 * K * D + 20 * D)


@pytest.mark.parametrize("pool,wanted", [("first", 1), ("last", 7), ("mean", 7)])
def test_text_tower(pool, wanted):
    model = schema.Model(
        text=schema.Text(width=W, depth=M, heads=2, embed=12, pool=pool), dtype="float32"
    )
    params = shapes(lambda key: text.init(model, key, vocabulary=50, length=7))
    got = of(lambda p: text.apply(model, p, jnp.zeros((5, 7), int), jnp.full(5, 3)), params)
    assert got == 5 * ((M - 1) * block(7, W) + block(7, W, wanted=wanted) + W * 12)


def test_caption_decoder_and_its_backward_pass():
    """6 captions of 7 tokens of which 6 are predicted, 4 cells, 50 ids."""
    params = shapes(lambda key: captioner.init(MODEL, key, vocabulary=50, length=7))
    tokens, z = jnp.zeros((6, 7), int), jnp.zeros((6, K, D))
    at_once = jnp.zeros(6, bool)
    run = lambda p, z: captioner.apply(MODEL, p, tokens, z, at_once)
    attention = 4 * 6 * W**2 + 2 * 6 * 6 * W
    cross = 2 * 6 * W**2 + 2 * K * D * W + 2 * 6 * K * W
    forward = 6 * (M * (attention + cross + 8 * 6 * W**2) + 6 * W * 50)
    assert of(run, params, z) == forward
    assert of(jax.grad(lambda *a: run(*a).sum(), (0, 1)), params, z) == 3 * forward


def test_recomputation_costs_the_blocks_once_more():
    plain, remat = (
        schema.Model(encoder=MODEL.encoder, dtype="float32", remat=remat)
        for remat in ("none", "full")
    )
    params, x = shapes(lambda key: vit.init(plain, key)), jnp.zeros((2, N, P))
    cost = [
        of(jax.grad(lambda p, m=m: vit.apply(m, p, x, grid=3).sum()), params)
        for m in (plain, remat)
    ]
    # The last product of each recomputed block is not needed again.
    assert cost[0] < cost[1] <= cost[0] + 2 * L * block(N + 1, D)


def test_vit_b16_is_the_published_17_5_giga_multiply_adds():
    model = schema.Model()
    params = shapes(lambda key: vit.init(model, key))
    got = of(lambda p: vit.apply(model, p, jnp.zeros((1, 196, 768), jnp.bfloat16), grid=14), params)
    assert got == 12 * (12 * 197 * 768**2 + 2 * 197**2 * 768) + 196 * 768 * 768
    # golden: timm's vit_base_patch16_224 without its head
    assert got / 1e9 == pytest.approx(17.56, abs=0.01)

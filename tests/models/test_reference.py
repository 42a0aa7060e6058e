"""Every tower against an independent rendering in float64 numpy, token by token and head by head,
from the formulas alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from m3i_jax import schema
from m3i_jax.models import decoder, pooling, text, vit

# compiling is what takes the time here
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

MODEL = schema.Model(
    encoder=schema.Encoder(
        patch_size=2, width=12, depth=2, heads=3, mlp_ratio=2.0, final_norm=True
    ),
    decoder=schema.Decoder(width=8, depth=2, heads=2),
    pool=schema.Pool(width=10, heads=4),
    text=schema.Text(width=8, depth=2, heads=2, embed=6),
    dtype="float32",
)


def random_tree(init, seed):
    """Parameters of the right shapes, all of them random: also the norms and biases, which start at
    one and zero."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(
        lambda s: rng.normal(size=s.shape).astype(np.float32) * (0.4 if len(s.shape) > 1 else 0.6),
        shapes,
    )


def dense(p, x):
    return x @ np.asarray(p["kernel"], np.float64) + np.asarray(p.get("bias", 0.0), np.float64)


def norm(p, x):
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return y * np.asarray(p["scale"], np.float64) + np.asarray(p["bias"], np.float64)


def attention(q_QxD, k_TxD, v_TxD, heads):
    width, out = q_QxD.shape[-1] // heads, np.zeros_like(q_QxD)
    for h in range(heads):
        columns = slice(h * width, (h + 1) * width)
        for row, query in enumerate(q_QxD[:, columns]):
            weights = np.exp([query @ key / np.sqrt(width) for key in k_TxD[:, columns]])
            out[row, columns] = weights / weights.sum() @ v_TxD[:, columns]
    return out


def batch_norm(p, x_BxTxD):
    y = (x_BxTxD - x_BxTxD.mean((0, 1))) / np.sqrt(x_BxTxD.var((0, 1)) + 1e-5)
    return y * np.asarray(p["scale"], np.float64) + np.asarray(p["bias"], np.float64)


def blocks_with_batch_norm(stacked, x_BxTxD, heads):
    for layer in range(len(stacked["norm1"]["scale"])):
        p = jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked)
        q, k, v = np.split(dense(p["attention"]["qkv"], batch_norm(p["norm1"], x_BxTxD)), 3, -1)
        x_BxTxD = x_BxTxD + dense(
            p["attention"]["out"],
            np.stack([attention(*row, heads) for row in zip(q, k, v, strict=True)]),
        )
        hidden = dense(p["mlp"]["fc1"], batch_norm(p["norm2"], x_BxTxD))
        x_BxTxD = x_BxTxD + dense(p["mlp"]["fc2"], hidden * special.ndtr(hidden))
    return x_BxTxD


def blocks(stacked, x_TxD, heads):
    for layer in range(len(stacked["norm1"]["scale"])):
        p = jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked)
        q, k, v = np.split(dense(p["attention"]["qkv"], norm(p["norm1"], x_TxD)), 3, -1)
        x_TxD = x_TxD + dense(p["attention"]["out"], attention(q, k, v, heads))
        hidden = dense(p["mlp"]["fc1"], norm(p["norm2"], x_TxD))
        x_TxD = x_TxD + dense(p["mlp"]["fc2"], hidden * special.ndtr(hidden))
    return x_TxD


def table(grid, width):
    """Row first: sine and cosine of the row, then of the column."""
    out = np.zeros((grid * grid, width))
    quarter = width // 4
    for cell in range(grid * grid):
        for k in range(quarter):
            frequency = 10000.0 ** (-k / quarter)
            for half, place in enumerate(divmod(cell, grid)):
                out[cell, 2 * half * quarter + k] = np.sin(place * frequency)
                out[cell, (2 * half + 1) * quarter + k] = np.cos(place * frequency)
    return out


@pytest.mark.parametrize("index", [None, [[4, 0, 7], [1, 2, 8]]])
def test_encoder(index):
    params = random_tree(lambda key: vit.init(MODEL, key), 0)
    patches = np.random.default_rng(1).normal(size=(2, 9, 12)).astype(np.float32)
    got = jit(
        lambda p, x: vit.apply(
            MODEL, p, x, grid=3, index_BxK=None if index is None else jnp.array(index)
        )
    )(params, patches)
    for row in range(2):
        cells = range(9) if index is None else index[row]
        tokens = np.stack(
            [
                dense(params["patch_embed"], patches[row, c].astype(np.float64)) + table(3, 12)[c]
                for c in cells
            ]
        )
        x = np.concatenate([np.asarray(params["cls_token"][0], np.float64), tokens])
        np.testing.assert_allclose(
            got[row], norm(params["norm"], blocks(params["blocks"], x, 3)), rtol=2e-4, atol=2e-4
        )


def test_decoder():
    params = random_tree(lambda key: decoder.init(MODEL, key), 2)
    rng = np.random.default_rng(3)
    z, raw, index = (
        rng.normal(size=(2, 3, 12)),
        rng.normal(size=(2, 9, 16)),
        np.array([[4, 0, 7], [1, 2, 8]]),
    )

    def predict(p, z, raw):
        return decoder.prediction_head(
            MODEL,
            p,
            decoder.apply(
                MODEL, p, z, jnp.asarray(index), decoder.decoder_queries(MODEL, p, raw), grid=3
            ),
            "tokens",
        )

    got = jit(predict)(params, z.astype(np.float32), raw.astype(np.float32))
    for row in range(2):
        own = dense(params["embed"], z[row]) + table(3, 8)[index[row]]
        query = np.asarray(params["mask_token"], np.float64).reshape(-1) + dense(
            params["position_map"], raw[row]
        )
        x = blocks(params["blocks"], np.concatenate([own, query]), 2)
        np.testing.assert_allclose(got[row], dense(params["head"], x)[3:], rtol=2e-4, atol=2e-4)


def test_decoder_of_siamese_im():
    """cls first, embedding, projector, then positions (zero of cls) and queries, decoder, linear
    map; batch norm in both stacks."""
    settings = dataclasses.replace(MODEL.decoder, norm="batch", projector_depth=1, depth=1)
    model = dataclasses.replace(MODEL, decoder=settings)
    params, rng = random_tree(lambda key: decoder.init(model, key), 2), np.random.default_rng(3)
    z, raw, cls = rng.normal(size=(2, 3, 12)), rng.normal(size=(2, 9, 16)), rng.normal(size=(2, 12))
    index = np.array([[4, 0, 7], [1, 2, 8]])

    def predict(p, z, raw, cls):
        queries = decoder.decoder_queries(model, p, raw)
        rows = decoder.apply(model, p, z, jnp.asarray(index), queries, grid=3, cls_BxD=cls)
        kept = {part: p[part] for part in ("embed", "projector")}  # of a target
        return decoder.prediction_head(model, p, rows, "tokens"), decoder.project_targets(
            model, kept, jnp.concatenate([cls[:, None], z], 1)
        )

    got, target = jit(predict)(params, *(x.astype(np.float32) for x in (z, raw, cls)))
    own = blocks_with_batch_norm(
        params["projector"], dense(params["embed"], np.concatenate([cls[:, None], z], 1)), 2
    )
    np.testing.assert_allclose(target, own, rtol=2e-4, atol=2e-4)
    own[:, 1:] += table(3, 8)[index]
    query = np.asarray(params["mask_token"], np.float64).reshape(-1) + dense(
        params["position_map"], raw
    )
    x = blocks_with_batch_norm(params["blocks"], np.concatenate([own, query], 1), 2)
    np.testing.assert_allclose(got, dense(params["head"], x)[:, 4:], rtol=5e-4, atol=5e-4)


def test_attention_pool():
    params = random_tree(lambda key: pooling.init(MODEL, key), 4)
    x = np.random.default_rng(5).normal(size=(2, 5, 12))
    got = jit(lambda p, x: pooling.apply(MODEL, p, x))(params, x.astype(np.float32))
    for row in range(2):
        q = dense(params["query"], norm(params["norm_query"], x[row].mean(0, keepdims=True)))
        k, v = (
            dense(params[part], norm(params[f"norm_{part}"], x[row])) for part in ("key", "value")
        )
        np.testing.assert_allclose(
            got[row], dense(params["out"], attention(q, k, v, 4))[0], rtol=2e-4, atol=2e-4
        )


@pytest.mark.parametrize("pool", ["first", "last", "mean"])
def test_text_tower(pool):
    model = schema.Model(
        text=schema.Text(width=8, depth=2, heads=2, embed=6, pool=pool), dtype="float32"
    )
    params = random_tree(lambda key: text.init(model, key, vocabulary=11, length=6), 6)
    tokens, length = np.array([[9, 3, 0, 10, 0, 0], [9, 1, 2, 3, 4, 10]]), np.array([4, 6])
    got = jit(lambda p: text.apply(model, p, jnp.asarray(tokens), jnp.asarray(length)))(params)
    for row, count in enumerate(length):
        x = (
            params["token_table"][tokens[row, :count]].astype(np.float64)
            + params["positions"][:count]
        )
        x = norm(params["norm"], blocks(params["blocks"], x, 2))
        caption = {"first": x[0], "last": x[-1], "mean": x.mean(0)}[pool]
        np.testing.assert_allclose(
            got[row], dense(params["projection"], caption), rtol=2e-4, atol=2e-4
        )

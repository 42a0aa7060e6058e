import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.models import m3i
from m3i_jax.objective import positions

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiling is what takes the time here

CONFIG = schema.Config(
    data=schema.Data(image_size=12, caption_length=6),
    model=schema.Model(
        encoder=schema.Encoder(patch_size=4, width=8, depth=1, heads=2, mlp_ratio=2.0),
        decoder=schema.Decoder(width=12, depth=1, heads=2, mlp_ratio=2.0),
        pool=schema.Pool(width=100, heads=4),
        text=schema.Text(width=8, depth=1, heads=2, mlp_ratio=2.0, embed=50),
    ),
)


def shapes(config=CONFIG, classes=5, vocabulary=11):
    return jax.eval_shape(lambda key: m3i.init(config, key, classes=classes, vocabulary=vocabulary), jax.random.key(0))


@pytest.fixture(scope="module")
def params():
    return jit(lambda key: m3i.init(CONFIG, key, classes=5, vocabulary=11))(jax.random.key(0))


def test_heads_are_there_only_when_used():
    always, text = {"encoder", "decoder", "pool"}, {"image_projection", "text", "logit_scale"}
    assert set(shapes()) == always | {"category"} | text
    assert set(shapes(classes=0)) == always | text
    assert set(shapes(vocabulary=0)) == always | {"category"}
    assert all(leaf.dtype == jnp.float32 and not leaf.weak_type for leaf in jax.tree.leaves(shapes()))


def test_a_part_starts_the_same_whatever_else_there_is(params):
    pool = jit(lambda key: m3i.init(CONFIG, key, classes=0, vocabulary=0)["pool"])  # the rest is not even compiled
    jax.tree.map(np.testing.assert_array_equal, pool(jax.random.key(0)), params["pool"])
    assert np.abs(pool(jax.random.key(1))["out"]["kernel"] - params["pool"]["out"]["kernel"]).max() > 0


def test_parameter_table_of_the_paper():
    table = m3i.parameter_table(shapes(schema.Config(), 1000, 0))
    assert table == [("encoder", 85_645_824), ("decoder", 30_713_856), ("pool", 2_366_976), ("category", 769_000)]
    text = dict(m3i.parameter_table(shapes(schema.Config(), 0, 49_408)))
    assert list(text) == ["encoder", "decoder", "pool", "image_projection", "text", "logit_scale"]
    assert (text["image_projection"], text["text"], text["logit_scale"]) == (768 * 768, 123_650_304, 1)


def test_first_values_of_the_heads(params):
    assert float(params["logit_scale"]) == pytest.approx(2.6593, abs=1e-4)  # golden: ln(1 / 0.07)
    assert (
        np.abs(params["category"]["kernel"]).max() == pytest.approx(math.sqrt(6 / 105), rel=0.02)
        and not np.asarray(params["category"]["bias"]).any()
    )
    assert list(params["image_projection"]) == ["kernel"]
    assert np.std(params["image_projection"]["kernel"]) == pytest.approx(100**-0.5, rel=0.05)


def test_one_mixed_input_through_every_part(params):
    """bfloat16, all the way: shapes, precisions, finite numbers, and gradients that reach every part."""
    rng = np.random.default_rng(0)
    x, index = jnp.asarray(rng.normal(size=(2, 9, 48)), jnp.float32), jnp.array([[0, 3, 4, 8], [1, 2, 5, 7]])
    tokens, length = jnp.array([[9, 1, 10, 0, 0, 0], [9, 3, 4, 10, 0, 0]]), jnp.array([3, 4])

    def forward(params):
        z = m3i.encode(CONFIG, params["encoder"], x)
        own = jnp.take_along_axis(z[:, 1:], index[..., None], 1)
        out = {"z": z, "dense": m3i.decode(CONFIG, params, own, index, m3i.queries(CONFIG, params, positions.identity(3, 12)))}
        out["pooled"] = m3i.pool(CONFIG, params, own)
        out["logits"] = m3i.category_logits(CONFIG, params, out["pooled"])
        out["image"], out["text"] = m3i.image_embedding(CONFIG, params, out["pooled"]), m3i.text_embedding(CONFIG, params, tokens, length)
        total = jnp.square(out["dense"].astype(jnp.float32)).sum() + jnp.square(out["logits"]).sum()
        return total + (out["image"] * out["text"]).sum() * jnp.exp(params["logit_scale"]), out

    (_, out), grads = jit(jax.value_and_grad(forward, has_aux=True))(params)
    assert {name: (value.shape, value.dtype.name) for name, value in out.items()} == {
        "z": ((2, 10, 8), "bfloat16"), "dense": ((2, 9, 8), "bfloat16"), "pooled": ((2, 100), "bfloat16"),
        "logits": ((2, 5), "float32"), "image": ((2, 50), "float32"), "text": ((2, 50), "float32"),
    }  # fmt: skip
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves((out, grads)))
    silent = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
        if not np.asarray(leaf).any()
    }
    assert silent - {"pool/key/bias", "pool/norm_key/bias"} == {"encoder/patch_embed/kernel", "encoder/patch_embed/bias"}  # frozen

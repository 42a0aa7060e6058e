"""Attention by the kernel for TPUs against attention as the compiler makes it, which
tests/models/test_layers.py holds against float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import parallel
from m3i_jax.models import attention_tpu, initializers, layers, scan_blocks
from m3i_jax.profiling import flops
from tests.models.test_attention_gpu import kernels_that_run

WHERE = np.random.default_rng(1).random((8, 11)) < 0.6
WHERE[3] = False  # a row without any key


def gradients(dtype="float32", heads=4, width=128, where=None, rows=None, mesh=None):
    """(output, gradients) of one block, and the text of the program."""
    one = layers.block(width, heads, 2.0, dtype)
    params = jax.tree.map(
        lambda leaf: leaf[0], initializers.init_blocks(one, jax.random.key(0), width=width, depth=1)
    )
    r = np.random.default_rng(0)
    x, g = (jnp.asarray(r.normal(size=(8, 11, width)), dtype) for _ in range(2))

    def run(params, x):
        y, back = jax.vjp(
            lambda *a: one.apply({"params": a[0]}, a[1], None, where, rows), params, x
        )
        return y, *back(g if rows is None else g[:, rows])

    with jax.set_mesh(mesh or parallel.make_mesh((1, 1, 1), jax.devices()[:1])):
        traced = jax.jit(run).trace(
            params, jax.device_put(x, parallel.data_sharding(mesh)) if mesh else x
        )
        program = traced.lower().compile()
        found = program(params, jax.device_put(x, parallel.data_sharding(mesh)) if mesh else x)
    return found, str(traced.jaxpr), program.as_text()


def close(ours, theirs, tolerance):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-3))


SOME = slice(4, None)


@pytest.mark.parametrize(
    ("heads", "width", "where", "rows"),
    (
        pytest.param(4, 128, None, None, id="32"),
        pytest.param(4, 128, None, SOME, id="32-rows", marks=pytest.mark.slow),
        pytest.param(4, 128, WHERE, None, id="32-masked", marks=pytest.mark.slow),
        pytest.param(8, 384, None, None, id="48", marks=pytest.mark.slow),
        pytest.param(8, 384, WHERE, SOME, id="48-masked-rows"),
    ),
)
def test_value_and_gradients(monkeypatch: pytest.MonkeyPatch, heads, width, where, rows):
    wanted, text, _ = gradients(heads=heads, width=width, where=where, rows=rows)
    assert "pallas_call" not in text
    monkeypatch.setattr(parallel, "kernels", lambda rows: True)
    found, text, _ = gradients(heads=heads, width=width, where=where, rows=rows)
    assert text.count("pallas_call") == 2
    close(found, wanted, 1e-5)


def test_bfloat16(monkeypatch: pytest.MonkeyPatch):
    wanted, *_ = gradients("bfloat16")
    monkeypatch.setattr(parallel, "kernels", lambda rows: True)
    found, *_ = gradients("bfloat16")
    assert found[0].dtype == jnp.bfloat16
    close(found, wanted, 0.02)


def test_every_device_has_its_own_rows(monkeypatch: pytest.MonkeyPatch):
    wanted, *_ = gradients()
    monkeypatch.setattr(parallel, "kernels", lambda rows: True)
    for shape in ((8, 1, 1), (2, 4, 1)):
        found, _, program = gradients(mesh=parallel.make_mesh(shape))
        # with an fsdp axis weights are gathered
        assert shape[1] > 1 or (" all-gather" not in program and " all-to-all" not in program)
        close(found, wanted, 1e-5)


def test_stacks_and_what_they_keep(monkeypatch: pytest.MonkeyPatch):
    """The kernel in a scan, with everything but the named tensors computed again."""
    one = layers.block(128, 4, 2.0, "float32")
    params = initializers.init_blocks(one, jax.random.key(0), width=128, depth=2)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 128)), jnp.float32)
    loss = lambda params, remat, scan: jnp.square(
        scan_blocks.run_blocks(one, params, x, scan=scan, remat=remat)
    ).mean()
    wanted = jax.jit(jax.grad(loss), static_argnums=(1, 2))(params, "none", False)
    monkeypatch.setattr(parallel, "kernels", lambda rows: True)
    for remat, calls in (("names", 2), ("full", 3)):
        found = jax.jit(jax.grad(loss), static_argnums=(1, 2)).trace(params, remat, True)
        # what attention gives is kept by name
        assert kernels_that_run(found.jaxpr.jaxpr) == calls
        close(found.lower().compile()(params), wanted, 1e-5)


def test_the_product_that_is_made_again_is_not_the_models(monkeypatch: pytest.MonkeyPatch):
    one = layers.block(128, 4, 2.0, "float32")
    params = jax.tree.map(
        lambda leaf: leaf[0], initializers.init_blocks(one, jax.random.key(0), width=128, depth=1)
    )
    x = jnp.zeros((2, 11, 128))

    def gradient():  # a new function, or the trace of the last one would be taken
        return jax.grad(lambda params, x: one.apply({"params": params}, x).sum(), argnums=(0, 1))

    wanted = flops.count_flops(gradient(), params, x)
    monkeypatch.setattr(parallel, "kernels", lambda rows: True)
    assert flops.count_flops(gradient(), params, x) == wanted
    made = re.findall(r"CostEstimate\(flops=(\d+)", str(jax.make_jaxpr(gradient())(params, x)))
    assert len(made) == 2 and sum(map(int, made)) == 7 * 2 * 2 * 11 * 11 * 128


def test_what_it_takes():
    fits = attention_tpu.fits
    assert (
        fits(577, 577, 16, 64, jnp.bfloat16)
        and fits(77, 77, 8, 64, jnp.float32)
        and fits(1, 256, 16, 80, jnp.bfloat16)
    )
    assert not fits(1024, 1024, 16, 64, jnp.bfloat16)  # its scores do not fit
    # eight heads of 80 at once: 577 tokens are more than a v5e holds, 384 in float32 too
    assert fits(512, 512, 16, 80, jnp.bfloat16)
    assert not fits(577, 577, 16, 80, jnp.bfloat16) and not fits(384, 384, 16, 80, jnp.float32)
    assert not fits(197, 197, 3, 64, jnp.bfloat16)  # three heads of 64 are no whole lanes
    assert not fits(197, 197, 12, 64, jnp.float16)


@pytest.mark.slow
def test_tpus_compile_it(tpu_mesh):
    """Blocks of ViT-B's encoder and decoder and of the text tower, ViT-L at 384 pixels,
    InternImage-H's decoder, and the most tokens of ViT-H's heads: two kernels each."""
    data = parallel.data_sharding(tpu_mesh)
    masked = (False, False, True, False, False, False)
    for (tokens, width, heads), with_mask in zip(
        (
            (197, 768, 12),
            (294, 768, 16),
            (77, 512, 8),
            (577, 1024, 16),
            (216, 1024, 16),
            (512, 1280, 16),
        ),
        masked,
        strict=True,
    ):
        one = layers.block(width, heads, 4.0, "bfloat16")
        tree = jax.eval_shape(
            lambda key, one=one, width=width: initializers.init_blocks(
                one, key, width=width, depth=1
            ),
            jax.random.key(0),
        )
        params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape[1:], leaf.dtype, sharding=parallel.replicated(tpu_mesh)
            ),
            tree,
        )
        x = jax.ShapeDtypeStruct((8, tokens, width), jnp.bfloat16, sharding=data)
        where = jax.ShapeDtypeStruct((8, tokens), bool, sharding=data) if with_mask else None

        def run(params, x, where, one=one):
            return jax.grad(
                lambda *a: one.apply({"params": a[0]}, a[1], None, where).astype(jnp.float32).sum(),
                argnums=(0, 1),
            )(params, x)

        with jax.set_mesh(tpu_mesh):
            text = jax.jit(run).lower(params, x, where).compile().as_text()
        assert text.count('custom_call_target="tpu_custom_call"') == 2

"""Attention by the kernels for GPUs, interpreted, against attention as the compiler makes it, which
tests/models/test_attention.py holds against the formula."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import parallel, schema
from m3i_jax.models import (
    attention,
    attention_gpu,
    captioner,
    initializers,
    layers,
    scan_blocks,
)
from m3i_jax.profiling import flops

HEADS = 2
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch):
    """Attention takes the kernels of a GPU, which are interpreted."""
    monkeypatch.setattr(attention, "_is_gpu", lambda: True)


def both(arrays, where, g):
    """(output, gradients) by the kernels, and without."""

    def run(function, arrays):
        out, pull = jax.vjp(lambda *a: function(HEADS, a, where), *arrays)
        return out, pull(g.astype(out.dtype))

    wide = tuple(a.astype(jnp.float32) for a in arrays)
    found = jit(lambda *a: run(attention.attend_columns, a))(*arrays)
    wanted = jit(lambda *a: run(attention.attend_plainly, a))(*wide)
    return found, wanted


def close(found, wanted, tolerance):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-3))


def numbers(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize(
    ("shapes", "masked", "dtype", "tolerance"),
    (
        (((3, 70, 72),), True, "float32", 2e-6),  # tiles that are not full, heads of 12
        (((2, 9, 32), (2, 130, 64)), False, "float32", 2e-6),  # fewer queries; heads of 16
        (((2, 130, 32), (2, 9, 32), (2, 9, 32)), True, "bfloat16", 0.02),  # more queries
    ),
    ids=("one array", "two", "three, bfloat16"),
)
def test_value_and_gradients(shapes, masked, dtype, tolerance):
    arrays = tuple(numbers(i, *shape, dtype=dtype) for i, shape in enumerate(shapes))
    where = None
    if masked:
        where = np.random.default_rng(7).random((shapes[0][0], shapes[-1][1])) < 0.6
        where[0], where[1, :64] = False, False  # no key at all; none in the first tile
        where[1, -1] = True
        where = jnp.asarray(where)
    width = shapes[-1][2] // (4 - len(shapes))
    found, wanted = both(arrays, where, numbers(9, *shapes[0][:2], width))
    assert found[0].dtype == jnp.dtype(dtype)
    close(found, wanted, tolerance)


def test_large_logits_are_those_of_the_formula_and_what_is_no_number_stays():
    x = numbers(0, 2, 70, 96) * 30
    found, wanted = both((x,), None, numbers(1, 2, 70, 32))
    close(found, wanted, 2e-3)  # logits of 1,000 have 1e-4 of rounding
    found, _ = both((x.at[0, 68, 40].set(jnp.nan),), None, numbers(1, 2, 70, 32))
    assert np.isnan(found[0][0, :, 8:24]).any() and np.isfinite(found[0][1]).all()


def test_every_device_has_its_own_rows():
    mesh = parallel.make_mesh((2, 1, 1), jax.devices()[:2])
    x, g = numbers(0, 4, 5, 96), numbers(1, 4, 5, 32)
    run = lambda x: jax.vjp(lambda x: attention.attend_columns(HEADS, (x,), None), x)[1](g)
    with jax.set_mesh(mesh):
        program = jit(run).lower(jax.device_put(x, parallel.data_sharding(mesh))).compile()
        found = program(jax.device_put(x, parallel.data_sharding(mesh)))
    assert not re.search("all-(gather|to-all|reduce)", program.as_text())
    close(found, jit(run)(x), 1e-6)


def kernels_that_run(jaxpr):
    """Kernels of a program and of the loops in it of which something is used."""
    used = {id(v) for each in jaxpr.eqns for v in each.invars} | {id(v) for v in jaxpr.outvars}
    total = 0
    for each in jaxpr.eqns:
        if each.primitive.name == "pallas_call":
            total += any(id(v) in used for v in each.outvars)
        else:
            inner_jaxprs = jax.core.jaxprs_in_params(each.params)
            total += sum(kernels_that_run(inner) for inner in inner_jaxprs)
    return total


def test_what_a_stack_keeps_and_what_counts_as_work(monkeypatch):
    """In a scan with remat: the forward kernel runs again only where its result is not kept, and it
    is kept once; what the backward pass computes again is not the model's."""
    one = layers.block(64, 4, 2.0, "float32")
    params = initializers.init_blocks(one, jax.random.key(0), width=64, depth=2)
    x = numbers(0, 2, 5, 64)
    monkeypatch.setattr(parallel, "kernels", lambda rows, platforms=("tpu",): "gpu" in platforms)

    def gradient(remat):
        loss = lambda p: scan_blocks.run_blocks(one, p, x, scan=True, remat=remat).sum()
        return jax.make_jaxpr(jax.grad(loss))(params)

    names, full = gradient("names"), gradient("full")
    assert [kernels_that_run(closed.jaxpr) for closed in (names, full)] == [2, 3]
    [forward] = [e for e in names.jaxpr.eqns if e.primitive.name == "scan"][:1]
    kept = [v.aval.shape for v in forward.outvars if len(v.aval.shape) == 4]
    assert kept.count((2, 2, 5, 4)) == 1  # logarithms of the sums
    # the output of attention, and `middle` or the input of a block
    assert kept.count((2, 2, 5, 64)) == 3, kept
    attended = lambda x: attention.attend_columns(HEADS, (x,), None).sum()
    counted = flops.count_flops(jax.grad(attended), jnp.ones((2, 11, 96)))
    assert counted.total == 6 * 2 * 2 * 11 * 11 * 32


def test_first_values_of_a_captioner_try_no_kernel(monkeypatch):
    """Its shapes are those of one token, for which the kernel would be compiled and checked."""
    tried = []
    monkeypatch.setattr(parallel, "kernels", lambda rows, platforms=("tpu",): "gpu" in platforms)
    monkeypatch.setattr(parallel, "trusted", lambda call: bool(tried.append(call)))
    make = functools.partial(captioner.init, schema.Model(), vocabulary=9, length=6)
    jax.eval_shape(make, jax.random.key(0))
    assert not tried


def test_what_it_takes(monkeypatch):
    array = jax.ShapeDtypeStruct((6, 11, 96), jnp.dtype("bfloat16"))
    assert not attention.attention_kernel_fits(HEADS, (array,))
    monkeypatch.setattr(parallel.mesh, "platform", lambda: "cuda")
    with jax.set_mesh(parallel.make_mesh((1, 1, 1), jax.devices()[:1])):
        assert attention.attention_kernel_fits(HEADS, (array,))
    with jax.set_mesh(parallel.make_mesh((4, 1, 1), jax.devices()[:4])):
        assert not attention.attention_kernel_fits(HEADS, (array,))  # rows that do not divide
    large = jax.ShapeDtypeStruct((2**12, 4097, 384), jnp.dtype("bfloat16"))
    assert not attention_gpu.fits((large,), HEADS, 2**12)  # 32 bits do not index it
    assert attention_gpu.fits((large,), HEADS, 2**9)

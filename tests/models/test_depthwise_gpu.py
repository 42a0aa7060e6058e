"""The gradients of a depth-wise convolution's kernel on GPUs, interpreted, against autodiff of a
convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import parallel
from m3i_jax.models import depthwise_gpu, intern_image_layer
from m3i_jax.parallel import kernel_calls, kernel_checks


def maps(shape, dtype="float32"):
    r = np.random.default_rng(0)
    return tuple(jnp.asarray(r.normal(size=shape), dtype) for _ in range(2))


@pytest.mark.parametrize(
    ("shape", "side", "dtype", "programs"),
    (((2, 3, 5, 8), 5, "bfloat16", 1024), ((5, 4, 7, 130), 3, "float32", 5)),
    ids=("an image a program", "two images, two tiles of channels"),
)
def test_gradients_are_those_of_a_convolution(monkeypatch, shape, side, dtype, programs):
    monkeypatch.setattr(depthwise_gpu, "_PROGRAMS", programs)
    x, g = maps(shape, dtype)
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(side, side, shape[-1])), "float32")
    bias = jnp.zeros(shape[-1])

    def convolved(kernel, bias):
        wide, g_wide = x.astype("float32"), g.astype("float32")
        return (intern_image_layer._convolved(wide, kernel, bias) * g_wide).sum()

    wanted = jax.jit(jax.grad(convolved, (0, 1)))(kernel, bias)
    monkeypatch.setattr(parallel, "kernels", lambda rows, platforms=("tpu",): "gpu" in platforms)
    monkeypatch.setattr(parallel, "trusted", lambda call: True)
    dx, *found = jax.jit(lambda x, g: jax.vjp(intern_image_layer.depthwise, x, kernel, bias)[1](g))(
        x, g
    )
    assert dx.dtype == x.dtype
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6 * np.abs(theirs).max())


def test_every_device_sums_its_rows_and_all_are_added(monkeypatch):
    x, g = maps((4, 3, 4, 8))
    wanted = jax.jit(lambda: depthwise_gpu.kernel_gradient(x, g, 3))()
    mesh = parallel.make_mesh((2, 1, 1), jax.devices()[:2])
    with jax.set_mesh(mesh):
        rows = [jax.device_put(each, parallel.data_sharding(mesh)) for each in (x, g)]
        found = jax.jit(lambda x, g: depthwise_gpu.kernel_gradient(x, g, 3))(*rows)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_it_is_checked_and_only_on_gpus(monkeypatch):
    x = jax.ShapeDtypeStruct((4, 3, 4, 8), jnp.dtype("bfloat16"))
    assert not depthwise_gpu.is_trusted(x, 3)
    monkeypatch.setattr(parallel.mesh, "platform", lambda: "cuda")
    mesh = parallel.make_mesh((2, 1, 1), jax.devices()[:2])
    with jax.set_mesh(mesh), kernel_calls.noted_calls():
        assert depthwise_gpu.is_trusted(x, 3) and not depthwise_gpu.is_trusted(x, 7)
    [call] = kernel_calls.take_pending()
    assert (call.name, call.shapes) == ("depthwise", "2x3x4x8 bfloat16, 2x3x4x8 bfloat16")
    result = kernel_checks.check_call(call)
    assert not result.reason and result.error < 1e-5
    wrong = call._replace(static=3, plain=lambda side, x, g: 1.01 * call.plain(side, x, g))
    assert "outputs are wrong" in kernel_checks.check_call(wrong).reason

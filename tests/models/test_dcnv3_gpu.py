"""The kernels of sums of samples for GPUs: values and gradients, interpreted, and what compiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import parallel
from m3i_jax.models import dcnv3, dcnv3_gpu
from m3i_jax.models.dcnv3_dense import Samples
from m3i_jax.models.sampled_sums import gathered_sum
from tests.models.test_dcnv3 import inputs


@functools.partial(jax.jit, static_argnums=(3, 4))
def both(x, at, ct, size, ours):
    """The sum and its gradients, by the kernels or by gathers."""
    if not ours:
        y, pull = jax.vjp(lambda x, at: gathered_sum(x, at, size), x, at)
        return y, *pull(ct)
    y = dcnv3_gpu.forward(x, at, size, interpret=True)
    return y, *dcnv3_gpu.backward(x, at, ct, size, interpret=True)


def call(size, groups, depth, points, outputs, spread, *, batch=1, dtype="float32"):
    """A map, samples around the cells in their order, some of them at integers, and cotangents."""
    r, (height, width) = np.random.default_rng(3), size
    shape = batch, groups, points, outputs
    places = np.divmod(np.arange(outputs) % (height * width), width)
    y, x = (p + spread * r.normal(size=shape) for p in places)
    y.flat[::7], x.flat[::5] = np.round(y.flat[::7]), np.round(x.flat[::5])
    numbers = lambda *s: jnp.asarray(r.normal(size=s), dtype)
    at = Samples(*(jnp.asarray(a, "float32") for a in (y, x, r.uniform(size=shape))))
    channels = groups * depth
    return numbers(batch, height * width, channels), at, numbers(batch, outputs, channels)


def compare(arrays, size, atol):
    found, wanted = (both(*arrays, size, ours) for ours in (True, False))
    for ours, theirs in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        ours, theirs = (np.asarray(a, "float32") for a in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol * np.abs(theirs).max())


@pytest.mark.parametrize(
    ("size", "groups", "depth", "points", "outputs", "spread", "batch"),
    (
        ((9, 13), 2, 8, 3, 117, 1.0, 2),  # tiles that are not full, of cells and of outputs
        ((3, 100), 1, 24, 2, 300, 4.0, 1),  # tiles within a row; channels that are no power of two
        pytest.param(  # most samples outside the map, and fewer outputs
            *((12, 12), 1, 16, 2, 70, 30.0, 1), marks=pytest.mark.slow
        ),
    ),
    ids=str,
)
def test_sums_and_gradients_are_those_of_gathers(
    size, groups, depth, points, outputs, spread, batch
):
    compare(call(size, groups, depth, points, outputs, spread, batch=batch), size, 1e-6)


def test_bfloat16():
    compare(call((8, 8), 2, 16, 4, 64, 1.0, dtype="bfloat16"), (8, 8), 2**-6)


@pytest.mark.parametrize("wrong", (np.nan, np.inf, -1e30), ids=str)
def test_a_coordinate_that_is_no_number_is_seen_and_a_distant_one_reads_zeros(wrong):
    size = (9, 13)
    x, at, ct = call(size, 1, 8, 2, 117, 1.0)
    at = at._replace(y=at.y.at[0, 0, 1, 80].set(wrong))
    y, dx, _ = both(x, at, ct, size, True)
    if np.isnan(wrong):
        assert np.isnan(y[0, 80]).all() and np.isfinite(np.delete(np.asarray(y), 80, 1)).all()
        assert np.isnan(dx).any()
    else:
        compare((x, at, ct), size, 1e-6)


def test_tiles_of_outputs_that_touch_no_cell_of_a_tile_are_left_out():
    """Ten rows of 64 cells, each a tile of cells and of outputs, read one row down."""
    sizes = dcnv3_gpu._Sizes(10, 64, 1, 1, 640, 16)
    rows, columns = np.divmod(np.arange(640.0), 64)
    at = Samples(
        *(jnp.asarray(a, "float32")[None, None, None] for a in (rows + 1.5, columns, rows))
    )
    spans, first, last = dcnv3_gpu._spans(at, sizes)
    assert spans[0, 3].tolist() == [4, 5, 0, 64]
    # row 5 is read from rows 3 and 4, and row 0 from none
    assert (int(first[0, 5]), int(last[0, 5])) == (3, 5)
    assert int(first[0, 0]) >= int(last[0, 0])


def test_auto_takes_it_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    def text(batch=8, dtype="float32"):
        arrays = [jnp.asarray(a, dtype) for a in inputs((8, 8), batch=batch)[:3]]
        with jax.set_mesh(parallel.make_mesh((8, 1, 1))):
            return str(jax.make_jaxpr(lambda *a: dcnv3.dcnv3(*a, groups=2))(*arrays))

    assert "pallas_call" not in text()
    monkeypatch.setattr(parallel.mesh, "platform", lambda: "gpu")
    monkeypatch.setattr(parallel, "platform", lambda: "gpu")
    assert "pallas_call" in text() and "interpret=False" in text()
    assert "pallas_call" not in text(dtype="float16")
    assert "pallas_call" not in text(batch=6)  # does not divide among eight devices
    monkeypatch.setenv("M3I_JAX_KERNELS", "0")
    assert "pallas_call" not in text()


def test_arrays_that_32_bits_do_not_index_are_not_taken():
    assert dcnv3_gpu.fits((1000, 1000), 320, 9, 10**6, 6, jnp.bfloat16)
    assert not dcnv3_gpu.fits((1000, 1000), 320, 9, 10**6, 7, jnp.bfloat16)


def test_the_grid_has_one_axis():
    """CUDA's second axis ends at 65,535; here are 70,000 groups."""
    x, at, _ = call((2, 2), 35, 1, 1, 4, 1.0)
    many = lambda a: jax.ShapeDtypeStruct((2000, *a.shape[1:]), a.dtype)
    x, at = many(x), Samples(*map(many, at))
    ct = jax.ShapeDtypeStruct((2000, 4, 35), x.dtype)
    text = str(jax.make_jaxpr(lambda *a: dcnv3_gpu.forward(*a, (2, 2)))(x, at))
    text += str(jax.make_jaxpr(lambda *a: dcnv3_gpu.backward(*a, (2, 2)))(x, at, ct))
    assert text.count("grid=(70000,)") == 3 == text.count("pallas_call[")

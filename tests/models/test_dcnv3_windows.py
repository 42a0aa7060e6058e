"""The kernel for maps that VMEM cannot hold, with blocks, chunks and windows of a few cells so that
small maps have many of each. Compared with gathers, which test_dcnv3.py compares with loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import parallel
from m3i_jax.models import dcnv3, dcnv3_tpu, dcnv3_window_plan, dcnv3_windows, sampled_sums
from m3i_jax.models.dcnv3_dense import Samples
from m3i_jax.models.dense.deformable_attention import deformable_attention
from m3i_jax.profiling import hbm_traffic, hlo
from tests.models.test_dcnv3 import inputs, jit


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch):
    """Every map is too large for the other kernel, and has several chunks."""
    plan = dcnv3_window_plan.plan_windows

    def smaller(size, out, columns, *rest):
        block = (4, 32) if columns else (1, 128)
        return plan(size, out, columns, *rest)._replace(
            block=block, chunk=(min(size[0], 5), 32), window=(2, 16)
        )

    monkeypatch.setattr(dcnv3_tpu, "fits", lambda *a: False)
    monkeypatch.setattr(dcnv3_window_plan, "plan_windows", smaller)


def both(run, *arrays_and_ct):
    """Value and gradients of the kernel and of gathers."""

    def of(method, arrays, ct):
        y, back = jax.vjp(lambda *a: run(*a, method), *arrays)
        return y, *back(ct)

    *arrays, ct = arrays_and_ct
    program = jit(lambda arrays, ct: [of(m, arrays, ct) for m in ("kernel", "gather")])
    return program(arrays, ct)


def check(pair, names):
    for name, ours, theirs in zip(names, *pair, strict=True):
        assert ours.shape == theirs.shape
        scale = max(np.abs(np.asarray(theirs)).max(), 1e-3)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * scale, err_msg=name)


def test_it_equals_gathers_on_maps_of_several_blocks_chunks_and_windows(small):
    """Two images of 9 x 43 cells, no multiple of anything; six groups of 32 are two blocks of
    lanes, the second half full; some offsets leave the map, some by far, some are integers."""
    *arrays, ct = inputs((9, 43), groups=6, width=32, kernel=2)
    arrays[1][:, :, :, 0, 0] = 0
    arrays[1][0, 3, 7, 1] = np.array([1e30, -1e30])
    run = lambda x, offset, mask, method: dcnv3.dcnv3(
        x, offset, mask, kernel=2, groups=6, method=method
    )
    pair = both(run, *arrays, ct)
    at_kinks = np.zeros(arrays[1].shape, bool)
    at_kinks[:, :, :, 0, 0] = True
    pair = [[y, dx, jnp.where(at_kinks, 0, doffset), dmask] for y, dx, doffset, dmask in pair]
    check(pair, ("y", "dx", "doffset", "dmask"))


def test_deformable_attention_reads_large_maps_through_it(small):
    """200 queries in no order, of which the second block is not full, in a map of 12 x 50 cells."""
    rng = np.random.default_rng(0)
    arrays = (
        rng.normal(size=(1, 600, 2, 8)),
        rng.uniform(-0.2, 1.2, (1, 200, 2, 1, 3, 2)),
        rng.uniform(size=(1, 200, 2, 1, 3)),
        rng.normal(size=(1, 200, 16)),
    )
    run = lambda *a: deformable_attention(a[0], ((12, 50),), *a[1:3], method=a[3])
    pair = both(run, *(jnp.asarray(a, jnp.float32) for a in arrays))
    check(pair, ("y", "dvalue", "dlocations", "dweights"))


def test_a_nan_reaches_the_output():
    plan = dcnv3_window_plan.plan_windows((4, 40), 128, 0, 1, 8, 1, "float32")
    y = np.full((1, 1, 1, 128), 30.0, np.float32)  # outside
    y[..., 5] = np.nan
    at = Samples(jnp.asarray(y), jnp.full(y.shape, -7.0), jnp.ones(y.shape))
    run = jit(lambda at: dcnv3_windows.forward(jnp.ones((1, 160, 8)), at, plan, interpret=True))
    found = np.asarray(run(at))
    assert np.isnan(found[0, 5]).all() and not np.delete(found, 5, 1).any()


def test_what_is_supported_has_a_plan():
    """Of groups that fill the fast memory, the windows of outputs without an order do not fit,
    which are wider than those of a map."""
    wide = 20, 96, 9, jnp.bfloat16
    assert dcnv3_window_plan.plan_windows((200, 300), 200 * 300, 300, *wide)
    assert dcnv3_window_plan.supports(*wide)
    assert dcnv3_window_plan.plan_windows((200, 300), 900, 0, *wide) is None
    assert not dcnv3_window_plan.supports(*wide, is_map=False)
    x = jax.ShapeDtypeStruct((1, 200 * 300, 20 * 96), jnp.bfloat16)
    mesh = parallel.make_mesh((1, 1, 1), jax.devices()[:1])
    with parallel.assumed_platform("tpu"), jax.set_mesh(mesh):
        assert not sampled_sums.kernel_fits(x, (200, 300), 20, 9, 900)
        assert sampled_sums.kernel_fits(x, (200, 300), 20, 9, 60_000, is_map=True)


def test_chunks_are_larger_than_what_a_block_reads_and_fit():
    """At the maps of InternImage-H at 1,216 x 2,016 pixels, of DINO's attention, of 7 groups."""
    for size, columns, groups, depth, points in (
        ((304, 504), 504, 10, 32, 9),
        ((76, 126), 126, 40, 32, 9),
        ((152, 252), 0, 8, 32, 4),
        ((304, 504), 504, 7, 16, 9),
    ):
        for dtype in ("bfloat16", "float32"):
            plan = dcnv3_window_plan.plan_windows(
                size, size[0] * size[1], columns, groups, depth, points, dtype
            )
            assert plan.bytes(points, jnp.dtype(dtype).itemsize) < 12 * 2**20
            if columns:
                assert np.all(np.subtract(plan.chunk, plan.block) >= (8, 2 + 15)), plan
            else:
                assert plan.chunk[0] * plan.chunk[1] > 2 * plan.block[1]


@pytest.mark.slow
def test_tpus_compile_it(tpu_mesh, monkeypatch: pytest.MonkeyPatch):
    """One kernel forward, one backward, and no matrix of weights beside them: a small multiple
    of the bytes of arguments and results is moved."""
    monkeypatch.setattr(parallel, "platform", lambda: "tpu")
    device = jax.sharding.SingleDeviceSharding(tpu_mesh.devices.flat[0])
    where = 1, 76, 126
    x, offset, mask = (
        jax.ShapeDtypeStruct((*where, 40 * n), "bfloat16", sharding=device) for n in (32, 18, 9)
    )

    def run(x, offset, mask, ct):
        y, back = jax.vjp(lambda *a: dcnv3.dcnv3(*a, groups=40, method="kernel"), x, offset, mask)
        return y, *back(ct)

    text = jax.jit(run).lower(x, offset, mask, x).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    least = 2 * 2 * sum(a.size for a in (x, offset, mask, x))
    assert hbm_traffic.hbm_traffic(hlo.parse_hlo(text)) < 15 * least

"""The kernel of DCNv3. What it alone has; the rest is in test_dcnv3.py: blocks of lanes, tiles,
devices, TPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import parallel
from m3i_jax.models import dcnv3, dcnv3_tpu, dcnv3_window_plan
from tests.models.test_dcnv3 import compare, inputs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "groups", "width"), (((18, 16), 8, 32), ((3, 130), 3, 8)), ids=str
)
def test_blocks_of_lanes_and_tiles_of_outputs(size, groups, width):
    """Eight groups of 32 are two blocks of lanes; 288 and 390 outputs are tiles, the last not full;
    rows of 130 are a window each."""
    compare(inputs(size, groups=groups, width=width, batch=1), methods=("kernel",), groups=groups)


def test_windows_that_no_sample_touches_are_left_out():
    shape = dcnv3_tpu._shape((48, 48), 32)
    assert (shape.rows, shape.cells, shape.padded) == (2, 96, False)
    for rows, wanted in (
        ((10.2, 13.9), (5, 8)),
        ((-7.0, -3.0), (0, 1)),
        ((90.0, 1e30), (23, 24)),
        ((np.nan, 3.0), (0, 3)),
    ):
        low, high = dcnv3_tpu._windows(jnp.asarray([rows]), shape)
        assert (int(low), int(high)) == wanted, rows


@pytest.mark.parametrize(
    "shape", (pytest.param((8, 1, 1), marks=pytest.mark.slow), (2, 4, 1)), ids=str
)
def test_every_device_has_its_own_rows(shape):
    *arrays, ct = inputs((5, 6), batch=8)

    def run(*arrays):
        y, back = jax.vjp(lambda *a: dcnv3.dcnv3(*a, groups=2, method="kernel"), *arrays)
        return y, *back(ct)

    wanted = jax.jit(run)(*arrays)
    mesh = parallel.make_mesh(shape)
    with jax.set_mesh(mesh):
        program = (
            jax.jit(run).lower(*jax.device_put(arrays, parallel.data_sharding(mesh))).compile()
        )
        found = program(*jax.device_put(arrays, parallel.data_sharding(mesh)))
    for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert f" {name}" not in program.as_text(), name
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_auto_takes_it_on_a_tpu_where_devices_have_rows_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
):
    def taken(batch=8, side=8, dtype="float32", mesh=None):
        arrays = [jnp.asarray(a, dtype) for a in inputs((side, side), batch=batch)[:3]]
        with jax.set_mesh(mesh or parallel.make_mesh((8, 1, 1))):
            return "pallas_call" in str(
                jax.make_jaxpr(lambda *a: dcnv3.dcnv3(*a, groups=2))(*arrays)
            )

    assert not taken()  # here are processors
    monkeypatch.setattr(parallel.mesh, "platform", lambda: "tpu")
    assert taken() and taken(dtype="bfloat16")
    assert not taken(dtype="float16")
    assert not taken(batch=6)  # does not divide among eight devices
    assert not taken(mesh=parallel.make_mesh((4, 1, 2)))  # the partitioner divides channels
    monkeypatch.setattr(dcnv3_tpu, "_BYTES", 300_000)
    assert taken() and taken(side=16)  # a map too large for this kernel gets `dcnv3_windows`
    monkeypatch.setattr(dcnv3_window_plan, "_BYTES", 0)
    assert taken() and not taken(side=16)
    monkeypatch.setenv("M3I_JAX_KERNELS", "0")
    assert not taken()


@pytest.mark.slow
def test_tpus_compile_it(tpu_mesh):
    """At the maps of InternImage-H, and of T in float32: one kernel forward, one backward, and no
    gather or scatter beside them."""
    data = parallel.data_sharding(tpu_mesh)
    for side, groups, width, dtype in (
        (48, 10, 32, "bfloat16"),
        (12, 40, 32, "bfloat16"),
        (6, 80, 32, "bfloat16"),
        (56, 4, 16, "float32"),
    ):
        where = 4, side, side, groups
        shapes = (
            (*where[:3], groups * width),
            (*where, 9, 2),
            (*where, 9),
            (*where[:3], groups * width),
        )
        arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=data) for shape in shapes]

        def run(x, offset, mask, ct, groups=groups):
            y, back = jax.vjp(lambda *a: dcnv3.dcnv3(*a, groups=groups), x, offset, mask)
            return y, back(ct)

        with jax.set_mesh(tpu_mesh):
            text = jax.jit(run).lower(*arrays).compile().as_text()
        assert text.count('custom_call_target="tpu_custom_call"') == 2
        assert " gather(" not in text and " scatter(" not in text

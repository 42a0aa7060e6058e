"""The mesh of devices, the sharding of data, and the hint that does nothing outside a mesh."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from m3i_jax import parallel
from m3i_jax.errors import UserError


@pytest.mark.parametrize(
    ("shape", "devices", "wanted"),
    [
        ((-1, 1, 1), 8, (8, 1, 1)),
        ((1, -1, 1), 8, (1, 8, 1)),
        ((2, -1, 2), 8, (2, 2, 2)),
        ((4, 1, -1), 8, (4, 1, 2)),
        ((2, 2, 2), 8, (2, 2, 2)),
        ((8, 1, -1), 8, (8, 1, 1)),
        ((-1, 1, 1), 1, (1, 1, 1)),
        ((-1, 3, 1), 6, (2, 3, 1)),
    ],
)
def test_shapes(shape: tuple[int, int, int], devices: int, wanted: tuple[int, int, int]) -> None:
    mesh = parallel.make_mesh(shape, jax.devices()[:devices])
    assert dict(mesh.shape) == dict(zip(("replica", "fsdp", "tensor"), wanted, strict=True))
    assert {d.id for d in mesh.devices.flat} == set(range(devices))


def test_devices_of_several_hosts_share_no_rows() -> None:
    """jax would take the rows of each host for all there are, and train on half of the batch."""
    two_hosts = [types.SimpleNamespace(process_index=n // 4) for n in range(8)]
    for shape in ((8, 1, 1), (1, 8, 1), (2, 1, 4), (2, 2, 2)):
        parallel.check_host_rows(
            types.SimpleNamespace(devices=np.reshape(two_hosts, shape), shape={"tensor": shape[2]})
        )
    with pytest.raises(UserError, match="config.parallel.mesh: a tensor axis of 8 spans 2 hosts"):
        parallel.check_host_rows(
            types.SimpleNamespace(devices=np.reshape(two_hosts, (1, 1, 8)), shape={"tensor": 8})
        )


def test_axis_types_are_stated() -> None:
    """The default of jax.make_mesh is Explicit, under which a sharding constraint is an
    assertion."""
    assert parallel.make_mesh((2, 2, 2)).axis_types == (AxisType.Auto,) * 3
    assert parallel.make_mesh((-1, 1, 1)).size == jax.device_count() == 8


@pytest.mark.parametrize("shape", [(3, 1, 1), (3, -1, 1), (16, -1, 1), (1, 1, 1), (2, 2, 4)])
def test_a_shape_that_does_not_fit_names_key_value_and_way_out(shape: tuple[int, int, int]) -> None:
    with pytest.raises(UserError) as error:
        parallel.make_mesh(shape)
    text = str(error.value)
    assert (
        text.startswith(f"config.parallel.mesh: {shape} ")
        and "8 devices" in text
        and "(-1,1,1)" in text
        and "\n" not in text
    )


def test_rows_are_split_over_replica_and_fsdp() -> None:
    mesh = parallel.make_mesh((2, 2, 2))
    assert parallel.data_sharding(mesh) == NamedSharding(mesh, PartitionSpec(("replica", "fsdp")))
    assert parallel.data_sharding(mesh).shard_shape((8, 3)) == (2, 3)
    assert parallel.replicated(mesh).is_fully_replicated


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_to_global_keeps_content_types_and_order(shape: tuple[int, int, int]) -> None:
    mesh, r = parallel.make_mesh(shape), np.random.default_rng(0)
    batch = {
        "views": r.integers(0, 256, (16, 2, 3)).astype(np.uint8),
        "label": np.arange(16, dtype=np.int32),
        "flip": r.random((16, 2)) < 0.5,
    }
    out = parallel.to_global(mesh, batch)
    assert list(out) == list(batch)
    shards = shape[0] * shape[1]
    for name, rows in batch.items():
        assert out[name].dtype == rows.dtype
        np.testing.assert_array_equal(out[name], rows)
        assert out[name].sharding == parallel.data_sharding(mesh)
    # consecutive rows lie together, so that partners 2k and 2k + 1 are on one device
    pieces = {
        s.index[0].start or 0: np.asarray(s.data).tolist() for s in out["label"].addressable_shards
    }
    assert pieces == {i: list(range(i, i + 16 // shards)) for i in range(0, 16, 16 // shards)}


def test_hint_outside_a_mesh_is_nothing() -> None:
    x = jnp.ones((8, 4))
    assert parallel.hint(x, parallel.DATA) is x
    program = jax.make_jaxpr(lambda x: parallel.hint(x, parallel.DATA))(x)
    assert not program.eqns


def test_hint_in_a_mesh_of_other_axes_is_nothing() -> None:
    x = jnp.ones((8, 4))
    with jax.set_mesh(jax.make_mesh((8,), ("other",), axis_types=(AxisType.Auto,))):
        assert not jax.make_jaxpr(lambda x: parallel.hint(x, parallel.DATA))(x).eqns


def test_hint_in_a_mesh_constrains() -> None:
    mesh = parallel.make_mesh((2, 2, 2))
    x = jax.device_put(jnp.arange(32.0).reshape(8, 4), parallel.replicated(mesh))
    with jax.set_mesh(mesh):
        rows = jax.jit(lambda x: parallel.hint(x * 1, parallel.DATA))(x)
        columns = jax.jit(lambda x: parallel.hint(x * 1, None, "tensor"))(x)
    assert rows.sharding.shard_shape(rows.shape) == (2, 4)
    assert columns.sharding.shard_shape(rows.shape) == (8, 2)
    np.testing.assert_array_equal(rows, x)
    np.testing.assert_array_equal(columns, x)

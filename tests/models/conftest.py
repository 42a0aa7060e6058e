"""Chips that are not here, for what only a TPU's compiler can say."""

import importlib.util

import jax
import pytest

from m3i_jax import parallel
from m3i_jax.profiling import topology


@pytest.fixture(params=("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"))
def tpu_mesh(request: pytest.FixtureRequest) -> jax.sharding.Mesh:
    """Four chips of a kind, as replicas."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu")
    return parallel.make_mesh(
        (-1, 1, 1), topology.topology_devices(topology.parse_topology(request.param))
    )

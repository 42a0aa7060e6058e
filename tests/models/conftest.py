"""Chips that are not here, for what only a TPU's compiler can say."""

import importlib.util

import jax
import pytest

from m3i_jax import parallel
from m3i_jax.parallel.chips import CHIPS
from m3i_jax.profiling import topology

TPUS = [kind for kind, chip in CHIPS.items() if chip.platform == "tpu" and kind != "tpu7x"]


@pytest.fixture(params=TPUS)
def tpu_mesh(request: pytest.FixtureRequest) -> jax.sharding.Mesh:
    """Four chips of a kind, as replicas."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu")
    sides = "x".join(map(str, topology.slice_shape(request.param, 4)))
    four = topology.parse_topology(f"{request.param}:{sides}")
    return parallel.make_mesh((-1, 1, 1), topology.topology_devices(four))

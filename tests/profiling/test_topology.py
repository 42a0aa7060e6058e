"""Names of slices: what they mean, and one line for those that mean nothing."""

import importlib.util
import pathlib
import re

import pytest

from m3i_jax.errors import UserError
from m3i_jax.profiling import topology


@pytest.mark.parametrize(
    ("name", "devices", "platform"),
    [
        ("v5e:4x4", 16, "tpu"),
        ("v5e:1x1", 1, "tpu"),
        ("v5p:4x4x4", 64, "tpu"),
        ("v6e:16x16", 256, "tpu"),
        ("tpu7x:2x2x1", 8, "tpu"),
        ("h100:8", 8, "cuda"),
        ("h100:64", 64, "cuda"),
        ("cpu:8", 8, "cpu"),
    ],
)
def test_names(name: str, devices: int, platform: str) -> None:
    read = topology.parse_topology(name)
    assert (read.devices, read.family.platform, read.family.host) == (
        devices,
        platform,
        8 if platform == "cuda" else 0,
    )


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("v5litepod-1", "v5e:1x1"),
        ("v5litepod-4", "v5e:2x2"),
        ("v5litepod-8", "v5e:2x4"),
        ("v5litepod-16", "v5e:4x4"),
        ("v5litepod-32", "v5e:4x8"),
        ("v5litepod-256", "v5e:16x16"),
        ("v6e-8", "v6e:2x4"),
        ("v6e-128", "v6e:8x16"),
        ("v4-8", "v4:2x2x1"),
        ("v4-32", "v4:2x2x4"),
        ("v4-64", "v4:2x4x4"),
        ("v5p-8", "v5p:2x2x1"),
        ("v5p-16", "v5p:2x2x2"),
        ("v5p-128", "v5p:4x4x4"),
        ("v5p-256", "v5p:4x4x8"),
        ("v5p-2048", "v5p:8x8x16"),
        ("v5p-8192", "v5p:16x16x16"),
    ],
)
def test_accelerator_types_of_google_cloud(name: str, same: str) -> None:
    """The shapes are those of Cloud's tables; of v4 and v5p the number counts TensorCores."""
    one, other = topology.parse_topology(name), topology.parse_topology(same)
    assert (one.kind, one.shape, one.devices) == (
        other.kind,
        other.shape,
        other.devices,
    ) and one.name == name


@pytest.mark.parametrize("script", ["launch/tpu_vm.sh", "launch/README.md"])
def test_the_types_that_our_launcher_is_shown_with_are_known(script: str) -> None:
    types = set(
        re.findall(
            r"--type ([a-z]\S+)", (pathlib.Path(__file__).parent.parent.parent / script).read_text()
        )
    )
    assert types and all(topology.parse_topology(name).family.platform == "tpu" for name in types)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("v5litepod-12", "give its sides, such as v5e:4x4"),
        ("v5litepod-2", "give its sides"),
        ("v5litepod-512", "give its sides"),
        ("v5p-12", "give its sides, such as v5p:4x4x4"),
        ("v4-4", "give its sides"),
        ("v4-0", "give its sides"),
        ("v5litepod", "there is no such topology"),
        ("", "is missing"),
        ("v5ee:4x4", "did you mean v5e:4x4?"),
        ("v5e-16", "did you mean v5e:4x4?"),
        ("H100:8", "did you mean h100:8?"),
        ("abacus", "known are v4, v5e"),
        ("v5e", "2 sides joined by x after the colon, such as v5e:4x4"),
        ("v5e:16", "such as v5e:4x4"),
        ("v5p:4x4", "3 sides"),
        ("v5e:0x4", "such as v5e:4x4"),
        ("h100:2x4", "the number of devices"),
        ("h100:12", "use a multiple of 8"),
        ("cpu:", "the number of devices"),
    ],
)
def test_a_name_that_is_none_says_what_is(name: str, wanted: str) -> None:
    with pytest.raises(UserError, match=r"^--topology") as error:
        topology.parse_topology(name)
    assert wanted in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "extra"), [("v5e:4x4", "m3i-jax[tpu]"), ("h100:8", "m3i-jax[cuda]")]
)
def test_without_the_compiler_the_extra_is_named(name: str, extra: str, monkeypatch) -> None:
    monkeypatch.setattr(topology, "_installed", lambda library: False)
    with pytest.raises(UserError) as error:
        topology.topology_devices(topology.parse_topology(name))
    assert extra in str(error.value) and "cpu:" in str(error.value)


def test_what_is_installed() -> None:
    assert (
        topology._installed("jax")
        and not topology._installed("no_such_package.inside")
        and not topology._installed("jax.no_such_module")
    )


def test_devices_of_this_host() -> None:
    found = topology.topology_devices(topology.parse_topology("cpu:4"))
    assert len(found) == 4 and {d.platform for d in found} == {"cpu"}
    with pytest.raises(UserError, match="start a new one"):  # jax runs already, with eight
        topology.topology_devices(topology.parse_topology("cpu:512"))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize(
    "name", ["v4:2x2x1", "v5e:1x1", "v5e:4x4", "v5p:4x4x4", "v6e:2x4", "tpu7x:2x2x1"]
)
def test_libtpu_knows_the_names(name: str) -> None:
    read = topology.parse_topology(name)
    found = topology.topology_devices(read)
    assert len(found) == read.devices and found[0].platform == "tpu"


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_slice_that_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="does not know it"):
        topology.topology_devices(topology.parse_topology("v5e:3x3"))

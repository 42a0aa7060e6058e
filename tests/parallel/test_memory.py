"""The memory that a process can still allocate."""

import math
import pathlib

import pytest

from m3i_jax.parallel import memory

MIB = 2**20


@pytest.mark.parametrize(
    ("limits", "wanted"),
    [
        ({}, 1000),
        ({"": ("max", 7, 0)}, 1000),
        ({"": (str(400 * MIB), 300, 50)}, 150),  # the group of a container is the root there
        ({"job": (str(400 * MIB), 300, 0), "job/step": ("max", 10, 0)}, 100),
        ({"job": (str(400 * MIB), 100, 0), "job/step": (str(200 * MIB), 10, 0)}, 190),
        ({"other": (str(4 * MIB), 0, 0)}, 1000),
        ({"": (str(4 * MIB), 8, 0)}, 0),
    ],
)
def test_the_limit_of_a_container_or_job_counts(
    tmp_path: pathlib.Path, limits: dict[str, tuple[str, int, int]], wanted: int
) -> None:
    """MiB, beside 64 of swap."""
    info, own, groups = tmp_path / "meminfo", tmp_path / "self", tmp_path / "groups"
    info.write_text(f"MemAvailable: {1000 * 1024} kB\nSwapFree: {64 * 1024} kB\n")
    own.write_text(f"1:name=systemd:/\n0::/{max(limits, key=len, default='')}\n")
    if "other" in limits:
        own.write_text("0::/mine\n")
    for name, (most, used, dropped) in limits.items():
        (groups / name).mkdir(parents=True, exist_ok=True)
        (groups / name / "memory.max").write_text(f"{most}\n")
        (groups / name / "memory.current").write_text(f"{used * MIB}\n")
        half = dropped * MIB // 2
        stat = f"anon 5\ninactive_file {half}\nactive_file {half}\nslab 9\n"
        (groups / name / "memory.stat").write_text(stat)
    assert memory.free_memory(info, groups, own) == (wanted + 64) * MIB
    if wanted == 1000:
        assert memory.free_memory(tmp_path / "absent", groups, own) == math.inf

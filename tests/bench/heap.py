"""The malloc configuration of processes that are measured on a CPU; the same as launch/ sets.

Without it, page faults of freed and mapped buffers take a tenth of the time of every contestant,
with large variation. With one arena for all threads, an earlier setting here, threads wait for each
other and search the fragments that compilation left, a sixth of a step's processor time.
"""

import pathlib
import subprocess

_SCRIPT = '. "$1"; keep_heap; env -0'
_LAUNCH = pathlib.Path(__file__).parents[2] / "launch" / "environment.sh"


def kept() -> dict[str, str]:
    """Environment variables of the configuration; variables that are already set are kept."""
    output = subprocess.run(
        ["bash", "-c", _SCRIPT, "bash", str(_LAUNCH)], check=True, capture_output=True, text=True
    ).stdout
    pairs = (entry.split("=", 1) for entry in output.split("\0") if "=" in entry)
    return {
        name: value
        for name, value in pairs
        if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"
    }

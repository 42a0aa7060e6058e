"""The heap of processes that are measured on a CPU: the one that launch/ gives to a run there.

Without it page faults of freed and mapped buffers are a tenth of everybody's time and vary with the
weather. With one heap for all threads, which was asked for here once, threads wait for each other
and walk through what the compilation left in it, a sixth of a step's processor time."""

import pathlib
import subprocess

_SCRIPT = '. "$1"; keep_heap; env -0'
_LAUNCH = pathlib.Path(__file__).parents[2] / "launch" / "environment.sh"


def kept() -> dict[str, str]:
    """Environment variables; those that are set already stay as they are."""
    told = subprocess.run(
        ["bash", "-c", _SCRIPT, "bash", str(_LAUNCH)], check=True, capture_output=True, text=True
    ).stdout
    pairs = (entry.split("=", 1) for entry in told.split("\0") if "=" in entry)
    return {
        name: value
        for name, value in pairs
        if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"
    }

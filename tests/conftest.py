"""What must be true before jax is imported: the CPU, eight devices, a compilation cache. Each
setting can be overridden from outside; tests that start a process of their own state their own
settings."""

import os
import pathlib

# import torch, which only benchmarks need
collect_ignore = ["bench/intern_image_torch.py", "bench/m3i_torch.py"]

ROOT = pathlib.Path(__file__).parent.parent

# The numbers do not depend on how hard LLVM tries, the time of the suite does: compiling is most of
# it.
for flag in ("--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"):
    if flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " " + flag).strip()
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()
for name, value in {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(name, value)

# The fault matrix has tests in every room, and pytest asks a conftest only about those beside it.
from tests.faults.conftest import pytest_runtest_logreport, pytest_sessionfinish  # noqa: E402, F401

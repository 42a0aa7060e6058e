"""What must be true before jax is imported: the CPU, eight devices, a compilation cache. Each
setting can be overridden from outside; tests that start another process state its settings.
`--random SEED` shuffles the files, and the tests of each that does not say `IN_ORDER = True`."""

import ast
import functools
import gc
import os
import pathlib
import random
import sys
from typing import Any

import pytest

from tests import xla_flags

# import torch or OpenCV, which only benchmarks and scripts need
collect_ignore = [
    "bench/dense_heads_torch.py",
    "bench/dense_query_torch.py",
    "bench/dense_step_torch.py",
    "bench/dense_torch.py",
    "bench/intern_image_torch.py",
    "bench/m3i_torch.py",
    "bench/upernet_torch.py",
    "data/make_mask2former.py",
    "data/make_published_dense.py",
    "data/make_dino.py",
    "data/make_opencv_values.py",
    "data/make_vitdet.py",
    "data/make_vit_options.py",
]

# Garbage is searched for less often, also while tests are collected: with `gc.freeze` below, that
# is a sixth of the time of a compilation.
gc.set_threshold(100_000, 10, 10)

ROOT = pathlib.Path(__file__).parent.parent
# by module: generators of its tests, and their states after its import
GENERATORS: dict[str, list[tuple[Any, Any]]] = {}
FILE = [ROOT]  # of the last test
# Files that take the most processor time, begun first: a file is the work of one process, and one
# of these at the end would be waited for by all others.
LONGEST = (
    "training/test_dense_resume",
    "test_main",
    "training/test_dense_tasks",
    "training/test_step",
    "test_readme",
    "faults/test_numerics",
    "training/test_golden",
    "modes/test_eval",
    "parallel/test_fsdp",
    "models/dense/test_dino",
    "modes/test_export",
    "evaluation/test_load",
    "faults/test_fuzz",
    "modes/test_dense_modes",
    "modes/test_init_from",
    "modes/test_compile",
    "faults/test_hosts",
    "evaluation/test_registry",
)

# Eight devices on two loaded cores meet late: XLA would end the process after 40 seconds.
PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
for flag in (*xla_flags.FASTEST.split(), PATIENT):
    if flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " " + flag).strip()
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()
for name, value in {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "jax"),
    # small programs too: what is computed op by op is loaded in half the time that it compiles
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(name, value)

# The fault matrix has tests in every room, and pytest asks a conftest only about those beside it.
from tests import lowering  # noqa: E402
from tests.faults.conftest import pytest_runtest_logreport, pytest_sessionfinish  # noqa: E402, F401

lowering.reuse_contexts()
lowering.leave_out_argument_names()


def uninterrupted(function):
    """The function, during which no garbage is collected."""

    @functools.wraps(function)
    def run(*arguments, **more):
        collects = gc.isenabled()
        gc.disable()
        try:
            return function(*arguments, **more)
        finally:
            if collects:
                gc.enable()

    return run


# CPython 3.11 counts the depth of one tree only. Garbage that is collected while it makes a tree,
# such as a task of a closed event loop that an earlier test left, complains with a traceback, for
# whose carets Python parses a line: "SystemError: AST constructor recursion depth mismatch"
# (github.com/python/cpython/issues/106905). pytest parses every file of tests, and some tests parse
# the whole package.
ast.parse = uninterrupted(ast.parse)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--random",
        type=int,
        metavar="SEED",
        help="shuffle the files, and the tests of each, with this seed",
    )


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leaves what was imported and collected, millions of objects, out of every later search for
    garbage; and notes where the generators of test modules stand."""
    gc.collect()
    gc.freeze()
    import numpy as np  # whose threads the variables above limit

    modules = {module.__name__: module for item in session.items
               if (module := getattr(item, "module", None))}  # fmt: skip
    for name, module in modules.items():
        generators = [x for x in vars(module).values() if isinstance(x, np.random.Generator)]
        GENERATORS[name] = [(one, one.bit_generator.state) for one in generators]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Lets the generators of a test module begin as they were imported: what a test draws does not
    depend on the tests before it. And leaves what the tests of other files left, traced programs
    of hundreds of megabytes, out of the search for garbage."""
    if item.path != FILE[0]:
        FILE[0] = item.path
        gc.freeze()
    for one, state in GENERATORS.get(getattr(getattr(item, "module", None), "__name__", ""), ()):
        one.bit_generator.state = state


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Forgets the kernels that a test traced: a program of the next would check them."""
    if kernel_calls := sys.modules.get("m3i_jax.parallel.kernel_calls"):
        kernel_calls.forget_all()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (seed := config.getoption("--random")) is None:
        first = {ROOT / "tests" / f"{name}.py": at for at, name in enumerate(LONGEST)}
        items.sort(key=lambda item: first.get(item.path, len(first)))
        return
    draw, files = random.Random(seed), dict[pathlib.Path, list[pytest.Item]]()
    for item in items:
        files.setdefault(item.path, []).append(item)
    order = list(files.values())
    for tests in (order, *order):
        if tests is order or not getattr(getattr(tests[0], "module", None), "IN_ORDER", False):
            draw.shuffle(tests)
    items[:] = [item for tests in order for item in tests]

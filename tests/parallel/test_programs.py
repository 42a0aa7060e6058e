"""All hosts compile a program before any runs it, share a compilation cache on CPUs, and there wait
for a host whose data are late. With two real processes."""

import ast
import pathlib
import textwrap

import jax
import numpy as np
import pytest
from jax._src import cache_key

from m3i_jax.parallel import programs
from tests.faults.test_hosts import JOIN, ROOT, start

# Host 1 compiles for a while; the collective of the program connects the hosts, which Gloo gives 30
# seconds.
SPAN = (
    JOIN
    + """
    import logging
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    import jax, numpy as np
    from jax._src import compiler
    from m3i_jax import parallel
    delay, notice, limit = (float(sys.argv[i]) for i in (4, 6, 7))
    cache = sys.argv[5]
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    barriers.NOTICE = notice
    distributed.initialize(place, limit=60)
    mesh = parallel.make_mesh((hosts, 1, 1))
    rows = parallel.to_global(mesh, {"x": np.arange(3.0, dtype=np.float32)[None] + me})["x"]
    events, plain = [], compiler.backend_compile_and_load

    def slow(*arguments):
        events.append("compiled")
        # host 0 takes a moment, or a host 1 that is late finds its program in the cache
        time.sleep(delay if me else 1.0)
        return plain(*arguments)

    compiler.backend_compile_and_load = slow
    everywhere = parallel.replicated(mesh)
    total = parallel.Program(lambda x: x.sum(0), name="total", out_shardings=everywhere)
    print("got", np.asarray(total(rows)).tolist(), np.asarray(total(rows)).tolist())
    print("events", events)
    if limit:
        barriers.NOTICE = 15.0
        late = parallel.Program(
            lambda x: x.max(0), name="late", limit=limit, out_shardings=everywhere
        )
        try:
            late(rows)
        except barriers.HostMissing as error:
            print("missing", error)
        barriers.barrier("the end", limit=60)
"""
)


def both(
    script: pathlib.Path,
    delay: float,
    cache: pathlib.Path,
    *,
    notice: float = 15.0,
    limit: float = 0.0,
) -> list[dict[str, str]]:
    """{first word: rest} of the lines of each host."""
    outputs = []
    script.write_text(textwrap.dedent(SPAN))
    processes = start(script, str(delay), str(cache), str(notice), str(limit))
    try:
        for process in processes:
            out, err = process.communicate(timeout=delay + 120)
            assert process.returncode == 0, err[-3000:]
            outputs.append(
                {line.split(" ")[0]: line.partition(" ")[2] for line in out.splitlines()}
            )
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return outputs


@pytest.mark.fast
@pytest.mark.row("A13")
def test_hosts_wait_for_the_slowest_compilation_and_share_it(tmp_path: pathlib.Path) -> None:
    """The second start finds every program on both hosts, though only the first host writes to the
    cache. At the end of the first, a compilation that takes longer than its limit is named."""
    script, right = tmp_path / "span.py", "[1.0, 3.0, 5.0] [1.0, 3.0, 5.0]"
    first, second = (
        both(script, 3.0, tmp_path / "cache", notice=0.5, limit=1.0),
        both(script, 3.0, tmp_path / "cache"),
    )
    assert [host["got"] for host in first + second] == [right] * 4
    assert (
        first[0]["compile"].startswith("total: waiting for host 1 (") and "compile" not in first[1]
    )
    assert [host["events"] for host in first + second] == [
        "['compiled']",
        "['compiled']",
        "[]",
        "[]",
    ]
    assert first[0]["missing"].startswith("compile late: waited 1 seconds for host 1 (")


# Host 1 is late for the second call of a program with a reduce-scatter.
LATE = (
    JOIN
    + """
    import logging
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    import jax, numpy as np
    from m3i_jax import parallel
    late, barriers.NOTICE = float(sys.argv[4]), float(sys.argv[4]) / 3
    distributed.initialize(place, limit=60, beat=60.0)
    mesh = parallel.make_mesh((1, hosts, 1))
    every, parts = parallel.replicated(mesh), jax.sharding.PartitionSpec("fsdp")
    x = jax.make_array_from_callback((4,), every, lambda index: np.ones(4, np.float32)[index])
    scatter = parallel.Program(
        jax.shard_map(
            lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True), mesh=mesh,
            in_specs=jax.sharding.PartitionSpec(), out_specs=parts, check_vma=False,
        ),
        name="scatter",
    )
    first = jax.block_until_ready(scatter(x))
    if me:
        time.sleep(late)
    print("got", np.asarray(scatter(x).addressable_shards[0].data).tolist())
"""
)


def wait_for_late_host(script: pathlib.Path, seconds: float) -> None:
    script.write_text(textwrap.dedent(LATE))
    processes, outputs = start(script, str(seconds)), []
    try:
        for process in processes:
            out, err = process.communicate(timeout=seconds + 120)
            assert process.returncode == 0, err[-3000:]
            outputs.append(out)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert all("got [2.0, 2.0]" in out for out in outputs), outputs
    assert "run scatter: waiting for host 1 (" in outputs[0] and "waiting" not in outputs[1]


@pytest.mark.fast
@pytest.mark.row("A7")
def test_hosts_wait_for_late_data(tmp_path: pathlib.Path) -> None:
    wait_for_late_host(tmp_path / "late.py", 1.5)


@pytest.mark.slow
@pytest.mark.row("A7")
def test_hosts_wait_for_data_that_are_later_than_the_limit_of_gloo(tmp_path: pathlib.Path) -> None:
    wait_for_late_host(tmp_path / "late.py", 36.0)


def spanning(source: str) -> list[int]:
    """Lines that jit a function with shardings over devices, which may belong to several hosts,
    without `Program`."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [
        call.lineno
        for call in calls
        if "jax.jit" in (ast.unparse(call.func), *map(ast.unparse, call.args[:1]))
        and any(word.arg in ("in_shardings", "out_shardings") for word in call.keywords)
    ]


def test_every_program_with_a_layout_is_compiled_by_all_before_any_runs_it() -> None:
    wrong = "f = jax.jit(g, out_shardings=s)", "f = functools.partial(jax.jit, in_shardings=s)"
    right = "f = jax.jit(g)", "f = parallel.Program(g, out_shardings=s)"
    assert all(map(spanning, wrong)) and not any(map(spanning, right))
    found = {
        path.name: spanning(source)
        for path in sorted((ROOT / "m3i_jax").rglob("*.py"))
        if "_shardings" in (source := path.read_text())
    }
    assert not {name: lines for name, lines in found.items() if lines}


def test_alone_a_program_is_the_jitted_function() -> None:
    double = programs.Program(lambda x, y: 2 * x + y, name="double", donate_argnums=1)
    x, y = np.arange(3.0, dtype=np.float32), jax.numpy.ones(3)
    assert double(x, y).tolist() == (2 * x + 1).tolist() and y.is_deleted()
    assert "multiply" in double.lower(x, np.ones(3, np.float32)).as_text()


def test_what_a_program_is_compiled_for_is_structure_shape_type_and_layout() -> None:
    x, here = np.zeros((4, 2), np.float32), jax.devices()
    spread = jax.sharding.NamedSharding(
        jax.make_mesh((2,), ("a",), devices=here[:2]), jax.sharding.PartitionSpec("a")
    )
    different = [
        (x,),
        (x[:2],),
        (x.astype(np.int32),),
        ({"x": x},),
        (jax.device_put(x, here[1]),),
        (jax.device_put(x, spread),),
        (x, 3),
    ]
    assert len({programs._signature(arguments) for arguments in different}) == len(different)
    assert programs._signature(({"x": x + 1},)) == programs._signature(({"x": x},))


def test_jax_still_has_the_functions_whose_keys_are_shared() -> None:
    """Without them, hosts with CPUs would compile at every start, and no other test would fail."""
    assert callable(cache_key._hash_accelerator_config) and callable(
        cache_key._hash_serialized_compile_options
    )

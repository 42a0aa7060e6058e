"""Optimal matching of queries and objects inside a jitted step on a CPU: `hungarian` and optax's,
in milliseconds, with and without padding.

    python -m tests.bench.matching
    python -m tests.bench.matching programs  # what it compiles to for a CPU, a TPU and a GPU

optax's algorithm takes one step per column of its input, padded ones too, in which it searches
all of them: rows that are all alike make its searches long. Ours adds the rows that exist, each
step of a search one vector operation over the queries. Costs are those of a matching step: one
matrix per image and layer, here one alone, and 14 (two images, seven layers) by `vmap` and by
`lax.map`."""

import re
import sys
import time
from typing import Any

import numpy as np

QUERIES = 900


def least_ms(call: Any, *arrays: Any, runs: int = 7) -> float:
    """Least wall milliseconds of a compiled call."""
    import jax

    jax.block_until_ready(call(*arrays))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(call(*arrays))
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def compare(rows: int, count: int, queries: int = QUERIES, runs: int = 7) -> dict[str, float]:
    """Milliseconds of both for `count` objects of `rows`; assignments must be equal."""
    import jax
    import optax
    from scipy.optimize import linear_sum_assignment

    from m3i_jax.objective.assignment import hungarian

    rng = np.random.default_rng(0)
    cost = rng.normal(size=(rows, queries)).astype(np.float32)
    valid = np.arange(rows) < count
    padded = np.where(valid[:, None], cost, 0).astype(np.float32)
    ours, theirs = jax.jit(hungarian), jax.jit(optax.assignment.hungarian_algorithm)
    _, wanted = linear_sum_assignment(cost[:count])
    if not (np.asarray(ours(cost, valid))[:count] == wanted).all():
        raise RuntimeError(f"{rows} x {queries}: the assignment is not scipy's")
    return {
        "ours": least_ms(ours, cost, valid, runs=runs),
        "optax": least_ms(theirs, padded, runs=runs),
        "optax without padding": least_ms(theirs, cost[:count], runs=runs),
    }


def several(rows: int, most: int, sets: int = 14, runs: int = 7) -> dict[str, float]:
    """Milliseconds for several matrices of up to `most` objects."""
    import jax

    from m3i_jax.objective.assignment import hungarian

    rng = np.random.default_rng(0)
    cost = rng.normal(size=(sets, rows, QUERIES)).astype(np.float32)
    valid = np.arange(rows) < rng.integers(0, most + 1, sets)[:, None]
    by_map = jax.jit(lambda *arrays: jax.lax.map(lambda pair: hungarian(*pair), arrays))
    return {
        "vmap": least_ms(jax.jit(jax.vmap(hungarian)), cost, valid, runs=runs),
        "map": least_ms(by_map, cost, valid, runs=runs),
    }


TOPOLOGIES = ("cpu:1", "v5e:1x1", "h100:1")
# what leaves the device, by the opcode of the compiled program
HOST = ("infeed", "outfeed", "send", "recv", "send-done", "recv-done")


def program(topology: str, sets: int = 14, rows: int = 100) -> dict[str, Any]:
    """What the matching of several sets compiles to for a topology, without such a device: `while`,
    how many loops are outside any other and inside; `host`, calls of the host; `custom`, targets of
    calls of a library."""
    import jax

    from m3i_jax.objective.assignment import hungarian
    from m3i_jax.profiling import hlo
    from m3i_jax.profiling import topology as topologies

    parsed = topologies.parse_topology(topology)
    device = topologies.topology_devices(parsed)[0]
    one = jax.sharding.SingleDeviceSharding(device)
    given = (
        jax.ShapeDtypeStruct((sets, rows, QUERIES), "float32", sharding=one),
        jax.ShapeDtypeStruct((sets, rows), "bool", sharding=one),
    )
    lowered = jax.jit(jax.vmap(hungarian)).lower(*given)
    options = topologies.COMPILER[parsed.family.platform]
    made = hlo.parse_hlo(lowered.compile(compiler_options=options).as_text())
    every = [each for part in made.computations.values() for each in part.values()]
    loops = [each for each in every if each.opcode == "while"]
    outer = sum(each.inside == made.entry for each in loops)
    targets = (
        re.search(r'custom_call_target="([^"]*)"', each.text)
        for each in every
        if each.opcode == "custom-call"
    )
    return {
        "while": (outer, len(loops) - outer),
        "host": sum(each.opcode in HOST for each in every),
        "custom": sorted({found[1] for found in targets if found}),
    }


def iterations(rows: int, count: int, cases: int = 20) -> float:
    """Mean steps of the innermost loops, searches and paths, of one matrix of random costs."""
    rng, total = np.random.default_rng(0), 0
    for _ in range(cases):
        cost = rng.normal(size=(count, QUERIES))
        u, v = np.zeros(count), np.zeros(QUERIES)
        owner, column = np.full(QUERIES, -1), np.full(count, -1)
        for row in range(count):
            length, before = np.full(QUERIES, np.inf), np.full(QUERIES, -1)
            done, here, least = np.zeros(QUERIES, bool), row, 0.0
            while here >= 0:
                reach = least + cost[here] - u[here] - v
                better = ~done & (reach < length)
                length[better], before[better] = reach[better], here
                nearest = np.where(done, np.inf, length).argmin()
                least, here = length[nearest], owner[nearest]
                done[nearest], total = True, total + 1
            gain = np.where(done, least - length, 0.0)
            seen = column >= 0
            u[seen] += gain[column[seen]]
            u[row] += least
            v -= gain
            at = nearest
            while at >= 0:
                owner[at], total = before[at], total + 1
                following = -1 if before[at] == row else column[before[at]]
                column[before[at]], at = at, following
    return total / cases


if __name__ == "__main__":
    if sys.argv[1:] == ["programs"]:
        for name in TOPOLOGIES:
            print(name, program(name), flush=True)
        for count in (20, 100):
            print(count, "objects:", iterations(100, count), "steps", flush=True)
        sys.exit()
    for rows, count in ((100, 20), (100, 100), (300, 20), (300, 300)):
        print(rows, count, {k: round(v, 2) for k, v in compare(rows, count).items()}, flush=True)
    for rows, most in ((100, 40), (300, 80)):
        print(rows, most, {k: round(v, 2) for k, v in several(rows, most).items()}, flush=True)

"""Optimal matching of queries and objects inside a jitted step on a CPU: `hungarian` and optax's,
in milliseconds, with and without padding.

    python -m tests.bench.matching

optax's algorithm takes one step per column of its input, padded ones too, in which it searches
all of them: rows that are all alike make its searches long. Ours adds the rows that exist, each
step of a search one vector operation over the queries. Costs are those of a matching step: one
matrix per image and layer, here one alone, and 14 (two images, seven layers) by `vmap` and by
`lax.map`."""

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


if __name__ == "__main__":
    for rows, count in ((100, 20), (100, 100), (300, 20), (300, 300)):
        print(rows, count, {k: round(v, 2) for k, v in compare(rows, count).items()}, flush=True)
    for rows, most in ((100, 40), (300, 80)):
        print(rows, most, {k: round(v, 2) for k, v in several(rows, most).items()}, flush=True)

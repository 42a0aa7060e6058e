"""The searches of --mode=compile, with a formula instead of a compiler."""

import math

import pytest

from m3i_jax.modes import batch_search
from m3i_jax.training import trainer
from tests import toy


def machine(
    limit: float,
    *,
    fixed: float = 10.0,
    slope: float = 1.0,
    soft: float = 0.0,
    silent: bool = False,
):
    """(compiler, sizes that were tried). Memory is a line, which near the limit is bent by `soft`
    of the excess."""
    tried: list[int] = []

    def attempt(n: int) -> batch_search.CompileTrial:
        tried.append(n)
        need = fixed + slope * n
        need -= soft * max(0.0, need - 0.8 * limit)
        fits = need <= limit
        return batch_search.CompileTrial(
            fits=fits, peak=math.nan if silent and not fits else need, fixed=fixed, limit=limit
        )

    return attempt, tried


@pytest.mark.parametrize("largest", [1, 2, 7, 13, 16])
@pytest.mark.parametrize("start", [1, 5, 100])
@pytest.mark.parametrize("silent", [False, True])
def test_small_sizes_are_exact(largest: int, start: int, silent: bool) -> None:
    attempt, tried = machine(10.0 + largest + 0.5, silent=silent)
    assert batch_search.largest_batch(attempt, start) == largest
    assert len(tried) == len(set(tried)) <= 12


@pytest.mark.parametrize("soft", [0.0, 0.5])
@pytest.mark.parametrize("start", [1, 64, 4096])
def test_large_sizes_are_within_a_sixteenth_after_few_attempts(soft: float, start: int) -> None:
    attempt, tried = machine(1000.0, soft=soft)
    found = batch_search.largest_batch(attempt, start)
    best = max(n for n in range(1, 2000) if machine(1000.0, soft=soft)[0](n).fits)
    assert best * 15 / 16 - 1 <= found <= best and len(tried) <= 12


def test_sizes_that_do_not_fit_are_tried_first() -> None:
    """A compiler refuses a size quickly and takes many times as long for one that fits."""
    attempt, tried = machine(100.0, fixed=6.0)
    found = batch_search.largest_batch(attempt, 40)
    assert 15 / 16 * 94 - 1 <= found <= 94
    assert sum(n <= 94 for n in tried) <= 2 <= len(tried), tried


def test_large_sizes_are_round() -> None:
    """990 would fit by the line, but a step splits its rows into pieces, and the more divisors
    their number has, the closer they are to the best size."""
    attempt, tried = machine(1000.0)
    found = batch_search.largest_batch(attempt, 64)
    assert 15 / 16 * 990 - 1 <= found < 990 and all(n % 4 == 0 for n in tried), tried


def test_nothing_fits() -> None:
    attempt, tried = machine(5.0)
    assert batch_search.largest_batch(attempt, 8) == 0 and min(tried) == 1


def test_candidates_are_ordered_by_cost_and_divisible() -> None:
    config = toy.settings(train__batch_size=64)
    listed = list(batch_search.memory_savers(config, 8))
    flags = [name for name, _ in listed]
    assert (
        flags[0] == "as configured"
        and listed[0][1] == config
        and len(set(flags)) == len(flags) <= 12
    )
    assert "--config.train.microbatches=2" in flags and "--config.parallel.mesh=(-1,8,1)" in flags
    assert flags.index("--config.train.microbatches=2") < flags.index(
        "--config.parallel.mesh=(-1,8,1)"
    )
    names, half, full = (
        min(i for i, flag in enumerate(flags) if f"remat={name}" in flag)
        for name in ("names", "half", "full")
    )
    assert names < half < full
    # 64 images are 4 pairs a shard: not eight parts
    assert not any("microbatches=8" in name for name in flags)
    for name, made in listed[1:]:
        assert made != config and all(flag.startswith("--config.") for flag in name.split())
    changed = dict(listed)["--config.train.microbatches=2"]
    assert (changed.train.microbatches, changed.model, changed.data) == (
        2,
        config.model,
        config.data,
    )


def test_one_device_has_no_mesh_to_change() -> None:
    assert not any("mesh" in name for name, _ in batch_search.memory_savers(toy.settings(), 1))


def test_a_rounded_batch_keeps_its_candidates() -> None:
    # on eight devices in two parts: 32
    rounded = toy.settings(train__batch_size=24, train__round_batch=True)
    assert "--config.train.microbatches=2" in dict(batch_search.memory_savers(rounded, 8))
    refused = toy.settings(train__batch_size=24)
    assert "--config.train.microbatches=2" not in dict(batch_search.memory_savers(refused, 8))


@pytest.mark.parametrize(
    ("images", "changes", "steps"),
    [
        # an epoch of more steps than the whole run
        (2, {"optim__warmup_steps": -1, "optim__warmup_epochs": 0.4}, 20),
        # a run of one step
        (800, {"train__steps": 0, "train__epochs": 1.0, "optim__warmup_steps": 40}, 1),
    ],
)
def test_a_batch_of_another_size_may_make_a_run_shorter_than_its_warm_up(
    images: int, changes: dict, steps: int
) -> None:
    config = toy.settings(**changes)
    assert trainer.run_length(config).warmup > 2
    assert trainer.run_length(batch_search.with_batch(config, images)).steps == steps

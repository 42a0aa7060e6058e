"""The collapse alarm on sequences of its monitors."""

import pytest

from m3i_jax.training import loop


def rises(values: list[dict[str, float]]) -> list[int]:
    watch = loop.CollapseAlarm()
    return [step for step, line in enumerate(values) if watch.update(line)]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_alarm_knows_no_scale(scale: float) -> None:
    """Deviation and uniformity are compared with their largest value so far, a spread with a fixed
    threshold; one bad step is no collapse."""
    falling = [scale * 0.8**k for k in range(40)]
    first = next(k for k in range(40) if falling[k] < 0.02 * falling[0])
    assert rises([{"collapse/target_std": x} for x in falling]) == [
        first + loop.CollapseAlarm.PATIENCE - 1
    ]
    assert rises([{"collapse/uniformity": -x} for x in falling]) == [
        first + loop.CollapseAlarm.PATIENCE - 1
    ]
    joined = [
        {"collapse/uniformity": -1.0, "collapse/uniformity/global_moco_v3": -x} for x in falling
    ]
    assert rises(joined) == [first + loop.CollapseAlarm.PATIENCE - 1]
    assert rises([{"collapse/target_std": scale if k != 20 else 0.0} for k in range(40)]) == []
    # small from the start is a scale, not a collapse
    assert rises([{"collapse/target_std": scale * 1e-3}] * 40) == []


@pytest.mark.parametrize("collapsed", [(0.0, 0.0), (6.0, 6.0)])
def test_assignments_without_information_are_a_collapse(collapsed: tuple[float, float]) -> None:
    """All images go to one of 64 prototypes, or each image to all; of two spaces one is enough."""

    def line(marginal: float, assignment: float) -> dict[str, float]:
        return {
            "collapse/marginal_bits/dino": marginal,
            "collapse/assignment_bits/dino": assignment,
            "collapse/marginal_bits/ibot": 5.9,
            "collapse/assignment_bits/ibot": 3.0,
        }

    starting = [line(6.0 - 0.02 / k, 5.9) for k in (1, 2, 3)]  # assignments say little at first
    healthy = [line(5.8, 5.8 - bits) for bits in (0.3, 1.0, 2.0)]
    assert rises([*starting, *healthy * 3, *[line(*collapsed)] * 7]) == [
        12 + loop.CollapseAlarm.PATIENCE - 1
    ]
    assert rises([*starting, *healthy * 9]) == []


def test_the_alarm_rises_once_a_collapse_and_again_after_a_recovery() -> None:
    spread = [0.5] * 3 + [0.019] * 7 + [0.03, 0.021] + [0.001] * 9 + [0.05] + [0.01] * 6
    assert rises([{"collapse/spread": x} for x in spread]) == [7, 26]


def test_what_is_missing_or_not_finite_is_not_judged() -> None:
    nothing = [
        {},
        {"collapse/spread": float("nan")},
        {"collapse/target_std": float("inf")},
        {"loss": 0.0},
    ]
    assert rises(nothing * 9) == []
    assert rises([{"collapse/target_std": 0.0}] * 9) == []  # never was anything

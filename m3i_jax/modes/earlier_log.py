"""What the log of a run says of its earlier starts, from one pass over its lines."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from m3i_jax.training import goodput

RESTARTS = "perf/restarts"
LONG = 2**27  # bytes of a log; its report takes longer to write than a preemption leaves


@dataclasses.dataclass(frozen=True)
class EarlierLog:
    """The numbers of a log that a start of its run reads.

    Attributes:
      seconds: by phase, of the last line that has them.
      restarts: how often the run was started again.
      evaluated: steps with an evaluation.
    """

    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    restarts: int = 0
    evaluated: frozenset[int] = frozenset()

    @classmethod
    def of(cls, lines: Sequence[Mapping[str, Any]]) -> "EarlierLog":
        """Reads the lines of a log.

        >>> line = {"step": 2, "perf/seconds/step": 5.0, "perf/restarts": 1, "eval/knn/top1": 0.5}
        >>> EarlierLog.of([line])
        EarlierLog(seconds={'step': 5.0}, restarts=1, evaluated=frozenset({2}))
        """
        restarts = [line[RESTARTS] for line in lines if type(line.get(RESTARTS)) is int]
        evaluated = (
            line["step"] for line in lines if any(name.startswith("eval/") for name in line)
        )
        return cls(_last_seconds(lines), max(restarts, default=0), frozenset(evaluated))

    def resumed(self, position: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the clock of a start is given that resumes from the position of a
        checkpoint. The log has what starts since that checkpoint took, the position has not."""
        return {
            "earlier": goodput.resumed_seconds(position.get("seconds", {}), self.seconds),
            "restarts": 1 + max(position.get("restarts", 0), self.restarts),
        }


def kept_metrics(earlier: Mapping[str, float], restarts: int) -> dict[str, float]:
    """Returns the metrics that keep what `EarlierLog.resumed` returned, for a line of the log.

    >>> kept_metrics({"step": 5.0, "lost": 0.0}, restarts=2)
    {'perf/seconds/step': 5.0, 'perf/restarts': 1}
    """
    seconds = {goodput.PREFIX + name: value for name, value in earlier.items() if value}
    # without this start, which its clock counts: an attempt to restore may be repeated
    return seconds | ({RESTARTS: restarts - 1} if restarts > 1 else {})


def _last_seconds(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    for values in reversed(lines):
        with contextlib.suppress(ValueError, TypeError):
            if seconds := {
                name.removeprefix(goodput.PREFIX): float(value)
                for name, value in values.items()
                if name.startswith(goodput.PREFIX)
            }:
                return seconds
    return {}


def is_long(log: pathlib.Path) -> bool:
    """Returns whether a log has more lines than a report should read between a preemption's signal
    and its end, of 30 seconds or less."""
    return log.is_file() and log.stat().st_size > LONG

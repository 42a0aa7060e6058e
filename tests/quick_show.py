"""--mode=show without its estimates of a step, for tests of what else it prints: they are four of
its five seconds, in which the step is traced three times."""

import pytest

from m3i_jax.modes import monitoring, show
from m3i_jax.profiling.traffic_model import StepTraffic


def leave_out_traffic(patch: pytest.MonkeyPatch) -> None:
    """The FLOPs of a step, and what they take on each slice, are those of the run."""
    traffic = {platform: StepTraffic(1e6, 1e6, 1e6) for platform in ("tpu", "cuda")}
    patch.setattr(show, "estimated_traffic", lambda trainer, state: traffic)
    patch.setattr(show, "machine_line", lambda total, state, mfu, dtype, peak: "")


def leave_out_estimates(patch: pytest.MonkeyPatch) -> None:
    leave_out_traffic(patch)
    patch.setattr(monitoring, "model_flops", lambda trainer: 1e9)

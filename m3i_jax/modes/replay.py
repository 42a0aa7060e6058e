"""--mode=replay: take the step that ended a run again, alone, and say what is not finite. Exit 0:
the same happened, 1: it did not."""

import math
import pathlib

from m3i_jax import schema
from m3i_jax.training import debug_dump

SHOWN = 12  # arrays that are named


def run(config: schema.Config, *, workdir: str) -> int:
    """The dump has its own configuration: that of the run may have changed since."""
    del config
    place = debug_dump.newest_dump(pathlib.Path(workdir))
    about, trainer, state, batch = debug_dump.load_dump(place, print)
    print(
        f"step {about['step']:,} of {place}, from {about['hosts']} host(s), {about['devices']}"
        f" device(s), m3i_jax {about['m3i_jax']}"
    )
    values, broken = debug_dump.replay_step(trainer, state, batch)
    print(f"loss {values['loss']:.6g} (in the run {about['metrics'].get('loss')})")
    for name in (
        name for name, value in values.items() if name != "loss" and not math.isfinite(value)
    ):
        print(
            f"not finite: metric {name}, {values[name]} (in the run {about['metrics'].get(name)})"
        )
    for name, much in list(broken.items())[:SHOWN]:
        print(f"not finite: {name}, {much}")
    if len(broken) > SHOWN:
        print(f"not finite: {len(broken) - SHOWN} more arrays")
    if not broken:
        print("all arrays are finite")
    skipped = values["skipped/not_finite"]
    if skipped and debug_dump.same_outcome(about["metrics"], values):
        print("reproduced")
        return 0
    print(
        "not reproduced: "
        + ("other metrics are not finite" if skipped else "this time the step is finite")
    )
    return 1

"""--mode=replay: repeat the step that ended a run, and list what is not finite. Exit code 0 if the
outcome is the same, else 1."""

import math
import pathlib

from m3i_jax import schema
from m3i_jax.training import debug_dump

SHOWN = 12  # arrays listed at most


def run(config: schema.Config, *, workdir: str) -> int:
    """Replay the newest dump, with the configuration stored in it."""
    del config
    dump = debug_dump.newest_dump(pathlib.Path(workdir))
    about, trainer, state, batch = debug_dump.load_dump(dump, print)
    print(
        f"step {about['step']:,} of {dump}, from {about['hosts']} host(s), {about['devices']}"
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
    for name, amount in list(broken.items())[:SHOWN]:
        print(f"not finite: {name}, {amount}")
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

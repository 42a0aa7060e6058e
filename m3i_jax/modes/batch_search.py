"""What fits: the largest batch by bisection, and changes to a configuration in the order of what
they cost. Compiles nothing itself."""

import dataclasses
import math
from collections.abc import Callable, Iterator

from m3i_jax import config as configuration
from m3i_jax import parallel, schema, validation
from m3i_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileTrial:
    """What came of one size. peak: bytes it needs or wanted, NaN if unknown; fixed: of these, what
    does not depend on the size."""

    fits: bool
    peak: float
    fixed: float
    limit: float


def largest_batch(attempt: Callable[[int], CompileTrial], start: int) -> int:
    """The largest size that fits, 0 if 1 does not; exact up to 16, above it to a sixteenth and
    among round sizes, which a step can take in pieces of the size that it wants
    (models/scan_blocks.py): of a prime number of rows it cannot, and needs more than of the next
    above.

    Need grows about linearly with size, so the next size is a little above where a line through
    what is known meets the limit: a TPU's compiler refuses what is too large before it makes code
    for it, in a fraction of the time that it takes for what fits. After a few, every second size is
    the middle instead, since near the limit a compiler bends the line by computing things twice.

    >>> largest_batch(lambda n: CompileTrial(fits=n <= 13, peak=10.0 + n, fixed=10.0, limit=23.0), 4)
    13
    """
    known: dict[int, CompileTrial] = {}
    size = max(1, 2 * start)
    while True:
        known[size] = attempt(size)
        low = max((n for n, t in known.items() if t.fits), default=0)
        high = min((n for n, t in known.items() if not t.fits), default=0)
        if high and high - low <= max(1, low // 16):
            return low
        guess, step = _line(known, size), 2 ** max(0, (low // 16).bit_length() - 1)
        above = guess + max(1, guess // 16) if guess else 0
        if not high:
            size = min(max(above or 2 * low, low + max(1, low // 8)), 8 * low)
        elif guess is None or (len(known) > 3 and len(known) % 2):
            size = (low + high) // 2
        else:
            size = min(max(above if above < high else guess, low + 1), high - 1)
        size = max(size // step * step, (low // step + 1) * step)


def _line(known: dict[int, CompileTrial], size: int) -> int | None:
    """Where need would meet the limit: by the two largest sizes of which it is known, or by one and
    what does not grow."""
    points = sorted((n, t.peak) for n, t in known.items() if not math.isnan(t.peak))
    if not points:
        return None
    last = known[size]
    (a, low), (b, high) = points[-2:] if len(points) > 1 else ((0, last.fixed), points[0])
    return int(a + (last.limit - low) * (b - a) / (high - low)) if high > low else None


def with_batch(config: schema.Config, images: int) -> schema.Config:
    """The configuration with another batch, as many images as one batch has at least, and no
    warm-up: the run has other steps, fewer perhaps than its warm-up, and what a step needs does not
    depend on it."""
    data, optim = (
        dataclasses.replace(config.data, size=max(config.data.size, images)),
        dataclasses.replace(config.optim, warmup_steps=0),
    )
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, batch_size=images), data=data, optim=optim
    )


def memory_savers(config: schema.Config, devices: int) -> Iterator[tuple[str, schema.Config]]:
    """(flags, configuration) from the cheapest change to the dearest: what is recomputed costs one
    per cent by name, a tenth by half and a sixth in full, microbatches cost kernels of less than
    full size, a sharded state costs network. Only what can be split over so many devices."""
    some = [("model.remat", "names")] if config.model.remat == "none" else []
    half = [("model.remat", "half")] if config.model.remat not in ("half", "full") else []
    full = [("model.remat", "full")] if config.model.remat != "full" else []

    def parts(factor: int) -> tuple[str, str]:
        return "train.microbatches", str(config.train.microbatches * factor)

    shards = config.parallel.mesh[1]
    spread = [("parallel.mesh", f"(-1,{min(devices, 8)},1)")] if shards == 1 and devices > 1 else []
    wide = [("parallel.mesh", f"(1,{devices},1)")] if devices > 8 else spread
    ladder = [
        [],
        some,
        [parts(2)],
        [*some, parts(2)],
        [*some, parts(4)],
        half,
        spread,
        [*spread, *some, parts(4)],
    ]
    ladder += [
        [*half, parts(4)],
        [*full, parts(4)],
        [*wide, *some, parts(8)],
        [*wide, *full, parts(8)],
    ]
    seen: set[str] = set()
    for changes in ladder:
        flags = " ".join(f"--config.{key}={value}" for key, value in changes)
        if flags in seen:
            continue
        seen.add(flags)
        made = changed_settings(config, dict(changes))
        try:
            mesh = made.parallel.mesh
            fixed = math.prod(n for n in mesh if n != -1)
            replica, fsdp, tensor = (devices // fixed if n == -1 else n for n in mesh)
            if replica * fsdp * tensor != devices:
                continue
            validation.fit_batch_to_mesh(made, (replica, fsdp, tensor))
        except UserError:
            continue
        yield flags or "as configured", made


def changed_settings(config: schema.Config, changes: dict[str, str]) -> schema.Config:
    """The configuration with some keys set, given as on the command line."""
    door = configuration.default_config()
    configuration.apply_overrides(door, [f"{key}={value}" for key, value in changes.items()])
    wanted = configuration.resolve(door)
    for key in changes:
        section, name = key.split(".")
        part = dataclasses.replace(
            getattr(config, section), **{name: getattr(getattr(wanted, section), name)}
        )
        config = dataclasses.replace(config, **{section: part})
    return config


def data_shards(mesh: parallel.mesh.Mesh) -> int:
    """Shards of a batch."""
    return math.prod(mesh.shape[axis] for axis in parallel.DATA)

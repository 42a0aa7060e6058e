"""Searches of --mode=compile: the largest batch that fits, by bisection, and changes to a
configuration that save memory, cheapest first. Compiles nothing itself."""

import dataclasses
import math
from collections.abc import Callable, Iterator

from m3i_jax import config as configuration
from m3i_jax import parallel, schema, validation
from m3i_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileTrial:
    """Result of one size. peak: bytes that it needs, NaN if unknown; fixed: the part of them that
    does not depend on the size."""

    fits: bool
    peak: float
    fixed: float
    limit: float


def largest_batch(attempt: Callable[[int], CompileTrial], start: int) -> int:
    """Returns the largest size that fits, 0 if 1 does not; exact up to 16, above it to a sixteenth
    and among round sizes. A step splits a round number of rows into pieces of the size that it
    prefers (models/scan_blocks.py); a prime number it cannot split, and needs more memory than for
    the next larger round number.

    Memory grows about linearly with size, so the next size is a little above the point where a line
    through the known sizes meets the limit: a TPU's compiler refuses a program that is too large
    before it generates code, in a fraction of the time of one that fits. After the first sizes
    every second one is the middle of the interval instead, since near the limit a compiler bends
    the line by rematerialisation.

    >>> def attempt(n):
    ...     return CompileTrial(fits=n <= 13, peak=10.0 + n, fixed=10.0, limit=23.0)
    >>> largest_batch(attempt, 4)
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
    """The size at which memory would meet the limit: by the two largest sizes whose peak is known,
    or by one and its fixed part."""
    points = sorted((n, t.peak) for n, t in known.items() if not math.isnan(t.peak))
    if not points:
        return None
    last = known[size]
    (a, low), (b, high) = points[-2:] if len(points) > 1 else ((0, last.fixed), points[0])
    return int(a + (last.limit - low) * (b - a) / (high - low)) if high > low else None


def with_batch(config: schema.Config, images: int) -> schema.Config:
    """Returns the configuration with another batch size, data of at least one batch, and no
    warm-up: the run could have fewer steps than its warm-up, and the memory of a step does not
    depend on it."""
    data, optim = (
        dataclasses.replace(config.data, size=max(config.data.size, images)),
        dataclasses.replace(config.optim, warmup_steps=0),
    )
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, batch_size=images), data=data, optim=optim
    )


def memory_savers(config: schema.Config, devices: int) -> Iterator[tuple[str, schema.Config]]:
    """Yields (flags, configuration), cheapest change first: rematerialisation costs one per cent by
    names, a tenth by half and a sixth in full, microbatches run smaller kernels, and a sharded
    state needs the network. Only configurations that can be split over the devices."""
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
    tried: set[str] = set()
    for changes in ladder:
        flags = " ".join(f"--config.{key}={value}" for key, value in changes)
        if flags in tried:
            continue
        tried.add(flags)
        changed = changed_settings(config, dict(changes))
        try:
            mesh = changed.parallel.mesh
            fixed = math.prod(n for n in mesh if n != -1)
            replica, fsdp, tensor = (devices // fixed if n == -1 else n for n in mesh)
            if replica * fsdp * tensor != devices:
                continue
            validation.fit_batch_to_mesh(changed, (replica, fsdp, tensor))
        except UserError:
            continue
        yield flags or "as configured", changed


def changed_settings(config: schema.Config, changes: dict[str, str]) -> schema.Config:
    """Returns the configuration with some keys changed, given as on the command line."""
    defaults = configuration.default_config()
    configuration.apply_overrides(defaults, [f"{key}={value}" for key, value in changes.items()])
    parsed = configuration.resolve(defaults)
    for key in changes:
        section, name = key.split(".")
        part = dataclasses.replace(
            getattr(config, section), **{name: getattr(getattr(parsed, section), name)}
        )
        config = dataclasses.replace(config, **{section: part})
    return config


def data_shards(mesh: parallel.mesh.Mesh) -> int:
    """Returns the number of shards of a batch."""
    return math.prod(mesh.shape[axis] for axis in parallel.DATA)

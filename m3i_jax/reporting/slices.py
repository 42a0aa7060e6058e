"""Named slices of accelerators, and how long a run would take on them at a stated share of their peak."""

import dataclasses

EXA = 1e18


@dataclasses.dataclass(frozen=True)
class Chip:
    """peak: dense bf16 FLOP/s; memory: bytes of HBM."""

    peak: float
    memory: float


# TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, "peak compute per chip (bf16)" and "HBM capacity".
# GPUs: NVIDIA's data sheets of A100, H100 and H200 (SXM) and of the HGX B200; dense, which is half of the figure with sparsity.
CHIPS = {
    "v4": Chip(275e12, 32 * 2**30),
    "v5e": Chip(197e12, 16 * 2**30),
    "v5p": Chip(459e12, 95 * 2**30),
    "v6e": Chip(918e12, 32 * 2**30),
    "tpu7x": Chip(2307e12, 192 * 2**30),
    "a100": Chip(312e12, 80e9),
    "h100": Chip(989e12, 80e9),
    "h200": Chip(989e12, 141e9),
    "b200": Chip(2250e12, 180e9),
}

# (name a person orders, kind of chip, chips). v4 and v5p are ordered by cores, two a chip; the others by chips.
SLICES = (
    ("v4-32", "v4", 16),
    ("v5e-16", "v5e", 16),
    ("v5e-256", "v5e", 256),
    ("v5p-128", "v5p", 64),
    ("v6e-64", "v6e", 64),
    ("v6e-256", "v6e", 256),
    ("tpu7x-64", "tpu7x", 64),
    ("a100:8", "a100", 8),
    ("h100:1", "h100", 1),
    ("h100:8", "h100", 8),
    ("h200:8", "h200", 8),
    ("b200:8", "b200", 8),
)
HEADERS = ("slice", "chips", "exaFLOP/s", "memory a chip", "days")


def days(total: float, *, kind: str, chips: int, mfu: float) -> float:
    """Days that `total` FLOPs take on so many chips at a model FLOP utilisation of 0..1.

    >>> round(days(86_400 * 197e12, kind="v5e", chips=1, mfu=0.5), 6)
    2.0
    """
    return total / (CHIPS[kind].peak * chips * mfu) / 86_400


def rows(total: float, mfu: float) -> list[tuple[str, str, str, str, str]]:
    """A row a slice, for `show.table` with HEADERS.

    >>> rows(1e21, 0.45)[1]
    ('v5e-16', '16', '0.0032', '17.2 GB', '8.2')
    """
    out = []
    for name, kind, chips in SLICES:
        chip, time = CHIPS[kind], days(total, kind=kind, chips=chips, mfu=mfu)
        told = f"{time:,.1f}" if time >= 1 else f"{time:.2f}"
        out.append((name, str(chips), f"{chip.peak * chips / EXA:.4f}", f"{chip.memory / 1e9:.1f} GB", told))
    return out

"""What the scripts that write reference values of dense tasks share."""

import pathlib
from typing import Any

import numpy as np

PLACE = pathlib.Path(__file__).with_name("dense")


def padded(rows: list[np.ndarray], count: int, fill: float = 0) -> np.ndarray:
    out = np.full((len(rows), count, *rows[0].shape[1:]), fill, rows[0].dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def numpy(value: Any) -> np.ndarray:
    made = value.detach().numpy()
    return made.astype(np.float32) if made.dtype == np.float64 else made


def report(what: str, made: dict, wide: dict) -> None:
    """Prints where float32 and float64 differ: the noise that a test has to allow."""
    print(what)
    for key in wide:
        a, b = np.asarray(made[key]), np.asarray(wide[key])
        if a.shape != b.shape or (a.dtype.kind in "iub" and (a != b).any()):
            print(
                "  DIFFERENT CHOICES",
                key,
                a.shape,
                b.shape,
                (a != b).sum() if a.shape == b.shape else "",
            )
        elif a.dtype.kind == "f" and a.size and "gradient" not in key:
            finite = np.isfinite(a)
            error = np.abs(a.astype(float) - b)[finite].max(initial=0)
            if error > 1e-5:
                print(f"  {key}: {error:.1e} of {np.abs(a[finite]).max():.1e}")


def save(name: str, arrays: dict[str, np.ndarray]) -> None:
    PLACE.mkdir(exist_ok=True)
    path = PLACE / f"{name}.npz"
    np.savez_compressed(path, **arrays)
    print(path.name, len(arrays), "arrays", path.stat().st_size, "bytes")

"""Arrays in .npz files as this package writes them: no objects, hence no pickle, and not
compressed, hence never larger than the file."""

import os
import zipfile

import numpy as np


def save_arrays(path: str, **arrays: np.ndarray | int) -> None:
    """Writes a file beside its final name first: another process sees the whole of it or nothing.
    Its directory is made.

    Raises:
        OSError: the place cannot be written to; nothing is left there.
    """
    part = f"{path}.{os.getpid()}.part"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        with open(part, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.unlink(part)


def load_arrays(path: str) -> dict[str, np.ndarray] | None:
    """The arrays of a file that `save_arrays` wrote; None if there is none, or it is damaged, or
    somebody else's.

    >>> load_arrays("/no/such.npz") is None
    True
    """
    if not os.path.exists(path):
        return None
    try:
        with zipfile.ZipFile(path) as packed:
            if any(member.compress_type != zipfile.ZIP_STORED for member in packed.infolist()):
                return None
        with np.load(path, allow_pickle=False) as saved:
            return {name: saved[name] for name in saved.files}
    except (
        OSError,
        ValueError,
        EOFError,
        zipfile.BadZipFile,
        KeyError,
        MemoryError,
        NotImplementedError,
    ):
        return None

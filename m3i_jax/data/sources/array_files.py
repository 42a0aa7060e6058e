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
    if not os.path.isfile(path):  # a pipe would be waited for
        return None
    out = {}
    try:
        with zipfile.ZipFile(path) as packed:
            if _count(path) != len(packed.infolist()):
                return None
            for member in packed.infolist():
                if member.compress_type != zipfile.ZIP_STORED:
                    return None
                with packed.open(member) as file:
                    out[member.filename.removesuffix(".npy")] = np.lib.format.read_array(
                        file, allow_pickle=False
                    )
                    # a shape that became smaller; and only at its end is the checksum compared
                    if file.read(1):
                        return None
    except Exception:  # numpy's parser of a damaged header raises whatever Python's does, and a checksum is known only at the end
        return None
    return out


def _count(path: str) -> int:
    """How many members the end of a zip file says that it has. Python's zipfile does not compare it
    with those that it finds, and a damaged entry of the directory may hide others."""
    with open(path, "rb") as file:
        file.seek(-22, os.SEEK_END)  # the record that ends a file without a comment
        end = file.read(22)
    return int.from_bytes(end[10:12], "little") if end[:4] == b"PK\x05\x06" else -1

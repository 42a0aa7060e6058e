"""Arrays on disk without pickled objects: indices of sources, which a later run reads again."""

import os
import zipfile

import numpy as np

from m3i_jax.data.sources.local_files import replace_file


def save_arrays(path: str, **arrays: np.ndarray | int) -> None:
    """Writes arrays to an uncompressed .npz file without pickled objects, atomically. Creates its
    directory.

    Raises:
        OSError: the directory cannot be written to; no partial file is left.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    replace_file(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]


def load_arrays(path: str) -> dict[str, np.ndarray] | None:
    """Reads a file of `save_arrays`; None if it is missing, damaged, or has another layout.

    >>> load_arrays("/no/such.npz") is None
    True
    """
    if not os.path.isfile(path):  # opening a pipe would block
        return None
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            if zip_member_count(path) != len(archive.infolist()):
                return None
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED:
                    return None
                with archive.open(member) as file:
                    arrays[member.filename.removesuffix(".npy")] = np.lib.format.read_array(
                        file, allow_pickle=False
                    )
                    # bytes behind the array: its shape was damaged. Reading to the end also makes
                    # zipfile compare the checksum.
                    if file.read(1):
                        return None
    except Exception:  # numpy's header parser raises many types
        return None
    return arrays


def zip_member_count(path: str) -> int:
    """Returns the member count in the end record of a zip file. Python's zipfile does not compare
    it with the members of the directory, where a damaged entry may hide others."""
    with open(path, "rb") as file:
        file.seek(-22, os.SEEK_END)  # size of the end record of a file without a comment
        end = file.read(22)
    return int.from_bytes(end[10:12], "little") if end[:4] == b"PK\x05\x06" else -1

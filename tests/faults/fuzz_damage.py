"""Damage to files, for the fuzzer: flipped bits, truncation, other content, or no regular file."""

import dataclasses
import os
import pathlib
import random
import shutil
import socket

from hypothesis import strategies as st


@dataclasses.dataclass(frozen=True)
class Damage:
    """One change of one file.

    Attributes:
      kind: one of DAMAGES.
      where: position in the file, from 0 to 1.
      seed: of random bytes.
    """

    kind: str
    where: float
    seed: int


DAMAGES = (
    "flip",
    "flips",
    "cut",
    "empty",
    "garbage",
    "text",
    "repeat",
    "delete",
    "directory",
    "loop",
    "away",
    "fifo",
    "socket",
    "zero",
    "sparse",
    "nested",
    "other",
)


def damages() -> st.SearchStrategy[Damage]:
    return st.builds(Damage, st.sampled_from(DAMAGES), st.floats(0, 1), st.integers(0, 2**31))


def apply(damage: Damage, path: pathlib.Path, others: list[pathlib.Path]) -> None:
    """Change a file, or replace it by something else."""
    rng, content = random.Random(damage.seed), path.read_bytes()
    at = min(int(damage.where * len(content)), max(len(content) - 1, 0))
    kind = damage.kind
    if kind in ("flip", "flips") and content:
        changed = bytearray(content)
        for index in [at] if kind == "flip" else [rng.randrange(len(content)) for _ in range(20)]:
            changed[index] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        return
    replaced = {
        "cut": content[:at],
        "empty": b"",
        "garbage": rng.randbytes(len(content) or 10),
        "text": b"not what it was\n" * 3,
        "repeat": content + content,
        "nested": b"[" * 200_000,
        "other": rng.choice(others).read_bytes() if others else b"x",
    }
    if kind in replaced:
        path.write_bytes(replaced[kind])
        return
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "away":
        path.symlink_to("/etc/hostname")
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        cwd = os.getcwd()
        os.chdir(path.parent)  # the path of a socket has at most 107 characters
        try:
            socket.socket(socket.AF_UNIX).bind(path.name[:100])
        finally:
            os.chdir(cwd)
    elif kind == "sparse":
        with open(path, "wb") as file:
            file.write(content[:512])
            file.truncate(2**40)


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def copy_folder(source: pathlib.Path, target: pathlib.Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)

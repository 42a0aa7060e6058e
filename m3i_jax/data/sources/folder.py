"""Pictures in a directory, as they lie: first-level sub-folders are the categories, NAME.txt beside
an image is its caption."""

import collections
import os
from collections.abc import Iterator

import numpy as np

from m3i_jax.data import decode
from m3i_jax.data.sources import base
from m3i_jax.data.sources.base import EXTENSIONS, FILE_LIMIT, Record
from m3i_jax.errors import UnreadableError, UserError


class FolderSource:
    """A directory of images, searched to any depth. Keys are paths relative to it, with `/` on
    every system.

    Categories are the first-level sub-folders that hold images, sorted, if there are at least two
    of them; an image that lies in none has label -1. Hidden files and folders, links that lead out
    of the directory and files that are no images are never opened.

    Args:
        path: the directory.

    Raises:
        UserError: there is no such directory, or no image in it.

    >>> import tempfile, pathlib
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("cat/a.png", "dog/b.JPG", "dog/b.txt"):
    ...         file = pathlib.Path(folder, name)
    ...         file.parent.mkdir(exist_ok=True)
    ...         _ = file.write_bytes(b"dog, barking")
    ...     source = FolderSource(folder)
    ...     print(len(source), source.classes, source[1])
    2 ('cat', 'dog') Record(key='dog/b.JPG', image=b'dog, barking', label=1, caption=b'dog, barking')
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.expanduser(path)
        if os.path.isfile(self.path):
            hint = (
                "; tar files are read by data.source='tars'" if self.path.endswith(".tar") else ""
            )
            raise UserError(
                f"data.path={path!r} is a file: data.source='folder' needs the directory that holds"
                f" the images{hint}"
            )
        if not os.path.isdir(self.path):
            raise UserError(
                f"data.path={path!r} does not exist: {base.missing_path_error(self.path)}; give the"
                " directory that holds the images"
            )
        self.name = f"folder {path!r}"
        self.note = ""  # what the log adds to the description: see `layout`
        self.ignored: collections.Counter[str] = collections.Counter()
        others: collections.Counter[str] = collections.Counter()
        found, texts = [], set()
        for name, size in files(self.path, self.ignored):
            stem, extension = os.path.splitext(name)
            if extension.lower() in EXTENSIONS:
                found.append((name, size))
            elif extension == ".txt":
                texts.add(stem)
            else:
                others[extension.lower()] += 1
        found.sort()
        if not found:
            raise UserError(f"data.path={path!r} {_emptiness(others, len(texts), self.ignored)}")
        self.ignored["other files"] = others.total()
        self._names = [name for name, _ in found]
        self._captioned = np.array([os.path.splitext(name)[0] in texts for name in self._names])
        tops = [name.split("/", 1)[0] if "/" in name else "" for name in self._names]
        names = sorted(set(tops) - {""})
        # one sub-folder tells nothing apart
        self.classes: tuple[str, ...] = tuple(names) if len(names) > 1 else ()
        number = {name: i for i, name in enumerate(self.classes)}
        self._labels = np.array([number.get(top, -1) for top in tops], np.int32)
        self.captions = bool(self._captioned.any())
        self._fingerprint = base.stable_digest(
            *(f"{name}\0{size}" for name, size in found), self._captioned.tobytes()
        )

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        name = self._names[index]
        return Record(
            name,
            base.read_byte_range(os.path.join(self.path, name)),
            int(self._labels[index]),
            self.caption(index),
        )

    def key(self, index: int) -> str:
        return self._names[index]

    def caption(self, index: int) -> bytes | None:
        """The text beside the image, or None; only as much of it as is ever used."""
        if not self._captioned[index]:
            return None
        path = os.path.join(self.path, os.path.splitext(self._names[index])[0] + ".txt")
        try:
            return base.read_byte_range(
                path, 0, min(os.path.getsize(path), decode.CAPTION_LIMIT + 1)
            )
        except OSError as error:
            raise UnreadableError(
                f"{path!r} cannot be read ({error.strerror}) although it could when the run began;"
                " restore it"
            ) from error

    def fingerprint(self) -> str:
        return self._fingerprint

    def description(self) -> str:
        share = f", captions for {self._captioned.mean():.0%}" if self.captions else ""
        classes = f", {len(self.classes):,} classes" if self.classes else ""
        note = f"; {self.note}" if self.note else ""
        return (
            f"{len(self):,} images in"
            f" {self.name}{classes}{share}{base.format_counts(self.ignored)}{note}"
        )


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is passed over.

    >>> is_hidden(".git"), is_hidden("cat")
    (True, False)
    """
    return name.startswith(".") or name == "__MACOSX"


def files(root: str, ignored: collections.Counter[str]) -> Iterator[tuple[str, int]]:
    """(path relative to root, size) of every readable file that lies inside root, counting what is
    passed over."""
    real = os.path.realpath(root)
    stack: list[tuple[str, tuple[str, ...]]] = [("", (real,))]
    while stack:
        folder, above = stack.pop()
        try:
            entries = list(os.scandir(os.path.join(root, folder)))
        except PermissionError:
            ignored["unreadable"] += 1
            continue
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if is_hidden(entry.name):
                ignored["hidden"] += 1
                continue
            target = ""
            if entry.is_symlink():
                target = os.path.realpath(entry.path)
                if not os.path.exists(target):
                    ignored["broken links"] += 1
                    continue
                if os.path.commonpath((real, target)) != real:
                    ignored["links out of the folder"] += 1
                    continue
            if entry.is_dir():
                inner = target or os.path.join(above[-1], entry.name)
                if inner in above:
                    ignored["links to a folder above"] += 1
                else:
                    stack.append((name, (*above, inner)))
            elif not entry.is_file():
                ignored["special files"] += 1
            elif not os.access(entry.path, os.R_OK):
                ignored["unreadable"] += 1
            elif (size := entry.stat().st_size) > FILE_LIMIT:
                ignored["files over 256 MiB"] += 1
            else:
                yield name, size


def _emptiness(
    others: collections.Counter[str], texts: int, ignored: collections.Counter[str]
) -> str:
    """Why a folder without images has none, as the end of a sentence."""
    count, kinds = others.total() + texts, ", ".join(e[1:] for e in EXTENSIONS)
    if not count and not ignored.total():
        return f"is an empty folder: put images there ({kinds})"
    if not count:
        return f"holds no image ({kinds}){base.format_counts(ignored)}"
    most = others.most_common(1)[0][0] if others else ".txt"
    hint = "; tar files are read by data.source='tars'" if others[".tar"] else ""
    return (
        f"holds {count:,} files but no image ({kinds}), most of them"
        f" {most or 'without extension'}{base.format_counts(ignored)}{hint}"
    )

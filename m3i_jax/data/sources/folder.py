"""Reads a folder of images: first-level sub-folders are the classes, NAME.txt beside an image is
its caption, and sub-folders train/, val/ and test/ are recognised as splits."""

import collections
import hashlib
import os
import stat
from collections.abc import Iterator

import numpy as np

from m3i_jax import progress, schema
from m3i_jax.data import decode
from m3i_jax.data.sources import base, class_names
from m3i_jax.data.sources.base import EXTENSIONS, FILE_LIMIT, Record
from m3i_jax.data.sources.registry import SourceKind, SplitFolders, register_source
from m3i_jax.errors import UserError, is_transient, path_exists

_READABLE = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH
OUTSIDE = "links out of the folder"  # a kind of ignored files
ROLES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class FolderSource:
    """The images of a directory and its sub-folders. Keys are relative paths, with `/` on every
    system.

    Classes are the first-level sub-folders that hold images, sorted; an image outside of them has
    label -1. A single class is one where images are held out by the classes of others, and none of
    a source by itself (`drop_single_class`). Hidden files and folders, links out of the directory
    and files that are not images are never opened.

    Args:
        path: the directory.

    Raises:
        UserError: the directory does not exist or holds no image.

    >>> import tempfile, pathlib
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("cat/a.png", "dog/b.JPG", "dog/b.txt"):
    ...         file = pathlib.Path(folder, name)
    ...         file.parent.mkdir(exist_ok=True)
    ...         _ = file.write_bytes(b"dog, barking")
    ...     source = FolderSource(folder)
    ...     print(len(source), source.classes, source[1].key, source[1].label, source[1].caption)
    2 ('cat', 'dog') dog/b.JPG 1 b'dog, barking'
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
        self.note = ""  # added to the description, see `SplitFolders`
        self.ignored: collections.Counter[str] = collections.Counter()
        others: collections.Counter[str] = collections.Counter()
        images: list[tuple[str, int]] = []
        texts = set[str]()  # names without .txt
        links: dict[str, str] = {}
        listed = files(self.path, self.ignored, links)
        for name, status in progress.track_progress(listed, f"listing {path}", unit="files"):
            stem, extension = os.path.splitext(name)
            if extension.lower() in EXTENSIONS:
                images.append((name, status.st_size))
            elif extension == ".txt":
                texts.add(stem)
            else:
                others[extension.lower()] += 1
        images.sort()
        if not images:
            raise UserError(
                f"data.path={path!r} {_explain_empty(others, len(texts), self.ignored)}"
            )
        self.ignored["other files"] = others.total()
        self._names = [name for name, _ in images]
        self.linked = _count_linked(self._names, links)
        self._captioned = np.array([os.path.splitext(name)[0] in texts for name in self._names])
        tops = [name.split("/", 1)[0] if "/" in name else "" for name in self._names]
        names = sorted(set(tops) - {""})
        self.classes: tuple[str, ...] = tuple(names)
        self.class_ids: tuple[str, ...] = ()  # where other names replace the classes
        number = {name: i for i, name in enumerate(self.classes)}
        self._labels = np.array([number.get(top, -1) for top in tops], np.int32)
        self.captions = bool(self._captioned.any())
        self._fingerprint = base.stable_digest(
            *(f"{name}\0{size}" for name, size in images), self._captioned.tobytes()
        )

    def drop_single_class(self) -> None:
        """Leaves the images without a label if they have one class, which distinguishes nothing."""
        if len(self.classes) == 1:
            self.classes, self.class_ids = (), ()
            self._labels[:] = -1

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

    def extents(self) -> list[tuple[str, int, int]]:
        return [(os.path.realpath(self.path), 0, len(self))]

    def key(self, index: int) -> str:
        return self._names[index]

    def caption(self, index: int) -> bytes | None:
        """Returns the text beside the image, up to the length that is used, or None."""
        if not self._captioned[index]:
            return None
        return base.read_byte_range(self._caption_path(index), limit=decode.CAPTION_LIMIT + 1)

    def _caption_path(self, index: int) -> str:
        return os.path.join(self.path, os.path.splitext(self._names[index])[0] + ".txt")

    def fingerprint(self) -> str:
        return self._fingerprint

    def caption_digest(self) -> str:
        """Returns a digest of the sizes and times of the captions, which may be written anew."""
        digest = hashlib.blake2b(digest_size=8)
        for index in np.flatnonzero(self._captioned).tolist():
            state = os.stat(self._caption_path(index))
            digest.update(
                f"{self._names[index]}\0{state.st_size} {state.st_mtime_ns}\0".encode(
                    "utf-8", "surrogateescape"
                )
            )
        return digest.hexdigest()

    def description(self) -> str:
        share = f", captions for {self._captioned.mean():.0%}" if self.captions else ""
        classes = f", {len(self.classes):,} classes" if self.classes else ""
        note = f"; {self.note}" if self.note else ""
        return (
            f"{len(self):,} images in {self.name}{classes}{share}"
            f"{base.format_links(self.linked)}{base.format_counts(self.ignored)}{note}"
        )


def is_hidden(name: str) -> bool:
    """Returns whether a file or folder of this name is skipped.

    >>> is_hidden(".git"), is_hidden("cat")
    (True, False)
    """
    return name.startswith(".") or name == "__MACOSX"


def files(
    root: str, ignored: collections.Counter[str], links: dict[str, str] | None = None
) -> Iterator[tuple[str, os.stat_result]]:
    """Yields (path relative to root, status) of every readable file inside root; counts the ignored
    ones.

    Args:
        root: a directory.
        ignored: counts what is left out, by reason.
        links: gets {path of a file that is behind a link: path of the file itself}, both relative.

    Raises:
        OSError: a folder or file cannot be listed now, and may be later.
    """
    real = os.path.realpath(root)
    stack: list[tuple[str, tuple[str, ...]]] = [("", (real,))]
    while stack:
        folder, above = stack.pop()
        linked = folder and above[-1] != os.path.join(real, folder)
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
                if not path_exists(target):
                    ignored["broken links"] += 1
                    continue
                if os.path.commonpath((real, target)) != real:
                    ignored[OUTSIDE] += 1
                    continue
            if entry.is_dir():
                inner = target or os.path.join(above[-1], entry.name)
                if inner in above:
                    ignored["links to a folder above"] += 1
                else:
                    stack.append((name, (*above, inner)))
            elif not entry.is_file():
                ignored["special files"] += 1
            elif (status := _readable_status(entry)) is None:
                ignored["unreadable"] += 1
            elif status.st_size > FILE_LIMIT:
                ignored["files over 256 MiB"] += 1
            else:
                if links is not None and (target or linked):
                    own = target or os.path.join(above[-1], entry.name)
                    links[name] = os.path.relpath(own, real)
                yield name, status


def _count_linked(names: list[str], links: dict[str, str]) -> int:
    """Counts the files among some names that are read under another name, too."""
    return len(names) - len({links.get(name, name) for name in names})


def _readable_status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Returns the status of a file; None if this user may not read it, or it is gone.

    Raises:
        OSError: of another kind, which may pass: without the file, a new run would have other data.
    """
    try:
        state = entry.stat()
        # where all may read, no second request is made: over a network, each takes a round trip
        if state.st_mode & _READABLE != _READABLE and not os.access(entry.path, os.R_OK):
            # `os.access` does not say why
            os.close(base.open_nonblocking(entry.path, os.O_RDONLY))
        return state
    except (PermissionError, FileNotFoundError):
        return None


def _explain_empty(
    others: collections.Counter[str], texts: int, ignored: collections.Counter[str]
) -> str:
    """Explains why a folder holds no image, as the end of a sentence."""
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


def find_split_folders(path: str) -> SplitFolders | None:
    """Finds the splits of a folder; None for a folder of images or of classes.

    train/ (or training/) is the training part. val/ (valid/, validation/), or else test/
    (testing/), is held out if it shares a class with train/, or if train/ has no classes. Case is
    ignored.

    Args:
        path: the folder; a missing one is refused by `FolderSource`.

    Raises:
        UserError: there are other folders with images beside the splits, two folders for one split,
            a held-out split without train/, or splits one level further down.

    >>> import tempfile, pathlib
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for name in ("train/cat", "train/dog", "test/dog", "test/cat"):
    ...         (pathlib.Path(root) / name).mkdir(parents=True)
    ...         _ = (pathlib.Path(root) / name / "1.png").write_bytes(b"")
    ...     splits = find_split_folders(root)
    >>> splits.train, splits.held_out
    ('train', 'test')
    """
    root = os.path.expanduser(path)
    names = _folders(root)
    splits = [name for name in names if name.casefold() in ROLES and _has_images(root, name)]
    if not splits:
        _refuse_nested(path, root, names)
        return None
    others = [name for name in names if name not in splits and _has_images(root, name)]
    if others and splits == ["train"] and not _folders(os.path.join(root, "train")):
        return None  # "train" is a class of vehicles
    names_of_splits = _list(splits)
    if others:
        has_train = any(ROLES[name.casefold()] == "train" for name in splits)
        fix = _as_splits(splits) if has_train else f"move {names_of_splits} elsewhere"
        raise UserError(
            f"data.path={path!r} holds {names_of_splits} beside other folders with images"
            f" ({_list(others)}): {fix}, or set data.split=. to read every sub-folder as a category"
        )
    roles: dict[str, list[str]] = collections.defaultdict(list)
    for name in splits:
        roles[ROLES[name.casefold()]].append(name)
    if same_role := next((names for names in roles.values() if len(names) > 1), None):
        raise UserError(
            f"data.path={path!r} holds {_list(same_role)}, two folders for one split:"
            f" {_as_splits(splits)}"
        )
    if not roles["train"]:
        raise UserError(
            f"data.path={path!r} holds {names_of_splits} and no train/: set data.split={splits[0]}"
            f" to train on {splits[0]}/, or data.split=. to train on everything"
        )
    return _choose_splits(root, roles["train"][0], [*roles["val"], *roles["test"]])


def _choose_splits(root: str, train: str, candidates: list[str]) -> SplitFolders:
    categories = set(_folders(os.path.join(root, train)))
    categories = categories if len(categories) > 1 else set()
    matching = [
        name
        for name in candidates
        if not categories or categories & set(_folders(os.path.join(root, name)))
    ]
    held_out = matching[0] if matching else ""
    parts = [
        f"{train}/ is trained on",
        f"{held_out}/ is held out" if held_out else "data.holdout of it is held out",
    ]
    parts += [
        f"{name}/ is not read"
        + ("" if name in matching else f" (none of the categories of {train}/)")
        for name in candidates
        if name != held_out
    ]
    if unused := sum(
        os.path.splitext(entry.name)[1].lower() in EXTENSIONS
        for entry in os.scandir(root)
        if entry.is_file()
    ):
        parts.append(f"{unused:,} images beside them are not read")
    return SplitFolders(train, held_out, f"splits by the names of sub-folders: {', '.join(parts)}")


def _refuse_nested(path: str, root: str, names: list[str]) -> None:
    """Refuses splits below the first level, such as images/train and images/val, which would be
    mixed."""

    def splits(name: str) -> list[str]:
        return [
            split
            for split in ROLES
            if os.path.isdir(os.path.join(root, name, split))
            and _has_images(root, f"{name}/{split}")
        ]

    for name in names:
        if not any(
            os.path.isdir(os.path.join(root, name, train)) for train in ("train", "training")
        ):
            continue
        if len(nested := splits(name)) > 1:
            raise UserError(
                f"data.path={path!r}: its sub-folder {name}/ holds the splits {_list(nested)},"
                f" which would all be trained on: set data.path={os.path.join(path, name)!r}, or"
                " data.split=. to train on everything"
            )


def _as_splits(splits: list[str]) -> str:
    train = next((name for name in splits if ROLES[name.casefold()] == "train"), splits[0])
    held_out = next(
        (
            name
            for name in splits
            if ROLES[name.casefold()] not in ("train", ROLES[train.casefold()])
        ),
        "",
    )
    return f"set data.split={train}" + (f" and data.holdout_split={held_out}" if held_out else "")


def _folders(root: str) -> list[str]:
    """Returns the sorted names of the sub-folders that `FolderSource` enters."""
    real = os.path.realpath(root)
    try:
        entries = [
            entry for entry in os.scandir(root) if entry.is_dir() and not is_hidden(entry.name)
        ]
    except OSError as error:
        if is_transient(error):
            raise
        return []
    return sorted(
        entry.name
        for entry in entries
        if os.path.commonpath((real, os.path.realpath(entry.path))) == real
    )


def folder_with_images(root: str) -> str:
    """Returns the first sub-folder that holds an image, at any level; "" if none does.

    >>> folder_with_images("/no/such/folder")
    ''
    """
    return next((name for name in _folders(root) if _has_images(root, name)), "")


def _has_images(root: str, name: str) -> bool:
    """Returns whether any file below a sub-folder has the name of an image."""
    names = files(os.path.join(root, name), collections.Counter())
    return any(os.path.splitext(file)[1].lower() in EXTENSIONS for file, _ in names)


def _list(names: list[str], most: int = 4) -> str:
    shown = ", ".join(f"{name}/" for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _open(path: str, split: str, data: schema.Data, cache: str) -> FolderSource:
    source = FolderSource(base.split_path(path, split))
    if class_names.are_wordnet_ids(source.classes):
        source.class_ids = source.classes
        source.classes = class_names.names_near_folder(source.path, source.classes)
    return source


register_source(
    SourceKind(
        name="folder",
        open=_open,
        path="the directory that holds the images",
        reads=("class_names",),
        find_splits=find_split_folders,
    )
)

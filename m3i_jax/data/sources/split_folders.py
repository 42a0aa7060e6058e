"""Splits of an image folder, recognised by the names of its sub-folders: train/, val/, test/."""

import collections
import dataclasses
import os

from m3i_jax.data.sources import folder
from m3i_jax.data.sources.base import EXTENSIONS
from m3i_jax.errors import UserError

ROLES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class SplitFolders:
    """train, held_out: sub-folders, `held_out` empty where a share of train/ is to be held out.
    note: the decision, for the log."""

    train: str
    held_out: str
    note: str


def find_split_folders(path: str) -> SplitFolders | None:
    """The splits that a folder holds, or None for a folder of images or of categories.

    train/ (or training/) is trained on. val/ (valid/, validation/), or else test/ (testing/), is
    held out if it has one of the categories of train/, or if train/ has none. Upper and lower case
    are equal.

    Args:
        path: the folder; it may be missing, which is for `Folder` to refuse.

    Raises:
        UserError: splits beside other folders with images, two folders of one role, a held-out
            split without train/, or splits one level further down.

    >>> import tempfile, pathlib
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for name in ("train/cat", "train/dog", "test/dog", "test/cat"):
    ...         (pathlib.Path(root) / name).mkdir(parents=True)
    ...         _ = (pathlib.Path(root) / name / "1.png").write_bytes(b"")
    ...     found = find_split_folders(root)
    >>> found.train, found.held_out
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
        return None  # a category of vehicles
    shown = _list(splits)
    if others:
        trains = any(ROLES[name.casefold()] == "train" for name in splits)
        way = _as_splits(splits) if trains else f"move {shown} elsewhere"
        raise UserError(
            f"data.path={path!r} holds {shown} beside other folders with images ({_list(others)}): "
            f"{way}, or set data.split=. to read every sub-folder as a category"
        )
    roles: dict[str, list[str]] = collections.defaultdict(list)
    for name in splits:
        roles[ROLES[name.casefold()]].append(name)
    if twice := next((same for same in roles.values() if len(same) > 1), None):
        raise UserError(
            f"data.path={path!r} holds {_list(twice)}, two folders for one split:"
            f" {_as_splits(splits)}"
        )
    if not roles["train"]:
        raise UserError(
            f"data.path={path!r} holds {shown} and no train/: set data.split={splits[0]} to train"
            f" on {splits[0]}/, or data.split=. to train on everything"
        )
    return _decide(root, roles["train"][0], [*roles["val"], *roles["test"]])


def _decide(root: str, train: str, candidates: list[str]) -> SplitFolders:
    categories = set(_folders(os.path.join(root, train)))
    categories = categories if len(categories) > 1 else set()
    fit = [
        name
        for name in candidates
        if not categories or categories & set(_folders(os.path.join(root, name)))
    ]
    held_out = fit[0] if fit else ""
    parts = [
        f"{train}/ is trained on",
        f"{held_out}/ is held out" if held_out else "data.holdout of it is held out",
    ]
    parts += [
        f"{name}/ is not read" + ("" if name in fit else f" (none of the categories of {train}/)")
        for name in candidates
        if name != held_out
    ]
    if loose := sum(
        os.path.splitext(entry.name)[1].lower() in EXTENSIONS
        for entry in os.scandir(root)
        if entry.is_file()
    ):
        parts.append(f"{loose:,} images beside them are not read")
    return SplitFolders(train, held_out, f"splits by the names of sub-folders: {', '.join(parts)}")


def _refuse_nested(path: str, root: str, names: list[str]) -> None:
    """Splits below the first level would be mixed, as those of images/train and images/val."""

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
        if len(found := splits(name)) > 1:
            raise UserError(
                f"data.path={path!r}: its sub-folder {name}/ holds the splits {_list(found)}, which"
                f" would all be trained on: set data.path={os.path.join(path, name)!r}, or"
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
    """Names of the sub-folders that `Folder` would enter, sorted."""
    real = os.path.realpath(root)
    try:
        entries = [
            entry
            for entry in os.scandir(root)
            if entry.is_dir() and not folder.is_hidden(entry.name)
        ]
    except OSError:
        return []
    return sorted(
        entry.name
        for entry in entries
        if os.path.commonpath((real, os.path.realpath(entry.path))) == real
    )


def _has_images(root: str, name: str) -> bool:
    """Whether anything below a sub-folder is an image by its name; stops at the first one."""
    files = folder.files(os.path.join(root, name), collections.Counter())
    return any(os.path.splitext(file)[1].lower() in EXTENSIONS for file, _ in files)


def _list(names: list[str], most: int = 4) -> str:
    shown = ", ".join(f"{name}/" for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")

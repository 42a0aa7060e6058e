"""Reads data sets that the Hugging Face `datasets` library saved (`save_to_disk`): memory-mapped
Arrow tables with random access. Images are read as their original bytes (`decode=False`). Nothing
is downloaded, and no code or pickle of the data set is run."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from m3i_jax.data import decode
from m3i_jax.data.sources import base
from m3i_jax.data.sources.base import HandleCache, Record
from m3i_jax.data.sources.captions import caption_texts, first_and_others
from m3i_jax.data.sources.registry import SourceKind, register_source
from m3i_jax.errors import UserError

IMAGES, LABELS, CAPTIONS = (
    ("image", "img", "jpg", "png", "webp"),
    ("label", "labels", "cls"),
    ("caption", "captions", "text", "txt"),
)
KEYS = ("key", "__key__", "id", "file_name", "filename", "image_id")


class HuggingFaceSource:
    """One split of a saved data set.

    The image is the column `image`, `img`, ..., else the only image column; the label is `label`,
    `labels` or `cls`, else the only ClassLabel; the caption is `caption`, `captions`, `text` or
    `txt`; of a list, the first, and retrieval is evaluated with all. The key of a record is its
    `key`, `__key__`, `id` or `file_name` if that is text, else its index.

    Args:
        path: the directory that `save_to_disk` wrote.
        split: name of the split; "" if the data set has none.

    Raises:
        UserError: the package, the data set or the split is missing, or it has no image.
    """

    def __init__(self, path: str, split: str = "") -> None:
        self.path, self._split = os.path.expanduser(path), split
        self._tables = HandleCache()
        table = self._load()
        features = table.features
        kinds = {name: type(feature).__name__ for name, feature in features.items()}
        self._image = base.column(IMAGES, [n for n, kind in kinds.items() if kind == "Image"])
        if self._image is None:
            columns = ", ".join(f"{name} ({kind})" for name, kind in sorted(kinds.items()))
            raise UserError(f"data.path={path!r} has no image: its columns are {columns}")
        class_labels = [n for n, k in kinds.items() if k == "ClassLabel"]
        integers = [n for n, f in features.items() if _dtype(f).startswith(("int", "uint"))]
        # by its name first: the only ClassLabel may be another property of the images
        self._label = next(
            (name for usual in (class_labels, integers) for name in LABELS if name in usual), None
        ) or base.column(LABELS, class_labels)
        self._caption = next(
            (
                n
                for n in CAPTIONS
                if n in kinds and (_dtype(features[n]).endswith("string") or kinds[n] == "List")
            ),
            None,
        )
        self._key = next(
            (name for name in KEYS if _dtype(features.get(name)).endswith("string")), None
        )
        self._length, self.captions = len(table), self._caption is not None
        if not self._length:
            raise UserError(
                f"data.path={path!r} has no records{f' in split {split!r}' if split else ''}"
            )
        if self._label in class_labels:
            self.classes: tuple[str, ...] = tuple(features[self._label].names)
        else:
            labels = table.select_columns([self._label])[:][self._label] if self._label else []
            highest = max(
                (label for x in labels if (label := base.parse_label(x)) is not None), default=-1
            )
            self.classes = tuple(str(i) for i in range(highest + 1))
        self.name = f"hugging_face {path!r}" + (f" ({split})" if split else "")
        self._identity = base.stable_digest(
            "hugging_face", self._saved, self._length, *sorted(kinds), *self.classes
        )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        columns = self._columns("all")[list(indices)]
        return [
            self._record(i, {name: values[row] for name, values in columns.items()})
            for row, i in enumerate(indices)
        ]

    def key(self, index: int) -> str:
        return self._key_of(index, self._columns("key")[index] if self._key else {})

    def caption(self, index: int) -> str | None:
        return next(iter(self.caption_list(index)), None)

    def caption_list(self, index: int) -> tuple[str, ...]:
        return self._captions_of(self._columns("caption")[index]) if self._caption else ()

    def key_hashes(self) -> np.ndarray:
        keys = self._columns("key")[:][self._key] if self._key else [None] * len(self)
        return np.fromiter(
            (base.key_hash(self._key_of(i, {self._key: key})) for i, key in enumerate(keys)),
            np.uint64,
            len(self),
        )

    def fingerprint(self) -> str:
        return self._identity

    def description(self) -> str:
        classes = f", {len(self.classes):,} classes" if self.classes else ""
        return (
            f"{len(self):,} images in {self.name}{classes}{', captions' if self.captions else ''}"
        )

    def _record(self, index: int, row: dict[Any, Any]) -> Record:
        image = row[self._image] or {}
        content = image.get("bytes")
        # saved without embedded files: the path on the machine that saved it
        if content is None and (path := image.get("path")):
            content = (
                base.read_byte_range(path)
                if path.lower().endswith(base.EXTENSIONS) and os.path.isfile(path)
                else b""
            )
        label = base.parse_label(row[self._label]) if self._label else None
        caption, others = first_and_others(self._captions_of(row))
        return Record(
            self._key_of(index, row),
            content or b"",
            -1 if label is None else label,
            caption,
            other_captions=others,
        )

    def _key_of(self, index: int, row: dict[Any, Any]) -> str:
        return row.get(self._key) or str(index)

    def _captions_of(self, row: dict[Any, Any]) -> tuple[str, ...]:
        texts = caption_texts(row.get(self._caption) if self._caption else None)
        return tuple(text[: decode.CAPTION_LIMIT + 1] for text in texts if isinstance(text, str))

    def _columns(self, which: str) -> Any:
        """Returns the table with only the needed columns, opened in this process."""
        return self._tables("tables", self._open)[which]

    def _open(self) -> dict[str, Any]:
        names = {name for name in (self._image, self._label, self._caption, self._key) if name}
        table = self._load().select_columns(sorted(names))
        tables = {"all": table}
        tables |= {"key": table.select_columns([self._key])} if self._key else {}
        tables |= {"caption": table.select_columns([self._caption])} if self._caption else {}
        return tables

    def _load(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise UserError(
                "data.source='hugging_face' needs the package datasets: pip install"
                " 'm3i-jax[huggingface]'"
            ) from None
        if not os.path.isdir(self.path):
            raise UserError(
                f"data.path={self.path!r} does not exist: {base.missing_path_error(self.path)};"
                " give what save_to_disk wrote"
            )
        try:
            loaded = datasets.load_from_disk(self.path)
        except Exception as error:  # another format, damaged, or saved by a newer version
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"data.path={self.path!r} is not a data set that `datasets` saved with save_to_disk"
                f" ({reason})"
            ) from error
        if isinstance(loaded, dict):
            names = ", ".join(sorted(loaded))
            if self._split not in loaded:
                raise UserError(
                    f"data.path={self.path!r} has the splits {names}, data.split={self._split!r} is"
                    " not one of them: choose one"
                )
            loaded = loaded[self._split]
        elif self._split:
            raise UserError(
                f"data.path={self.path!r} has no splits: leave data.split={self._split!r} empty,"
                " data.holdout holds a share out"
            )
        self._saved = str(loaded._fingerprint)
        # one saved with a format, such as torch's, has tensors and perhaps only some columns
        loaded = loaded.with_format(None)
        images = [
            name for name, feature in loaded.features.items() if type(feature).__name__ == "Image"
        ]
        for name in images:
            loaded = loaded.cast_column(name, datasets.Image(decode=False))
        return loaded


def _dtype(feature: Any) -> str:
    return str(getattr(feature, "dtype", ""))


register_source(
    SourceKind(
        name="hugging_face",
        open=lambda path, split, data, cache: HuggingFaceSource(path, split),
        path="the directory that save_to_disk wrote",
        reads=("class_names",),
    )
)

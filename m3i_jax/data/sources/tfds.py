"""Reads data sets that `tensorflow-datasets` has prepared, with random access and without
TensorFlow: its `data_source` returns encoded images (`SkipDecoding`). The files must be ArrayRecord
or parquet."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from m3i_jax.data.sources import base
from m3i_jax.data.sources.base import HandleCache, Record
from m3i_jax.data.sources.captions import caption_texts, first_and_others
from m3i_jax.data.sources.registry import SourceKind, register_source
from m3i_jax.errors import UserError

IMAGES, LABELS, CAPTIONS = ("image",), ("label",), ("caption", "captions", "text")


class TfdsSource:
    """One split of a prepared data set. Nothing is downloaded; `tfds build` prepares a data set.

    The image is the feature `image`, else the only image feature; the label is `label`, else the
    only class label; the caption is `caption`, `captions` (of several columns, as in coco_captions,
    `text`) or `text`; of a list, the first, and retrieval is evaluated with all. The key of a
    record is `SPLIT-INDEX`, since the order of a prepared data set never changes.

    Args:
        path: name in TFDS ("food101", "imagenet2012:5.1.0"), or the directory of one version.
        split: as in TFDS: "train", "train[:10%]", "train+validation".
        directory: of prepared data sets; "" for TFDS's default, `TFDS_DATA_DIR` or
            ~/tensorflow_datasets.

    Raises:
        UserError: the package or the data set is missing; the data set has no random access, no
            such split or no image.
    """

    def __init__(self, path: str, split: str = "train", *, directory: str = "") -> None:
        self._path, self._split, self._directory = path, split, directory
        self._handles = HandleCache()
        builder = self._builder()
        info = builder.info
        try:
            self._length = len(self._data())
        except Exception as error:  # TFDS raises many types, also assertions
            raise self._refusal(builder, error) from error
        if not self._length:
            raise UserError(
                f"tfds {path!r} has no records in split {split!r}: it has"
                f" {', '.join(sorted(info.splits))}"
            )
        features = dict(info.features)
        kinds = {name: type(feature).__name__ for name, feature in features.items()}
        self._image = base.column(IMAGES, [n for n, kind in kinds.items() if kind == "Image"])
        if self._image is None:
            raise UserError(
                f"tfds {path!r} has no image: its features are"
                f" {', '.join(f'{n} ({k})' for n, k in sorted(kinds.items()))}"
            )
        self._label = base.column(LABELS, [n for n, kind in kinds.items() if kind == "ClassLabel"])
        self._caption = next((name for name in CAPTIONS if name in kinds), None)
        self.classes: tuple[str, ...] = tuple(features[self._label].names) if self._label else ()
        self.captions, self.name = self._caption is not None, f"tfds {path!r} ({split})"
        self._identity = base.stable_digest(
            "tfds", info.full_name, split, self._length, *self.classes
        )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        if any(not 0 <= i < self._length for i in indices):
            raise IndexError(
                f"record numbers {min(indices)}..{max(indices)} of {self._length} records"
            )
        examples = self._data().__getitems__(list(indices))
        return [self._record(i, example) for i, example in zip(indices, examples, strict=True)]

    def key(self, index: int) -> str:
        return f"{self._split}-{index}"

    def extents(self) -> list[tuple[str, int, int]]:
        parts = self._builder().info.splits[self._split].file_instructions
        return [(str(p.filename), p.skip, p.skip + p.take) for p in parts]

    def fingerprint(self) -> str:
        return self._identity

    def description(self) -> str:
        classes = f", {len(self.classes):,} classes" if self.classes else ""
        return (
            f"{len(self):,} images in {self.name}{classes}{', captions' if self.captions else ''}"
        )

    def _record(self, index: int, example: dict[Any, Any]) -> Record:
        label = int(example[self._label]) if self._label else -1
        caption = example[self._caption] if self._caption else None
        if isinstance(caption, dict):  # several with other columns, as of coco_captions
            caption = next((caption[name] for name in CAPTIONS if name in caption), None)
        caption, others = first_and_others(caption_texts(caption))
        image = example[self._image]
        return Record(
            self.key(index),
            image if isinstance(image, bytes) else np.asarray(image, np.uint8),
            max(label, -1),
            caption,
            other_captions=others,
        )

    def _builder(self) -> Any:
        try:
            import tensorflow_datasets as tfds
        except ImportError:
            raise UserError(
                "data.source='tfds' needs the package tensorflow-datasets: pip install"
                " 'm3i-jax[tfds]'"
            ) from None
        path = os.path.expanduser(self._path)
        try:
            if os.path.isfile(os.path.join(path, "dataset_info.json")):
                return tfds.builder_from_directory(path)
            return tfds.builder(self._path, data_dir=self._directory or None)
        except Exception as error:  # not registered, a missing package, damaged metadata, ...
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"tfds has no data set {self._path!r} ({type(error).__name__}: {reason}): give its"
                " name and data.directory, where it was prepared, or the directory of one version,"
                " which holds dataset_info.json"
            ) from error

    def _refusal(self, builder: Any, error: Exception) -> UserError:
        """Explains why a builder has no random access, with the command that prepares the data."""
        directory, kind = str(builder.data_dir), getattr(builder.info.file_format, "value", None)
        option = f" --data_dir={self._directory}" if self._directory else ""
        build = f"tfds build {builder.name} --file_format=array_record{option}"
        if not os.path.isfile(os.path.join(directory, "dataset_info.json")):
            return UserError(
                f"tfds {self._path!r} is not prepared in {directory!r}: run `{build}` once, where"
                " TensorFlow is installed"
            )
        if kind not in ("array_record", "parquet"):
            return UserError(
                f"tfds {self._path!r} is prepared as {kind}, which has no random access: run `tfds"
                f" convert_format --dataset_version_dir={directory} --out_file_format=array_record"
                f" --out_dir=NEW/{builder.name}/{builder.version}` where TensorFlow is installed"
                f" and give that directory, or remove {directory!r} and run `{build}`"
            )
        reason = " ".join(str(error).split())[:200]
        return UserError(
            f"tfds {self._path!r} has no split {self._split!r} ({reason}): it has"
            f" {', '.join(sorted(builder.info.splits))}"
        )

    def _data(self) -> Any:
        return self._handles("data", self._open)

    def _open(self) -> Any:
        import tensorflow_datasets as tfds

        builder = self._builder()
        images = [
            name
            for name, feature in dict(builder.info.features or {}).items()
            if type(feature).__name__ == "Image"
        ]
        decoders = {name: tfds.decode.SkipDecoding() for name in images}
        return builder.as_data_source(self._split, decoders=decoders)


register_source(
    SourceKind(
        name="tfds",
        open=lambda path, split, data, cache: TfdsSource(path, split, directory=data.directory),
        path="the name of the data set, such as 'food101', or the directory of its version",
        reads=("class_names", "directory"),
        default_split="train",
    )
)

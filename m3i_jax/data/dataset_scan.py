"""Scans a source before training: decodes every record of a small source, or evenly spread ones of
a large one, by the rules of `decode`, and measures how fast this machine builds batches.

Nothing here is random: except for the speeds, the report is the same on every machine."""

import concurrent.futures
import dataclasses
import hashlib
import io
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from m3i_jax import schema
from m3i_jax.data import annotation_stats, pipeline
from m3i_jax.data import decode as decoding
from m3i_jax.data.sources import base
from m3i_jax.data.tokenizer import Tokenizer
from m3i_jax.errors import UserError

_CHUNK = 32  # records per task of a thread
BatchesOf = Callable[[schema.Config, base.DataSource], pipeline.Batches]
THUMBNAIL = 160  # pixels of the longer side


@dataclasses.dataclass(frozen=True, slots=True)
class RecordInfo:
    """The result of one record. `reason` and `detail` are empty if it is usable; height and width
    are those after the EXIF rotation, 0 if unknown."""

    index: int
    key: str
    kind: str  # format of the file, "array" for pixels
    size: int  # bytes
    content: bytes  # hash of the bytes, 16 long
    reason: str
    detail: str
    height: int
    width: int
    label: int
    caption: str | None
    annotations: annotation_stats.AnnotationInfo | None = None


def spread_indices(total: int, limit: int) -> list[int]:
    """Returns the indices of the records to scan: all, or `limit` of them, evenly spread (i * total
    // limit for i = 0, 1, ...).

    >>> spread_indices(3, 10), spread_indices(10, 4)
    ([0, 1, 2], [0, 2, 5, 7])
    """
    if total <= limit:
        return list(range(total))
    return [i * total // limit for i in range(limit)]


def inspect_record(
    index: int,
    record: base.Record | decoding.BadRecord,
    *,
    background: int = 255,
    map_classes: int = 0,
) -> RecordInfo:
    """Decodes one record completely, as the pipeline does. The key of a record that cannot be read
    is its index. `map_classes` is the number of classes of its map.

    >>> info = inspect_record(3, base.Record("a", b"<html>", caption=" a  cat "))
    >>> info.reason, info.caption
    ('undecodable', 'a cat')
    """
    if isinstance(record, decoding.BadRecord):
        return RecordInfo(
            index, str(index), "", 0, b"", record.reason, record.detail, 0, 0, -1, None
        )
    image = record.image
    raw = image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes()
    kind, reason, detail, height, width = "", "", "", 0, 0
    annotations = None
    try:
        opened = decoding.open_image(image)
        kind, height, width = opened.image.format or "array", opened.height, opened.width
        opened.rgb(background=background)
        annotations = annotation_stats.inspect_annotations(record, map_classes)
    except decoding.BadRecord as error:
        reason, detail = error.reason, error.detail
    content = hashlib.blake2b(raw, digest_size=16).digest()
    caption = decoding.clean_caption(record.caption)
    return RecordInfo(
        index,
        record.key,
        kind,
        len(raw),
        content,
        reason,
        detail,
        height,
        width,
        record.label,
        caption,
        annotations,
    )


def scan_records(
    source: base.DataSource,
    indices: Sequence[int],
    *,
    threads: int,
    background: int = 255,
    missing: str = "stop",
    progress: Callable[[int], None] | None = None,
) -> list[RecordInfo]:
    """Inspects some records on several threads, in the order of the indices. Calls `progress` with
    the number of finished records; for `missing`, see `decode.read_records`.

    >>> records = [base.Record("a", np.zeros((20, 20, 3), np.uint8)), base.Record("b", b"")]
    >>> [info.reason for info in scan_records(records, [0, 1], threads=1)]
    ['', 'empty']
    """

    map_classes = len(base.map_classes(source))

    def inspect(chunk: Sequence[int]) -> list[RecordInfo]:
        return [
            inspect_record(i, record, background=background, map_classes=map_classes)
            for i, record in zip(chunk, decoding.read_records(source, chunk, missing), strict=True)
        ]

    infos: list[RecordInfo] = []
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        pending: list[concurrent.futures.Future[list[RecordInfo]]] = []
        # only a few chunks are in flight, so that an interrupt takes effect soon
        for start in range(0, len(indices) + 4 * threads * _CHUNK, _CHUNK):
            if start < len(indices):
                pending.append(pool.submit(inspect, indices[start : start + _CHUNK]))
            if pending and (start >= len(indices) or len(pending) > 4 * threads):
                infos += pending.pop(0).result()
                if progress:
                    progress(len(infos))
    return infos


def thumbnail(record: base.Record, *, background: int = 255, side: int = THUMBNAIL) -> bytes:
    """Encodes a small JPEG of a record, whose longer side has at most `side` pixels.

    Raises:
        BadRecord: the record is not a usable image.

    >>> jpeg = thumbnail(base.Record("a", np.zeros((20, 400, 3), np.uint8)))
    >>> Image.open(io.BytesIO(jpeg)).size
    (160, 8)
    """
    opened = decoding.open_image(record.image)
    image = opened.rgb(background=background, least=(side, side)).copy()
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


class InMemorySource:
    """A source of records in memory, on which a measured speed is not that of a disk."""

    def __init__(self, records: Sequence[base.Record], like: Any) -> None:
        self._records = records
        self.name, self.classes, self.captions = like.name, like.classes, like.captions
        self.map_classes = base.map_classes(like)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> base.Record:
        return self._records[index]

    def fingerprint(self) -> str:
        return "held"

    def description(self) -> str:
        return f"{len(self)} records in memory"


class ConcatSource:
    """The training part and the held-out part of a run as one source, in this order."""

    def __init__(self, train: base.DataSource, held_out: base.DataSource) -> None:
        self.train, self.held_out = train, held_out
        self.name, self.classes = train.name.removesuffix(" (train)"), train.classes
        self.captions = train.captions or held_out.captions
        self.map_classes = base.map_classes(train)

    def __len__(self) -> int:
        return len(self.train) + len(self.held_out)

    def __getitem__(self, index: int) -> base.Record:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[base.Record]:
        """Reads the training part first, so `indices` must ascend."""
        count = len(self.train)
        first = [i for i in indices if i < count]
        second = [i - count for i in indices if i >= count]
        return [
            *(base.read_items(self.train, first) if first else []),
            *(base.read_items(self.held_out, second) if second else []),
        ]

    def fingerprint(self) -> str:
        return base.stable_digest(self.train.fingerprint(), self.held_out.fingerprint())

    def description(self) -> str:
        return f"trained on: {self.train.description()}; held out: {len(self.held_out):,} images"


@dataclasses.dataclass(frozen=True)
class ReadSpeed:
    """Images per second of processor time of one core, read from memory: for decoding alone at full
    size, and for building batches. `counted` is what the batches counted of so many `samples`, such
    as objects that a crop does not show. `refused`: why the task makes no batches of these data, ""
    if it does."""

    decode: float
    pipeline: float
    images: int  # distinct images that were used
    samples: int = 0
    counted: dict[str, int] = dataclasses.field(default_factory=dict)
    refused: str = ""


def measure_speed(
    config: schema.Config,
    records: Sequence[base.Record],
    like: Any,
    tokenizer: Tokenizer | None,
    *,
    batches_of: BatchesOf | None = None,
    seconds: float = 2.0,
) -> ReadSpeed:
    """Measures both speeds on usable records, each for about `seconds` of processor time of this
    process.

    Args:
        config: of the run, which decides crops, masks and captions; batches have 32 rows, and
            `dense.geometry.repeat` is left out.
        records: usable ones; with fewer than two, the speed of the pipeline is 0.
        like: the source of the records.
        tokenizer: see `pipeline.iterate_batches`.
        batches_of: (config, source) -> batches of the task; None: of masked view pairs.
        seconds: processor time of each measurement.
    """
    if not records:
        return ReadSpeed(0.0, 0.0, 0)
    for record in records[:8]:  # the first calls import and allocate
        decoding.decode_image(record.image)
    decode = _rate(_decode_forever(records), seconds)
    if len(records) < 2:
        return ReadSpeed(decode, 0.0, len(records))
    serial = dataclasses.replace(config.data, threads=0, workers=0, max_bad_share=1.0)
    # repeat factors need the objects of all records, and cost no time of a batch
    geometry = dataclasses.replace(config.dense.geometry, repeat=0.0)
    small = dataclasses.replace(
        config,
        data=serial,
        train=dataclasses.replace(config.train, batch_size=32),
        dense=dataclasses.replace(config.dense, geometry=geometry),
    )
    source = InMemorySource(records, like)
    try:
        batches = (
            batches_of(small, source)
            if batches_of
            else pipeline.iterate_batches(small, source, tokenizer, start=0)
        )
    except UserError as error:  # the report of the data shows more of the cause
        return ReadSpeed(decode, 0.0, len(records), refused=str(error))
    samples: list[int] = []

    def consume() -> Iterator[int]:
        for _ in batches:
            samples.append(len(batches.record))
            yield samples[-1]

    try:
        next(consume())
        rate = _rate(consume(), seconds)
    finally:
        batches.close()
    return ReadSpeed(decode, rate, len(records), sum(samples), batches.noted)


def _decode_forever(records: Sequence[base.Record]) -> Iterator[int]:
    while True:
        for record in records:
            decoding.decode_image(record.image)
            yield 1


def _rate(work: Iterator[int], seconds: float) -> float:
    # processor time of all threads, since the pipeline builds batches in another thread
    start, done = time.process_time(), 0
    while (spent := time.process_time() - start) < seconds or not done:
        done += next(work)
    return done / max(spent, 1e-9)

"""What a source holds, before money is spent on it: every record of a small source, evenly spread
ones of a large one, looked at by the rules of `decoding`, and the speed at which this machine makes
batches of them.

Nothing here is random, so the report of a source is the same on every machine but for its speeds.
"""

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
from m3i_jax.data import decode as decoding
from m3i_jax.data import pipeline
from m3i_jax.data.sources import base
from m3i_jax.data.tokenizer import Tokenizer

_CHUNK = 32  # records a thread takes at once
THUMBNAIL = 160  # pixels, the longer side of an example


@dataclasses.dataclass(frozen=True, slots=True)
class RecordInfo:
    """What one record told: `reason` and `detail` are empty for a good one, sizes are those after
    the EXIF rotation, 0 where unknown."""

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


def spread_indices(total: int, limit: int) -> list[int]:
    """Which records are looked at: all, or `limit` of them, evenly spread: number i * total //
    limit for i = 0, 1, ...

    >>> spread_indices(3, 10), spread_indices(10, 4)
    ([0, 1, 2], [0, 2, 5, 7])
    """
    if total <= limit:
        return list(range(total))
    return [i * total // limit for i in range(limit)]


def inspect_record(
    index: int, record: base.Record | decoding.BadRecord, *, background: int = 255
) -> RecordInfo:
    """Reads one record as the pipeline would, to its last pixel; one that could not be read at all
    has its index for a key.

    >>> inspect_record(3, base.Record("a", b"<html>", caption=" a  cat ")).reason, inspect_record(3, base.Record("a", b"", caption=" a  cat ")).caption
    ('undecodable', 'a cat')
    """
    if isinstance(record, decoding.BadRecord):
        return RecordInfo(
            index, str(index), "", 0, b"", record.reason, record.detail, 0, 0, -1, None
        )
    image = record.image
    raw = image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes()
    kind, reason, detail, height, width = "", "", "", 0, 0
    try:
        opened = decoding.open_image(image)
        kind, height, width = opened.image.format or "array", opened.height, opened.width
        opened.rgb(background=background)
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
    """Looks at some records, on several threads; the result is in the order of the indices.
    `progress` is told how many are done; `missing` is as in `decode.read_records`.

    >>> [seen.reason for seen in scan_records([base.Record("a", np.zeros((20, 20, 3), np.uint8)), base.Record("b", b"")], [0, 1], threads=1)]
    ['', 'empty']
    """

    def part(some: Sequence[int]) -> list[RecordInfo]:
        return [
            inspect_record(i, record, background=background)
            for i, record in zip(some, decoding.read_records(source, some, missing), strict=True)
        ]

    out: list[RecordInfo] = []
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        waiting: list[concurrent.futures.Future[list[RecordInfo]]] = []
        # a few chunks in flight, so that a stop is a stop
        for at in range(0, len(indices) + 4 * threads * _CHUNK, _CHUNK):
            if at < len(indices):
                waiting.append(pool.submit(part, indices[at : at + _CHUNK]))
            if waiting and (at >= len(indices) or len(waiting) > 4 * threads):
                out += waiting.pop(0).result()
                if progress:
                    progress(len(out))
    return out


def thumbnail(record: base.Record, *, background: int = 255, side: int = THUMBNAIL) -> bytes:
    """A small JPEG of a good record, the longer side at most `side` pixels.

    Raises:
        BadRecord: the record is no usable image.

    >>> Image.open(io.BytesIO(thumbnail(base.Record("a", np.zeros((20, 400, 3), np.uint8))))).size
    (160, 8)
    """
    opened = decoding.open_image(record.image)
    image = opened.rgb(background=background, least=(side, side))
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


class InMemorySource:
    """Records in memory as a source, so that a speed measured on them is not that of a disk."""

    def __init__(self, held: Sequence[base.Record], like: Any) -> None:
        self._held, self.name, self.classes, self.captions = (
            held,
            like.name,
            like.classes,
            like.captions,
        )

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, index: int) -> base.Record:
        return self._held[index]

    def fingerprint(self) -> str:
        return "held"

    def description(self) -> str:
        return f"{len(self)} records in memory"


class ConcatSource:
    """What a run trains on and what it holds out, as one source: first all of the one, then all of
    the other."""

    def __init__(self, train: base.DataSource, held_out: base.DataSource) -> None:
        self.train, self.held_out = train, held_out
        self.name, self.classes = train.name.removesuffix(" (train)"), train.classes
        self.captions = train.captions or held_out.captions

    def __len__(self) -> int:
        return len(self.train) + len(self.held_out)

    def __getitem__(self, index: int) -> base.Record:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[base.Record]:
        """Of the training part first, so `indices` must ascend."""
        count = len(self.train)
        first, second = (
            [i for i in indices if i < count],
            [i - count for i in indices if i >= count],
        )
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
    """Pictures a second of one core's processor time, from memory: decoding alone at full size, and
    the whole making of batches."""

    decode: float
    pipeline: float
    pictures: int  # different ones that were used


def measure_speed(
    config: schema.Config,
    held: Sequence[base.Record],
    like: Any,
    tokenizer: Tokenizer | None,
    *,
    seconds: float = 2.0,
) -> ReadSpeed:
    """Measures both speeds on good records, each for about `seconds` of this process's processor
    time.

    Args:
        config: of the run: crops, masks and captions are made as it says, in batches of 32.
        held: good records; fewer than two give no pipeline.
        like: the source they are from.
        tokenizer: as for `pipeline.iterate_batches`.
        seconds: processor time for each.
    """
    if not held:
        return ReadSpeed(0.0, 0.0, 0)
    for record in held[:8]:  # first calls import and allocate
        decoding.decode_image(record.image)
    decode = _rate(_each(held), seconds)
    if len(held) < 2:
        return ReadSpeed(decode, 0.0, len(held))
    plain = dataclasses.replace(config.data, threads=0, workers=0, max_bad_share=1.0)
    small = dataclasses.replace(
        config, data=plain, train=dataclasses.replace(config.train, batch_size=32)
    )
    batches = pipeline.iterate_batches(small, InMemorySource(held, like), tokenizer, start=0)
    try:
        next(batches)
        made = _rate((len(batch["label"]) for batch in batches), seconds)
    finally:
        batches.close()
    return ReadSpeed(decode, made, len(held))


def _each(held: Sequence[base.Record]) -> Iterator[int]:
    while True:
        for record in held:
            decoding.decode_image(record.image)
            yield 1


def _rate(work: Iterator[int], seconds: float) -> float:
    # of all threads: the pipeline makes its batches in one of its own
    start, done = time.process_time(), 0
    while (spent := time.process_time() - start) < seconds or not done:
        done += next(work)
    return done / max(spent, 1e-9)

"""What a source holds, before money is spent on it: every record of a small source, evenly spread ones of a large one, looked at by the
rules of `records`, and the speed at which this machine makes batches of them.

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
from m3i_jax.data import pipeline, records, sources
from m3i_jax.data.tokenizer import Tokenizer

_CHUNK = 32  # records a thread takes at once
THUMBNAIL = 160  # pixels, the longer side of an example


@dataclasses.dataclass(frozen=True, slots=True)
class Seen:
    """What one record told: `reason` and `detail` are empty for a good one, sizes are those after the EXIF rotation, 0 where unknown."""

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


def chosen(total: int, limit: int) -> list[int]:
    """Which records are looked at: all, or `limit` of them, evenly spread: number i * total // limit for i = 0, 1, ...

    >>> chosen(3, 10), chosen(10, 4)
    ([0, 1, 2], [0, 2, 5, 7])
    """
    if total <= limit:
        return list(range(total))
    return [i * total // limit for i in range(limit)]


def look(index: int, record: sources.Record | records.BadRecord, *, background: int = 255) -> Seen:
    """Reads one record as the pipeline would, to its last pixel; one that could not be read at all has its index for a key.

    >>> look(3, sources.Record("a", b"<html>", caption=" a  cat ")).reason, look(3, sources.Record("a", b"", caption=" a  cat ")).caption
    ('undecodable', 'a cat')
    """
    if isinstance(record, records.BadRecord):
        return Seen(index, str(index), "", 0, b"", record.reason, record.detail, 0, 0, -1, None)
    image = record.image
    raw = image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes()
    kind, reason, detail, height, width = "", "", "", 0, 0
    try:
        opened = records.open_picture(image)
        kind, height, width = opened.image.format or "array", opened.height, opened.width
        opened.rgb(background=background)
    except records.BadRecord as error:
        reason, detail = error.reason, error.detail
    content = hashlib.blake2b(raw, digest_size=16).digest()
    caption = records.clean_caption(record.caption)
    return Seen(index, record.key, kind, len(raw), content, reason, detail, height, width, record.label, caption)


def scan(
    source: sources.Source,
    indices: Sequence[int],
    *,
    threads: int,
    background: int = 255,
    missing: str = "stop",
    progress: Callable[[int], None] | None = None,
) -> list[Seen]:
    """Looks at some records, on several threads; the result is in the order of the indices. `progress` is told how many are done;
    `missing` is as in `records.read`.

    >>> [seen.reason for seen in scan([sources.Record("a", np.zeros((20, 20, 3), np.uint8)), sources.Record("b", b"")], [0, 1], threads=1)]
    ['', 'empty']
    """

    def part(some: Sequence[int]) -> list[Seen]:
        return [look(i, record, background=background) for i, record in zip(some, records.read(source, some, missing), strict=True)]

    out: list[Seen] = []
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        waiting: list[concurrent.futures.Future[list[Seen]]] = []
        for at in range(0, len(indices) + 4 * threads * _CHUNK, _CHUNK):  # a few chunks in flight, so that a stop is a stop
            if at < len(indices):
                waiting.append(pool.submit(part, indices[at : at + _CHUNK]))
            if waiting and (at >= len(indices) or len(waiting) > 4 * threads):
                out += waiting.pop(0).result()
                if progress:
                    progress(len(out))
    return out


def thumbnail(record: sources.Record, *, background: int = 255, side: int = THUMBNAIL) -> bytes:
    """A small JPEG of a good record, the longer side at most `side` pixels.

    Raises:
        BadRecord: the record is no usable picture.

    >>> Image.open(io.BytesIO(thumbnail(sources.Record("a", np.zeros((20, 400, 3), np.uint8))))).size
    (160, 8)
    """
    opened = records.open_picture(record.image)
    image = opened.rgb(background=background, least=(side, side))
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


class Held:
    """Records in memory as a source, so that a speed measured on them is not that of a disk."""

    def __init__(self, held: Sequence[sources.Record], like: Any) -> None:
        self._held, self.name, self.classes, self.captions = held, like.name, like.classes, like.captions

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, index: int) -> sources.Record:
        return self._held[index]

    def fingerprint(self) -> str:
        return "held"

    def description(self) -> str:
        return f"{len(self)} records in memory"


class Both:
    """What a run trains on and what it holds out, as one source: first all of the one, then all of the other."""

    def __init__(self, train: sources.Source, held_out: sources.Source) -> None:
        self.train, self.held_out = train, held_out
        self.name, self.classes = train.name.removesuffix(" (train)"), train.classes
        self.captions = train.captions or held_out.captions

    def __len__(self) -> int:
        return len(self.train) + len(self.held_out)

    def __getitem__(self, index: int) -> sources.Record:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[sources.Record]:
        """Of the training part first, so `indices` must ascend."""
        count = len(self.train)
        first, second = [i for i in indices if i < count], [i - count for i in indices if i >= count]
        return [*(sources.read(self.train, first) if first else []), *(sources.read(self.held_out, second) if second else [])]

    def fingerprint(self) -> str:
        return sources.digest(self.train.fingerprint(), self.held_out.fingerprint())

    def description(self) -> str:
        return f"trained on: {self.train.description()}; held out: {len(self.held_out):,} pictures"


@dataclasses.dataclass(frozen=True)
class Speed:
    """Pictures a second of one core's processor time, from memory: decoding alone at full size, and the whole making of batches."""

    decode: float
    pipeline: float
    pictures: int  # different ones that were used


def speed(config: schema.Config, held: Sequence[sources.Record], like: Any, tokenizer: Tokenizer | None, *, seconds: float = 2.0) -> Speed:
    """Measures both speeds on good records, each for about `seconds` of this process's processor time.

    Args:
        config: of the run: crops, masks and captions are made as it says, in batches of 32.
        held: good records; fewer than two give no pipeline.
        like: the source they are from.
        tokenizer: as for `pipeline.iterate`.
        seconds: processor time for each.
    """
    if not held:
        return Speed(0.0, 0.0, 0)
    for record in held[:8]:  # first calls import and allocate
        records.decode(record.image)
    decode = _rate(_each(held), seconds)
    if len(held) < 2:
        return Speed(decode, 0.0, len(held))
    plain = dataclasses.replace(config.data, threads=0, workers=0, max_bad_share=1.0)
    small = dataclasses.replace(config, data=plain, train=dataclasses.replace(config.train, batch_size=32))
    batches = pipeline.iterate(small, Held(held, like), tokenizer, start=0)
    try:
        next(batches)
        made = _rate((len(batch["label"]) for batch in batches), seconds)
    finally:
        batches.close()
    return Speed(decode, made, len(held))


def _each(held: Sequence[sources.Record]) -> Iterator[int]:
    while True:
        for record in held:
            records.decode(record.image)
            yield 1


def _rate(work: Iterator[int], seconds: float) -> float:
    start, done = time.process_time(), 0  # of all threads: the pipeline makes its batches in one of its own
    while (spent := time.process_time() - start) < seconds or not done:
        done += next(work)
    return done / max(spent, 1e-9)

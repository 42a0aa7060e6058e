"""One host batch, as a pure function of its number: what a thread or a worker process of the
pipeline does."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from m3i_jax import schema
from m3i_jax.data import crops, decode, rand_augment, sampler, shared_buffers
from m3i_jax.data.sources import base
from m3i_jax.data.sources.base import DataSource
from m3i_jax.data.tokenizer import Tokenizer
from m3i_jax.errors import UnreadableError, UserError
from m3i_jax.objective import masks, rng

TRIES = 100  # bad records in a row at one position before the run stops
# counted beside the bad records: nothing is cut or dropped in silence
NOTES = ("caption_cut", "label_dropped")
_READ = 64  # records held encoded at a time
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchBuilder:
    """Makes batch k of one host. Sent to worker processes: holds paths and small arrays, no open
    file, and nothing of JAX.

    The batch is the dict of `iterate`, and with it, for the iterator: `skipped` int64
    [len(REASONS)] bad records drawn, `example` int64 [len(REASONS)] index of one of them or -1,
    `noted` int64 [len(NOTES)], `record` int64 [rows] which record each row shows."""

    data: schema.Data
    seed: int
    grid: int  # patches a side, and of a mask cell
    cell: int
    hidden: int
    source: DataSource
    tokenizer: Tokenizer | None
    classes: int
    rows: int  # of this host
    batch: int  # of all hosts
    first: int  # position of this host's first row in batch 0
    resizer: str
    views: tuple[int, ...]  # that are cut; another one is black
    # of a worker process, or of threads of this one
    borrower: shared_buffers.BufferWriter | shared_buffers.ThreadBufferPool

    def __call__(self, k: int) -> dict[str, Any]:
        shape, first = (
            (
                self.rows,
                2,
                self.data.image_size,
                self.data.image_size,
                3,
            ),
            self.first + int(k) * self.batch,
        )
        with self.borrower.lend(shape) as (sent, pixels):
            return {"views": sent, **self._fill(first, pixels)}

    def _fill(self, first: int, pixels: np.ndarray) -> Batch:
        positions = first + np.arange(self.rows, dtype=np.int64)
        batch = {
            "box": np.empty((self.rows, 2, 4), np.float32),
            "flip": np.empty((self.rows, 2), bool),
            "label": np.empty(self.rows, np.int32),
            "mask": self._mask(first),
            "position": np.stack([positions >> 32, positions & 0xFFFFFFFF], 1).astype(np.uint32),
            "skipped": np.zeros(len(decode.REASONS), np.int64),
            "example": np.full(len(decode.REASONS), -1, np.int64),
            "noted": np.zeros(len(NOTES), np.int64),
        }
        if self.tokenizer:
            batch["tokens"] = np.zeros((self.rows, self.tokenizer.length), np.int32)
            batch["length"] = np.zeros(self.rows, np.int32)
        chosen = sampler.records_at(self.source, self.seed, positions)
        u = rng.uniforms(self.seed, rng.CROP, first, self.rows, 2 * crops.WIDTH).reshape(
            self.rows, 2, crops.WIDTH
        )
        if count := rand_augment.WIDTH * self.data.rand_augment.ops:
            more = rng.uniforms(
                self.seed, rng.RAND_AUGMENT, first, self.rows, 2 * count
            ).reshape(self.rows, 2, count)
            u = np.concatenate([u, more], -1)
        for at in range(0, self.rows, _READ):
            rows = range(at, min(at + _READ, self.rows))
            for row, found in zip(
                rows,
                decode.read_records(self.source, chosen[rows].tolist(), self.data.missing),
                strict=True,
            ):
                used = self._picture(
                    found,
                    row,
                    u[row].tolist(),
                    int(positions[row]),
                    chosen,
                    pixels[row].reshape(2, -1),
                    batch,
                )
                self._meaning(used, row, batch)
        return {**batch, "record": chosen}

    def _picture(
        self,
        found: base.Record | decode.BadRecord,
        row: int,
        u: list[list[float]],
        position: int,
        chosen: np.ndarray,
        pixels: np.ndarray,
        batch: Batch,
    ) -> base.Record:
        """Fills the row with the first usable record at this position, and returns that record."""
        tried, last = collections.defaultdict[str, list[str]](list), ""
        for attempt in range(TRIES):
            if attempt:
                chosen[row] = sampler.records_at(
                    self.source, self.seed, np.array([position]), attempt
                )[0]
            if row % 2 and chosen[row] == chosen[row - 1]:
                # an image is not mixed with itself: the turn of the epoch, or a replacement
                continue
            if attempt:
                (found,) = decode.read_records(self.source, [int(chosen[row])], self.data.missing)
            try:
                if isinstance(found, decode.BadRecord):
                    raise found
                self._views(found, u, pixels, batch["box"][row], batch["flip"][row])
                return found
            except decode.BadRecord as error:
                name = (
                    record_key(self.source, int(chosen[row]))
                    if isinstance(found, decode.BadRecord)
                    else found.key
                )
                last, reason = (
                    f"; the last is {name!r} ({error})",
                    decode.REASONS.index(error.reason),
                )
                batch["skipped"][reason] += 1
                batch["example"][reason] = chosen[row]
                tried[error.reason].append(repr(name))
        why = (
            summarize_bad_records({reason: (len(keys), keys) for reason, keys in tried.items()})
            + last
        )
        raise UserError(
            f"{TRIES} draws in a row at position {position} of {self.source.name} gave no image"
            f" that could be used beside its partner: {why or 'there is only one'}; check the"
            " source"
        )

    def _views(
        self,
        record: base.Record,
        u: list[list[float]],
        pixels: np.ndarray,
        box: np.ndarray,
        flip: np.ndarray,
    ) -> None:
        """Decodes once, cuts the views. u is [2][WIDTH + more]: 22 numbers for the box, one for the
        flip, and those of RandAugment."""
        data, by = self.data, self.data.rand_augment
        opened = (decode.open_image if self.resizer == "pillow" else decode.open_jpeg_fast)(
            record.image
        )
        height, width = opened.height, opened.width
        boxes = [
            crops.crop_box(
                u[v], height, width, scale=_pair(data.crop_scale), ratio=_pair(data.crop_ratio)
            )
            for v in range(2)
        ]
        least = crops.sufficient_size(
            [boxes[v] for v in self.views], height, width, data.image_size, decode.GAP
        )
        image = opened.rgb(background=data.background, least=least)
        for v in range(2):
            box[v], flip[v] = boxes[v], u[v][22] < data.flip_p
            if v not in self.views:
                pixels[v] = 0
                continue
            crops.cut_view(
                image,
                boxes[v],
                data.image_size,
                height=height,
                width=width,
                by=self.resizer,
                out=pixels[v],
            )
            if by.ops:
                pixels[v] = rand_augment.apply_operations(
                    pixels[v], data.image_size, u[v][crops.WIDTH :], by
                )

    def _meaning(self, record: base.Record, row: int, batch: Batch) -> None:
        dropped = self.classes > 0 and record.label >= self.classes
        batch["label"][row] = record.label if 0 <= record.label < self.classes else -1
        batch["noted"][NOTES.index("label_dropped")] += dropped
        if self.tokenizer and (text := decode.clean_caption(record.caption)):
            ids = self.tokenizer.ids(text, cleaned=True)
            batch["tokens"][row], batch["length"][row] = self.tokenizer.frame(ids)
            batch["noted"][NOTES.index("caption_cut")] += len(ids) > self.tokenizer.length - 2

    def _mask(self, first: int) -> np.ndarray:
        draw = masks.blockwise if self.data.mask == "blockwise" else masks.uniform
        cells = draw(
            self.seed,
            first,
            self.rows,
            grid=self.grid // self.cell,
            hidden=self.hidden // self.cell**2,
        )
        return masks.upsample_masks(cells, self.cell)


def record_key(source: DataSource, index: int) -> str:
    """The key of a record that may be gone."""
    try:
        return base.source_key(source, index)
    except UnreadableError:
        return str(index)


def summarize_bad_records(bad: dict[str, tuple[int, list[str]]]) -> str:
    """How many records were bad for what reason, the most frequent first, with a few keys."""
    worst = sorted(((n, reason, keys) for reason, (n, keys) in bad.items() if n), reverse=True)
    return "; ".join(
        f"{n:,} {reason} (such as {', '.join(list(dict.fromkeys(keys))[:3])})"
        for n, reason, keys in worst
    )


def _pair(values: Sequence[float]) -> tuple[float, float]:
    return values[0], values[1]

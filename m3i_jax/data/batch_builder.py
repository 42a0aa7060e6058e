"""Builds one host batch as a pure function of its number, in a thread or a worker process of the
pipeline."""

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

TRIES = 100  # bad records in a row at one position after which the run stops
# counted in addition to the bad records, so that every cut and every drop is logged
NOTES = ("caption_cut", "label_dropped")
_READ_SIZE = 64  # encoded records in memory at a time
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchBuilder:
    """Builds batch k of one host. Pickled to worker processes, so it holds paths and small arrays,
    no open file and nothing of JAX.

    The batch is the dict of `pipeline.iterate_batches`, with four more arrays for the iterator:
    `skipped` int64 [len(REASONS)], bad records drawn; `example` int64 [len(REASONS)], index of one
    of them or -1; `noted` int64 [len(NOTES)]; `record` int64 [rows], the record of each row."""

    data: schema.Data
    seed: int
    grid: int  # patches per side
    cell: int  # patches per side of a mask cell
    hidden: int  # patches that show the partner
    source: DataSource
    tokenizer: Tokenizer | None
    classes: int
    rows: int  # on this host
    batch: int  # rows on all hosts
    first: int  # position of this host's first row in batch 0
    resizer: str
    views: tuple[int, ...]  # that are cut; the others are black
    # memory of a worker process, or of threads of this process
    buffers: shared_buffers.BufferWriter | shared_buffers.ThreadBufferPool

    def __call__(self, k: int) -> dict[str, Any]:
        size = self.data.image_size
        first = self.first + int(k) * self.batch
        with self.buffers.lend((self.rows, 2, size, size, 3)) as (handle, views_Bx2xSxSx3):
            return {"views": handle, **self._fill(first, views_Bx2xSxSx3)}

    def _fill(self, first: int, views_Bx2xSxSx3: np.ndarray) -> Batch:
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
        indices = sampler.records_at(self.source, self.seed, positions)
        u = rng.uniforms(self.seed, rng.CROP, first, self.rows, 2 * crops.WIDTH).reshape(
            self.rows, 2, crops.WIDTH
        )
        if count := rand_augment.WIDTH * self.data.rand_augment.ops:
            augment_u = rng.uniforms(
                self.seed, rng.RAND_AUGMENT, first, self.rows, 2 * count
            ).reshape(self.rows, 2, count)
            u = np.concatenate([u, augment_u], -1)
        for start in range(0, self.rows, _READ_SIZE):
            rows = range(start, min(start + _READ_SIZE, self.rows))
            records = decode.read_records(self.source, indices[rows].tolist(), self.data.missing)
            for row, record in zip(rows, records, strict=True):
                used = self._fill_views(
                    record,
                    row,
                    u[row].tolist(),
                    int(positions[row]),
                    indices,
                    views_Bx2xSxSx3[row].reshape(2, -1),
                    batch,
                )
                self._fill_annotations(used, row, batch)
        return {**batch, "record": indices}

    def _fill_views(
        self,
        record: base.Record | decode.BadRecord,
        row: int,
        u: list[list[float]],
        position: int,
        indices: np.ndarray,
        views_2xP: np.ndarray,
        batch: Batch,
    ) -> base.Record:
        """Fills the views of a row from the first usable record at its position; returns the
        record."""
        bad_keys, last_error = collections.defaultdict[str, list[str]](list), ""
        for attempt in range(TRIES):
            if attempt:
                indices[row] = sampler.records_at(
                    self.source, self.seed, np.array([position]), attempt
                )[0]
            if row % 2 and indices[row] == indices[row - 1]:
                # An image is not mixed with itself. Equal neighbours occur where an epoch ends, or
                # by a replacement.
                continue
            if attempt:
                (record,) = decode.read_records(self.source, [int(indices[row])], self.data.missing)
            try:
                if isinstance(record, decode.BadRecord):
                    raise record
                self._cut_views(record, u, views_2xP, batch["box"][row], batch["flip"][row])
                return record
            except decode.BadRecord as error:
                key = (
                    record_key(self.source, int(indices[row]))
                    if isinstance(record, decode.BadRecord)
                    else record.key
                )
                last_error = f"; the last is {key!r} ({error})"
                reason = decode.REASONS.index(error.reason)
                batch["skipped"][reason] += 1
                batch["example"][reason] = indices[row]
                bad_keys[error.reason].append(repr(key))
        counts = {reason: (len(keys), keys) for reason, keys in bad_keys.items()}
        why = summarize_bad_records(counts) + last_error
        raise UserError(
            f"{TRIES} draws in a row at position {position} of {self.source.name} gave no image"
            f" that could be used beside its partner: {why or 'the source has only one'}; check"
            " the source"
        )

    def _cut_views(
        self,
        record: base.Record,
        u: list[list[float]],
        views_2xP: np.ndarray,
        box: np.ndarray,
        flip: np.ndarray,
    ) -> None:
        """Decodes a record once and cuts its views. u is [2][WIDTH or more]: 22 uniforms for the
        box, one for the flip, and those of RandAugment."""
        data = self.data
        open_image = decode.open_image if self.resizer == "pillow" else decode.open_jpeg_fast
        opened = open_image(record.image)
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
                views_2xP[v] = 0
                continue
            crops.cut_view(
                image,
                boxes[v],
                data.image_size,
                height=height,
                width=width,
                by=self.resizer,
                out=views_2xP[v],
            )
            if data.rand_augment.ops:
                views_2xP[v] = rand_augment.apply_operations(
                    views_2xP[v], data.image_size, u[v][crops.WIDTH :], data.rand_augment
                )

    def _fill_annotations(self, record: base.Record, row: int, batch: Batch) -> None:
        """Fills the label and the caption of a row."""
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
    """Returns the key of a record, or its index if the record can no longer be read."""
    try:
        return base.source_key(source, index)
    except UnreadableError:
        return str(index)


def summarize_bad_records(bad: dict[str, tuple[int, list[str]]]) -> str:
    """Formats the counts of bad records by reason, the most frequent first, with a few keys each.

    >>> summarize_bad_records({"empty": (1, ["'a'"]), "truncated": (2, ["'b'", "'c'"])})
    "2 truncated (such as 'b', 'c'); 1 empty (such as 'a')"
    """
    rows = sorted(((n, reason, keys) for reason, (n, keys) in bad.items() if n), reverse=True)
    return "; ".join(
        f"{n:,} {reason} (such as {', '.join(list(dict.fromkeys(keys))[:3])})"
        for n, reason, keys in rows
    )


def _pair(values: Sequence[float]) -> tuple[float, float]:
    return values[0], values[1]

"""What every builder of batches shares: the records at the positions of a batch, the replacement of
bad ones, and the counts that travel inside the batch. A task derives its builder from this one and
says which arrays a batch has and how a record fills a row of them."""

import abc
import collections
import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from m3i_jax import schema
from m3i_jax.data import decode, sampler, shared_buffers
from m3i_jax.data.sources import base
from m3i_jax.data.sources.base import DataSource
from m3i_jax.errors import TransientError, UnreadableError, UserError

TRIES = 100  # bad records in a row at one position after which the run stops
_READ_SIZE = 64  # encoded records in memory at a time
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordBatchBuilder(abc.ABC):
    """Builds batch k of one host. Pickled to worker processes, so it holds paths and small arrays,
    no open file and nothing of JAX.

    A batch is a pure function of (seed, positions): row r of batch k is the sample at position
    first + k * batch + r, and all its random numbers are keyed by that position. A batch has the
    arrays of `large` and `arrays`, and five more: `position` uint32 [rows, 2], high and low word;
    and for the iterator, `skipped` int64 [len(reasons)], bad records drawn; `example` int64
    [len(reasons)], index of one of them or -1; `noted` int64 [len(notes)]; `record` int64 [rows],
    the record of each row.

    Attributes:
        reasons: why a record may be bad; the `reason` of every BadRecord that `fill_row` raises.
        notes: what is counted beside the bad records, such as cut captions.
        purpose: what a usable record could not be used for, as the end of an error message.
    """

    reasons: ClassVar[tuple[str, ...]] = decode.REASONS
    notes: ClassVar[tuple[str, ...]] = ()
    purpose: ClassVar[str] = "that could be used"

    data: schema.Data
    seed: int
    source: DataSource
    rows: int  # on this host
    batch: int  # rows on all hosts
    first: int  # position of this host's first row in batch 0
    # memory of a worker process, or of threads of this process
    buffers: shared_buffers.BufferWriter | shared_buffers.ThreadBufferPool = dataclasses.field(
        default_factory=shared_buffers.ThreadBufferPool
    )

    @abc.abstractmethod
    def large(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the uint8 arrays that live in recycled memory. Their content is
        undefined before `fill_row`, which writes every element of its row."""

    def large_at(self, first: int) -> dict[str, tuple[int, ...]]:
        """Returns `large` of the batch whose first row here has position `first`. A builder whose
        batches differ in size gives here its own, and in `large` the largest."""
        del first
        return self.large()

    @abc.abstractmethod
    def arrays(self, first: int) -> Batch:
        """Returns the other arrays of a batch, before its rows are filled."""

    @abc.abstractmethod
    def uniforms(self, first: int) -> np.ndarray:
        """Returns the random numbers of a batch that begins at position `first`, [rows, ...]."""

    @abc.abstractmethod
    def fill_row(self, record: base.Record, row: int, u: np.ndarray, batch: Batch) -> None:
        """Fills a row of all arrays from a record and the random numbers of its position.

        Called again for another record after a BadRecord, so it counts (`count`) last.

        Raises:
            BadRecord: the record cannot be used; it is counted and replaced.
        """

    def usable(self, row: int, indices: np.ndarray) -> bool:
        """Returns whether record `indices[row]` may be in its row beside those above; else another
        one is drawn, without a count."""
        del row, indices
        return True

    def count(self, batch: Batch, note: str, number: int = 1) -> None:
        """Adds to one of the `notes`."""
        batch["noted"][self.notes.index(note)] += number

    def __call__(self, k: int) -> dict[str, Any]:
        first, largest = self.first + int(k) * self.batch, self.large()
        with contextlib.ExitStack() as lent:
            pairs = {
                name: lent.enter_context(self.buffers.lend(shape, math.prod(largest[name])))
                for name, shape in self.large_at(first).items()
            }
            batch = self._fill(first, {name: array for name, (_, array) in pairs.items()})
            return {**batch, **{name: handle for name, (handle, _) in pairs.items()}}

    def _fill(self, first: int, large: Batch) -> Batch:
        positions = first + np.arange(self.rows, dtype=np.int64)
        batch = {
            **large,
            **self.arrays(first),
            "position": np.stack([positions >> 32, positions & 0xFFFFFFFF], 1).astype(np.uint32),
            "skipped": np.zeros(len(self.reasons), np.int64),
            "example": np.full(len(self.reasons), -1, np.int64),
            "noted": np.zeros(len(self.notes), np.int64),
            "record": sampler.records_at(self.source, self.seed, positions),
        }
        u = self.uniforms(first)
        for start in range(0, self.rows, _READ_SIZE):
            rows = range(start, min(start + _READ_SIZE, self.rows))
            self.buffers.note(-1, -1)
            records = decode.read_records(
                self.source, batch["record"][rows].tolist(), self.data.missing
            )
            for row, record in zip(rows, records, strict=True):
                self._fill_first_usable(record, row, u[row], int(positions[row]), batch)
        return batch

    def _fill_first_usable(
        self,
        record: base.Record | decode.BadRecord,
        row: int,
        u: np.ndarray,
        position: int,
        batch: Batch,
    ) -> None:
        """Fills a row from the first usable record at its position."""
        indices = batch["record"]
        bad_keys, last_error = collections.defaultdict[str, list[str]](list), ""
        for attempt in range(TRIES):
            if attempt:
                indices[row] = sampler.records_at(
                    self.source, self.seed, np.array([position]), attempt
                )[0]
            if not self.usable(row, indices):
                continue
            if attempt:
                (record,) = decode.read_records(self.source, [int(indices[row])], self.data.missing)
            try:
                if isinstance(record, decode.BadRecord):
                    raise record
                self.buffers.note(position, int(indices[row]))
                self.fill_row(record, row, u, batch)
                return
            except decode.BadRecord as error:
                key = (
                    record_key(self.source, int(indices[row]))
                    if isinstance(record, decode.BadRecord)
                    else record.key
                )
                last_error = f"; the last is {key!r} ({error})"
                reason = self.reasons.index(error.reason)
                batch["skipped"][reason] += 1
                batch["example"][reason] = indices[row]
                bad_keys[error.reason].append(repr(key))
        counts = {reason: (len(keys), keys) for reason, keys in bad_keys.items()}
        why = summarize_bad_records(counts) + last_error
        # a store that does not answer is no mistake: a scheduler starts the run again
        raise (TransientError if decode.UNREACHABLE in bad_keys else UserError)(
            f"{TRIES} draws in a row at position {position} of {self.source.name} gave no image"
            f" {self.purpose}: {why or 'the source has only one'}; check the source"
        )


def describe_batch(
    builder: RecordBatchBuilder, number: int, ended: Sequence[tuple[int, int]]
) -> str:
    """Describes a batch whose worker is lost.

    Args:
        builder: of the batches.
        number: of the batch.
        ended: (position, record) of each record at which a worker ended, of this or a later batch.
    """
    first = builder.first + number * builder.batch
    text = f"positions {first:,} to {first + builder.rows - 1:,} of the stream"
    keys = [f"{record_key(builder.source, i)!r} (position {at:,})" for at, i in ended]
    return f"{text}, while {' and '.join(keys)} was being decoded" if keys else text


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

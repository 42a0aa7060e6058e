"""Builds batches of centre crops for evaluators, of images decoded at full size. Each host reads
its own rows of every batch, and all hosts build the same number of batches."""

import concurrent.futures
import functools
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from m3i_jax.data import decode
from m3i_jax.data.preprocessing import Preprocessing
from m3i_jax.data.sources import base
from m3i_jax.data.sources.base import DataSource

_READ_SIZE = 64  # encoded records in memory at a time
Batch = dict[str, np.ndarray]
RecordOrBad = base.Record | decode.BadRecord


class EvaluationBatches(Iterator[Batch]):
    """Iterator over centre crops; see `evaluation_batches`. `skipped`: reason -> bad records of
    this host so far. `total`: records on all hosts, bad ones included."""

    def __init__(self, batches: Iterator[Batch], skipped: dict[str, int], total: int) -> None:
        self._batches, self.skipped, self.total = batches, skipped, total

    def __next__(self) -> Batch:
        return next(self._batches)


def evaluation_batches(
    source: DataSource,
    indices: Iterable[int],
    preprocessing: Preprocessing,
    batch: int,
    *,
    threads: int = 1,
    missing: str = "stop",
    host: int = 0,
    hosts: int = 1,
) -> EvaluationBatches:
    """Iterates over the centre crops of some records, in their order.

    Args:
        source: of the records.
        indices: of the records, the same on every host.
        preprocessing: S = image_size is the side of a view in pixels.
        batch: rows of a batch on all hosts, a multiple of `hosts`; B of them are this host's.
        threads: number of threads that decode.
        missing: with "replace", a record that cannot be read any more is a bad record; see
            `schema.Data.missing`.
        host, hosts: which contiguous share of the rows of every batch to read.

    Returns:
        An iterator of dicts: views uint8 [B, S, S, 3], label int32 [B], index int64 [B] of the
        record, valid bool [B]. The row of a bad record, which is counted in `skipped`, and rows
        that pad the last batch are not valid: zeros, with label and index -1.

    Raises:
        ValueError: the batch is not a multiple of the hosts.
        UnreadableError: while iterating, a record cannot be read, with missing="stop".

    >>> class Two:
    ...     def __getitem__(self, i):
    ...         return base.Record(str(i), np.full((20, 30, 3), i, np.uint8), label=i)
    >>> preprocessing = Preprocessing(image_size=16)
    >>> batches = evaluation_batches(Two(), [1, 0, 1], preprocessing, 2)
    >>> [(b["views"].shape, b["label"].tolist(), b["valid"].tolist()) for b in batches]
    [((2, 16, 16, 3), [1, 0], [True, True]), ((2, 16, 16, 3), [1, -1], [True, False])]
    >>> batches = evaluation_batches(Two(), [1, 0, 1], preprocessing, 2, host=1, hosts=2)
    >>> [b["label"].tolist() for b in batches]
    [[0], [-1]]
    """
    if batch % hosts:
        raise ValueError(f"a batch of {batch} rows does not divide over {hosts} hosts")
    skipped, rows = dict.fromkeys(decode.REASONS, 0), batch // hosts
    all_indices = [int(i) for i in indices]
    shares = [
        all_indices[start + host * rows : min(start + (host + 1) * rows, start + batch)]
        for start in range(0, len(all_indices), batch)
    ]
    read = functools.partial(decode.read_records, source, missing=missing)
    batches = _batches(read, shares, preprocessing, rows, max(1, threads), skipped)
    return EvaluationBatches(batches, skipped, len(all_indices))


def _batches(
    read: Callable[[list[int]], list[RecordOrBad]],
    shares: list[list[int]],
    preprocessing: Preprocessing,
    rows: int,
    threads: int,
    skipped: dict[str, int],
) -> Iterator[Batch]:
    def view_and_label(record: RecordOrBad) -> tuple[np.ndarray, int] | decode.BadRecord:
        if isinstance(record, decode.BadRecord):
            return record
        try:
            # at full size, unlike training: pixels are those of published protocols and of `load`
            pixels = decode.decode_image(record.image, background=preprocessing.background)
            return preprocessing.view(pixels), record.label
        except decode.BadRecord as error:
            return error

    size = preprocessing.image_size
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for share in shares:
            batch: Batch = {
                "views": np.zeros((rows, size, size, 3), np.uint8),
                "label": np.full(rows, -1, np.int32),
                "index": np.full(rows, -1, np.int64),
                "valid": np.zeros(rows, bool),
            }
            for start in range(0, len(share), _READ_SIZE):
                indices = share[start : start + _READ_SIZE]
                results = pool.map(view_and_label, read(indices))
                for row, (index, result) in enumerate(zip(indices, results, strict=True), start):
                    if isinstance(result, decode.BadRecord):
                        skipped[result.reason] += 1
                        continue
                    batch["views"][row], batch["label"][row] = result
                    batch["index"][row], batch["valid"][row] = index, True
            yield batch

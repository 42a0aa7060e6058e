"""Clean views of chosen records for evaluators: decoded as in training, resized and cut from the
centre, no randomness. Of several hosts each reads its own rows of every batch; which they are is
arithmetic, so that all hosts make equally many batches."""

import concurrent.futures
import functools
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from m3i_jax.data import crops, decode
from m3i_jax.data.preprocessing import Preprocessing
from m3i_jax.data.sources import base
from m3i_jax.data.sources.base import DataSource

_READ = 64  # records held encoded at a time
Batch = dict[str, np.ndarray]
Found = base.Record | decode.BadRecord


class EvaluationBatches(Iterator[Batch]):
    """Iterator over clean views of chosen records; made by `evaluation_batches`. `skipped`: reason
    -> bad records of this host so far."""

    def __init__(self, batches: Iterator[Batch], skipped: dict[str, int]) -> None:
        self._batches, self.skipped = batches, skipped

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
    """Centre views of some records in their order, for evaluators.

    Args: source: the records. indices: which of them, the same on every host. preprocessing: how an
        image is seen; S is the side of a view in pixels. batch: rows a batch on all hosts together,
        a multiple of `hosts`; B of them are this host's. threads: that decode. missing: "replace":
        a record that cannot be read any more is a bad one; see `schema.Data.missing`. host, hosts:
        which contiguous share of the rows of every batch to read.

    Returns: An iterator of dicts: views uint8 [B, S, S, 3], label int32 [B], index int64 [B] (of
        the record), valid bool [B]. Every record has the row of its place; that of a bad one is not
        valid and counted in `skipped`, those that fill up the last batch are not valid. Such rows
        are zeros, label and index -1.

    Raises:
        ValueError: a batch that is no multiple of the hosts.
        Unreadable: by the iterator, with missing="stop".

    >>> class Two:
    ...     def __getitem__(self, i): return base.Record(str(i), np.full((20, 30, 3), i, np.uint8), label=i)
    >>> seen = Preprocessing(image_size=16)
    >>> [(b["views"].shape, b["label"].tolist(), b["valid"].tolist()) for b in evaluation_batches(Two(), [1, 0, 1], seen, 2)]
    [((2, 16, 16, 3), [1, 0], [True, True]), ((2, 16, 16, 3), [1, -1], [True, False])]
    >>> [b["label"].tolist() for b in evaluation_batches(Two(), [1, 0, 1], seen, 2, host=1, hosts=2)]
    [[0], [-1]]
    """
    if batch % hosts:
        raise ValueError(f"a batch of {batch} rows does not divide over {hosts} hosts")
    skipped, mine = dict.fromkeys(decode.REASONS, 0), batch // hosts
    every = [int(i) for i in indices]
    shares = [
        every[at + host * mine : min(at + (host + 1) * mine, at + batch)]
        for at in range(0, len(every), batch)
    ]
    read = functools.partial(decode.read_records, source, missing=missing)
    return EvaluationBatches(
        _evaluation(read, shares, preprocessing, mine, max(1, threads), skipped), skipped
    )


def _evaluation(
    read: Callable[[list[int]], list[Found]],
    shares: list[list[int]],
    preprocessing: Preprocessing,
    rows: int,
    threads: int,
    skipped: dict[str, int],
) -> Iterator[Batch]:
    def look(found: Found) -> tuple[np.ndarray, int] | decode.BadRecord:
        if isinstance(found, decode.BadRecord):
            return found
        try:
            return _central_view(found, preprocessing), found.label
        except decode.BadRecord as error:
            return error

    size = preprocessing.image_size
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for share in shares:
            made: Batch = {
                "views": np.zeros((rows, size, size, 3), np.uint8),
                "label": np.full(rows, -1, np.int32),
            }
            made |= {"index": np.full(rows, -1, np.int64), "valid": np.zeros(rows, bool)}
            for at in range(0, len(share), _READ):
                wanted = share[at : at + _READ]
                for row, (index, seen) in enumerate(
                    zip(wanted, pool.map(look, read(wanted)), strict=True), at
                ):
                    if isinstance(seen, decode.BadRecord):
                        skipped[seen.reason] += 1
                        continue
                    (
                        (made["views"][row], made["label"][row]),
                        made["index"][row],
                        made["valid"][row],
                    ) = (seen, index, True)
            yield made


def _central_view(record: base.Record, preprocessing: Preprocessing) -> np.ndarray:
    opened, size = decode.open_image(record.image), preprocessing.image_size
    box = preprocessing.box(opened.height, opened.width)
    least = (decode.GAP * size / box[2] * opened.height, decode.GAP * size / box[3] * opened.width)
    image = opened.rgb(background=preprocessing.background, least=least)
    return crops.cut_view(image, box, size, height=opened.height, width=opened.width).reshape(
        size, size, 3
    )

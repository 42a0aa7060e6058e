"""Clean views of chosen records for evaluators: decoded as in training, resized and cut from the centre, no randomness."""

from collections.abc import Iterable, Iterator

import numpy as np

from m3i_jax.data import crops, records, sources
from m3i_jax.data.sources import Source

_READ = 64  # records held encoded at a time
Batch = dict[str, np.ndarray]


class EvaluationBatches(Iterator[Batch]):
    """Iterator over clean views of chosen records; made by `evaluation_batches`. `skipped`: reason -> bad records left out so far."""

    def __init__(self, batches: Iterator[Batch], skipped: dict[str, int]) -> None:
        self._batches, self.skipped = batches, skipped

    def __next__(self) -> Batch:
        return next(self._batches)


def evaluation_batches(source: Source, indices: Iterable[int], image_size: int, batch: int, *, background: int = 255) -> EvaluationBatches:
    """Centre views of some records in their order, for evaluators: short side resized to image_size * 256 / 224, centre cut out, bicubic.

    Args:
        source: the records.
        indices: which of them.
        image_size: side of a view in pixels, S.
        batch: rows a batch, B.
        background: gray level under transparent pixels.

    Returns:
        An iterator of dicts: views uint8 [B, S, S, 3], label int32 [B], index int64 [B] (of the record), valid bool [B]. Bad records are
        left out and counted in its `skipped`; only the rows that fill up the last batch are not valid (zeros, label and index -1).

    >>> class Two:
    ...     def __getitem__(self, i): return sources.Record(str(i), np.full((20, 30, 3), i, np.uint8), label=i)
    >>> [(b["views"].shape, b["label"].tolist(), b["valid"].tolist()) for b in evaluation_batches(Two(), [1, 0, 1], 16, 2)]
    [((2, 16, 16, 3), [1, 0], [True, True]), ((2, 16, 16, 3), [1, -1], [True, False])]
    """
    skipped = dict.fromkeys(records.REASONS, 0)
    return EvaluationBatches(_evaluation(source, [int(i) for i in indices], image_size, batch, background, skipped), skipped)


def _evaluation(source: Source, indices: list[int], size: int, batch: int, background: int, skipped: dict[str, int]) -> Iterator[Batch]:
    def fresh() -> Batch:
        blank: Batch = {"views": np.zeros((batch, size, size, 3), np.uint8), "label": np.full(batch, -1, np.int32)}
        return {**blank, "index": np.full(batch, -1, np.int64), "valid": np.zeros(batch, bool)}

    made, row = fresh(), 0
    for at in range(0, len(indices), _READ):
        for index, record in zip(indices[at : at + _READ], sources.read(source, indices[at : at + _READ]), strict=True):
            try:
                view = _central_view(record, size, background)
            except records.BadRecord as error:
                skipped[error.reason] += 1
                continue
            made["views"][row], made["label"][row], made["index"][row], made["valid"][row] = view, record.label, index, True
            row += 1
            if row == batch:
                yield made
                made, row = fresh(), 0
    if row:
        yield made


def _central_view(record: sources.Record, size: int, background: int) -> np.ndarray:
    opened = records.open_picture(record.image)
    box = crops.central_box(opened.height, opened.width, size)
    least = (records.GAP * size / box[2] * opened.height, records.GAP * size / box[3] * opened.width)
    image = opened.rgb(background=background, least=least)
    return crops.cut(image, box, size, False, height=opened.height, width=opened.width).reshape(size, size, 3)

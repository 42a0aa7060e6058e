"""Reads annotated images for evaluators, in the order of their records and without randomness:
detection in batches of fixed shape, segmentation image by image at full size."""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import numpy as np

from m3i_jax.data import decode, geometry
from m3i_jax.data.annotated_batches import NO_OBJECTS, OTHER_SIZE, open_annotated, open_map_image
from m3i_jax.data.decode_map import MAP_CLASS, MAP_SIZE, NO_MAP, decode_map
from m3i_jax.data.record_batches import Batch
from m3i_jax.data.sources import base
from m3i_jax.data.sources.base import DataSource
from m3i_jax.data.sources.objects import Objects

REASONS = (*decode.REASONS, NO_OBJECTS, OTHER_SIZE, NO_MAP, MAP_SIZE, MAP_CLASS)
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, slots=True)
class FittedImage:
    """An image whose long side is scaled to the side of a square, or its short side to another
    number of pixels, if that makes it smaller.

    image: uint8 [S, S, 3], the padding at the right and at the bottom is 0. size: (height, width)
    of the content. original: those of the image. objects: None if its source annotates none."""

    key: str
    image: np.ndarray
    size: tuple[int, int]
    original: tuple[int, int]
    objects: Objects | None


@dataclasses.dataclass(frozen=True, slots=True)
class MappedImage:
    """An image and its map at full size: image uint8 [H, W, 3]; map uint8 [H, W], 255 where
    unlabelled. index: of the record."""

    index: int
    key: str
    image: np.ndarray
    map: np.ndarray


class DetectionEvaluationBatches(Iterator[Batch]):
    """Iterator over batches; see `detection_eval_batches`.

    Attributes:
        skipped: reason -> bad records of this host so far.
        rows: what each valid row of the last batch shows.
    """

    def __init__(self, skipped: dict[str, int]) -> None:
        self.skipped = skipped
        self.rows: list[FittedImage] = []
        self._batches: Iterator[tuple[Batch, list[FittedImage]]] = iter(())

    def __next__(self) -> Batch:
        batch, self.rows = next(self._batches)
        return batch


def fit_image(
    record: base.Record, size: int, *, background: int = 255, short: int = 0
) -> FittedImage:
    """Decodes an image and fits it into a square, with Pillow's bilinear filter.

    Args:
        record: of the image, with or without objects.
        size: side of the square in pixels, S.
        short: limit of the short side in pixels; 0: none but S.
        background: gray level 0..255 under transparent pixels.

    Raises:
        BadRecord: see `annotated_batches.open_annotated`.

    >>> fitted = fit_image(base.Record("a", np.full((20, 40, 3), 7, np.uint8)), 32)
    >>> fitted.size, fitted.original, fitted.image[15, 31].tolist(), fitted.image[16, 0].tolist()
    ((16, 32), (20, 40), [7, 7, 7], [0, 0, 0])
    """
    stated = record.objects.size if record.objects is not None else (0, 0)
    opened, _ = open_annotated(record, stated)
    image, sides = fit_pixels(opened, size, background=background, short=short)
    return FittedImage(record.key, image, sides, (opened.height, opened.width), record.objects)


def fit_pixels(
    opened: decode.DecodedImage, size: int, *, background: int = 255, short: int = 0
) -> tuple[np.ndarray, tuple[int, int]]:
    """Fits an open image of any size into a square; returns the square and (height, width) of its
    content. See `fit_image`.

    >>> square, sides = fit_pixels(decode.wrap_pixels(np.zeros((1, 2, 3), np.uint8)), 32)
    >>> square.shape, sides
    ((32, 32, 3), (16, 32))
    """
    original = (opened.height, opened.width)
    sides = geometry.range_sides(*original, size, short or size)
    placement = geometry.whole_placement(original, sides, smooth=True)
    image = np.zeros((size, size, 3), np.uint8)
    content = geometry.cut_image(opened.rgb(background=background), placement)
    image[: sides[0], : sides[1]] = content
    return image, sides


def detection_eval_batches(
    source: DataSource,
    indices: Iterable[int],
    size: int,
    batch: int,
    *,
    background: int = 255,
    short: int = 0,
    threads: int = 1,
    missing: str = "stop",
    host: int = 0,
    hosts: int = 1,
) -> DetectionEvaluationBatches:
    """Iterates over some images in batches of fixed shape, in their order.

    Args:
        source: of the records.
        indices: of the records, the same on every host.
        size: S, to which the long side of an image is scaled.
        batch: rows of a batch on all hosts, a multiple of `hosts`; B of them are this host's.
        background, short: see `fit_image`.
        threads: number of threads that decode.
        missing: see `schema.Data.missing`.
        host, hosts: which contiguous share of the rows of every batch to read.

    Returns:
        An iterator of dicts: image uint8 [B, S, S, 3], size int32 [B, 2], original int32 [B, 2],
        see `FittedImage`; index int64 [B] of the record, valid bool [B]. The row of a bad record,
        which is counted in `skipped`, and rows that pad the last batch are not valid: zeros, size 1
        x 1, index -1. `rows` has keys and objects of the valid rows of the last batch, in order.

    Raises:
        ValueError: the batch is not a multiple of the hosts.
        UnreadableError: while iterating, a record cannot be read, with missing="stop".

    >>> from m3i_jax.data.sources.scenes import ScenesSource
    >>> batches = detection_eval_batches(ScenesSource(3), [0, 1, 2], 64, 2)
    >>> [(b["image"].shape, b["valid"].tolist(), len(batches.rows)) for b in batches]
    [((2, 64, 64, 3), [True, True], 2), ((2, 64, 64, 3), [True, False], 1)]
    """
    if batch % hosts:
        raise ValueError(f"a batch of {batch} rows does not divide over {hosts} hosts")
    result = DetectionEvaluationBatches(dict.fromkeys(REASONS, 0))
    rows, wanted = batch // hosts, [int(i) for i in indices]
    shares = [
        wanted[start + host * rows : min(start + (host + 1) * rows, start + batch)]
        for start in range(0, len(wanted), batch)
    ]
    fit = functools.partial(fit_image, size=size, background=background, short=short)
    ordered = [i for share in shares for i in share]
    read = _ReadAhead(source, ordered, fit, threads, missing, result.skipped)
    result._batches = _fitted_batches(read, shares, rows, size)
    return result


def _fitted_batches(
    read: "_ReadAhead[FittedImage]", shares: list[list[int]], rows: int, size: int
) -> Iterator[tuple[Batch, list[FittedImage]]]:
    results = iter(read)
    for share in shares:
        batch: Batch = {
            "image": np.zeros((rows, size, size, 3), np.uint8),
            "size": np.ones((rows, 2), np.int32),
            "original": np.ones((rows, 2), np.int32),
            "index": np.full(rows, -1, np.int64),
            "valid": np.zeros(rows, bool),
        }
        shown = []
        for row, index in enumerate(share):
            fitted = next(results)
            if fitted is None:
                continue
            batch["image"][row] = fitted.image
            batch["size"][row], batch["original"][row] = fitted.size, fitted.original
            batch["index"][row], batch["valid"][row] = index, True
            shown.append(fitted)
        yield batch, shown


class SegmentationEvaluationImages(Iterator[MappedImage]):
    """Iterator over images with maps; see `segmentation_eval_images`. `skipped`: reason -> bad
    records of this host so far."""

    def __init__(self, images: Iterator[MappedImage | None], skipped: dict[str, int]) -> None:
        self._images, self.skipped = images, skipped

    def __next__(self) -> MappedImage:
        while (image := next(self._images)) is None:
            pass
        return image


def segmentation_eval_images(
    source: DataSource,
    indices: Iterable[int],
    *,
    background: int = 255,
    threads: int = 1,
    missing: str = "stop",
    host: int = 0,
    hosts: int = 1,
) -> SegmentationEvaluationImages:
    """Iterates over every `hosts`-th image with its map, at full size.

    Args:
        source: records with maps.
        indices: of the records, the same on every host.
        background, threads, missing: see `detection_eval_batches`.
        host, hosts: the first image of this host, and the step to the next.

    Returns:
        An iterator of `MappedImage`; bad records are left out, and counted in `skipped`.

    >>> from m3i_jax.data.sources.scenes import ScenesSource
    >>> images = segmentation_eval_images(ScenesSource(5), range(5), host=1, hosts=2)
    >>> [(image.index, image.image.shape[:2] == image.map.shape) for image in images]
    [(1, True), (3, True)]
    """
    classes, skipped = len(base.map_classes(source)), dict.fromkeys(REASONS, 0)
    ordered = [int(i) for i in indices][host::hosts]

    def prepare(record: base.Record) -> tuple[str, np.ndarray, np.ndarray]:
        if record.map is None:
            raise decode.BadRecord(NO_MAP, "the record has none")
        map_HxW = decode_map(record.map, classes)
        opened, _ = open_map_image(record, (map_HxW.shape[0], map_HxW.shape[1]))
        return record.key, np.array(opened.rgb(background=background)), map_HxW

    def images() -> Iterator[MappedImage | None]:
        read = _ReadAhead(source, ordered, prepare, threads, missing, skipped)
        for index, prepared in zip(ordered, read, strict=True):
            yield None if prepared is None else MappedImage(index, *prepared)

    return SegmentationEvaluationImages(images(), skipped)


class _ReadAhead(Generic[_T]):
    """Reads and prepares records on several threads, a few ahead, in their order; None stands for a
    bad record, which is counted."""

    def __init__(
        self,
        source: DataSource,
        indices: list[int],
        prepare: Callable[[base.Record], _T],
        threads: int,
        missing: str,
        skipped: dict[str, int],
    ) -> None:
        self._source, self._indices, self._prepare = source, indices, prepare
        self._threads, self._missing, self._skipped = max(1, threads), missing, skipped

    def _one(self, index: int) -> _T | decode.BadRecord:
        (record,) = decode.read_records(self._source, [index], self._missing)
        try:
            if isinstance(record, decode.BadRecord):
                return record
            return self._prepare(record)
        except decode.BadRecord as error:
            return error

    def __iter__(self) -> Iterator[_T | None]:
        with concurrent.futures.ThreadPoolExecutor(self._threads) as pool:
            pending: list[concurrent.futures.Future[_T | decode.BadRecord]] = []
            for index in [*self._indices, *[-1] * (2 * self._threads)]:
                if index >= 0:
                    pending.append(pool.submit(self._one, index))
                if pending and (index < 0 or len(pending) > 2 * self._threads):
                    result = pending.pop(0).result()
                    if isinstance(result, decode.BadRecord):
                        self._skipped[result.reason] += 1
                        yield None
                    else:
                        yield result

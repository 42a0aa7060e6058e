"""Evaluation of detectors and segmenters on the records of a source: reads and resizes images,
calls the model on batches of one shape, and scores what it finds. Hosts share the images and call
the model equally often."""

import collections
import concurrent.futures
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from m3i_jax import parallel, schema
from m3i_jax.data import decode, geometry, pipeline
from m3i_jax.data.annotated_batches import open_annotated
from m3i_jax.data.decode_map import MAP_SIZE, NO_MAP, decode_map, read_map
from m3i_jax.data.sources import base
from m3i_jax.data.sources.base import DataSource
from m3i_jax.evaluation import sliding_windows
from m3i_jax.evaluation.detection_results import (
    DetectionResult,
    ImageDetections,
    ImageTruth,
    gather_results,
    image_truth,
    original_detections,
    rle_to_mask,
)
from m3i_jax.evaluation.segmentation_eval import SegmentationCounts, SegmentationScores

_READ_SIZE = 16  # decoded images in memory at a time
Detect = Callable[[np.ndarray, np.ndarray], dict[str, Any]]


class _Image(NamedTuple):
    """A decoded record: number of the record, uint8 [H, W, 3], what the source annotates."""

    number: int
    pixels: np.ndarray
    record: base.Record


def detect_records(
    detect: Detect,
    source: DataSource,
    indices: Sequence[int],
    *,
    side: int,
    batch: int,
    background: int = 255,
    threads: int = 1,
    missing: str = "stop",
    host: int = 0,
    hosts: int = 1,
    poll: Callable[[], None] = lambda: None,
) -> tuple[list[DetectionResult], dict[str, int]]:
    """(detections in some records of a source with their ground truth, of all hosts, sorted by
    image; reason -> number of records that could not be evaluated); a collective.

    Images are resized as in ViTDet's evaluation: the long side to `side`, by Pillow's bilinear
    filter; zeros fill the bottom and the right.

    Args:
      detect: (images uint8 [B, side, side, 3], sizes int32 [B, 2]) -> boxes [B, D, 4] in pixels of
        the resized image, scores, classes, valid [B, D] and perhaps masks [B, D, m, m], of this
        host's rows. Rows of size 0 are padding.
      source: of the records.
      indices: of the records, the same on every host.
      side: of the model's input in pixels.
      batch: rows on all hosts, a multiple of `hosts`.
      background: gray level under transparent pixels.
      threads: that decode.
      missing: "replace" counts records that cannot be read any more; see `schema.Data.missing`.
      host, hosts: which share of every batch is this host's.
      poll: called between batches; may raise.
    """
    if batch % hosts:
        raise ValueError(f"a batch of {batch} rows does not divide over {hosts} hosts")
    rows, skipped = batch // hosts, collections.Counter[str]()
    images = _read(source, _own(indices, batch, host, rows), background, threads, missing, skipped)
    results: list[DetectionResult] = []
    for _ in range(-(-len(indices) // batch)):
        poll()
        pixels_BxSxSx3 = np.zeros((rows, side, side, 3), np.uint8)
        size_Bx2 = np.zeros((rows, 2), np.int32)
        taken: list[tuple[int, _Image]] = []
        for row in range(rows):
            if (image := next(images, None)) is None:
                break
            small = _fit(image.pixels, side)
            pixels_BxSxSx3[row, : small.shape[0], : small.shape[1]] = small
            size_Bx2[row] = small.shape[:2]
            taken.append((row, image))
        outputs = {name: np.asarray(x) for name, x in detect(pixels_BxSxSx3, size_Bx2).items()}
        for row, image in taken:
            size = (image.pixels.shape[0], image.pixels.shape[1])
            found = original_detections(
                {name: x[row] for name, x in outputs.items()},
                content=(int(size_Bx2[row, 0]), int(size_Bx2[row, 1])),
                size=size,
            )
            truth = image_truth(image.record.objects, record=image.number, size=size)
            results.append(DetectionResult(truth, found))
    return gather_results(results), _gather_skipped(skipped)


def segment_records(
    predict: sliding_windows.Predict,
    source: DataSource,
    indices: Sequence[int],
    config: schema.Config,
    *,
    batch: int,
    missing: str = "stop",
    host: int = 0,
    hosts: int = 1,
    poll: Callable[[], None] = lambda: None,
) -> tuple[SegmentationScores, dict[str, int]]:
    """(scores of a segmenter on some records of a source, of all hosts; reason -> number of records
    that could not be evaluated); a collective. The images of the scores are record numbers.

    Args:
      predict: see `sliding_windows.class_maps`.
      source: records with maps.
      indices: of the records, the same on every host.
      config: of the run; reads `data`, `dense.geometry` and `dense.segment`.
      batch: windows of this host in a call of the model.
      missing, host, hosts, poll: see `detect_records`.
    """
    known, classes = base.map_classes(source), pipeline.count_classes(config.data, source)
    names = [known[k] if k < len(known) else str(k) for k in range(classes)]
    counts, skipped = SegmentationCounts(names), collections.Counter[str]()
    labels: dict[int, np.ndarray] = {}
    own = [int(i) for i in indices][host::hosts]

    def images() -> Iterator[tuple[int, np.ndarray]]:
        data = config.data
        for image in _read(source, own, data.background, data.threads, missing, skipped):
            try:
                if image.record.map is None:
                    raise decode.BadRecord(NO_MAP, "it has no map")
                map_HxW = decode_map(image.record.map, len(known))
                if map_HxW.shape != image.pixels.shape[:2]:
                    raise decode.BadRecord(MAP_SIZE, f"a map of {map_HxW.shape}")
            except decode.BadRecord as error:
                skipped[error.reason] += 1
                continue
            labels[image.number] = map_HxW  # classes above the run's count as unknown
            yield image.number, image.pixels

    for index, found_HxW in segment_images(
        predict, images(), config, classes=classes, batch=batch, poll=poll
    ):
        counts.add(index, found_HxW, labels.pop(index))
    return counts.scores(), _gather_skipped(skipped)


def segment_images(
    predict: sliding_windows.Predict,
    images: Iterable[tuple[Any, np.ndarray]],
    config: schema.Config,
    *,
    classes: int,
    batch: int,
    poll: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Any, np.ndarray]]:
    """(key, class map at the original size) of (key, image) pairs, by the sliding windows of a
    run's settings; see `sliding_windows.class_maps`. Hosts pass their own images, which may be
    none."""
    size_of, resize = sliding_windows.resize_rule(config)
    settings = sliding_windows.sliding_settings(config, classes=classes, batch=batch)
    return sliding_windows.class_maps(
        predict, images, settings, size_of=size_of, resize=resize, poll=poll
    )


def _own(indices: Sequence[int], batch: int, host: int, rows: int) -> list[int]:
    """This host's contiguous share of every batch."""
    starts = range(host * rows, len(indices), batch)
    return [int(i) for start in starts for i in indices[start : start + rows]]


def _read(
    source: DataSource,
    indices: Sequence[int],
    background: int,
    threads: int,
    missing: str,
    skipped: collections.Counter[str],
) -> Iterator[_Image]:
    """The readable ones of some records, decoded, in their order; the others are counted."""

    def decoded(pair: tuple[int, Any]) -> _Image | decode.BadRecord:
        index, record = pair
        if isinstance(record, decode.BadRecord):
            return record
        try:
            opened, _ = open_annotated(record, _stated_size(record))
            return _Image(index, np.asarray(opened.rgb(background=background)), record)
        except decode.BadRecord as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(max(1, threads)) as pool:
        for start in range(0, len(indices), _READ_SIZE):
            part = indices[start : start + _READ_SIZE]
            records = decode.read_records(source, list(part), missing=missing)
            for result in pool.map(decoded, zip(part, records, strict=True)):
                if isinstance(result, decode.BadRecord):
                    skipped[result.reason] += 1
                else:
                    yield result


def _stated_size(record: base.Record) -> tuple[int, int]:
    """(height, width) that the annotations state, which decides about an EXIF rotation."""
    if record.objects is not None:
        return record.objects.size
    if record.map is None:
        return (0, 0)
    shape = (read_map(record.map) if isinstance(record.map, bytes) else record.map).shape
    return (int(shape[0]), int(shape[1]))


def _fit(pixels_HxWx3: np.ndarray, side: int) -> np.ndarray:
    """The image with its long side scaled to `side`, smoothly."""
    _, resize = sliding_windows.resize_rule(schema.Config())
    height, width = pixels_HxWx3.shape[:2]
    return resize(pixels_HxWx3, geometry.fit_sides(height, width, side))


def _gather_skipped(skipped: collections.Counter[str]) -> dict[str, int]:
    total: collections.Counter[str] = collections.Counter()
    for text in parallel.exchange_values("evaluation", json.dumps(dict(skipped))):
        total.update(json.loads(text))
    return dict(total)


def drawn_truth(truth: ImageTruth) -> dict[str, Any]:
    """The arguments of `reporting.dense_panels.DrawnObjects` for annotated objects."""
    masks = [None if rle is None else rle_to_mask(rle) for rle in truth.masks]
    return {"boxes": truth.boxes, "classes": truth.classes, "masks": masks, "crowd": truth.crowd}


def drawn_detections(found: ImageDetections) -> dict[str, Any]:
    """The arguments of `reporting.dense_panels.DrawnObjects` for detections."""
    masks = None if found.masks is None else [rle_to_mask(rle) for rle in found.masks]
    return {
        "boxes": found.boxes,
        "classes": found.classes,
        "scores": found.scores,
        "masks": masks,
    }

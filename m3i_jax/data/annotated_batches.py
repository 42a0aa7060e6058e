"""Builds the batches of segmentation and detection: one augmented image per record, with its map or
its objects."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from m3i_jax import schema
from m3i_jax.data import decode, pipeline
from m3i_jax.data.decode_map import MAP_CLASS, MAP_SIZE, NO_MAP, UNLABELLED, decode_map
from m3i_jax.data.geometry import (
    LEAST,
    WIDTH,
    Placement,
    bucket_canvases,
    bucket_placement,
    cut_image,
    cut_map,
    cut_polygons,
    cut_run_lengths,
    dominated,
    jitter_placement,
    range_placement,
)
from m3i_jax.data.record_batches import Batch, RecordBatchBuilder
from m3i_jax.data.repeated_source import repeat_rare
from m3i_jax.data.sources import base, mixture
from m3i_jax.data.sources.base import DataSource
from m3i_jax.data.sources.objects import Objects
from m3i_jax.data.sources.segmentations import Polygons
from m3i_jax.errors import UserError
from m3i_jax.objective import rng

NO_OBJECTS, OTHER_SIZE = "no_annotation", "other_size"


def open_annotated(
    record: base.Record, size: tuple[int, int] = (0, 0)
) -> tuple[decode.DecodedImage, bool]:
    """Opens the image of a record in the orientation of its annotations.

    Args:
        record: of the image.
        size: (height, width) that the annotations state; (0, 0) if they state none.

    Returns:
        The image, and whether its EXIF rotation was left out because the annotations are those of
        the stored pixels.

    Raises:
        BadRecord: see `decode.open_image`; or "other_size": the image has another size than the
            annotations state.

    >>> opened, turned = open_annotated(base.Record("a", np.zeros((20, 30, 3), np.uint8)), (20, 30))
    >>> opened.width, turned
    (30, False)
    """
    opened = decode.open_image(record.image)
    if size == (0, 0) or (opened.height, opened.width) == size:
        return opened, False
    width, height = opened.image.size
    if (height, width) == size and opened.transpose is not None:
        return decode.DecodedImage(opened.image, None, height, width), True
    raise decode.BadRecord(
        OTHER_SIZE,
        f"{opened.height} x {opened.width} pixels (height x width), annotated as {size[0]} x"
        f" {size[1]}",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentBatchBuilder(RecordBatchBuilder):
    """Builds batches of images and class maps.

    Arrays, with B = rows and S = data.image_size: image uint8 [B, S, S, 3], the padding at the
    right and at the bottom is 0; map uint8 [B, S, S], 255 where unlabelled and in the padding; size
    int32 [B, 2], height and width of the content. Colours are not changed yet (on the device,
    `augment.dense_photometric` does that), and pixels are not normalised."""

    reasons: ClassVar[tuple[str, ...]] = (*decode.REASONS, NO_MAP, MAP_SIZE, MAP_CLASS)
    notes: ClassVar[tuple[str, ...]] = ("rotation_ignored", "crop_dominated", "map_unlabelled")
    purpose: ClassVar[str] = "with a class map that could be used"

    geometry: schema.Geometry
    classes: int  # of the run
    map_classes: int  # of the source

    def large(self) -> dict[str, tuple[int, ...]]:
        size = self.data.image_size
        return {"image": (self.rows, size, size, 3), "map": (self.rows, size, size)}

    def arrays(self, first: int) -> Batch:
        return {"size": np.zeros((self.rows, 2), np.int32)}

    def uniforms(self, first: int) -> np.ndarray:
        return rng.uniforms(self.seed, rng.GEOMETRY, first, self.rows, WIDTH)

    def fill_row(self, record: base.Record, row: int, u: np.ndarray, batch: Batch) -> None:
        if record.map is None:
            raise decode.BadRecord(NO_MAP, "the record has none")
        map_HxW = decode_map(record.map, self.map_classes)
        height, width = map_HxW.shape
        opened, turned = open_map_image(record, (height, width))
        if self.classes < self.map_classes:
            map_HxW = np.where(map_HxW < self.classes, map_HxW, np.uint8(UNLABELLED))
        share = self.geometry.category_share

        def accept(placement: Placement) -> bool:
            return share >= 1 or not dominated(cut_map(map_HxW, placement), share)

        place = jitter_placement if self.geometry.rule == "jitter" else range_placement
        placement = place(
            u.tolist(), height, width, self.geometry, self.data.image_size, accept=accept
        )
        image = opened.rgb(background=self.data.background)
        content = cut_map(map_HxW, placement)
        rows, columns = content.shape
        _pad(batch["image"][row], cut_image(image, placement), 0)
        _pad(batch["map"][row], content, UNLABELLED)
        batch["size"][row] = rows, columns
        self.count(batch, "rotation_ignored", int(turned))
        self.count(batch, "crop_dominated", int(not accept(placement)))
        self.count(batch, "map_unlabelled", int((content == UNLABELLED).all()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectBatchBuilder(RecordBatchBuilder):
    """Builds batches of images and objects.

    Arrays, with B = rows, S = data.image_size, M = geometry.max_objects, m = geometry.mask_size:
    image and size as in `SegmentBatchBuilder`, but with rule "buckets" uint8 [B, H, W, 3] of one of
    the canvases, which the position of the batch decides on; boxes float32 [B, M, 4], x0 y0 x1 y1
    in continuous pixels, tight around what is visible of a mask; classes int32 [B, M], -1 pads; and
    with `masks`, masks uint8 [B, M, m, m], 0 or 1, in the frame of the box.

    Crowds are left out, as are objects that the crop does not show; each is counted. An image that
    then has none stays: it is background."""

    reasons: ClassVar[tuple[str, ...]] = (*decode.REASONS, NO_OBJECTS, OTHER_SIZE)
    notes: ClassVar[tuple[str, ...]] = (
        "rotation_ignored",
        "crowd_left_out",
        "object_without_mask",
        "mask_damaged",
        "object_out_of_crop",
        "object_cut",
        "class_dropped",
    )
    purpose: ClassVar[str] = "with objects that could be used"

    geometry: schema.Geometry
    classes: int
    masks: bool = True
    rows_before: int = 0  # of the batch, on other hosts

    def large(self) -> dict[str, tuple[int, ...]]:
        size = (self.data.image_size,) * 2
        canvases = bucket_canvases(self.geometry)
        return self._shapes(max(canvases, key=lambda canvas: canvas[0] * canvas[1], default=size))

    def large_at(self, first: int) -> dict[str, tuple[int, ...]]:
        canvases = bucket_canvases(self.geometry)
        if not canvases:
            return self.large()
        u = rng.uniforms(self.seed, rng.BUCKET, first - self.rows_before, 1, 1)[0, 0]
        return self._shapes(canvases[int(u * len(canvases))])

    def _shapes(self, canvas: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        g = self.geometry
        shapes: dict[str, tuple[int, ...]] = {"image": (self.rows, *canvas, 3)}
        if self.masks:
            shapes["masks"] = (self.rows, g.max_objects, g.mask_size, g.mask_size)
        return shapes

    def arrays(self, first: int) -> Batch:
        most = self.geometry.max_objects
        return {
            "size": np.zeros((self.rows, 2), np.int32),
            "boxes": np.zeros((self.rows, most, 4), np.float32),
            "classes": np.full((self.rows, most), -1, np.int32),
        }

    def uniforms(self, first: int) -> np.ndarray:
        return rng.uniforms(self.seed, rng.GEOMETRY, first, self.rows, WIDTH)

    def fill_row(self, record: base.Record, row: int, u: np.ndarray, batch: Batch) -> None:
        objects = record.objects
        if objects is None:
            raise decode.BadRecord(NO_OBJECTS, "the record has no list of objects")
        opened, turned = open_annotated(record, objects.size)
        sides = opened.height, opened.width
        if self.geometry.rule == "buckets":
            _, height, width, _ = batch["image"].shape
            placement = bucket_placement(u.tolist(), *sides, self.geometry, (height, width))
        else:
            place = range_placement if self.geometry.rule == "range" else jitter_placement
            placement = place(u.tolist(), *sides, self.geometry, self.data.image_size)
        image = opened.rgb(background=self.data.background)
        _pad(batch["image"][row], cut_image(image, placement), 0)
        batch["size"][row] = placement.rows, placement.columns
        batch["boxes"][row], batch["classes"][row] = 0, -1
        if self.masks:
            batch["masks"][row] = 0
        self.count(batch, "rotation_ignored", int(turned))
        self._fill_objects(objects, placement, row, batch)

    def _fill_objects(self, objects: Objects, placement: Placement, row: int, batch: Batch) -> None:
        filled = 0
        for i in range(len(objects)):
            if objects.crowd[i]:
                self.count(batch, "crowd_left_out")
            elif objects.classes[i] >= self.classes:
                self.count(batch, "class_dropped")
            elif (seen := self._seen(objects, i, placement, batch)) is None:
                pass
            elif filled == self.geometry.max_objects:
                self.count(batch, "object_cut")
            else:
                batch["boxes"][row, filled] = seen[0]
                batch["classes"][row, filled] = objects.classes[i]
                if self.masks:
                    batch["masks"][row, filled] = seen[1]
                filled += 1

    def _seen(
        self, objects: Objects, i: int, placement: Placement, batch: Batch
    ) -> tuple[np.ndarray, np.ndarray | None] | None:
        """Returns the box and the mask of what the crop shows of an object, or counts why not."""
        seen: tuple[np.ndarray, np.ndarray | None] | None
        segmentation = objects.segmentations[i]
        if not self.masks:
            box = placement.move_boxes(objects.boxes[i])[0]
            seen = (box, None) if (box[2:] - box[:2]).min() > LEAST else None
        elif segmentation is None:
            self.count(batch, "object_without_mask")
            return None
        elif isinstance(segmentation, Polygons):
            seen = cut_polygons(segmentation, placement, self.geometry.mask_size)
        else:
            try:
                seen = cut_run_lengths(segmentation, placement, self.geometry.mask_size)
            except ValueError:
                self.count(batch, "mask_damaged")
                return None
        if seen is None:
            self.count(batch, "object_out_of_crop")
        return seen


def open_map_image(record: base.Record, size: tuple[int, int]) -> tuple[decode.DecodedImage, bool]:
    """Opens the image of a record that has a map of some size, as `open_annotated` does.

    Raises:
        BadRecord: "map_size": the map has another size than the image.
    """
    try:
        return open_annotated(record, size)
    except decode.BadRecord as error:
        if error.reason != OTHER_SIZE:
            raise
        raise decode.BadRecord(MAP_SIZE, f"the image has {error.detail}") from error


def iterate_segment_batches(
    config: schema.Config, source: DataSource, *, start: int, host: int = 0, hosts: int = 1
) -> pipeline.Batches:
    """Iterates without end over one host's share of batches of images and maps, from a position on.

    Args:
        config: of the run; `data` and `dense.geometry` decide what a batch is.
        source: records with maps; see `rendered_maps.with_maps` for one of objects.
        start: position of the first sample.
        host, hosts: which contiguous share of the rows to build.

    Returns:
        An iterator of the arrays of `SegmentBatchBuilder`, and position uint32 [B, 2].

    Raises:
        UserError: the source is empty, has no maps or fewer than two classes; see also
            `pipeline.iterate`.

    >>> from m3i_jax.data.sources.scenes import ScenesSource
    >>> config = schema.Config(data=schema.Data(image_size=64), train=schema.Train(batch_size=2))
    >>> batches = iterate_segment_batches(config, ScenesSource(9), start=0)
    >>> batch = next(batches)
    >>> sorted((name, array.shape) for name, array in batch.items())
    [('image', (2, 64, 64, 3)), ('map', (2, 64, 64)), ('position', (2, 2)), ('size', (2, 2))]
    >>> batches.close()
    """
    names = base.map_classes(source)
    if not names:
        raise UserError(
            f"{source.name} has no class maps to learn segmentation from: use data.source='maps',"
            " 'coco' or 'scenes'"
        )
    if config.dense.geometry.rule == "buckets":
        raise UserError(
            "config.dense.geometry.rule: 'buckets' is a rule of detection; use 'range' or 'jitter'"
        )
    classes = len(names) if config.data.classes < 0 else config.data.classes
    if min(classes, len(names)) < 2:  # a softmax of one logit is 1: nothing would be learnt
        raise UserError(
            f"{source.name} has {len(names)} classes ({', '.join(names[:3])}), config.data.classes"
            f" is {config.data.classes}, and segmentation distinguishes at least two: number"
            " background 1 and the object 2, or set data.map_unlabelled=255 if background is 0"
        )
    builder = SegmentBatchBuilder(
        **_builder_settings(config, source, start, host, hosts),
        classes=classes,
        map_classes=len(names),
    )
    return pipeline.iterate(builder)


def iterate_detect_batches(
    config: schema.Config, source: DataSource, *, start: int, host: int = 0, hosts: int = 1
) -> pipeline.Batches:
    """Iterates without end over one host's share of batches of images and objects, from a position
    on.

    Args:
        config: of the run; `data`, `dense.geometry` and `dense.detect.masks` decide what a batch
            is.
        source: records with objects; images without any are trained on as background, see
            `drop_without_objects`. With `dense.geometry.repeat`, images of rare categories come
            more often, see `repeated_source.repeat_rare`.
        start, host, hosts: see `iterate_segment_batches`.

    Returns:
        An iterator of the arrays of `DetectBatchBuilder`, and position uint32 [B, 2].

    Raises:
        UserError: the source is empty, or masks are asked for and no object has one; see also
            `pipeline.iterate`.

    >>> from m3i_jax.data.sources.scenes import ScenesSource
    >>> config = schema.Config(data=schema.Data(image_size=64), train=schema.Train(batch_size=2))
    >>> batches = iterate_detect_batches(config, ScenesSource(9), start=0)
    >>> batch = next(batches)
    >>> batch["boxes"].shape, batch["masks"].shape
    ((2, 100, 4), (2, 100, 112, 112))
    >>> batches.close()
    """
    if config.dense.detect.masks:
        _require_masks(source)
    if threshold := config.dense.geometry.repeat:
        source = repeat_rare(source, threshold)
    builder = DetectBatchBuilder(
        **_builder_settings(config, source, start, host, hosts),
        classes=pipeline.count_classes(config.data, source),
        masks=config.dense.detect.masks,
        rows_before=host * (config.train.batch_size // hosts),
    )
    return pipeline.iterate(builder)


def drop_without_objects(source: DataSource) -> DataSource:
    """Returns the records of a source that show an object which is no crowd, as detection trains on
    them; the source itself if all do, or if it has no table of its objects. Of a mixture, those of
    each source. The description counts what is left out.

    Raises:
        UserError: none is left.

    >>> from m3i_jax.data.sources.scenes import ScenesSource
    >>> source = drop_without_objects(ScenesSource(100))
    >>> len(source), source.description()[:40]
    (94, '94 of 100 images in scenes (96 pixels, s')
    """
    table = base.object_table(source)
    if table is None:
        return source
    if isinstance(source, mixture.Mixture):
        return source.of_parts(drop_without_objects)
    counts = table.objects_per_record(len(source))
    if counts.all():
        return source
    indices = np.flatnonzero(counts)
    if not len(indices):
        crowds = int(table.crowd.sum())
        remedy = (
            f"its {crowds:,} objects all have iscrowd=1, as CVAT writes for masks that are drawn"
            " with a brush; set it to 0"
            if crowds
            else "check the annotations"
        )
        raise UserError(f"no image of {source.name} has an object to train on: {remedy}")
    left_out = len(source) - len(indices)
    return base.SubsetSource(
        source, indices, f"without {left_out:,} that show no object", "with objects"
    )


def _require_masks(source: DataSource) -> None:
    """Refuses objects that have boxes alone: without a mask each would be left out."""
    table = base.object_table(source)
    if table is None or table.masked is None:
        return
    count = int((~table.crowd).sum())
    if count and not table.masked[~table.crowd].any():
        raise UserError(
            f"config.dense.detect.masks: true, and none of the {count:,} objects of {source.name}"
            " has a mask; set dense.detect.masks=false (not with head=mask2former), or give"
            " annotations with masks"
        )


def _builder_settings(
    config: schema.Config, source: DataSource, start: int, host: int, hosts: int
) -> dict[str, Any]:
    """What the builders of both tasks get: the settings, the source and the rows of a host."""
    batch = config.train.batch_size
    if batch % hosts or start < 0:
        raise ValueError(
            f"batch {batch} must be a multiple of {hosts} hosts, and start {start} at least 0"
        )
    if not len(source):
        raise UserError(f"{source.name} has no images to train on: add some, or hold less out")
    return {
        "data": config.data,
        "seed": config.seed,
        "source": source,
        "rows": batch // hosts,
        "batch": batch,
        "first": start + host * (batch // hosts),
        "geometry": config.dense.geometry,
    }


def _pad(target: np.ndarray, content: np.ndarray, value: int) -> None:
    """Writes content to the top left of a target and a value to the rest."""
    rows, columns = content.shape[:2]
    target[:rows, :columns] = content
    target[rows:] = value
    target[:rows, columns:] = value

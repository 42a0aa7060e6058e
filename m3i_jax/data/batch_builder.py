"""Builds one host batch of masked view pairs, and of small views beside them, as a pure function of
its number, in a thread or a worker process of the pipeline."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from m3i_jax import schema
from m3i_jax.data import crops, decode, rand_augment, region_texts
from m3i_jax.data.record_batches import Batch, RecordBatchBuilder
from m3i_jax.data.sources import base
from m3i_jax.data.tokenizer import Tokenizer
from m3i_jax.objective import masks, rng


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchBuilder(RecordBatchBuilder):
    """Builds the batches of `pipeline.iterate_batches`."""

    # counted in addition to the bad records, so that every cut and every drop is logged
    notes: ClassVar[tuple[str, ...]] = (
        "caption_cut",
        "caption_undecodable",
        "label_dropped",
        "region_too_long",
    )
    purpose: ClassVar[str] = "that could be used beside its partner"

    grid: int  # patches per side
    cell: int  # patches per side of a mask cell
    hidden: int  # patches that show the partner
    tokenizer: Tokenizer | None
    classes: int
    resizer: str
    views: tuple[int, ...]  # that are cut; the others are black
    small_views: tuple[schema.ViewGroup, ...] = ()  # the group of view 2, of view 3, ...

    def large(self) -> dict[str, tuple[int, ...]]:
        size = self.data.image_size
        shapes: dict[str, tuple[int, ...]] = {"views": (self.rows, 2, size, size, 3)}
        for small, count in collections.Counter(group.size for group in self.small_views).items():
            shapes[f"views_{small}"] = (self.rows, count, small, small, 3)
        return shapes

    def arrays(self, first: int) -> Batch:
        batch = {
            "box": np.empty((self.rows, 2 + len(self.small_views), 4), np.float32),
            "flip": np.empty((self.rows, 2 + len(self.small_views)), bool),
            "label": np.empty(self.rows, np.int32),
        }
        if self.data.mask == "multi_block":
            batch["mask"], batch["blocks"] = masks.multi_block(
                self.seed,
                first,
                self.rows,
                grid=self.grid,
                hidden=self.hidden,
                blocks=self.data.mask_blocks,
                share=self.data.mask_block_share,
            )
        else:
            batch["mask"] = self._mask(first)
        if self.tokenizer and self.data.regions:
            shape = (self.rows, len(region_texts.TASKS))
            batch["regions"] = np.zeros((*shape, self.tokenizer.length), np.int32)
            batch["region_length"] = np.zeros(shape, np.int32)
            batch["region_given"] = np.zeros(shape, np.int32)
        if self._captions:
            assert self.tokenizer
            batch["tokens"] = np.zeros((self.rows, self.tokenizer.length), np.int32)
            batch["length"] = np.zeros(self.rows, np.int32)
        return batch

    def uniforms(self, first: int) -> np.ndarray:
        u = rng.uniforms(self.seed, rng.CROP, first, self.rows, 2 * crops.WIDTH).reshape(
            self.rows, 2, crops.WIDTH
        )
        if count := rand_augment.WIDTH * self.data.rand_augment.ops:
            augment_u = rng.uniforms(
                self.seed, rng.RAND_AUGMENT, first, self.rows, 2 * count
            ).reshape(self.rows, 2, count)
            u = np.concatenate([u, augment_u], -1)
        return u

    def small_uniforms(self, position: int) -> list[list[float]]:
        """Returns the random numbers of the small views at a position, [view][WIDTH], from a stream
        of their own, so that they change nothing of the two large ones."""
        u = np.empty((len(self.small_views), crops.WIDTH))
        for v in range(len(u)):  # a number of views more or less changes no other view
            u[v] = rng.uniforms(self.seed, rng.SMALL_CROP, position, 1, crops.WIDTH, part=v)
        numbers: list[list[float]] = u.tolist()
        return numbers

    def usable(self, row: int, indices: np.ndarray) -> bool:
        # An image is not mixed with itself. Equal neighbours occur where an epoch ends, or by a
        # replacement.
        return not (row % 2 and indices[row] == indices[row - 1])

    def fill_row(self, record: base.Record, row: int, u: np.ndarray, batch: Batch) -> None:
        size = self._cut_views(record, u.tolist(), row, batch)
        self._fill_annotations(record, row, batch)
        if self.tokenizer and self.data.regions:
            self._fill_regions(record, size, row, batch)

    @property
    def _captions(self) -> bool:
        return self.tokenizer is not None and self.data.captions != "no"

    def _cut_views(
        self,
        record: base.Record,
        u: list[list[float]],
        row: int,
        batch: Batch,
    ) -> tuple[int, int]:
        """Decodes a record once, cuts its views and returns its height and width. u is [2][WIDTH or
        more]: 22 uniforms for the box, one for the flip, and those of RandAugment."""
        data, views_2xP = self.data, batch["views"][row].reshape(2, -1)
        box, flip = batch["box"][row], batch["flip"][row]
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
            [boxes[v] for v in self.views if v < 2], height, width, data.image_size, decode.GAP
        )
        small, small_least = self._small_boxes(row, batch, height, width)
        least = max(least[0], small_least[0]), max(least[1], small_least[1])
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
                    views_2xP[v],
                    data.image_size,
                    u[v][crops.WIDTH :],
                    data.rand_augment,
                    mean=data.augment.mean,
                )
        places = collections.Counter[int]()
        for group, small_box in zip(self.small_views, small, strict=True):
            pixels = batch[f"views_{group.size}"][row, places[group.size]].reshape(-1)
            places[group.size] += 1
            options: dict[str, Any] = {"height": height, "width": width, "by": self.resizer}
            crops.cut_view(image, small_box, group.size, out=pixels, **options)
        return height, width

    def _small_boxes(
        self, row: int, batch: Batch, height: int, width: int
    ) -> tuple[list[crops.Box], tuple[float, float]]:
        """Draws the boxes and flips of the small views of a row, and returns the boxes and the size
        at which the image may be decoded for them."""
        high, low = batch["position"][row].tolist()
        u, ratio = self.small_uniforms((high << 32) + low), _pair(self.data.crop_ratio)
        boxes, least = [], (0.0, 0.0)
        for v, group in enumerate(self.small_views):
            boxes.append(crops.crop_box(u[v], height, width, scale=group.scale, ratio=ratio))
            batch["box"][row, 2 + v] = boxes[v]
            batch["flip"][row, 2 + v] = u[v][22] < self.data.flip_p
            needed = crops.sufficient_size(boxes[-1:], height, width, group.size, decode.GAP)
            least = max(least[0], needed[0]), max(least[1], needed[1])
        return boxes, least

    def _fill_annotations(self, record: base.Record, row: int, batch: Batch) -> None:
        """Fills the label and the caption of a row."""
        dropped = self.classes > 0 and record.label >= self.classes
        batch["label"][row] = record.label if 0 <= record.label < self.classes else -1
        self.count(batch, "label_dropped", int(dropped))
        if self._captions and (text := decode.clean_caption(record.caption)):
            assert self.tokenizer
            ids = self.tokenizer.ids(text, cleaned=True)
            batch["tokens"][row], batch["length"][row] = self.tokenizer.frame(ids)
            self.count(batch, "caption_cut", int(len(ids) > self.tokenizer.length - 2))
            raw = record.caption
            undecodable = isinstance(raw, bytes) and not decode.decode_caption(raw)[1]
            self.count(batch, "caption_undecodable", int(undecodable))

    def _fill_regions(
        self, record: base.Record, size: tuple[int, int], row: int, batch: Batch
    ) -> None:
        """Fills the texts of an object that the input view shows; none where there is no such
        object, or where the annotations are of another size than the image."""
        assert self.tokenizer
        batch["region_length"][row] = 0  # of a record that was replaced
        objects = record.objects
        if objects is None or objects.size not in (size, (0, 0)):
            return
        high, low = batch["position"][row].tolist()
        u = rng.uniforms(self.seed, rng.REGION, (high << 32) + low, 1, 1)[0, 0]
        box, flip = batch["box"][row, 0].tolist(), bool(batch["flip"][row, 0])
        found = region_texts.object_in_view(objects, box, flip, float(u))
        if found is None:
            return
        label, place = found
        names, cut = self.source.classes, 0
        name = decode.clean_caption(names[label]) if label < len(names) else None
        for k, task in enumerate(region_texts.TASKS):
            text = region_texts.encode_region(self.tokenizer, task, name or f"class {label}", place)
            cut += text is None
            if text is not None:
                batch["regions"][row, k] = text[0]
                batch["region_length"][row, k], batch["region_given"][row, k] = text[1:]
        self.count(batch, "region_too_long", int(cut > 0))

    def _mask(self, first: int) -> np.ndarray:
        draw = {
            "blockwise": masks.blockwise,
            "uniform": masks.uniform,
            "inverse_block": masks.inverse_block,
        }[self.data.mask]
        cells = draw(
            self.seed,
            first,
            self.rows,
            grid=self.grid // self.cell,
            hidden=self.hidden // self.cell**2,
        )
        return masks.upsample_masks(cells, self.cell)


def _pair(values: Sequence[float]) -> tuple[float, float]:
    return values[0], values[1]

"""Builds one host batch of masked view pairs as a pure function of its number, in a thread or a
worker process of the pipeline."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from m3i_jax.data import crops, decode, rand_augment
from m3i_jax.data.record_batches import Batch, RecordBatchBuilder
from m3i_jax.data.sources import base
from m3i_jax.data.tokenizer import Tokenizer
from m3i_jax.objective import masks, rng


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchBuilder(RecordBatchBuilder):
    """Builds the batches of `pipeline.iterate_batches`."""

    # counted in addition to the bad records, so that every cut and every drop is logged
    notes: ClassVar[tuple[str, ...]] = ("caption_cut", "label_dropped")
    purpose: ClassVar[str] = "that could be used beside its partner"

    grid: int  # patches per side
    cell: int  # patches per side of a mask cell
    hidden: int  # patches that show the partner
    tokenizer: Tokenizer | None
    classes: int
    resizer: str
    views: tuple[int, ...]  # that are cut; the others are black

    def large(self) -> dict[str, tuple[int, ...]]:
        size = self.data.image_size
        return {"views": (self.rows, 2, size, size, 3)}

    def arrays(self, first: int) -> Batch:
        batch = {
            "box": np.empty((self.rows, 2, 4), np.float32),
            "flip": np.empty((self.rows, 2), bool),
            "label": np.empty(self.rows, np.int32),
            "mask": self._mask(first),
        }
        if self.tokenizer:
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

    def usable(self, row: int, indices: np.ndarray) -> bool:
        # An image is not mixed with itself. Equal neighbours occur where an epoch ends, or by a
        # replacement.
        return not (row % 2 and indices[row] == indices[row - 1])

    def fill_row(self, record: base.Record, row: int, u: np.ndarray, batch: Batch) -> None:
        self._cut_views(
            record,
            u.tolist(),
            batch["views"][row].reshape(2, -1),
            batch["box"][row],
            batch["flip"][row],
        )
        self._fill_annotations(record, row, batch)

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
        self.count(batch, "label_dropped", int(dropped))
        if self.tokenizer and (text := decode.clean_caption(record.caption)):
            ids = self.tokenizer.ids(text, cleaned=True)
            batch["tokens"][row], batch["length"][row] = self.tokenizer.frame(ids)
            self.count(batch, "caption_cut", int(len(ids) > self.tokenizer.length - 2))

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


def _pair(values: Sequence[float]) -> tuple[float, float]:
    return values[0], values[1]

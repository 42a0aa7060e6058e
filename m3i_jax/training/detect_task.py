"""Detection and instance segmentation as a task: Mask R-CNN, DINO or Mask2Former on the maps of any
encoder."""

import dataclasses
from typing import Any

import jax
import numpy as np

from m3i_jax import schema
from m3i_jax.data import annotated_batches, geometry, pipeline
from m3i_jax.data.sources import base
from m3i_jax.errors import UserError
from m3i_jax.models.dense import pyramid
from m3i_jax.models.dense.task_heads import DetectionHead, detection_head
from m3i_jax.objective import stream_keys
from m3i_jax.training.dense_task import (
    DenseTask,
    Divisor,
    Maps,
    Values,
    image_keys,
    one_stride,
    sum_images,
)
from m3i_jax.training.task import Batch, register_task


@dataclasses.dataclass(frozen=True)
class DetectTask(DenseTask):
    """Boxes, categories and masks of objects. What the losses are divided by is the head's:
    images, or objects of the whole batch."""

    traits = schema.TASKS["detect"]

    @property
    def head(self) -> DetectionHead:
        """The head of this run.

        Raises:
          UserError: it cannot predict what the settings ask for.
        """
        return detection_head(self.config.dense.detect)

    @property
    def category_parameters(self) -> tuple[str, ...]:
        return self.head.category_parameters

    def pyramid_config(self, sources: tuple[tuple[int, int], ...]) -> pyramid.PyramidConfig:
        settings, raw_strides = self.config.dense.detect, self.head.raw_strides
        if raw_strides is not None and not one_stride(sources):
            strides = raw_strides(settings)
            return pyramid.PyramidConfig(kind="none", strides=strides, sources=sources)
        return pyramid.PyramidConfig(
            kind="simple" if one_stride(sources) else "lateral",
            strides=settings.strides,
            sources=sources,
            width=settings.width,
        )

    def init_head(self, rng: jax.Array) -> tuple[Any, Any]:
        config = self.config
        channels = self.pyramid().channels
        return self.head.init(config.dense.detect, channels, config.data.classes, rng), {}

    def annotation_shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        b, g = self.config.train.batch_size, self.config.dense.geometry
        shapes: dict[str, tuple[tuple[int, ...], str]] = {
            "image": ((b, *self._canvas(), 3), "uint8"),
            "boxes": ((b, g.max_objects, 4), "float32"),
            "classes": ((b, g.max_objects), "int32"),
        }
        if self.config.dense.detect.masks:
            shapes["masks"] = ((b, g.max_objects, g.mask_size, g.mask_size), "uint8")
        return shapes

    def _canvas(self) -> tuple[int, int]:
        """(height, width) of the largest images.

        Raises:
          UserError: the encoder cannot read canvases of these sizes.
        """
        side = self.config.data.image_size
        canvases = geometry.bucket_canvases(self.config.dense.geometry)
        coarsest = max(stride for stride, _ in self.sources)
        wrong = [each for each in canvases if each[0] % coarsest or each[1] % coarsest]
        if canvases and one_stride(self.sources):
            raise UserError(
                "config.dense.geometry.rule: 'buckets' needs an encoder that reads images of any"
                f" size, and {self.config.model.backbone!r} reads squares; use 'jitter'"
            )
        if wrong:
            raise UserError(
                f"config.dense.geometry.buckets: {wrong[0][0]} x {wrong[0][1]} are not multiples of"
                f" {coarsest}, the stride of the coarsest map of the encoder; round them up"
            )
        return max(canvases, key=lambda each: each[0] * each[1], default=(side, side))

    def _require_queries(self) -> None:
        """Refuse objects that a head with queries could not match, before anything is compiled.

        Raises:
          UserError: a batch has room for more objects than the head has queries.
        """
        settings, most = self.config.dense.detect, self.config.dense.geometry.max_objects
        queries = getattr(getattr(settings, settings.head, None), "queries", most)
        if queries < most:
            raise UserError(
                f"config.dense.detect.{settings.head}.queries: {queries} queries cannot be matched"
                f" with {most} objects; set at least as many, or a smaller"
                " dense.geometry.max_objects"
            )

    def divisor(self, batch: Batch) -> Divisor:
        return self.head.divisor(self.config.dense.detect, batch["classes"])

    def loss_sums(
        self, params: Any, statistics: Any, maps: Maps, batch: Batch
    ) -> tuple[Values, Values, Any]:
        values, counts = self.head.losses(
            self.config.dense.detect,
            params["head"],
            maps,
            batch["size"],
            batch["boxes"],
            batch["classes"],
            batch.get("masks"),
            image_keys(self.config, batch["position"], stream_keys.SAMPLING),
            frequency_K=self.category_counts or None,
        )
        infos = {f"detect/{name}": total for name, total in sum_images(counts).items()}
        return sum_images(values), infos, {}

    def predict(self, params: Any, statistics: Any, batch: Batch) -> dict[str, jax.Array]:
        maps, _ = self.maps(params, statistics, batch, train=False)
        return self.head.detect(self.config.dense.detect, params["head"], maps, batch["size"])

    def batches(self, source: Any, tokenizer: Any, **options: Any) -> pipeline.Batches:
        options.pop("views", None)
        self._canvas()
        self._require_queries()
        return annotated_batches.iterate_detect_batches(self.config, source, **options)

    @classmethod
    def training_records(cls, source: base.DataSource) -> base.DataSource:
        return annotated_batches.drop_without_objects(source)

    @classmethod
    def count_categories(cls, config: schema.Config, source: base.DataSource) -> tuple[int, ...]:
        table = base.object_table(source)
        if config.dense.detect.loss != "federated" or table is None:
            return ()
        pairs = np.unique(np.stack([table.records, table.classes])[:, ~table.crowd], axis=1)
        counts = np.bincount(pairs[1], minlength=config.data.classes)[: config.data.classes]
        return tuple(counts.tolist())


register_task("detect", DetectTask)

"""Semantic segmentation as a task: a head of `task_heads` on the maps of any encoder."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax import schema
from m3i_jax.data import annotated_batches, pipeline, rendered_maps
from m3i_jax.data.sources import base
from m3i_jax.data.sources.relabelled import RelabelledMaps
from m3i_jax.errors import UserError
from m3i_jax.models.dense import pyramid, task_heads
from m3i_jax.objective import stream_keys
from m3i_jax.training.dense_task import (
    DenseTask,
    Divisor,
    Maps,
    Values,
    image_keys,
    one_stride,
)
from m3i_jax.training.task import Batch, register_task


@dataclasses.dataclass(frozen=True)
class SegmentTask(DenseTask):
    """A category for every pixel."""

    traits = schema.TASKS["segment"]

    @property
    def head(self) -> task_heads.SegmentationHead:
        """The head of this run."""
        return task_heads.segmentation_head(self.config.dense.segment)

    @property
    def category_parameters(self) -> tuple[str, ...]:
        return self.head.category_parameters

    def pyramid_config(self, sources: tuple[tuple[int, int], ...]) -> pyramid.PyramidConfig:
        settings = self.config.dense.segment
        if self.head.coarsest:  # of several maps, the last
            return pyramid.PyramidConfig(kind="none", strides=(sources[-1][0],), sources=sources)
        return pyramid.PyramidConfig(
            kind=self.head.plain_pyramid if one_stride(sources) else "none",
            strides=settings.strides,
            sources=sources,
            width=settings.width,
        )

    def init_head(self, rng: jax.Array) -> tuple[Any, Any]:
        settings, channels = self.config.dense.segment, self.pyramid().channels
        try:
            return self.head.init(settings, channels, self.config.data.classes, rng)
        except ValueError as error:
            raise UserError(
                f"config.dense.segment: the head {settings.head} cannot be made: {error}; change"
                " these settings"
            ) from None

    def annotation_shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        b, s = self.config.train.batch_size, self.config.data.image_size
        whole, coarsest = (
            self.config.dense.segment.test_whole,
            max(stride for stride, _ in self.sources),
        )
        if whole % coarsest:  # else the first evaluation would find it
            raise UserError(
                f"config.dense.segment.test_whole: {whole} is not a multiple of {coarsest}, the"
                " stride of the coarsest map of the encoder; round it up"
            )
        return {"map": ((b, s, s), "uint8")}

    def divisor(self, batch: Batch) -> Divisor:
        settings, classes = self.config.dense.segment, self.config.data.classes
        return self.head.divisor(settings, batch["map"].astype(jnp.int32), classes)

    def loss_sums(
        self, params: Any, statistics: Any, maps: Maps, batch: Batch
    ) -> tuple[Values, Values, Any]:
        values, infos, new = self.head.loss(
            self.config.dense.segment,
            params["head"],
            statistics["head"],
            maps,
            batch["map"].astype(jnp.int32),
            image_keys(self.config, batch["position"], stream_keys.DROPOUT),
        )
        return values, {f"segment/{name}": total for name, total in infos.items()}, new

    def predict(self, params: Any, statistics: Any, batch: Batch) -> dict[str, jax.Array]:
        maps, _ = self.maps(params, statistics, batch, train=False)
        size = (batch["image"].shape[1], batch["image"].shape[2])
        logits = self.head.logits(
            self.config.dense.segment, params["head"], statistics["head"], maps, size
        )
        return {"logits": logits}

    def batches(self, source: Any, tokenizer: Any, **options: Any) -> pipeline.Batches:
        options.pop("views", None)
        return annotated_batches.iterate_segment_batches(self.config, source, **options)

    @classmethod
    def with_annotations(cls, source: base.DataSource) -> base.DataSource:
        return rendered_maps.with_maps(source)

    @classmethod
    def class_names(cls, source: base.DataSource) -> tuple[str, ...]:
        return base.map_classes(source)

    @classmethod
    def with_classes(cls, source: base.DataSource, names: tuple[str, ...]) -> base.DataSource:
        return RelabelledMaps(source, names)


register_task("segment", SegmentTask)

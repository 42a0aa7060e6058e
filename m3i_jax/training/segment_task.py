"""Semantic segmentation as a task: UperNet or a linear head on the maps of any encoder."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax import schema
from m3i_jax.data import annotated_batches, pipeline, rendered_maps
from m3i_jax.data.sources import base
from m3i_jax.models.dense import pyramid, segmentation_heads
from m3i_jax.models.dense.map_sampling import resize_bilinear
from m3i_jax.objective.dense_losses import pixel_cross_entropy
from m3i_jax.training.dense_task import (
    DROPOUT,
    DenseTask,
    Maps,
    Values,
    image_keys,
    one_stride,
)
from m3i_jax.training.task import Batch, register_task

UNLABELLED = 255


@dataclasses.dataclass(frozen=True)
class SegmentTask(DenseTask):
    """A category for every pixel."""

    traits = schema.TASKS["segment"]
    category_parameters = ("^head/(aux_)?classifier/",)

    def pyramid_config(self, sources: tuple[tuple[int, int], ...]) -> pyramid.PyramidConfig:
        settings = self.config.dense.segment
        if settings.head == "linear":
            # of several maps, the last
            return pyramid.PyramidConfig(kind="none", strides=(sources[-1][0],), sources=sources)
        kind = "rescale" if one_stride(sources) else "none"
        return pyramid.PyramidConfig(kind=kind, strides=settings.strides, sources=sources)

    def init_head(self, rng: jax.Array) -> tuple[Any, Any]:
        return segmentation_heads.init(
            self.config.dense.segment, self.pyramid().channels, self.config.data.classes, rng
        )

    def annotation_shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        b, s = self.config.train.batch_size, self.config.data.image_size
        return {"map": ((b, s, s), "uint8")}

    def divisor(self, batch: Batch) -> jax.Array:
        if self.config.dense.segment.divide_by == "all":
            return jnp.float32(batch["map"].size)
        return jnp.maximum((batch["map"] != UNLABELLED).sum().astype(jnp.float32), 1)

    def loss_sums(
        self, params: Any, statistics: Any, maps: Maps, batch: Batch
    ) -> tuple[Values, Values, Any]:
        settings, labels = self.config.dense.segment, batch["map"].astype(jnp.int32)
        width, uniform = segmentation_heads.dropout_width_of(settings), None
        if settings.dropout and width:
            keys = image_keys(self.config, batch["position"], DROPOUT)
            uniform = jax.vmap(lambda key: jax.random.uniform(key, (width,)))(keys)
        logits, aux, new = segmentation_heads.apply(
            settings, params["head"], statistics["head"], maps, train=True, uniform_BxC=uniform
        )
        full = resize_bilinear(logits, labels.shape[1:])
        values = {"pixels": pixel_cross_entropy(full, labels)[0]}
        if aux is not None:
            at_full = resize_bilinear(aux, labels.shape[1:])
            values["auxiliary"] = settings.aux_weight * pixel_cross_entropy(at_full, labels)[0]
        labelled = labels != UNLABELLED
        right = (full.argmax(-1) == labels) & labelled
        share = right.sum((1, 2)) / jnp.maximum(labelled.sum((1, 2)), 1)
        return values, {"segment/pixel_accuracy": share.sum()}, new

    def predict(self, params: Any, statistics: Any, batch: Batch) -> dict[str, jax.Array]:
        maps, _ = self.maps(params, statistics, batch, train=False)
        logits, _, _ = segmentation_heads.apply(
            self.config.dense.segment, params["head"], statistics["head"], maps, train=False
        )
        return {"logits": resize_bilinear(logits, batch["image"].shape[1:3])}

    def batches(self, source: Any, tokenizer: Any, **options: Any) -> pipeline.Batches:
        options.pop("views", None)
        return annotated_batches.iterate_segment_batches(self.config, source, **options)

    @classmethod
    def with_annotations(cls, source: base.DataSource) -> base.DataSource:
        return rendered_maps.with_maps(source)

    @classmethod
    def class_names(cls, source: base.DataSource) -> tuple[str, ...]:
        return base.map_classes(source)


register_task("segment", SegmentTask)

"""The settings that a head does not read (`validation.unread_by_task`) against those that its
losses and its inference read, as recorded while both are traced."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from m3i_jax import schema, validation
from m3i_jax.models.dense import task_heads
from m3i_jax.training import detect_task, segment_task

SIDE, CLASSES, OBJECTS = 128, 5, 3
SIZES = jnp.full((1, 2), SIDE)


def recorded(settings: Any) -> tuple[Any, set[str]]:
    """The settings, and the names that are read from them so far."""
    kind, read = type(settings), set[str]()

    class Recording(kind):  # type: ignore[misc,valid-type]
        def __getattribute__(self, name: str) -> Any:
            if name in kind.__dataclass_fields__:
                read.add(name)
            return super().__getattribute__(name)

    return Recording(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(kind)}), read


def key(number: int) -> jax.Array:
    return jax.random.key(number)


def reads_of_detection(name: str, loss: str) -> set[str]:
    head, masks = task_heads.DETECTION_HEADS[name], name != "dino"
    few = {
        "dino": schema.Dino(queries=20, encoder_depth=1, depth=2),
        "mask2former": schema.Mask2Former(queries=20, encoder_depth=1, depth=2),
    }
    given = schema.Detect(
        head=name, masks=masks, strides=(8, 16, 32, 64), anchor_sizes=(32, 64, 128, 256), **few
    )
    settings, read = recorded(dataclasses.replace(given, loss=loss, width=64))

    def run() -> Any:
        params = head.init(settings, {stride: 64 for stride in given.strides}, CLASSES, key(0))
        maps = {s: jnp.zeros((1, SIDE // s, SIDE // s, 64)) for s in given.strides}
        boxes, classes = jnp.zeros((1, OBJECTS, 4)), jnp.zeros((1, OBJECTS), int)
        truth = jnp.zeros((1, OBJECTS, 28, 28), "uint8") if masks else None
        federated = (1,) * CLASSES if loss == "federated" else None
        keys = jax.random.split(key(1), 1)
        losses = head.losses(
            settings, params, maps, SIZES, boxes, classes, truth, keys, frequency_K=federated
        )
        divisor = head.divisor(settings, classes)
        return losses, divisor, head.detect(settings, params, maps, SIZES)

    jax.eval_shape(run)
    config = schema.Config(task="detect", dense=schema.DensePrediction(detect=given))
    task = object.__new__(detect_task.DetectTask)
    object.__setattr__(task, "config", with_settings(config, detect=settings))
    task.pyramid_config(((16, 64),))  # of a plain ViT, whose maps have one stride
    return read


def with_settings(config: schema.Config, **settings: Any) -> schema.Config:
    return dataclasses.replace(config, dense=dataclasses.replace(config.dense, **settings))


def reads_of_segmentation(name: str) -> set[str]:
    head = task_heads.SEGMENTATION_HEADS[name]
    few = schema.Mask2Former(encoder_depth=1, depth=2)
    given = schema.Segment(head=name, strides=(4, 8, 16, 32), width=64, mask2former=few)
    settings, read = recorded(given)

    def run() -> Any:
        params, statistics = head.init(settings, {s: 64 for s in given.strides}, CLASSES, key(0))
        maps = {s: jnp.zeros((1, SIDE // s, SIDE // s, 64)) for s in given.strides}
        labels, keys = jnp.zeros((1, SIDE, SIDE), int), jax.random.split(key(1), 1)
        loss = head.loss(settings, params, statistics, maps, labels, keys)
        divisor = head.divisor(settings, labels, CLASSES)
        return loss, divisor, head.logits(settings, params, statistics, maps, (SIDE, SIDE))

    jax.eval_shape(run)
    task = object.__new__(segment_task.SegmentTask)
    object.__setattr__(task, "config", with_settings(schema.Config(), segment=settings))
    task.pyramid_config(((16, 64),))
    return read


def unread(config: schema.Config, section: str) -> set[str]:
    names = (name for name in validation.unread_by_task(config) if name.startswith(section))
    return {name.removeprefix(section).removesuffix(".") for name in names} - {""}


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        pytest.param("mask_rcnn", "softmax", marks=pytest.mark.slow),
        ("dino", "softmax"),
        ("mask2former", "softmax"),
        pytest.param("mask_rcnn", "federated", marks=pytest.mark.slow),
        pytest.param("dino", "federated", marks=pytest.mark.slow),
    ],
)
def test_detection(name: str, loss: str) -> None:
    given = schema.Detect(head=name, loss=loss, masks=name != "dino")
    config = schema.Config(task="detect", dense=schema.DensePrediction(detect=given))
    others = {field.name for field in dataclasses.fields(given)} - reads_of_detection(name, loss)
    elsewhere = {"head", "masks"}  # by the batches and the figures
    assert unread(config, "dense.detect.") == others - elsewhere


@pytest.mark.parametrize("name", schema.SEGMENTATION_HEADS[:3])
def test_segmentation(name: str) -> None:
    given = schema.Segment(head=name)
    config = schema.Config(task="segment", dense=schema.DensePrediction(segment=given))
    others = {field.name for field in dataclasses.fields(given)} - reads_of_segmentation(name)
    elsewhere = {"head"} | {n for n in others if n.startswith("test_")}
    assert unread(config, "dense.segment.") == others - elsewhere

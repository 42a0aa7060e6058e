"""Texts of annotated objects: places in a view, prefixes, batches and errors."""

import dataclasses

import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.data import batch_builder, pipeline, region_texts
from m3i_jax.data.sources import scenes, shapes
from m3i_jax.data.sources.objects import empty_objects
from m3i_jax.data.tokenizer import train_tokenizer
from m3i_jax.errors import UserError
from tests import toy

WORDS = train_tokenizer(region_texts.region_corpus(shapes.CLASSES), 700, 40)


def objects(boxes: list[list[float]], crowd: tuple[int, ...] = ()):
    count = len(boxes)
    return dataclasses.replace(
        empty_objects(),
        boxes=np.array(boxes, np.float32),
        classes=np.arange(count, dtype=np.int32),
        crowd=np.isin(np.arange(count), crowd),
    )


def test_a_box_is_that_of_the_view_and_mirrored_with_it() -> None:
    """A view of 100 x 50 pixels from row 20 and column 40: one object inside, one of which a
    quarter is seen, one of which more than half is seen, a crowd."""
    found = objects([[50, 30, 90, 60], [30, 0, 50, 40], [130, 25, 148, 35], [50, 30, 90, 60]], (3,))
    view = (20, 40, 50, 100)
    chosen = {region_texts.object_in_view(found, view, False, u) for u in (0.0, 0.4, 0.6, 0.99)}
    assert chosen == {(0, (50, 100, 250, 400)), (2, (450, 50, 500, 150))}
    assert region_texts.object_in_view(found, view, True, 0.0) == (0, (250, 100, 450, 400))
    assert region_texts.object_in_view(found, (0, 500, 10, 10), False, 0.5) is None


def test_texts_are_those_of_the_tasks() -> None:
    box = (0, 12, 250, 500)
    for task, prefix, text in (
        ("box", "box: ring:", "box: ring: 0 12 250 500"),
        ("region", "region:", "region: 0 12 250 500 ring"),
    ):
        ids, length, given = region_texts.encode_region(WORDS, task, "ring", box)
        assert WORDS.decode(ids) == text and WORDS.decode(ids[:given]) == prefix
        assert ids[0] == WORDS.start and ids[length - 1] == WORDS.end and not ids[length:].any()
    short = train_tokenizer(["a"], 259, 8)
    assert region_texts.encode_region(short, "box", "ring", box) is None


def test_batches_hold_an_object_of_the_input_view() -> None:
    """The text of every row decodes to an object of its record at its place in view 0."""
    source = scenes.ScenesSource(40, 64)
    config = toy.settings(data__regions=True, data__captions="no", data__caption_length=40)
    batches = pipeline.iterate_batches(config, source, WORDS, start=0)
    batch = next(batches)
    records = batches.record
    batches.close()
    assert "tokens" not in batch and batch["regions"].shape == (16, 2, 40)
    shown = 0
    for row, number in enumerate(records):
        record, length = source[int(number)], batch["region_length"][row]
        usable = [
            region_texts.object_in_view(
                record.objects, batch["box"][row, 0].tolist(), bool(batch["flip"][row, 0]), u
            )
            for u in np.linspace(0, 0.999, 50)
        ]
        if usable[0] is None:
            assert not length.any()
            continue
        shown += 1
        texts = {
            (f"box: {name}: {numbers}", f"region: {numbers} {name}")
            for label, place in usable
            for name, numbers in [(shapes.CLASSES[label], " ".join(map(str, place)))]
        }
        assert tuple(map(WORDS.decode, batch["regions"][row])) in texts
        assert (batch["region_given"][row] < length).all()
    assert shown > 8
    assert batch_builder.BatchBuilder.notes[-1] == "region_too_long"


def test_a_source_without_objects_is_refused() -> None:
    with pytest.raises(UserError, match="data.regions=True, but shapes annotates no objects"):
        pipeline.require_regions(schema.Data(regions=True), shapes.ShapesSource(10))
    pipeline.require_regions(schema.Data(regions=True), scenes.ScenesSource(10))

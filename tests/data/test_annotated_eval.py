"""Annotated images for evaluators: fixed shapes, original sizes, hosts and bad records."""

import numpy as np
import pytest
from PIL import Image

from m3i_jax.data import annotated_eval
from m3i_jax.data.sources import base
from m3i_jax.data.sources.objects import empty_objects
from m3i_jax.data.sources.scenes import ScenesSource


def test_images_are_fitted_into_a_square() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 90, 3)).astype(np.uint8)
    fitted = annotated_eval.fit_image(base.Record("a", pixels), 120)
    assert fitted.size == (67, 120) and fitted.original == (50, 90)  # 66.67, half up
    whole = Image.fromarray(pixels).resize((120, 67), Image.Resampling.BILINEAR)
    assert (fitted.image[:67] == np.asarray(whole)).all() and not fitted.image[67:].any()


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_of_detection(threads) -> None:
    source = ScenesSource(11, side=48)
    whole = annotated_eval.detection_eval_batches(source, range(11), 64, 4, threads=threads)
    seen, objects = [], []
    for batch in whole:
        assert batch["image"].shape == (4, 64, 64, 3)
        seen += [{name: a[row] for name, a in batch.items()} for row in range(4)]
        assert len(whole.rows) == batch["valid"].sum()
        objects += whole.rows
    assert [int(row["index"]) for row in seen] == [*range(11), -1]
    for row, shown in zip(seen[:11], objects, strict=True):
        record = source[int(row["index"])]
        assert shown.key == record.key and len(shown.objects) == len(record.objects)
        assert tuple(row["original"]) == record.objects.size and max(row["size"]) == 64
    assert not seen[11]["image"].any() and seen[11]["size"].tolist() == [1, 1]
    for host in (0, 1):
        part = annotated_eval.detection_eval_batches(source, range(11), 64, 4, host=host, hosts=2)
        rows = [{n: a[row] for n, a in batch.items()} for batch in part for row in range(2)]
        mine = [row for i, row in enumerate(seen) if i % 4 // 2 == host]
        assert len(rows) == len(mine)
        for a, b in zip(rows, mine, strict=True):
            assert all((a[name] == b[name]).all() for name in a)
    with pytest.raises(ValueError, match="does not divide over 3 hosts"):
        annotated_eval.detection_eval_batches(source, range(11), 64, 4, hosts=3)


def test_bad_records_leave_a_row_that_is_not_valid() -> None:
    good = base.Record("g", np.zeros((20, 30, 3), np.uint8), objects=empty_objects((20, 30)))
    other = base.Record("o", np.zeros((20, 31, 3), np.uint8), objects=empty_objects((20, 30)))
    records = [good, base.Record("b", b"<html>"), other, good]
    batches = annotated_eval.detection_eval_batches(records, range(4), 32, 4, threads=2)
    (batch,) = list(batches)
    assert batch["valid"].tolist() == [True, False, False, True]
    assert batch["index"].tolist() == [0, -1, -1, 3] and len(batches.rows) == 2
    assert {k: n for k, n in batches.skipped.items() if n} == {"undecodable": 1, "other_size": 1}


def test_images_of_segmentation() -> None:
    source = ScenesSource(7, side=48)
    images = list(annotated_eval.segmentation_eval_images(source, [5, 1, 6], threads=2))
    assert [image.index for image in images] == [5, 1, 6]
    for image in images:
        record = source[image.index]
        assert (image.image == record.image).all() and (image.map == record.map).all()
    hosts = [
        [
            i.index
            for i in annotated_eval.segmentation_eval_images(source, range(7), host=h, hosts=3)
        ]
        for h in range(3)
    ]
    assert hosts == [[0, 3, 6], [1, 4], [2, 5]]


def test_images_without_a_usable_map_are_counted() -> None:
    class Three(list):
        map_classes = ("a", "b")

    flat = np.zeros((20, 30), np.uint8)
    pixels = np.zeros((20, 30, 3), np.uint8)
    records = Three(
        [
            base.Record("a", pixels, map=flat),
            base.Record("b", pixels, map=flat + np.uint8(7)),
            base.Record("c", pixels, map=flat.T.copy()),
            base.Record("d", pixels),
        ]
    )
    images = annotated_eval.segmentation_eval_images(records, range(4))
    assert [image.key for image in images] == ["a"]
    counted = {k: n for k, n in images.skipped.items() if n}
    assert counted == {"map_class": 1, "map_size": 1, "no_map": 1}

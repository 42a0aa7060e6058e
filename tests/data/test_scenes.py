"""The built-in scenes: exact masks, boxes and maps, and the files that they are written to."""

import copy
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from m3i_jax import schema
from m3i_jax.data import conversion, decode, decode_map, splits
from m3i_jax.data.sources import segmentations, shapes
from m3i_jax.data.sources.scenes import MAP_CLASSES, UNLABELLED, ScenesSource
from m3i_jax.errors import UserError
from tests.scene_files import CATEGORY_IDS, write_scenes


@pytest.fixture(scope="module")
def source() -> ScenesSource:
    return ScenesSource(120, side=64)


@pytest.fixture(scope="module")
def records(source):
    return [source[i] for i in range(len(source))]


def masks(record) -> list[np.ndarray]:
    return [
        segmentations.decode_mask(s, *record.objects.size) for s in record.objects.segmentations
    ]


def test_a_scene_is_a_function_of_seed_and_index(source, records) -> None:
    again = copy.copy(source)[7]  # copies as pickle does
    assert (again.image == records[7].image).all() and (again.map == records[7].map).all()
    assert (again.objects.boxes == records[7].objects.boxes).all()
    other = ScenesSource(120, side=64, seed=1)
    assert other.key(7) != source.key(7) and other.fingerprint() != source.fingerprint()
    assert ScenesSource(8, side=64)[7].image.tobytes() == records[7].image.tobytes()


def test_masks_boxes_and_map_agree(records) -> None:
    for record in records:
        height, width = record.objects.size
        assert record.image.shape == (height, width, 3) and record.map.shape == (height, width)
        covered = np.zeros((height, width), int)
        for i, mask in enumerate(masks(record)):
            box, area = record.objects.boxes[i].tolist(), record.objects.areas[i]
            assert segmentations.tight_box(mask) == tuple(box) and mask.sum() == area >= 16
            known = record.map[mask]
            label = record.objects.classes[i]
            assert (known[known != UNLABELLED] == label).all() and (known == label).mean() > 0.2
            covered += mask
        assert covered.max() <= 1  # who is in front hides who is behind
        things = record.map < len(shapes.CLASSES)
        if record.objects.areas.sum() > 16 * len(record.objects):
            assert (covered[things] == 1).mean() > 0.9


def test_what_scenes_show(source, records) -> None:
    table = source.object_table()
    assert 0.02 < (table.objects_per_record(120) == 0).mean() < 0.12
    assert 4 <= table.crowd.sum() <= 25
    counts = table.records_per_class(8)
    assert counts[0] > 3 * counts[5:].max() and counts.min() > 0
    assert {r.map.shape for r in records} == {(64, 64), (48, 64), (64, 48)}
    ignored = np.mean([(r.map == UNLABELLED).mean() for r in records])
    assert 0.02 < ignored < 0.2
    assert set(np.unique(np.concatenate([r.map.ravel() for r in records]))) == {*range(14), 255}
    crowds = [r for r in records if r.objects.crowd.any()]
    assert all(r.objects.crowd.sum() == 1 for r in crowds) and len(crowds) > 3


def test_the_table_lists_what_is_drawn(source, records) -> None:
    """Objects that others hide are in the table alone."""
    table = source.object_table()
    for i, record in enumerate(records):
        listed = sorted(table.classes[(table.records == i) & ~table.crowd].tolist())
        shown = sorted(record.objects.classes[~record.objects.crowd].tolist())
        assert len(shown) <= len(listed) and set(shown) <= set(listed)


def test_refusals() -> None:
    with pytest.raises(UserError, match="data.size=0 renders no image, and data.source='scenes'"):
        splits.open_source(schema.Data(source="scenes"))
    with pytest.raises(UserError, match="has no splits, and 'train'"):
        splits.open_source(schema.Data(source="scenes", size=9, split="train"))
    with pytest.raises(ValueError, match="at least 32 pixels"):
        ScenesSource(9, side=31)


def test_scenes_are_held_out_by_their_keys() -> None:
    train, held_out = splits.open_splits(schema.Data(source="scenes", size=100, image_size=48))
    assert len(train) + len(held_out) == 100 and train.map_classes == MAP_CLASSES
    table = train.object_table()
    first = train[5]
    assert set(first.objects.classes.tolist()) <= set(table.classes[table.records == 5].tolist())


def test_files_are_read_back(tmp_path: pathlib.Path) -> None:
    write_scenes(str(tmp_path), images=24, held_out=5, side=64)
    scenes = ScenesSource(29, side=64)
    data = schema.Data(source="coco", path=str(tmp_path))
    coco, held_out = splits.open_splits(data)
    assert [len(coco), len(held_out)] == [24, 5]
    assert coco.classes == shapes.CLASSES and coco.category_ids.tolist() == list(CATEGORY_IDS)
    assert coco.ignored["boxes of no area"] == 1 == held_out.ignored["boxes of no area"]
    kinds = set()
    for i in range(24):
        ours, theirs = coco[i].objects, scenes[i].objects
        assert (ours.boxes == theirs.boxes).all() and (ours.classes == theirs.classes).all()
        assert (ours.crowd == theirs.crowd).all() and (ours.areas == theirs.areas).all()
        for a, b in zip(ours.segmentations, theirs.segmentations, strict=True):
            kinds.add(type(a).__name__)
            mask = segmentations.decode_mask(b, *theirs.size)
            assert (segmentations.decode_mask(a, *ours.size) == mask).all()
        assert decode.decode_image(coco[i].image).shape[:2] == ours.size
    assert kinds == {"Polygons", "RunLengths"}
    assert {Image.open(tmp_path / "images/train" / coco.key(i)).mode for i in range(4)} == {
        "L",
        "CMYK",
        "RGB",
    }
    maps, _ = splits.open_splits(schema.Data(source="maps", path=str(tmp_path)))
    assert maps.classes == maps.map_classes == MAP_CLASSES
    for i in range(24):
        assert (decode_map.decode_map(maps[i].map, 14) == scenes[i].map).all()


def test_files_in_the_form_of_lvis(tmp_path: pathlib.Path) -> None:
    write_scenes(str(tmp_path), images=30, held_out=3, side=48, lvis=True)
    coco, _ = splits.open_splits(schema.Data(source="coco", path=str(tmp_path)))
    counts = ScenesSource(33, side=48).object_table().subset(np.arange(30)).records_per_class(8)
    assert coco.image_counts.tolist() == counts.tolist()
    assert set(coco.frequencies) <= {"r", "c", "f"} and len(set(coco.frequencies)) == 2
    some_missing = 0
    for i in range(30):
        objects = coco[i].objects
        assert not objects.crowd.any()
        assert not set(objects.negative.tolist()) & set(objects.classes.tolist())
        some_missing += len(objects.inexhaustive) > 0
    assert some_missing > 2
    document = json.loads((tmp_path / "annotations/instances_train.json").read_text())
    assert document["images"][3]["neg_category_ids"]


def test_the_files_of_pycocotools(tmp_path: pathlib.Path) -> None:
    """pycocotools decodes every written mask to the mask of the scene."""
    coco_module = pytest.importorskip("pycocotools.coco")
    write_scenes(str(tmp_path), images=20, held_out=1, side=64)
    theirs = coco_module.COCO(str(tmp_path / "annotations/instances_train.json"))
    source, _ = splits.open_splits(schema.Data(source="coco", path=str(tmp_path)))
    for i in range(len(source)):
        objects = source[i].objects
        for k, identity in enumerate(objects.ids.tolist()):
            mask = segmentations.decode_mask(objects.segmentations[k], *objects.size)
            assert (theirs.annToMask(theirs.anns[identity]) == mask).all()


def test_annotated_sources_are_not_converted(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="shards would lose"):
        conversion.check_plan(ScenesSource(9), str(tmp_path))

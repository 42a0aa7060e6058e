"""Batches of segmentation and detection: contents, the same bytes for any cut of the stream, and
bad records."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from m3i_jax import schema
from m3i_jax.data import annotated_batches, decode, pipeline, sampler, splits
from m3i_jax.data.annotated_batches import iterate_detect_batches, iterate_segment_batches
from m3i_jax.data.sources import base, segmentations
from m3i_jax.data.sources.objects import Objects, empty_objects
from m3i_jax.data.sources.scenes import ScenesSource
from m3i_jax.errors import UserError
from tests.scene_files import write_scenes

S = 48
KINDS = {"detect": iterate_detect_batches, "segment": iterate_segment_batches}


def settings(batch: int = 6, rule: str = "jitter", classes: int = -1, **more) -> schema.Config:
    rule_settings = {"scale": (0.5, 2.0), "max_objects": 5, "mask_size": 16} | more
    if rule == "range":
        rule_settings |= {"long": 400, "short": S}
    data = schema.Data(image_size=S, threads=0, max_bad_share=1.0, classes=classes)
    return schema.Config(
        data=data,
        train=schema.Train(batch_size=batch),
        dense=schema.DensePrediction(geometry=schema.Geometry(rule=rule, **rule_settings)),
    )


def first(kind: str, config: schema.Config, source, count: int = 1, **options):
    batches = KINDS[kind](config, source, **({"start": 0} | options))
    try:
        return [next(batches) for _ in range(count)], batches
    finally:
        batches.close()


class Listed:
    """A source of given records."""

    name, captions, classes, map_classes = "listed", False, ("a", "b", "c"), ("a", "b", "c")

    def __init__(self, *records: base.Record) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> base.Record:
        return self.records[index]

    def fingerprint(self) -> str:
        return "listed"

    def description(self) -> str:
        return "listed"


def objects(*boxes, classes=None, crowd=None, masks=(), size=(40, 60)) -> Objects:
    count = len(boxes)
    return dataclasses.replace(
        empty_objects(size),
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        classes=np.array(classes or [0] * count, np.int32),
        crowd=np.array(crowd or [False] * count, bool),
        segmentations=tuple(masks) or (None,) * count,
        areas=np.ones(count),
        ids=np.arange(count),
    )


def square(x0, y0, x1, y1) -> segmentations.Polygons:
    return segmentations.Polygons((np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], float),))


def record(key: str = "a", size=(40, 60), **more) -> base.Record:
    return base.Record(key, np.full((*size, 3), 90, np.uint8), **more)


def test_arrays_of_a_detection_batch() -> None:
    source = ScenesSource(40, side=64)
    (batch,), batches = first("detect", settings(batch=8), source, start=2**33)
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
        "image": ((8, S, S, 3), np.uint8),
        "size": ((8, 2), np.int32),
        "boxes": ((8, 5, 4), np.float32),
        "classes": ((8, 5), np.int32),
        "masks": ((8, 5, 16, 16), np.uint8),
        "position": ((8, 2), np.uint32),
    }
    assert batch["position"].tolist() == [[2, i] for i in range(8)]
    for row in range(8):
        height, width = batch["size"][row]
        assert not batch["image"][row, height:].any() and not batch["image"][row, :, width:].any()
        valid = batch["classes"][row] >= 0
        boxes = batch["boxes"][row]
        assert (np.diff(valid.astype(int)) <= 0).all()  # objects first
        assert not boxes[~valid].any() and not batch["masks"][row][~valid].any()
        assert (boxes >= 0).all() and (boxes <= [width, height, width, height]).all()
        assert (boxes[valid, 2:] > boxes[valid, :2]).all()
        assert batch["masks"].max() == 1 and batch["masks"][row][valid].any((1, 2)).all()
        # the sides of a box touch its mask; a shape of a few pixels may miss a row of the frame
    tight = batch["masks"][batch["classes"] >= 0]
    sides = (tight[:, 0], tight[:, -1], tight[:, :, 0], tight[:, :, -1])
    assert np.mean([side.any(1) for side in sides]) > 0.95
    crowds = sum(int(source[int(i)].objects.crowd.sum()) for i in batches.record)
    assert batches.counted().get("data/crowd_left_out", 0) == crowds


def test_arrays_of_a_segmentation_batch() -> None:
    source = ScenesSource(40, side=64)
    config = settings(batch=8, rule="range", category_share=0.75)
    (batch,), _ = first("segment", config, source)
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
        "image": ((8, S, S, 3), np.uint8),
        "map": ((8, S, S), np.uint8),
        "size": ((8, 2), np.int32),
        "position": ((8, 2), np.uint32),
    }
    for row in range(8):
        height, width = batch["size"][row]
        assert (batch["map"][row, height:] == 255).all()
        assert (batch["map"][row, :, width:] == 255).all()
        assert not batch["image"][row, height:].any() and not batch["image"][row, :, width:].any()
        assert (batch["map"][row, :height, :width] < 14).any()


def test_the_category_rule_prefers_mixed_crops() -> None:
    source = ScenesSource(60, side=64)

    def share(limit: float) -> float:
        config = settings(batch=60, rule="range", category_share=limit, scale=(2.0, 2.0))
        (batch,), batches = first("segment", config, source)
        largest = []
        for labels in batch["map"]:
            counts = np.bincount(labels.ravel(), minlength=256)[:255]
            largest.append(counts.max() / max(counts.sum(), 1))
        dominated = sum(value >= 0.75 for value in largest)
        if limit < 1:
            assert batches.counted()["data/crop_dominated"] >= dominated
        return dominated / 60

    assert share(0.75) < share(1.0) - 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bytes_for_any_cut_of_the_stream(kind) -> None:
    source, config = ScenesSource(30, side=64), settings(batch=6)
    whole, _ = first(kind, config, source, 3)
    later, _ = first(kind, config, source, 1, start=12)
    halves = [first(kind, config, source, 3, host=h, hosts=2)[0] for h in (0, 1)]
    threaded = dataclasses.replace(config, data=dataclasses.replace(config.data, threads=3))
    others, _ = first(kind, threaded, source, 3)
    for name, array in whole[2].items():
        assert array.tobytes() == later[0][name].tobytes(), name
        joined = np.concatenate([halves[0][2][name], halves[1][2][name]])
        assert array.tobytes() == joined.tobytes() == others[2][name].tobytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_worker_processes_change_nothing(kind, tmp_path) -> None:
    write_scenes(str(tmp_path / "files"), images=12, held_out=2, side=64)
    files = "coco" if kind == "detect" else "maps"
    data = schema.Data(source=files, path=str(tmp_path / "files"))
    source, _ = splits.open_splits(data, cache=str(tmp_path / "cache"))
    config = settings(batch=4)
    alone, _ = first(kind, config, source, 4)
    workers = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=2))
    shared, _ = first(kind, workers, source, 4)
    for a, b in zip(alone, shared, strict=True):
        assert set(a) == set(b)
        for name in a:
            assert a[name].tobytes() == b[name].tobytes(), name


def test_an_image_that_nothing_moves() -> None:
    """A placement of scale 1 keeps pixels, boxes and masks."""
    marked = objects(
        (10, 5, 30, 25), (0, 0, 60, 40), classes=[2, 1],
        masks=[square(10, 5, 30, 25), segmentations.encode_mask(np.ones((40, 60), bool))],
    )  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    source = Listed(base.Record("a", pixels, objects=marked))
    config = settings(batch=1, scale=(60 / S - 1e-9, 60 / S), flip_p=0.0)
    (batch,), _ = first("detect", config, source)
    offset = 60 - S
    boxes, width = batch["boxes"][0], batch["size"][0, 1]
    left = int(10 - boxes[0, 0])
    assert 0 <= left <= offset and width == S
    assert (batch["image"][0, :40] == pixels[:, left : left + S]).all()
    assert boxes[:2].tolist() == [[10 - left, 5, 30 - left, 25], [0, 0, S, 40]]
    assert batch["classes"][0].tolist() == [2, 1, -1, -1, -1] and batch["masks"][0, :2].all()


def test_what_is_left_out_is_counted() -> None:
    mask = square(2, 2, 50, 38)
    marked = objects(
        *[(2, 2, 50, 38)] * 9,
        classes=[0, 0, 1, 1, 2, 2, 0, 1, 2],
        crowd=[True] + [False] * 8,
        masks=[mask, None, segmentations.RunLengths(b"~", (40, 60)), *[mask] * 6],
    )
    config = settings(batch=1, classes=2, max_objects=2, scale=(0.5, 0.6))
    source = Listed(record(objects=marked))
    (batch,), batches = first("detect", config, source)
    # crowd 0; without mask 1; damaged 2; class 2 three times; then 3 and 6, and 7 is too many
    assert batch["classes"][0].tolist() == [1, 0]
    assert batches.counted() == {
        "data/crowd_left_out": 1,
        "data/object_without_mask": 1,
        "data/mask_damaged": 1,
        "data/class_dropped": 3,
        "data/object_cut": 1,
    }
    dense = dataclasses.replace(config.dense, detect=schema.Detect(masks=False))
    boxes_alone = dataclasses.replace(config, dense=dense)
    (batch,), batches = first("detect", boxes_alone, source)
    assert "masks" not in batch and batch["classes"][0].tolist() == [0, 1]
    assert batches.counted()["data/object_cut"] == 3


def test_objects_outside_of_the_crop_are_counted() -> None:
    corners = [(0, 0, 4, 4), (56, 0, 60, 4), (0, 36, 4, 40), (56, 36, 60, 40)]
    source = Listed(record(objects=objects(*corners, masks=[square(*c) for c in corners])))
    config = settings(batch=4, scale=(4.0, 4.0))
    (batch,), batches = first("detect", config, source)
    shown = int((batch["classes"] >= 0).sum())
    assert batches.counted()["data/object_out_of_crop"] == 16 - shown > 8


def test_an_image_without_objects_is_background() -> None:
    source = Listed(record("a", objects=empty_objects()), record("b", objects=empty_objects()))
    (batch,), batches = first("detect", settings(batch=2), source)
    assert (batch["classes"] == -1).all() and batches.counted() == {}


def test_images_without_objects_are_dropped_and_described() -> None:
    scenes = ScenesSource(60, side=48)
    kept = annotated_batches.drop_without_objects(scenes)
    counts = scenes.object_table().objects_per_record(60)
    assert len(kept) == (counts > 0).sum() < 60
    assert kept.object_table().objects_per_record(len(kept)).tolist() == counts[counts > 0].tolist()
    assert f"without {60 - len(kept)} that show no object" in kept.description()
    assert annotated_batches.drop_without_objects(kept) is kept
    assert kept.fingerprint() != scenes.fingerprint()
    empty = base.SubsetSource(scenes, np.flatnonzero(counts == 0), "part", "part")
    with pytest.raises(UserError, match="no image of scenes .* has an object to train on"):
        annotated_batches.drop_without_objects(empty)


def exif(orientation: int, size=(60, 40)) -> bytes:
    image = Image.new("RGB", size, (9, 200, 9))
    tags, buffer = image.getexif(), io.BytesIO()
    tags[0x0112] = orientation
    image.save(buffer, "JPEG", exif=tags)
    return buffer.getvalue()


def test_the_annotations_decide_about_a_rotation() -> None:
    """The size of the annotations is that of the stored pixels, or of the rotated image."""
    box = objects((10, 5, 30, 25), masks=[square(10, 5, 30, 25)])
    turned = dataclasses.replace(box, size=(60, 40))
    for marked, width, counted in ((box, 60, 1), (turned, 40, 0)):
        opened, ignored = annotated_batches.open_annotated(
            base.Record("a", exif(6), objects=marked), marked.size
        )
        assert (opened.width, ignored) == (width, bool(counted))
        source = Listed(base.Record("a", exif(6), objects=marked))
        (batch,), batches = first("detect", settings(batch=1, scale=(1.0, 1.01)), source)
        assert batches.counted().get("data/rotation_ignored", 0) == counted
        height, width = batch["size"][0]
        assert (height < width) == bool(counted)
    with pytest.raises(
        decode.BadRecord, match="other_size: 60 x 40 pixels .* annotated as 50 x 40"
    ):
        annotated_batches.open_annotated(base.Record("a", exif(6)), (50, 40))


def replaced(kind: str, bad: list[base.Record], good: list[base.Record]):
    """Returns the batch and the counts of a stream over bad and good records."""
    source, config = Listed(*bad, *good), settings(batch=40, classes=3)
    (batch,), batches = first(kind, config, source)
    expected, used = dict.fromkeys(range(len(bad)), 0), []
    for position in range(40):
        for attempt in range(100):
            (index,) = sampler.sample_index(0, np.array([position]), len(source), attempt).tolist()
            if index >= len(bad):
                used.append(index)
                break
            expected[index] += 1
    assert batches.record.tolist() == used
    return expected, batches.skipped


def test_bad_records_of_detection_are_replaced() -> None:
    good = record("good", objects=objects((1, 1, 9, 9), masks=[square(1, 1, 9, 9)]))
    bad = {
        "undecodable": base.Record("x", b"<html>", objects=empty_objects()),
        "no_annotation": record("y"),
        "other_size": record("z", size=(41, 60), objects=empty_objects((40, 60))),
    }
    expected, skipped = replaced("detect", list(bad.values()), [good] * 3)
    for number, reason in enumerate(bad):
        assert skipped[reason] == expected[number] > 0
    assert sum(skipped.values()) == sum(expected.values())


def test_bad_records_of_segmentation_are_replaced() -> None:
    flat = np.ones((40, 60), np.uint8)
    bad = {
        "truncated": base.Record("w", exif(1)[:-200], map=flat),
        "no_map": record("x"),
        "map_size": record("y", map=flat.T.copy()),
        "map_class": record("z", map=flat + np.uint8(2)),
    }
    expected, skipped = replaced("segment", list(bad.values()), [record(map=flat)] * 3)
    for number, reason in enumerate(bad):
        assert skipped[reason] == expected[number] > 0
    with pytest.raises(UserError) as error:
        first("segment", settings(), Listed(bad["map_class"], bad["no_map"]))
    message = str(error.value)
    assert "gave no image with a class map that could be used" in message and "\n" not in message
    assert "map_class (such as 'z')" in message and "no_map (such as 'x')" in message


def test_too_many_bad_records_stop_the_run() -> None:
    flat = np.ones((40, 60), np.uint8)
    source = Listed(record("bad", map=flat + np.uint8(9)), record("good", map=flat))
    config = settings(batch=2000)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_bad_share=0.05))
    batches = iterate_segment_batches(config, source, start=0)
    with pytest.raises(UserError, match=r"map_class \(such as '0'\)"):
        next(batches)
    batches.close()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="multiple of 4 hosts"):
        iterate_detect_batches(settings(batch=6), ScenesSource(9), start=0, host=0, hosts=4)
    with pytest.raises(UserError, match="listed has no images"):
        iterate_detect_batches(settings(), Listed(), start=0)
    with pytest.raises(UserError, match="has no class maps to learn segmentation from"):
        iterate_segment_batches(settings(), splits.open_source(schema.Data(size=9)), start=0)


def test_files_in_cocos_form_make_the_batches_of_the_scenes(tmp_path) -> None:
    """Boxes and masks of files are those of the built-in scenes; JPEG changes pixels alone."""
    write_scenes(str(tmp_path), images=16, held_out=1, side=64)
    coco, _ = splits.open_splits(schema.Data(source="coco", path=str(tmp_path)))
    scenes = base.SubsetSource(ScenesSource(17, side=64), np.arange(16), "part", "part")
    config = settings(batch=16, max_objects=8)
    (ours,), _ = first("detect", config, coco)
    (theirs,), _ = first("detect", config, scenes)
    for name in ("size", "classes", "position"):
        assert (ours[name] == theirs[name]).all()
    # polygons are cut exactly, run lengths pixel by pixel
    assert np.abs(ours["boxes"] - theirs["boxes"]).max() < 0.02
    assert (ours["masks"] != theirs["masks"]).mean() < 0.02
    maps, _ = splits.open_splits(schema.Data(source="maps", path=str(tmp_path)))
    (ours,), _ = first("segment", config, maps)
    (theirs,), _ = first("segment", config, scenes)
    assert (ours["map"] == theirs["map"]).all()
    assert json.loads((tmp_path / "annotations/instances_train.json").read_text())["images"]


def test_a_builder_of_another_task_is_iterated() -> None:
    """The contract of `pipeline.iterate`: any builder of arrays."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Means(pipeline.RecordBatchBuilder):
        notes = ("dark",)

        def large(self):
            return {}

        def arrays(self, first):
            return {"mean": np.zeros(self.rows, np.float32)}

        def uniforms(self, first):
            return np.zeros((self.rows, 1))

        def fill_row(self, record, row, u, batch):
            batch["mean"][row] = decode.decode_image(record.image).mean()
            self.count(batch, "dark", int(batch["mean"][row] < 50))

    images = [np.full((20, 20, 3), v, np.uint8) for v in (10, 200, 220)]
    source = Listed(*(base.Record(str(i), image) for i, image in enumerate(images)))
    data = schema.Data(threads=0)
    builder = Means(data=data, seed=0, source=source, rows=6, batch=6, first=0)
    batches = pipeline.iterate(builder)
    batch = next(batches)
    assert sorted(batch["mean"].tolist()) == [10, 10, 200, 200, 220, 220]
    assert batches.counted() == {"data/dark": 2}
    batches.close()

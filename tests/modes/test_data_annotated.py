"""--mode=data on annotated images with known contents: objects, sizes, classes, unlabelled pixels,
what is wrong with annotations, and what batches leave out."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from m3i_jax import schema
from m3i_jax.data import annotation_stats, dataset_scan
from m3i_jax.data.sources import base
from m3i_jax.data.sources.scenes import ScenesSource
from m3i_jax.modes import data
from m3i_jax.reporting import data_report
from tests import toy
from tests.scene_files import write_scenes

STRIDES = (8, 16)


def config(source: schema.Data, task: str) -> schema.Config:
    """A tiny run of a task."""
    small = toy.settings()
    segment = schema.Segment(strides=STRIDES, width=8, pool_scales=(1, 2), aux_width=0)
    detect = schema.Detect(
        strides=STRIDES, anchor_sizes=(12, 24), width=8, box_convs=0, box_hidden=8,
        mask_convs=1, rois=8, proposals=(16, 8), test_proposals=(16, 8), canonical=(24, 8),
    )  # fmt: skip
    dense = schema.DensePrediction(
        geometry=schema.Geometry(scale=(0.3, 2.0), max_objects=3, mask_size=14),
        segment=segment,
        detect=detect,
    )
    return dataclasses.replace(
        small, task=task, data=dataclasses.replace(source, image_size=32), dense=dense
    )


def report_of(
    source: schema.Data, task: str, directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict, str, str]:
    printed: list[str] = []
    monkeypatch.setattr(data.dataset_scan.measure_speed, "__kwdefaults__", {"seconds": 0.05})
    monkeypatch.setattr(
        data,
        "chips_fed",
        lambda *_: {
            "views": False,
            "chips": [],
            "mfu": 1.0,
            "flops_per_image": 1,
            "image_size": 32,
        },
    )
    monkeypatch.setattr("builtins.print", lambda *w, **_: printed.append(" ".join(map(str, w))))
    assert data.run(config(source, task), workdir=str(directory)) == 0
    return (
        json.loads((directory / "data.json").read_text()),
        (directory / "data.html").read_text(),
        "\n".join(printed),
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(str(folder), images=30, held_out=10, side=64)
    return folder


def test_objects_are_counted(files, tmp_path, monkeypatch) -> None:
    report, page, console = report_of(
        schema.Data(source="coco", path=str(files)), "detect", tmp_path, monkeypatch
    )
    objects = report["annotations"]["objects"]
    scenes = ScenesSource(40, side=64)
    records = [scenes[i].objects for i in range(40)]
    solid = [o.select(~o.crowd) for o in records]
    kept = range(40)  # also those without an object, on which no detection is trained
    counts = [len(solid[i]) for i in kept]
    assert objects["images"] == report["pictures"]["usable"] == len(kept)
    assert objects["objects"] == sum(counts) and objects["most"] == max(counts)
    assert objects["crowds"] == sum(int(records[i].crowd.sum()) for i in kept)
    areas = np.concatenate([solid[i].areas for i in kept])
    small = int((areas < 32**2).sum())
    assert objects["sizes"] == [["small", small], ["medium", len(areas) - small], ["large", 0]]
    assert objects["objects_over"] == sum(max(n - 3, 0) for n in counts)
    assert objects["images_over"] == sum(n > 3 for n in counts)
    assert objects["without_object"] == counts.count(0) > 0
    names, numbers, _ = zip(*objects["table"], strict=True)
    labels = np.concatenate([solid[i].classes for i in kept])
    assert dict(zip(names, numbers, strict=True)) == {
        name: int((labels == c).sum()) for c, name in enumerate(scenes.classes)
    }
    counted = report["speed"]["counted"]
    assert report["speed"]["samples"] > 0 and counted["object_out_of_crop"] > 0
    for text in ("objects an image", "side of an object", "class of objects"):
        assert text in page
    assert f"{objects['objects_over']} objects of {objects['images_over']} images are" in console
    assert "object out of crop" in console and "with a label" not in console


def test_maps_are_counted(files, tmp_path, monkeypatch) -> None:
    report, page, console = report_of(
        schema.Data(source="maps", path=str(files)), "segment", tmp_path, monkeypatch
    )
    maps = report["annotations"]["maps"]
    scenes = ScenesSource(40, side=64)
    pixels = sum(np.bincount(scenes[i].map.ravel(), minlength=256) for i in range(40))
    assert maps["images"] == 40 and not report["annotations"]["objects"]
    assert maps["unlabelled"] == pytest.approx(pixels[255] / pixels.sum(), abs=1e-6)
    shares = {name: share for name, share, _ in maps["table"]}
    for c, name in enumerate(scenes.map_classes):
        assert shares[name] == pytest.approx(pixels[c] / pixels[:255].sum(), abs=1e-6)
    assert "of the pixels have a class" in page and "of the pixels are unlabelled" in console


def test_annotations_that_cannot_be_used_are_bad_records(files, tmp_path, monkeypatch) -> None:
    root = tmp_path / "copy"
    write_scenes(str(root), images=6, held_out=2, side=64)
    for number, array in ((0, np.zeros((9, 9), np.uint8)), (1, np.full((64, 64), 99, np.uint8))):
        (name,) = root.glob(f"annotations/train/*{number}.png")
        size = Image.open(root / "images/train" / f"{name.stem}.jpg").size
        wanted = array if number == 0 else np.full(size[::-1], 99, np.uint8)
        Image.fromarray(wanted).save(name)
    report, _, _ = report_of(
        schema.Data(source="maps", path=str(root)), "segment", tmp_path / "run", monkeypatch
    )
    assert {row["reason"]: row["count"] for row in report["bad"]} == {
        "map_size": 1,
        "map_class": 1,
    }


def test_damaged_and_missing_masks() -> None:
    scene = next(r for r in map(ScenesSource(20).__getitem__, range(20)) if len(r.objects) > 2)
    from m3i_jax.data.sources.segmentations import RunLengths

    masks = (None, RunLengths(b"~", scene.objects.size), *scene.objects.segmentations[2:])
    objects = dataclasses.replace(scene.objects, segmentations=masks)
    info = dataset_scan.inspect_record(0, base.Record("a", scene.image, objects=objects))
    assert info.annotations is not None and info.reason == ""
    assert (info.annotations.without_mask, info.annotations.damaged) == (1, 1)
    crowds = dataclasses.replace(objects, crowd=np.arange(len(objects)) == 0)
    info = dataset_scan.inspect_record(0, base.Record("a", scene.image, objects=crowds))
    # the report gives a share of the objects that are no crowds
    assert (info.annotations.without_mask, info.annotations.crowds) == (0, 1)
    other = dataclasses.replace(objects, size=(7, 7))
    info = dataset_scan.inspect_record(0, base.Record("a", scene.image, objects=other))
    assert info.reason == "other_size" and info.annotations is None


def test_frequencies_of_classes() -> None:
    infos = [
        annotation_stats.AnnotationInfo(np.array([0] + [1] * (i < 50) + [2] * (i < 3)), np.ones(3))
        for i in range(150)
    ]
    stats = annotation_stats.annotation_stats(
        infos, classes=("a", "b", "c", "d"), map_classes=(), geometry=schema.Geometry()
    )["objects"]
    assert (stats["frequent"], stats["common"], stats["rare"], stats["empty"]) == (1, 1, 1, ["d"])


def test_shares_of_classes_are_of_all_objects() -> None:
    """Of 40 classes the largest and the smallest have a bar."""
    table = [(f"c{k}", 40 - k, 1) for k in range(40)]
    report = {
        "pictures": {"usable": 9},
        "sizes": {"short_side": [], "aspect": []},
        "captions": {},
        "categories": {"table": []},
        "annotations": {"objects": {"objects": 820, "table": table}},
    }
    ((title, bars),) = data_report.histogram_lines(report)
    unit, total = data_report.histogram_unit(title, report)
    assert (unit, total, len(bars)) == ("objects", 820, 12)
    assert data_report.format_share(bars[0][1], total) == "4.9 %"


def test_repeat_factors_do_not_stop_the_report(files, tmp_path, monkeypatch) -> None:
    """As in configs/transfer/lvis.py. Batches of the measured speed are made from records in
    memory, which have no table of all objects."""
    plain = config(schema.Data(source="coco", path=str(files)), "detect")
    geometry = dataclasses.replace(plain.dense.geometry, repeat=0.5)
    repeated = dataclasses.replace(plain, dense=dataclasses.replace(plain.dense, geometry=geometry))
    monkeypatch.setitem(globals(), "config", lambda source, task: repeated)
    report, _, _ = report_of(repeated.data, "detect", tmp_path, monkeypatch)
    assert report["speed"]["pipeline"] > 0 and report["annotations"]["objects"]["images"] == 40


def test_maps_that_no_run_trains_on_are_reported(tmp_path, monkeypatch) -> None:
    """Maps of one class: the report is written, with what a run would say."""
    for part, mode in (("images", "RGB"), ("annotations", "L")):
        (tmp_path / part).mkdir()
        for i in range(4):
            Image.new(mode, (40, 40), 1 if mode == "L" else (i, 0, 0)).save(
                tmp_path / part / f"{i}.png"
            )
    (tmp_path / "classes.txt").write_text("road\n")
    source = schema.Data(source="maps", path=str(tmp_path))
    report, _, console = report_of(source, "segment", tmp_path / "run", monkeypatch)
    assert report["speed"]["pipeline"] == 0 and report["pictures"]["usable"] == 4
    assert "has 1 classes (road)" in report["speed"]["refused"]
    assert "No run can train on these data" in console

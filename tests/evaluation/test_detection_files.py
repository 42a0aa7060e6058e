"""Results of a source that is a COCO file, as files: pycocotools reads them with the original file
and finds the same precision."""

import contextlib
import io
import json
import pathlib
import sys
import types
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m3i_jax import schema
from m3i_jax.data.sources import base
from m3i_jax.data.sources.coco import CocoSource
from m3i_jax.data.sources.objects import empty_objects
from m3i_jax.errors import UserError
from m3i_jax.evaluation import detection_eval, detection_results
from m3i_jax.evaluation.detection_results import DetectionResult, ImageDetections
from m3i_jax.modes import annotated_figures, dense_views
from tests.evaluation.test_detection_scores import STATS, needs_pycocotools, random_boxes

IDS = (1, 2, 5, 90)


def annotation(r: np.random.Generator, number: int, image: int, box: np.ndarray) -> dict[str, Any]:
    """A polygon, or every fifth time a crowd as run lengths with a list of counts."""
    x0, y0, x1, y1 = box.round(2).tolist()
    middle = (x0 + x1) / 2
    shape: Any = [[x0, y0, x1, y0, x1, y1, middle, y1]]
    crowd = number % 5 == 4
    if crowd:
        mask = np.zeros((150, 200), np.uint8)
        mask[int(y0) : int(y1) + 1, int(x0) : int(x1) + 1] = 1
        flat = np.concatenate([[0], mask.T.reshape(-1), [0]])
        edges = np.flatnonzero(np.diff(flat))
        counts = np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()
        shape = {"size": [150, 200], "counts": counts}
    return {
        "id": number,
        "image_id": image,
        "category_id": int(r.choice(IDS)),
        "bbox": [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)],
        "area": round((x1 - x0) * (y1 - y0) * 0.75, 2),
        "iscrowd": int(crowd),
        "segmentation": shape,
    }


@pytest.fixture
def source(tmp_path: pathlib.Path) -> CocoSource:
    """Twelve images, whose first annotation has the id 1; pycocotools cannot match an id of 0."""
    r = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(12):
        image = 7000 - 11 * number
        pixels = r.integers(0, 256, (150, 200, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{image}.jpg")
        images.append({"id": image, "file_name": f"{image}.jpg", "height": 150, "width": 200})
        for box in random_boxes(r, int(r.integers(0, 6))):
            annotations.append(annotation(r, len(annotations) + 1, image, box))
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": k, "name": f"class {k}"} for k in IDS],
    }
    (tmp_path / "truth.json").write_text(json.dumps(content))
    return CocoSource(str(tmp_path), str(tmp_path / "truth.json"))


def detected(result: detection_results.ImageTruth, r: np.random.Generator) -> DetectionResult:
    """Most objects, moved a little, and some others."""
    keep = r.random(len(result.boxes)) < 0.8
    boxes = result.boxes[keep] + r.normal(0, 1.5, (int(keep.sum()), 4))
    boxes = np.concatenate([boxes, random_boxes(r, 2)]).clip(0, [200, 150, 200, 150])
    classes = np.concatenate([result.classes[keep], r.integers(0, 4, 2)])
    masks = []
    for box in boxes:
        cells = np.fromfunction(lambda y, x: (x + 0.5) / 28 + (y < 14) > 0.5, (28, 28))
        pasted = detection_results.paste_mask(cells.astype(np.float32), box, (150, 200))
        masks.append(detection_results.mask_to_rle(pasted))
    found = ImageDetections(
        boxes=boxes.astype(np.float32),
        scores=r.random(len(boxes)).astype(np.float32),
        classes=classes,
        masks=masks,
    )
    return DetectionResult(result, found)


@needs_pycocotools
def test_pycocotools_finds_the_same_with_the_original_file(
    source: CocoSource, tmp_path: pathlib.Path
) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    r, results = np.random.default_rng(1), []
    for index in range(len(source)):
        objects = source[index].objects
        truth = detection_results.image_truth(objects, record=index, size=(150, 200))
        results.append(detected(truth, r))
    table = detection_results.category_table(source)
    assert table.ids == IDS
    annotated_figures.write_results(tmp_path, results, table, masks=True)
    for kind in ("bbox", "segm"):
        metrics = detection_eval.detection_scores(results, table, kind=kind).metrics
        with contextlib.redirect_stdout(io.StringIO()):
            known = COCO(source.annotations)
            loaded = known.loadRes(str(tmp_path / f"detections-{kind}.json"))
            run = COCOeval(known, loaded, kind)
            run.evaluate()
            run.accumulate()
            run.summarize()
        compared = 0
        for name, value in zip(STATS, run.stats, strict=True):
            if name and value >= 0:
                compared += 1
                assert metrics[name] == pytest.approx(value, abs=1e-9), (kind, name)
        assert compared >= 8 and metrics["AP"] > 0.2


def test_categories_keep_ids_and_frequencies_under_other_numbers() -> None:
    """The run may have classes that the held-out file does not list, in another order, or fewer."""
    holder = types.SimpleNamespace(
        classes=("ant", "bee", "cat"), category_ids=(4, 7, 90), frequencies=("r", "c", "f")
    )
    source = types.SimpleNamespace(classes=("cat", "eel", "ant"), source=holder)
    table = detection_results.category_table(source)
    assert (table.names, table.ids) == (("cat", "eel", "ant"), (90, 91, 4))
    assert table.frequency == ("f", "r", "r")
    table = detection_results.category_table(holder, ("ant", "bee"))
    assert (table.names, table.ids, table.frequency) == (("ant", "bee"), (4, 7), ("r", "c"))
    table = detection_results.category_table(holder, ("ant", "bee", "cat", "3"))
    assert (table.ids, table.frequency) == ((4, 7, 90, 91), ("r", "c", "f", "r"))


@needs_pycocotools
def test_results_are_not_redacted(tmp_path: pathlib.Path) -> None:
    """Run lengths can look like a key."""
    rle = {"size": [9, 9], "counts": "hf_" + "0" * 40}
    truth = detection_results.image_truth(None, record=0, size=(9, 9))
    found = ImageDetections(
        boxes=np.array([[0, 0, 1, 1.0]]), scores=np.ones(1), classes=np.zeros(1, int), masks=[rle]
    )
    table = detection_results.CategoryTable(names=("a",))
    annotated_figures.write_results(tmp_path, [DetectionResult(truth, found)], table, masks=True)
    (row,) = json.loads((tmp_path / "detections-segm.json").read_text())
    assert row["segmentation"] == rle


def test_images_of_figures_have_the_orientation_of_their_annotations() -> None:
    """The size of the annotations is that of the stored pixels, or of the rotated image."""
    image, encoded = Image.new("RGB", (60, 40)), io.BytesIO()
    tags = image.getexif()
    tags[0x0112] = 6  # a quarter turn
    image.save(encoded, "JPEG", exif=tags)
    for stated, shown in (((40, 60), (40, 60)), ((60, 40), (60, 40)), ((0, 0), (60, 40))):
        record = base.Record("a", encoded.getvalue(), objects=empty_objects(stated))
        inputs: Any = types.SimpleNamespace(held_out=[record], config=schema.Config())
        assert annotated_figures._original_image(inputs, 0).shape[:2] == shown


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({}, "images scaled by 0.1 to 2 times 224 pixels"),
        ({"rule": "range", "long": 99, "short": 50}, "images scaled by 0.1 to 2 times 99 x 50 p"),
        ({"rule": "buckets", "buckets": (32, 64, 64, 32)}, "images fitted into 32 x 64, 64 x 32"),
    ],
)
def test_a_preview_says_how_images_of_detection_are_resized(rule: dict, words: str) -> None:
    geometry = schema.Geometry(**rule)
    config = schema.Config(dense=schema.DensePrediction(geometry=geometry))
    assert dense_views._detect_summary(config).startswith(words)


@pytest.mark.parametrize("library", ["pycocotools", "faster_coco_eval"])
def test_what_scores_need_is_refused_before_images_are_predicted(
    monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    frequency = ("r", "f") if library == "faster_coco_eval" else ()
    held_out = types.SimpleNamespace(classes=("a", "b"), category_ids=(1, 2), frequencies=frequency)
    inputs: Any = types.SimpleNamespace(held_out=held_out, classes=("a", "b"))
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=f"{library.replace('_', '-')}, which is not installed"):
        detection_eval._build(inputs)

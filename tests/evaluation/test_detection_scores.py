"""Average precisions: those of the libraries' own tools on files, of a plain computation on easy
cases, independent of hosts and order, with crowds, sizes, missing masks and LVIS's rules."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import pathlib
import sys
import types

import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.data.sources import scenes
from m3i_jax.errors import UserError
from m3i_jax.evaluation import annotated_inputs, detection_eval, detection_results
from m3i_jax.evaluation.detection_results import (
    CategoryTable,
    DetectionResult,
    ImageDetections,
    ImageTruth,
)
from m3i_jax.evaluation.registry import EvalContext

needs_pycocotools = pytest.mark.skipif(
    importlib.util.find_spec("pycocotools") is None, reason="without the extra dense"
)
needs_lvis = pytest.mark.skipif(
    importlib.util.find_spec("faster_coco_eval") is None
    or importlib.util.find_spec("pycocotools") is None,
    reason="without the extra dense",
)
NAMES = ("cat", "dog", "bus", "pen", "cup")
TABLE = CategoryTable(names=NAMES, ids=(1, 2, 5, 90, 1230), frequency=tuple("rccff"))
HEIGHT, WIDTH = 150, 200


def ellipse(box: np.ndarray) -> np.ndarray:
    """A mask that does not fill its box."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    centre, half = (box[:2] + box[2:]) / 2, np.maximum((box[2:] - box[:2]) / 2, 0.5)
    return ((x - centre[0]) / half[0]) ** 2 + ((y - centre[1]) / half[1]) ** 2 <= 1


def random_boxes(r: np.random.Generator, count: int) -> np.ndarray:
    """Of all three sizes: sides from 5 to 140 pixels."""
    side = np.exp(r.uniform(np.log(5), np.log(140), (count, 2)))
    low = r.uniform(0, 1, (count, 2)) * np.maximum([WIDTH, HEIGHT] - side, 0)
    return np.clip(np.concatenate([low, low + side], 1), 0, [WIDTH, HEIGHT] * 2)


def world(seed: int, images: int = 24, *, masks: bool = True) -> list[DetectionResult]:
    """Images with objects of four of five classes, crowds, and detections that find most of them,
    some twice, with wrong classes and in empty places; the ids fall."""
    r = np.random.default_rng(seed)

    def encoded(boxes: np.ndarray) -> list:
        encode = detection_results.mask_to_rle
        return [encode(ellipse(box)) for box in boxes] if masks else [None] * len(boxes)

    out = []
    for number in range(images):
        boxes = random_boxes(r, count := int(r.integers(0, 7)))
        classes, crowd = r.integers(0, 4, count), r.random(count) < 0.15
        picked = r.permutation(count)[: int(r.integers(0, count + 1))]
        picked = np.concatenate([picked, picked[:2]]).astype(int)
        near = boxes[picked] + r.normal(0, 0.07, (len(picked), 4)) * np.tile(
            boxes[picked, 2:] - boxes[picked, :2], 2
        )
        guesses = np.concatenate([near, random_boxes(r, int(r.integers(0, 3)))])
        guesses = np.clip(guesses, 0, [WIDTH, HEIGHT] * 2)
        labels = r.integers(0, 5, len(guesses))
        right = r.random(len(picked)) < 0.8
        labels[: len(picked)][right] = classes[picked][right]
        area = np.array([ellipse(box).sum() for box in boxes], np.float64)
        truth = ImageTruth(
            image=1000 - 3 * number,
            size=(HEIGHT, WIDTH),
            boxes=boxes,
            classes=classes,
            crowd=crowd,
            area=area,
            masks=encoded(boxes),
        )
        found = ImageDetections(
            boxes=guesses,
            scores=np.round(r.random(len(guesses)), 2),  # with ties
            classes=labels,
            masks=encoded(guesses) if masks else None,
        )
        out.append(DetectionResult(truth, found))
    return out


STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "", "", "AR100", "ARs", "ARm", "ARl")


@needs_pycocotools
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_pycocotools_reads_the_same_from_files(kind: str, tmp_path: pathlib.Path) -> None:
    """Its own command on our ground truth and results, with ids that are not contiguous."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    results = world(0)
    scores = detection_eval.detection_scores(results, TABLE, kind=kind)
    truth = detection_eval.truth_json([result.truth for result in results], TABLE)
    rows = detection_results.json_detections(results, TABLE, kind)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "found.json").write_text(json.dumps(rows))
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO(tmp_path / "truth.json")
        run = COCOeval(known, known.loadRes(str(tmp_path / "found.json")), kind)
        run.evaluate()
        run.accumulate()
        run.summarize()
        by_class = run.eval["precision"][:, :, :, 0, 2]
        run.params.useCats = 0
        run.evaluate()
        run.accumulate()
    for name, value in zip(STATS, run.stats, strict=True):
        if name:
            assert value > 0.05, name  # every size occurs
            assert scores.metrics[name] == pytest.approx(value, abs=1e-12), name
    np.testing.assert_allclose(scores.curves[:4], by_class[0, :, :4].T, atol=1e-12)
    assert np.isnan(scores.ap[4]) and scores.objects[4] == 0
    crowds = sum(int(result.truth.crowd.sum()) for result in results)
    assert crowds > 3 and scores.objects.sum() + crowds == len(truth["annotations"])
    agnostic = run.eval["precision"][0, :, :, 0, 2]
    assert scores.metrics["AP50_agnostic"] == pytest.approx(agnostic.mean(), abs=1e-12)


@needs_pycocotools
def test_results_of_masks_have_no_boxes() -> None:
    """With the box, pycocotools takes its area, and sizes are those of boxes."""
    results = world(1)
    rows = detection_results.json_detections(results, TABLE, "segm")
    assert rows and not any("bbox" in row for row in rows)
    scores = detection_eval.detection_scores(results, TABLE, kind="segm").metrics
    boxed = [
        row | {"bbox": box["bbox"]}
        for row, box in zip(
            rows, detection_results.json_detections(results, TABLE, "bbox"), strict=True
        )
    ]
    truth = detection_eval.truth_json([result.truth for result in results], TABLE)
    tables = detection_eval._coco_tables(truth, boxed, "segm")
    other = dict(detection_eval._metrics(tables, (), 100))
    assert scores["AP"] == pytest.approx(other["AP"]) and scores["APs"] != other["APs"]


@needs_pycocotools
@pytest.mark.parametrize("protocol", ["coco", "lvis"])
def test_nothing_depends_on_order_or_hosts(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if protocol == "lvis":
        pytest.importorskip("faster_coco_eval")
    results = world(2)
    sent: list[bytes] = []
    monkeypatch.setattr(
        detection_results.parallel, "gather_bytes", lambda name, own: sent.append(own) or [own]
    )
    halves = [results[1::2], results[::2]]
    for half in halves:
        detection_results.gather_results(half)
    monkeypatch.setattr(detection_results.parallel, "gather_bytes", lambda name, own: sent)
    together = detection_results.gather_results([])
    assert [result.image for result in together] == sorted(r.image for r in results)
    for kind in ("bbox", "segm"):
        one, two = (
            detection_eval.detection_scores(each, TABLE, kind=kind, protocol=protocol)
            for each in (results, together)
        )
        assert one.metrics == two.metrics
        np.testing.assert_array_equal(one.curves, two.curves)
    with pytest.raises(ValueError, match="image 1000 was evaluated twice"):
        detection_results.sort_results([*results, results[0]])


@needs_pycocotools
@pytest.mark.parametrize("masks", [True, False])
def test_gathering_changes_no_bit(masks: bool) -> None:
    for one, two in zip(
        detection_results.sort_results(world(3, masks=masks)),
        detection_results.gather_results(world(3, masks=masks)),
        strict=True,
    ):
        for part in ("truth", "found"):
            for field in dataclasses.fields(getattr(one, part)):
                a, b = (getattr(getattr(each, part), field.name) for each in (one, two))
                assert np.asarray(a).shape == np.asarray(b).shape and np.all(a == b), field.name


@needs_pycocotools
def test_perfect_and_empty_detections() -> None:
    results = [
        DetectionResult(
            r.truth,
            ImageDetections(
                boxes=r.truth.boxes,
                scores=np.ones(len(r.truth.classes)),
                classes=r.truth.classes,
                masks=list(r.truth.masks),
            ),
        )
        for r in world(4)
    ]
    nothing = ImageDetections(
        boxes=np.zeros((0, 4)), scores=np.zeros(0), classes=np.zeros(0, int), masks=[]
    )
    for kind in ("bbox", "segm"):
        perfect = detection_eval.detection_scores(results, TABLE, kind=kind).metrics
        assert perfect["AP"] == pytest.approx(1) and perfect["ARs"] == pytest.approx(1)
        blind = [DetectionResult(result.truth, nothing) for result in results]
        empty = detection_eval.detection_scores(blind, TABLE, kind=kind)
        assert empty.metrics["AP"] == 0 and empty.metrics["APl"] == 0
    unlabelled = [dataclasses.replace(each, truth=_empty(each.truth)) for each in results]
    assert detection_eval.detection_scores(unlabelled, TABLE, kind="bbox").metrics == {}


def _empty(truth: ImageTruth) -> ImageTruth:
    return dataclasses.replace(
        truth,
        boxes=np.zeros((0, 4)),
        classes=np.zeros(0, int),
        crowd=np.zeros(0, bool),
        area=np.zeros(0),
        masks=[],
    )


@needs_pycocotools
def test_the_first_annotation_can_be_found() -> None:
    """pycocotools takes a match with an annotation of id 0 for none."""
    result = next(r for r in world(5) if len(r.truth.classes) == 1 and not r.truth.crowd[0])
    found = ImageDetections(
        boxes=result.truth.boxes, scores=np.array([0.5]), classes=result.truth.classes
    )
    scores = detection_eval.detection_scores(
        [DetectionResult(dataclasses.replace(result.truth, image=0), found)], TABLE, kind="bbox"
    )
    assert scores.metrics["AP"] == pytest.approx(1)


@needs_pycocotools
def test_objects_without_a_mask_are_ignored_for_masks() -> None:
    results = world(6)
    cut = []
    for result in results:
        keep = np.arange(len(result.truth.masks)) % 3 != 0
        masks = [m if k else None for m, k in zip(result.truth.masks, keep, strict=True)]
        cut.append(
            dataclasses.replace(result, truth=dataclasses.replace(result.truth, masks=masks))
        )
    scores = detection_eval.detection_scores(cut, TABLE, kind="segm")
    whole = detection_eval.detection_scores(results, TABLE, kind="segm")
    masks = [mask for result in cut for mask in result.truth.masks]
    assert sum(mask is None for mask in masks) > 5
    # their detections are neither right nor wrong
    assert scores.metrics["AP"] > 0.5 * whole.metrics["AP"]
    assert (
        detection_eval.detection_scores(cut, TABLE, kind="bbox").metrics
        == detection_eval.detection_scores(results, TABLE, kind="bbox").metrics
    )


@needs_pycocotools
def test_a_detection_of_an_object_without_a_mask_above_the_image_is_ignored() -> None:
    """Its box begins three pixels above the image; the object below it is found second."""
    boxes = np.array([[2, -3, 12, 10], [2, 20, 12, 30.0]])
    pixels = np.zeros((2, 40, 40), np.uint8)
    pixels[0, :10, 2:12], pixels[1, 20:30, 2:12] = 1, 1
    masks = [detection_results.mask_to_rle(each) for each in pixels]
    truth = ImageTruth(
        image=1,
        size=(40, 40),
        boxes=boxes,
        classes=np.zeros(2, np.int64),
        crowd=np.zeros(2, bool),
        area=np.full(2, 100.0),
        masks=[None, masks[1]],
    )
    found = ImageDetections(
        boxes=boxes, scores=np.array([0.9, 0.8]), classes=np.zeros(2, np.int64), masks=masks
    )
    scores = detection_eval.detection_scores([DetectionResult(truth, found)], TABLE, kind="segm")
    assert scores.metrics["AP"] == pytest.approx(1)


def lvis_world() -> list[DetectionResult]:
    out = []
    for number, result in enumerate(world(7)):
        absent = sorted(set(range(5)) - set(result.truth.classes.tolist()))
        truth = dataclasses.replace(
            result.truth,
            crowd=np.zeros(len(result.truth.classes), bool),
            negative=tuple(absent[: number % 2]),
            not_exhaustive=tuple(result.truth.classes[:1].tolist()) if number % 3 == 0 else (),
        )
        out.append(dataclasses.replace(result, truth=truth))
    return out


@needs_lvis
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_lvis_is_that_of_its_library_on_files(kind: str, tmp_path: pathlib.Path) -> None:
    from faster_coco_eval import COCO, COCOeval_faster

    results = lvis_world()
    scores = detection_eval.detection_scores(results, TABLE, kind=kind, protocol="lvis").metrics
    truth = detection_eval.truth_json([result.truth for result in results], TABLE)
    # an image without objects whose detections are all ignored makes the library fail on masks
    some = [
        r
        for r in results
        if len(r.truth.classes) or np.isin(r.found.classes, r.truth.negative).any()
    ]
    assert len(some) < len(results)
    rows = detection_results.json_detections(some, TABLE, kind)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "found.json").write_text(json.dumps(rows))
    known = COCO(str(tmp_path / "truth.json"))
    run = COCOeval_faster(known, known.loadRes(str(tmp_path / "found.json")), kind, lvis_style=True)
    run.params.maxDets = [300]
    run.run()
    stats = run.stats_as_dict
    for name, theirs in {"AP": "AP_all", "AP50": "AP_50", "APs": "AP_small"}.items() | {
        (name, name) for name in ("APr", "APc", "APf")
    }:
        assert scores[name] == pytest.approx(stats[theirs], abs=1e-12), name
    # the rules of LVIS matter here
    plain = detection_eval.detection_scores(results, TABLE, kind=kind).metrics
    assert scores["AP"] > plain["AP"] + 0.01


@needs_lvis
def test_lvis_keeps_the_best_300_of_an_image_over_all_classes() -> None:
    """The 301st detection is the right one, of a class of its own."""
    base = next(r for r in lvis_world() if len(r.truth.classes) > 1)
    one = dataclasses.replace(
        base.truth,
        boxes=base.truth.boxes[:1],
        classes=np.array([0]),
        crowd=np.array([False]),
        area=base.truth.area[:1],
        masks=[None],
        negative=(1,),
        not_exhaustive=(),
    )

    def ap(wrong: int) -> float:
        found = ImageDetections(
            boxes=np.repeat(one.boxes, wrong + 1, 0),
            scores=np.linspace(0.9, 0.1, wrong + 1),
            classes=np.array([1] * wrong + [0]),
        )
        return detection_eval.detection_scores(
            [DetectionResult(one, found)], TABLE, kind="bbox", protocol="lvis"
        ).metrics["AP"]

    assert ap(299) == pytest.approx(1) and ap(300) == 0


@pytest.mark.parametrize("module", ["pycocotools", "faster_coco_eval"])
def test_a_missing_library_is_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = world(8, 2, masks=False)
    if module == "faster_coco_eval":
        pytest.importorskip("pycocotools")
    monkeypatch.setitem(sys.modules, module, None)
    protocol = "coco" if module == "pycocotools" else "lvis"
    with pytest.raises(UserError, match=r"m3i-jax\[dense\]") as error:
        detection_eval.detection_scores(results, TABLE, kind="bbox", protocol=protocol)
    assert "\n" not in str(error.value)


@needs_pycocotools
def test_objects_of_classes_that_a_run_does_not_predict_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With data.classes below the number of the source's."""
    source = scenes.ScenesSource(4)
    objects = [source[i].objects for i in range(len(source))]
    predicted = [
        types.SimpleNamespace(
            index=i,
            fitted=types.SimpleNamespace(objects=each, original=each.size, size=each.size),
            outputs={"boxes": each.boxes, "scores": np.ones(len(each)), "classes": each.classes},
        )
        for i, each in enumerate(objects)
    ]
    monkeypatch.setattr(annotated_inputs, "predicted_images", lambda *_: iter(predicted))
    config = schema.Config(dense=schema.DensePrediction(detect=schema.Detect(masks=False)))
    inputs = types.SimpleNamespace(held_out=source, classes=source.classes[:1], config=config)
    context = EvalContext({}, params={}, poll=lambda: None)
    found = detection_eval.detections(inputs, context)
    first = sum(int(((each.classes == 0) & ~each.crowd).sum()) for each in objects)
    assert 0 < first < sum(map(len, objects)) and found.scores["box"].objects.tolist() == [first]
    assert found.scores["box"].metrics["AP"] == pytest.approx(1)

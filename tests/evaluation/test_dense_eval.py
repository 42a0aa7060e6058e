"""Evaluation of a source: what an easy model finds in easy images, on one host and on two, with bad
records and padded batches."""

import dataclasses
import threading
from typing import Any

import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.data.sources.base import Record, SubsetSource
from m3i_jax.data.sources.objects import Objects
from m3i_jax.evaluation import dense_eval, detection_results, segmentation_eval, sliding_windows

SIDE, COUNT = 48, 13


class Rectangles:
    """Images of many sizes with a red (class 0) or green (class 1) rectangle on black; record 5 is
    damaged. The file has other ids."""

    name, classes, captions = "rectangles", ("red", "green"), False
    category_ids, frequencies = np.array([7, 3]), ("f", "c")

    def __len__(self) -> int:
        return COUNT

    def box(self, i: int) -> np.ndarray:
        r = np.random.default_rng(i)
        height, width = self.size(i)
        x0, y0 = r.integers(0, width // 3), r.integers(0, height // 3)
        return np.array([x0, y0, x0 + width // 2, y0 + height // 2])

    def size(self, i: int) -> tuple[int, int]:
        return (40 + 9 * (i % 4), 100 - 7 * (i % 5))

    def __getitem__(self, i: int) -> Record:
        if i == 5:
            return Record("5", b"damaged")
        x0, y0, x1, y1 = self.box(i)
        size = self.size(i)
        image, labels = np.zeros((*size, 3), np.uint8), np.full(size, 1, np.uint8)
        image[y0:y1, x0:x1, i % 2] = 255
        labels[y0:y1, x0:x1] = 0
        labels[:2] = 255
        objects = Objects(
            boxes=np.array([self.box(i)], np.float32),
            classes=np.array([i % 2], np.int32),
            crowd=np.array([False]),
            segmentations=(None,),
            areas=np.array([float((x1 - x0) * (y1 - y0))]),
            ids=np.array([i]),
            size=size,
            image=1000 - i,
        )
        return Record(str(i), image, objects=objects, map=labels)


def detect(images: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
    """The box of the bright pixels, twice; the second of the wrong class and score .4."""
    out: dict[str, list[Any]] = {name: [] for name in ("boxes", "scores", "classes", "valid")}
    for image, (h, w) in zip(images, sizes, strict=True):
        assert not image[h:].any() and not image[:, w:].any()
        bright = image.max(-1) > 127
        rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
        box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] if len(rows) else [0, 0, 1, 1]
        label = int(image[..., 1].max() > 127)
        out["boxes"].append([box, box, [0, 0, 0, 0]])
        out["scores"].append([0.9, 0.4, 0.0])
        out["classes"].append([label, 1 - label, 0])
        out["valid"].append([True, True, False])
    return {name: np.array(value) for name, value in out.items()} | {
        "masks": np.ones((len(images), 3, 28, 28), np.float32)
    }


def test_an_easy_detector_finds_all() -> None:
    from m3i_jax.evaluation import detection_scores

    pytest.importorskip("pycocotools")
    calls = []

    def counted(images: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
        calls.append((images.shape, int((sizes[:, 0] > 0).sum())))
        return detect(images, sizes)

    source = Rectangles()
    results, skipped = dense_eval.detect_records(counted, source, range(COUNT), side=SIDE, batch=4)
    assert calls == [((4, SIDE, SIDE, 3), n) for n in (4, 4, 4, 0)] and sum(skipped.values()) == 1
    assert [result.image for result in results] == [1000 - i for i in range(COUNT)[::-1] if i != 5]
    table = detection_results.category_table(source)
    assert table.ids == (7, 3) and table.frequency == ("f", "c")
    scores = detection_scores.detection_scores(results, table, kind="bbox")
    assert scores.metrics["AP50"] == pytest.approx(1) and scores.metrics["AP75"] > 0.5
    assert scores.metrics["AP50_agnostic"] == pytest.approx(1)
    rows = detection_results.json_detections(results, table, "bbox")
    assert len(rows) == 2 * len(results) and {row["category_id"] for row in rows} == {3, 7}
    first = results[0]
    assert first.truth.record == COUNT - 1 and first.found.masks is not None
    drawn = dense_eval.drawn_detections(first.found)
    assert drawn["masks"][0].shape == first.truth.size
    assert dense_eval.drawn_truth(first.truth)["masks"] == [None]
    half = SubsetSource(source, np.arange(0, COUNT, 2), "part", "test")  # type: ignore[arg-type]
    assert detection_results.category_table(half) == table


class Hosts:
    """Two hosts as two threads, whose exchanges meet."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=60)
        self.values: list[Any] = [None, None]
        self.here = threading.local()

    def exchange(self, name: str, own: Any) -> list[Any]:
        self.values[self.here.number] = own
        self.barrier.wait()
        both = list(self.values)
        self.barrier.wait()
        return both

    def run(self, work: Any) -> list[Any]:
        out: list[Any] = [None, None]

        def one(number: int) -> None:
            self.here.number = number
            try:
                out[number] = work(number)
            except BaseException as error:
                self.barrier.abort()
                out[number] = error

        threads = [threading.Thread(target=one, args=(n,)) for n in (0, 1)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        for each in out:
            if isinstance(each, BaseException):
                raise each
        return out


@pytest.fixture
def two_hosts(monkeypatch: pytest.MonkeyPatch) -> Hosts:
    hosts = Hosts()
    for module in (dense_eval, detection_results, segmentation_eval, sliding_windows):
        monkeypatch.setattr(module.parallel, "gather_bytes", hosts.exchange)
        monkeypatch.setattr(module.parallel, "exchange_values", hosts.exchange)
    return hosts


def test_two_hosts_find_what_one_finds(two_hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [0, 0]

    def run(host: int, hosts: int) -> Any:
        def counted(images: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
            calls[host] += 1
            return detect(images, sizes)

        return dense_eval.detect_records(
            counted, Rectangles(), range(COUNT), side=SIDE, batch=4, host=host, hosts=hosts
        )

    first, second = two_hosts.run(lambda host: run(host, 2))
    assert calls == [4, 4]
    monkeypatch.undo()
    alone = run(0, 1)
    for found in (first, second):
        assert found[1] == alone[1]
        for one, two in zip(alone[0], found[0], strict=True):
            assert one.image == two.image and one.found.masks == two.found.masks
            np.testing.assert_array_equal(one.found.boxes, two.found.boxes)
            np.testing.assert_array_equal(one.found.scores, two.found.scores)


def segment_config() -> schema.Config:
    rule = schema.Geometry(rule="range", long=400, short=60)
    return schema.Config(
        data=schema.Data(image_size=32, classes=2),
        dense=schema.DensePrediction(geometry=rule, segment=schema.Segment(test_stride=20)),
    )


def predict(images: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    bright = images.max(-1, keepdims=True).astype(np.float32)
    return np.concatenate([bright - 127, 127 - bright], -1)


def test_an_easy_segmenter_finds_all() -> None:
    scores, skipped = dense_eval.segment_records(
        predict, Rectangles(), range(COUNT), segment_config(), batch=4
    )
    assert sum(skipped.values()) == 1 and len(scores.images) == COUNT - 1
    assert scores.metrics["mIoU"] > 0.93 and scores.names == ("red", "green")
    few = dataclasses.replace(
        segment_config(), data=dataclasses.replace(segment_config().data, classes=1)
    )
    only, _ = dense_eval.segment_records(
        lambda images, sizes: predict(images, sizes)[..., :1],
        Rectangles(),
        range(4),
        few,
        batch=4,
    )
    assert only.metrics["mIoU"] == 1 and only.pixels.shape == (1,)


def test_two_hosts_segment_as_one(two_hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [0, 0]

    def run(host: int, hosts: int) -> Any:
        def counted(images: np.ndarray, sizes: np.ndarray) -> np.ndarray:
            calls[host] += 1
            return predict(images, sizes)

        return dense_eval.segment_records(
            counted, Rectangles(), range(COUNT), segment_config(), batch=4, host=host, hosts=hosts
        )

    first, second = two_hosts.run(lambda host: run(host, 2))
    assert calls[0] == calls[1] > 5
    monkeypatch.undo()
    alone = run(0, 1)
    for found in (first, second):
        assert found[1] == alone[1] and found[0].metrics == alone[0].metrics
        np.testing.assert_array_equal(found[0].confusion, alone[0].confusion)
        assert found[0].images == alone[0].images

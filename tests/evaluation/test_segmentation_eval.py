"""Sliding windows against a plain loop over one image at a time, scores against loops over pixels,
and that hosts agree."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m3i_jax import schema
from m3i_jax.evaluation import segmentation_eval, sliding_windows
from m3i_jax.evaluation.sliding_windows import SlidingSettings
from m3i_jax.objective import segmentation_scores

SIDE, STRIDE, CLASSES = 16, 6, 5


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def size_of(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """mmsegmentation's rule with (60, 18)."""
    long, short = int(60 * scale), int(18 * scale)
    factor = min(long / max(size), short / min(size))
    return int(size[0] * factor + 0.5), int(size[1] * factor + 0.5)


class Model:
    """Logits that depend on the pixels, on the place in the window and on the content's size; its
    inputs are kept."""

    def __init__(self) -> None:
        r = np.random.default_rng(0)
        self.weight = r.normal(size=(3, CLASSES))
        self.place = r.normal(size=(SIDE, SIDE, CLASSES))
        self.shapes: list[Any] = []
        self.rows = 0

    def one(self, image: np.ndarray, size: np.ndarray) -> np.ndarray:
        pixels = image / 100.0 - 1.3
        smooth = pixels + np.roll(pixels, 1, 0) + np.roll(pixels, 1, 1)
        return (
            smooth @ self.weight + self.place + np.sin(size[0] + 3 * size[1] + np.arange(CLASSES))
        )

    def __call__(self, images: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        assert images.dtype == np.uint8 and sizes.dtype == np.int32
        for image, (h, w) in zip(images, sizes, strict=True):
            assert not image[h:].any() and not image[:, w:].any()
            assert bool(h) == bool(image.any())
        self.shapes.append((images.shape, sizes.shape))
        self.rows += int((sizes[:, 0] > 0).sum())
        return np.stack([self.one(*each) for each in zip(images, sizes, strict=True)])


def bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Half-pixel bilinear resize without antialiasing, in loops."""
    (h, w), (height, width) = image.shape[:2], size
    out = np.zeros((height, width, image.shape[2]))
    for y in range(height):
        for x in range(width):
            v = max((y + 0.5) * h / height - 0.5, 0)
            u = max((x + 0.5) * w / width - 0.5, 0)
            i, j = int(v), int(u)
            for a, wa in ((i, 1 - v + i), (min(i + 1, h - 1), v - i)):
                for b, wb in ((j, 1 - u + j), (min(j + 1, w - 1), u - j)):
                    out[y, x] += wa * wb * image[a, b]
    return out


def plain(
    model: Model, image: np.ndarray, scales: tuple[float, ...], flips: tuple[bool, ...]
) -> np.ndarray:
    """Scores [H, W, K] of an image: one window after another."""
    total = np.zeros((*image.shape[:2], CLASSES))
    for scale in scales:
        for flip in flips:
            view = resize(image, size_of(image.shape[:2], scale))
            view = view[:, ::-1] if flip else view
            h, w = view.shape[:2]
            logits, count = np.zeros((h, w, CLASSES)), np.zeros((h, w, 1))
            tops = [min(STRIDE * i, max(h - SIDE, 0)) for i in range(50)]
            lefts = [min(STRIDE * i, max(w - SIDE, 0)) for i in range(50)]
            for top in sorted(set(tops)):
                for left in sorted(set(lefts)):
                    part = view[top : top + SIDE, left : left + SIDE]
                    padded = np.zeros((SIDE, SIDE, 3), np.uint8)
                    padded[: part.shape[0], : part.shape[1]] = part
                    out = model.one(padded, np.array(part.shape[:2]))
                    logits[top : top + SIDE, left : left + SIDE] += out[
                        : part.shape[0], : part.shape[1]
                    ]
                    count[top : top + SIDE, left : left + SIDE] += 1
            logits = logits / count
            logits = bilinear(logits[:, ::-1] if flip else logits, image.shape[:2])
            if len(scales) * len(flips) == 1:
                return logits
            shares = np.exp(logits - logits.max(-1, keepdims=True))
            total += shares / shares.sum(-1, keepdims=True)
    return total


SIZES = ((20, 31), (18, 18), (40, 9), (11, 60), (30, 30), (18, 60), (25, 70))


def scenes(sizes: tuple[tuple[int, int], ...] = SIZES) -> list[tuple[str, np.ndarray]]:
    r = np.random.default_rng(1)
    return [
        (f"image {i}", (r.integers(1, 256, (h, w, 3))).astype(np.uint8))
        for i, (h, w) in enumerate(sizes)
    ]


@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0, 1.75)])
@pytest.mark.parametrize("flip", [False, True])
def test_windows_are_those_of_a_plain_loop(
    scales: tuple[float, ...], flip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of many sizes, smaller than the window among them, in one shape of batch; strips of a
    few rows."""
    monkeypatch.setattr(sliding_windows, "_STRIP", 1000)
    monkeypatch.setattr(sliding_windows, "_CHUNK", 3)
    settings = SlidingSettings(
        window=SIDE, stride=STRIDE, batch=4, classes=CLASSES, scales=scales, flip=flip
    )
    model, images = Model(), scenes()
    found = list(
        sliding_windows.class_maps(model, images, settings, size_of=size_of, resize=resize)
    )
    assert [key for key, _ in found] == [key for key, _ in images]
    assert set(model.shapes) == {((4, SIDE, SIDE, 3), (4, 2))}
    for (_, pixels), (_, image) in zip(found, images, strict=True):
        scores = plain(model, image, scales, (False, True) if flip else (False,))
        assert pixels.shape == image.shape[:2] and pixels.dtype == np.uint8
        best = np.sort(scores, -1)
        clear = best[..., -1] - best[..., -2] > 1e-5
        assert clear.mean() > 0.99 and len(np.unique(pixels)) > 1
        np.testing.assert_array_equal(pixels[clear], scores.argmax(-1)[clear])


@pytest.mark.parametrize(("flip", "average"), [(False, "auto"), (True, "auto"), (True, "softmax")])
def test_whole_images_are_one_window_of_their_own_size(
    flip: bool, average: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sides are multiples of 8; one shape for every size; two images of one size are one call; the
    order of the images stays; scores are averaged as they are (Mask2Former), or their softmax is
    (mmsegmentation)."""
    monkeypatch.setattr(sliding_windows, "_CHUNK", 4)
    config = schema.Config(
        dense=schema.DensePrediction(
            geometry=schema.Geometry(rule="range", long=40, short=16),
            segment=schema.Segment(
                head="mask2former",
                test_whole=8,
                test_scales=(1.0, 0.5),
                test_flip=flip,
                test_average=average,
            ),
        )
    )
    settings = sliding_windows.sliding_settings(config, classes=CLASSES, batch=2)
    assert settings.whole and settings.softmax == (average == "softmax")
    size_of, resize_image = sliding_windows.resize_rule(config)
    weight, calls = np.random.default_rng(0).normal(size=(3, CLASSES)), []

    def model(images: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        calls.append(images.shape)
        for image, size in zip(images, sizes, strict=True):
            assert tuple(size) in (image.shape[:2], (0, 0))
        return (images / 100.0 - 1.3) @ weight + np.linspace(0, 1, images.shape[2])[:, None]

    images = scenes(((20, 31), (18, 18), (40, 9), (20, 31), (11, 60)))
    found = list(
        sliding_windows.class_maps(model, images, settings, size_of=size_of, resize=resize_image)
    )
    assert [key for key, _ in found] == [key for key, _ in images]
    assert all(h % 8 == 0 and w % 8 == 0 for _, h, w, _ in calls)
    sizes = {size_of(image.shape[:2], s) for _, image in images for s in (1.0, 0.5)}
    assert {shape[1:3] for shape in calls} == sizes and len(sizes) > 4
    for (_, pixels), (_, image) in zip(found, images, strict=True):
        total = np.zeros((*image.shape[:2], CLASSES))
        for scale in (1.0, 0.5):
            for mirrored in (False, True)[: 1 + flip]:
                view = resize_image(image, size_of(image.shape[:2], scale))
                view = view[:, ::-1] if mirrored else view
                scores = model(view[None], np.array([view.shape[:2]]))[0]
                scores = scores[:, ::-1] if mirrored else scores
                scores = bilinear(scores, image.shape[:2])
                if average == "softmax":
                    scores = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
                total += scores
        best = np.sort(total, -1)
        clear = best[..., -1] - best[..., -2] > 1e-4
        assert clear.mean() > 0.98 and len(np.unique(pixels)) > 1
        np.testing.assert_array_equal(pixels[clear], total.argmax(-1)[clear])


def test_hosts_share_the_sizes_of_whole_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host runs the sizes of all hosts, in one order, with zeros where it has no image."""
    given = [" ", "16,32;8,8", "16,32;24,8"]
    monkeypatch.setattr(sliding_windows.parallel, "exchange_values", lambda name, text: given)
    assert sliding_windows._sizes_of_hosts({(8, 8)}) == [(8, 8), (16, 32), (24, 8)]
    given[:] = [" "]
    assert sliding_windows._sizes_of_hosts(set()) == []


def test_window_starts_of_the_specification() -> None:
    for length in range(1, 1500, 7):
        starts = sliding_windows.window_starts(length, 512, 256)
        assert len(starts) == max(0, int(np.ceil((length - 512) / 256))) + 1
        assert starts[0] == 0 and max(starts) == max(0, length - 512)
        assert all(0 < b - a <= 256 for a, b in zip(starts, starts[1:], strict=False))


def test_hosts_call_the_model_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with fewer windows joins the calls of the others with zeros."""
    settings = SlidingSettings(window=SIDE, stride=STRIDE, batch=4, classes=CLASSES)

    def run(images: list[tuple[str, np.ndarray]], most: Callable[[int], int]) -> tuple[Any, Model]:
        monkeypatch.setattr(sliding_windows, "_most_of_hosts", most)
        monkeypatch.setattr(sliding_windows, "_CHUNK", 2)
        model = Model()
        found = sliding_windows.class_maps(model, images, settings, size_of=size_of, resize=resize)
        return dict(found), model

    images, asked = scenes(), []
    alone, model = run(images, lambda count: asked.append(count) or count)
    rounds = iter([max(5, count) for count in asked[:-1]] + [5, 0])
    shared, busy = run(images, lambda count: next(rounds))
    assert len(busy.shapes) == sum(max(5, count) for count in asked[:-1]) + 5
    assert busy.rows == model.rows
    rounds = iter([5, 0])
    nothing, idle = run([], lambda count: next(rounds))
    assert nothing == {} and len(idle.shapes) == 5 and idle.rows == 0
    for key in alone:
        np.testing.assert_array_equal(alone[key], shared[key])


def loops(pairs: list[tuple[np.ndarray, np.ndarray]], classes: int) -> tuple[float, float, float]:
    """mIoU, mAcc, aAcc by loops over pixels."""
    both, labelled, guessed = [0] * classes, [0] * classes, [0] * classes
    for guess, label in pairs:
        for g, k in zip(guess.reshape(-1).tolist(), label.reshape(-1).tolist(), strict=True):
            if k == 255:
                continue
            labelled[k] += 1
            guessed[g] += 1
            both[k] += g == k
    union = [labelled[k] + guessed[k] - both[k] for k in range(classes)]
    ious = [both[k] / union[k] for k in range(classes) if union[k]]
    accuracies = [both[k] / labelled[k] for k in range(classes) if labelled[k]]
    return (
        sum(ious) / len(ious),
        sum(accuracies) / len(accuracies),
        sum(both) / sum(labelled),
    )


def labelled_pairs(seed: int, classes: int = 7) -> list[tuple[np.ndarray, np.ndarray]]:
    """Class 5 is only predicted, class 6 does not occur."""
    r, out = np.random.default_rng(seed), []
    for _ in range(6):
        size = tuple(r.integers(5, 12, 2).tolist())
        label = r.integers(0, 5, size).astype(np.uint8)
        guess = np.where(r.random(size) < 0.6, label, r.integers(0, 6, size)).astype(np.uint8)
        label[r.random(size) < 0.2] = 255
        out.append((guess, label))
    return out


def test_scores_are_those_of_loops() -> None:
    pairs, names = labelled_pairs(0), tuple("abcdefg")
    counts = segmentation_eval.SegmentationCounts(names)
    for number, pair in enumerate(pairs):
        counts.add(number, *pair)
    scores = counts.scores()
    for name, value in zip(("mIoU", "mAcc", "aAcc"), loops(pairs, 7), strict=True):
        assert scores.metrics[name] == pytest.approx(value, abs=1e-12), name
    assert scores.iou[5] == 0 and np.isnan(scores.accuracy[5]) and np.isnan(scores.iou[6])
    for (key, value), pair in zip(scores.images, pairs, strict=True):
        assert value == pytest.approx(loops([pair], 7)[0], abs=1e-12), key


def test_two_hosts_score_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, names = labelled_pairs(1), tuple("abcdefg")
    one = segmentation_eval.SegmentationCounts(names)
    hosts = [segmentation_eval.SegmentationCounts(names) for _ in range(2)]
    for number, pair in enumerate(pairs):
        one.add(f"{number}.jpg", *pair)
        hosts[(number + 1) % 2].add(f"{number}.jpg", *pair)
    whole, sent = one.scores(), []
    with monkeypatch.context() as patch:
        patch.setattr(
            segmentation_eval.parallel, "gather_bytes", lambda name, own: sent.append(own) or [own]
        )
        for host in hosts:
            host.scores()
        patch.setattr(segmentation_eval.parallel, "gather_bytes", lambda name, own: sent)
        both = hosts[0].scores()
        sent.append(sent[0])
        with pytest.raises(ValueError, match="was evaluated twice"):
            hosts[0].scores()
    assert both.metrics == whole.metrics and both.images == whole.images
    np.testing.assert_array_equal(both.confusion, whole.confusion)


def test_wrong_sizes_and_nothing() -> None:
    counts = segmentation_eval.SegmentationCounts(("a", "b"))
    with pytest.raises(ValueError, match="image 'x': the prediction has shape"):
        counts.add("x", np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8))
    counts.add("y", np.zeros((2, 3), np.uint8), np.full((2, 3), 255, np.uint8))
    assert counts.scores().metrics == {} and counts.scores().images == []


def test_counts_are_those_of_the_objective() -> None:
    guess, label = labelled_pairs(2)[0]
    expected = segmentation_scores.confusion_matrix(guess, label, 7)
    np.testing.assert_array_equal(segmentation_eval.pixel_confusion(guess, label, 7), expected)


def test_windows_and_sizes_of_the_settings() -> None:
    base = schema.Config(data=schema.Data(image_size=512))
    segment = schema.Segment(test_scales=(0.5, 1.75), test_flip=True)
    geometry = schema.Geometry(rule="range")
    dense = schema.DensePrediction(segment=segment, geometry=geometry)
    config = dataclasses.replace(base, dense=dense)
    settings = sliding_windows.sliding_settings(config, classes=150, batch=2)
    assert settings == SlidingSettings(
        window=512, stride=256, batch=2, classes=150, scales=(0.5, 1.75), flip=True
    )
    size_of, resize = sliding_windows.resize_rule(config)
    assert size_of((480, 640), 1.0) == (512, 683) and size_of((600, 2600), 1.0) == (473, 2048)
    assert size_of((480, 640), 1.75) == (896, 1195)
    # mmsegmentation's min_size of its ViTs: no short side below a window
    assert size_of((480, 640), 0.5) == size_of((480, 640), 1.0)
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    values = bilinear(image, (20, 30))  # four pixels, also where it reduces
    assert np.abs(resize(image, (20, 30)) - values).max() <= 1
    size_of, resize = sliding_windows.resize_rule(base)  # rule jitter
    assert size_of((480, 640), 1.0) == (384, 512)
    smooth = np.asarray(Image.fromarray(image).resize((30, 20), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(resize(image, (20, 30)), smooth)

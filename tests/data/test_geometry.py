"""Where pixels, boxes and masks go: the two rules against independent renderings, resizing against
values of OpenCV, and masks in the frames of their boxes against masks at full size."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from m3i_jax import schema
from m3i_jax.data import geometry
from m3i_jax.data.geometry import Placement
from m3i_jax.data.sources import segmentations
from m3i_jax.data.sources.segmentations import Polygons

RNG = np.random.default_rng(11)
VALUES = pathlib.Path(__file__).parent / "dense" / "opencv.npz"


def uniforms() -> list[float]:
    return RNG.random(geometry.WIDTH).tolist()


@pytest.mark.parametrize(("height", "width"), [(480, 640), (640, 480), (333, 500), (50, 900)])
def test_the_jitter_rule(height, width) -> None:
    rule = schema.Geometry(scale=(0.1, 2.0), flip_p=0.3)
    for _ in range(40):
        u = uniforms()
        p = geometry.jitter_placement(u, height, width, rule, 128)
        factor = 0.1 + 1.9 * u[0]
        scale = min(128 * factor / height, 128 * factor / width)
        assert (p.height, p.width) == tuple(
            max(1, int(np.round(side * scale))) for side in (height, width)
        )
        assert (p.rows, p.columns) == (min(p.height, 128), min(p.width, 128))
        assert p.top == np.round(max(p.height - 128, 0) * u[2])
        excess = max(p.width - 128, 0)
        left = np.round(excess * u[2])  # the same number, of the mirrored image
        assert p.left == (excess - left if p.flip else left)
        assert p.flip == (u[1] < 0.3)


def test_the_range_rule() -> None:
    rule = schema.Geometry(rule="range", long=2048, short=512, scale=(0.5, 2.0))
    for height, width in ((512, 683), (600, 2600), (300, 200)):
        for _ in range(20):
            u = uniforms()
            p = geometry.range_placement(u, height, width, rule, 512)
            factor = 0.5 + 1.5 * u[0]
            long, short = int(2048 * factor), int(512 * factor)
            scale = min(long / max(height, width), short / min(height, width))
            assert (p.height, p.width) == (int(height * scale + 0.5), int(width * scale + 0.5))
            for offset, side, v in ((p.top, p.height, u[2]), (p.left, p.width, u[3])):
                assert offset == int(v * (max(side - 512, 0) + 1)) and offset <= max(side - 512, 0)


def test_the_window_of_the_buckets_rule() -> None:
    """Resize, cut, resize and mirror, one after the other, as DETR does; and how often."""
    rule = schema.Geometry(rule="buckets", crop_p=0.5, crop_short=(40, 50, 60), crop_sides=(38, 60))
    boxes, cut, shorts, rows = RNG.uniform(0, 1, (30, 4)), [], [], []
    for height, width in ((480, 640), (333, 250), (50, 900)) * 200:
        u, canvas = uniforms(), ((64, 96), (96, 64))[len(cut) % 2]
        p = geometry.bucket_placement(u, height, width, rule, canvas)
        assert p.rows <= canvas[0] and p.columns <= canvas[1]
        assert p.rows == canvas[0] or p.columns == canvas[1]
        cut.append(u[0] < 0.5)
        if not cut[-1]:
            assert (p.top, p.left, p.height, p.width) == (0, 0, p.rows, p.columns)
            continue
        shorts.append((40, 50, 60)[int(3 * u[2])])
        factor = shorts[-1] / min(height, width)
        h, w = (int(side * factor + 0.5) for side in (height, width))
        high, wide = (
            38 + int(v * (min(60, side) - 37)) for v, side in zip(u[3:5], (h, w), strict=True)
        )
        top, left = int(u[5] * (h - high + 1)), int(u[6] * (w - wide + 1))
        rows.append(high)
        assert top + high <= h and left + wide <= w
        given = np.sort((boxes * np.tile([width, height], 2)).reshape(-1, 2, 2), 1)
        moved = given * [w / width, h / height] - [left, top]
        moved *= min(canvas[0] / high, canvas[1] / wide)
        if p.flip:
            moved = np.sort(moved * [-1, 1] + [p.columns, 0], 1)
        moved = moved.clip(0, [p.columns, p.rows]).reshape(-1, 4)
        # the sides of the image, and where the window begins, are whole numbers of pixels
        assert np.abs(p.move_boxes(given.reshape(-1, 4)) - moved).max() < 1.3
    assert 0.42 < np.mean(cut) < 0.58
    assert {40, 50, 60} == set(shorts) and min(rows) == 38 and max(rows) == 60


def test_pixels_and_masks_follow_the_window() -> None:
    mask = np.zeros((60, 90), bool)
    mask[20:45, 30:70] = True
    image = Image.fromarray(np.repeat(mask[..., None] * np.uint8(200), 3, 2))
    rule = schema.Geometry(rule="buckets", crop_p=1.0, crop_short=(60,), crop_sides=(20, 60))
    seen, encoded = 0, segmentations.encode_mask(mask)
    for _ in range(40):
        p = geometry.bucket_placement(uniforms(), 60, 90, rule, (64, 96))
        found = geometry.cut_run_lengths(encoded, p, 16)
        shown = geometry.cut_image(image, p)[..., 0] > 100
        assert (found is None) <= (shown.mean() < 0.05)
        if found is None or not shown.any():
            continue
        seen += 1
        box = np.array(segmentations.tight_box(shown))
        assert np.abs(found[0] - box).max() <= 1.6 and found[1].mean() > 0.95
        assert np.abs(p.move_boxes(np.array([[30, 20, 70, 45.0]]))[0] - box).max() <= 1.6
    assert seen > 25


def test_a_crop_is_drawn_again_at_most_ten_times() -> None:
    rule = schema.Geometry(rule="range", long=400, short=100, scale=(1.0, 1.0))
    u, tried = uniforms(), []

    def accept(placement: Placement) -> bool:
        tried.append((placement.top, placement.left))
        return len(tried) == 4

    p = geometry.range_placement(u, 100, 200, rule, 64, accept=accept)
    assert len(tried) == 4 and tried[-1] == (p.top, p.left)
    assert tried == [(int(u[2 + 2 * i] * 37), int(u[3 + 2 * i] * 137)) for i in range(4)]
    tried.clear()
    rule = schema.Geometry(scale=(2.0, 2.0), flip_p=0.0)
    p = geometry.jitter_placement(u, 100, 200, rule, 64, accept=accept)
    assert len(tried) == 4 and tried[-1] == (p.top, p.left)
    assert tried == [(0, round(64 * u[2 + 2 * i])) for i in range(4)]
    tried.clear()
    rule = schema.Geometry(rule="range", long=400, short=100, scale=(1.0, 1.0))
    last = geometry.range_placement(u, 100, 200, rule, 64, accept=lambda p: bool(tried.append(p)))
    assert len(tried) == 10 and (last.top, last.left) == (int(u[22] * 37), int(u[23] * 137))


def test_dominated_crops() -> None:
    one = np.zeros((4, 4), np.uint8)
    assert geometry.dominated(one, 0.75)
    one[0] = 1  # a quarter
    assert geometry.dominated(one, 0.75) and not geometry.dominated(one, 0.76)
    one[1:3] = 255  # now a half of the labelled pixels
    assert not geometry.dominated(one, 0.75)
    assert geometry.dominated(np.full((4, 4), 255, np.uint8), 0.75)


def test_pillow_resizes_for_the_jitter_rule() -> None:
    image = Image.fromarray(RNG.integers(0, 256, (60, 90, 3), np.uint8))
    for height, width in ((20, 30), (90, 135), (61, 90)):
        whole = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).astype(int)
        p = Placement((60, 90), height, width, 3, 5, height - 9, width - 9, False, True)
        window = geometry.cut_image(image, p).astype(int)
        assert np.abs(window - whole[3 : height - 6, 5 : width - 4]).max() <= 1
        flipped = Placement((60, 90), height, width, 3, 5, height - 9, width - 9, True, True)
        assert (geometry.cut_image(image, flipped)[:, ::-1] == window).all()


def test_opencv_resizes_for_the_range_rule() -> None:
    """The values were made by OpenCV (tests/data/make_opencv_values.py)."""
    values = np.load(VALUES)
    image = values["image"]
    for name in ("0.5", "0.63", "0.9", "1.7"):
        wanted = values[f"resized_{name}"].astype(int)
        p = geometry.whole_placement(image.shape[:2], wanted.shape[:2], smooth=False)
        ours = geometry.cut_image(Image.fromarray(image), p).astype(int)
        assert ours.shape == wanted.shape and np.abs(ours - wanted).max() <= 1
        share = 0.01 if float(name) < 1 else 0.4  # Pillow enlarges, and rounds once less
        assert (ours != wanted).mean() < share
        pillow = Image.fromarray(image).resize(wanted.shape[1::-1], Image.Resampling.BILINEAR)
        if float(name) < 0.9:
            assert np.abs(np.asarray(pillow).astype(int) - wanted).max() > 20


def test_maps_follow_their_image() -> None:
    """A map and an image of flat colours go through the same placement."""
    classes = (np.arange(48 * 64).reshape(48, 64) // 512).astype(np.uint8)
    image = Image.fromarray(np.repeat(classes[..., None] * 20, 3, 2))
    rule = schema.Geometry(scale=(0.5, 2.5))
    for _ in range(20):
        p = geometry.jitter_placement(uniforms(), 48, 64, rule, 64)
        pixels, labels = geometry.cut_image(image, p), geometry.cut_map(classes, p)
        assert labels.shape == pixels.shape[:2]
        near = np.abs(pixels[..., 0].astype(int) - 20 * labels.astype(int)) <= 2
        assert near.mean() > 0.8  # all but the borders between classes


@pytest.mark.parametrize("flip", [False, True])
def test_boxes_and_masks_against_a_mask_at_full_size(flip) -> None:
    y, x = np.mgrid[:60, :80]
    mask = ((x - 40) / 25) ** 2 + ((y - 20) / 30) ** 2 < 1
    mask[:, 38:44] = False  # two parts
    polygons = segmentations.outline(mask)
    assert polygons is not None
    for p in (
        Placement((60, 80), 60, 80, 0, 0, 60, 80, flip, True),
        Placement((60, 80), 120, 160, 11, 35, 64, 64, flip, True),
        Placement((60, 80), 45, 60, 0, 0, 45, 60, flip, True),
    ):
        moved = geometry.cut_map(mask.astype(np.uint8), p) > 0
        box = np.array(segmentations.tight_box(moved))
        for cut, encoded in (
            (geometry.cut_polygons, Polygons(tuple(polygons))),
            (geometry.cut_run_lengths, segmentations.encode_mask(mask)),
        ):
            found = cut(encoded, p, 112)
            assert found is not None
            assert np.abs(found[0] - box).max() <= 1.0
            x0, y0, x1, y1 = found[0]
            yy, xx = np.mgrid[: p.rows, : p.columns] + 0.5
            row = np.clip(((yy - y0) / (y1 - y0) * 112).astype(int), 0, 111)
            column = np.clip(((xx - x0) / (x1 - x0) * 112).astype(int), 0, 111)
            inside = (yy > y0) & (yy < y1) & (xx > x0) & (xx < x1)
            pasted = found[1][row, column] & inside
            assert (pasted & moved).sum() / (pasted | moved).sum() > 0.96
            # the sides of the box are those of the mask
            assert found[1].any(1)[[0, -1]].all() and found[1].any(0)[[0, -1]].all()


def test_what_the_window_does_not_show() -> None:
    mask = np.zeros((40, 40), bool)
    mask[2:9, 2:9] = True
    square = Polygons((np.array([[2, 2], [9, 2], [9, 9], [2, 9.0]]),))
    far = Placement((40, 40), 40, 40, 9, 0, 31, 40, False, True)  # ends where the mask begins
    near = Placement((40, 40), 40, 40, 8, 0, 32, 40, False, True)
    for cut, encoded in (
        (geometry.cut_polygons, square),
        (geometry.cut_run_lengths, segmentations.encode_mask(mask)),
    ):
        assert cut(encoded, far, 8) is None
        box, inside = cut(encoded, near, 8)
        assert box.tolist() == [2, 0, 9, 1] and inside.all()
    empty = segmentations.encode_mask(np.zeros((40, 40), bool))
    assert geometry.cut_run_lengths(empty, near, 8) is None
    with pytest.raises(ValueError, match="40 x 40"):
        geometry.cut_run_lengths(segmentations.encode_mask(np.ones((40, 39), bool)), near, 8)


def test_bounds_of_a_polygon_around_the_corner_of_a_window() -> None:
    """A band goes around the corner outside; only its end enters, at the top."""
    band = np.array([[3, 4], [3, -3], [-3, -3], [-3, 6], [-1, 6], [-1, -1], [1, -1], [1, 4.0]])
    p = Placement((20, 20), 20, 20, 0, 0, 20, 20, False, True)
    box, mask = geometry.cut_polygons(Polygons((band,)), p, 8)
    assert box.tolist() == [1, 0, 3, 4] and mask.all()
    around = np.array([[-5, -5], [30, -5], [30, 30], [-5, 30.0]])
    box, mask = geometry.cut_polygons(Polygons((around,)), p, 8)
    assert box.tolist() == [0, 0, 20, 20] and mask.all()


def test_bounds_against_a_fine_raster() -> None:
    p = Placement((30, 30), 30, 30, 0, 0, 30, 30, False, True)
    for _ in range(60):
        angle = np.sort(RNG.uniform(0, 2 * np.pi, 9))
        radius = RNG.uniform(4, 22, 9)
        polygon = RNG.uniform(-10, 40, 2) + radius[:, None] * np.stack(
            [np.cos(angle), np.sin(angle)], 1
        )
        fine = segmentations.rasterize([polygon * 20], 600, 600)
        found = geometry.cut_polygons(Polygons((polygon,)), p, 16)
        if fine.sum() < 400:
            continue
        assert found is not None
        box = np.array(segmentations.tight_box(fine)) / 20
        assert (found[0][:2] <= box[:2] + 0.05).all() and (found[0][2:] >= box[2:] - 0.05).all()
        # a spike may be thinner than the raster
        assert np.median(np.abs(found[0] - box)) < 0.2


def test_boxes_move_and_are_clipped() -> None:
    p = Placement((100, 200), 50, 100, 10, 20, 30, 60, True, True)
    boxes = np.array([[40, 20, 60, 40], [0, 0, 200, 100], [0, 0, 10, 10]], np.float32)
    moved = p.move_boxes(boxes)
    assert moved[0].tolist() == [50, 0, 60, 10] and moved[1].tolist() == [0, 0, 60, 30]
    assert (moved[2, 2:] - moved[2, :2]).min() == 0

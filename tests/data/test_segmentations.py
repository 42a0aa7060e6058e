"""Run lengths and polygons: round trips, damage, and the same masks as pycocotools."""

import numpy as np
import pytest

from m3i_jax.data.sources import segmentations

RNG = np.random.default_rng(5)


def blobs(height: int, width: int, count: int = 3) -> np.ndarray:
    """A random mask of overlapping ellipses."""
    y, x = np.mgrid[:height, :width]
    mask = np.zeros((height, width), bool)
    for _ in range(count):
        cy, cx = RNG.uniform(0, height), RNG.uniform(0, width)
        ry, rx = RNG.uniform(0.6, height / 2 + 1), RNG.uniform(0.6, width / 2 + 1)
        mask |= ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
    return mask


MASKS = [
    *(blobs(h, w) for h, w in ((7, 5), (40, 61), (300, 200), (1, 9), (9, 1))),
    *(RNG.random((33, 47)) < p for p in (0.02, 0.5, 0.98)),
    np.zeros((4, 6), bool),
    np.ones((4, 6), bool),
    np.pad(np.ones((1, 1), bool), ((0, 3000), (0, 1000))),
]


@pytest.mark.parametrize("mask", MASKS, ids=lambda m: f"{m.shape[0]}x{m.shape[1]}")
def test_round_trips(mask: np.ndarray) -> None:
    height, width = mask.shape
    encoded = segmentations.encode_mask(mask)
    assert (segmentations.decode_mask(encoded, height, width) == mask).all()
    runs = segmentations.runs_of_mask(mask)
    assert (segmentations.mask_of_runs(runs, height, width) == mask).all()
    assert (segmentations.decode_counts(encoded.counts) == runs).all()


@pytest.mark.parametrize("mask", MASKS, ids=lambda m: f"{m.shape[0]}x{m.shape[1]}")
def test_the_strings_of_pycocotools(mask: np.ndarray) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    theirs = coco.encode(np.asfortranarray(mask, np.uint8))
    ours = segmentations.encode_mask(mask)
    assert ours.counts == theirs["counts"] and list(ours.size) == theirs["size"]
    decoded = segmentations.decode_mask(
        segmentations.RunLengths(theirs["counts"], ours.size), *mask.shape
    )
    assert (decoded == mask).all()


@pytest.mark.parametrize("mask", MASKS[:6], ids=lambda m: f"{m.shape[0]}x{m.shape[1]}")
def test_outlines_give_the_mask_or_nothing(mask: np.ndarray) -> None:
    polygons = segmentations.outline(mask)
    filled = mask.copy()
    if polygons is None:  # a hole: something outside is enclosed
        outside = np.zeros(np.add(mask.shape, 2), bool)
        outside[0, 0] = True
        free = ~np.pad(mask, 1)
        for _ in range(mask.size):
            grown = outside.copy()
            for axis in (0, 1):
                for step in (-1, 1):
                    grown |= np.roll(outside, step, axis)
            # 8 neighbours: pixels that touch at a corner are parts of their own
            grown |= np.roll(np.roll(outside, 1, 0), 1, 1) | np.roll(np.roll(outside, 1, 0), -1, 1)
            grown |= np.roll(np.roll(outside, -1, 0), 1, 1)
            grown |= np.roll(np.roll(outside, -1, 0), -1, 1)
            grown &= free
            if (grown == outside).all():
                break
            outside = grown
        assert (free & ~outside).any()
        return
    assert (segmentations.rasterize(polygons, *filled.shape) == filled).all()


def test_polygons_of_pycocotools() -> None:
    """The two rules differ on the outline alone; integer corners give equal masks."""
    coco = pytest.importorskip("pycocotools.mask")
    for _ in range(30):
        height, width = RNG.integers(20, 200, 2).tolist()
        angle = np.sort(RNG.uniform(0, 2 * np.pi, 12))
        radius = RNG.uniform(0.2, 0.7, 12) * min(height, width)
        centre = RNG.uniform(0.2, 0.8, 2) * (width, height)
        polygon = centre + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
        theirs = coco.decode(coco.frPyObjects([polygon.ravel().tolist()], height, width))[..., 0]
        ours = segmentations.rasterize([polygon], height, width)
        different = ours != theirs.astype(bool)
        edge = np.zeros_like(different)
        for mask in (ours, theirs):  # a spike thinner than a pixel may be in one of them alone
            for step in (-1, 1):
                edge |= mask != np.roll(mask, step, 0)
                edge |= mask != np.roll(mask, step, 1)
        edge[[0, -1]] = edge[:, [0, -1]] = True
        assert not (different & ~edge).any()
        assert different.sum() < 0.15 * max(edge.sum(), 1)
    mask = blobs(50, 40)
    if (polygons := segmentations.outline(mask)) is not None:
        flat = [polygon.ravel().tolist() for polygon in polygons]
        theirs = coco.decode(coco.merge(coco.frPyObjects(flat, 50, 40)))
        assert (theirs.astype(bool) == mask).all()


def test_polygons_that_reach_far_out_of_the_mask() -> None:
    huge = np.array([[-1e6, -1e6], [1e6, -1e6], [1e6, 1e6], [-1e6, 1e6]])
    assert segmentations.rasterize([huge], 5, 7).all()
    assert not segmentations.rasterize([huge + (3e6, 0)], 5, 7).any()
    two = [np.array([[0, 0], [4, 0], [4, 4], [0, 4.0]])] * 2
    assert segmentations.rasterize(two, 4, 4).all()  # a union, no exclusive or


def inside_by_rays(polygon: np.ndarray, height: int, width: int) -> np.ndarray:
    """The even-odd rule for every pixel of the image: the crossings of a ray up from its centre."""
    y, x = np.mgrid[:height, :width] + 0.5
    count = np.zeros((height, width), int)
    for (xa, ya), (xb, yb) in zip(polygon, np.roll(polygon, -1, 0), strict=True):
        crossed = (np.minimum(xa, xb) <= x) & (x < np.maximum(xa, xb))
        if crossed.any():
            count += crossed & (ya + (x - xa) * ((yb - ya) / (xb - xa)) <= y)
    return count % 2 == 1


def test_polygons_partly_outside_by_the_rule_of_every_pixel() -> None:
    rng = np.random.default_rng(3)
    for _ in range(60):
        height, width = rng.integers(1, 30, 2).tolist()
        parts = [
            rng.normal(rng.uniform(-5, 35, 2), rng.uniform(1, 20), (rng.integers(3, 9), 2))
            for _ in range(rng.integers(1, 4))
        ]
        expected = np.any([inside_by_rays(part, height, width) for part in parts], 0)
        assert (segmentations.rasterize(parts, height, width) == expected).all()


def test_a_small_polygon_does_not_cost_a_pass_over_the_image(monkeypatch) -> None:
    counted: list[int] = []
    bincount = np.bincount

    def count(cells: np.ndarray, minlength: int = 0) -> np.ndarray:
        counted.append(minlength)
        return bincount(cells, minlength=minlength)

    monkeypatch.setattr(segmentations.np, "bincount", count)
    square = np.array([[50, 60], [54, 60], [54, 65], [50, 65.0]])
    mask = segmentations.rasterize([square, square + 1e4], 600, 800)
    assert mask.sum() == mask[60:65, 50:54].sum() == 20 and counted == [4 * 6]


@pytest.mark.parametrize("counts", [b"5220o", b"\x00", b"~~", b"ooooooooooooooooo0", b"O0"])
def test_damaged_strings(counts: bytes) -> None:
    with pytest.raises(ValueError, match="run lengths|runs"):
        segmentations.decode_mask(segmentations.RunLengths(counts, (4, 4)), 4, 4)


def test_run_lengths_of_another_size() -> None:
    encoded = segmentations.encode_mask(np.eye(4, dtype=bool))
    with pytest.raises(ValueError, match="4 x 5"):
        segmentations.decode_mask(encoded, 4, 5)
    with pytest.raises(ValueError, match="runs of 16 pixels"):
        segmentations.decode_mask(segmentations.RunLengths(encoded.counts, (4, 5)), 4, 5)

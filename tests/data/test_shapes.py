"""The built-in shapes: the same in any order, visible, described truly by their captions, and not
separable by raw pixels."""

import collections
import copy
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from m3i_jax import schema
from m3i_jax.data import splits
from m3i_jax.data.sources import base, shapes
from m3i_jax.data.sources.shapes import COLORS, GROUNDS, PATTERNS, ShapesSource
from m3i_jax.errors import UserError

MANY = 600


def image(source: ShapesSource, index: int) -> np.ndarray:
    pixels = source[index].image
    assert isinstance(pixels, np.ndarray)
    return pixels


@pytest.fixture(scope="module")
def source() -> ShapesSource:
    return ShapesSource(MANY)


@pytest.fixture(scope="module")
def rendered(source) -> np.ndarray:
    return np.stack([image(source, i) for i in range(MANY)])


def luminance(rgb: np.ndarray) -> np.ndarray:
    return rgb.astype(float) @ [0.299, 0.587, 0.114]


def test_a_record_is_a_function_of_seed_and_index(source, rendered):
    fresh = copy.deepcopy(ShapesSource(10 * MANY))
    for i in (MANY - 1, 3, 77, 0):
        record = fresh[i]
        assert record.key == fresh.key(i) == source.key(i)
        assert (record.label, record.caption) == (source[i].label, source[i].caption)
        np.testing.assert_array_equal(image(fresh, i), rendered[i])
    other = ShapesSource(MANY, seed=1)
    assert other.key(0) != source.key(0)
    assert all((image(other, i) != rendered[i]).any() for i in range(20))


def test_it_is_a_source_and_a_sequence(source: ShapesSource, rendered: np.ndarray):
    opened = splits.open_source(schema.Data(size=9))
    assert (
        isinstance(opened, ShapesSource)
        and isinstance(opened, base.DataSource)
        and len(opened) == 9
    )
    assert (source.name, source.captions, len(source), source.classes) == (
        "shapes",
        True,
        MANY,
        shapes.CLASSES,
    )
    assert (
        source.description()
        == "600 images in shapes (96 x 96 pixels, seed 0), 8 classes, captions for 100%"
    )
    assert source[-1].key == source[MANY - 1].key == source.key(np.int64(-1)) and source[
        np.int64(5)
    ].caption == source.caption(5)
    for outside in (MANY, -MANY - 1):
        for read in (source.__getitem__, source.key, source.caption, source.silhouette):
            with pytest.raises(IndexError):
                read(outside)
    assert rendered.shape == (MANY, 96, 96, 3) and rendered.dtype == np.uint8
    assert (
        image(ShapesSource(3, side=33), 2).shape == (33, 33, 3) and image(source, 2).flags.writeable
    )
    assert len(base.read_items(ShapesSource(4, side=16), range(4))) == 4


def test_refusals():
    with pytest.raises(
        UserError,
        match=(
            "^data.size=0 renders no image, and data.source='shapes' has no others: give a number"
        ),
    ):
        splits.open_source(schema.Data(size=0))
    for bad in ({"side": 15}, {"seed": -1}, {"seed": 2**64}):
        with pytest.raises(ValueError, match="a side is at least 16 pixels, a seed 0..2"):
            ShapesSource(1, **bad)


def test_fingerprints_differ():
    fingerprints = [
        s.fingerprint()
        for s in (
            ShapesSource(10),
            ShapesSource(11),
            ShapesSource(10, side=48),
            ShapesSource(10, seed=1),
            ShapesSource(10),
        )
    ]
    assert len(set(fingerprints)) == 4 and fingerprints[0] == fingerprints[4]


def test_labels_are_balanced_without_a_period(source):
    labels = np.array([source.what(i).label for i in range(MANY)])
    assert (np.sort(labels.reshape(-1, 8)) == np.arange(8)).all()
    shares = np.bincount(labels[::8], minlength=8) / len(labels[::8])
    assert shares.min() > 0.03 and shares.max() < 0.25  # a stride of eight meets every class


def test_captions_describe_their_images(source):
    openings: collections.Counter[str] = collections.Counter()
    for i in range(MANY):
        what, caption = source.what(i), source.caption(i)
        words = caption.replace(",", "").split()
        thing, ground = (
            f"{what.color} {source.classes[what.label]}",
            f"{what.pattern} {what.ground} background",
        )
        assert [w for w in words if w in source.classes] == [source.classes[what.label]]
        expected_colors = [what.color] * (thing in caption) + [what.ground] * (ground in caption)
        # only the colours of the image, each in its role
        assert sorted(w for w in words if w in COLORS) == sorted(expected_colors)
        openings["color"], openings["ground"] = (
            openings["color"] + (thing in caption),
            openings["ground"] + (ground in caption),
        )
        assert ("small" in words) <= (what.size < 0.6) and ("large" in words) <= (what.size > 0.75)
        assert all(
            following[0] in "aeiou"
            for word, following in zip(words, words[1:], strict=False)
            if word == "an"
        )
        assert all(
            following[0] not in "aeiou"
            for word, following in zip(words, words[1:], strict=False)
            if word == "a"
        )
        openings[words[0]] += 1
        openings["sized"] += any(w in words for w in ("small", "medium-sized", "large"))
    assert {"a", "there"} <= set(openings) and all(
        0.4 * MANY < openings[kind] < 0.6 * MANY for kind in ("sized", "color", "ground")
    )
    whats = [source.what(i) for i in range(MANY)]
    assert {w.pattern for w in whats} == set(PATTERNS) and {w.color for w in whats} == {
        w.ground for w in whats
    } == set(COLORS)


def test_the_image_has_the_colors_of_the_caption(source, rendered):
    names, table = list(COLORS), np.array(list(COLORS.values()), float)
    for i in range(100):
        inside = rendered[i][source.silhouette(i) == 255]
        assert (inside == inside[0]).all()  # nothing lies over the shape
        assert names[np.abs(table - inside[0]).sum(1).argmin()] == source.what(i).color
        assert np.abs(inside[0] - np.array(COLORS[source.what(i).color])).max() <= 10


def test_the_shape_is_visible(source, rendered):
    shares = []
    for i in range(MANY):
        mask, gray = source.silhouette(i), luminance(rendered[i])
        background = gray[mask == 0]
        # in every pixel; jitter takes 2 x 10 at most
        assert np.abs(background - gray[mask == 255].mean()).min() >= shapes.CONTRAST - 21
        assert not mask[[0, -1]].any() and not mask[:, [0, -1]].any()
        shares.append((mask > 127).mean())
    assert min(shares) > 0.02 and max(shares) < 0.4
    gray_of = {name: float(luminance(np.array(rgb))) for name, rgb in COLORS.items()}
    brighter = np.mean(
        [gray_of[w.color] > gray_of[w.ground] for w in map(source.what, range(MANY))]
    )
    assert 0.4 < brighter < 0.6


def test_every_color_has_a_choice_of_grounds():
    assert all(len(grounds) >= 3 and color not in grounds for color, grounds in GROUNDS.items())


def test_the_diameter_is_what_the_plan_says(source):
    angle = np.linspace(0, np.pi, 60)
    for i in range(100):
        points = np.argwhere(source.silhouette(i) > 127)
        widest = np.ptp(points @ np.stack([np.sin(angle), np.cos(angle)]), axis=0).max() / 96
        # polygons are inscribed in the circle of that diameter
        assert 0.75 < widest / source.what(i).size < 1.03


def test_images_differ(rendered):
    assert len({image.tobytes() for image in rendered}) == MANY


def test_raw_pixels_do_not_predict_the_class(source, rendered):
    small = (
        np.stack([np.asarray(Image.fromarray(p).resize((48, 48))) for p in rendered])
        .reshape(MANY, -1)
        .astype(float)
    )
    labels = np.array([source.what(i).label for i in range(MANY)])
    bank, query = small[:400], small[400:]
    distance = (bank**2).sum(1) - 2 * query @ bank.T
    for k in (1, 5, 20):
        near = labels[np.argsort(distance, 1)[:, :k]]
        guess = np.array([np.bincount(row, minlength=8).argmax() for row in near])
        # chance is 0.125; the silhouette alone, below, gives more than 0.9
        assert (guess == labels[400:]).mean() < 0.3


def test_outlines_have_the_colour_of_the_class(source):
    """A profile that ignores place, size, rotation and colour separates the classes: a perfect
    learner has something to find."""
    rows, names = [], []
    for i in range(MANY):
        mask = source.silhouette(i) / 255.0
        y, x = np.mgrid[:96, :96]
        cy, cx = (mask * y).sum() / mask.sum(), (mask * x).sum() / mask.sum()
        radius = np.hypot(y - cy, x - cx) / np.sqrt(mask.sum())
        rows.append(np.histogram(radius, 12, (0, 1.2), weights=mask)[0] / mask.sum())
        names.append(source.what(i).label)
    p, labels = np.array(rows), np.array(names)
    distance = ((p[400:, None] - p[None, :400]) ** 2).sum(-1)
    assert (labels[:400][distance.argmin(1)] == labels[400:]).mean() > 0.9


def test_no_jax_is_imported():
    code = (
        "import sys, m3i_jax.data.sources.shapes; m3i_jax.data.sources.shapes.ShapesSource(1)[0];"
        " sys.exit('jax' in sys.modules)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}
        ).returncode
        == 0
    )

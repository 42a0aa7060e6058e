"""Panels compared with numpy: colours of features, and the pixels of the image."""

import numpy as np
import pytest
from PIL import Image

from m3i_jax.errors import UserError
from m3i_jax.reporting import image_grid, panels


def page(path):
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def find(image, tile):
    """(x, y) of every position at which the image shows exactly this tile."""
    image, tile = (x.astype(np.int32) @ np.array([65536, 256, 1], np.int32) for x in (image, tile))
    height, width = tile.shape
    starts = (image[: 1 - height, : 1 - width] == tile[0, 0]) & (
        image[height - 1 :, width - 1 :] == tile[-1, -1]
    )
    return [
        (int(x), int(y))
        for y, x in np.argwhere(starts)
        if (image[y : y + height, x : x + width] == tile).all()
    ]


def enlarged(pixels, side):
    factor = side // pixels.shape[0]
    return pixels.repeat(factor, 0).repeat(factor, 1)


def example(*, rows=4, size=32, grid=4, terms=("intra", "inter"), mixed=True, words=True):
    rng = np.random.default_rng(3)
    views = rng.integers(0, 256, (rows, 2, size, size, 3), np.uint8)
    mask = rng.permuted(np.tile(np.arange(grid * grid) % 2 == 0, (rows, 1)), axis=1)
    cells = (
        mask.reshape(rows, grid, grid).repeat(size // grid, 1).repeat(size // grid, 2)[..., None]
    )
    partner = np.arange(rows) ^ 1
    images = {
        "input": np.where(cells, views[:, 0], views[partner, 0]) if mixed else views[:, 0],
        "input_view": views[:, 0],
    }
    features = {"input": rng.normal(size=(rows, grid * grid, 7)).astype(np.float32)}
    for term in sorted(terms):
        images[f"{term}/view"] = (
            views[:, 0] if term == "intra" else views[partner if mixed else np.arange(rows), 1]
        )
        for name in ("prediction", "target"):
            features[f"{term}/{name}"] = rng.normal(size=(rows, grid * grid, 9)).astype(np.float32)
    captions = [f"a long caption of image {r}, " * 9 for r in range(rows)] if words else [""] * rows
    labels = [f"class {r}" for r in range(rows)] if words else [""] * rows
    reads = "mixed" if mixed else "masked" if terms else "whole"
    return dict(
        features=features,
        images=images,
        batch={"mask": mask},
        captions=captions,
        labels=labels,
        reads=reads,
    )


def test_colours_are_the_principal_components_of_the_targets():
    rng = np.random.default_rng(0)
    target = (rng.normal(size=(3, 16, 6)) * [9, 5, 3, 0.2, 0.1, 0.1]).astype(np.float32)
    prediction = rng.normal(size=(3, 16, 6)).astype(np.float32)
    flat = target.reshape(-1, 6).astype(np.float64)
    axes = np.linalg.svd(flat - flat.mean(0))[2][:3].T
    axes *= np.sign(axes[np.abs(axes).argmax(0), range(3)])
    along = [(x - flat.mean(0)) @ axes for x in (target, prediction)]
    low, high = np.percentile(along[0].reshape(-1, 3), (2, 98), axis=0)
    for colour, expected in zip(panels.feature_rgb([target, prediction]), along, strict=True):
        assert colour.dtype == np.float32 and colour.shape == (3, 16, 3)
        np.testing.assert_allclose(
            colour, np.clip((expected - low) / (high - low), 0, 1), atol=1e-5
        )


def test_equal_features_have_equal_colours():
    rng = np.random.default_rng(1)
    target = rng.normal(size=(2, 9, 5)).astype(np.float32)
    prediction = rng.normal(size=(2, 9, 5)).astype(np.float32)
    prediction[1, 4] = target[0, 2]
    target_rgb, prediction_rgb, same_rgb = panels.feature_rgb([target, prediction, target])
    assert (same_rgb == target_rgb).all()
    assert (prediction_rgb[1, 4] == target_rgb[0, 2]).all()
    assert (prediction_rgb != target_rgb).any()
    alone = panels.feature_rgb([target])[0]
    assert (alone == target_rgb).all()  # predictions have no say in the basis


def test_signs_are_fixed():
    """The largest coordinate of a direction is positive, whatever sign the decomposition returned:
    mirrored data give mirrored colours."""
    target = np.random.default_rng(2).normal(size=(1, 64, 4)) * [8, 4, 2, 1]
    np.testing.assert_allclose(
        panels.feature_rgb([-target])[0], 1 - panels.feature_rgb([target])[0], atol=1e-6
    )


@pytest.mark.parametrize("width", [1, 2])
def test_missing_components_are_grey(width):
    colour = panels.feature_rgb([np.random.default_rng(0).normal(size=(1, 16, width))])[0]
    assert colour.shape == (1, 16, 3)
    assert (colour[..., width:] == 0.5).all() and np.ptp(colour[..., 0]) == 1


def test_collapsed_targets_and_broken_predictions():
    target = np.full((2, 4, 3), 2.5, np.float32)
    prediction = target.copy()
    prediction[0, 1, 2] = np.nan
    target_rgb, prediction_rgb = panels.feature_rgb([target, prediction])
    assert (target_rgb == 0.5).all()
    assert (prediction_rgb[0, 1] == 0).all() and (prediction_rgb[1] == 0.5).all()
    assert all((x == 0).all() for x in panels.feature_rgb([np.full((1, 4, 3), np.nan), target]))


def test_similarity_is_the_mean_cosine_over_positions():
    rng = np.random.default_rng(0)
    p, t = rng.normal(size=(2, 3, 5, 4)).astype(np.float32)
    t[1, 2] = 0
    cosine = np.zeros((3, 5))
    for r in range(3):
        for n in range(5):
            norm = np.linalg.norm(p[r, n]) * np.linalg.norm(t[r, n])
            cosine[r, n] = p[r, n] @ t[r, n] / norm if norm else 0
    np.testing.assert_allclose(panels.similarity_map(p, t), cosine.mean(1), rtol=1e-6)


@pytest.mark.parametrize("grid", [4, 8])
def test_a_map_has_the_colours_of_its_cells(grid):
    """Few cells are interpolated between their centres, many are squares; equal cells are flat."""
    rgb = np.random.default_rng(0).random((grid * grid, 3))
    tile, cell = np.asarray(image_grid.color_tile(rgb, 16 * grid), float), 16
    ends = tile[cell // 2 - 1 :: cell, cell // 2 - 1 :: cell]  # the last pixel before the centres
    nearly = 0.5 if grid == 8 else 255 / cell + 1
    np.testing.assert_allclose(ends, 255 * rgb.reshape(grid, grid, 3), atol=nearly)
    jump = np.abs(np.diff(tile, axis=0)).max()
    assert jump > 100 if grid == 8 else jump <= 255 / cell + 1
    assert len(np.unique(image_grid.color_tile(np.full((16, 3), 0.3), 64))) == 1


def test_every_tile_is_where_it_belongs(tmp_path):
    made = example()
    panels.write_panel(tmp_path / "p.png", **made)
    image, side = page(tmp_path / "p.png"), image_grid.side_of_tile(32, 4)
    images, features, before = made["images"], made["features"], 0
    for row in range(4):
        [(mixed_x, y)] = find(image, enlarged(images["input"][row], side))
        own = find(image, enlarged(images["input_view"][row], side))
        # as image i, and as the target view of intra
        own_x, again_x = sorted(x for x, top in own if top == y)
        [partner_x] = [
            x for x, top in find(image, enlarged(images["input_view"][row ^ 1], side)) if top == y
        ]
        xs = [own_x, partner_x, mixed_x, again_x]
        for term in ("intra", "inter"):
            if term == "inter":
                xs += [x for x, _ in find(image, enlarged(images["inter/view"][row], side))]
            for rgb in panels.feature_rgb(
                [features[f"{term}/target"], features[f"{term}/prediction"]]
            ):
                tile = np.asarray(image_grid.color_tile(rgb[row], side))
                xs += [x for x, top in find(image, tile) if top == y]
        # i, j, mixed, then view, target, predicted of i and of j
        assert len(xs) == 9 and xs == sorted(xs) and y > before
        before = y

        mask_x = (partner_x + mixed_x) // 2
        for cell, own_cell in enumerate(made["batch"]["mask"][row]):
            centre = image[
                y + (2 * (cell // 4) + 1) * side // 8, mask_x + (2 * (cell % 4) + 1) * side // 8
            ]
            assert tuple(centre) == (image_grid.OWN if own_cell else image_grid.PARTNER)


def test_a_masked_input_hides_cells_and_has_no_partner(tmp_path):
    made = example(rows=3, terms=("inter",), mixed=False)
    panels.write_panel(tmp_path / "p.png", **made)
    image, side = page(tmp_path / "p.png"), image_grid.side_of_tile(32, 4)
    for row in range(3):
        cells = made["batch"]["mask"][row].reshape(4, 4).repeat(8, 0).repeat(8, 1)[..., None]
        masked = np.where(
            cells, made["images"]["input_view"][row], np.array(image_grid.HIDDEN, np.uint8)
        )
        assert len(find(image, enlarged(masked, side))) == 1
        assert len(find(image, enlarged(made["images"]["input_view"][row], side))) == 1
    assert not (image == image_grid.PARTNER).all(-1).any()


def test_predicted_pixels_stand_beside_their_target_view(tmp_path):
    made, rng = example(rows=2, terms=(), mixed=False), np.random.default_rng(7)
    for name in ("view", "pixels", "completed"):
        made["images"][f"pixel/{name}"] = rng.integers(0, 256, (2, 32, 32, 3), np.uint8)
    panels.write_panel(tmp_path / "p.png", **made | {"reads": "masked"})
    image, side = page(tmp_path / "p.png"), image_grid.side_of_tile(32, 4)
    for row in range(2):
        places = [
            find(image, enlarged(made["images"][name][row], side))
            for name in ("input_view", "pixel/view", "pixel/pixels", "pixel/completed")
        ]
        assert [len(place) for place in places] == [1, 1, 1, 1]
        xs, ys = zip(*(place[0] for place in places), strict=True)
        assert list(xs) == sorted(xs) and len(set(ys)) == 1


def test_whole_views_are_shown_as_they_are(tmp_path):
    """Without mask and partner, though the batch has both."""
    made = example(rows=2, terms=("inter",), mixed=False)
    panels.write_panel(tmp_path / "p.png", **made | {"reads": "whole"})
    image, side = page(tmp_path / "p.png"), image_grid.side_of_tile(32, 4)
    assert image.shape[1] < 4 * (side + 20) + 60
    assert (
        not (image == image_grid.HIDDEN).all(-1).any()
        and not (image == image_grid.PARTNER).all(-1).any()
    )
    assert all(
        len(find(image, enlarged(made["images"]["input_view"][row], side))) == 1 for row in range(2)
    )


def test_partners_without_a_row_of_their_own_are_not_shown(tmp_path):
    made = example(rows=2, terms=("intra",))
    panels.write_panel(tmp_path / "p.png", **made, paired=False)
    image, side = page(tmp_path / "p.png"), image_grid.side_of_tile(32, 4)
    for row in range(2):
        # as image i, and as the target view
        assert len(find(image, enlarged(made["images"]["input_view"][row], side))) == 2
        assert len(find(image, enlarged(made["images"]["input"][row], side))) == 1


@pytest.mark.parametrize(
    ("mixed", "terms", "columns"),
    [
        (True, ("inter",), 7),
        (True, ("intra",), 7),
        (True, (), 4),
        (False, (), 3),
        (False, ("intra",), 6),
    ],
)
@pytest.mark.parametrize("words", [True, False])
def test_forms(tmp_path, mixed, terms, columns, words):
    panels.write_panel(tmp_path / "p.png", **example(rows=2, mixed=mixed, terms=terms, words=words))
    height, width = page(tmp_path / "p.png").shape[:2]
    side = image_grid.side_of_tile(32, 4)
    assert columns * side < width < columns * (side + 20) + 60
    assert 2 * side < height < 2 * (side + 60) + 100


@pytest.mark.parametrize(
    ("size", "grid"), [(32, 2), (48, 3), (96, 6), (128, 8), (224, 14), (224, 16), (384, 24)]
)
def test_sizes(tmp_path, size, grid):
    side = image_grid.side_of_tile(size, grid)
    assert side % grid == 0 and 90 <= side <= 130
    panels.write_panel(tmp_path / "p.png", **example(rows=2, size=size, grid=grid))
    assert page(tmp_path / "p.png").shape[1] > 10 * side


def test_similarity_is_printed_and_words_do_not_run_into_it(tmp_path):
    made = example(rows=2, terms=("intra",))
    panels.write_panel(tmp_path / "a.png", **made)
    first = page(tmp_path / "a.png")
    side = image_grid.side_of_tile(32, 4)
    left = first.shape[1] - image_grid.MARGIN - side
    rows = slice(
        image_grid.MARGIN + panels.HEAD + side + 1,
        image_grid.MARGIN + panels.HEAD + side + panels.LINE,
    )
    assert (first[rows, left - image_grid.GAP : left] == image_grid.PAPER).all()
    assert (first[rows, left : -image_grid.MARGIN] != image_grid.PAPER).any()
    made["features"]["intra/prediction"] = -made["features"]["intra/prediction"]
    panels.write_panel(tmp_path / "b.png", **made)
    assert (page(tmp_path / "b.png")[rows, left:] != first[rows, left:]).any()


def test_same_input_same_bytes_and_nothing_left_behind(tmp_path):
    for name in ("a.png", "b.png", "a.png"):
        panels.write_panel(tmp_path / name, **example())
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    panels.write_panel(tmp_path / "p.png", **example())
    before = (tmp_path / "p.png").read_bytes()

    def full(self, place, format):
        place.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="p.png: No space left on device"):
        panels.write_panel(tmp_path / "p.png", **example(rows=2))
    assert (tmp_path / "p.png").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]


def test_elided_words_fit():
    face = image_grid.font(12)
    for width in (3, 20, 57, 200):
        text = image_grid.elide_text("a long caption, longer than all of these", width, face)
        assert face.getlength(text) <= width
        assert text == "" or text.endswith("…")
    assert image_grid.elide_text("short", 200, face) == "short"

"""The contact sheet shows the pixels of the batch, mixed as the mask says."""

import numpy as np
import pytest
from PIL import Image

from m3i_jax.reporting import image_grid, preview_sheet


def example(rows=4, size=32, grid=4):
    rng = np.random.default_rng(5)
    return {
        "views": rng.integers(0, 256, (rows, 2, size, size, 3), np.uint8),
        "mask": rng.random((rows, grid * grid)) < 0.5,
        "label": np.array([0, -1, 1, 7] * rows, np.int32)[:rows],
    }


def write(path, batch, *, caption="a caption", classes=("cat", "dog")):
    preview_sheet.write_preview(
        path, batch, captions=[caption] * len(batch["label"]), classes=classes
    )
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def test_mixing_is_what_the_mask_says():
    batch = example(rows=4)
    made = preview_sheet.mix_images(batch["views"][:, 0], batch["mask"])
    for r in range(4):
        for y in range(32):
            for x in (0, 7, 8, 20, 31):
                source = r if batch["mask"][r, (y // 8) * 4 + x // 8] else r ^ 1
                assert (made[r, y, x] == batch["views"][source, 0, y, x]).all()


def test_tiles_of_a_sample_stand_in_order_and_partners_side_by_side(tmp_path):
    batch, side = example(), image_grid.side_of_tile(32, 4)
    image, inputs = (
        write(tmp_path / "p.png", batch),
        preview_sheet.mix_images(batch["views"][:, 0], batch["mask"]),
    )
    left, pitch = image_grid.MARGIN, side + image_grid.GAP
    down = side + 2 * preview_sheet.LINE + preview_sheet.AFTER
    for row in range(4):
        x = left + row % 2 * (4 * pitch - image_grid.GAP + preview_sheet.BETWEEN)
        y = image_grid.MARGIN + preview_sheet.HEAD + row // 2 * down
        for column, pixels in (
            (0, batch["views"][row, 0]),
            (1, batch["views"][row, 1]),
            (3, inputs[row]),
        ):
            shown = image[y : y + side, x + column * pitch : x + column * pitch + side]
            np.testing.assert_array_equal(shown, pixels.repeat(side // 32, 0).repeat(side // 32, 1))
        colours = (
            (image_grid.OWN, image_grid.PARTNER)
            if row % 2 == 0
            else (image_grid.PARTNER, image_grid.OWN)
        )
        for cell, own in enumerate(batch["mask"][row]):
            at = image[
                y + (2 * (cell // 4) + 1) * side // 8,
                x + 2 * pitch + (2 * (cell % 4) + 1) * side // 8,
            ]
            assert tuple(at) == colours[0 if own else 1]


def test_two_halves_make_one_mixed_input(tmp_path):
    """With objective.pairing=halves the model never reads the mask and the mixed input of a second
    row."""
    batch, side = example(), image_grid.side_of_tile(32, 4)
    whole = write(tmp_path / "a.png", batch)
    captions = ["a caption"] * len(batch["label"])
    preview_sheet.write_preview(
        tmp_path / "b.png", batch, captions=captions, classes=("cat", "dog"), halves=True
    )
    with Image.open(tmp_path / "b.png") as opened:
        half = np.array(opened.convert("RGB"))
    assert half.shape == whole.shape
    second = image_grid.MARGIN + 4 * (side + image_grid.GAP) - image_grid.GAP
    end = second + preview_sheet.BETWEEN + 2 * (side + image_grid.GAP)
    top = image_grid.MARGIN + preview_sheet.HEAD
    np.testing.assert_array_equal(half[:, : end - 1], whole[:, : end - 1])
    assert (half[top : top + side, end - 1 :] == image_grid.PAPER).all()
    assert not (whole[top : top + side, end - 1 :] == image_grid.PAPER).all()


@pytest.mark.parametrize(
    ("rows", "size", "grid"), [(1, 32, 2), (2, 96, 6), (3, 224, 14), (8, 48, 3), (2, 384, 24)]
)
def test_sizes(tmp_path, rows, size, grid):
    side = image_grid.side_of_tile(size, grid)
    height, width = write(tmp_path / "p.png", example(rows, size, grid)).shape[:2]
    assert 8 * side < width < 8 * (side + 20) + 60
    assert (rows + 1) // 2 * side < height < (rows + 1) // 2 * (side + 60) + 100


def test_no_room_is_kept_for_words_that_are_not_there(tmp_path):
    batch = example()
    full = write(tmp_path / "a.png", batch)
    bare = write(tmp_path / "b.png", batch, caption="", classes=())
    assert full.shape[0] - bare.shape[0] == 2 * 2 * preview_sheet.LINE


def test_words_stay_below_their_sample(tmp_path):
    image = write(tmp_path / "p.png", example(), caption="very long words " * 40)
    block = 4 * (image_grid.side_of_tile(32, 4) + image_grid.GAP) - image_grid.GAP
    gutter = image[
        :, image_grid.MARGIN + block + 2 : image_grid.MARGIN + block + preview_sheet.BETWEEN - 2
    ]
    assert (gutter == image_grid.PAPER).all()


def test_same_batch_same_bytes_and_nothing_left_behind(tmp_path):
    for name in ("a.png", "b.png"):
        write(tmp_path / name, example())
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]

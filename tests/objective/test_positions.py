"""Positions against golden values, a float64 reference in another frame, and the pixels of
crops."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax.objective import positions

FLIPS = list(itertools.product([False, True], repeat=2))
IN, OUT = (
    np.array([[10.0, 20.0, 100.0, 120.0]], np.float32),
    np.array([[40.0, 200.0, 200.0, 150.0]], np.float32),
)
NO, YES = np.array([False]), np.array([True])

coordinates = jax.jit(positions.coordinates, static_argnames="grid")
relative = jax.jit(positions.relative_positions, static_argnames=("grid", "width"))
relative_parts = jax.jit(positions.relative_parts, static_argnames=("grid", "width"))


def reference(box_in, flip_in, box_out, flip_out, *, grid, width, picture_width):
    """SiameseIM for one pair in float64: flip first, crop afterwards; the box of a flipped view is
    in the flipped image."""

    def own_frame(box, flip):
        top, left, height, wide = map(float, box)
        return top, picture_width - left - wide if flip else left, height, wide

    (i1, j1, h1, w1), (i2, j2, h2, w2) = own_frame(box_in, flip_in), own_frame(box_out, flip_out)
    n = np.arange(grid) + 0.5
    y = h2 / h1 * n + grid * (i2 - i1) / h1 - 0.5
    if flip_in == flip_out:
        x = w2 / w1 * n + grid * (j2 - j1) / w1 - 0.5
    else:
        x = -w2 / w1 * n + grid * (picture_width - j1 - j2) / w1 - 0.5
    omega = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    embed = lambda v: np.concatenate([np.sin(v * omega), np.cos(v * omega)])
    ratio = np.concatenate([embed(10 * np.log(h2 / h1)), embed(10 * np.log(w2 / w1))])
    return (
        y,
        x,
        np.array(
            [
                np.concatenate([embed(y[r]), embed(x[c]), ratio])
                for r in range(grid)
                for c in range(grid)
            ]
        ),
    )


def random_boxes(rng, rows, height, width):
    """Random resized crops with scale (.08, 1) and ratio (3/4, 4/3), in integer pixels."""
    area, shape = (
        rng.uniform(0.08, 1, rows) * height * width,
        np.exp(rng.uniform(-np.log(4 / 3), np.log(4 / 3), rows)),
    )
    h, w = (
        np.minimum(np.rint(np.sqrt(area / shape)), height),
        np.minimum(np.rint(np.sqrt(area * shape)), width),
    )
    return np.stack(
        [
            np.floor(rng.random(rows) * (height - h + 1)),
            np.floor(rng.random(rows) * (width - w + 1)),
            h,
            w,
        ],
        1,
    ).astype(np.float32)


# --- the fixed table
def test_sincos_golden():
    golden = [0.841471, 0.01, 0.540302, 0.99995, 0, 0, 1, 1]
    np.testing.assert_allclose(positions.sincos_2d(2, 8)[2], golden, atol=1e-6)


@pytest.mark.parametrize(("grid", "width"), [(2, 8), (7, 64), (14, 768), (1, 4)])
def test_sincos_is_row_first(grid, width):
    table = positions.sincos_2d(grid, width)
    omega = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    for r, c in {(0, 0), (grid - 1, 0), (0, grid - 1), (grid // 2, grid - 1)}:
        expected = np.concatenate(
            [np.sin(r * omega), np.cos(r * omega), np.sin(c * omega), np.cos(c * omega)]
        )
        np.testing.assert_allclose(table[r * grid + c], expected, atol=1e-7)
    assert table.dtype == np.float32 and table.shape == (grid**2, width)
    # MAE's column-first table has the halves exchanged.
    square = table.reshape(grid, grid, width)
    np.testing.assert_array_equal(np.roll(square, width // 2, -1), square.swapaxes(0, 1))


# --- coordinates
def test_coordinates_golden():
    y, x = coordinates(IN, NO, OUT, NO, grid=2)
    np.testing.assert_allclose(y[0], [1.1, 3.1], atol=1e-6)
    np.testing.assert_allclose(x[0], [3.125, 4.375], atol=1e-6)


def test_coordinates_of_a_relative_flip_golden():
    """The golden numbers are for boxes in their own frame; the second view is flipped in an image
    500 pixels wide."""
    mirrored = OUT.copy()
    mirrored[0, 1] = 500 - OUT[0, 1] - OUT[0, 3]
    y, x = coordinates(IN, NO, mirrored, YES, grid=2)
    np.testing.assert_allclose(y[0], [1.1, 3.1], atol=1e-6)
    np.testing.assert_allclose(x[0], [3.541667, 2.291667], atol=1e-6)


@pytest.mark.parametrize("grid", [2, 7, 14])
@pytest.mark.parametrize("flip", [NO, YES])
def test_equal_views_have_exactly_the_cells_of_the_grid(grid, flip):
    boxes = random_boxes(np.random.default_rng(grid), 50, 333, 517)
    y, x = coordinates(boxes, np.repeat(flip, 50), boxes, np.repeat(flip, 50), grid=grid)
    np.testing.assert_array_equal(y, np.tile(np.arange(grid, dtype=np.float32), (50, 1)))
    np.testing.assert_array_equal(x, np.tile(np.arange(grid, dtype=np.float32), (50, 1)))


@pytest.mark.parametrize("flips", [(NO, YES), (YES, NO)])
def test_a_mirrored_copy_counts_backwards(flips):
    y, x = coordinates(IN, flips[0], IN, flips[1], grid=4)
    np.testing.assert_allclose(y[0], [0, 1, 2, 3], atol=1e-6)
    np.testing.assert_allclose(x[0], [3, 2, 1, 0], atol=1e-6)


@pytest.mark.parametrize(("flip_in", "flip_out"), FLIPS)
def test_coordinates_are_those_of_the_pixels(flip_in, flip_out):
    """Crop, flip and average an image whose pixel values are their coordinates, without a formula
    of positions."""
    grid, rng = 4, np.random.default_rng(0)
    image = np.stack(np.meshgrid(np.arange(60) + 0.5, np.arange(80) + 0.5, indexing="ij"), -1)

    def view(box, flip):
        top, left, height, width = map(int, box)
        cut = image[top : top + height, left : left + width]
        cut = cut[:, ::-1] if flip else cut
        # centre of each cell
        return cut.reshape(grid, height // grid, grid, width // grid, 2).mean((1, 3))

    for _ in range(5):
        boxes = []
        for _ in range(2):
            h, w = 4 * rng.integers(2, 15), 4 * rng.integers(2, 20)
            boxes.append(
                np.array(
                    [rng.integers(0, 60 - h + 1), rng.integers(0, 80 - w + 1), h, w], np.float32
                )
            )
        a, b = view(boxes[0], flip_in), view(boxes[1], flip_out)
        y, x = coordinates(
            boxes[0][None], np.array([flip_in]), boxes[1][None], np.array([flip_out]), grid=grid
        )
        # a patch of the input view, in pixels
        step_y, step_x = a[1, 0, 0] - a[0, 0, 0], a[0, 1, 1] - a[0, 0, 1]
        np.testing.assert_allclose(y[0], (b[:, 0, 0] - a[0, 0, 0]) / step_y, atol=1e-4)
        np.testing.assert_allclose(x[0], (b[0, :, 1] - a[0, 0, 1]) / step_x, atol=1e-4)


# --- raw embeddings
def test_relative_golden():
    golden = [0.891207, 0.011, 0.453596, 0.99994, 0.016592, 0.031245, -0.999862, 0.999512]
    golden += [0.603821, 0.069259, 0.79712, 0.997599, 0.7896, 0.022313, -0.613622, 0.999751]
    np.testing.assert_allclose(relative(IN, NO, OUT, NO, grid=2, width=8)[0, 0], golden, atol=2e-6)


@pytest.mark.parametrize(("flip_in", "flip_out"), FLIPS)
def test_relative_in_float32_is_the_float64_reference_of_the_other_frame(flip_in, flip_out):
    rows, grid, width, rng = 12, 7, 64, np.random.default_rng(1)
    a, b = random_boxes(rng, rows, 1333, 2000), random_boxes(rng, rows, 1333, 2000)
    # |y| and |x| reach 90 and 140, far outside a small input view
    a[0], b[0] = [0, 0, 100, 100], [1233, 1900, 100, 100]
    flips = np.full(rows, flip_in), np.full(rows, flip_out)
    raw = relative(a, flips[0], b, flips[1], grid=grid, width=width)
    assert raw.shape == (rows, grid**2, 2 * width) and raw.dtype == jnp.float32
    for k in range(rows):
        y, x, expected = reference(
            a[k], flip_in, b[k], flip_out, grid=grid, width=width, picture_width=2000
        )
        got_y, got_x = coordinates(
            a[k : k + 1], flips[0][:1], b[k : k + 1], flips[1][:1], grid=grid
        )
        np.testing.assert_allclose(got_y[0], y, rtol=3e-7, atol=1e-5)
        np.testing.assert_allclose(got_x[0], x, rtol=3e-7, atol=1e-5)
        np.testing.assert_allclose(raw[k], expected, atol=3e-5)


def test_identity_is_relative_of_equal_views_and_starts_with_the_table():
    boxes = random_boxes(np.random.default_rng(3), 4, 300, 400)
    flips = np.array([False, True, False, True])
    raw, same = (
        relative(boxes, flips, boxes, flips, grid=6, width=16),
        positions.same_view_positions(6, 16),
    )
    np.testing.assert_array_equal(same[:, :16], positions.sincos_2d(6, 16))
    np.testing.assert_array_equal(same[:, 16:], np.tile([0, 0, 0, 0, 1, 1, 1, 1], (36, 2)))
    np.testing.assert_allclose(raw, np.broadcast_to(same, raw.shape), atol=3e-7)
    np.testing.assert_array_equal(raw[..., 16:], np.broadcast_to(same[:, 16:], raw[..., 16:].shape))


def test_a_flip_shows_in_the_columns_alone():
    plain, flipped = (
        np.asarray(relative(IN, NO, OUT, flip, grid=3, width=8))[0] for flip in (NO, YES)
    )
    changed = np.any(plain != flipped, axis=0)
    assert not changed[:4].any() and changed[4:8].any() and not changed[8:].any()


def test_relative_parts_carry_a_linear_map():
    rng = np.random.default_rng(4)
    a, b, flips = (
        random_boxes(rng, 3, 300, 400),
        random_boxes(rng, 3, 300, 400),
        rng.random((2, 3)) < 0.5,
    )
    kernel = rng.normal(size=(32, 5)).astype(np.float32)
    row, column, ratio = relative_parts(a, flips[0], b, flips[1], grid=4, width=16)
    mapped = (
        (row @ kernel[:8])[:, :, None]
        + (column @ kernel[8:16])[:, None]
        + (ratio @ kernel[16:])[:, None, None]
    )
    whole = relative(a, flips[0], b, flips[1], grid=4, width=16) @ kernel
    np.testing.assert_allclose(mapped.reshape(3, 16, 5), whole, atol=1e-4)


def test_boxes_may_be_integers():
    as_int = [x.astype(np.int32) for x in (IN, OUT)]
    got = relative(as_int[0], NO, as_int[1], YES.astype(np.uint8), grid=2, width=8)
    np.testing.assert_array_equal(got, relative(IN, NO, OUT, YES, grid=2, width=8))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (partial(positions.sincos_2d, 2, 6), "width is 6"),
        (partial(positions.sincos_2d, 0, 8), "grid is 0"),
        (partial(positions.same_view_positions, 2, 0), "width is 0"),
        (partial(positions.relative_positions, IN, NO, OUT, NO, grid=2, width=10), "width is 10"),
        (partial(positions.relative_positions, IN[0], NO, OUT, NO, grid=2, width=8), r"\(4,\)"),
        (partial(positions.coordinates, IN, NO, np.repeat(OUT, 2, 0), NO, grid=2), r"\(2, 4\)"),
        (partial(positions.coordinates, IN, np.repeat(NO, 2), OUT, NO, grid=2), r"\(2,\)"),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()

"""Masks: exact counts, and the average shape of blockwise masks."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest

from m3i_jax.objective import masks, rng

MANY = 20_000


# --- counts and convention
@pytest.mark.parametrize(
    ("grid", "hidden", "rows"),
    [
        (14, 98, 5000),
        (14, 118, 3000),
        (14, 147, 1000),
        (12, 72, 3000),
        (6, 18, 3000),
        (4, 8, 3000),
        (7, 24, 2000),
        (2, 2, 500),
    ]
    + [
        (64, 2048, 40),
        (64, 1, 40),
        (63, 3968, 10),
        (8, 0, 50),
        (8, 64, 50),
        (1, 0, 5),
        (1, 1, 5),
        (16, 128, 1000),
    ],
)
def test_counts_are_exact(grid, hidden, rows):
    for draw in (masks.blockwise, masks.uniform):
        mask = draw(3, 11, rows, grid=grid, hidden=hidden)
        assert mask.dtype == bool and mask.shape == (rows, grid**2)
        assert ((~mask).sum(1) == hidden).all()


@pytest.mark.parametrize("draw", [masks.blockwise, masks.uniform])
def test_a_mask_depends_on_seed_and_position_alone(draw):
    whole = draw(5, 1000, 64, grid=14, hidden=98)
    for first, rows in ((1000, 1), (1017, 30), (1063, 1)):
        np.testing.assert_array_equal(
            draw(5, first, rows, grid=14, hidden=98), whole[first - 1000 : first - 1000 + rows]
        )
    assert len(np.unique(whole, axis=0)) == 64
    assert (draw(6, 1000, 64, grid=14, hidden=98) != whole).any(1).all()
    assert draw(5, 0, 0, grid=14, hidden=98).shape == (0, 196)


def test_blockwise_golden_stream():
    packed = np.packbits(masks.blockwise(1, 5, 2, grid=6, hidden=18), axis=1)
    assert [row.tobytes().hex() for row in packed] == ["1b1f9e7800", "820c71f3f0"]


def numbers(seed, position):
    for part in itertools.count():
        yield from (
            rng.uniforms(seed, rng.MASK, position, 1, 4 * masks._TRIES, part=part)
            .reshape(-1, 4)
            .tolist()
        )


def one_by_one(seed, position, grid, hidden, least):
    """BEiT's generator for one sample in plain loops over sets of cells, with the same random
    numbers."""
    taken, stream = set(), numbers(seed, position)
    while len(taken) < hidden:
        for _ in range(10):
            area_u, tilt_u, top_u, left_u = next(stream)
            area = least + area_u * (hidden - len(taken) - least)
            aspect = math.exp((2 * tilt_u - 1) * math.log(1 / 0.3))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= grid or w >= grid:
                continue
            top, left = int(top_u * (grid - h + 1)), int(left_u * (grid - w + 1))
            block = {(r, c) for r in range(top, top + h) for c in range(left, left + w)} - taken
            if 0 < len(block) <= hidden - len(taken):
                taken |= block
                break
        else:
            break
    return taken


@pytest.mark.parametrize(
    ("grid", "hidden", "least"), [(14, 98, 16), (14, 118, 16), (6, 18, 3), (64, 2048, 334)]
)
def test_rectangles_are_those_of_the_sequential_generator(grid, hidden, least):
    rows = 200 if grid < 64 else 10
    bits, count = masks._rectangles(2, 50, rows, grid, hidden, least)
    for k in range(rows):
        expected = one_by_one(2, 50 + k, grid, hidden, least)
        assert {
            (r, c) for r in range(grid) for c in range(grid) if int(bits[k, r]) >> c & 1
        } == expected
        assert count[k] == len(expected)
    plain = ~masks.blockwise(2, 50, rows, grid=grid, hidden=hidden, min_block=least, swap=False)
    columns = (
        (bits[:, :, None] >> np.arange(grid, dtype=np.uint64) & np.uint64(1))
        .astype(bool)
        .reshape(rows, -1)
    )
    # single cells are added afterwards
    assert (plain | ~columns).all() and (plain.sum(1) == hidden).all()


# --- statistics
def hidden_share(grid, hidden, **options):
    return (
        (~masks.blockwise(0, 0, MANY, grid=grid, hidden=hidden, **options))
        .mean(0)
        .reshape(grid, grid)
    )


@pytest.mark.parametrize(
    ("grid", "hidden", "centre", "edge", "corner", "tolerance"),
    [
        (14, 98, 0.86, 0.275, 0.066, 0.008),
        (14, 118, 0.935, 0.365, 0.091, 0.008),
        (12, 72, 0.85, 0.30, 0.08, 0.01),
        (6, 18, 0.78, 0.43, 0.21, 0.015),
    ],
)
def test_rectangles_prefer_the_centre(grid, hidden, centre, edge, corner, tolerance):
    share = hidden_share(grid, hidden, swap=False)
    low, high = grid // 2 - 1, grid // 2 + 1
    edges = [share[0, low:high], share[-1, low:high], share[low:high, 0], share[low:high, -1]]
    assert share[low:high, low:high].mean() == pytest.approx(centre, abs=tolerance)
    assert np.mean(edges) == pytest.approx(edge, abs=tolerance)
    assert share[:: grid - 1, :: grid - 1].mean() == pytest.approx(corner, abs=tolerance)
    # The distribution is invariant to flips and rotations: five standard deviations of the
    # difference of two shares.
    for other in (share[::-1], share[:, ::-1], share.T):
        assert (np.abs(share - other) < 5 * np.sqrt(2 * share * (1 - share) / MANY) + 1e-9).all()


def test_the_role_swap_makes_every_cell_even():
    share = hidden_share(14, 98)
    assert np.abs(share - 0.5).max() < 5 * 0.5 / math.sqrt(MANY)
    plain, swapped = (
        masks.blockwise(0, 0, MANY, grid=14, hidden=98, swap=swap) for swap in (False, True)
    )
    inverted = (plain != swapped).all(1)
    assert ((plain == swapped).all(1) | inverted).all()
    assert abs(inverted.mean() - 0.5) < 5 * 0.5 / math.sqrt(MANY)
    # Samples swap independently: partners agree half of the time.
    assert abs((inverted[::2] == inverted[1::2]).mean() - 0.5) < 5 * 0.5 / math.sqrt(MANY / 2)


@pytest.mark.parametrize(("grid", "hidden"), [(14, 118), (7, 24), (5, 12)])
def test_no_swap_unless_exactly_half_is_hidden(grid, hidden):
    np.testing.assert_array_equal(
        *(masks.blockwise(0, 0, 200, grid=grid, hidden=hidden, swap=swap) for swap in (False, True))
    )


@pytest.mark.parametrize(
    ("grid", "hidden", "least", "short", "mean", "most"),
    [(14, 98, 16, 0.30, 0.47, 20), (12, 72, 12, 0.22, None, 20), (6, 18, 3, 0.02, None, 6)],
)
def test_single_cells_are_the_exception(grid, hidden, least, short, mean, most):
    missing = hidden - masks._rectangles(0, 0, MANY, grid, hidden, least)[1]
    assert (missing > 0).mean() == pytest.approx(short, abs=0.015)
    assert mean is None or missing.mean() == pytest.approx(mean, abs=0.03)
    assert missing.min() == 0 and missing.max() <= most


def test_single_cells_are_uniform():
    """A block as large as the grid never fits, so all cells are single cells."""
    share = hidden_share(4, 5, min_block=500)
    assert np.abs(share - 5 / 16).max() < 5 * math.sqrt(5 / 16 * 11 / 16 / MANY)


def test_min_block_scales_with_the_grid():
    np.testing.assert_array_equal(
        *(masks.blockwise(0, 0, 100, grid=12, hidden=72, min_block=least) for least in (None, 12))
    )
    assert (
        masks.blockwise(0, 0, 100, grid=12, hidden=72, min_block=16)
        != masks.blockwise(0, 0, 100, grid=12, hidden=72)
    ).any()


def test_uniform_masks_are_uniform():
    hidden = ~masks.uniform(0, 0, MANY, grid=6, hidden=9)
    assert np.abs(hidden.mean(0) - 0.25).max() < 5 * math.sqrt(0.25 * 0.75 / MANY)
    both = hidden.astype(np.float64).T @ hidden / MANY
    pair = 9 * 8 / (36 * 35)
    assert np.abs(both[~np.eye(36, dtype=bool)] - pair).max() < 5.5 * math.sqrt(pair / MANY)


# --- errors and imports
@pytest.mark.parametrize("draw", [masks.blockwise, masks.uniform])
def test_errors_of_masks(draw):
    for options, text in (
        ({"grid": 65, "hidden": 5}, "grid is 65"),
        ({"grid": 0, "hidden": 0}, "grid is 0"),
        ({"grid": 4, "hidden": 17}, "hidden is 17"),
        ({"grid": 4, "hidden": -1}, "hidden is -1"),
    ):
        with pytest.raises(ValueError, match=text):
            draw(0, 0, 2, **options)
    with pytest.raises(ValueError, match="seed -1"):
        draw(-1, 0, 2, grid=4, hidden=8)


def test_errors_of_numbers():
    with pytest.raises(ValueError, match="min_block is 0"):
        masks.blockwise(0, 0, 2, grid=4, hidden=8, min_block=0)
    for wrong in (
        (2**64, 0, 0, 1, 4),
        (0, 256, 0, 1, 4),
        (0, 0, -1, 1, 4),
        (0, 0, 0, -1, 4),
        (0, 0, 0, 1, 0),
    ):
        with pytest.raises(ValueError, match="a seed is"):
            rng.uniforms(*wrong)


def test_drawing_masks_needs_no_jax():
    code = (
        "import sys; from m3i_jax.objective import masks; masks.blockwise(0, 0, 2, grid=4,"
        " hidden=8); print('jax' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert out.stdout.strip() == "False"

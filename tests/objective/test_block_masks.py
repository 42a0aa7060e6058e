"""Multi-block masks of I-JEPA."""

import numpy as np
import pytest

from m3i_jax.objective import masks

OPTIONS = {"grid": 14, "hidden": 147}


def test_counts_are_fixed_and_the_context_shows_no_target() -> None:
    mask, cells = masks.multi_block(3, 10, 300, **OPTIONS)
    assert mask.shape == (300, 196) and (mask.sum(1) == 49).all()
    assert cells.shape == (300, 4, 34) and cells.dtype == np.int32
    assert not np.take_along_axis(mask, cells.reshape(300, -1), 1).any()
    assert (np.diff(cells, axis=-1) > 0).all()  # of a block, each cell once
    assert len(np.unique(cells)) == 196  # every cell can be a target
    assert masks.multi_block(0, 0, 2, share=0.15, **OPTIONS)[1].shape == (2, 4, 29)  # 0.15 * 196
    assert mask.any(0).all()  # and visible


def test_blocks_are_rectangles_cut_in_their_last_row() -> None:
    _, cells = masks.multi_block(0, 0, 100, **OPTIONS)
    shapes = set()
    for block in cells.reshape(-1, 34):
        rows, columns = np.unique(block // 14), np.unique(block % 14)
        assert (np.diff(rows) == 1).all() and (np.diff(columns) == 1).all()
        lengths = [int((block // 14 == row).sum()) for row in rows]
        cut = min(lengths[0], lengths[-1])
        assert set(lengths) <= {cut, len(columns)} and lengths.count(cut) in (1, len(rows))
        shapes.add((len(rows), len(columns)))
    aspects = [height / width for height, width in shapes]
    assert len(shapes) >= 3 and 0.6 < min(aspects) < 0.9 and 1.2 < max(aspects) < 1.7


def test_a_row_is_a_function_of_its_position() -> None:
    mask, cells = masks.multi_block(5, 0, 8, **OPTIONS)
    for first in (2, 6):
        other = masks.multi_block(5, first, 2, **OPTIONS)
        np.testing.assert_array_equal(mask[first : first + 2], other[0])
        np.testing.assert_array_equal(cells[first : first + 2], other[1])
    fewer = masks.multi_block(5, 0, 8, blocks=2, **OPTIONS)[1]
    np.testing.assert_array_equal(cells[:, :2], fewer)
    assert (masks.multi_block(6, 0, 8, **OPTIONS)[0] != mask).any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden": 100}, "at least 136"),
        ({"hidden": 196}, "one cell must be visible"),
        ({"blocks": 0}, "blocks is 0"),
        ({"blocks": 17}, "1..16"),
    ],
)
def test_what_cannot_be_drawn_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        masks.multi_block(0, 0, 1, **{**OPTIONS, **changes})


def test_smallest_grids() -> None:
    mask, cells = masks.multi_block(0, 0, 50, grid=2, hidden=3, blocks=2)
    assert (mask.sum(1) == 1).all() and cells.shape == (50, 2, 1)
    mask, cells = masks.multi_block(0, 0, 50, grid=4, hidden=12)
    assert (mask.sum(1) == 4).all() and cells.shape == (50, 4, 3)

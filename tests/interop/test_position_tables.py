"""Resized position tables compared with two other implementations."""

import jax
import numpy as np
import pytest

from m3i_jax.objective import positions


@pytest.mark.parametrize(("old", "new"), [(14, 12), (14, 16), (14, 24), (16, 14), (3, 7)])
def test_resizing_equals_jax_bicubic_with_pytorchs_kernel(old: int, new: int) -> None:
    table = np.random.default_rng(0).normal(size=(1, old * old + 1, 5)).astype(np.float32)
    got = positions.resize_position_table(table, new, cls=True)
    expected = jax.image.resize(
        table[0, 1:].reshape(old, old, 5), (new, new, 5), method="bicubic-pytorch", antialias=False
    )
    np.testing.assert_allclose(got[0, 1:], np.asarray(expected).reshape(-1, 5), atol=1e-5)
    np.testing.assert_array_equal(got[0, 0], table[0, 0])


def test_resizing_equals_torch(old: int = 14, new: int = 16) -> None:
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).normal(size=(1, old * old, 5)).astype(np.float32)
    grid = torch.from_numpy(table).reshape(1, old, old, 5).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        grid, (new, new), mode="bicubic", align_corners=False
    ).permute(0, 2, 3, 1)
    np.testing.assert_allclose(
        positions.resize_position_table(table, new, cls=False)[0],
        expected.reshape(-1, 5).numpy(),
        atol=1e-5,
    )


def test_a_row_for_cls_is_added_or_removed() -> None:
    table = np.random.default_rng(0).normal(size=(1, 10, 4)).astype(np.float32)
    np.testing.assert_array_equal(positions.resize_position_table(table, 3, cls=True), table)
    np.testing.assert_array_equal(
        positions.resize_position_table(table, 3, cls=False), table[:, 1:]
    )
    np.testing.assert_array_equal(
        positions.resize_position_table(table[:, 1:], 3, cls=True)[:, 0], np.zeros((1, 4))
    )
    with pytest.raises(ValueError, match="not that of a square grid"):
        positions.table_grid(7)

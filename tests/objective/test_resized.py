"""Position tables for another grid, against jax's and torch's bicubic kernel."""

import jax
import numpy as np
import pytest

from m3i_jax.objective import positions


@pytest.mark.parametrize(("old", "new"), [(4, 7), (7, 4), (14, 24), (3, 3), (2, 9)])
def test_resizing_equals_torch(old: int, new: int) -> None:
    table = np.random.default_rng(0).normal(size=(old * old, 6)).astype(np.float32)
    expected = jax.image.resize(
        table.reshape(old, old, 6), (new, new, 6), method="bicubic-pytorch", antialias=False
    )
    np.testing.assert_allclose(
        positions.resized(table, new), np.asarray(expected).reshape(new * new, 6), atol=1e-5
    )


def test_table_of_the_same_grid_is_unchanged() -> None:
    table = positions.sincos_2d(5, 8)
    assert positions.resized(table, 5) is table

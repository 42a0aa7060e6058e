"""Position tables for another grid, against jax's and torch's bicubic kernel."""

import jax
import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.models import vit, vit_maps
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


@pytest.mark.parametrize(("old", "new"), [(37, 16), (7, 4), (4, 7)])
def test_antialiasing_is_that_of_a_wider_kernel(old: int, new: int) -> None:
    """Keys' kernel with a = -0.5, normalised inside the table, as torch's with antialias=True."""
    table = np.random.default_rng(0).normal(size=(old * old, 3)).astype(np.float32)
    expected = jax.image.resize(
        table.reshape(old, old, 3), (new, new, 3), method="cubic", antialias=True
    )
    np.testing.assert_allclose(
        positions.resized(table, new, antialias=True),
        np.asarray(expected).reshape(new * new, 3),
        atol=1e-5,
    )


def test_the_table_of_an_encoder_with_registers_is_resized_with_antialiasing() -> None:
    """As DINOv2's: those with registers, and no other."""
    table = np.random.default_rng(0).normal(size=(1, 49, 8)).astype(np.float32)
    patches, seen = np.zeros((1, 16, 12), np.float32), []
    for registers in (0, 2):
        encoder = schema.Encoder(
            patch_size=2, width=8, depth=1, heads=2, registers=registers, positions="learned",
            cls_token=False,
        )  # fmt: skip
        model = schema.Model(encoder=encoder, dtype="float32")
        params = {
            "positions": table,
            "patch_embed": {"kernel": np.zeros((12, 8)), "bias": np.zeros(8)},
            "registers": np.zeros((1, registers, 8), np.float32),
        }
        seen.append(np.asarray(vit._embed_square(model, params, patches, 4))[0, registers:])
        of_maps = vit_maps.position_table(model, params, 7, (4, 4))
        np.testing.assert_allclose(of_maps, seen[-1], atol=1e-5)
        wanted = positions.resized(table[0], 4, antialias=registers > 0)
        np.testing.assert_allclose(seen[-1], wanted, atol=1e-5)
    assert np.abs(seen[0] - seen[1]).max() > 0.1

"""What `import m3i_jax` offers: its names, and those of earlier versions with a warning."""

import importlib
import re
import warnings

import numpy as np
import pytest

import m3i_jax

OLD_MODULES = {
    "posterior": "losses",
    "regression": "regression_losses",
    "contrast": "contrastive",
    "regularize": "collapse",
    "target": "ema",
    "families": "posteriors",
    "named": "published",
    "methods": "terms",
}
OLD_NAMES = {
    "decorrelation": ("contrastive", "barlow_twins"),
    "dense_against": ("contrastive", "densecl"),
    "spread": ("collapse", "centered_energy"),
    "identity": ("positions", "same_view_positions"),
    "relative": ("positions", "relative_positions"),
    "weight": ("balance", "balance_weight"),
    "METHODS": ("published", "PUBLISHED"),
}


def test_public_names_are_those_of_the_modules() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = {name: getattr(m3i_jax, name) for name in m3i_jax.__all__}
    from m3i_jax.objective import losses

    assert values["gaussian"] is losses.gaussian and values["losses"] is losses
    assert set(m3i_jax.__all__) | {"load"} <= set(dir(m3i_jax))
    assert not {*OLD_MODULES, *OLD_NAMES} & set(dir(m3i_jax))


@pytest.mark.parametrize(("old", "new"), OLD_MODULES.items())
def test_old_modules(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"m3i_jax.{old} is now m3i_jax.{new};") as seen:
        value = getattr(m3i_jax, old)
    assert value is importlib.import_module(f"m3i_jax.objective.{new}")
    assert seen[0].filename == __file__


@pytest.mark.parametrize(("old", "home"), OLD_NAMES.items())
def test_old_names(old: str, home: tuple[str, str]) -> None:
    module, new = home
    with pytest.warns(DeprecationWarning, match=f"m3i_jax.{old} is now m3i_jax.{new};"):
        value = getattr(m3i_jax, old)
    assert value is getattr(importlib.import_module(f"m3i_jax.objective.{module}"), new)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=re.escape("has no attribute 'no_such_loss'")):
        m3i_jax.no_such_loss  # noqa: B018
    with pytest.raises(ImportError):
        from m3i_jax import no_such_module  # noqa: F401


def test_maps_are_read_at_boxes_by_functions_of_the_package() -> None:
    image_HxWx1 = np.arange(16.0, dtype=np.float32).reshape(4, 4, 1)
    pooled = m3i_jax.roi_align(image_HxWx1, np.array([[0.0, 0, 4, 4]], np.float32), 2, 1)
    np.testing.assert_allclose(np.asarray(pooled).ravel(), [2.5, 4.5, 10.5, 12.5])
    masks = m3i_jax.paste_masks(np.ones((1, 28, 28)), np.array([[1.0, 0, 3, 2]]), (3, 4))
    assert (np.asarray(masks) >= 0.5).astype(int).tolist() == [
        [[0, 1, 1, 0], [0, 1, 1, 0], [0] * 4]
    ]
    assert {"roi_align", "paste_masks"} <= set(dir(m3i_jax))

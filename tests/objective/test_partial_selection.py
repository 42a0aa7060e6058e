"""The smallest entries of rows against a sort: by counting, which is the form of CPUs, and by the
form of other platforms, with ties, blocks that are not full, infinities and NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax.objective import partial_selection


@functools.cache
def rows() -> np.ndarray:
    r = np.random.default_rng(0)
    x = np.abs(r.normal(size=(2, 6, 150))).astype("f4")
    x[0, 1] = r.integers(0, 4, 150)  # many ties
    x[0, 2] = 0
    x[0, 3] = np.where(r.random(150) < 0.9, np.inf, x[0, 3])
    x[0, 4, ::3] = 1e-42  # below the smallest normal number
    x[1, 0, :100] = np.nan
    return x


@pytest.mark.parametrize("count", [1, 37, 150])
def test_the_smallest_entries_of_a_row_are_selected_once(count: int) -> None:
    find = jax.jit(jax.vmap(lambda x: partial_selection.smallest_indices(x, count)))
    found = np.asarray(find(rows())).reshape(-1, count)
    for x, index in zip(rows().reshape(-1, 150), found, strict=True):
        wanted = np.argsort(x, kind="stable")[:count]  # NaN last, of equal entries the first
        np.testing.assert_array_equal(np.sort(index), np.sort(wanted))


def test_the_form_of_other_platforms_selects_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, default, **_: default(*x))
    x = rows()[1, 1:]
    found = partial_selection.smallest_indices(jnp.asarray(x), 37)
    wanted = np.argsort(x, axis=1, kind="stable")[:, :37]
    np.testing.assert_array_equal(np.sort(found), np.sort(wanted))

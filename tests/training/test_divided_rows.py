"""Rows without a test of their own on several devices: that neither devices, microbatches nor a
restart change a number of I-JEPA, CAPI, captioners, DINO's centring and Gram anchoring."""

import math
import pathlib

import jax
import numpy as np
import pytest

from m3i_jax import parallel
from m3i_jax.training.checkpoint import Checkpoints
from tests.training.forward import plan_of
from tests.training.test_prototype_rows import HEAD, same, trained

SIZES = {
    "model__encoder__depth": 1,
    "model__encoder__final_norm": True,
    "train__batch_size": 16,
    **HEAD,
    "model__head__prototypes": 16,
}
ROWS = {
    "ijepa": {
        "data__mask": "multi_block",
        "data__mask_ratio": 0.75,
        "model__decoder__positions": "absolute",
    },
    "capi": {"data__mask": "inverse_block", "data__mask_ratio": 0.625},
    "coca,cappa,locca": {"data__regions": True},
    "dino": {"objective__prototype_targets": "centering"},
    # taken after the second of 20 steps
    "ibot,dinov3_gram": {"objective__snapshot_at": "0.1", "data__mask_ratio": 0.25},
}


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_division_and_a_restart_change_nothing(
    row: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel.sharding, "SMALL", 1)
    changes = {**SIZES, **ROWS[row]}
    plan = plan_of(row, **changes)
    alone, whole = trained(plan, (1, 1, 1), 4)
    assert float(whole[-1]["grad_norm"]) > 0
    _, parts = trained(plan_of(row, train__microbatches=2, **changes), (1, 1, 1), 4)
    same(parts, whole, rtol=1e-4)
    _, split = trained(plan, (1, 8, 1), 4)
    same(split, whole, rtol=1e-4)
    half, _ = trained(plan, (1, 1, 1), 2)
    if "gram" in row:
        first, _ = trained(plan, (1, 1, 1), 1)
        taken = half.opt["snapshot"]
        assert float(taken.taken) == 1 and float(first.opt["snapshot"].taken) == 0
        for a, b in zip(
            jax.tree.leaves(taken.params["encoder"]),
            jax.tree.leaves(first.opt["target"].params["encoder"]),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)
    saver = Checkpoints(tmp_path / "checkpoints", 1)
    saver.save(2, half, {"samples_seen": 32})
    saver.wait()
    saver.close()

    def restore(one):
        reader = Checkpoints(tmp_path / "checkpoints", 1)
        state = reader.restore(2, one.template, one.shardings)
        reader.close()
        return state

    again, rest = trained(plan, (1, 1, 1), 4, first=2, state=restore)
    for a, b in zip(rest, whole[2:], strict=True):
        assert all((a[key] == b[key]).all() for key in b)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(a, b)
    assert math.isfinite(float(whole[-1]["loss"]))

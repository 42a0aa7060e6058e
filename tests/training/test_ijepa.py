"""I-JEPA as a row: every target block by itself, against the decoder called once a block and numpy
float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax.errors import UserError
from m3i_jax.models import decoder
from m3i_jax.objective import positions
from m3i_jax.objective.terms import MASKED
from tests.training.forward import augmented_patches, encode, forward, plan_of

SETTINGS = {
    "data__mask": "multi_block",
    "data__mask_ratio": 0.75,
    "model__decoder__positions": "absolute",
    "model__encoder__cls_token": False,
    "model__encoder__final_norm": True,
    "model__pool__kind": "mean",
}


def test_each_block_is_predicted_from_the_context_alone() -> None:
    plan = plan_of("ijepa", **SETTINGS)
    got, config = forward(plan), plan.config
    blocks = np.asarray(got.batch["blocks"])
    assert blocks.shape == (8, 4, 3) and got.z[MASKED].shape[1] == 4
    cells = np.stack([np.flatnonzero(row) for row in np.asarray(got.batch["mask"])])
    queries = decoder.decoder_queries(
        config.model,
        got.params["decoder"],
        jnp.asarray(positions.same_view_positions(4, config.model.decoder.width)),
    )
    crops = augmented_patches(config, got.batch, (0,))
    z = np.asarray(encode(config, got.trees["ema"]["encoder"], crops[0]), np.float64)
    target = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-5)

    @jax.jit
    def predict(params, z, cells, queries):
        rows = decoder.apply(config.model, params, z, cells, queries, grid=4)
        return decoder.prediction_head(config.model, params, rows, "tokens")

    costs = []
    for m in range(4):
        prediction = predict(got.params["decoder"], got.z[MASKED], cells, queries[blocks[:, m]])
        d = np.abs(
            np.asarray(prediction, np.float64)
            - np.take_along_axis(target, blocks[:, m, :, None], 1)
        )
        costs.append(np.where(d < 1, d**2 / 2, d - 0.5))
    assert got.losses["loss/intra"] == pytest.approx(np.mean(costs), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__mask": "blockwise"}, "data.mask: 'blockwise' has no target blocks.*multi_block"),
        ({"data__mask_ratio": 0.5}, "data.mask_ratio: 0.5 hides 8 of 16 cells.*need 12"),
        ({"data__mask_cell": 16}, "data.mask_ratio: .*single patches"),
    ],
)
def test_masks_without_target_blocks_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        plan_of("ijepa", **{**SETTINGS, **changes})

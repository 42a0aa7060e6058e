"""What posteriors add up for their bits: nothing of rows that do not count, and candidates by their
number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax.objective import box_matching, posteriors
from m3i_jax.objective.prototype_targets import PrototypeSoftmax
from tests.objective.numeric import normal

WHERE = jnp.array([1.0, 0, 1, 1, 0])


@pytest.mark.parametrize(
    "posterior",
    [
        posteriors.Gaussian(),
        posteriors.SmoothL1(),
        posteriors.Cosine(),
        posteriors.SquaredError(),
        PrototypeSoftmax(),
    ],
    ids=lambda posterior: type(posterior).__name__,
)
def test_rows_that_do_not_count_may_be_nan(posterior):
    @jax.jit
    def cost(prediction, target, where):
        out = posterior.cost(prediction, target, where, posteriors.LossInputs())
        return out.sum, out.evidence

    prediction, target = normal(5, 4), np.abs(normal(5, 4, seed=1))
    keep = np.asarray(WHERE) > 0
    expected = cost(prediction[keep], target[keep], jnp.ones(3))
    prediction[1], target[4], target[1] = np.nan, np.nan, np.inf
    got = cost(prediction, target, WHERE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected)


@pytest.mark.parametrize("posterior", [posteriors.NTXent(), posteriors.TextSoftmax()])
def test_bits_do_not_depend_on_the_size_of_weights(posterior):
    a, b = normal(5, 4), normal(5, 4, seed=1)
    given = posteriors.LossInputs(parameters=jnp.zeros(()))

    @jax.jit
    def bits(where):
        out = posterior.cost(a, b, where, given)
        return posterior.bits(out.evidence, out.count)

    np.testing.assert_allclose(bits(2 * WHERE), bits(WHERE), rtol=1e-5)


def test_boxes_that_are_no_pair_may_be_nan():
    pairs, where = np.full((2, 4), 0.5, np.float32), jnp.array([1.0, 0])
    pairs[1] = np.nan
    run = jax.jit(jax.value_and_grad(lambda b: sum(box_matching.box_pair_losses(b, pairs, where))))
    value, grad = run(pairs + 0.1)
    assert np.isfinite(value) and np.isfinite(grad).all() and not np.asarray(grad)[1].any()

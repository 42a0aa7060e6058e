"""A loss from outside the package: a class, a line that registers it, and this test of it. No file
of the package knows it."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import config as configuration
from m3i_jax import parallel
from m3i_jax.objective import posteriors, registry
from m3i_jax.objective import terms as objective_terms
from m3i_jax.training import plan, targets, trainer
from tests import toy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Huber(posteriors.Regression):
    """Squared error up to an error of `delta`, then linear; the mean over the width."""

    delta: float = 1.0

    def cost(
        self, prediction: Any, target: Any, where: Any, given: posteriors.LossInputs
    ) -> posteriors.LossSum:
        error = jnp.abs(prediction.astype(jnp.float32) - target)
        small = jnp.minimum(error, self.delta)
        cost = (small * (error - small / 2)).mean(-1)
        return posteriors.LossSum(
            (where * cost).sum(), where.sum(), posteriors.moments(prediction, target, where)
        )


def test_a_loss_of_ones_own_trains_a_step() -> None:
    """Beside categories and the squared error, of which a Huber loss that never turns linear is
    half."""
    target = functools.partial(objective_terms.token_term, objective_terms.MASKED, 0)
    terms = (
        target(posterior=posteriors.Gaussian(), name="squares"),
        target(posterior=Huber(delta=1e6), name="wide"),
    )
    registry.register_form("huber", (*terms, target(posterior=Huber(delta=0.5), name="huber")))
    config = toy.settings(objective__forms="huber,supervised", model__encoder__depth=1)
    one = trainer.Trainer(config, parallel.make_mesh((1, 1, 1), jax.devices()[:1]), toy.VOCABULARY)
    before = one.init()
    weights = jax.device_get(before.params)
    after, metrics = one.step(before, toy.batch(config))
    got = {name: float(value) for name, value in metrics.items() if value.ndim == 0}
    np.testing.assert_allclose(got["loss/wide"], got["loss/squares"] / 2, rtol=1e-5)
    np.testing.assert_allclose(got["info/wide"], got["info/squares"], rtol=1e-5)
    assert 0 < got["loss/huber"] < got["loss/wide"] and got["loss/category"] > 0
    np.testing.assert_allclose(
        got["loss/ssp"], (got["loss/squares"] + got["loss/wide"] + got["loss/huber"]) / 3, rtol=1e-5
    )
    after, _ = one.step(after, toy.batch(config))  # the warm-up begins with a rate of 0
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), weights, jax.device_get(after.params))
    assert all(max(jax.tree.leaves(moved[part])) > 0 for part in ("encoder", "decoder"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RawPixels(posteriors.Gaussian):
    """Compares pixels as they are."""

    def prepare_pixels(self, target: Any) -> Any:
        return target.astype(jnp.float32)


def test_an_own_posterior_prepares_pixels_and_features() -> None:
    """By default pixels are normalised by patch (unbiased variance), features by layer norm."""
    values = np.random.default_rng(0).normal(3, 2, (2, 4, 12)).astype(np.float32)
    masked = objective_terms.MASKED
    one = objective_terms.pixel_term(masked, 0, posterior=RawPixels())
    np.testing.assert_array_equal(targets.normalize_target(one, jnp.asarray(values)), values)
    usual = dataclasses.replace(one, posterior=Huber())
    got = np.asarray(targets.normalize_target(usual, jnp.asarray(values)))
    np.testing.assert_allclose(got.std(-1, ddof=1), 1, rtol=1e-5)
    features = objective_terms.token_term(masked, 0, posterior=RawPixels())
    got = np.asarray(targets.normalize_target(features, jnp.asarray(values)))
    np.testing.assert_allclose(got.std(-1), 1, rtol=1e-4)


def test_a_configuration_file_registers_it(tmp_path: pathlib.Path) -> None:
    """As a user writes one: the form is known as soon as the file is read."""
    (tmp_path / "mine.py").write_text(
        "from m3i_jax import register_form\n"
        "from m3i_jax.config import default_config\n"
        "from m3i_jax.objective import terms\n"
        "register_form('my_form', (terms.token_term(terms.FULL, 1, weight=2.0),))\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.objective.forms = ('my_form',)\n"
        "    return config\n"
    )
    config = configuration.resolve(configuration.load_config(str(tmp_path / "mine.py")))
    assert [term.weight for term in plan.terms_named(config.objective.forms[0])] == [2.0]

"""Entropy estimators against their formulas in numpy (float64), numerical gradients, weights, and
laws of known entropy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.special import ive

from m3i_jax.objective import entropy, entropy_terms
from tests.objective import entropy_reference as reference
from tests.objective.numeric import mean, normal

KEY = jax.random.key(3)
# name: (function of features and weights, its reference in numpy)
ESTIMATORS = {
    "koleo": (entropy.koleo, reference.koleo),
    "variance_covariance": (entropy.variance_covariance, reference.variance_covariance),
    "sigreg": (
        lambda x, where=None: entropy.sigreg(x, where, key=KEY, slices=8),
        lambda x: reference.sigreg(x, directions(x.shape[1], 8)),
    ),
    "uniformity": (entropy.uniformity_loss, reference.uniformity),
    "coding_rate": (entropy.coding_rate, reference.coding_rate),
    "scaled coding_rate": (
        lambda x, where=None: entropy.coding_rate(x, where, eps=0.05, scaled=True),
        lambda x: reference.coding_rate(x, eps=0.05, scaled=True),
    ),
    "moment_energy": (entropy.moment_energy, reference.moment_energy),
}
COMPILED = {name: jax.jit(function) for name, (function, _) in ESTIMATORS.items()}
GRADIENTS = {
    name: jax.jit(jax.value_and_grad(lambda x, where, f=function: mean(f(x, where))))
    for name, (function, _) in ESTIMATORS.items()
}


def directions(width, slices):
    drawn = np.asarray(jax.random.normal(KEY, (width, slices)), np.float64)
    return drawn / np.linalg.norm(drawn, axis=0)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("shape", [(7, 4), (4, 7)], ids=["rows", "wide"])
def test_values_and_gradients_are_those_of_numpy(name, shape):
    """More rows than columns and fewer: the products of the two differ."""
    x = 0.7 * normal(*shape, seed=5)
    value, grad = GRADIENTS[name](x, np.ones(len(x), np.float32))
    f, exact = ESTIMATORS[name][1], x.astype(np.float64)
    np.testing.assert_allclose(value, f(exact), rtol=2e-5)
    (expected,) = reference.gradient(f, exact)
    if name == "moment_energy":  # its moment is a constant
        expected = expected / 2
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(grad, expected, rtol=2e-3, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_rows_of_weight_0_are_ignored(name):
    x, where = normal(6, 4), np.array([1, 0, 1, 1, 0, 1], np.float32)
    alone = x[where > 0]
    expected, kept = GRADIENTS[name](alone, np.ones(4, np.float32))
    x[1], x[4] = np.nan, np.inf
    value, grad = GRADIENTS[name](x, where)
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    np.testing.assert_allclose(grad[where > 0], kept, rtol=1e-3, atol=1e-5)
    assert not np.asarray(grad)[where == 0].any()
    total, count = COMPILED[name](x, np.zeros(6, np.float32))
    assert (float(total), float(count)) == (0, 0)
    assert all(v.dtype == jnp.float32 for v in COMPILED[name](jnp.asarray(alone, jnp.bfloat16)))


@pytest.mark.parametrize("name", ["variance_covariance", "sigreg"])
def test_only_ratios_of_weights_matter(name):
    """Weights that sum to 1 make neither a variance of billions nor a statistic of one row."""
    x = normal(10, 4, seed=2)
    expected = ESTIMATORS[name][1](x.astype(np.float64))
    for weight in (0.1, 1 / 7, 3.0):
        value, _ = GRADIENTS[name](x, np.full(10, weight, np.float32))
        np.testing.assert_allclose(value, expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["coding_rate", "scaled coding_rate", "moment_energy"])
def test_a_row_of_weight_3_is_three_rows(name):
    x, where = normal(6, 4, seed=3), np.array([2, 1, 3, 1, 1, 1])
    value, _ = GRADIENTS[name](x, where.astype(np.float32))
    expected = ESTIMATORS[name][1](np.repeat(x.astype(np.float64), where, 0))
    np.testing.assert_allclose(value, expected, rtol=1e-4)


def test_koleo_sums_weighted_costs():
    x, where = normal(6, 4, seed=3), np.array([2, 1, 0.5, 1, 3, 1], np.float32)
    u = x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True)
    distance = np.linalg.norm(u[:, None] - u, axis=-1) + 9 * np.eye(6)
    expected = [-(where * np.log(distance.min(1))).sum(), where.sum()]
    np.testing.assert_allclose(COMPILED["koleo"](x, where), expected, rtol=1e-4)


def test_covariances_of_weighted_rows_are_those_of_numpy():
    x, where = normal(10, 4, seed=2), np.linspace(0.1, 2, 10).astype(np.float32)
    c = np.cov(x.T.astype(np.float64), aweights=where)
    off = (c**2).sum() - (np.diag(c) ** 2).sum()
    total, count = entropy.variance_covariance(x, where, variance=0.0, covariance=1.0)
    np.testing.assert_allclose(total / count, off / 4, rtol=1e-4)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_no_row_at_all_is_no_loss(name):
    assert [float(v) for v in COMPILED[name](np.zeros((0, 4), np.float32))] == [0, 0]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_equal_and_zero_rows_have_finite_gradients(name):
    for rows in (np.zeros((6, 4), np.float32), np.ones((6, 4), np.float32)):
        value, grad = GRADIENTS[name](rows, np.ones(6, np.float32))
        assert np.isfinite(value) and np.isfinite(grad).all()


@pytest.mark.parametrize("name", ["koleo", "coding_rate"])
def test_groups_are_the_mean_of_their_rows_alone(name):
    """What a device sees in the public code: the value differs from that of all rows."""
    function, x = jax.jit(getattr(entropy, name), static_argnames="group"), normal(8, 4)
    total, count = function(x, group=4)
    parts = [mean(function(part)) for part in (x[:4], x[4:])]
    np.testing.assert_allclose(total / count, np.mean(parts), rtol=1e-5)
    assert count == 8 and abs(float(mean(function(x)) - total / count)) > 0.05
    with pytest.raises(ValueError, match="8 rows do not divide into groups of 3"):
        function(x, group=3)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_eight_devices_are_one(name):
    """Rows that are split over devices have the statistics of the global batch, and its gradient;
    groups of the rows of one device move nothing."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:8])
    rows = NamedSharding(mesh, PartitionSpec("data"))
    x, where = normal(16, 4, seed=7), (np.arange(16) % 5 != 2).astype(np.float32)
    split = [jax.device_put(a, rows) for a in (x, where)]
    assert len(split[0].sharding.device_set) == 8
    one, eight = GRADIENTS[name](x, where), GRADIENTS[name](*split)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), eight, one)
    if name not in ("koleo", "coding_rate"):
        return
    function = getattr(entropy, name)
    grouped = jax.jit(jax.grad(lambda x: function(x, group=2)[0]))
    text = grouped.lower(split[0]).compile().as_text()
    moved = [w for w in ("all-reduce", "all-gather", "all-to-all", "permute") if w in text]
    assert not moved


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
        entropy.koleo(np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match=r"\(2,\).*\(3\)"):
        entropy.coding_rate(np.zeros((3, 4)), np.zeros(2))
    with pytest.raises(ValueError, match="group is -1"):
        entropy.koleo(np.zeros((3, 4)), group=-1)
    with pytest.raises(ValueError, match=r"\(4, 4\).*\(3, 3\)"):
        entropy.moment_energy(np.zeros((3, 3)), moment_DxD=np.zeros((4, 4)))


# --- laws of known entropy
def sphere(rows, width, seed=0):
    return reference.unit(normal(rows, width, seed=seed))


def bits(estimator, x):
    cost = jax.jit(estimator.cost)(x, jnp.ones(len(x)), KEY)
    return float(estimator.bits(cost.evidence, cost.count))


def test_koleo_is_the_entropy_of_the_uniform_sphere():
    """0 bits below the uniform law; a cap of half of the sphere has 1 bit less."""
    x = sphere(2000, 4)
    whole = bits(entropy_terms.Koleo(), x)
    assert abs(whole) < 0.1
    half = x * np.where(x[:, :1] < 0, -1, 1) * [1, 1, 1, 1]
    assert bits(entropy_terms.Koleo(), half.astype(np.float32)) == pytest.approx(whole - 1, abs=0.1)
    nats = jax.jit(lambda x: entropy.nearest_entropy(mean(entropy.koleo(x)), 2000.0, 4))(x)
    assert float(nats) == pytest.approx(math.log(2 * math.pi**2), abs=0.07)  # area of S^3


def test_variance_covariance_is_the_entropy_of_a_gaussian_near_unit_covariance():
    covariance = np.array([[1.2, 0.2, 0], [0.2, 0.9, 0.1], [0, 0.1, 1.0]])
    x = (normal(20000, 3) @ np.linalg.cholesky(covariance).T).astype(np.float32)
    exact = 0.5 * np.linalg.slogdet(covariance)[1] / math.log(2)
    assert bits(entropy_terms.VarianceCovariance(), x) == pytest.approx(exact, abs=0.02)
    known = scipy.stats.multivariate_normal(cov=covariance).entropy()  # nats
    assert exact * math.log(2) + 1.5 * math.log(2 * math.pi * math.e) == pytest.approx(known)
    # the covariance part is -4 / D of the entropy, per unit of its weight
    c = np.cov(x.T)
    off = (c**2).sum() - (np.diag(c) ** 2).sum()
    part = jax.jit(lambda x: mean(entropy.variance_covariance(x, variance=0.0, covariance=1.0)))(x)
    np.testing.assert_allclose(part, off / 3, rtol=1e-4)


def test_sigreg_of_normal_features_is_its_floor():
    """Whatever their number; a law of another variance is far above."""
    run = jax.jit(lambda x, key: mean(entropy.sigreg(x, key=key, slices=64)))
    for rows in (64, 512):
        draws = [run(normal(rows, 8, seed=k), jax.random.key(k)) for k in range(12)]
        assert np.mean(draws) == pytest.approx(entropy.SIGREG_FLOOR, abs=0.15)
    wide = run(3 * normal(512, 8), KEY)
    assert wide > 30
    assert entropy_terms.Sigreg().bits({}, jnp.ones(())) is None


@pytest.mark.parametrize("width", [4, 8])
def test_uniformity_is_the_renyi_entropy_of_the_uniform_sphere(width):
    """E exp(-2 |u - v|^2) over the uniform sphere, by a Bessel function."""
    kappa, order = 4.0, width / 2 - 1
    kernel = math.gamma(width / 2) * (2 / kappa) ** order * ive(order, kappa)
    value = -bits(entropy_terms.Uniformity(), sphere(1500, width)) * math.log(2)
    assert value == pytest.approx(math.log(kernel), abs=0.02)
    assert value == pytest.approx({4: -2.41, 8: -3.08}[width], abs=0.03)


def test_uniformity_is_that_of_a_density_of_gaussians():
    """The Renyi entropy of order 2 of Gaussians of variance 1 / (4 t) around points of a circle, by
    its integral over the plane. The integral has the pairs of a point with itself, too."""
    t, x = 2.0, sphere(40, 2)
    axis = np.linspace(-3, 3, 301)
    plane = np.stack(np.meshgrid(axis, axis), -1)
    square = ((plane[..., None, :] - x) ** 2).sum(-1)
    density = (2 * t / math.pi * np.exp(-2 * t * square)).mean(-1)
    renyi = -math.log((density**2).sum() * (axis[1] - axis[0]) ** 2)
    pairs = math.exp(mean(entropy.uniformity_loss(x, t=t)))
    value = -math.log((39 * pairs + 1) / 40) + math.log(math.pi / t)
    assert value == pytest.approx(renyi, rel=1e-4)


def test_coding_rate_is_the_information_of_gaussian_features_with_noise():
    """Unit vectors of a uniform sphere have the second moment 1 / D, as its largest value; of a
    Gaussian that is concentrated on some axes, that of its normalised covariance."""
    x, eps = sphere(20000, 4), 0.5
    largest = 0.5 * 4 * math.log2(1 + 1 / eps)
    assert bits(entropy_terms.CodingRate(eps=eps), x) == pytest.approx(largest, abs=0.01)
    flat = reference.unit(normal(20000, 4) * [1, 1, 0, 0]).astype(np.float32)
    assert bits(entropy_terms.CodingRate(eps=eps), flat) == pytest.approx(
        0.5 * 2 * math.log2(1 + 2 / eps), abs=0.01
    )
    z = reference.unit(normal(50, 4)).astype(np.float64)
    noisy = scipy.stats.multivariate_normal(cov=z.T @ z / 50 + eps / 4 * np.eye(4)).entropy()
    rate = bits(entropy_terms.CodingRate(eps=eps), z.astype(np.float32)) * math.log(2)
    assert rate + 2 * math.log(2 * math.pi * math.e * eps / 4) == pytest.approx(noisy, rel=1e-4)
    scaled = entropy_terms.CodingRate(eps=eps, scaled=True)
    assert bits(scaled, x) == pytest.approx(largest, abs=0.01)  # the factor is no information


def test_moment_energy_counts_directions():
    """log2 of the number of directions among which layer-normalised Gaussian features are spread;
    and it is the second-moment term of the dense posterior."""
    from m3i_jax.objective import losses

    assert bits(entropy_terms.MomentEnergy(), normal(20000, 9)) == pytest.approx(3, abs=0.01)
    p, c = normal(6, 4), losses.second_moment(normal(9, 4, seed=1))
    both = losses.gaussian(p, p, second_moment=0.3, moment_DxD=c)
    alone = entropy.moment_energy(p, moment_DxD=c)
    np.testing.assert_allclose(both[0], 0.3 * alone[0], rtol=1e-5)


def test_moment_energy_of_rows_that_do_not_count_and_of_equal_numbers():
    estimator, where = entropy_terms.MomentEnergy(), np.array([1, 0, 1], np.float32)
    x = normal(3, 4)
    x[1] = np.nan
    grad = jax.jit(jax.grad(lambda x: estimator.cost(x, where, KEY).sum))(x)
    assert np.isfinite(grad).all() and grad[0].any() and not np.asarray(grad)[1].any()
    assert bits(estimator, np.ones((3, 4), np.float32)) == 0

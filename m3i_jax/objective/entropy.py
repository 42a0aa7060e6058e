"""Estimators of H(z_y), the regularization term of Eq. 2, as losses: what keeps representations
spread out where no negatives and no frozen target do.

    I(z_x; z_y) = H(z_y) - H(z_y | z_x)        M3I section 3.1, Eqs. 1 and 2

Every function returns `(sum, count)`, two float32 scalars, of a loss that falls as the entropy
rises; divide once. All but `moment_energy` are statistics of the rows that they are given: parts of
a batch do not add up to the whole. On global arrays under `jit` they see the global batch with its
full gradient, whatever the sharding over axes of type `AxisType.Auto`, which is not the default of
`jax.make_mesh`; public implementations differ in what a device sees, and each docstring says how.
Rows of weight 0 are ignored in values and gradients, even if NaN.

T rows (images or tokens), D width, S directions, G groups of M rows that see each other.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from m3i_jax.objective.manual_axes import vary_like
from m3i_jax.objective.numerics import (
    ABSENT,
    EXACT,
    assert_rank,
    assert_shape,
    float32,
    l2_normalize,
    weighted_sum,
    zero_masked_rows,
)

# E[T] of `sigreg` for standard normal features with 17 knots up to 3, whatever their number.
SIGREG_FLOOR = 1.0525


def koleo(
    features_TxD: ArrayLike, where_T: ArrayLike | None = None, *, group: int = 0, eps: float = 1e-8
) -> tuple[jax.Array, jax.Array]:
    """Computes the Kozachenko-Leonenko estimator of the differential entropy on the unit sphere:
    minus the logarithm of the distance to the nearest other row (KoLeo of DINOv2).

    `H = -(D - 1) L + log(n - 1) + log V + 0.5772` nats with L the mean cost, n the rows of a group
    and V the volume of the unit ball of D - 1 dimensions: a consistent estimate, too high in many
    dimensions for small n. Nearest neighbours of more rows are closer, so L depends on n.

    DINOv2 searches neighbours among the rows of one device and one crop (12 to 64); here among
    all rows of the batch, or in groups of `group`. Both ends of a distance receive gradients, the
    choice of the neighbour none.

    Args:
      features_TxD: features of any length; they are scaled to length 1.
      where_T: weight of a row, bool or float >= 0; one of weight 0 is no neighbour, either. None
        counts every row once.
      group: neighbouring rows that see each other; 0, or more than there are: all.
      eps: added to every coordinate of a difference and to the distance, so that equal rows have a
        large and finite cost.

    Returns:
      (sum over rows of weight * cost in nats, sum of weights), float32 scalars. A row without any
      other costs 0.

    Raises:
      ValueError: shapes that do not belong together, or groups that do not divide the rows.

    >>> import jax.numpy as jnp
    >>> total, count = koleo(jnp.array([[2., 0.], [0., 1.]]))
    >>> print(f"{total / count:.4f}")  # -log sqrt 2
    -0.3466
    """
    x_TxD, weight_T = _rows(features_TxD, where_T)
    u_GxMxD, weight_GxM = _groups(l2_normalize(x_TxD), weight_T, group)
    exists_GxM, size = weight_GxM > 0, u_GxMxD.shape[1]
    fixed_GxMxD = jax.lax.stop_gradient(u_GxMxD)
    cosine_GxMxM = jnp.einsum("gmd,gnd->gmn", fixed_GxMxD, fixed_GxMxD, precision=EXACT)
    other_GxMxM = exists_GxM[:, None, :] & ~jnp.eye(size, dtype=bool)
    nearest_GxM = jnp.where(other_GxMxM, cosine_GxMxM, ABSENT).argmax(-1)
    neighbour_GxMxD = jnp.take_along_axis(u_GxMxD, nearest_GxM[..., None], axis=1)
    square_GxM = jnp.square(u_GxMxD - neighbour_GxMxD + eps).sum(-1)
    cost_GxM = -jnp.log(jnp.sqrt(jnp.where(square_GxM > 0, square_GxM, 1.0)) + eps)
    counts_GxM = jnp.where(other_GxMxM.any(-1), weight_GxM, 0.0)
    return weighted_sum(cost_GxM, counts_GxM), weight_T.sum()


def sphere_log_area(width: int) -> float:
    """Computes the logarithm of the area of the unit sphere in `width` dimensions: the largest
    differential entropy on it, in nats (a Python float).

    >>> print(f"{sphere_log_area(3):.4f}")  # log 4 pi
    2.5310
    """
    return math.log(2) + width / 2 * math.log(math.pi) - math.lgamma(width / 2)


def nearest_entropy(cost: ArrayLike, count: ArrayLike, width: int) -> jax.Array:
    """Computes the differential entropy on the unit sphere from the mean cost of `koleo`, in nats,
    a float32 scalar. In many dimensions it is too high, above that of the uniform law.

    Args:
      cost: mean of a row, L.
      count: rows of a group, n.
      width: D.

    >>> print(f"{nearest_entropy(0.0, 2.0, 3):.4f}")  # log pi + 0.5772
    1.7219
    """
    m = width - 1
    log_ball = m / 2 * math.log(math.pi) - math.lgamma(m / 2 + 1)
    others = jnp.maximum(float32(count) - 1, 1.0)
    return -m * float32(cost) + jnp.log(others) + log_ball + 0.5772156649015329


def variance_covariance(
    features_TxD: ArrayLike,
    where_T: ArrayLike | None = None,
    *,
    variance: float = 25.0,
    covariance: float = 2.0,
    eps: float = 1e-4,
) -> tuple[jax.Array, jax.Array]:
    """Computes the variance and covariance terms of VICReg: `variance * mean_d relu(1 - sqrt(C_dd +
    eps)) + covariance / D * sum_{d != e} C_de^2`, C the unbiased covariance of the rows.

    A second-order surrogate of the entropy of a Gaussian at unit variances, `H = D / 2 log(2 pi e)
    + 1/2 log det C`: there `1/2 log det C = 1/2 sum_d log C_dd - 1/4 sum_{d != e} C_de^2` up to
    third order, so that the covariance part is `-4 covariance / D` times the entropy.

    VICReg gathers the features of all devices and divides by the global batch; so do we. Its code
    halves the variance part of each of two views and not the covariance part, so the mean over the
    views has weights 25 and 2.

    Args:
      features_TxD: features.
      where_T: weight of a row, bool or float >= 0, in all moments; None counts every row once. Only
        their ratios matter: C is numpy's `cov(aweights=where_T)`.
      variance, covariance: weights of both parts.
      eps: added to the variances.

    Returns:
      (value * count, count) with count the sum of weights, float32 scalars. Dimensionless.

    Raises:
      ValueError: shapes that do not belong together.

    >>> import jax.numpy as jnp
    >>> z = jnp.array([[1., 1.], [1., -1.], [-1., 1.], [-1., -1.]])
    >>> total, count = variance_covariance(z, variance=1.0, covariance=1.0)
    >>> print(f"{total / count:.4f}")  # variances 4/3, covariance 0
    0.0000
    >>> total, count = variance_covariance(0 * z, variance=1.0, covariance=1.0)
    >>> print(f"{total / count:.4f}")
    0.9900
    """
    return variance_covariance_sums(
        features_TxD, where_T, variance=variance, covariance=covariance, eps=eps
    )[:2]


def variance_covariance_sums(
    features_TxD: ArrayLike,
    where_T: ArrayLike | None = None,
    *,
    variance: float = 25.0,
    covariance: float = 2.0,
    eps: float = 1e-4,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes `variance_covariance` and, from the same moments, half the log determinant of the
    covariance to second order at C = 1: the entropy of a Gaussian above that of a standard normal.

    Args, Raises:
      as of `variance_covariance`.

    Returns:
      (sum of the loss, sum of weights, entropy in nats, without gradient), float32 scalars.

    >>> import jax.numpy as jnp
    >>> z = jnp.sqrt(0.75) * jnp.array([[1., 1.], [1., -1.], [-1., 1.], [-1., -1.]])
    >>> print(abs(variance_covariance_sums(z)[2].round(4)))
    0.0
    """
    variance_D, squared, count = _moments(features_TxD, where_T)
    hinge = jax.nn.relu(1 - jnp.sqrt(variance_D + eps)).mean()
    value = variance * hinge + covariance * squared / variance_D.shape[0]
    smallest = np.finfo(np.float32).tiny
    nats = jnp.log(jnp.maximum(variance_D, smallest)).sum() / 2 - squared / 4
    return value * count, count, jax.lax.stop_gradient(nats)


def _moments(
    features_TxD: ArrayLike, where_T: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(C_dd [D], sum_{d != e} C_de^2, count)."""
    x_TxD, weight_T = _rows(features_TxD, where_T)
    count, (rows, width) = weight_T.sum(), x_TxD.shape
    share_T = _shares(weight_T)
    mean_D = (share_T[:, None] * x_TxD).sum(0)
    root_T = jnp.where(share_T > 0, jnp.sqrt(jnp.where(share_T > 0, share_T, 1.0)), 0.0)
    # (n - 1) / n of n rows of equal weight, whatever that is; a single row has no variance
    unbiased = 1 - jnp.square(share_T).sum()
    unbiased = jnp.where(unbiased > 1e-6, unbiased, 1.0)
    y_TxD = root_T[:, None] * (x_TxD - mean_D) * jax.lax.rsqrt(unbiased)
    variance_D = jnp.square(y_TxD).sum(0)
    # sum of the squares of Y'Y is that of YY': the smaller of the two is computed
    if rows < width:
        product = jnp.matmul(y_TxD, y_TxD.T, precision=EXACT)
        squared = jnp.square(product).sum() - jnp.square(variance_D).sum()
    else:
        product = jnp.matmul(y_TxD.T, y_TxD, precision=EXACT)
        squared = jnp.where(jnp.eye(width, dtype=bool), 0.0, jnp.square(product)).sum()
    return variance_D, squared, count


def sigreg(
    features_TxD: ArrayLike,
    where_T: ArrayLike | None = None,
    *,
    key: jax.Array,
    slices: int = 256,
    knots: int = 17,
    reach: float = 3.0,
) -> tuple[jax.Array, jax.Array]:
    """Computes the sketched isotropic Gaussian regularisation of LeJEPA: the Epps-Pulley statistic
    of normality, averaged over random one-dimensional projections.

    `T = n int_{-reach}^{reach} |phi(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt` with phi the empirical
    characteristic function of a projection, by the trapezoid rule. It estimates no entropy: it is
    the distance to the standard normal, which has the largest entropy at unit covariance, D / 2
    log(2 pi e). Its mean for standard normal features is 1.0525, not 0 (`SIGREG_FLOOR`), for
    constant features about 0.4 n.

    LeJEPA's code reduces the means over all devices; so do we. n is the global number of rows, so
    value and gradient grow with the batch; of rows of different weights, `sum(w)^2 / sum(w^2)`, as
    many rows of one weight as have the same error of phi.

    Args:
      features_TxD: features, not normalised.
      where_T: weight of a row, bool or float >= 0; None counts every row once.
      key: of the directions, new in every step and equal on all devices.
      slices: number of directions; 256 or 1024 as published.
      knots: points of the integral from 0 to `reach`.
      reach: largest t; 3 in the code, 5 in the paper.

    Returns:
      (value * count, count) with count the sum of weights, float32 scalars. Dimensionless.

    Raises:
      ValueError: shapes that do not belong together.

    >>> import jax
    >>> z = jax.random.normal(jax.random.key(0), (512, 8))
    >>> total, count = sigreg(z, key=jax.random.key(1))
    >>> print(0.5 < total / count < 2)
    True
    >>> print(round(float(sigreg(0 * z, key=jax.random.key(1))[0] / 512**2), 3))
    0.402
    """
    x_TxD, weight_T = _rows(features_TxD, where_T)
    count, share_Tx1 = weight_T.sum(), _shares(weight_T)[:, None]
    square = jnp.square(share_Tx1).sum()
    rows = jnp.where(square > 0, 1 / jnp.where(square > 0, square, 1.0), 0.0)
    directions_DxS = jax.random.normal(key, (x_TxD.shape[1], slices), jnp.float32)
    directions_DxS /= jnp.linalg.norm(directions_DxS, axis=0)
    x_TxS = jnp.matmul(x_TxD, directions_DxS, precision=EXACT)
    step = reach / (knots - 1)
    t_K = step * jnp.arange(knots).astype(jnp.float32)
    weights_K = jnp.where((t_K == 0) | (jnp.arange(knots) == knots - 1), step, 2 * step)

    # one knot in memory at a time, in the backward pass, too
    @jax.checkpoint
    def distance(x_TxS: jax.Array, t: jax.Array) -> jax.Array:
        real_S = (share_Tx1 * jnp.cos(t * x_TxS)).sum(0) - jnp.exp(-jnp.square(t) / 2)
        imaginary_S = (share_Tx1 * jnp.sin(t * x_TxS)).sum(0)
        return (jnp.square(real_S) + jnp.square(imaginary_S)).mean() * jnp.exp(-jnp.square(t) / 2)

    def add(total: jax.Array, knot: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        t, weight = knot
        return total + weight * distance(x_TxS, t), None

    start = vary_like(jnp.zeros((), jnp.float32), (x_TxS, share_Tx1))
    total, _ = jax.lax.scan(add, start, (t_K, weights_K))
    return total * rows * count, count


def uniformity_loss(
    features_TxD: ArrayLike, where_T: ArrayLike | None = None, *, t: float = 2.0
) -> tuple[jax.Array, jax.Array]:
    """Computes uniformity of Wang and Isola: `log mean exp(-t |u - v|^2)` over all pairs of
    different rows on the unit sphere.

    Minus the Renyi entropy of order 2 of a kernel density estimate with Gaussians of variance
    1 / (4 t): `H_2 = -U + D / 2 log(pi / t)` nats. 0 if all rows are equal; -4 is the limit for
    rows spread over a sphere of many dimensions at t = 2.

    The public code sees the pairs of one device (DataParallel gathers them all); here all pairs of
    the batch. `collapse.uniformity` is the same value as a monitor.

    Args:
      features_TxD: features of any length; they are scaled to length 1.
      where_T: weights >= 0 of the rows, a pair weighs their product; None counts every row once.
      t: inverse width > 0 of the kernel; 2 as published.

    Returns:
      (value * count, count) with count the sum of weights, float32 scalars; the value is 0 if fewer
      than two rows count.

    Raises:
      ValueError: shapes that do not belong together.

    >>> import jax.numpy as jnp
    >>> total, count = uniformity_loss(jnp.array([[1., 0.], [-3., 0.]]))
    >>> print(total / count)
    -8.0
    """
    x_TxD, weight_T = _rows(features_TxD, where_T)
    u_TxD = l2_normalize(x_TxD)
    square_T = jnp.square(u_TxD).sum(-1)
    # Rounding would make the distance of equal rows negative and the value at collapse positive.
    distance_TxT = jnp.maximum(
        square_T[:, None] + square_T - 2 * jnp.matmul(u_TxD, u_TxD.T, precision=EXACT), 0.0
    )
    pair_TxT = jnp.where(jnp.eye(len(square_T), dtype=bool), 0.0, weight_T[:, None] * weight_T)
    total, count = pair_TxT.sum(), weight_T.sum()
    log_sum = jax.nn.logsumexp(-t * distance_TxT, b=jnp.where(total > 0, pair_TxT, 1.0))
    value = jnp.where(total > 0, log_sum - jnp.log(jnp.where(total > 0, total, 1.0)), 0.0)
    return value * count, count


def coding_rate(
    features_TxD: ArrayLike,
    where_T: ArrayLike | None = None,
    *,
    eps: float = 0.5,
    group: int = 0,
    scaled: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Computes minus the coding rate of MCR2, as SimDINO computes it: `R = 1/2 log det(1 + D / (m
    eps) Z'Z)` of m unit vectors.

    The information I(z; z + n) of Gaussian features with noise n of variance eps / D, an upper
    bound for others: `H(z + n) = R + D / 2 log(2 pi e eps / D)` nats. The moment is not centred. R
    is at most `D / 2 log(1 + 1 / eps)`, and with m < D at most `m / 2 log(1 + D / (m eps))`.

    SimDINO sees the rows of one device by default, with m the global batch; here all rows of the
    batch, or groups of `group` with m the rows of a group. Its code has eps where the papers have
    eps^2.

    Args:
      features_TxD: features of any length; they are scaled to length 1.
      where_T: weight of a row, bool or float >= 0, in the moment and in m; None counts every row
        once.
      eps: distortion > 0; SimDINO's code has 0.5, its published runs 0.05.
      group: neighbouring rows that form one moment; 0, or more than there are: all.
      scaled: multiply R by (D + m) / (D m), SimDINO's weight of its expansion.

    Returns:
      (minus the sum over groups of R * weights, sum of weights), float32 scalars; nats a group.

    Raises:
      ValueError: shapes that do not belong together, or groups that do not divide the rows.

    >>> import jax.numpy as jnp
    >>> total, count = coding_rate(jnp.eye(4), eps=1.0)  # 4 / 2 log 2
    >>> print(f"{total / count:.4f}")
    -1.3863
    """
    x_TxD, weight_T = _rows(features_TxD, where_T)
    u_GxMxD, weight_GxM = _groups(l2_normalize(x_TxD), weight_T, group)
    rows, width = u_GxMxD.shape[1:]
    count_G = weight_GxM.sum(1)
    scale_G = width / eps / jnp.where(count_G > 0, count_G, 1.0)
    counted_GxM = weight_GxM > 0
    root_GxM = jnp.where(counted_GxM, jnp.sqrt(jnp.where(counted_GxM, weight_GxM, 1.0)), 0.0)
    y_GxMxD = root_GxM[..., None] * u_GxMxD * jnp.sqrt(scale_G)[:, None, None]
    # det(1 + Y'Y) = det(1 + YY'): the smaller of the two is factored
    product = "gmd,gnd->gmn" if rows < width else "gmd,gme->gde"
    moment_GxKxK = jnp.einsum(product, y_GxMxD, y_GxMxD, precision=EXACT)
    factor_GxKxK = jnp.linalg.cholesky(jnp.eye(min(rows, width), dtype=jnp.float32) + moment_GxKxK)
    rate_G = jnp.log(jnp.diagonal(factor_GxKxK, axis1=1, axis2=2)).sum(1)
    if scaled:
        rate_G *= (width + count_G) / (width * jnp.where(count_G > 0, count_G, 1.0))
    return -(count_G * rate_G).sum(), weight_T.sum()


def moment_energy(
    features_TxD: ArrayLike,
    where_T: ArrayLike | None = None,
    *,
    moment_DxD: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes the energy of the rows in a second moment, `z' C z / D`. With C the moment of the
    targets (`losses.second_moment`) it is SiameseIM's anti-collapse term, which
    `losses.gaussian(..., second_moment=w)` adds with weight w.

    With C the moment of the rows themselves, their mean energy is tr(C^2) / D, and tr(C^2) the mean
    squared product of two rows. tr(C^2) / tr(C)^2 is exp(-H_2), with H_2 the Renyi entropy of order
    2 of the spectrum of C: 0 if all rows lie in one direction, at most log D. C has no gradient, so
    the gradient is half of that of tr(C^2) / D.

    SiameseIM reduces C over all devices; so does this function on global arrays.

    Args:
      features_TxD: features; `layer_normalize` them as SiameseIM does, or the energy can shrink
        with their length.
      where_T: weight of a row, bool or float >= 0; None counts every row once.
      moment_DxD: C; None: of the counted rows.

    Returns:
      (sum over rows of weight * energy, sum of weights), float32 scalars.

    Raises:
      ValueError: shapes that do not belong together.

    >>> import jax.numpy as jnp
    >>> total, count = moment_energy(jnp.eye(4))  # C = 1 / 4, D = 4
    >>> print(total / count)
    0.0625
    """
    x_TxD, weight_T = _rows(features_TxD, where_T)
    width, count = x_TxD.shape[1], weight_T.sum()
    if moment_DxD is None:
        root_Tx1 = (weight_T / jnp.where(count > 0, count, 1.0))[:, None]
        c_DxD = jnp.matmul((root_Tx1 * x_TxD).T, x_TxD, precision=EXACT)
    else:
        c_DxD = float32(moment_DxD)
        assert_shape(c_DxD, (width, width), custom_message="moment_DxD must be [D, D]")
    energy_T = (x_TxD * jnp.matmul(x_TxD, jax.lax.stop_gradient(c_DxD), precision=EXACT)).sum(-1)
    return weighted_sum(energy_T, weight_T) / width, count


def _rows(features_TxD: ArrayLike, where_T: ArrayLike | None) -> tuple[jax.Array, jax.Array]:
    """(float32 rows, 0 where they do not count; their weights)."""
    x_TxD = float32(features_TxD)
    assert_rank(x_TxD, 2, custom_message="features must be [T, D]")
    x_TxD, _, weight_T = zero_masked_rows(x_TxD, x_TxD, where_T)
    return x_TxD, weight_T


def _shares(weight_T: jax.Array) -> jax.Array:
    """Weights over their sum; 0 where no row counts."""
    total = weight_T.sum()
    return weight_T / jnp.where(total > 0, total, 1.0)


def _groups(x_TxD: jax.Array, weight_T: jax.Array, group: int) -> tuple[jax.Array, jax.Array]:
    rows, width = x_TxD.shape
    if group < 0:
        raise ValueError(f"group is {group}; give the rows that see each other, or 0 for all")
    size = max(min(group or rows, rows), 1)
    if rows % size:
        raise ValueError(f"{rows} rows do not divide into groups of {size}")
    return x_TxD.reshape(rows // size, size, width), weight_T.reshape(rows // size, size)

"""One call of each public loss, of rows and of a parameter that all rows share."""

import jax
import jax.numpy as jnp
import numpy as np

import m3i_jax
from tests.objective.numeric import normal

X, Y, TOKENS = normal(32, 4), normal(32, 4, seed=1), normal(16, 3, 4, seed=2)
W = np.abs(normal(4, 4, seed=3))
LABEL = np.arange(32) % 4


def total(name, *more, **options):
    """The sum of a loss of the rows that a device has, scaled by a parameter that all share."""
    return lambda rows, w: getattr(m3i_jax, name)(*(r @ w for r in rows), *more, **options)[0]


# name: function of rows and a shared parameter, rows, the parameter
LOSSES = {
    "gaussian": (total("gaussian", second_moment=0.1), (X, Y), W),
    "boltzmann": (
        lambda rows, w: m3i_jax.boltzmann(rows[0] @ w, w, rows[1], temperature=0.2)[0],
        (X, LABEL),
        W,
    ),
    "category": (lambda rows, w: m3i_jax.category(rows[0] @ w, rows[1])[0], (X, LABEL), W),
    "text": (lambda rows, s: m3i_jax.text(*rows, s)[0], (X, Y), np.float32(1)),
    "text in chunks": (lambda rows, s: m3i_jax.text(*rows, s, chunk=3)[0], (X, Y), np.float32(1)),
    "text_sigmoid": (
        lambda rows, s: m3i_jax.text_sigmoid(*rows, s[0], s[1])[0],
        (X, Y),
        np.float32([1, -2]),
    ),
    "text_sigmoid in chunks": (
        lambda rows, s: m3i_jax.text_sigmoid(*rows, s[0], s[1], chunk=3)[0],
        (X, Y),
        np.float32([1, -2]),
    ),
    "smooth_l1": (total("smooth_l1"), (X, Y), W),
    "cosine": (total("cosine"), (X, Y), W),
    "squared_error": (total("squared_error"), (X, Y), W),
    "token_similarity": (total("token_similarity"), (TOKENS, TOKENS + 1), W),
    "caption": (
        lambda rows, w: m3i_jax.caption(rows[0] @ w, rows[1])[0],
        (TOKENS, np.zeros((16, 3), int)),
        W,
    ),
    "koleo": (total("koleo"), (X,), W),
    "variance_covariance": (total("variance_covariance"), (X,), W),
    "sigreg": (
        lambda rows, w: m3i_jax.sigreg(rows[0] @ w, key=jax.random.key(0), slices=4, knots=3)[0],
        (X,),
        W,
    ),
    "coding_rate": (total("coding_rate"), (X,), W),
    "uniformity_loss": (total("uniformity_loss"), (X,), W),
    "moment_energy": (total("moment_energy"), (X,), W),
    "nt_xent": (total("nt_xent", temperature=0.5), (X, Y), W),
    "barlow_twins": (total("barlow_twins"), (X, Y), W),
    "soft_cross_entropy": (
        lambda rows, w: m3i_jax.soft_cross_entropy(
            rows[0] @ w, m3i_jax.sinkhorn(rows[1], temperature=0.5), temperature=0.5
        )[0],
        (X, Y),
        W,
    ),
    "unmix": (
        lambda rows, w: jnp.sin(m3i_jax.unmix(rows[0] @ w, rows[1], 1)[0]).sum(),
        (TOKENS, np.tile([True, False, False], (16, 1))),
        W,
    ),
    "pixel_cross_entropy": (
        lambda rows, w: m3i_jax.pixel_cross_entropy(rows[0] @ w, rows[1])[0],
        (X, LABEL),
        W,
    ),
}

"""Schedule-free AdamW (Defazio et al. 2024): the parameters of a run are y, where gradients are
taken; its state has z, which takes the steps; evaluation reads their average x."""

from collections.abc import Callable
from typing import Any

import optax

LINK = "schedule_free"


def schedule_free(
    base: optax.GradientTransformation, rate: Callable[[Any], Any], *, b1: float
) -> optax.GradientTransformationExtraArgs:
    """`z <- z + base(gradient at y)`, `x <- (1 - c) x + c z`, `y <- b1 x + (1 - b1) z`, with c the
    share of this step's squared learning rate (the largest so far) in their sum.

    Args:
      base: a rule without momentum, with its learning rate and decay, which act at y.
      rate: its learning rate by step: a warm-up, then constant.
      b1: between 0 and 1, 0 excluded; the part of x in y.
    """
    return optax.contrib.schedule_free(base, rate, b1=b1)


def averaged_params(opt: Any, params: Any) -> Any:
    """The average x of a run with this rule; the parameters themselves of any other.

    Args:
      opt: state of the named chain.
      params: y.

    >>> averaged_params({"adamw": ()}, {"bias": 1.0})
    {'bias': 1.0}
    """
    state = opt.get(LINK) if hasattr(opt, "get") else None
    return params if state is None else optax.contrib.schedule_free_eval_params(state, params)


def average_of(y: Any, z: Any, b1: float) -> Any:
    """x from y and z.

    >>> round(average_of(1.0, 2.0, 0.5), 3)
    0.0
    """
    return (y - (1 - b1) * z) / b1

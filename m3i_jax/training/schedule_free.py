"""Schedule-free AdamW (Defazio et al. 2024): the parameters of a run are y, where gradients are
taken; its state has z, which takes the steps; evaluation reads their average x, and the EMA target
follows it."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

LINK = "schedule_free"
NamedLink = tuple[str, optax.GradientTransformation]
Limits = Mapping[str, tuple[float, float]]  # of top-level parameters


def clip_update(updates: Any, params: Any, name: str, low: float, high: float) -> Any:
    """Returns updates with which the top-level parameter `name`, if there is one, stays inside
    [low, high].

    >>> print(clip_update({"scale": 3.0}, {"scale": 1.0}, "scale", 0.0, 2.0)["scale"])
    1.0
    """
    if name not in updates:
        return updates
    old = params[name]
    return {**updates, name: jnp.clip(old + updates[name], low, high) - old}


def schedule_free(
    base: optax.GradientTransformation,
    rate: Callable[[Any], Any],
    *,
    b1: float,
    limits: Limits | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`z <- z + base(gradient at y)`, `x <- (1 - c) x + c z`, `y <- b1 x + (1 - b1) z`, with c the
    share of this step's squared learning rate (the largest so far) in their sum.

    Args:
      base: a rule without momentum, with its learning rate and decay, which act at y.
      rate: its learning rate by step: a warm-up, then constant.
      b1: between 0 and 1, 0 excluded; the part of x in y.
      limits: {top-level parameter: (low, high)} of z, and so of its averages x and y. If y alone
        were limited, z would go on beyond the limit, and x = (y - (1 - b1) z) / b1 would fall away
        from it on the other side.
    """
    base = optax.with_extra_args_support(base)

    def limited(
        grads: Any, state: Any, params: Any = None, *, z: Any, **more: Any
    ) -> tuple[Any, Any]:
        updates, state = base.update(grads, state, params, **more)
        for name, (low, high) in (limits or {}).items():
            updates = clip_update(updates, z, name, low, high)
        return updates, state

    rule = optax.contrib.schedule_free(
        optax.GradientTransformationExtraArgs(base.init, limited), rate, b1=b1
    )

    def update(grads: Any, state: Any, params: Any = None, **more: Any) -> tuple[Any, Any]:
        return rule.update(grads, state, params, z=state.z, **more)

    return optax.GradientTransformationExtraArgs(rule.init, update)


def averaged_params(opt: Any, params: Any) -> Any:
    """Returns the average x of a run with this rule; the parameters themselves of any other.

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


def chain_of_average(
    before: Sequence[NamedLink], after: Sequence[NamedLink], b1: float
) -> optax.GradientTransformationExtraArgs:
    """`optax.named_chain` of all links, the last of `before` being `schedule_free`, in which an EMA
    target averages x. y is only where gradients are taken, and all else reads x (Defazio et al.
    2024, whose code has no EMA): a target encoder has no gradients.

    Args:
      before: links up to the rule, and the rule, named LINK.
      after: links after it, the target among them.
      b1: of the rule.
    """
    whole = optax.named_chain(*before, *after)
    one, two = optax.named_chain(*before), optax.named_chain(*after)

    def update(grads: Any, state: Any, params: Any = None, **more: Any) -> tuple[Any, Any]:
        updates, done = one.update(grads, {name: state[name] for name, _ in before}, params, **more)
        z = done[LINK].z
        more["evaluated"] = lambda y: jax.tree.map(functools.partial(average_of, b1=b1), y, z)
        updates, rest = two.update(
            updates, {name: state[name] for name, _ in after}, params, **more
        )
        return updates, type(state)({**done, **rest})

    return optax.GradientTransformationExtraArgs(whole.init, update)

"""Update rules of the optimizer as values, by their names in `optim.rule`: AdamW, Muon,
schedule-free AdamW and LARS, and those that other code registers:

    update_rules.register_update_rule("lion", UpdateRule(links=...))

in the configuration file, or in a module that it imports.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.parallel.sharding import path_text
from m3i_jax.registries import Registry, not_one_of
from m3i_jax.training import schedule_free
from m3i_jax.training.muon import muon_or_adam
from m3i_jax.training.schedule_free import Limits, NamedLink

Schedule = Callable[[Any], Any]  # a function of the step
Mask = Callable[[Any], Any]  # params -> tree of booleans
Links = tuple[optax.GradientTransformation, ...]
# parameters whose first axis is that of the layers of a stack
STACKED = re.compile(r"(^|/)(blocks|layers)/|^decoder/projector/|^head/pixel/encoder/")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """How gradients become updates.

    Attributes:
      links: (settings of `optim`, learning rate by step, mask of the parameters that decay) ->
        links of optax from gradients to updates, with learning rate and decay. Clipping comes
        before them, factors of single parameters' rates after them. Raises UserError for settings
        that contradict the rule.
      around: (settings, learning rate, those links with the factors as one transformation, limits
        of top-level parameters) -> the rule, for one that takes its steps in a copy of the
        parameters; None: they are the rule.
      chain: (settings, named links up to the rule, named links after it) -> the chain of all, where
        the later links must see more than the updates; None: `optax.named_chain`.
      bounded: whether an update moves a weight by at most about the learning rate, as Adam's does:
        runs whose rates sum to too little are warned about.
      rates_of_adam: whether AdamW's learning rates fit it, so that `optim.lr=0` may take the one of
        the scaling rule, which was measured with AdamW.
    """

    links: Callable[[schema.Optim, Schedule, Mask], Links]
    around: (
        Callable[
            [schema.Optim, Schedule, optax.GradientTransformation, Limits],
            optax.GradientTransformationExtraArgs,
        ]
        | None
    ) = None
    chain: (
        Callable[
            [schema.Optim, Sequence[NamedLink], Sequence[NamedLink]],
            optax.GradientTransformationExtraArgs,
        ]
        | None
    ) = None
    bounded: bool = False
    rates_of_adam: bool = False


UPDATE_RULES: Registry[UpdateRule] = Registry(
    "update rule",
    choices=schema.UPDATE_RULES,
    reserved=(  # other links of the chain, by whose names the state is saved
        *("balance", "clip", "start", "bounds", "target", "frozen", "snapshot", "teachers"),
        *("prototypes", "spikes", "running"),
    ),
    replace=True,
    unknown=lambda name, names: UserError(
        "config.optim.rule: " + not_one_of(repr(name), names, "import the module that registers it")
    ),
)


def register_update_rule(name: str, rule: UpdateRule) -> UpdateRule:
    """Make a rule known as a value of `optim.rule`. Its state is saved under this name.

    Registering a name from outside again replaces its rule, so that a module can be reloaded.

    Args:
      name: letters, digits and underscores; not that of another link of the optimizer chain.
      rule: the value.

    Raises:
      ValueError: the name is taken by a rule or a link of this package, or has other characters.

    >>> import jax.numpy as jnp
    >>> def links(optim, rate, mask):
    ...     decay = optax.add_decayed_weights(optim.weight_decay, mask=mask)
    ...     rule = optax.scale_by_lion(b1=optim.b1, b2=optim.b2)
    ...     return rule, decay, optax.scale_by_learning_rate(rate)
    >>> with UPDATE_RULES.temporary():
    ...     _ = register_update_rule("lion", UpdateRule(links=links))
    ...     tx = optax.chain(*update_rule("lion").links(schema.Optim(weight_decay=0.0), 0.1, None))
    >>> params = {"bias": jnp.ones(1)}
    >>> tx.update({"bias": jnp.full(1, 5.0)}, tx.init(params), params)[0]["bias"].round(3).tolist()
    [-0.1]
    """
    return UPDATE_RULES.register(name, rule)


def update_rule(name: str) -> UpdateRule:
    """Returns a rule by its name.

    Raises:
      UserError: no rule has this name.

    >>> update_rule("adamw").bounded, update_rule("lars").bounded
    (True, False)
    """
    return UPDATE_RULES[name]


def adamw(
    rate: Schedule | float,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    mask: Mask | None = None,
) -> Links:
    """AdamW: `p <- p - rate * (m / (sqrt(v) + eps) + weight_decay * p)`, bias-corrected; only
    parameters of the mask decay. Factors of a layer's rate are left to the caller's chain."""
    return (
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask=mask),
        optax.scale_by_learning_rate(rate),
    )


def lars(
    rate: Schedule | float,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust: float = 0.001,
    mask: Mask | None = None,
) -> Links:
    """LARS as MoCo v3 and MAE train linear probes (M3I Table 9).

    For the parameters of the mask: `g <- g + weight_decay * p`, then `g <- g * trust * |p| / |g|`,
    or g itself if either norm is 0; of stacked blocks, each layer has its norms. For all
    parameters: `u <- momentum * u + g`, then `p <- p - rate * u`. The rate is outside the momentum,
    so that a schedule acts at once.

    Args:
      rate: learning rate, or a schedule of the step.
      momentum: of the buffer.
      weight_decay: added to the gradient.
      trust: coefficient of the ratio.
      mask: params -> tree of booleans: those with decay and trust ratio; None: matrices, not
        vectors.

    >>> import jax.numpy as jnp
    >>> tx = optax.chain(*lars(1.0))
    >>> params = {"kernel": jnp.full((1, 1), 2.0), "bias": jnp.ones(1)}
    >>> grads = {"kernel": jnp.full((1, 1), 5.0), "bias": jnp.ones(1)}
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> round(float(updates["kernel"][0, 0]), 6), float(updates["bias"][0])
    (-0.002, -1.0)
    """
    mask = mask or matrix_mask
    return (
        optax.add_decayed_weights(weight_decay, mask=mask),
        optax.masked(_scale_by_trust_ratio(trust), mask),
        optax.trace(decay=momentum),
        optax.scale_by_learning_rate(rate),
    )


def _scale_by_trust_ratio(trust: float) -> optax.GradientTransformation:
    def one(path: tuple[Any, ...], g: jax.Array, p: jax.Array) -> jax.Array:
        axes = tuple(range(STACKED.search(path_text(path)) is not None, g.ndim))
        of_p, of_g = (jnp.sqrt(jnp.square(x).sum(axes, keepdims=True)) for x in (p, g))
        both = (of_p > 0) & (of_g > 0)
        return g * jnp.where(both, trust * of_p / jnp.where(both, of_g, 1.0), 1.0)

    return optax.stateless(
        lambda updates, params: jax.tree_util.tree_map_with_path(one, updates, params)
    )


def matrix_mask(params: Any) -> Any:
    """Returns a tree of booleans: which parameters have more than one axis."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _adamw_links(optim: schema.Optim, rate: Schedule, mask: Mask) -> Links:
    more: dict[str, Any] = {"b2": optim.b2, "eps": optim.eps, "weight_decay": optim.weight_decay}
    return adamw(rate, b1=optim.b1, mask=mask, **more)


def _muon_links(optim: schema.Optim, rate: Schedule, mask: Mask) -> Links:
    first = muon_or_adam(
        momentum=optim.muon_momentum,
        rms=optim.muon_rms,
        b1=optim.b1,
        b2=optim.b2,
        eps=optim.eps,
    )
    return (first, *_adamw_links(optim, rate, mask)[1:])


def _schedule_free_links(optim: schema.Optim, rate: Schedule, mask: Mask) -> Links:
    """AdamW without momentum, in whose place the average is."""
    return _adamw_links(dataclasses.replace(optim, b1=0.0), rate, mask)


def _lars_links(optim: schema.Optim, rate: Schedule, mask: Mask) -> Links:
    return lars(rate, momentum=optim.b1, weight_decay=optim.weight_decay, mask=mask)


UPDATE_RULES.register("adamw", UpdateRule(links=_adamw_links, bounded=True, rates_of_adam=True))
UPDATE_RULES.register("muon", UpdateRule(links=_muon_links, rates_of_adam=True))
UPDATE_RULES.register(
    schedule_free.LINK,
    UpdateRule(
        links=_schedule_free_links,
        rates_of_adam=True,
        around=lambda optim, rate, base, limits: schedule_free.schedule_free(
            base, rate, b1=optim.b1, limits=limits
        ),
        chain=lambda optim, before, after: schedule_free.chain_of_average(before, after, optim.b1),
    ),
)
UPDATE_RULES.register("lars", UpdateRule(links=_lars_links))

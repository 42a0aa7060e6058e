"""Update rules of the optimizer as values, by their names in `optim.rule`: AdamW, Muon,
schedule-free AdamW and LARS, and those that other code registers:

    update_rules.register_update_rule("lion", UpdateRule(links=...))

in the configuration file, or in a module that it imports.

Muon (Jordan et al. 2024; Liu et al. 2025, "Muon is scalable for LLM training") makes the momentum
of every matrix of the blocks nearly orthogonal before it is added. The matrices are the kernels of
stacked blocks. Each layer is a matrix of its own, and so are query, key and value, although they
are one array. All else, embeddings, position tables, tokens, norms, biases, poolings and heads, is
trained with AdamW, at the same learning rate: the update of a matrix is scaled to the root mean
square of AdamW's. Under an fsdp axis a device needs whole matrices: they are dealt out, some layers
to every device, orthogonalised there, and the results go back to their shards.

Schedule-free AdamW (Defazio et al. 2024): the parameters of a run are y, where gradients are taken;
its state has z, which takes the steps; evaluation reads their average x.

L layers, n matrices, a b rows and columns.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from m3i_jax import parallel, schema
from m3i_jax.errors import UserError
from m3i_jax.parallel.sharding import path_text
from m3i_jax.registries import Registry, not_one_of

Schedule = Callable[[Any], Any]  # a function of the step
Mask = Callable[[Any], Any]  # params -> tree of booleans
Links = tuple[optax.GradientTransformation, ...]
Limits = Mapping[str, tuple[float, float]]  # of top-level parameters

# of the quintic iteration x <- c0 x + (c1 a + c2 a a) x, a = x x'; Jordan et al.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
_EPS = 1e-8
_MATRIX = re.compile(r"(^|/)(blocks|layers|projector)/(?!.*(offset|mask))(.*/)?kernel$")
LINK = "schedule_free"


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
      bounded: whether an update moves a weight by at most about the learning rate, as Adam's does:
        runs whose rates sum to too little are warned about.
    """

    links: Callable[[schema.Optim, Schedule, Mask], Links]
    around: (
        Callable[
            [schema.Optim, Schedule, optax.GradientTransformation, Limits],
            optax.GradientTransformationExtraArgs,
        ]
        | None
    ) = None
    bounded: bool = False


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
    or g itself if either norm is 0. For all parameters: `u <- momentum * u + g`, then
    `p <- p - rate * u`. The rate is outside the momentum, so that a schedule acts at once.

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
        optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust), mask),
        optax.trace(decay=momentum),
        optax.scale_by_learning_rate(rate),
    )


def matrix_mask(params: Any) -> Any:
    """Returns a tree of booleans: which parameters have more than one axis."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def is_matrix(path: str, shape: tuple[int, ...]) -> bool:
    """Returns whether Muon trains a parameter: a kernel [L, a, b] of stacked blocks.

    >>> is_matrix("encoder/blocks/mlp/fc1/kernel", (12, 768, 3072))
    True
    >>> is_matrix("encoder/patch_embed/kernel", (768, 768)), is_matrix("pool/out/kernel", (8, 8))
    (False, False)
    """
    return len(shape) == 3 and _MATRIX.search(path) is not None


def _parts(path: str) -> int:
    """Matrices side by side in one kernel: query, key and value, or the last two."""
    return 3 if path.endswith("/qkv/kernel") else 2 if path.endswith("/key_value/kernel") else 1


def orthogonalize(x_nxaxb: jax.Array) -> jax.Array:
    """Returns every matrix with singular values of about 1 (0.7 to 1.2): five Newton-Schulz steps,
    in the type of x, on the side with fewer rows.

    >>> x = jnp.array([[[3.0, 0.0], [0.0, 0.5]]])
    >>> bool((jnp.abs(jnp.linalg.svd(orthogonalize(x))[1] - 1) < 0.35).all())
    True
    """
    wide = x_nxaxb.shape[1] <= x_nxaxb.shape[2]
    x = x_nxaxb if wide else x_nxaxb.swapaxes(1, 2)
    x = x / (jnp.sqrt(jnp.square(x).sum((1, 2), keepdims=True)) + _EPS)
    c0, c1, c2 = COEFFICIENTS
    for _ in range(STEPS):
        a = x @ x.swapaxes(1, 2)
        x = c0 * x + (c1 * a + c2 * (a @ a)) @ x
    return x if wide else x.swapaxes(1, 2)


def orthogonal_update(path: str, momentum_Lxaxb: jax.Array, rms: float) -> jax.Array:
    """Returns the update of a stacked kernel before the learning rate, of the same shape: every
    matrix of every layer orthogonal, times `rms` sqrt(max(a, b)), so that a number of it has about
    this size.

    >>> run = lambda moved: orthogonal_update("blocks/attention/qkv/kernel", moved, 0.2)
    >>> jax.eval_shape(run, jnp.ones((2, 4, 12))).shape
    (2, 4, 12)
    """
    layers, rows, columns = momentum_Lxaxb.shape
    parts = _parts(path)
    split = momentum_Lxaxb.reshape(layers, rows, parts, columns // parts)
    x_nxaxb = split.swapaxes(1, 2).reshape(-1, rows, columns // parts)
    x_nxaxb = rms * math.sqrt(max(x_nxaxb.shape[1:])) * _dealt(orthogonalize, x_nxaxb)
    return x_nxaxb.reshape(layers, parts, rows, -1).swapaxes(1, 2).reshape(momentum_Lxaxb.shape)


def _dealt(function: Callable[[jax.Array], jax.Array], x_nxaxb: jax.Array) -> jax.Array:
    """`function` of matrices that are dealt out along the fsdp axis, which splits their rows or
    columns. Matrices of zeros fill up to a multiple of its devices."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = mesh.shape["fsdp"] if "fsdp" in mesh.axis_names else 1
    if devices == 1:
        return function(x_nxaxb)
    count = x_nxaxb.shape[0]
    padded = jnp.pad(x_nxaxb, ((0, -count % devices), (0, 0), (0, 0)))
    whole = parallel.hint(padded, "fsdp", None, None)
    return parallel.hint(function(whole), "fsdp", None, None)[:count]


class MuonState(NamedTuple):
    """steps taken, and mu: momentum of the matrices."""

    steps: jax.Array
    mu: Any


def scale_by_muon(momentum: float, rms: float) -> optax.GradientTransformation:
    """Nesterov momentum, then `orthogonal_update`; for trees of matrices alone.

    `m <- momentum m + (1 - momentum) g`, and the update is of
    `momentum m / (1 - momentum^(t+1)) + (1 - momentum) g / (1 - momentum^t)` at step t from 1, as
    `optax.contrib.muon` has it.
    """

    def update(grads: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        count = optax.safe_increment(state.steps)
        steps = count.astype(jnp.float32)
        mu = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state.mu, grads)
        of_m = momentum / (1 - momentum ** (steps + 1))
        of_g = (1 - momentum) / (1 - momentum**steps)
        updates = jax.tree_util.tree_map_with_path(
            lambda path, m, g: orthogonal_update(path_text(path), of_m * m + of_g * g, rms),
            mu,
            grads,
        )
        return updates, MuonState(count, mu)

    return optax.GradientTransformation(
        lambda params: MuonState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params)),
        update,
    )


def muon_or_adam(
    *, momentum: float, rms: float, b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
    """`scale_by_muon` for matrices of blocks, `optax.scale_by_adam` for everything else. Decay and
    learning rate follow in the chain.

    >>> tx = muon_or_adam(momentum=0.95, rms=0.2, b1=0.9, b2=0.95, eps=1e-8)
    >>> params = {"blocks": {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))}}
    >>> updates, _ = tx.update(params, tx.init(params))
    >>> updates["blocks"]["bias"][0].round(3).tolist()
    [1.0, 1.0, 1.0]
    """

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: "muon" if is_matrix(path_text(path), leaf.shape) else "adam", params
        )

    rules = {
        "muon": scale_by_muon(momentum, rms),
        "adam": optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
    }
    return optax.partition(rules, labels)


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


UPDATE_RULES.register("adamw", UpdateRule(links=_adamw_links, bounded=True))
UPDATE_RULES.register("muon", UpdateRule(links=_muon_links))
UPDATE_RULES.register(
    LINK,
    UpdateRule(
        links=_schedule_free_links,
        around=lambda optim, rate, base, limits: schedule_free(
            base, rate, b1=optim.b1, limits=limits
        ),
    ),
)
UPDATE_RULES.register("lars", UpdateRule(links=_lars_links))

"""The optimizer as one named chain: balance -> clip -> adamw (or lars) -> bounds -> target. Each
link owns its statistics, so the state of a run has readable keys and everything that must survive a
restart is in it."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from m3i_jax import schema
from m3i_jax.models import backbones, m3i
from m3i_jax.objective import balance, ema
from m3i_jax.objective.terms import Terms
from m3i_jax.parallel.sharding import path_text
from m3i_jax.training import optimizers, spikes

# Never decayed, whatever their rank: tokens, position tables, norms, biases, LayerScale and the
# logit scale (SiameseIM decays the rank-3 tokens; BEiT and MAE's fine-tuning do not).
_NO_DECAY = re.compile(
    r"(^|/)(bias|scale|gamma[12]|cls_token|mask_token|query_token|prototypes|positions|logit_scale)$|(^|/)\w*_bias$"
)
LOGIT_SCALE_LIMITS = (0.0, 4.605170185988092)  # ln 1 .. ln 100


def decay_mask(params: Any, *, frozen: tuple[str, ...] = ()) -> Any:
    """A tree of booleans: which parameters are decayed; none that is `frozen`, by the beginning of
    its path. Stacked blocks carry a leading layer axis, so names decide, not ranks."""

    def one(path: tuple[Any, ...], leaf: Any) -> bool:
        name = path_text(path)
        return not _NO_DECAY.search(name) and not name.startswith(frozen)

    return jax.tree_util.tree_map_with_path(one, params)


def _inputs(path: str, shape: tuple[int, ...]) -> int:
    """Numbers that one output of a matrix or a convolution adds up; 0 of any other parameter."""
    stacked = re.search(r"(^|/)(blocks|layers)/|^decoder/projector/", path) is not None
    return math.prod(shape[stacked:-1]) if path.endswith("kernel") else 0


def lr_factor(config: schema.Config, path: str, shape: tuple[int, ...] = ()) -> Any:
    """What a parameter's learning rate is multiplied with: a number, or an array [L] of one a layer
    of a stacked parameter.

    In the encoder alone `optim.encoder_lr`, and `optim.layer_decay` to the power of the layers
    above; and `optim.offset_lr` or `optim.center_lr` of a DCNv3's offsets or centre scale, whose
    products sample the map and start at zero (InternImage, and SiameseIM's code). With
    `optim.fan_in_lr` a matrix of n inputs also has that over n, if it is less than 1: Adam moves
    every number of it by about the learning rate, whatever n, and an output by up to n of those
    (Yang et al. 2022, "Tensor Programs V", Table 3).

    Args:
      config: settings; `config.optim` and `config.model` are read.
      path: as of `parallel.rules.path_of`, from the root of the parameters.
      shape: of the parameter; read with `optim.fan_in_lr` alone.

    >>> config = schema.Config(optim=schema.Optim(layer_decay=0.5, encoder_lr=0.5), model=schema.Model(encoder=schema.Encoder(depth=3)))
    >>> lr_factor(config, "encoder/blocks/norm1/scale").tolist()
    [0.0625, 0.125, 0.25]
    >>> lr_factor(config, "encoder/cls_token"), lr_factor(config, "pool/out/kernel")
    (0.03125, 1.0)
    >>> config = schema.Config(optim=schema.Optim(fan_in_lr=64))
    >>> lr_factor(config, "pool/out/kernel", (128, 96)), lr_factor(config, "encoder/stem/conv1/kernel", (3, 3, 3, 16))
    (0.5, 1.0)
    """
    o, within = config.optim, path.removeprefix("encoder/")
    above: Any = 0
    part, own = 1.0, 1.0
    if within != path:
        backbone = backbones.get_backbone(config.model)
        above, part = backbone.layers_above(config.model, within), o.encoder_lr
        own = next((getattr(o, key) for name, key in backbone.lr_settings if name in within), 1.0)
    inputs = _inputs(path, shape) if o.fan_in_lr else 0
    return (
        part * o.layer_decay**above * own * (o.fan_in_lr / inputs if inputs > o.fan_in_lr else 1.0)
    )


def scale_by_lr_factor(config: schema.Config) -> optax.GradientTransformation:
    """Multiplies every update with its `lr_factor`. Stands after the learning rate, where it is the
    same product and has no state."""

    def one(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        factor = np.asarray(lr_factor(config, path_text(path), update.shape), np.float32)
        if (factor == 1).all():
            return update
        return update * factor.reshape(factor.shape + (1,) * (update.ndim - factor.ndim))

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(one, updates))


def lr_schedule(optim: schema.Optim, *, steps: int, warmup: int) -> Callable[[Any], Any]:
    """Linear warm-up, then a cosine from `lr` to `min_lr`, as a function of the step (M3I Table 7).

    >>> rate = lr_schedule(schema.Optim(lr=1.0), steps=100, warmup=10)
    >>> [round(float(rate(k)), 4) for k in (0, 5, 10, 55, 100)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """

    def rate(step: Any) -> Any:
        step = jnp.asarray(step, jnp.float32)
        # As floats: a run of three thousand million steps is planned, if never made, where the
        # largest batch is sought on a small chip.
        share = jnp.clip((step - float(warmup)) / float(max(steps - warmup, 1)), 0.0, 1.0)
        cosine = optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + jnp.cos(jnp.pi * share))
        return jnp.where(step < float(warmup), optim.lr * step / float(max(warmup, 1)), cosine)

    return rate


def ema_momentum(optim: schema.Optim, *, steps: int) -> Callable[[int], float]:
    """Momentum of the EMA target at a step, as a plain number for the log."""
    schedule = _momentum(optim, steps)
    return lambda step: float(schedule(step))


def _momentum(optim: schema.Optim, steps: int) -> Callable[[Any], Any]:
    return (
        ema.cosine_momentum(optim.ema, steps)
        if optim.ema_schedule == "cosine"
        else lambda step: jnp.float32(optim.ema)
    )


def clamp_parameter(name: str, low: float, high: float) -> optax.GradientTransformation:
    """Shortens the update of one top-level parameter so that it ends inside [low, high]: a clamp
    after every step."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if name in updates:
            old = params[name]
            updates = {**updates, name: jnp.clip(old + updates[name], low, high) - old}
        return updates, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class FrozenParams(NamedTuple):
    """params: those of a target encoder that never changes."""

    params: Any


def hold_frozen(select: Callable[[Any], Any]) -> optax.GradientTransformation:
    """Keeps a part of the first parameters as it is: the place in the state of a frozen target,
    which is then filled from a checkpoint."""
    return optax.GradientTransformation(
        lambda params: FrozenParams(
            jax.tree.map(lambda x: jnp.array(x, copy=True), select(params))
        ),
        lambda updates, state, params=None: (updates, state),
    )


def build_optimizer(
    config: schema.Config, terms: Terms, *, steps: int, warmup: int
) -> optax.GradientTransformationExtraArgs:
    """The chain for a run of `steps` optimizer steps. `update` takes `feature_grad_norms=(ssp,
    sp)`, the norms of Eq. 13."""

    def parts(params: Any) -> Any:
        return params if config.optim.ema_of == "all" else m3i.target_parts(config, terms, params)

    watched = [("spikes", spikes.watch_spikes())] if config.optim.skip_spikes else []
    frozen = (
        [("frozen", hold_frozen(parts))] if any(t.target.encoder == "frozen" for t in terms) else []
    )
    o, e, rate = (
        config.optim,
        config.model.encoder,
        lr_schedule(config.optim, steps=steps, warmup=warmup),
    )
    still = ("encoder/",) if e.freeze else ("encoder/patch_embed/",) if e.freeze_patch_embed else ()
    mask = functools.partial(decay_mask, frozen=still)
    if o.rule == "lars":
        links = optimizers.lars(rate, momentum=o.b1, weight_decay=o.weight_decay, mask=mask)
    else:
        links = optimizers.adamw(
            rate, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, mask=mask
        )
    return optax.named_chain(
        ("balance", balance.track_balance(config.objective.balance_decay)),
        ("clip", optax.clip_by_global_norm(o.clip) if o.clip else optax.identity()),
        (o.rule, optax.chain(*links, scale_by_lr_factor(config))),
        ("bounds", clamp_parameter("logit_scale", *LOGIT_SCALE_LIMITS)),
        ("target", ema.track_target(_momentum(o, steps), parts)),
        *frozen,
        *watched,
    )

"""The optimizer of a run as one named chain: balance -> clip -> the rule -> start -> bounds ->
target -> frozen -> snapshot -> teachers -> prototypes -> spikes, each where it is needed. Each link
owns its statistics, so that the optimizer state has readable keys and holds everything that must
survive a restart. Dense tasks have target and running after the rule."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from m3i_jax import schema
from m3i_jax.models import composite, m3i
from m3i_jax.objective import balance, ema
from m3i_jax.objective.terms import Terms
from m3i_jax.parallel.sharding import path_text
from m3i_jax.training import targets, teachers
from m3i_jax.training.schedule_free import clip_update
from m3i_jax.training.update_rules import STACKED, NamedLink, Schedule, update_rule

# Never decayed, whatever their rank: tokens, queries, tables of positions and levels, norms,
# biases, LayerScale and the logit scale (SiameseIM decays the rank-3 tokens; BEiT and MAE's
# fine-tuning do not; Mask2Former decays no query).
_NO_DECAY = re.compile(
    r"(^|/)(bias|scale|gamma[12]|cls_token|registers|mask_token|query_token|prototypes"
    r"|prototype_norms|positions|queries|levels|logit_scale)$|(^|/)\w*_bias$"
    r"|(^|/)gamma/stage\d+$"
)
# ViTDet: its own channel norms of pyramid and heads are decayed; those of the blocks are not, as
# are PyTorch's own in the transformers of DINO and Mask2Former, and queries of the latter.
_LAYER_NORMS = re.compile(
    r"^(encoder|head/(encoder|decoder|pixel))/(.*/)?\w*norm\w*/|^encoder/positions$"
    r"|^head/decoder/(queries|positions|levels)$"
)
_NORMS = re.compile(r"(^|/)\w*norm\w*/")  # some of an InternImage are stacked
_HEAD_OFFSETS = re.compile(r"^head/(.*/)?offsets/")
LOGIT_SCALE_LIMITS = (0.0, 4.605170185988092)  # ln 1 .. ln 100
# settings of the learning rate, and the schedules that read them
_SCHEDULES = {"min_lr": ("cosine", "wsd"), "decay_share": ("wsd",), "milestones": ("steps",)}
# settings of update rules, and the rules that read them; a registered one may read any of them
_OWN_RULES = ("adamw", "muon", "schedule_free", "lars")
_RULES = {"muon_momentum": ("muon",), "muon_rms": ("muon",)} | dict.fromkeys(
    ("b2", "eps"), ("adamw", "muon", "schedule_free")
)
SPIKE_WINDOW = 128  # steps
MIN_SPREAD = 1e-3  # of the median: a smaller deviation is rounding, not a spike


def build_optimizer(
    config: schema.Config, terms: Terms, *, steps: int, warmup: int
) -> optax.GradientTransformationExtraArgs:
    """Returns the chain for a run of `steps` optimizer steps. `update` takes
    `feature_grad_norms=(ssp, sp)`, the norms of Eq. 13."""

    def parts(params: Any) -> Any:
        return params if config.optim.ema_of == "all" else m3i.target_parts(config, terms, params)

    paths = config.objective.teachers
    has_snapshot = any(t.target.encoder == "snapshot" for t in terms)
    has_frozen = any(t.target.encoder == "frozen" for t in terms)
    return build_chain(
        config,
        steps=steps,
        warmup=warmup,
        first=(("balance", balance.track_balance(config.objective.balance_decay)),),
        held=targets.start_link(config, terms, steps),
        last=(
            ("bounds", clamp_parameter("logit_scale", *LOGIT_SCALE_LIMITS)),
            ("target", ema.track_target(_momentum(config.optim, steps), parts)),
            *([("frozen", hold_frozen(parts))] if has_frozen else []),
            *([("snapshot", _snapshot(config, steps))] if has_snapshot else []),
            # zeros are made inside the program that makes the state, with its shardings
            *([("teachers", hold_frozen(lambda _: teachers.zero_params(paths)))] if paths else []),
            *targets.center_link(config, terms, steps),
        ),
    )


def _snapshot(config: schema.Config, steps: int) -> optax.GradientTransformationExtraArgs:
    """The encoder of the EMA target at the last of `objective.snapshot_at`."""
    return ema.hold_snapshot(
        [max(1, round(share * steps)) for share in config.objective.snapshot_at],
        lambda params: {"encoder": params["encoder"]},
        taken=bool(config.init_from or config.objective.target_checkpoint),
    )


def average_link(optim: schema.Optim, *, steps: int) -> tuple[NamedLink, ...]:
    """Returns the link that keeps an average of all parameters, if `optim.ema_of` is all."""
    if optim.ema_of != "all":
        return ()
    return (("target", ema.track_target(_momentum(optim, steps), lambda params: params)),)


def build_chain(
    config: schema.Config,
    *,
    steps: int,
    warmup: int,
    first: Sequence[NamedLink] = (),
    held: Sequence[NamedLink] = (),
    last: Sequence[NamedLink] = (),
) -> optax.GradientTransformationExtraArgs:
    """Returns the named chain of any task for a run of `steps` optimizer steps: its `first` links,
    clipping, the rule with learning rates by layer and decay by name, its `held` links, which make
    updates 0, its `last` links, and the window of spikes if they are skipped. `update` takes the
    keyword arguments that any link knows."""
    o, e = config.optim, config.model.encoder
    rate = lr_schedule(o, steps=steps, warmup=warmup)
    prefixes: tuple[str, ...] = ("encoder/",) if e.freeze else ()
    if e.freeze_patch_embed:
        prefixes += ("encoder/patch_embed/",)
    mask = functools.partial(decay_mask, rule=o.decayed, frozen=prefixes)
    known = update_rule(o.rule)
    rule: optax.GradientTransformation = optax.chain(
        *known.links(o, rate, mask), scale_by_lr_factor(config)
    )
    if known.around is not None:  # what is held stays in its copy, too, or the average would move
        rule = optax.chain(rule, *(transform for _, transform in held))
        rule, held = known.around(o, rate, rule, {"logit_scale": LOGIT_SCALE_LIMITS}), ()
    before: tuple[NamedLink, ...] = (
        *first,
        ("clip", optax.clip_by_global_norm(o.clip) if o.clip else optax.identity()),
        (o.rule, rule),
    )
    after = (*held, *last, *([("spikes", watch_spikes())] if o.skip_spikes else []))
    return known.chain(o, before, after) if known.chain else optax.named_chain(*before, *after)


def decay_mask(params: Any, *, rule: str = "matrices", frozen: tuple[str, ...] = ()) -> Any:
    """Returns a tree of booleans: which parameters are decayed, by `optim.decayed`; none whose path
    begins with a prefix of `frozen`. Stacked blocks have a leading layer axis, which is no axis of
    a parameter.

    >>> params = {"encoder": {"norm": {"scale": np.ones(2)}, "cls_token": np.ones((1, 1, 2))}}
    >>> [
    ...     jax.tree.leaves(decay_mask(params, rule=rule))
    ...     for rule in ("matrices", "but_norms", "ranks", "kernels", "all")
    ... ]
    [[False, False], [True, False], [True, False], [False, False], [True, True]]
    """

    def one(path: tuple[Any, ...], leaf: Any) -> bool:
        name = path_text(path)
        if rule == "but_norms":
            decays = not _LAYER_NORMS.search(name)
        elif rule == "ranks":
            axes = leaf.ndim - bool(STACKED.search(name))
            others = name.endswith("/bias") or _NORMS.search(name) or _HEAD_OFFSETS.search(name)
            decays = axes > 1 and not others
        elif rule == "kernels":
            decays = name.endswith("/kernel")
        elif rule == "all":
            decays = True
        else:
            decays = not _NO_DECAY.search(name)
        return decays and not name.startswith(frozen)

    return jax.tree_util.tree_map_with_path(one, params)


def _fan_in(path: str, shape: tuple[int, ...]) -> int:
    """Inputs of one output of a matrix or a convolution; 0 for any other parameter."""
    stacked = STACKED.search(path) is not None
    return math.prod(shape[stacked:-1]) if path.endswith("kernel") else 0


def lr_factor(config: schema.Config, path: str, shape: tuple[int, ...] = ()) -> Any:
    """Returns the factor of a parameter's learning rate: a number, or an array [L] with one a layer
    of a stacked parameter.

    The product of those that apply:
    - in the encoder, `optim.encoder_lr`, and `optim.layer_decay` to the power of the layers above;
    - for a DCNv3's offsets or centre scale, whose products sample the map and start at zero,
      `optim.offset_lr` or `optim.center_lr` (InternImage's fine-tuning); for the offsets of
      deformable attention in the head of a dense task, `optim.head_offset_lr`;
    - for a matrix of n inputs, `optim.fan_in_lr` / n if that is less than 1: Adam moves every entry
      by about the learning rate, whatever n, and so an output by up to n of those (Yang et al.
      2022, "Tensor Programs V", Table 3).

    Args:
      config: settings; `config.optim` and `config.model` are read.
      path: as of `sharding.path_text`, from the root of the parameters.
      shape: of the parameter; read only with `optim.fan_in_lr`.

    >>> model = schema.Model(encoder=schema.Encoder(depth=3))
    >>> config = schema.Config(optim=schema.Optim(layer_decay=0.5, encoder_lr=0.5), model=model)
    >>> lr_factor(config, "encoder/blocks/norm1/scale").tolist()
    [0.0625, 0.125, 0.25]
    >>> lr_factor(config, "encoder/cls_token"), lr_factor(config, "pool/out/kernel")
    (0.03125, 1.0)
    >>> config = schema.Config(optim=schema.Optim(head_offset_lr=0.1))
    >>> lr_factor(config, "head/encoder/layers/attention/offsets/kernel")
    0.1
    >>> config = schema.Config(optim=schema.Optim(fan_in_lr=64))
    >>> lr_factor(config, "pool/out/kernel", (128, 96))
    0.5
    >>> lr_factor(config, "encoder/stem/conv1/kernel", (3, 3, 3, 16))
    1.0
    """
    o, in_encoder = config.optim, path.removeprefix("encoder/")
    factor: Any = 1.0
    if in_encoder != path:
        backbone = composite.of_run(config)
        of_maps = None if config.traits.views else backbone.map_layers_above
        above = (of_maps or backbone.layers_above)(config.model, in_encoder)
        factor = o.encoder_lr * o.layer_decay**above
        own = (getattr(o, key) for part, key in backbone.lr_settings if part in in_encoder)
        factor = factor * next(own, 1.0)
    elif _HEAD_OFFSETS.search(path):
        factor = o.head_offset_lr
    fan_in = _fan_in(path, shape) if o.fan_in_lr else 0
    return factor * (o.fan_in_lr / fan_in if fan_in > o.fan_in_lr else 1.0)


def scale_by_lr_factor(config: schema.Config) -> optax.GradientTransformation:
    """Multiplies every update with its `lr_factor`. It comes after the learning rate, which gives
    the same product without a state."""

    def one(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        factor = np.asarray(lr_factor(config, path_text(path), update.shape), np.float32)
        if (factor == 1).all():
            return update
        return update * factor.reshape(factor.shape + (1,) * (update.ndim - factor.ndim))

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(one, updates))


def lr_schedule(optim: schema.Optim, *, steps: int, warmup: int) -> Schedule:
    """Returns the learning rate as a function of the step: linear warm-up, then by
    `optim.schedule`.

    cosine: from `lr` to `min_lr` (M3I Table 7). wsd: constant, then over the last `decay_share` of
    the run, but not before the end of the warm-up, linearly to `min_lr` (warm-up, stable, decay; Hu
    et al. 2024). constant: `lr`. steps: a tenth from each of the shares `milestones` of the run on
    (detectron2). poly: linear to 0 at the last step, from the second step after the warm-up
    (mmsegmentation).

    >>> rate = lr_schedule(schema.Optim(lr=1.0), steps=100, warmup=10)
    >>> [round(float(rate(k)), 4) for k in (0, 5, 10, 55, 100)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    >>> rate = lr_schedule(schema.Optim(lr=1.0, schedule="wsd"), steps=100, warmup=10)
    >>> [round(float(rate(k)), 4) for k in (5, 10, 80, 90, 99)]
    [0.5, 1.0, 1.0, 0.5, 0.05]
    >>> vitdet = schema.Optim(lr=1.0, schedule="steps", milestones=(0.8, 0.9), warmup_start=0.001)
    >>> rate = lr_schedule(vitdet, steps=100, warmup=10)
    >>> [round(float(rate(k)), 4) for k in (0, 5, 79, 80, 90)]
    [0.001, 0.5005, 1.0, 0.1, 0.01]
    """

    def rate(step: Any) -> Any:
        step = jnp.asarray(step, jnp.float32)
        # as floats: --largest-batch plans runs of more steps than an int32 holds
        if optim.schedule == "steps":
            passed = [step >= round(share * steps) for share in optim.milestones]
            after = optim.lr * jnp.prod(jnp.where(jnp.array([False, *passed]), 0.1, 1.0))
        elif optim.schedule == "constant":
            after = jnp.full_like(step, optim.lr)
        elif optim.schedule == "wsd":
            first = max(steps - max(round(optim.decay_share * steps), 1), warmup)
            share = jnp.clip((step - float(first)) / float(max(steps - first, 1)), 0.0, 1.0)
            after = optim.lr + (optim.min_lr - optim.lr) * share
        elif optim.schedule == "poly":
            left = float(max(steps - warmup - 2, 1))
            after = optim.lr * jnp.clip((float(steps - 1) - step) / left, 0.0, 1.0)
        else:
            share = jnp.clip((step - float(warmup)) / float(max(steps - warmup, 1)), 0.0, 1.0)
            cosine = 0.5 * (1 + jnp.cos(jnp.pi * share))
            after = optim.min_lr + (optim.lr - optim.min_lr) * cosine
        if optim.warmup_start:
            risen = optim.warmup_start + (1 - optim.warmup_start) * step / float(max(warmup, 1))
            return jnp.where(step < float(warmup), optim.lr * risen, after)
        return jnp.where(step < float(warmup), optim.lr * step / float(max(warmup, 1)), after)

    return rate


def unread_settings(optim: schema.Optim) -> list[str]:
    """Returns a warning for each setting that `optim.schedule` or `optim.rule` does not read. A
    warning, not an error: a recipe may set what an override of its schedule leaves unread.

    >>> print(*unread_settings(schema.Optim(schedule="poly", min_lr=0.1)))
    warning: optim.min_lr=0.1 has no effect with optim.schedule=poly: cosine and wsd read it
    """
    default, own = schema.Optim(), optim.rule in _OWN_RULES
    unread = [("schedule", key, by) for key, by in _SCHEDULES.items() if optim.schedule not in by]
    unread += [("rule", key, by) for key, by in _RULES.items() if own and optim.rule not in by]
    return [
        f"warning: optim.{key}={getattr(optim, key)!r} has no effect with"
        f" optim.{of}={getattr(optim, of)}: {_listed(by)} read{'s' * (len(by) < 2)} it"
        for of, key, by in unread
        if getattr(optim, key) != getattr(default, key)
    ]


def _listed(names: tuple[str, ...]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def ema_momentum(optim: schema.Optim, *, steps: int) -> Callable[[int], float]:
    """Returns the momentum of the EMA target at a step, as a plain number for the log."""
    schedule = _momentum(optim, steps)
    return lambda step: float(schedule(step))


def _momentum(optim: schema.Optim, steps: int) -> Schedule:
    return (
        ema.cosine_momentum(optim.ema, steps)
        if optim.ema_schedule == "cosine"
        else lambda step: jnp.float32(optim.ema)
    )


def clamp_parameter(name: str, low: float, high: float) -> optax.GradientTransformation:
    """Limits the update of one top-level parameter so that the parameter stays inside
    [low, high]."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return clip_update(updates, params, name, low, high), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def schedule_count(opt: Any) -> jax.Array | None:
    """Returns how many updates the schedule of the learning rate has counted: all links count the
    steps that were taken, so that a skipped one leaves no trace. None for a rule without schedule.

    >>> tx = optax.named_chain(("sgd", optax.sgd(lambda step: 0.1 * step)))
    >>> _, opt = tx.update(jnp.ones(1), tx.init(jnp.ones(1)))
    >>> print(schedule_count(opt), schedule_count({"sgd": ()}))
    1 None
    """
    kind = optax.ScaleByScheduleState
    nodes = jax.tree.leaves(opt, is_leaf=lambda node: isinstance(node, kind))
    return next((node.count for node in nodes if isinstance(node, kind)), None)


class FrozenParams(NamedTuple):
    """params: those of a target encoder that never changes."""

    params: Any


def hold_frozen(select: Callable[[Any], Any]) -> optax.GradientTransformation:
    """Keeps a part of the first parameters in the optimizer state: the entry of a frozen target,
    which is then loaded from a checkpoint."""
    return optax.GradientTransformation(
        lambda params: FrozenParams(
            jax.tree.map(lambda x: jnp.array(x, copy=True), select(params))
        ),
        lambda updates, state, params=None: (updates, state),
    )


class SpikeState(NamedTuple):
    """A window of recent steps.

    seen      float32 [2, SPIKE_WINDOW], losses and gradient norms; the oldest is overwritten
    steps     int32, steps pushed so far
    skipped   int32, spikes among them
    """

    seen: jax.Array
    steps: jax.Array
    skipped: jax.Array


def watch_spikes() -> optax.GradientTransformation:
    """Returns the window of losses and gradient norms as a link, so that it is saved and a resumed
    run decides as an unbroken one. Updates pass through; `skip_update` fills it.

    The spread is 1.4826 times the median distance from the median: a standard deviation of normal
    noise that no single spike can move. All finite steps enter the window, skipped ones too: after
    a lasting change of level, half a window of steps is skipped, and then it is the new level."""
    return optax.GradientTransformation(
        lambda params: SpikeState(
            jnp.zeros((2, SPIKE_WINDOW)), jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        ),
        lambda updates, state, params=None: (updates, state),
    )


def is_spike(state: SpikeState, loss: jax.Array, norm: jax.Array, sigmas: float) -> jax.Array:
    """Returns whether the loss or the gradient norm is more than `sigmas` deviations above the
    median of its window; never before the window is full.

    >>> state = watch_spikes().init(None)
    >>> for k in range(SPIKE_WINDOW):
    ...     state = push_window(state, jnp.float32(1 + k % 2), jnp.float32(5), jnp.array(False))
    >>> steps = (2.5, 5.0), (9.0, 5.0), (1.0, 5.1), (0.0, 0.0)
    >>> [bool(is_spike(state, jnp.float32(x), jnp.float32(y), 6.0)) for x, y in steps]
    [False, True, True, False]
    """
    median = jnp.median(state.seen, axis=1)
    spread = 1.4826 * jnp.median(jnp.abs(state.seen - median[:, None]), axis=1)
    limit = median + sigmas * jnp.maximum(spread, MIN_SPREAD * jnp.abs(median))
    return (state.steps >= SPIKE_WINDOW) & jnp.any(jnp.stack([loss, norm]) > limit)


def push_window(
    state: SpikeState, loss: jax.Array, norm: jax.Array, skipped: jax.Array
) -> SpikeState:
    """Returns the window with the newest step in place of the oldest."""
    seen = state.seen.at[:, state.steps % SPIKE_WINDOW].set(
        jnp.stack([loss, norm]).astype(jnp.float32)
    )
    return SpikeState(seen, state.steps + 1, state.skipped + skipped.astype(jnp.int32))


def skip_update(
    old: Any, new: Any, loss: jax.Array, norm: jax.Array, finite: jax.Array, sigmas: float
) -> tuple[Any, Any]:
    """Keeps the old parameters and optimizer state where a step is not finite or a spike.

    Returns ((params, opt) after the step, metrics).

    Args:
      old, new: (params, opt) before and after the update.
      loss, norm, finite: of the step.
      sigmas: `optim.skip_spikes`.
    """
    window = old[1].get("spikes")
    spike = (
        is_spike(window, loss, norm, sigmas) & finite if window is not None else jnp.zeros([], bool)
    )
    params, opt = jax.tree.map(lambda n, o: jnp.where(finite & ~spike, n, o), new, old)
    metrics = {"skipped/not_finite": 1.0 - finite}
    if window is not None:
        pushed = push_window(window, loss, norm, spike)
        opt["spikes"] = jax.tree.map(lambda n, o: jnp.where(finite, n, o), pushed, window)
        metrics["skipped/spikes"] = opt["spikes"].skipped
    return (params, opt), metrics

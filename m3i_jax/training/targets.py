"""Target representations of a step, computed first and without gradient (M3I section 3.4): the
target encoders read clean views, each view once; a term compares pixels, tokens, a pooled vector or
a projection of them.

Assignments to prototypes are targets, too: the logits of the target encoder become assignments
once, over all rows of the batch and all views of a space, and their means move the centres.

    optimizer              center_link        the centres and the rise of the temperature
                           start_link         prototypes that stay as they are at the start
    step                   assign_targets     logits -> assignments, monitors, mean logits
"""

import dataclasses
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from m3i_jax import schema
from m3i_jax.models import decoder, heads, m3i, vit
from m3i_jax.objective import collapse, losses, mixing, positions
from m3i_jax.objective.prototype_targets import (
    PrototypeSoftmax,
    PrototypeState,
    prototype_terms,
    space_name,
    track_centers,
)
from m3i_jax.objective.terms import ClusterHead, ProjectionHead, Term, Terms
from m3i_jax.parallel.sharding import path_text
from m3i_jax.training import teachers
from m3i_jax.training.plan import Plan, TargetKey, TargetPass, target_pass
from m3i_jax.training.views import Patches, stack_rows, unstack_rows

TargetFeatures = dict[TargetKey, jax.Array]
# the one metric that is a matrix; its eigenvalues are computed only when a log line is written
MOMENT = "moment"
# the heads that make targets as they are trained, without an average, beside the target encoders
TRAINED = "trained"
# the entry of a step's metrics that is no scalar but the input of the centres
MEAN_LOGITS = "mean_logits"


def encode_targets(
    plan: Plan, encoders: dict[str, Any], patches: Patches
) -> dict[TargetPass, jax.Array]:
    """Returns tokens [B, T, D] of every target pass, cls first; one call for all views that an
    encoder reads in one way."""
    out: dict[TargetPass, jax.Array] = {}
    kinds: dict[tuple[str, int, int, int], list[TargetPass]] = {}
    for p in plan.target_passes:
        kind = (p.encoder, p.blocks, p.enlarge, patches[p.view].shape[1])
        kinds.setdefault(kind, []).append(p)
    for (encoder, *_), group in sorted(kinds.items()):
        tree, rows = encoders[encoder]["encoder"], stack_rows([patches[p.view] for p in group])
        z = encode_target(plan, group[0], tree, rows)
        out |= dict(zip(group, unstack_rows(jax.lax.stop_gradient(z), len(group)), strict=True))
    return out


def encode_target(
    plan: Plan, target: TargetPass, encoder: Any, patches_BxNxP: jax.Array
) -> jax.Array:
    """Returns tokens [B, T, D] at the cells of a view, of a teacher or of a target encoder of the
    run's shape, which may read the view enlarged. Pixels and features are then resized bicubically,
    as PyTorch does without antialiasing.

    Args:
      plan: of the run.
      target: the pass; its view is not read.
      encoder: its parameters.
      patches_BxNxP: of a clean view.
    """
    if target.encoder.startswith("teacher"):
        return teachers.encode_teacher(plan.config, target.encoder, encoder, patches_BxNxP)
    blocks, enlarge = min(target.blocks, plan.config.model.encoder.depth), target.enlarge
    if enlarge == 1:
        return m3i.encode(plan.config, encoder, patches_BxNxP, blocks=blocks)
    patch = plan.config.model.encoder.patch_size
    images_BxSxSx3 = teachers.images_of_patches(patches_BxNxP, patch)
    side = images_BxSxSx3.shape[1]
    large_BxSxSx3 = _resize_square(images_BxSxSx3, enlarge * side)
    large_BxMxP = vit.patchify(large_BxSxSx3, patch).astype(patches_BxNxP.dtype)
    z_BxTxD = m3i.encode(plan.config, encoder, large_BxMxP, blocks=blocks)
    grid, cells = side // patch, large_BxMxP.shape[1]
    map_BxGxGxD = z_BxTxD[:, -cells:].reshape(-1, enlarge * grid, enlarge * grid, z_BxTxD.shape[2])
    tokens_BxNxD = _resize_square(map_BxGxGxD, grid).reshape(-1, grid * grid, z_BxTxD.shape[2])
    return jnp.concatenate([z_BxTxD[:, :-cells].astype(tokens_BxNxD.dtype), tokens_BxNxD], 1)


def _resize_square(x_BxGxGxC: jax.Array, side: int) -> jax.Array:
    weights = jnp.asarray(positions.bicubic_weights(x_BxGxGxC.shape[1], side), jnp.float32)
    rows = jnp.einsum("ya,nabc->nybc", weights, x_BxGxGxC.astype(jnp.float32))
    return jnp.einsum("xb,nybc->nyxc", weights, rows)


def project_target(
    plan: Plan, params: Any, space: Any, z_BxTxD: jax.Array, hidden_BxH: jax.Array | None = None
) -> jax.Array:
    """Returns target features in the space of a key: [B, N, D] of dense terms, [B, D] of pooled
    ones.

    Args:
      plan: of the run.
      params: the tree of the target encoder.
      space: of a `TargetKey`.
      z_BxTxD: features of a clean view, cls first if the encoder has one.
      hidden_BxH: the cells that a space of hidden tokens reads; its targets are [B, H, D].
    """
    first, model = int(plan.config.model.encoder.cls_token), plan.config.model
    if space is None:
        return z_BxTxD[:, first:]
    if isinstance(space, ClusterHead):
        return heads.cluster_logits(model, params["heads"][space.name], z_BxTxD[:, first:])
    if isinstance(space, ProjectionHead):
        cls, tokens = (z_BxTxD[:, 0] if first else None), z_BxTxD[:, first:]
        if space.queries == "hidden":
            assert hidden_BxH is not None
            tokens = mixing.gather(tokens, hidden_BxH)
        return heads.apply_projector(
            model,
            params.get("heads", {}).get(space.name, {}),
            space,
            pool_tokens(space, tokens, cls),
        )
    return decoder.project_targets(model, params["decoder"], z_BxTxD)[:, first:]


def pool_tokens(
    space: ProjectionHead, tokens_RxKxD: jax.Array, cls_RxD: jax.Array | None
) -> jax.Array:
    """Returns the input of a projection: the mean of the tokens, cls, or every token by itself;
    the mean in place of cls where the encoder has none."""
    if space.pool == "none":
        return tokens_RxKxD
    if space.pool == "cls" and cls_RxD is not None:
        return cls_RxD
    return tokens_RxKxD.astype(jnp.float32).mean(1)


def target_features(
    plan: Plan, encoders: dict[str, Any], patches: Patches, mask_BxN: jax.Array | None = None
) -> TargetFeatures:
    """Returns every target of the plan that needs no online pass, [B, N, D] or [B, D], without
    gradient; [B, H, D] where only hidden tokens are projected, for which `mask_BxN` is read."""
    encoded, hidden = encode_targets(plan, encoders, patches), None
    if mask_BxN is not None and plan.projects_hidden:
        hidden = mixing.split(mask_BxN, plan.config.tokens - plan.config.hidden)[1]
    out: TargetFeatures = {}
    for key in plan.target_keys:
        if key.target.of == "pixels":
            assert key.target.view is not None
            out[key] = patches[key.target.view]
        else:
            tree, z = encoders[key.target.encoder], encoded[target_pass(key.target)]
            if key.target.encoder.startswith("teacher"):  # its feature of the image is first
                out[key] = z[:, 0] if key.target.of == "pooled" else z[:, 1:]
                continue
            if isinstance(key.space, ClusterHead):  # it is trained on these, and has no average
                tree = encoders[TRAINED]
            projected = project_target(plan, tree, key.space, z, hidden)
            out[key] = jax.lax.stop_gradient(projected)
    return out


def normalize_target(term: Term, target: jax.Array) -> jax.Array:
    """Returns a target as the posterior of a term compares it, float32."""
    if term.target.of == "pixels":
        return term.posterior.prepare_pixels(target)
    return term.posterior.prepare(target)


def has_prototypes(key: TargetKey) -> bool:
    """Returns whether a target is an assignment to prototypes."""
    space = key.space
    return isinstance(space, ClusterHead) or bool(getattr(space, "prototypes", ""))


def moment_key(key: TargetKey) -> TargetKey:
    """Returns the key of a second moment: targets of one encoder in one space share it, whatever
    the view."""
    return key._replace(target=dataclasses.replace(key.target, view=0))


def target_moments(plan: Plan, features: TargetFeatures) -> dict[TargetKey, jax.Array]:
    """Computes the second moment C [D, D] of the learned targets of each kind, over all tokens and
    views of the batch; of projections, which are only monitored, those of the first view."""
    out: dict[TargetKey, list[jax.Array]] = {}
    # in the order of the terms: a dict that leaves a compiled loop is sorted
    for key in plan.target_keys:
        if has_prototypes(key):  # K^2 similarities of logits say nothing
            continue
        if key.target.learned and (key.space in (None, "decoder") or not out):
            rows = losses.layer_normalize(features[key].reshape(-1, features[key].shape[-1]))
            out.setdefault(moment_key(key), []).append(losses.second_moment(rows))
    return {key: sum(each[1:], each[0]) / len(each) for key, each in out.items()}


def target_metrics(
    plan: Plan, features: TargetFeatures, moments: dict[TargetKey, jax.Array]
) -> dict[str, jax.Array]:
    """Collapse monitors of the first learned target: its standard deviation, the share of its
    energy that varies between tokens, and the second moment itself."""
    for key in plan.target_keys:
        if moment_key(key) in moments and key.target.learned:
            rows = features[key].reshape(-1, features[key].shape[-1])
            moment = moments[moment_key(key)]
            mean_D = losses.layer_normalize(rows).mean(0)
            return {
                "collapse/target_std": collapse.target_std(rows),
                "collapse/spread": collapse.centered_energy(mean_D, moment),
                MOMENT: moment,
            }
    return {}


def center_link(
    config: schema.Config, terms: Terms, steps: int
) -> tuple[tuple[str, optax.GradientTransformation], ...]:
    """Returns the link of the optimizer chain that keeps what assignments to prototypes carry from
    step to step; none for an objective without prototypes."""
    names = prototype_terms(terms)
    if not names:
        return ()
    rising = max(config.objective.target_temperature_rise * steps, 1.0)

    def rise(step: Any) -> jax.Array:
        return jnp.minimum(jnp.asarray(step, jnp.float32) / rising, 1.0)

    widths = dict.fromkeys(sorted(names), config.model.head.prototypes)
    return (("prototypes", track_centers(widths, rise=rise)),)


class StartState(NamedTuple):
    """count: int32, updates so far."""

    count: jax.Array  # type: ignore[assignment]  # optax's name; shadows tuple.count


def hold_at_start(steps: float) -> optax.GradientTransformation:
    """Returns an optax transform that makes the updates of prototypes and of their lengths 0 in the
    first steps (DINOv2: a learning rate of 0, while the moments go on).

    >>> tx = hold_at_start(1)
    >>> tree = {"heads": {"global": {"prototypes": jnp.ones(1), "projector": jnp.ones(1)}}}
    >>> first, state = tx.update(tree, tx.init(tree))
    >>> second, _ = tx.update(tree, state)
    >>> [x["heads"]["global"]["prototypes"].item() for x in (first, second)]
    [0.0, 1.0]
    >>> first["heads"]["global"]["projector"].item()
    1.0
    """

    def update(updates: Any, state: StartState, params: Any = None) -> tuple[Any, StartState]:
        del params
        moves = state.count >= steps

        def one(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
            held = re.search(r"^heads/.*/prototype(s|_norms)$", path_text(path))
            return jnp.where(moves, x, jnp.zeros_like(x)) if held else x

        held = jax.tree_util.tree_map_with_path(one, updates)
        return held, StartState(optax.safe_increment(state.count))

    return optax.GradientTransformation(lambda _: StartState(jnp.zeros([], jnp.int32)), update)


def start_link(
    config: schema.Config, terms: Terms, steps: int
) -> tuple[tuple[str, optax.GradientTransformation], ...]:
    """Returns the link that holds prototypes at the start of a run, with
    `optim.freeze_prototypes`."""
    share = config.optim.freeze_prototypes
    return (("start", hold_at_start(share * steps)),) if share and prototype_terms(terms) else ()


def assign_targets(
    plan: Plan, features: TargetFeatures, state: PrototypeState | None
) -> tuple[TargetFeatures, dict[str, Any]]:
    """Returns the targets of a whole batch with assignments in place of the logits of spaces with
    prototypes.

    The views of a space are one problem, as in DINOv2: the centre is the mean over both, and
    Sinkhorn's shares are those of both together.

    Args:
      plan: of the run.
      features: all targets of the batch, as of `targets.target_features`.
      state: of the steps before; None: that of the first step.

    Returns:
      (targets, metrics): {`MEAN_LOGITS`: {space: [K]}} and two entropies in bits for each space,
      that of the mean assignment, at most log2 K, and the mean of those of the assignments; their
      difference is the information that an image has about its assignment.
    """
    posteriors = {name: term.posterior for name, term in prototype_terms(plan.terms).items()}
    spaces: dict[str, list[TargetKey]] = {}
    for key in plan.target_keys:
        if has_prototypes(key):
            spaces.setdefault(space_name(key.space, key.target.of), []).append(key)
    if not spaces:
        return features, {}
    out, metrics = dict(features), dict[str, Any]()
    means: dict[str, jax.Array] = {}
    for name, keys in spaces.items():
        posterior = posteriors[name]
        assert isinstance(posterior, PrototypeSoftmax)
        logits = stack_rows([features[key] for key in keys])
        rows_MxK = logits.reshape(-1, logits.shape[-1])
        center_K = jnp.zeros(rows_MxK.shape[-1]) if state is None else state.centers[name]
        rise = jnp.zeros(()) if state is None else state.rise
        assigned_xK = posterior.assign(logits, center_K, rise)
        assigned = unstack_rows(assigned_xK, len(keys))
        q_MxK = assigned_xK.reshape(rows_MxK.shape)
        out |= dict(zip(keys, assigned, strict=True))
        means[name] = rows_MxK.mean(0)
        bits = 1 / jnp.log(2.0)
        metrics[f"collapse/marginal_bits/{name}"] = (
            bits * jax.scipy.special.entr(q_MxK.mean(0)).sum()
        )
        metrics[f"collapse/assignment_bits/{name}"] = (
            bits * jax.scipy.special.entr(q_MxK).sum(-1).mean()
        )
    return out, {**metrics, MEAN_LOGITS: means}

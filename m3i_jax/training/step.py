"""The one train step: a pure function (state, batch) -> (state, metrics), whatever the objective.

    targets first, without gradient          z_y = f_EMA(clean views) encoder once, kept as a
    pullback          z, back = vjp(f_theta, input) each group its loss and its gradients     L_ssp,
    dz_ssp      L_sp, dz_sp lambda from the statistics so far         lambda = gamma * |dz_ssp| /
    |dz_sp|                 M3I Eq. 13 one encoder backward                      back(dz_ssp +
    lambda * dz_sp) the optimizer chain                       balance -> clip -> adamw -> target

k microbatches of B/k give the result of one batch of B: every loss is divided by the count of the
whole batch, C is taken over all targets before, the norms are roots of summed squares, and the text
softmax spans the batch through embeddings computed once more."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from m3i_jax import parallel
from m3i_jax.models import m3i
from m3i_jax.objective import balance, collapse, losses
from m3i_jax.training import spikes, targets, term_losses, views
from m3i_jax.training.plan import Plan, TargetKey
from m3i_jax.training.state import State
from m3i_jax.training.targets import TargetFeatures
from m3i_jax.training.term_losses import Arrays, CachedTextGradients, TargetBundle, TermLosses
from m3i_jax.training.views import Batch

Metrics = dict[str, jax.Array]
# steps in a row that may be skipped because something was not finite; then the run ends
MOST_NOT_FINITE = 3
# the one metric that is a matrix: its eigenvalues are worth a look only when a line is written
MOMENT = "moment"


def _microbatches(tree: Any, count: int, pairs: int) -> Any:
    """[B, ...] -> [k, B/k, ...] in pairs dealt out like cards: each device keeps its rows, and
    partners stay together on any mesh. Arrays with one row a pair are dealt the same way."""

    def one(x: jax.Array) -> jax.Array:
        dealt = x.reshape(pairs // count, count, -1, *x.shape[1:]).swapaxes(0, 1)
        return parallel.hint(dealt.reshape(count, -1, *x.shape[1:]), None, parallel.DATA)

    return jax.tree.map(one, tree)


def _whole(tree: Any, count: int, pairs: int) -> Any:
    """The inverse: all microbatches as one batch in its order, so that it lies on the devices as
    the batch does."""

    def one(x: jax.Array) -> jax.Array:
        collected = x.reshape(count, pairs // count, -1, *x.shape[2:]).swapaxes(0, 1)
        return parallel.hint(collected.reshape(-1, *x.shape[2:]), parallel.DATA)

    return jax.tree.map(one, tree)


def _cached_text_gradients(
    plan: Plan, params: Any, batch: Batch, parts: Any
) -> tuple[TermLosses, CachedTextGradients]:
    """The text terms over all rows of all microbatches: their costs, and their gradients at every
    embedding."""

    def embed(_: None, part: Any) -> tuple[None, Any]:
        batch, crops = part
        vectors = term_losses.pool_terms(
            plan,
            params,
            views.encode_passes(plan.config, plan.passes, batch, crops, params["encoder"]),
            batch,
        )
        return None, term_losses.contrastive_embeddings(plan, params, vectors, batch)

    _, (images, captions) = jax.lax.scan(embed, None, parts)
    count, pairs = parts[0]["mask"].shape[0], batch["mask"].shape[0] // 2

    def costs(u: Arrays, v: Arrays, s: Arrays) -> tuple[jax.Array, TermLosses]:
        out = {i: term_losses.text_losses(plan, {i: u[i]}, v[i], s[i], batch)[i] for i in u}
        return sum((cost.sum for cost in out.values()), jnp.zeros(())), out

    u, v = _whole((images, captions), count, pairs)
    (_, value), (du, dv, ds) = jax.value_and_grad(costs, (0, 1, 2), has_aux=True)(
        u, dict.fromkeys(u, v), dict.fromkeys(u, params["logit_scale"])
    )
    du, dv = _microbatches((du, dv), count, pairs)
    return value, CachedTextGradients(
        images=du,
        captions=dv,
        log_scale=jax.tree.map(lambda x: jnp.broadcast_to(x / count, (count,)), ds),
    )


def _encoded(plan: Plan, params: Any, batch: Batch, crops: Any) -> tuple[Any, Any]:
    """(features of every pass, their pullback to the encoder's parameters)."""
    return jax.vjp(
        functools.partial(views.encode_passes, plan.config, plan.passes, batch, crops),
        params["encoder"],
    )


def _views_and_targets(
    plan: Plan, teachers: dict[str, Any], batch: Batch
) -> tuple[dict[int, jax.Array], TargetFeatures]:
    """(patches of every view, goals)."""
    crops = views.augmented_patches(plan.config, batch, plan.crops, exact=plan.exact)
    return crops, targets.target_features(plan, teachers, crops)


def objective_gradients(
    plan: Plan, params: Any, teachers: dict[str, Any], batch: Batch, weight: jax.Array
) -> tuple[Any, Metrics, tuple[jax.Array, jax.Array]]:
    """Gradients of L_ssp + weight * L_sp with one encoder backward.

    Args: plan: the terms and their settings. params: the parameter tree; `params["encoder"]` is
      f_theta, all else are heads. teachers: {"ema": tree, "frozen": tree} of the target encoders,
      as of `m3i.target_parts`; "shared" is made here. batch: one global batch, leading axis B.
      weight: lambda, a scalar that is a constant here.

    Returns:
      (gradients like params, metrics, (norm of dL_ssp/dz, norm of dL_sp/dz)).
    """
    config, heads = plan.config, {k: v for k, v in params.items() if k != "encoder"}
    count = config.train.microbatches
    teachers = {
        **teachers,
        "shared": jax.lax.stop_gradient(m3i.target_parts(config, plan.terms, params)),
    }
    tally, factors = term_losses.loss_weights(plan, batch)

    look = functools.partial(_views_and_targets, plan, teachers)

    def contribute(
        batch: Batch,
        crops: Any,
        goals: TargetFeatures,
        index: Any,
        cached: CachedTextGradients | None,
    ) -> tuple[Any, Any]:
        seen = TargetBundle(goals=goals, keys=keys, index=index, moments=moments)
        z, back = _encoded(plan, params, batch, crops)
        group = functools.partial(
            term_losses.group_loss, plan, factors=factors, batch=batch, seen=seen, cached=cached
        )
        (_, costs_ssp), (h_ssp, z_ssp) = jax.value_and_grad(group("ssp"), (0, 1), has_aux=True)(
            heads, z
        )
        (_, costs_sp), (h_sp, z_sp) = jax.value_and_grad(group("sp"), (0, 1), has_aux=True)(
            heads, z
        )
        blend = functools.partial(
            jax.tree.map, lambda a, b: (a.astype(jnp.float32) + weight * b).astype(a.dtype)
        )
        (encoder,) = back(blend(z_ssp, z_sp))
        squares = tuple(jnp.square(balance.feature_norm(g)) for g in (z_ssp, z_sp))
        return {"encoder": encoder, **blend(h_ssp, h_sp)}, (costs_ssp | costs_sp, squares)

    if count == 1:
        crops, goals = look(batch)
        keys, moments = goals, targets.target_moments(plan, goals)
        grads, (costs, squares) = contribute(batch, crops, goals, None, None)
    else:
        size = batch["mask"].shape[0]
        parts, rows = _microbatches((batch, jnp.arange(size)), count, size // 2)
        crops, goals = jax.lax.map(look, parts)
        keys = _whole(goals, count, size // 2)
        moments = targets.target_moments(plan, keys)
        whole: TermLosses = {}
        cached = None
        if plan.where("text") and config.objective.text_softmax == "batch":
            whole, cached = _cached_text_gradients(plan, params, batch, (parts, crops))

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, contribute(*part)), None

        xs = (parts, crops, goals, rows, cached)
        first = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(contribute, *jax.tree.map(lambda x: x[0], xs)),
        )
        (grads, (costs, squares)), _ = jax.lax.scan(add, first, xs)
        costs |= whole

    metrics = _losses(plan, costs, tally, factors) | _monitors(plan, keys, moments)
    return grads, metrics, (jnp.sqrt(squares[0]), jnp.sqrt(squares[1]))


def views_and_targets(
    plan: Plan, state: State, batch: Batch
) -> tuple[dict[int, jax.Array], TargetFeatures]:
    """(patches of every view, goals) of a batch: what with microbatches is made of all of them
    before the first is learned from."""
    shared = {
        "shared": jax.lax.stop_gradient(m3i.target_parts(plan.config, plan.terms, state.params))
    }
    return _views_and_targets(
        plan,
        target_encoders(state) | shared,
        views.with_mixup_draws(plan.config, plan.passes, batch),
    )


def loss_pullbacks(plan: Plan, state: State, batch: Batch) -> tuple[Any, list[Any]]:
    """(that of the encoder, those of each group of losses) for a batch that is one microbatch, as
    trees of the arrays that they keep: what lives from the forward pass to the backward is the
    first and one of the others."""
    crops, goals = views_and_targets(plan, state, batch)
    batch = views.with_mixup_draws(plan.config, plan.passes, batch)
    heads = {k: v for k, v in state.params.items() if k != "encoder"}
    seen = TargetBundle(
        goals=goals, keys=goals, index=None, moments=targets.target_moments(plan, goals)
    )
    z, back = _encoded(plan, state.params, batch, crops)
    _, factors = term_losses.loss_weights(plan, batch)
    group = functools.partial(
        term_losses.group_loss, plan, factors=factors, batch=batch, seen=seen, cached=None
    )
    return back, [jax.vjp(group(name), heads, z, has_aux=True)[1] for name in ("ssp", "sp")]


def _losses(
    plan: Plan, costs: TermLosses, tally: list[jax.Array], factors: list[jax.Array]
) -> Metrics:
    """loss/<group>, loss/<name>, info/<name> in bits a prediction, and the monitors of pooled
    targets."""
    out: Metrics = {}
    for group in ("ssp", "sp"):
        if mine := [i for i, t in enumerate(plan.terms) if t.group == group]:
            out[f"loss/{group}"] = sum((factors[i] * costs[i].sum for i in mine), jnp.zeros(()))
    for name in dict.fromkeys(t.name for t in plan.terms):
        mine = [i for i, t in enumerate(plan.terms) if t.name == name]
        count = jnp.maximum(sum(tally[i] for i in mine), 1)
        out[f"loss/{name}"] = sum((costs[i].sum for i in mine), jnp.zeros(())) / count
        evidence = jax.tree.map(lambda *x: sum(x[1:], x[0]), *(costs[i].evidence for i in mine))
        for monitor in ("alignment", "uniformity"):
            if monitor in evidence:
                key = f"collapse/{monitor}"
                out[f"{key}/{name}" if key in out else key] = evidence.pop(monitor) / count
        bits = plan.terms[mine[0]].posterior.bits(evidence, count)
        if bits is not None:
            out[f"info/{name}"] = bits
    return out


def _monitors(plan: Plan, goals: TargetFeatures, moments: dict[TargetKey, jax.Array]) -> Metrics:
    """Of the first learned target: standard deviation, share of its energy that varies, and the
    moment itself."""
    for goal in plan.goals:
        if targets.moment_key(goal) in moments and goal.target.learned:
            rows, moment = (
                goals[goal].reshape(-1, goals[goal].shape[-1]),
                moments[targets.moment_key(goal)],
            )
            mean_D = losses.layer_normalize(rows).mean(0)
            return {
                "collapse/target_std": collapse.target_std(rows),
                "collapse/spread": collapse.centered_energy(mean_D, moment),
                MOMENT: moment,
            }
    return {}


def target_encoders(state: State) -> dict[str, Any]:
    """The trees of the target encoders in a state."""
    out = {"ema": state.opt["target"].params}
    return out | ({"frozen": state.opt["frozen"].params} if "frozen" in state.opt else {})


def gradients_of(
    plan: Plan, state: State, batch: Batch
) -> tuple[Any, Metrics, tuple[jax.Array, jax.Array], jax.Array]:
    """(gradients, metrics, norms, lambda) of a state, with lambda from its statistics so far."""
    settings = plan.config.objective
    batch = views.with_mixup_draws(plan.config, plan.passes, batch)
    lam = jnp.asarray(settings.gamma, jnp.float32)
    if settings.weighting == "dynamic":
        lam = balance.balance_weight(
            state.opt["balance"],
            gamma=settings.gamma,
            limits=(settings.balance_range[0], settings.balance_range[1]),
        )
    return *objective_gradients(plan, state.params, target_encoders(state), batch, lam), lam


def train_step(
    plan: Plan, tx: optax.GradientTransformationExtraArgs, state: State, batch: Batch
) -> tuple[State, Metrics]:
    """One optimizer step on one global batch. A step whose loss or gradient is not finite, or a
    spike that is to be skipped, changes nothing but `step`, and says so."""
    grads, metrics, norms, lam = gradients_of(plan, state, batch)
    updates, opt = tx.update(grads, state.opt, state.params, feature_grad_norms=norms)
    params = optax.apply_updates(state.params, updates)

    loss = metrics.get("loss/ssp", jnp.zeros(())) + lam * metrics.get("loss/sp", jnp.zeros(()))
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    (params, opt), skipped = spikes.skip_update(
        (state.params, state.opt),
        (params, opt),
        loss,
        grad_norm,
        finite,
        plan.config.optim.skip_spikes,
    )
    metrics |= {
        "loss": loss, "grad_norm": grad_norm, "balance/lambda": lam, "balance/ssp_norm": norms[0], "balance/sp_norm": norms[1],
    } | skipped  # fmt: skip
    return State(step=state.step + 1, params=params, opt=opt), metrics


def panel_outputs(plan: Plan, state: State, batch: Batch) -> dict[str, jax.Array]:
    """What a panel shows of a batch: the input of the first pass, and for every dense term the
    predicted features beside their target; predicted pixels as an image, with the mean and
    deviation of the true patch."""
    config = plan.config
    batch = views.with_mixup_draws(config, plan.passes, batch)
    trees = target_encoders(state) | {"shared": m3i.target_parts(config, plan.terms, state.params)}
    crops = views.augmented_patches(config, batch, plan.crops, exact=plan.exact)
    goals = targets.target_features(plan, trees, crops)
    first = plan.passes[0]
    out = {
        "input": views.encoder_input(config, first, 0, batch, crops)["patches"],
        "input_view": views.image_rows(config, first, "own", crops[first.crop]),
    }
    places = tuple(i for i in plan.dense if plan.terms[i].target.encoder != "online")
    z = views.encode_passes(config, plan.passes, batch, crops, state.params["encoder"])
    for i, prediction in term_losses.predictions(plan, state.params, z, batch, places).items():
        term = plan.terms[i]
        assert term.target.crop is not None
        goal = term_losses.rows_of_image(plan, term, goals[plan.goal(term)]).astype(jnp.float32)
        target = targets.normalize_target(term, goal)
        if term_losses.predicts_hidden_only(term):  # what the input shows need not be predicted
            cells = term_losses.hidden_index(plan, term, batch)
            prediction = target.at[jnp.arange(cells.shape[0])[:, None], cells].set(
                prediction.astype(target.dtype)
            )
        out[f"{term.name}/view"] = term_losses.rows_of_image(plan, term, crops[term.target.crop])
        if term.target.of == "pixels":
            out[f"{term.name}/picture"] = prediction * goal.std(
                -1, ddof=1, keepdims=True
            ) + goal.mean(-1, keepdims=True)
        else:
            out[f"{term.name}/prediction"] = prediction.astype(jnp.float32)
            out[f"{term.name}/target"] = target
    return out

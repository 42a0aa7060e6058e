"""The one train step: a pure function (state, batch) -> (state, metrics), whatever the objective.

    targets first, without gradient          z_y = f_EMA(clean views)
    encoder once, kept as a pullback          z, back = vjp(f_theta, input)
    each group its loss and its gradients     L_ssp, dz_ssp      L_sp, dz_sp
    lambda from the statistics so far         lambda = gamma * |dz_ssp| / |dz_sp|                 M3I Eq. 13
    one encoder backward                      back(dz_ssp + lambda * dz_sp)
    the optimizer chain                       balance -> clip -> adamw -> target

k microbatches of B/k give the result of one batch of B: every loss is divided by the count of the whole batch, C is taken over all targets
before, the norms are roots of summed squares, and the text softmax spans the batch through embeddings computed once more.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from m3i_jax import parallel
from m3i_jax.models import m3i
from m3i_jax.objective import balance, posterior, regularize
from m3i_jax.objective.methods import Pass
from m3i_jax.training import terms, views
from m3i_jax.training.state import State
from m3i_jax.training.terms import Cached, Plan, Sums
from m3i_jax.training.views import Batch

Metrics = dict[str, jax.Array]
MOMENT = "moment"  # the one metric that is a matrix: its eigenvalues are worth a look only when a line is written


def _microbatches(tree: Any, count: int) -> Any:
    """[B, ...] -> [k, B/k, ...] in pairs dealt out like cards: each device keeps its rows, and partners stay together on any mesh."""

    def one(x: jax.Array) -> jax.Array:
        dealt = x.reshape(x.shape[0] // (2 * count), count, 2, *x.shape[1:]).swapaxes(0, 1)
        return parallel.hint(dealt.reshape(count, -1, *x.shape[1:]), None, parallel.DATA)

    return jax.tree.map(one, tree)


def _encode(plan: Plan, batch: Batch, crops: dict[int, jax.Array], encoder: Any) -> dict[Pass, jax.Array]:
    inputs = views.encoder_inputs(plan.config, plan.passes, batch, crops)
    return {read: m3i.encode(plan.config, encoder, arguments.pop("patches"), **arguments) for read, arguments in inputs.items()}


def _text_gradients(plan: Plan, params: Any, parts: Any) -> tuple[Sums, Cached]:
    """The text terms over all rows of all microbatches: their sums, and their gradients at every embedding."""

    def embed(_: None, part: Any) -> tuple[None, Any]:
        batch, crops = part
        vectors = terms.pooled(plan, params, _encode(plan, batch, crops, params["encoder"]), batch)
        return None, terms.embeddings(plan, params, vectors, batch)

    _, (images, captions) = jax.lax.scan(embed, None, parts)
    flat = functools.partial(jax.tree.map, lambda x: x.reshape(-1, *x.shape[2:]))
    rows, count = flat(parts[0]), parts[0]["mask"].shape[0]

    def sums(u: Sums, v: dict[int, jax.Array], s: dict[int, jax.Array]) -> tuple[jax.Array, Sums]:
        out = {i: terms.text_sums(plan, {i: u[i]}, v[i], s[i], rows)[i] for i in u}
        return sum(out.values(), jnp.zeros(())), out

    u, v = flat(images), flat(captions)
    (_, value), (du, dv, ds) = jax.value_and_grad(sums, (0, 1, 2), has_aux=True)(
        u, dict.fromkeys(u, v), dict.fromkeys(u, params["logit_scale"])
    )
    back = functools.partial(jax.tree.map, lambda x: x.reshape(count, -1, *x.shape[1:]))
    spread = jax.tree.map(lambda x: jnp.broadcast_to(x / count, (count,)), ds)
    return value, Cached(images=back(du), captions=back(dv), log_scale=spread)


def gradients(
    plan: Plan, params: Any, target_encoder: Any, batch: Batch, weight: jax.Array
) -> tuple[Any, Metrics, tuple[jax.Array, jax.Array]]:
    """Gradients of L_ssp + weight * L_sp with one encoder backward.

    Args:
      plan: the terms and their settings.
      params: the parameter tree; `params["encoder"]` is f_theta, all else are heads.
      target_encoder: the tree of f_EMA.
      batch: one global batch, leading axis B.
      weight: lambda, a scalar that is a constant here.

    Returns:
      (gradients like params, metrics, (norm of dL_ssp/dz, norm of dL_sp/dz)).
    """
    config, heads = plan.config, {k: v for k, v in params.items() if k != "encoder"}
    count = config.train.microbatches
    tally, factors = terms.scales(plan, batch)

    def look(batch: Batch) -> tuple[dict[int, jax.Array], dict[int, jax.Array]]:
        crops = views.patches(config, batch, plan.crops)
        return crops, terms.targets(plan, target_encoder, crops)

    def contribute(batch: Batch, crops: Any, features: Any, cached: Cached | None) -> tuple[Any, Any]:
        z, back = jax.vjp(functools.partial(_encode, plan, batch, crops), params["encoder"])
        group = functools.partial(terms.group_loss, plan, factors=factors, moment=moment, batch=batch, features=features, cached=cached)
        (_, sums_ssp), (h_ssp, z_ssp) = jax.value_and_grad(group("ssp"), (0, 1), has_aux=True)(heads, z)
        (_, sums_sp), (h_sp, z_sp) = jax.value_and_grad(group("sp"), (0, 1), has_aux=True)(heads, z)
        blend = functools.partial(jax.tree.map, lambda a, b: (a.astype(jnp.float32) + weight * b).astype(a.dtype))
        (encoder,) = back(blend(z_ssp, z_sp))
        squares = tuple(jnp.square(balance.feature_norm(g)) for g in (z_ssp, z_sp))
        return {"encoder": encoder, **blend(h_ssp, h_sp)}, (sums_ssp | sums_sp, squares)

    if count == 1:
        crops, features = look(batch)
        moment = terms.second_moment(plan, features)
        grads, (sums, squares) = contribute(batch, crops, features, None)
    else:
        parts = _microbatches(batch, count)
        crops, features = jax.lax.map(look, parts)
        moment = terms.second_moment(plan, features)
        whole: Sums = {}
        cached = None
        if plan.where("text") and config.objective.text_softmax == "batch":
            whole, cached = _text_gradients(plan, params, (parts, crops))

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, contribute(*part)), None

        first = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(contribute, *jax.tree.map(lambda x: x[0], (parts, crops, features, cached))),
        )
        (grads, (sums, squares)), _ = jax.lax.scan(add, first, (parts, crops, features, cached))
        sums |= whole

    metrics = _losses(plan, sums, tally, factors) | _monitors(features, moment)
    return grads, metrics, (jnp.sqrt(squares[0]), jnp.sqrt(squares[1]))


def _losses(plan: Plan, sums: Sums, tally: list[jax.Array], factors: list[jax.Array]) -> Metrics:
    out: Metrics = {}
    for group in ("ssp", "sp"):
        if mine := [i for i, t in enumerate(plan.terms) if t.group == group]:
            out[f"loss/{group}"] = sum((factors[i] * sums[i] for i in mine), jnp.zeros(()))
    for name in {t.name for t in plan.terms}:
        mine = [i for i, t in enumerate(plan.terms) if t.name == name]
        out[f"loss/{name}"] = sum((sums[i] for i in mine), jnp.zeros(())) / jnp.maximum(sum(tally[i] for i in mine), 1)
    return out


def _monitors(features: dict[int, jax.Array], moment: jax.Array | None) -> Metrics:
    if moment is None:
        return {}
    first = next(iter(features.values()))
    return {"collapse/target_std": regularize.target_std(first.reshape(-1, moment.shape[0])), MOMENT: moment}


def train_step(plan: Plan, tx: optax.GradientTransformationExtraArgs, state: State, batch: Batch) -> tuple[State, Metrics]:
    """One optimizer step on one global batch. A step whose loss or gradient is not finite changes nothing but `step`, and says so."""
    settings = plan.config.objective
    statistics = state.opt["balance"]
    lam = jnp.asarray(settings.gamma, jnp.float32)
    if settings.weighting == "dynamic":
        lam = balance.weight(statistics, gamma=settings.gamma, limits=(settings.balance_range[0], settings.balance_range[1]))
    grads, metrics, norms = gradients(plan, state.params, state.opt["target"].params, batch, lam)
    updates, opt = tx.update(grads, state.opt, state.params, feature_grad_norms=norms)
    params = optax.apply_updates(state.params, updates)

    loss = metrics.get("loss/ssp", jnp.zeros(())) + lam * metrics.get("loss/sp", jnp.zeros(()))
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    params, opt = jax.tree.map(lambda new, old: jnp.where(finite, new, old), (params, opt), (state.params, state.opt))
    metrics |= {
        "loss": loss, "grad_norm": grad_norm, "balance/lambda": lam, "balance/ssp_norm": norms[0], "balance/sp_norm": norms[1],
        "skipped/not_finite": 1.0 - finite,
    }  # fmt: skip
    return State(step=state.step + 1, params=params, opt=opt), metrics


def look_inside(plan: Plan, state: State, batch: Batch) -> dict[str, jax.Array]:
    """What a panel shows of a batch: the input of the first pass, and predicted against target features of every dense term."""
    crops = views.patches(plan.config, batch, plan.crops)
    features = terms.targets(plan, state.opt["target"].params, crops)
    inputs = views.encoder_inputs(plan.config, plan.passes, batch, crops)
    out = {"input": inputs[plan.passes[0]]["patches"], "input_view": crops[plan.passes[0].crop]}
    predictions = terms.dense_predictions(plan, state.params, _encode(plan, batch, crops, state.params["encoder"]), batch)
    for i, prediction in predictions.items():
        term = plan.terms[i]
        assert term.target.crop is not None
        own = term.image == "own"
        swap = (lambda x: x) if own else terms.mixing.partner
        out[f"{term.name}/prediction"] = prediction.astype(jnp.float32)
        out[f"{term.name}/target"] = posterior.layer_normalize(swap(features[term.target.crop]).astype(jnp.float32))
        out[f"{term.name}/view"] = swap(crops[term.target.crop])
    return out

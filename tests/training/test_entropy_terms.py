"""Entropy terms in the trainer: whole losses of the rows that have them against numpy (float64),
joined rows, microbatches, devices and errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import parallel
from m3i_jax.errors import UserError
from m3i_jax.models import heads, m3i
from m3i_jax.objective import entropy_terms, registry
from m3i_jax.objective.entropy_terms import EntropyTerm, Koleo, Uniformity
from m3i_jax.objective.posteriors import TextSigmoid
from m3i_jax.objective.terms import FULL, MASKED, MIXED, Pass, ProjectionHead, pooled_term
from m3i_jax.training import entropy_losses, plan_table, trainer
from tests import toy
from tests.objective import entropy_reference as reference
from tests.training.forward import forward, plan_of

OTHER = Pass(view=1)
HEAD = {"model__head__hidden": 20, "model__head__width": 6}


def projected(got, read):
    """Float64 projections of a pass, from its features."""
    head, z = got.plan.entropy_terms[0].head, got.z[read]
    x = z[:, 0] if head.pool == "cls" else np.asarray(z[:, 1:], np.float32).mean(1)
    y = heads.apply_projector(got.plan.config.model, got.params["heads"]["global"], head, x)
    return np.asarray(y, np.float64)


def test_vicreg_is_its_formula():
    got = forward(plan_of("vicreg", **HEAD))
    a, b = projected(got, FULL), projected(got, OTHER)
    variance = 12.5 * sum(
        np.maximum(0, 1 - np.sqrt(x.var(0, ddof=1) + 1e-4)).mean() for x in (a, b)
    )
    c = [np.cov(x.T) for x in (a, b)]
    covariance = sum((m**2).sum() - (np.diag(m) ** 2).sum() for m in c) / a.shape[1]
    expected = 25 * ((a - b) ** 2).mean() + variance + covariance
    assert got.losses["loss/ssp"] == pytest.approx(expected, rel=1e-4)
    assert got.losses["loss/global"] == pytest.approx(25 * ((a - b) ** 2).mean(), rel=1e-4)
    both = np.mean([reference.variance_covariance(x) for x in (a, b)])
    assert got.losses["loss/variance_covariance"] == pytest.approx(both, rel=1e-4)
    assert got.losses["entropy/variance_covariance"] < 0 and "info/global" in got.losses


@pytest.mark.parametrize("small", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_lejepa_is_its_formula(small):
    """All views around the mean of the large ones; the statistic of each."""
    views = {"data__small_views": (f"{small} x 16 at 0.2-0.5",)} if small else {}
    got = forward(plan_of("lejepa", **HEAD, **views))
    passes = [FULL, OTHER, *(Pass(view=2 + k) for k in range(small))]
    every = [projected(got, read) for read in passes]
    centre = (every[0] + every[1]) / 2
    invariance = np.mean([((centre - x) ** 2).mean() for x in every])
    key = entropy_losses.entropy_key(got.plan.config.seed, got.batch)
    drawn = np.asarray(jax.random.normal(key, (6, 256)), np.float64)
    slices = drawn / np.linalg.norm(drawn, axis=0)
    statistic = np.mean([reference.sigreg(x, slices) for x in every])
    assert got.losses["loss/ssp"] == pytest.approx(0.98 * invariance + 0.02 * statistic, rel=1e-4)
    assert got.losses["loss/sigreg"] == pytest.approx(statistic, rel=1e-4)
    assert "entropy/sigreg" not in got.losses


def test_simdino_is_its_formula():
    """Without small views: the mean cosine of two pairs, and the rate of both online views."""
    got = forward(plan_of("simdino", **HEAD))
    online = {0: projected(got, FULL), 1: projected(got, OTHER)}
    target = {}
    for view in (0, 1):
        (found,) = [x for key, x in got.targets.items() if key.target.view == view]
        target[view] = reference.unit(np.asarray(found, np.float64))
    pairs = [(reference.unit(online[a]) * target[1 - a]).sum(1).mean() for a in (0, 1)]
    rate = -np.mean([reference.coding_rate(x, eps=0.05, scaled=True) for x in online.values()])
    assert got.losses["loss/ssp"] == pytest.approx(1 - np.mean(pairs) - rate, rel=1e-4)
    bits = -np.mean([reference.coding_rate(x, eps=0.05) for x in online.values()]) / np.log(2)
    assert got.losses["entropy/coding_rate"] == pytest.approx(bits, rel=1e-4)


def test_siglip_is_its_formula():
    """Beside CLIP, whose temperature is another number; images without a caption count nowhere."""
    got = forward(plan_of("clip,siglip"))
    assert [t.group for t in got.plan.terms] == ["sp", "sp"]
    scalars = got.params["scalars"]["text_siglip"]
    from m3i_jax.training import predictions

    vectors = predictions.pool_images(got.plan, got.params, got.z, got.inputs)
    images, captions = predictions.contrastive_embeddings(got.plan, got.params, vectors, got.batch)
    keep = np.asarray(got.batch["length"]) > 0
    u, v = (np.asarray(x, np.float64)[keep] for x in (images[1], captions))
    expected = reference.text_sigmoid(
        u, v, float(scalars["logit_scale"]), float(scalars["logit_bias"])
    )
    assert got.losses["loss/text_siglip"] == pytest.approx(expected, rel=1e-4)
    assert got.losses["info/text_siglip"] < np.log2(keep.sum())
    assert set(got.params["scalars"]) == {"text_siglip"} and "logit_scale" in got.params


def test_siglip_starts_at_the_published_scalars():
    config = plan_of("siglip").config
    terms = plan_of("siglip").terms
    params = jax.eval_shape(
        lambda: m3i.init(config, jax.random.key(0), terms, classes=0, vocabulary=toy.VOCABULARY)
    )
    assert set(params["scalars"]["text"]) == {"logit_scale", "logit_bias"}
    assert "logit_scale" not in params and "category" not in params
    assert TextSigmoid().scalars == {"logit_scale": pytest.approx(2.302585), "logit_bias": -10}


@pytest.mark.parametrize(("row", "hidden"), [("siglip2", 0.25), ("tips", 2.0)])
def test_joined_rows_are_their_parts(row, hidden):
    """Pairs, SigLIP 2's captions, small views and hidden cells; the last two share one head and
    their weight."""
    views = {"data__small_views": ("2 x 16 at 0.2-0.5",)}
    plan = plan_of(row, **HEAD, **views)
    weights = {t.name: 0.0 for t in plan.terms}
    for t in plan.terms:
        weights[t.name] += t.weight
    captions = {"caption": 1} if row == "siglip2" else {}
    assert weights == {"text": 1, **captions, "global": 1, "dense": hidden}
    groups = {"text": "sp", "global": "ssp", "dense": "ssp"} | dict.fromkeys(captions, "sp")
    assert {t.name: t.group for t in plan.terms} == groups
    assert [t.reads.view for t in plan.terms if t.name == "global"] == [2, 3]
    assert len(plan.target_passes) == 1 and not plan.entropy_terms
    assert (type(plan.terms[0].posterior).__name__ == "TextSigmoid") == (row == "siglip2")


def test_a_row_of_entropy_alone_joins_any_other():
    """It reads the first pass of the objective and adds its weight to the whole loss."""
    plan = plan_of("byol,koleo", **HEAD)
    (term,) = plan.entropy_terms
    assert term.reads == FULL and plan.passes == plan_of("byol", **HEAD).passes
    both = forward(plan)
    alone = forward(plan_of("byol", **HEAD), batch=both.batch, params=both.params)
    koleo = reference.koleo(np.asarray(both.z[FULL][:, 0], np.float64))
    assert both.losses["loss/koleo"] == pytest.approx(koleo, rel=1e-4)
    assert both.losses["loss/ssp"] == pytest.approx(
        alone.losses["loss/ssp"] + 0.1 * koleo, rel=1e-5
    )
    assert plan_of("sim,koleo").entropy_terms[0].reads == MASKED
    assert plan_of("m3i,koleo").entropy_terms[0].reads == MIXED


def test_a_row_of_entropy_alone_weighs_the_same_without_small_views():
    """A tenth of the predictions that are left: of SigLIP 2, those of hidden cells."""
    for small in ((), ("2 x 16 at 0.2-0.5",)):
        plan = plan_of("siglip2,koleo", data__small_views=small, **HEAD)
        kept = sum(t.weight for t in plan.terms if t.group == "ssp")
        assert kept == pytest.approx(1.25 if small else 0.25)
        assert sum(t.weight for t in plan.entropy_terms) == pytest.approx(0.1 * kept)


def test_every_token_of_a_small_view_counts_once():
    """Beside those of a large one, which has four times as many."""
    tokens = ProjectionHead(name="tokens", pool="none")
    rows = tuple(
        EntropyTerm(
            name=f"uniform_{read.view}", estimator=Uniformity(), reads=read, head=tokens, weight=0.5
        )
        for read in (FULL, Pass(view=2))
    )
    pairs = tuple(pooled_term(read, 1) for read in (FULL, Pass(view=2)))
    registry.register_form("uniform_tokens", (*pairs, *rows))
    got = forward(plan_of("uniform_tokens", data__small_views=("1 x 16 at 0.2-0.5",), **HEAD))
    total = got.losses["loss/global"]
    for view in (0, 2):
        z = np.asarray(got.z[Pass(view=view)], np.float64)[:, 1:]
        assert z.shape[1] == (16 if view == 0 else 4)
        wanted = reference.uniformity(z.reshape(-1, z.shape[-1]))
        assert got.losses[f"loss/uniform_{view}"] == pytest.approx(wanted, rel=1e-4)
        total += 0.5 * wanted / 2
    assert got.losses["loss/ssp"] == pytest.approx(total, rel=1e-4)


def test_joined_rows_keep_their_own_spaces_and_names():
    plan = plan_of("byol,vicreg,lejepa,koleo", **HEAD)
    assert {t.name: t.head.name for t in plan.entropy_terms} == {
        "variance_covariance": "global_vicreg",
        "sigreg": "global_vicreg",  # of equal shape: rows with gradient through both share it
        "koleo": "global",
    }
    registry.register_form(
        "koleo_of_16",
        (EntropyTerm(name="koleo", estimator=Koleo(group=16), weight=2.0),),
    )
    names = [t.name for t in plan_of("byol,koleo,koleo_of_16", train__batch_size=16).entropy_terms]
    assert names == ["koleo", "koleo_koleo_of_16"]


def test_symmetric_exchanges_views_and_keeps_the_balance():
    plan = plan_of("vicreg", objective__symmetric=True)
    assert [(t.reads.view, t.weight) for t in plan.entropy_terms] == [(0, 1.0), (1, 1.0)]
    assert sum(t.weight for t in plan.terms) == 2
    assert plan_of("vicreg", objective__second_group="variance_covariance").entropy_terms[
        0
    ].group == ("sp")


@pytest.mark.parametrize("form", ["lejepa", "simdino", "byol,koleo"])
def test_symmetric_changes_no_row_with_both_directions(form):
    """Also where the target is the mean of both views, which is the same one exchanged; KoLeo, of
    one view before, is of both."""
    small = {"data__small_views": ("2 x 16 at 0.05-0.3",)} if form == "lejepa" else {}
    once, again = (plan_of(form, objective__symmetric=s, **small) for s in (False, True))
    assert again.terms == once.terms
    totals = [sum(t.weight for t in each.entropy_terms) for each in (once, again)]
    assert totals[1] == pytest.approx(totals[0])
    of_views = {t.reads.view: t.weight for t in again.entropy_terms}
    assert of_views[0] == of_views[1]


def test_show_lists_them_with_their_products():
    plan = plan_of("vicreg", **HEAD)
    rows = plan_table.term_rows(plan)
    assert [row[0] for row in rows] == ["loss/global"] + ["loss/variance_covariance"] * 2
    assert rows[1][3:6] == (
        "entropy",
        "mean of the tokens in the projection global",
    ) + ("VarianceCovariance",)
    assert entropy_terms.entropies_of(registry.form("vicreg")) == tuple(
        dataclasses.replace(t) for t in plan.entropy_terms
    )


@pytest.mark.parametrize(
    ("forms", "changes", "message"),
    [
        ("koleo", {}, "koleo has entropy terms alone; join it to an objective"),
        ("supervised,koleo", {}, "koleo has entropy terms alone"),
        ("byol,koleo", {"model__encoder__cls_token": False}, "needs the cls token"),
        (
            "dinov2",
            {"train__batch_size": 72},
            "72 rows do not divide into the groups of 64 of the entropy term koleo",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(forms, changes, message):
    with pytest.raises(UserError, match=message) as error:
        plan_of(forms, **changes)
    assert "\n" not in str(error.value) and str(error.value).startswith("config.")


def test_terms_that_contradict_themselves_are_refused():
    with pytest.raises(ValueError, match="without a predictor"):
        EntropyTerm(name="a", estimator=Koleo(), head=pooled_term(FULL, 1).head)
    head = dataclasses.replace(pooled_term(FULL, 1).head, predictor=None)
    registry.register_form(
        "other_space",
        (pooled_term(FULL, 1), EntropyTerm(name="a", estimator=Koleo(), head=head)),
    )
    assert plan_of("other_space").entropy_terms[0].head.name == "global"
    registry.register_form(
        "unknown_space",
        (
            pooled_term(FULL, 1),
            EntropyTerm(
                name="a", estimator=Koleo(), head=dataclasses.replace(head, name="elsewhere")
            ),
        ),
    )
    with pytest.raises(UserError, match="reads the space 'elsewhere', which no prediction"):
        plan_of("unknown_space")
    registry.register_form(
        "unknown_pass",
        (pooled_term(FULL, 1), EntropyTerm(name="a", estimator=Koleo(), reads=OTHER)),
    )
    with pytest.raises(UserError, match="reads a pass that no prediction reads"):
        plan_of("unknown_pass")


def test_the_key_is_that_of_the_step():
    def data(low, high=0, seed=0):
        batch = {"position": jnp.asarray([[high, low], [high, low + 1]], jnp.uint32)}
        return tuple(jax.random.key_data(entropy_losses.entropy_key(seed, batch)).tolist())

    assert len({data(4), data(6), data(4, high=1), data(4, seed=1)}) == 4


def gradients(forms, second_group, parts=1):
    config = toy.settings(
        objective__forms=forms,
        objective__second_group=second_group,
        objective__weighting="fixed",
        objective__gamma=2.0,
        model__encoder__depth=1,
        model__text__depth=1,
        train__microbatches=parts,
        **HEAD,
    )
    one = trainer.Trainer(config, parallel.make_mesh((1, 1, 1), jax.devices()[:1]), toy.VOCABULARY)
    state = one.init()
    run = jax.jit(one.task.gradients)
    return jax.device_get(run(state.params, state.opt, toy.batch(config)))


@pytest.mark.parametrize("parts", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_each_text_term_is_in_the_loss_of_its_group_alone(parts):
    """CLIP in the first group, SigLIP in the second, of twice the weight: the loss and its gradient
    are the sum of both; in one group they are their mean, twice."""
    split = gradients("clip,siglip", "category,text_siglip", parts)
    clip, siglip = (split.metrics[f"loss/{name}"] for name in ("text", "text_siglip"))
    assert split.loss == pytest.approx(clip + 2 * siglip, rel=1e-5)
    clip = gradients("clip", "category", parts).grads["encoder"]
    together = gradients("clip,siglip", "category,text,text_siglip", parts).grads["encoder"]
    for got, first, mean in zip(
        *map(jax.tree.leaves, (split.grads["encoder"], clip, together)), strict=True
    ):
        wanted = 2 * mean - first  # clip + siglip, of which clip is half as heavy
        np.testing.assert_allclose(got, wanted, atol=2e-5 * max(np.abs(wanted).max(), 1e-4))


def test_a_group_of_entropy_alone_is_part_of_the_loss():
    got = gradients("byol,koleo", "koleo")
    koleo = got.metrics["loss/koleo"]
    assert got.metrics["loss/sp"] == pytest.approx(got.metrics["loss/koleo"] * 0.1 * 2, rel=1e-5)
    assert got.loss == pytest.approx(got.metrics["loss/global"] + 2 * 0.2 * koleo, rel=1e-4)


# --- steps of the trainer
def step(forms, shape=(1, 1, 1), **changes):
    config = toy.settings(objective__forms=forms, model__encoder__depth=1, **HEAD, **changes)
    devices = jax.devices()[: int(np.prod(shape))]
    one = trainer.Trainer(config, parallel.make_mesh(shape, devices), toy.VOCABULARY)
    state = one.init()
    for k in range(2):  # the warm-up begins with a rate of 0
        batch = parallel.to_global(one.mesh, toy.batch(config, k))
        state, metrics = one.step(state, batch)
    return {k: float(v) for k, v in metrics.items() if v.ndim == 0}


@pytest.mark.slow
@pytest.mark.parametrize("forms", ["vicreg,koleo", "lejepa", "simdino", "siglip", "coca,cappa"])
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_eight_devices_are_one(forms, shape):
    one = step(forms)
    assert step(forms, shape) == pytest.approx(one, rel=2e-4, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("forms", ["siglip", "mim,koleo"])
def test_microbatches_are_one_batch(forms):
    """Of all pairs of SigLIP, and of an entropy term that sees the rows of the whole batch."""
    one = step(forms)
    assert step(forms, train__microbatches=2) == pytest.approx(one, rel=1e-4, abs=1e-6)
    if forms == "siglip":
        return
    parts = step(forms, train__microbatches=2, objective__entropy_rows="microbatch")
    assert parts["loss/koleo"] < one["loss/koleo"] - 0.01  # fewer rows have farther neighbours

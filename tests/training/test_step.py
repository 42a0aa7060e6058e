"""The one train step against plain automatic differentiation, against itself in parts, and on other
meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import parallel
from m3i_jax.models import decoder, m3i, text
from m3i_jax.objective import losses as loss_functions
from m3i_jax.objective import mixing, positions, terms
from m3i_jax.objective.posteriors import Boltzmann
from m3i_jax.objective.terms import MIXED
from m3i_jax.training import plan, pretrain_task, term_losses, trainer, views
from tests import toy
from tests.training.forward import HEAD, forward, loss_arguments, plan_of

LAMBDA = 0.7


@functools.cache
def made(form: str, **changes: object) -> tuple[trainer.Trainer, object]:
    config = toy.settings(objective__forms=form, **changes)
    one = trainer.Trainer(config, parallel.make_mesh((1, 1, 1), jax.devices()[:1]), toy.VOCABULARY)
    return one, one.init()


@functools.cache
def program(form: str, **changes: object):
    """(gradients, metrics, norms) of (parameters, teachers, batch), compiled once."""
    task_plan = made(form, **changes)[0].task.plan
    return jax.jit(
        lambda p, t, b: pretrain_task.objective_gradients(task_plan, p, t, b, jnp.float32(LAMBDA))
    )


@functools.cache
def gradients(form: str, **changes: object):
    one, state = made(form, **changes)
    run = program(form, **changes)
    return run(state.params, teachers(one, state), toy.batch(one.config))


def teachers(one: trainer.Trainer, state) -> dict:
    """Other trees than the online encoder's."""
    parts = m3i.target_parts(one.config, one.task.plan.terms, jax.device_get(state.params))
    return {
        "ema": jax.tree.map(lambda a: a * np.float32(0.9), parts),
        "frozen": jax.tree.map(lambda a: a * np.float32(1.1), parts),
    }


def with_shared(one: trainer.Trainer, trees: dict, params) -> dict:
    parts = m3i.target_parts(one.config, one.task.plan.terms, params)
    return {**trees, "shared": jax.lax.stop_gradient(parts)}


def difference(a, b) -> float:
    """Largest difference of two trees, each leaf relative to its largest entry; leaves of pure
    rounding noise against a floor."""
    a, b = jax.device_get((a, b))  # by numpy: jax would compile every operation for every shape
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(b))
    return max(
        float(np.abs(x - y).max() / (np.abs(y).max() + 1e-4 * scale))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


ALSO = [
    pytest.param(form, marks=pytest.mark.slow) for form in ("sim,supervised,clip", "supervised")
]
PLAIN = [pytest.param(p.values[0], {}, marks=pytest.mark.slow, id=p.values[0]) for p in ALSO]
# InternImage: mixed, and masked without a partner, where hidden cells are filled.
CONVOLVED = [
    pytest.param(form, toy.INTERN, marks=pytest.mark.slow, id=f"intern_image,{form}")
    for form in ("m3i", "sim")
]


@pytest.mark.parametrize(("form", "changes"), [("m3i", {}), *PLAIN, *CONVOLVED])
def test_one_backward_is_the_gradient_of_the_plain_sum(form: str, changes: dict) -> None:
    one, state = made(form, **changes)
    batch, trees = toy.batch(one.config), teachers(one, state)

    def plain(params, batch):
        arguments, z = loss_arguments(one.task.plan, params, with_shared(one, trees, params), batch)
        heads = {k: v for k, v in params.items() if k != "encoder"}
        return sum(
            w * term_losses.group_loss(one.task.plan, g, **arguments)(heads, z)[0]
            for g, w in (("ssp", 1.0), ("sp", LAMBDA))
        )

    want = jax.jit(jax.grad(plain))(state.params, batch)
    got, metrics, _ = gradients(form, **changes)
    assert difference(got, want) < 1e-5
    assert all(np.isfinite(v).all() for v in metrics.values())


def test_norms_are_those_of_the_two_losses_at_the_encoder_output() -> None:
    one, state = made("m3i")
    batch, trees = toy.batch(one.config), teachers(one, state)

    def at_output(batch):
        arguments, z = loss_arguments(
            one.task.plan, state.params, with_shared(one, trees, state.params), batch
        )
        return [
            jax.grad(
                lambda z, g=g: term_losses.group_loss(one.task.plan, g, **arguments)(
                    state.params, z
                )[0]
            )(z)
            for g in ("ssp", "sp")
        ]

    want = [
        float(np.sqrt(sum(float(np.square(x).sum()) for x in jax.tree.leaves(g))))
        for g in jax.device_get(jax.jit(at_output)(batch))
    ]
    np.testing.assert_allclose([float(n) for n in gradients("m3i")[2]], want, rtol=1e-5)


@pytest.mark.parametrize(
    "form", ["m3i", pytest.param("sim,densecl", marks=pytest.mark.slow), ALSO[0]]
)
@pytest.mark.row("D6")
def test_microbatches_are_the_whole_batch(form: str) -> None:
    whole, metrics, norms = gradients(form)
    parts, metrics_4, norms_4 = gradients(form, train__microbatches=4)
    assert difference(parts, whole) < 2e-5
    for name, value in metrics.items():
        if name != "collapse/uniformity":  # the one that is of the images of a part
            np.testing.assert_allclose(metrics_4[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(norms_4, norms, rtol=2e-5)


@pytest.mark.parametrize("pairing", ["flip", "halves"])
def test_a_mixed_input_points_at_the_target_of_its_own_image(pairing: str) -> None:
    term = terms.pooled_term(
        MIXED, 1, image="partner", posterior=Boltzmann(temperature=0.5), head=terms.ProjectionHead()
    )
    got = forward(plan_of((term,), objective__pairing=pairing, **HEAD))
    p = mixing.gather(got.z[MIXED][:, 1:], got.inputs[MIXED].other).mean(1)
    index = jnp.arange(8) ^ 1 if pairing == "flip" else jnp.arange(1, 8, 2)
    total, count = loss_functions.boltzmann(
        p, got.targets[got.plan.target_key(term)], index, temperature=0.5
    )
    assert got.losses["loss/global"] == pytest.approx(float(total / count), rel=1e-4)


CAPTIONS = {"objective__equal_captions": "ignored"}


@pytest.mark.parametrize("pairing", ["flip", pytest.param("halves", marks=pytest.mark.slow)])
def test_captions_in_chunks_and_microbatches_are_the_whole_batch(pairing: str) -> None:
    """Their softmax spans 16 captions through cached embeddings, 4 of them at a time; equal
    captions are no negatives."""
    changes = {**CAPTIONS, "objective__pairing": pairing}
    whole, metrics, _ = gradients("clip", **changes)
    parts, metrics_4, _ = gradients(
        "clip", **changes, train__microbatches=2, objective__text_chunk=5
    )
    assert difference(parts, whole) < 2e-5
    np.testing.assert_allclose(metrics_4["loss/text"], metrics["loss/text"], rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "names", "full"])
@pytest.mark.row("D6")
def test_what_the_backward_computes_again_changes_nothing(remat: str) -> None:
    whole, metrics, _ = gradients("m3i")
    again, metrics_again, _ = gradients("m3i", model__remat=remat, model__scan=True)
    assert difference(again, whole) < 1e-5
    np.testing.assert_allclose(
        float(metrics_again["loss/ssp"]), float(metrics["loss/ssp"]), rtol=1e-6
    )


def test_every_tower_computes_again_by_the_same_setting() -> None:
    counts = {}
    for remat in ("none", "names"):
        one = trainer.Trainer(
            toy.settings(model__remat=remat),
            parallel.make_mesh((1, 1, 1), jax.devices()[:1]),
            toy.VOCABULARY,
        )
        program = jax.make_jaxpr(jax.grad(functools.partial(all_towers, one)))(one.template.params)
        counts[remat] = sum(
            equation.primitive.name in ("checkpoint", "remat2") for equation in program.eqns
        )
    # two blocks of the encoder, one of the decoder, one of the text tower
    assert counts == {"none": 0, "names": 4}


def all_towers(one: trainer.Trainer, params):
    """A number that goes through the blocks of all of them."""
    config, batch = one.config, toy.batch(one.config)
    z = m3i.encode(config, params["encoder"], jnp.ones((2, 16, 192)))
    query = decoder.decoder_queries(
        config.model,
        params["decoder"],
        jnp.asarray(positions.same_view_positions(config.grid, config.model.decoder.width)),
    )
    rows = decoder.apply(
        config.model,
        params["decoder"],
        z[:, 1:9],
        jnp.arange(16).reshape(2, 8),
        query,
        grid=config.grid,
    )
    captions = text.apply(config.model, params["text"], batch["tokens"], batch["length"])
    return rows.sum() + captions.sum()


def test_microbatch_softmax_is_another_loss() -> None:
    whole, _, _ = gradients("clip", **CAPTIONS, objective__pairing="flip")
    parts, _, _ = gradients(
        "clip",
        **CAPTIONS,
        objective__pairing="flip",
        train__microbatches=4,
        objective__text_softmax="microbatch",
    )
    assert difference(parts["text"], whole["text"]) > 1e-3


def test_losses_are_averages_over_those_that_have_an_annotation() -> None:
    one, _ = made("m3i")
    batch = toy.batch(one.config)
    inputs = views.pass_inputs(one.config, one.task.plan.passes, batch)
    counts, weights = term_losses.loss_weights(one.task.plan, inputs)
    names = [t.name for t in one.task.plan.terms]
    labels, captions = int((batch["label"] >= 0).sum()), int((batch["length"] > 0).sum())
    assert [int(counts[names.index(n)]) for n in ("intra", "category", "text")] == [
        16 * 16,
        labels,
        captions,
    ]
    # L_sp = (n_c L_category + n_t L_text) / (n_c + n_t), each loss being the mean of its two roles
    np.testing.assert_allclose(weights[names.index("category")], 1 / (2 * (labels + captions)))
    np.testing.assert_allclose(weights[names.index("inter")], 0.5 / (16 * 16))


def test_missing_annotations_do_not_enter() -> None:
    one, state = made("m3i")
    batch = toy.batch(one.config)
    other = {**batch, "tokens": batch["tokens"].copy()}
    other["tokens"][batch["length"] == 0] = 7
    trees = teachers(one, state)
    run = lambda b: program("m3i")(state.params, trees, b)[1]["loss/sp"]
    assert float(run(batch)) == float(run(other))
    bare = {
        **batch,
        "label": np.full_like(batch["label"], -1),
        "length": np.zeros_like(batch["length"]),
    }
    assert float(run(bare)) == 0.0


def test_hidden_positions_count_only_what_the_input_hides() -> None:
    plan_of_all = plan_of("m3i")
    assert plan_of_all.config.objective.intra_positions == "all"
    everything = forward(plan_of_all)
    plan_of_hidden = plan_of("m3i", objective__intra_positions="hidden")
    hidden = forward(plan_of_hidden, everything.batch, everything.params).losses
    assert everything.losses["loss/inter"] == pytest.approx(hidden["loss/inter"], rel=1e-6)
    assert everything.losses["loss/intra"] != pytest.approx(hidden["loss/intra"], rel=1e-4)


def test_sim_with_equal_views_is_masked_image_modelling() -> None:
    """SiameseIM whose target view is the input view, geometry and pixels, is dense MIM: one
    decoder, identity positions."""
    plans = plan_of("sim"), plan_of("mim")
    batch = toy.batch(plans[0].config)
    other = forward(plans[0], batch).losses["loss/ssp"]
    batch = {**batch, **{k: np.repeat(batch[k][:, :1], 2, 1) for k in ("views", "box", "flip")}}
    sim = forward(plans[0], batch)
    mim = forward(plans[1], batch, sim.params).losses["loss/ssp"]
    assert sim.losses["loss/ssp"] == pytest.approx(mim, rel=1e-5)
    assert other != pytest.approx(mim, rel=1e-4)


def test_dynamic_weighting_uses_the_statistics_before_the_step() -> None:
    one = on_one_device()
    batch = parallel.to_global(one.mesh, toy.batch(one.config))
    state, first = one.step(one.init(), batch)
    assert float(first["balance/lambda"]) == 2.0  # gamma, until both norms were seen
    state, second = one.step(state, batch)
    assert float(second["balance/lambda"]) == pytest.approx(
        2.0 * float(first["balance/ssp_norm"]) / float(first["balance/sp_norm"]), rel=1e-5
    )
    assert float(state.opt["balance"].ssp) == pytest.approx(
        0.99 * float(first["balance/ssp_norm"]) + 0.01 * float(second["balance/ssp_norm"]), rel=1e-5
    )


def on_mesh(mesh_shape: tuple[int, int, int], devices: int, **changes: object) -> trainer.Trainer:
    config = toy.settings(train__batch_size=16, **changes)
    mesh = parallel.make_mesh(mesh_shape, jax.devices()[:devices])
    return trainer.Trainer(config, mesh, toy.VOCABULARY)


def losses(one: trainer.Trainer, steps: int) -> tuple[list[float], object]:
    state, out = one.init(), []
    for k in range(steps):
        state, metrics = one.step(state, parallel.to_global(one.mesh, toy.batch(one.config, k)))
        out.append(float(metrics["loss"]))
    return out, state


COLOUR = {
    "data__augment__jitter_p": 0.8,
    "data__augment__grayscale_p": 0.2,
    "data__augment__blur_p": (1.0, 0.1),
    "data__augment__solarize_p": (0.0, 0.2),
    "objective__gamma": 2.0,
}


@functools.cache
def on_one_device() -> trainer.Trainer:
    """With colour and a dynamic weight; its step is compiled once for three tests."""
    return on_mesh((1, 1, 1), 1, **COLOUR)


@functools.cache
def losses_of_one_device() -> list[float]:
    return losses(on_one_device(), 8)[0]


@pytest.mark.slow  # eight devices with data and parameters split are below
@pytest.mark.row("D6")
def test_eight_devices_are_one_device() -> None:
    """With colour, stochastic depth, missing annotations and a dynamic weight: all that could
    depend on where a row lives."""
    eight, _ = losses(on_mesh((-1, 1, 1), 8, **COLOUR), 8)
    np.testing.assert_allclose(eight, losses_of_one_device(), rtol=1e-6)


@pytest.mark.slow
def test_eight_devices_are_one_device_with_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data parallel, and with parameters and products split: DCNv3's groups among them."""
    monkeypatch.setattr(parallel.sharding, "SMALL", 1)
    one, _ = losses(on_mesh((1, 1, 1), 1, **toy.INTERN), 5)
    eight, _ = losses(on_mesh((-1, 1, 1), 8, **toy.INTERN), 5)
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    sharded, state = losses(on_mesh((2, 2, 2), 8, **toy.INTERN), 5)
    np.testing.assert_allclose(sharded, one, rtol=5e-5)
    split = {
        parallel.sharding.path_text(path)
        for path, x in jax.tree_util.tree_leaves_with_path(state.params["encoder"])
        if x.sharding.shard_shape(x.shape) != x.shape
    }
    wanted = ("dcn/input", "dcn/output", "dcn/offsets", "mlp/fc1", "mlp/fc2")
    assert {f"stage3/layers/{name}/kernel" for name in wanted} | {
        "fusion/deep/kernel",
        "stage2/down/conv/kernel",
    } <= split


@pytest.mark.row("D6")
def test_sharded_parameters_are_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel.sharding, "SMALL", 1)  # or nothing of a toy would be worth a split
    sharded, state = losses(on_mesh((2, 2, 2), 8, **COLOUR), 6)
    # split products add up in another order
    np.testing.assert_allclose(sharded, losses_of_one_device()[:6], rtol=2e-5)
    split = [
        x
        for x in jax.tree.leaves((state.params, state.opt))
        if x.sharding.shard_shape(x.shape) != x.shape
    ]
    assert len(split) > 50


def test_plan_shares_passes() -> None:
    made_plan = plan.Plan(toy.settings(), terms.FORMS["m3i"])
    assert len(made_plan.passes) == 1 and [
        (p.encoder, p.view) for p in made_plan.target_passes
    ] == [
        ("ema", 0),
        ("ema", 1),
    ]
    one, _ = made("m3i")
    counted = {"encoder": 0, "decoder": 0}
    original = {"encoder": m3i.encode, "decoder": decoder.apply}

    def spy(name):
        def call(*a, **k):
            counted[name] += 1
            return original[name](*a, **k)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m3i, "encode", spy("encoder"))
        patch.setattr(decoder, "apply", spy("decoder"))
        jax.eval_shape(one.trace, one.template, toy.batch(one.config))
    # the mixed input once, both clean views in one target call; one decoder call
    assert counted == {"encoder": 2, "decoder": 1}

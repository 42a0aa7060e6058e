"""Captioners as rows: the decoder and every loss against numpy (float64), with gradients by finite
differences, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax.errors import UserError
from m3i_jax.models import captioner
from m3i_jax.objective.terms import FULL
from m3i_jax.training import plan_table, term_losses, unused_settings, views
from tests import toy
from tests.training.forward import forward, plan_of

TEXTS = {"tokens": "s", "length": "_length"}


def norm(x, scale, bias=0.0):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale + bias


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attend(q, k, v, heads, allowed):
    """Of one caption: [L, W] queries, [T, W] keys and values."""
    out = []
    for h in range(heads):
        at = slice(h * q.shape[1] // heads, (h + 1) * q.shape[1] // heads)
        scores = q[:, at] @ k[:, at].T / np.sqrt(q.shape[1] // heads)
        out.append(softmax(np.where(allowed, scores, -np.inf)) @ v[:, at])
    return np.concatenate(out, 1)


def decode(params, tokens, memory, parallel, heads=2):
    """Logits of one caption by the published text: no biases in the blocks, tanh GELU."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    steps = len(tokens) - 1
    inputs = np.full(steps, len(p["token_table"]) - 1) if parallel else tokens[:-1]
    x = p["token_table"][inputs] + p["positions"][:steps]
    causal = np.ones((steps, steps), bool) if parallel else np.tril(np.ones((steps, steps), bool))
    for layer in range(len(p["blocks"]["qkv"]["kernel"])):
        b = jax.tree.map(lambda a, n=layer: a[n], p["blocks"])
        q, k, v = np.split(norm(x, b["norm1"]["scale"]) @ b["qkv"]["kernel"], 3, 1)
        x = x + attend(q, k, v, heads, causal) @ b["attention_out"]["kernel"]
        q = norm(x, b["norm2"]["scale"]) @ b["query"]["kernel"]
        k, v = np.split(memory @ b["key_value"]["kernel"], 2, 1)
        x = x + attend(q, k, v, heads, True) @ b["cross_out"]["kernel"]
        h = norm(x, b["norm3"]["scale"]) @ b["fc1"]["kernel"]
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + h @ b["fc2"]["kernel"]
    x = norm(x, p["norm"]["scale"], p["norm"]["bias"])
    return x @ p["logits"]["kernel"] + p["logits"]["bias"]


def nll_of(params, batch, memory, parallel):
    """The costs of the tokens of every caption, a list of arrays."""
    out = []
    for row, length in enumerate(np.asarray(batch["length"])):
        tokens = np.asarray(batch["tokens"][row])
        logits = decode(params, tokens, memory[row], parallel[row])
        picked = softmax(logits)[np.arange(len(tokens) - 1), tokens[1:]]
        out.append(-np.log(picked[: max(length - 1, 0)]))
    return out


@pytest.fixture(scope="module")
def got():
    return forward(plan_of("coca,cappa,cap,locca", data__regions=True))


def test_rows_are_their_formulas(got) -> None:
    """Of one decoder: CoCa's mean over tokens, that of the others over captions and texts of
    objects, and their sum with the weights of images, of which two have no caption, two no
    object."""
    memory = np.asarray(got.z[FULL][:, 1:], np.float64)
    drawn = np.asarray(views.parallel_captions(got.plan.config, got.batch["position"], 0.75))
    assert 0 < drawn.sum() < len(drawn)
    params = got.params["captioner"]
    causal = nll_of(params, got.batch, memory, np.zeros(len(drawn), bool))
    mixed = nll_of(params, got.batch, memory, drawn)
    real = [n for n in causal if len(n)]
    assert len(real) == len(causal) - 2
    tokens = np.concatenate(real)
    of_cap = np.mean([n.mean() for n in real])
    of_cappa = np.mean([n.mean() for n in mixed if len(n)])
    assert got.losses["loss/caption"] == pytest.approx(tokens.mean(), rel=1e-4)
    assert got.losses["loss/caption_cappa"] == pytest.approx(of_cappa, rel=1e-4)
    assert got.losses["loss/caption_cap"] == pytest.approx(of_cap, rel=1e-4)
    half = np.asarray(views.parallel_captions(got.plan.config, got.batch["position"], 0.5))
    of_locca = np.mean([n.mean() for n in nll_of(params, got.batch, memory, half) if len(n)])
    captions = got.losses["loss/text"] + 2 * tokens.mean() + of_cappa + of_cap + of_locca
    total = len(real) * captions
    for task, name in enumerate(("box", "region")):
        texts = {key: got.batch[f"region{end}"][:, task] for key, end in TEXTS.items()}
        costs = nll_of(params, texts, memory, np.zeros(len(drawn), bool))
        given = np.asarray(got.batch["region_given"][:, task])
        of_objects = [n[g - 1 :].mean() for n, g in zip(costs, given, strict=True) if len(n)]
        assert len(of_objects) == len(drawn) - 2
        assert got.losses[f"loss/{name}"] == pytest.approx(np.mean(of_objects), rel=1e-4)
        total += np.sum(of_objects)
    images = 6 * len(real) + 2 * (len(drawn) - 2)
    assert got.losses["loss/sp"] == pytest.approx(total / images, rel=1e-4)
    bits = tokens / np.log(2)
    assert got.losses["bits/caption/token"] == pytest.approx(bits.mean(), rel=1e-4)
    assert got.losses["bits/caption_cap/image"] == pytest.approx(bits.sum() / len(real), rel=1e-4)
    at_once = np.concatenate([n for n, chosen in zip(mixed, drawn, strict=True) if chosen])
    assert got.losses["bits/caption_cappa/parallel_token"] == pytest.approx(
        at_once.mean() / np.log(2), rel=1e-4
    )


def test_gradients_are_finite_differences_of_the_formula(got) -> None:
    """Along random directions of all parameters of the decoder and of the features."""
    memory = np.asarray(got.z[FULL][:, 1:], np.float64)
    drawn = np.asarray(views.parallel_captions(got.plan.config, got.batch["position"], 0.75))
    term = got.plan.terms[2]
    assert term.name == "caption_cappa"

    @jax.jit
    def gradients(params, memory):
        def loss(params, memory):
            tokens, parallel = got.batch["tokens"], jnp.asarray(drawn)
            logits = captioner.apply(got.plan.config.model, params, tokens, memory, parallel)
            where = term_losses.token_weight(term, got.inputs[FULL])
            given = term_losses.LossInputs(parallel=parallel)
            cost = term.posterior.cost(logits, tokens[:, 1:], where, given)
            return cost.sum / cost.count

        return jax.grad(loss, (0, 1))(params, memory)

    r, tree = np.random.default_rng(3), (got.params["captioner"], memory)
    found = gradients(tree[0], jnp.asarray(memory, jnp.float32))
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), tree)
    for _ in range(2):
        step = jax.tree.map(lambda a: r.normal(size=a.shape), wide)

        def value(eps, step=step):
            params, features = jax.tree.map(lambda a, d: a + eps * d, wide, step)
            nll = nll_of(params, got.batch, features, drawn)
            return np.mean([n.mean() for n in nll if len(n)])

        slope = (value(1e-5) - value(-1e-5)) / 2e-5
        parts = jax.tree.map(lambda g, d: float(np.vdot(g, d)), found, step)
        assert sum(jax.tree.leaves(parts)) == pytest.approx(slope, rel=1e-3)


def test_logits_start_at_zero_so_that_a_token_costs_log_of_the_vocabulary() -> None:
    config = plan_of("cappa").config
    params = captioner.init(config.model, jax.random.key(0), vocabulary=300, length=8)
    tokens, memory = np.ones((2, 8), int), np.ones((2, 4, 32), np.float32)
    assert not np.asarray(captioner.apply(config.model, params, tokens, memory)).any()
    with pytest.raises(ValueError, match="there are 7 positions"):
        captioner.apply(config.model, params, np.ones((2, 9), int), memory)
    with pytest.raises(ValueError, match="3 captions and 2 images"):
        captioner.apply(config.model, params, np.ones((3, 8), int), memory)


def test_parallel_captions_are_a_share_of_the_images_and_a_setting() -> None:
    config = toy.settings()
    position = np.stack([np.zeros(4000), np.arange(4000)], 1).astype(np.uint32)
    drawn = np.asarray(views.parallel_captions(config, jnp.asarray(position), 0.75))
    assert abs(drawn.mean() - 0.75) < 0.03
    assert views.parallel_captions(config, jnp.asarray(position), 0.0) is None


def test_rows_with_the_same_share_are_one() -> None:
    def shares(forms: str, **changes) -> list[float]:
        terms = plan_of(forms, **changes).terms
        return [t.posterior.parallel for t in terms if t.target.of == "caption"]

    assert shares("cap,cappa") == [0, 0.75]
    assert shares("cap,cappa,siglip2", objective__parallel_captions=0.25) == [0.25]


def test_a_joined_row_reads_the_input_of_the_first() -> None:
    """Both images of a mixed input have their own caption, whose decoder reads their own cells."""
    plan = plan_of("m3i,cappa")
    assert [t.image for t in plan.terms if t.name == "caption"] == ["own", "partner"]
    assert len(plan.passes) == 1
    assert ("loss/caption", "view 0 mixed with the partner", "partner", "caption") in {
        row[:4] for row in plan_table.term_rows(plan)
    }
    assert plan_of("coca").where("caption", group="sp") == (1,)
    # not the small or the masked view of the self-distillation
    both = plan_of("siglip2,locca", data__regions=True, data__small_views="2 x 16 at 0.2-0.5")
    texts = [t for t in both.terms if t.group == "sp"]
    assert [t.name for t in texts] == ["text", "caption", "box", "region"]
    assert {t.reads for t in texts} == {FULL}


@pytest.mark.parametrize(
    ("forms", "changes", "words"),
    [
        ("cappa", {"data__captions": "no"}, ("cappa", "annotations that this data does not have")),
        (
            "supervised",
            {"data__source": "folder", "data__path": "x", "data__classes": 0},
            ("this data does not have", "a folder has categories from two sub-folders"),
        ),
        ("locca", {"data__captions": "no"}, ("locca", "captions, or data.regions for boxes")),
        ("m3i,cap", {"objective__annotation_input": "own"}, ("annotation_input",)),
        ("cap", {"model__captioner__heads": 5}, ("model.captioner.heads", "divide the width")),
    ],
)
def test_what_does_not_fit_is_one_line(forms, changes, words) -> None:
    with pytest.raises(UserError) as error:
        plan_of(forms, **changes)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value) and str(error.value).startswith("config.")


def test_a_share_that_no_row_reads_is_refused() -> None:
    config = toy.settings(objective__parallel_captions=0.5)
    with pytest.raises(UserError, match="objective.parallel_captions: 0.5 has no effect"):
        unused_settings.reject_unused_settings(config, [("mim",)])
    unused_settings.reject_unused_settings(config, [("mim", "cappa")])
    with pytest.raises(UserError, match="data.regions: True has no effect.*as in locca"):
        unused_settings.reject_unused_settings(toy.settings(data__regions=True), [("cappa",)])

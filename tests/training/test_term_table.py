"""The rows of Table 1 as plans: the paper's letters, shared passes, refusals; and each trains."""

import jax
import numpy as np
import pytest

from m3i_jax import parallel, published_settings
from m3i_jax.errors import UserError
from m3i_jax.objective import derived_terms, registry, terms
from m3i_jax.objective import published as published_methods
from m3i_jax.objective.terms import FULL, MASKED, Pass, pooled_term, token_term
from m3i_jax.training import trainer
from tests import toy
from tests.training.forward import plan_of

NEEDS = {
    "milan": {"objective__target_checkpoint": "x"},
    "feature_distillation": {"objective__target_checkpoint": "x"},
    "distill": {"objective__target_checkpoint": "x"},
    "capi": {"data__mask": "inverse_block", "data__mask_ratio": 0.625},
    "ijepa": {"data__mask": "multi_block", "data__mask_ratio": 0.75},
    "locca": {"data__regions": True},
    "dinov3_gram": {"objective__snapshot_at": (0.01,)},  # before it the term has no weight
}
ROWS = [*terms.FORMS, *published_methods.PUBLISHED]


def test_the_letters_are_the_rows_of_the_papers_tables() -> None:
    """Table 3: a-f predict the own view, g-l another one; b, e, h, k dense features; c, f, i, l a
    global one; d-f and j-l are masked."""
    for letter, name in terms.LETTERS.items():
        if len(letter) > 1:
            continue
        (term,) = terms.FORMS[name]
        at = "abcdefghijkl".index(letter)
        assert (term.target.view, term.reads.masked) == (int(at >= 6), at % 6 >= 3), letter
        assert term.target.of == ("pixels", "tokens", "pooled")[at % 3], letter
        assert term.target.encoder == ("identity", "ema", "ema")[at % 3], letter
        assert (type(term.posterior).__name__ == "Boltzmann") == (letter in "chil"), letter
    assert [t.target.of for t in terms.FORMS[terms.LETTERS["ic"]]] == ["category"]


@pytest.mark.slow
@pytest.mark.parametrize("row", [*ROWS, "byol,moco_v3"])
def test_every_row_trains(row: str) -> None:
    changes = NEEDS.get(row, {})
    if row in published_methods.PUBLISHED:
        settings = published_settings.SETTINGS[row]
        kept = (
            "decoder.positions",
            "decoder.cls",
            "decoder.norm",
            "decoder.projector_depth",
            "pool.kind",
        )
        changes = changes | {
            f"model__{k.replace('.', '__')}": settings[f"model.{k}"]
            for k in kept
            if f"model.{k}" in settings
        }
    plan = plan_of(row, **changes)
    one = trainer.Trainer(
        plan.config, parallel.make_mesh((1, 1, 1), jax.devices()[:1]), toy.VOCABULARY
    )
    state = jax.jit(one._create)()  # a frozen target stays the copy that it starts as
    state, first = one.step(state, toy.batch(plan.config))
    state, second = one.step(state, toy.batch(plan.config))
    for name, value in second.items():
        assert np.isfinite(value).all(), name
    trained = max(float(metrics["grad_norm"]) for metrics in (first, second))
    assert trained > 0 and float(second["skipped/not_finite"]) == 0
    assert any(name.startswith("info/") for name in first) or row == "barlow_twins"


def test_sets_share_passes() -> None:
    assert [t.name for t in plan_of("mim,clip").terms] == ["intra", "text"]
    assert plan_of("mim,clip").passes == (MASKED,)
    assert plan_of("mim,clip", objective__annotation_input="own").passes == (FULL, MASKED)
    both = plan_of("sim,supervised,clip")
    assert both.passes == (MASKED,) and [(p.encoder, p.view) for p in both.target_passes] == [
        ("ema", 1)
    ]
    with pytest.raises(UserError, match="m3i and m3i are the same objective; name it once"):
        plan_of("m3i,m3i")
    assert {
        t.image
        for t in derived_terms.merge(terms.FORMS["m3i"][:2], terms.FORMS["supervised"])
        if t.name == "category"
    } == {
        "own",
        "partner",
    }
    assert plan_of("instance,dense_instance").target_passes == (("ema", 1, 1, 1),)


def test_annotations_of_two_images_are_one_term_where_the_input_shows_one() -> None:
    """Both categories of a blended image, joined to a masked view of a single one."""
    joined = derived_terms.merge(registry.form("mae"), registry.form("finetune"))
    assert [(t.name, t.reads) for t in joined] == [("pixel", MASKED), ("category", MASKED)]


def test_annotations_of_a_row_that_reads_one_input_have_none_of_their_own() -> None:
    with pytest.raises(UserError, match="config.objective.annotation_input: 'own'.*sim,supervised"):
        plan_of("m3i", objective__annotation_input="own")
    assert plan_of("supervised", objective__annotation_input="own").passes == (FULL,)


def test_the_feature_of_an_image_is_what_the_objective_compares() -> None:
    """cls, where images are compared by it alone; the pooling, where annotations train it."""
    found = {
        forms: plan_of(forms).image_feature
        for forms in (
            "dino",
            "dinov2,dinov3_gram",
            "moco_v3",
            "byol",
            "byol,dino",
            "mim",
            "mim,clip",
        )
    }
    assert found == {
        "dino": "cls",
        "dinov2,dinov3_gram": "cls",
        "moco_v3": "cls",
        "byol": "mean",
        "byol,dino": "mean",
        "mim": "mean",
        "mim,clip": "attention",
    }


def test_a_target_with_a_gradient_is_a_pass_of_its_own() -> None:
    plan = plan_of("simclr")
    assert plan.passes == (FULL, Pass(view=1)) and plan.target_passes == ()


def test_second_group_is_any_set_of_names() -> None:
    assert [t.group for t in plan_of("instance,mim", objective__second_group="global").terms] == [
        "sp",
        "ssp",
    ]


@pytest.mark.parametrize(
    ("forms", "changes", "words"),
    [
        ("sim", {"model__decoder__positions": "absolute"}, ("model.decoder.positions", "relative")),
        ("milan", {}, ("objective.target_checkpoint", "workdir")),
        ("msn", {"model__encoder__cls_token": False}, ("cls token",)),
        (
            "clip",
            {"model__encoder__cls_token": False, "model__pool__kind": "cls"},
            ("model.pool.kind", "cls token"),
        ),
        ("beit", {}, ("'beit' is not here", "discrete VAE")),
        (
            "m3i",
            {"objective__isolate": True, "data__mask_ratio": 0.25},
            ("objective.isolate", "0.5"),
        ),
    ],
)
def test_what_cannot_go_together_is_refused(
    forms: str, changes: dict, words: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as error:
        plan_of(forms, **changes)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), (
        error.value
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: Pass(masked=True, mixed=True),
        lambda: Pass(mask_tokens=True),
        lambda: terms.Target(of="tokens"),
        lambda: terms.Target(of="pixels", view=0, encoder="ema"),
        lambda: terms.Target(of="tokens", view=0),
        lambda: token_term(FULL, 0, image="partner"),
        lambda: token_term(FULL, 0, head=terms.PooledHead()),
        lambda: pooled_term(FULL, 0, head=terms.DecoderHead()),
    ],
)
def test_rows_that_mean_nothing_cannot_be_written(make) -> None:
    with pytest.raises(ValueError):
        make()

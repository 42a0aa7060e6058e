"""What a run is made of before its first step: its length, its terms, the shapes of a batch and of
the state."""

import dataclasses
import functools
import pathlib
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import config as configuration
from m3i_jax import parallel, schema
from m3i_jax.errors import UserError
from m3i_jax.models import m3i
from m3i_jax.training import checkpoint, frozen_target, plan, step, trainer
from tests import toy


def config(
    *,
    size: int = 100,
    batch: int = 10,
    steps: int = 0,
    epochs: float = 3.0,
    warm_steps: int = -1,
    warm_epochs: float = 1.0,
):
    return schema.Config(
        data=schema.Data(size=size),
        train=schema.Train(batch_size=batch, steps=steps, epochs=epochs),
        optim=schema.Optim(warmup_steps=warm_steps, warmup_epochs=warm_epochs),
    )


def with_data(settings: schema.Config, **changes: object) -> schema.Config:
    return dataclasses.replace(settings, data=dataclasses.replace(settings.data, **changes))


@pytest.mark.parametrize(
    ("changes", "wanted"),  # (steps an epoch, steps, warm-up)
    [
        ({}, (10, 30, 10)),
        ({"size": 109}, (10, 30, 10)),  # the last nine images of an epoch wait for another epoch
        ({"size": 110}, (11, 33, 11)),
        ({"size": 99}, (9, 27, 9)),
        ({"epochs": 2.5}, (10, 25, 10)),
        ({"epochs": 0.01, "warm_epochs": 0.0}, (10, 1, 0)),  # at least one step
        ({"steps": 17}, (10, 17, 10)),  # steps win over epochs
        ({"warm_steps": 4}, (10, 30, 4)),  # and over epochs of warm-up
        ({"warm_steps": 0}, (10, 30, 0)),
        ({"warm_epochs": 0.25}, (10, 30, 2)),
        ({"warm_epochs": 3.0}, (10, 30, 30)),  # all of the run
        # 28.999999999999996 and 56.99999999999999 in floating point
        ({"size": 1000, "epochs": 0.29, "warm_epochs": 0.0}, (100, 29, 0)),
        ({"size": 1000, "warm_epochs": 0.57}, (100, 300, 57)),
        # nothing is counted in epochs: less than a batch of images is enough
        ({"size": 6, "steps": 5, "warm_steps": 2}, (0, 5, 2)),
    ],
)
def test_length(changes: dict, wanted: tuple[int, int, int]) -> None:
    got = trainer.run_length(config(**changes))
    assert (got.steps_per_epoch, got.steps, got.warmup) == wanted


def test_length_golden() -> None:
    """Table 7: 1600 epochs of ImageNet-1k at 4096 images, 40 of them warm-up."""
    got = trainer.run_length(schema.Config(data=schema.Data(size=1_281_167)))
    assert got == trainer.RunLength(steps_per_epoch=312, steps=499_200, warmup=12_480)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 9}, ("config.train.batch_size: 10", "9 training images", "at most 8")),
        # the warm-up is still counted in epochs
        ({"size": 9, "steps": 5}, ("config.train.batch_size",)),
        ({"size": 9, "warm_steps": 1}, ("config.train.batch_size",)),
        ({"warm_epochs": 4.0}, ("config.optim.warmup_epochs: 4.0", "40 steps", "30")),
        ({"warm_steps": 31}, ("config.optim.warmup_steps: 31", "30 steps")),
        ({"steps": 9}, ("config.optim.warmup_epochs: 1.0", "10 steps", "9")),
    ],
)
def test_an_impossible_length_names_its_key(changes: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        trainer.run_length(config(**changes))
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_plan_leaves_out_what_the_data_does_not_have() -> None:
    both = toy.settings()
    names = lambda c: [t.name for t in plan.build_plan(c).terms]
    assert names(both) == ["intra", "inter", "category", "text", "category", "text"]
    assert names(with_data(both, captions="no")) == ["intra", "inter", "category", "category"]
    assert names(with_data(both, classes=0)) == ["intra", "inter", "text", "text"]
    assert names(with_data(both, classes=0, captions="no")) == ["intra", "inter"]


def test_plan_passes_on_which_positions_count() -> None:
    hidden = {
        t.name: t.hidden
        for t in plan.build_plan(toy.settings(objective__intra_positions="hidden")).terms
    }
    assert hidden == {"intra": True, "inter": False, "category": False, "text": False}


@pytest.mark.parametrize(
    ("form", "changes", "words"),
    [
        (
            "nonsense",
            {},
            ("config.objective.forms: 'nonsense' is not one of auto_encoder, dense_distillation",),
        ),
        ("clip", {"captions": "no"}, ("config.objective.forms: clip", "captions")),
        ("supervised", {"classes": 0}, ("config.objective.forms: supervised", "categories")),
    ],
)
def test_a_form_that_cannot_be_trained_is_refused(
    form: str, changes: dict, words: tuple[str, ...]
) -> None:
    settings = toy.settings()
    settings = dataclasses.replace(
        settings, objective=dataclasses.replace(settings.objective, forms=(form,))
    )
    with pytest.raises(UserError) as error:
        plan.build_plan(with_data(settings, **changes))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("captions", ["yes", "no"])
def test_the_abstract_batch_has_the_shapes_of_a_batch(captions: str) -> None:
    settings = with_data(toy.settings(), captions=captions)
    got, batch = trainer.abstract_batch(settings), toy.batch(settings)
    assert {k: (v.shape, v.dtype) for k, v in got.items()} == {
        k: (v.shape, v.dtype) for k, v in batch.items()
    }
    assert ("tokens" in got) == (captions == "yes")


@functools.cache
def made() -> trainer.Trainer:
    return trainer.Trainer(toy.settings(), parallel.make_mesh((2, 2, 2)), toy.VOCABULARY)


@functools.cache
def initial() -> Any:
    return made().init()


def test_the_template_is_the_initial_state() -> None:
    one = made()
    state = initial()
    assert (
        jax.tree.structure(one.template)
        == jax.tree.structure(state)
        == jax.tree.structure(one.shardings)
    )
    for template, leaf, sharding in zip(
        *map(jax.tree.leaves, (one.template, state, one.shardings)), strict=True
    ):
        assert (template.shape, template.dtype) == (leaf.shape, leaf.dtype)
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert int(state.step) == 0 and {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {
        jnp.dtype("float32")
    }
    jax.tree.map(
        np.testing.assert_array_equal,
        state.opt["target"].params["encoder"],
        state.params["encoder"],
    )
    assert all(not np.asarray(moment).any() for moment in jax.tree.leaves(state.opt["adamw"]))


def test_a_run_traces_its_step_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The initial state and that after a step have the same types and shardings; a second trace
    would be a second compilation of the run."""
    chex.clear_trace_counter()
    monkeypatch.setattr(step, "train_step", chex.assert_max_traces(step.train_step, n=1))
    settings = toy.settings(objective__forms="mim", model__encoder__depth=1)
    one = trainer.Trainer(settings, parallel.make_mesh((1, 2, 1), jax.devices()[:2]), 0)
    state = one.init()
    for k in range(3):
        state, _ = one.step(state, parallel.to_global(one.mesh, toy.batch(settings, k)))
    assert int(state.step) == 3


def test_the_schedules_have_the_length_of_the_run() -> None:
    one = made()  # 20 steps, 2 of them warm-up
    assert [float(one.learning_rate(k)) for k in (1, 2, 20)] == pytest.approx([5e-4, 1e-3, 0.0])
    assert [one.scheduled(k)["ema"] for k in (0, 10, 20)] == pytest.approx([0.9, 0.95, 1.0])


def block(width: int, hidden: int) -> int:
    return 4 * width * width + 4 * width + 2 * width * hidden + hidden + width + 4 * width


def test_number_of_parameters_by_part() -> None:
    """Widths 32 (towers) and 24 (pool), patches of 8 x 8 x 3, 5 classes, 300 words, captions of 8,
    joint space 16."""
    wanted = {
        "encoder": 2 * block(32, 128) + (192 + 1) * 32 + 32,  # blocks, patch embedding, cls token
        # block, embed and head, position map, mask token
        "decoder": block(32, 128) + 2 * (32 + 1) * 32 + (64 + 1) * 32 + 32,
        "pool": 3 * (32 + 1) * 32 + (32 + 1) * 24 + 3 * 2 * 32,  # query, key, value; out; norms
        "category": (24 + 1) * 5,
        "image_projection": 24 * 16,
        # block, tokens, positions, norm, projection
        "text": block(32, 128) + 300 * 32 + 8 * 32 + 2 * 32 + 32 * 16,
        "logit_scale": 1,
    }
    assert dict(m3i.parameter_table(made().template.params)) == wanted


@pytest.mark.parametrize(
    ("form", "heads"),
    [
        ("supervised", {"pool", "category"}),
        ("clip", {"pool", "image_projection", "text", "logit_scale"}),
        ("mim", {"decoder"}),
        ("instance", {"heads"}),
    ],
)
def test_annotations_that_no_term_predicts_have_no_head(form: str, heads: set[str]) -> None:
    one = trainer.Trainer(toy.settings(objective__forms=form), made().mesh, toy.VOCABULARY)
    assert set(one.template.params) - {"encoder"} == heads


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The working directory of a run that saved its first state."""
    directory = tmp_path_factory.mktemp("teacher")
    saver = checkpoint.Checkpoints(directory / "checkpoints", 1)
    saver.save(3, initial(), {"samples_seen": 0})
    saver.wait()
    saver.close()
    (directory / "config.txt").write_text(configuration.config_to_text(toy.settings()))
    return directory


def test_a_frozen_target_starts_from_another_run(teacher: pathlib.Path) -> None:
    settings = toy.settings(
        objective__forms="milan", objective__target_checkpoint=str(teacher), seed=7
    )
    one = trainer.Trainer(settings, made().mesh, toy.VOCABULARY)
    state = one.init()
    wanted = initial().params["encoder"]
    jax.tree.map(np.testing.assert_array_equal, state.opt["frozen"].params["encoder"], wanted)
    assert jax.tree.structure(state) == jax.tree.structure(one.template)
    # the student has another seed
    assert not np.array_equal(state.params["encoder"]["cls_token"], wanted["cls_token"])


@pytest.mark.parametrize(
    "changes",
    [
        {"data__image_size": 48, "model__encoder__position_grid": 4},
        {"model__encoder__position_grid": 4},
    ],
)
def test_settings_that_a_frozen_target_computes_alike_with_are_accepted(changes: dict) -> None:
    """Its positions are those of a grid, whichever setting says so."""
    ours = toy.settings(**changes)
    assert not frozen_target._other_settings(toy.settings(), ours)
    learned = {"model__encoder__positions": "learned"}  # the shape of a table shows its grid
    theirs, ours = toy.settings(**learned), toy.settings(**learned, **changes)
    assert not frozen_target._other_settings(theirs, ours)


def test_settings_of_the_sections_of_a_frozen_target_are_compared() -> None:
    """An InternImage has its settings beside those of every encoder; those of first values alone do
    not count."""
    ours = toy.settings(**toy.INTERN)
    theirs = toy.settings(**toy.INTERN, model__intern_image__offset_scale=2.0)
    (line,) = frozen_target._other_settings(theirs, ours)
    assert line == "model.intern_image.offset_scale=2.0 (1.0 in this run)"
    first = {**toy.INTERN, "model__intern_image__layer_scale": "0.25"}
    assert not frozen_target._other_settings(toy.settings(**first), ours)


def test_a_frozen_target_of_another_backbone_is_refused(teacher: pathlib.Path) -> None:
    settings, encoder = toy.settings(**toy.INTERN), {"stem": np.zeros(3)}
    with pytest.raises(UserError, match="its encoder has other shapes"):
        frozen_target.load_encoder(str(teacher), settings, encoder, {"stem": None})
    (first, *_) = frozen_target._other_settings(toy.settings(), settings)
    assert first == "model.backbone=vit (intern_image in this run)"


def test_a_frozen_target_needs_no_mask_token_of_the_other_run(teacher: pathlib.Path) -> None:
    """data2vec's encoder has one and the other run's none; a target reads none."""
    settings = toy.settings(
        objective__forms="data2vec",
        objective__target_encoder="frozen",
        objective__target_checkpoint=str(teacher),
    )
    state = trainer.Trainer(settings, made().mesh, toy.VOCABULARY).init()
    assert "mask_token" in state.params["encoder"]
    found = dict(state.opt["frozen"].params["encoder"])
    assert not np.any(found.pop("mask_token"))
    wanted = initial().params["encoder"]
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"objective__target_checkpoint": "nowhere"},
            ("'nowhere' has no checkpoints", "--workdir"),
        ),
        (
            {"model__encoder__depth": 3},
            ("its encoder has other shapes", "encoder/blocks", "same model settings"),
        ),
        (  # what the teacher has and this run would leave out
            {"model__encoder__cls_token": False},
            ("encoder/cls_token (1, 1, 32) in the checkpoint, absent in this run",),
        ),
        (
            {"model__encoder__activation": "gelu_tanh"},
            ("was trained with model.encoder.activation=gelu (gelu_tanh in this run)",),
        ),
        (
            {"data__augment__mean": "(0.5,0.5,0.5)"},
            ("data.augment.mean=(0.485, 0.456, 0.406) ((0.5, 0.5, 0.5) in this run); set these",),
        ),
        ({"data__augment__std": "(0.5,0.5,0.5)"}, ("data.augment.std=(0.229, 0.224, 0.225)",)),
        (  # fixed positions of another grid
            {"data__image_size": 48},
            ("was trained with model.encoder.position_grid=4 (6 in this run); set these",),
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(
    teacher: pathlib.Path, changes: dict, words: tuple[str, ...]
) -> None:
    settings = toy.settings(
        **{"objective__forms": "milan", "objective__target_checkpoint": str(teacher), **changes}
    )
    with pytest.raises(UserError) as error:
        trainer.Trainer(settings, made().mesh, toy.VOCABULARY).init()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), (
        error.value
    )

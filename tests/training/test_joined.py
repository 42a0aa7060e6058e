"""Rows that train together, and settings that none of them reads."""

import functools
import pathlib
from typing import Any

import jax
import pytest

from m3i_jax.errors import UserError
from m3i_jax.models import m3i
from m3i_jax.modes import compile as compile_mode
from m3i_jax.modes import preview, profile, show, train
from m3i_jax.training import unused_settings
from tests import toy
from tests.training.forward import HEAD, forward, plan_of


@pytest.mark.parametrize(
    ("forms", "changes", "words"),
    [
        (
            "mim",
            {"objective__target_checkpoint": "x"},
            ("objective.target_checkpoint: 'x'", "no frozen target in mim"),
        ),
        ("mim", {"objective__isolate": True}, ("objective.isolate", "no mixed input")),
        (
            "supervised+clip",
            {"objective__soft_label": "joint"},
            ("objective.soft_label", "no mixed input in supervised+clip"),
        ),
        ("supervised", {"data__augment__mixup": 0.8}, ("data.augment.mixup", "no blended input")),
        ("m3i", {"data__augment__cutmix": 1.0}, ("data.augment.cutmix", "no blended input")),
        ("clip", {"objective__target_encoder": "shared"}, ("target_encoder", "no target encoder")),
        ("mim", {"objective__teacher_weight": 0.5}, ("teacher_weight", "no teacher")),
        (
            "mim",
            {"model__encoder__rope_base": 50.0},
            ("rope_base: 50.0", "model.encoder.positions=sincos", "leave it at 100.0"),
        ),
        (
            "mim",
            {"model__encoder__positions": "rope", "model__encoder__position_grid": 7},
            ("position_grid: 7", "model.encoder.positions=rope", "leave it at 0"),
        ),
        (
            "supervised",
            {"model__intern_image__stem_strides": "(2,1)"},
            ("intern_image.stem_strides: (2, 1)", "model.backbone=vit", "leave it at (2, 2)"),
        ),
        ("mim", {"data__rand_augment__magnitude": 3.0}, ("magnitude: 3.0", "rand_augment.ops=0")),
        (
            "mae",
            {"model__decoder__cls": "yes", "model__encoder__cls_token": False},
            ("decoder.cls: 'yes'", "no cls token", "leave it at 'auto'"),
        ),
        ("mim", {"data__mask_blocks": 3}, ("data.mask_blocks", "data.mask=multi_block")),
        (
            "m3i",
            {"objective__second_group": "category,txt"},
            ("objective.second_group: 'txt'", "category", "text"),
        ),
    ],
)
def test_what_no_objective_reads_is_refused(
    forms: str, changes: dict, words: tuple[str, ...]
) -> None:
    config, row = toy.settings(**changes), tuple(forms.split("+"))
    with pytest.raises(UserError) as error:
        unused_settings.reject_unused_settings(config, [row])
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), (
        error.value
    )
    shared = {"objective__second_group", "objective__teacher_weight", "data__mask_blocks"}
    shared |= {key for key in changes if key.startswith(("model__", "data__rand_augment"))}
    if not shared & changes.keys():  # one of those that are compared is enough
        unused_settings.reject_unused_settings(config, [row, ("m3i", "milan"), ("finetune",)])


@pytest.mark.parametrize(
    ("mode", "flags"),
    [
        (train, {"allow_changes": False}),
        (show, {}),
        (preview, {}),
        (profile, {}),
        (profile, {"kernels": True}),
        (
            compile_mode,
            {"topology": "cpu:1", "memory": "", "code": False, "largest_batch": False}
            | {"suggest": False},
        ),
    ],
)
def test_a_run_is_refused_before_its_data_are_opened(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, mode: Any, flags: dict[str, Any]
) -> None:
    """By training, and by what plans, shows or measures it."""
    monkeypatch.setattr(train.monitoring, "enable_compilation_cache", lambda place: None)
    monkeypatch.setattr(compile_mode, "compile_target", lambda *_, **__: None)
    with pytest.raises(UserError, match="objective.isolate"):
        mode.run(
            toy.settings(objective__forms="sim", objective__isolate=True),
            workdir=str(tmp_path / "run"),
            **flags,
        )
    assert not (tmp_path / "run").exists()


def test_the_second_group_may_be_named_after_a_joined_row() -> None:
    config = toy.settings(objective__second_group="global_moco_v3")
    unused_settings.reject_unused_settings(config, [("byol", "moco_v3"), ("mim",)])
    assert [
        t.group for t in plan_of("byol,moco_v3", objective__second_group="global_moco_v3").terms
    ] == ["ssp", "ssp", "sp", "sp"]


@pytest.mark.parametrize(
    ("forms", "heads", "logged"),
    [
        ("byol,moco_v3", {"global", "global_moco_v3"}, {"global", "global_moco_v3"}),
        (
            "instance,byol,mim_global",
            {"global", "global_byol"},
            {"global", "global_byol", "global_mim_global"},
        ),
        (
            "byol,densecl",
            {"global", "global_densecl", "dense"},
            {"global", "global_densecl", "dense"},
        ),
        ("byol,simclr", {"global", "global_simclr"}, {"global", "global_simclr"}),
        ("sim,dense_instance", set(), {"inter", "inter_dense_instance"}),
        (
            "slip,barlow_twins",
            {"global", "global_barlow_twins"},
            {"global", "global_barlow_twins", "text"},
        ),
        (
            "barlow_twins,vicreg",
            {"global"},
            {"global", "global_vicreg"},
        ),
    ],
)
def test_rows_that_train_together_have_spaces_and_figures_of_their_own(
    forms: str, heads: set[str], logged: set[str]
) -> None:
    plan = plan_of(forms)
    make = functools.partial(
        m3i.init, plan.config, terms=plan.terms, classes=toy.CLASSES, vocabulary=toy.VOCABULARY
    )
    assert (
        set(jax.eval_shape(lambda key: make(rng=key), jax.random.key(0)).get("heads", {})) == heads
    )
    assert {t.name for t in plan.terms} == logged
    alone = plan_of(forms.split(",")[0])
    # the first keeps its names, as a run of it alone
    assert plan.terms[: len(alone.terms)] == alone.terms


def test_two_joined_methods_lose_what_each_loses_alone() -> None:
    """With the same parameters, and neither's monitors over the other's."""
    both = forward(plan_of("byol,moco_v3", **HEAD))
    heads = both.params["heads"]
    for name, own, end in (
        ("byol", "global", ""),
        ("moco_v3", "global_moco_v3", "/global_moco_v3"),
    ):
        alone = forward(
            plan_of(name, **HEAD),
            batch=both.batch,
            params=both.params | {"heads": {"global": heads[own]}},
        ).losses
        for key, figure in (("loss/global", f"loss/{own}"), ("info/global", f"info/{own}")):
            assert both.losses[figure] == pytest.approx(alone[key], rel=1e-4), figure
        for monitor in ("collapse/alignment", "collapse/uniformity"):
            assert both.losses[monitor + end] == pytest.approx(alone[monitor], rel=1e-4), monitor


def test_targets_of_another_encoder_do_not_enter_the_second_moment() -> None:
    """C is that of the features a method predicts, not of those that a method beside it does."""
    changes = {"objective__target_checkpoint": "x", "objective__second_moment": 50.0}
    both = forward(plan_of("sim,milan", **changes))
    for name, figure in (("sim", "loss/inter"), ("milan", "loss/intra")):
        alone = forward(plan_of(name, **changes), batch=both.batch, params=both.params)
        assert both.losses[figure] == pytest.approx(alone.losses[figure], rel=1e-5), figure


@pytest.mark.parametrize(
    ("forms", "changes"),
    [("m3i", {}), ("m3i,deit", {}), ("sim,m3i", {"objective__soft_label": "joint"})],
)
def test_one_token_is_not_asked_for_two_images(forms: str, changes: dict) -> None:
    """Both would be predicted to be the same; only a category of both together differs from
    it."""
    with pytest.raises(UserError, match=r"model\.pool\.kind: 'cls'.*attention"):
        plan_of(forms, model__pool__kind="cls", **changes)
    assert plan_of(
        forms, model__pool__kind="cls", objective__soft_label="joint", data__captions="no"
    ).terms

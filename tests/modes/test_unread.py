"""Overrides without effect and missing initial weights are refused in one line, before the trainer
is imported."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import pytest

from m3i_jax import config as configuration
from m3i_jax import main as command
from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.modes import MODES, evaluators, refuse_missing, refuse_unread
from m3i_jax.modes import eval as eval_mode

ROOT = pathlib.Path(__file__).parent.parent.parent
MIXED = {"source": "mixture", "mixture": ("folder:/a", "shapes:10")}


def test_the_settings_that_a_mode_reads_exist() -> None:
    known = configuration.setting_table()
    for name, mode in MODES.items():
        for key in mode.reads:
            assert any(setting.startswith(key) for setting in known), (name, key)


@pytest.mark.row("E8")
@pytest.mark.parametrize(
    ("mode", "data", "assignment", "words"),
    [
        (
            "eval",
            MIXED | {"path": "/b"},
            "data.path=/b",
            "data.source='mixture' reads data.mixture alone",
        ),
        (
            "train",
            MIXED | {"path": "/b"},
            "data.path=/b",
            "data.source='mixture' reads data.mixture alone",
        ),
        (
            "features",
            MIXED | {"split": "val"},
            "data.split=val",
            "config.data.split: 'val' has no effect",
        ),
        (
            "eval",
            MIXED | {"holdout_split": "val"},
            "data.holdout_split=val",
            "config.data.holdout_split: 'val' has no effect",
        ),
        (
            "eval",
            {"source": "folder", "class_space": "separate"},
            "data.class_space=separate",
            "only a mixture reads it",
        ),
        (
            "eval",
            {"source": "folder", "size": 9},
            "data.size=9",
            "evaluate.train_limit and evaluate.query_limit take fewer",
        ),
        (
            "eval",
            {"source": "folder", "holdout": 0.3, "holdout_split": "val"},
            "data.holdout=0.3",
            "names the held-out part",
        ),
        (
            "eval",
            {"source": "folder", "crop_scale": (0.5, 1.0)},
            "data.crop_scale=(0.5,1.0)",
            "--mode=eval does not read it",
        ),
        ("export", {}, "data.image_size=64", "--mode=export does not read it"),
        ("features", {}, "data.image_size=64", "--mode=features does not read it"),
        ("report", {}, "evaluate.k=3", "--mode=report does not read it"),
        ("train", {}, "curate.min_side=128", "--mode=curate alone reads it"),
        ("train", {}, "compare.forms=mim,clip", "--mode=compare alone reads it"),
        ("show", {}, "compare.budget=flops", "--mode=compare alone reads it"),
    ],
)
def test_overrides_without_effect_are_refused(
    mode: str, data: dict, assignment: str, words: str
) -> None:
    with pytest.raises(UserError) as error:
        refuse_unread(mode, [assignment], schema.Config(data=schema.Data(**data)))
    assert words in str(error.value) and assignment.partition("=")[0] in str(error.value)


def test_settings_of_evaluators_that_are_disabled_are_refused() -> None:
    on = {"few_shot": True, "knn": False, "embedding": False}
    config = schema.Config(evaluate=schema.Evaluate(**on))
    for name, words in (
        ("probe_lr", "set evaluate.probe=true, or leave it out"),
        ("map", "set evaluate.embedding=true"),
    ):
        with pytest.raises(UserError, match=f"config.evaluate.{name}: has no effect, .*{words}"):
            evaluators.refuse_disabled(config, {f"evaluate.{name}"})
    # k is of the confusion matrix, too
    evaluators.refuse_disabled(config, {"evaluate.shots", "evaluate.k", "evaluate.crop"})
    with pytest.raises(UserError, match="config.evaluate.shots: has no effect"):  # before all else
        eval_mode.run(schema.Config(), workdir="/no such", given={"evaluate.shots"})


@pytest.mark.parametrize(
    ("mode", "data", "assignments"),
    [
        (
            "eval",
            {"source": "folder", "path": "/b"},
            ["data.source=folder", "data.path=/b", "data.mixture=", "data.size=0"],
        ),
        ("eval", MIXED | {"size": 9}, ["data.size=9", "evaluate.crop=1.0"]),
        # the sizes at which dense tasks are evaluated
        ("eval", {}, ["dense.geometry.test_short=800", "dense.geometry.short=512"]),
        # the mode plans with the size and counts no images
        ("show", {"source": "folder", "size": 9}, ["data.size=9"]),
        ("train", MIXED, ["data.path=", "optim.lr=1"]),  # emptied
        ("compare", {}, ["compare.forms=mim,clip", "compare.seeds=2"]),
        ("curate", {}, ["curate.min_side=128"]),
        ("export", {}, ["evaluate.crop=1.0", "report.licence=MIT"]),
    ],
)
def test_overrides_with_effect_are_accepted(mode: str, data: dict, assignments: list[str]) -> None:
    refuse_unread(mode, assignments, schema.Config(data=schema.Data(**data)))


@pytest.mark.parametrize(
    ("assignments", "refused"),
    [
        ("dense.detect.rois=9", "config.task=pretrain trains no detector"),
        ("task=detect dense.segment.width=9", "config.task=detect does not read it"),
        ("task=detect dense.geometry.category_share=0.5", "config.task=detect does not read it"),
        ("task=segment dense.detect.dino.nms=0.5", "config.task=segment does not read it"),
        ("task=segment dense.geometry.repeat=0.1", "config.task=segment does not read it"),
        ("task=detect dense.geometry.short=99", "dense.geometry.rule=jitter does not read it"),
        ("task=detect dense.geometry.crop_p=0.5", "dense.geometry.rule=jitter does not read it"),
        (
            "task=detect dense.geometry.rule=buckets dense.geometry.scale=(0.5,2)",
            "dense.geometry.rule=buckets scales images to the canvas",
        ),
        ("task=detect dense.detect.head=dino dense.detect.nms=0.7", "set dense.detect.dino.nms"),
        ("task=detect dense.detect.head=dino dense.detect.dino.nms=0.7", ""),
        ("task=detect dense.detect.nms=0.7 dense.geometry.scale=(0.5,2)", ""),
        ("task=segment dense.geometry.rule=range dense.geometry.short=99", ""),
        ("task=detect dense.segment.width=768", ""),  # the default
        ("dense.maps.image_size=64", ""),
    ],
)
def test_overrides_of_dense_tasks(assignments: str, refused: str) -> None:
    cfg, given = configuration.default_config(), assignments.split()
    configuration.apply_overrides(cfg, given)
    config = configuration.resolve(cfg)
    if not refused:
        refuse_unread("train", given, config)
        return
    with pytest.raises(UserError, match=re.escape(refused)) as error:
        refuse_unread("train", given, config)
    assert str(error.value).startswith(f"config.{given[-1].partition('=')[0]}: ")


def test_the_feature_of_a_file_of_weights_is_the_one_asked_for() -> None:
    """The mean of the patch tokens unless it is cls; such a file has no pooling."""
    found = {
        name: eval_mode.evaluate_weights(
            schema.Config(evaluate=schema.Evaluate(features=name)), "vit.npz"
        ).evaluate.features
        for name in ("auto", "mean", "cls")
    }
    assert found == {"auto": "mean", "mean": "mean", "cls": "cls"}
    attention = schema.Config(evaluate=schema.Evaluate(features="attention"))
    with pytest.raises(UserError, match="config.evaluate.features: 'attention'.*vit.npz has only"):
        eval_mode.evaluate_weights(attention, "vit.npz")


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_a_dense_task_refuses_settings_of_views(task: str) -> None:
    """dense.geometry.flip_p mirrors its images, and data.flip_p=0 would leave them mirrored."""
    data = schema.Data(flip_p=0.0, augment=schema.Augment(jitter_p=0.0, std=(1.0, 1.0, 1.0)))
    config = schema.Config(task=task, data=data, objective=schema.Objective(label_smoothing=0.2))
    for key in ("data.flip_p", "data.augment.jitter_p", "objective.label_smoothing"):
        with pytest.raises(UserError, match=f"config.{key}: 0.* does not read it; dense.geometry"):
            refuse_unread("train", [f"{key}=0"], config)
        refuse_unread("train", [f"{key}=0"], dataclasses.replace(config, task="pretrain"))
    refuse_unread("train", ["data.augment.std=(1,1,1)", "data.crop_scale=(0.08,1)"], config)


@pytest.mark.row("E8")
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            {"class_names": "/nope"},
            "config.data.class_names: '/nope' has no effect, because the so",
        ),
        (
            {"source": "folder", "directory": "/d"},
            "'/d' has no effect, because no source is of TFDS",
        ),
        (MIXED | {"directory": "/d"}, "'/d' has no effect, because no source is of TFDS"),
        (MIXED | {"mixture": ("shapes:10",), "class_names": "/n"}, "names its classes itself"),
    ],
)
def test_files_that_no_source_reads_are_refused_in_a_configuration_too(
    data: dict, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        refuse_unread("train", [], schema.Config(data=schema.Data(**data)))


@pytest.mark.parametrize(
    "data",
    [
        {"source": "tfds", "directory": "/d", "class_names": "/n"},
        MIXED | {"mixture": ("shapes:10", "tfds:food101"), "directory": "/d"},
    ],
)
def test_files_that_a_source_reads_are_accepted(data: dict) -> None:
    refuse_unread("train", [], schema.Config(data=schema.Data(**data)))


@pytest.mark.row("E8")
def test_a_mixture_evaluated_on_a_path_is_refused_as_a_command(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.txt").write_text(
        configuration.config_to_text(schema.Config(data=schema.Data(**MIXED)))
    )
    before = sorted(tmp_path.iterdir())
    assert (
        command.main(["--mode=eval", "--workdir", str(tmp_path), f"--config.data.path={tmp_path}"])
        == 2
    )
    err = capsys.readouterr().err
    assert "config.data.path" in err and "set data.source as well" in err and err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.row("E11")
def test_missing_weights_are_refused_by_modes_that_read_them(tmp_path: pathlib.Path) -> None:
    config = schema.Config(init_from=str(tmp_path / "no"))
    frozen = schema.Config(objective=schema.Objective(target_checkpoint=str(tmp_path / "no")))
    for mode in ("train", "compare", "profile", "features"):
        for each, key in (
            (config, "config.init_from"),
            (frozen, "config.objective.target_checkpoint"),
        ):
            with pytest.raises(UserError, match=f"{key}: there is no"):
                refuse_missing(mode, each, str(tmp_path))
    for mode in ("show", "compile", "eval", "export", "report"):
        refuse_missing(mode, config, str(tmp_path))
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    # a resumed run has the weights in its checkpoint
    refuse_missing("train", config, str(tmp_path))


REFUSED = """
import sys
from m3i_jax import main
code = main.main(sys.argv[1:])
print(code, "m3i_jax.modes.train" in sys.modules, "m3i_jax.training.trainer" in sys.modules)
"""


@pytest.mark.row("E11")
def test_missing_weights_are_refused_before_the_trainer_is_imported(tmp_path: pathlib.Path) -> None:
    """In a new process: the trainer takes seconds to import, and its programs longer to compile."""
    arguments = [
        "--config",
        "configs/quickstart.py",
        "--workdir",
        str(tmp_path / "run"),
        "--config.init_from=/nowhere",
    ]
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.split() == ["2", "False", "False"], done
    assert (
        done.stderr.startswith("m3i_jax: config.init_from: there is no '/nowhere'")
        and done.stderr.count("\n") == 1
    )
    assert not (tmp_path / "run").exists()

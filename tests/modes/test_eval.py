"""--mode=eval on a saved run: all evaluators at once, the results that are kept, the refusals."""

import dataclasses
import errno
import json
import pathlib
import re
import shutil
import types

import jax
import jax.numpy as jnp
import pytest

from m3i_jax import config as configuration
from m3i_jax import main as command
from m3i_jax import parallel
from m3i_jax.data.sources.folder import FolderSource
from m3i_jax.errors import UserError
from m3i_jax.evaluation import registry, retrieval
from m3i_jax.interop import tensor_files
from m3i_jax.modes import eval as evaluate
from m3i_jax.modes import evaluators, figure_evaluators, train
from m3i_jax.modes import setup as jobs
from m3i_jax.run_files import write_text_atomic
from m3i_jax.training import checkpoint_dir
from m3i_jax.training.checkpoint import Checkpoints
from m3i_jax.training.trainer import Trainer
from tests import broken, toy
from tests.evaluation.test_load import intern_image_file
from tests.interop.published_vit import ENCODERS, weights

SMALL = {
    "data__size": 60, "data__classes": -1, "data__captions": "auto", "data__holdout": 0.3,
    "train__batch_size": 16,
    "objective__forms": "supervised,weakly_supervised", "model__encoder__drop_path": 0.0,
    "evaluate__batch_size": 16, "evaluate__train_limit": 32, "evaluate__k": 3,
    "evaluate__probe_epochs": 3, "evaluate__probe_warmup": 1,
    "evaluate__attentive_epochs": 1, "evaluate__attentive_limit": 16, "evaluate__shots": "(1,2)",
}  # fmt: skip
EVERY = tuple(each.name for each in registry.evaluators() if "pretrain" in each.tasks)


def write_run(
    place: pathlib.Path, forms: tuple[str, ...], *, moved: float = 0.0, **changes: object
) -> None:
    """A run with two checkpoints of its initial parameters plus `moved`, written to a directory."""
    job = jobs.open_setup(toy.settings(**SMALL | changes), str(place), trains=[forms])
    trainer = Trainer(job.config, job.mesh, job.tokenizer.vocabulary if job.tokenizer else 0)
    train.write_settings(job)
    checkpoints = Checkpoints(place / "checkpoints", 2)
    state = trainer.init()
    state = state.replace(params=jax.tree.map(lambda leaf: leaf + moved, state.params))
    for step in (1, 2):
        checkpoints.save(
            step,
            state.replace(step=jnp.int32(step)),
            {"samples_seen": 0, "fingerprint": job.fingerprint},
        )
    checkpoints.wait()
    checkpoints.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    place = tmp_path_factory.mktemp("written")
    write_run(place, ("supervised", "weakly_supervised"))
    return place


@pytest.fixture
def run(written: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The directory of a run on categories and captions, without what another test evaluated."""
    return shutil.copytree(written, tmp_path_factory.mktemp("of") / "run")


def enable(*names: str) -> list[str]:
    return [f"--config.evaluate.{name}={str(name in names).lower()}" for name in EVERY]


def test_every_evaluator_of_a_run(run: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--mode=eval", "--workdir", str(run), *enable(*EVERY)]) == 0
    saved = json.loads((run / "eval.json").read_text())
    assert (
        saved["step"] == 2
        and saved["encoder"] == "online"
        and list(saved["results"]) == list(EVERY)
    )
    values = {name: value for found in saved["results"].values() for name, value in found.items()}
    wanted = {
        f"eval/{e}/top1" for e in ("knn", "linear", "probe", "attentive", "direct", "zero_shot/7")
    }
    wanted |= {
        "eval/few_shot/1",
        "eval/few_shot/2",
        "eval/retrieval/text_to_image/r5",
        "eval/embedding/same_class",
    }
    assert wanted <= set(values) and all(0 <= values[name] <= 1 for name in wanted)
    kinds = ("attention", "confusion", "map", "neighbours", "zero_shot")
    figure_names = {path.name for path in (run / "pictures").iterdir() if path.is_file()}
    assert figure_names == {f"00000002-{kind}.{end}" for kind in kinds for end in ("json", "png")}
    out = capsys.readouterr().out
    assert all(name in out for name in values) and str(run / "checkpoints" / "2") in out


def test_the_confusion_matrix_shows_the_predictions_that_are_measured(
    run: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The matrix is that of the category head or, without it, of kNN; its accuracy is the one that
    the evaluator reports."""
    for by, words in (
        ("direct", "predictions of the category head"),
        ("knn", "predictions of kNN (k = 3)"),
    ):
        assert command.main(["--mode=eval", "--workdir", str(run), *enable(by, "confusion")]) == 0
        value = json.loads((run / "eval.json").read_text())["results"][by][f"eval/{by}/top1"]
        note = json.loads((run / "pictures" / "00000002-confusion.json").read_text())["note"]
        assert words in note and re.search(
            rf"; {100 * value:.1f} % of \d+ held-out images are right; step 2, online", note
        ), note
    assert "evaluation:" not in capsys.readouterr().out


def test_missing_files_are_left_out_with_data_missing_replace(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The setting holds for image sets, for figures and for captions."""
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(broken.encode(broken.smooth(40, 40 + i), "PNG"))
    settings = SMALL | {
        "data__source": "folder",
        "data__path": str(tmp_path),
        "data__missing": "replace",
        "data__captions": "no",
    }
    config = toy.settings(**settings)
    source = FolderSource(str(tmp_path))
    (tmp_path / "3.png").unlink()
    job = types.SimpleNamespace(
        config=config, mesh=parallel.make_mesh((1, 1, 1), jax.devices()[:1]), held_out=source
    )
    batches = evaluators.host_eval_batches(job, source, 10)
    assert [batch["index"][batch["valid"]].tolist() for batch in batches] == [[0, 1, 2, 4]]
    assert batches.skipped["unreadable"] == 1
    assert len(figure_evaluators.FigureWriter(job, str, str).tiles([2, 3])) == 2
    received: list[str] = []
    monkeypatch.setattr(retrieval, "measure", lambda *a, missing, **k: received.append(missing))
    job = jobs.open_setup(
        toy.settings(**SMALL, data__missing="replace"),
        str(tmp_path),
        trains=[("supervised", "weakly_supervised")],
    )
    figures = figure_evaluators.FigureWriter(job, str, str)
    evaluators.enabled_metrics(job, print, figures=figures)
    assert received == ["replace"]


@pytest.mark.parametrize("thorough", [True, False])
def test_skipped_evaluators_are_logged(thorough: bool, tmp_path: pathlib.Path) -> None:
    """During training only those that lack labels: the others are enabled by default, and the
    objective is known to train no such term."""
    settings = SMALL | {
        "objective__forms": "mim",
        "data__classes": 0,
        "data__captions": "no",
        "evaluate__linear": True,
    }
    job = jobs.open_setup(toy.settings(**settings), str(tmp_path), trains=[("mim",)])
    lines: list[str] = []
    enabled = evaluators.enabled_evaluators(job, lines.append, thorough=thorough)
    assert [each.name for each in enabled] == ["embedding", "attention"]
    if not thorough:
        assert lines == ["no kNN and linear evaluation: the source has no categories"]
        return
    assert lines == [
        "no kNN, linear and confusion evaluation: the source has no categories",
        "no retrieval, zero-shot and examples evaluation: the objective trains no text tower",
        "no direct evaluation: the objective trains no category head",
    ]


def test_numbers_are_no_names_of_categories(tmp_path: pathlib.Path) -> None:
    settings = SMALL | {"objective__forms": "weakly_supervised", "evaluate__knn": False}
    job = jobs.open_setup(toy.settings(**settings), str(tmp_path), trains=[("weakly_supervised",)])
    found = []
    for name in ("thing {}", "{}"):
        classes = tuple(name.format(number) for number in range(12))
        lines: list[str] = []
        other = dataclasses.replace(job, classes=classes)
        enabled = evaluators.enabled_evaluators(other, lines.append)
        found.append(({each.name for each in enabled}, lines))
    (named, before), (numbered, after) = found
    assert named - numbered == {"zero_shot", "examples"} and not numbered - named
    (line,) = (line for line in after if line not in before)
    assert line.startswith("no zero-shot and examples evaluation: the categories are numbers")


def test_a_file_of_encoder_weights_on_other_data(
    run: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = weights(ENCODERS["timm"], width=32, depth=2, heads=2, patch=8, grid=4)
    tensor_files.write_safetensors(tmp_path / "vit.safetensors", table)
    other = [
        "--checkpoint",
        str(tmp_path / "vit.safetensors"),
        "--config.data.size=50",
        "--config.model.encoder.positions=learned",
    ]
    assert (
        command.main(
            [
                "--mode=eval",
                "--workdir",
                str(run),
                *enable("attention", "knn", "direct", "examples"),
                *other,
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "vit.safetensors contains only an encoder (" in out
    assert "; evaluators that need a head are skipped" in out
    assert "the data are not those of the run" in out and "eval/direct" not in out
    (directory,) = run.glob("eval-*/pictures")
    assert (
        "vit.safetensors, online parameters" in (directory / "00000000-attention.json").read_text()
    )


@pytest.mark.slow
def test_a_file_of_a_published_intern_image_sets_the_model(
    run: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _, _ = intern_image_file(tmp_path)
    assert (
        command.main(
            [
                "--mode=eval",
                "--workdir",
                str(run),
                *enable("knn"),
                "--config.data.size=40",
                "--checkpoint",
                path,
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "(InternImage of 1+1+2+1 layers from 32 channels, 32 pixels)" in out
    assert "eval/knn" in out
    assert "of the last two stages" not in out  # no part of the encoder is random


@pytest.mark.row("E9")
def test_results_of_other_data_or_weights_go_to_another_directory(
    run: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their files describe data and weights, those of the run stay unchanged, and the same command
    continues them."""
    own = ["--mode=eval", "--workdir", str(run), *enable("knn", "embedding")]
    assert command.main(own) == 0
    before = {
        path: path.read_bytes()
        for path in (run / "eval.json", *(run / "pictures").rglob("*"))
        if path.is_file()
    }
    job = jobs.open_setup(
        toy.settings(**SMALL), str(run), trains=[("supervised", "weakly_supervised")]
    )
    saved = json.loads((run / "eval.json").read_text())
    parts = {"index": job.train, "queries": job.held_out}
    assert saved["data"] == {
        k: {"name": p.name, "pictures": len(p), "fingerprint": p.fingerprint()}
        for k, p in parts.items()
    }
    assert saved["preprocessing"]["crop"] == 0.875 and saved["preprocessing"]["image_size"] == 32
    capsys.readouterr()
    known = set(run.glob("eval-*"))
    changes = {
        "size": "--config.data.size=50",
        "weights": f"--checkpoint={run}/checkpoints/1",
    }
    for name, change in changes.items():
        assert command.main([*own, change]) == 0
        out = capsys.readouterr().out
        new = set(run.glob("eval-*")) - known
        if name == "weights":  # of the run itself
            assert not new and json.loads((run / "eval.json").read_text())["step"] == 1
            continue
        (directory,) = new
        known |= new
        assert "the data are not those of the run" in out and str(directory / "eval.json") in out
        content = json.loads((directory / "eval.json").read_text())
        assert (
            content["data"] != saved["data"]
            and content["results"]
            and list((directory / "pictures").iterdir())
        )
        assert {path: path.read_bytes() for path in before} == before
        assert command.main([*own, change]) == 0 and set(run.glob("eval-*")) == known
        assert "knn:" not in capsys.readouterr().out  # not measured again


def test_a_moved_directory_has_the_same_data(tmp_path: pathlib.Path) -> None:
    """Images are compared by content, not by path. A data.txt of an older version has no lines
    about held-out data."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        for i in range(9):
            (tmp_path / name / f"{i}.png").write_bytes(
                broken.encode(broken.smooth(40, 40 + i), "PNG")
            )
    settings = SMALL | {
        "data__source": "folder",
        "data__captions": "no",
        "data__size": 0,
        "objective__forms": "mim",
    }
    old, new, fewer = (
        jobs.open_setup(
            toy.settings(
                **{**settings, "data__path": str(tmp_path / name), "data__holdout": share}
            ),
            str(tmp_path / "run"),
        )
        for name, share in (("old", 0.3), ("new", 0.3), ("new", 0.5))
    )
    train.write_settings(old)
    assert "held out 1 = " in (tmp_path / "run/data.txt").read_text()
    assert (
        evaluate.other_data(old, tmp_path / "run")
        == evaluate.other_data(new, tmp_path / "run")
        == []
    )
    assert [line.split(":")[0] for line in evaluate.other_data(fewer, tmp_path / "run")] == [
        "source 1",
        "held out 1",
    ]
    lines = (tmp_path / "run/data.txt").read_text().splitlines()
    (tmp_path / "run/data.txt").write_text(
        "".join(f"{line}\n" for line in lines if "held out" not in line)
    )
    # the digest is that of the former content
    (tmp_path / "run/digests/data.txt").unlink(missing_ok=True)
    assert evaluate.other_data(new, tmp_path / "run") == []
    assert "data.holdout: 0.3 -> 0.5" in evaluate.other_data(fewer, tmp_path / "run")


def test_a_category_head_of_other_classes_is_not_evaluated(
    run: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(40):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        (tmp_path / "ab"[i % 2] / f"{i}.png").write_bytes(
            broken.encode(broken.smooth(40, 40 + i), "PNG")
        )
    other = [
        "--config.data.source=folder",
        f"--config.data.path={tmp_path}",
        "--config.data.size=0",
    ]
    assert (
        command.main(
            ["--mode=eval", "--workdir", str(run), *enable("knn", "direct", "zero_shot"), *other]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "eval/knn/top1" in out and "eval/zero_shot/7/top1" in out and "eval/direct" not in out
    assert "no direct evaluation: these data have 2 categories, the head of the run has 8" in out
    config = toy.settings(**SMALL | {"data__classes": 2})
    part = types.SimpleNamespace(classes=("a", "b"))
    job = jobs.Setup(
        config=config,
        mesh=None,
        train=part,
        held_out=part,
        classes=("x", "y"),
        tokenizer=None,
        workdir=tmp_path,
    )
    lines: list[str] = []
    changed = evaluate._with_other_classes(job, lines.append)
    assert changed.config.evaluate.direct and changed.classes == ("a", "b")
    assert lines == [
        "direct evaluation assumes that category k of these data is category k of the run:"
        " a, b, ..."
    ]


@pytest.mark.row("E11")
def test_an_unwritable_directory_is_refused_before_the_data_are_opened(
    run: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(jobs.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(evaluate, "open_setup", None)
    for mode in (
        ["--mode=eval"],
        ["--mode=export", "--format=npz"],
        ["--mode=features", "--out=x.npz"],
    ):
        assert command.main([*mode, "--workdir", str(run)]) == 2
        err = capsys.readouterr().err
        assert "Read-only file system" in err and err.count("\n") == 1


def test_results_of_the_same_command_are_kept(
    run: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command runs only missing evaluators; another checkpoint or setting starts anew."""
    ran, agreed = [], []
    real = evaluators.enabled_metrics
    monkeypatch.setattr(
        evaluate.distributed,
        "assert_same_on_all_hosts",
        lambda name, items: agreed.append(items["checkpoint"]),
    )

    def record(*args, **kwargs):
        metrics, image_sets = real(*args, **kwargs)
        return {
            name: lambda context, name=name: (ran.append(name), iter([(f"eval/{name}", 0.5)]))[1]
            for name in metrics
        }, image_sets

    monkeypatch.setattr(evaluators, "enabled_metrics", record)
    (run / "eval.json").unlink(missing_ok=True)
    call = ["--mode=eval", "--workdir", str(run), *enable("knn", "direct")]
    assert command.main(call) == 0 and ran == ["knn", "direct"]
    saved = json.loads((run / "eval.json").read_text())
    del saved["results"]["direct"]
    write_text_atomic(run / "eval.json", json.dumps(saved), noted=True)
    assert command.main(call) == 0 and ran == ["knn", "direct", "direct"]
    assert command.main([*call, "--checkpoint", str(run / "checkpoints" / "1")]) == 0 and ran[
        3:
    ] == ["knn", "direct"]
    assert json.loads((run / "eval.json").read_text())["step"] == 1
    # several hosts must agree on the checkpoint
    assert agreed == [str(max(checkpoint_dir.complete_steps(run / "checkpoints")))] * 2 + ["1"]
    assert (
        command.main(
            [*call, "--config.evaluate.crop=1.0", "--checkpoint", str(run / "checkpoints" / "1")]
        )
        == 0
    )
    assert ran[5:] == ["knn", "direct"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir", "NOWHERE"], "has no config.txt"),
        (["--workdir", "RUN", "--checkpoint", "NOWHERE"], "has no complete checkpoint"),
        (["--workdir", "RUN", *enable()], "no enabled evaluator can run"),
        (["--workdir", "RUN", *enable("confusion")], "no enabled evaluator can run"),
        (
            ["--workdir", "RUN", "--config.evaluate.templates=my.txt"],
            "nor a file; give one of these",
        ),
        (
            ["--workdir", "RUN", "--config.optim.lr=1"],
            "config.optim.lr: has no effect, because --mode=eval does not read it",
        ),
        (["--workdir", "RUN", "--config.init_from=NOWHERE"], "config.init_from: has no effect"),
        (
            ["--workdir", "RUN", "--config.data.directory=/d"],
            "config.data.directory: '/d' has no effect, because no source is of TFDS",
        ),
        (
            ["--config", "configs/quickstart.py", "--mode=show", "--checkpoint", "RUN"],
            "--checkpoint: does not belong to --mode=show",
        ),
    ],
)
def test_refusals(
    arguments: list[str],
    message: str,
    run: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"RUN": str(run), "NOWHERE": str(tmp_path / "no")}
    mode = [] if "--mode=show" in arguments else ["--mode=eval"]
    assert command.main([*mode, *(places.get(a, a) for a in arguments)]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_the_settings_of_a_run_come_back(run: pathlib.Path) -> None:
    config = configuration.resolve(configuration.load_from_workdir(str(run), "--workdir"))
    assert configuration.config_to_text(config) == (run / "config.txt").read_text()
    with pytest.raises(UserError, match="is not a setting of this version"):
        configuration.config_from_text("optim.fast = 1\n", "config.txt")

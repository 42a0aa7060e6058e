"""The header of eval.json: how many images are evaluated, and which earlier values are used."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import types
from collections.abc import Callable

import pytest

from m3i_jax import schema
from m3i_jax.data.sources import shapes
from m3i_jax.data.sources.folder import FolderSource
from m3i_jax.data.sources.subset import split_by_hash
from m3i_jax.evaluation import registry
from m3i_jax.evaluation.feature_extraction import EvalContext
from m3i_jax.modes import compare, eval_header, model_card
from m3i_jax.modes import eval as evaluate
from m3i_jax.modes.eval_results import Results
from m3i_jax.reporting import run_page

SMALL = schema.Config(evaluate=schema.Evaluate(train_limit=32, query_limit=20, k=3))


def setup_of(
    train: object, held_out: object, config: schema.Config = SMALL
) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        config=config, train=train, held_out=held_out, classes=("cat", "dog"), identity="data"
    )


def test_results_state_the_images_that_were_evaluated(tmp_path: pathlib.Path) -> None:
    setup = setup_of(shapes.ShapesSource(1240), shapes.ShapesSource(50))
    found = eval_header.measured_by(setup, ["knn", "attentive"])
    assert found["evaluated"] == {"index": 32, "queries": 20}
    evaluated = schema.Evaluate()
    assert found["settings"] == {
        **{"features": "auto", "train_limit": 32, "query_limit": 20, "k": 3, "temperature": 0.07},
        **{
            name: getattr(evaluated, name)
            for name in ("attentive_lr", "attentive_epochs", "attentive_limit")
        },
    }
    assert eval_header.cut_queries(SMALL, 50).startswith("warning: 20 of 50 held-out images")
    assert not eval_header.cut_queries(SMALL, 20)
    dense = dataclasses.replace(SMALL, task="detect")
    assert eval_header.evaluated_images(dense, 1240, 10) == {"queries": 10}
    weights = str(tmp_path / "checkpoints" / "4")
    about = eval_header.described(setup, weights, 4)
    for header, words in ((about | found, ("32 of 1,240", "20 of 50")), (about, ("1,240", "50"))):
        results = Results(header, 8, {"knn": {"eval/knn/top1": 0.5}})
        results.write(tmp_path / "eval.json")
        index, queries = words
        assert f"index {index} of shapes" in results.text()
        assert f"; queries {queries} of shapes" in results.text()
        saved = json.loads((tmp_path / "eval.json").read_text())
        assert f"; queries: {queries} images of shapes" in run_page._about_evaluation(saved)
        (row,) = model_card._metrics(tmp_path, schema.Evaluate())[2:]
        cut = "; index 32 of 1,240 images; queries 20 of 50 images" if header != about else ""
        assert row.startswith(f"| eval/knn/top1, online (--mode=eval{cut}) |")


def test_a_comparison_states_the_images_that_are_evaluated() -> None:
    job = setup_of(shapes.ShapesSource(1240), shapes.ShapesSource(50))
    words = ", of which 20 are evaluated, with 32 training images"
    assert compare._evaluated(job) == words
    job = dataclasses.replace(SMALL, evaluate=schema.Evaluate())
    assert compare._evaluated(setup_of(shapes.ShapesSource(9), shapes.ShapesSource(5), job)) == ""


def write_captions(directory: pathlib.Path) -> pathlib.Path:
    for number in range(12):
        (directory / f"{number}.png").write_bytes(b"x")
        (directory / f"{number}.txt").write_text(f"image {number}")
    return directory


def test_values_of_other_texts_are_not_used_again(tmp_path: pathlib.Path) -> None:
    """Templates, names of classes and captions are in no setting and no fingerprint."""
    folder, templates = tmp_path / "images", tmp_path / "own.txt"
    folder.mkdir()
    write_captions(folder)
    templates.write_text("a photo of a {}.\n")
    config = dataclasses.replace(SMALL, evaluate=schema.Evaluate(templates=(str(templates),)))

    def opened() -> types.SimpleNamespace:
        source = FolderSource(str(folder))
        return setup_of(
            *(split_by_hash(source, 0.5, part) for part in ("train", "held_out")), config
        )

    def texts(*names: str, setup: types.SimpleNamespace | None = None) -> str:
        return eval_header.measured_by(setup or opened(), names)["texts"]

    prompts, captions, neither = texts("zero_shot"), texts("retrieval"), texts("knn")
    assert prompts == texts("zero_shot") and captions == texts("retrieval")
    templates.write_text("a photo of the {}.\n")
    assert prompts != texts("zero_shot") == texts("examples") and captions == texts("retrieval")
    before, caption = opened(), folder / "3.txt"
    caption.write_text("image X")
    os.utime(caption, ns=(1, 1))
    after = opened()
    assert captions != texts("retrieval", setup=after) and neither == texts("knn", setup=after)
    # which a run compares when it resumes
    assert before.held_out.fingerprint() == after.held_out.fingerprint()
    after.classes = ("dog", "cat")
    assert neither != texts("knn", setup=after)
    templates.unlink()  # of an evaluator that is off
    assert texts("knn") == neither


def test_values_of_another_version_are_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = setup_of(shapes.ShapesSource(4), shapes.ShapesSource(4))
    before = eval_header.measured_by(setup, ["knn"])
    assert before == eval_header.measured_by(setup, ["knn"])
    monkeypatch.setattr(eval_header.distributed, "code_digest", lambda: "0.0.1 0123456789abcdef")
    assert before != eval_header.measured_by(setup, ["knn"])


def evaluated(
    place: pathlib.Path, *names: str, skips: dict[str, int] | None = None
) -> tuple[list[str], dict]:
    """(evaluators that ran, content of eval.json) of an evaluation by fake metrics."""
    ran: list[str] = []

    def metric(name: str) -> Callable[[EvalContext], dict[str, float]]:
        def run(context: EvalContext) -> dict[str, float]:
            ran.append(name)
            context.skipped.update(skips or {})
            return {f"eval/{name}/top1": 0.5}

        return run

    setup = types.SimpleNamespace(config=SMALL, workdir=place, classes=())
    about = {"checkpoint": "c", "step": 1, "encoder": "online", "data": {}}
    context = EvalContext({}, {}, lambda: None)
    metrics = {name: metric(name) for name in names}
    assert evaluate.evaluate(setup, about, metrics, context) == 0
    return ran, json.loads((place / "eval.json").read_text())


def test_the_file_of_an_evaluator_from_outside_is_in_the_header(tmp_path: pathlib.Path) -> None:
    """Values of another text are not continued; without a file they never are."""
    setup = types.SimpleNamespace(config=SMALL, train=[1], held_out=[1], classes=())

    def texts(build: Callable) -> str:
        with registry.EVALUATORS.temporary():
            registry.register_evaluator(registry.Evaluator(name="own", build=build))
            return eval_header.measured_by(setup, ["own"])["texts"]

    def written(text: str) -> Callable:
        path = tmp_path / "own.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location("own", path)
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        return module.build

    first = texts(written("def build(inputs): return None"))
    assert first == texts(written("def build(inputs): return None"))
    assert first != texts(written("def build(inputs): return 1"))
    build = written("def build(inputs): return None")
    (tmp_path / "own.py").unlink()
    assert texts(build) != texts(build)


def test_a_resumed_evaluation_remembers_skipped_images(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated(tmp_path, "knn", skips={"undecodable": 2})
    skips = {"undecodable": 1, "truncated": 3}  # of an evaluator that reads fewer of the images
    ran, saved = evaluated(tmp_path, "knn", "direct", skips=skips)
    assert ran == ["direct"] and saved["skipped"] == {"undecodable": 2, "truncated": 3}
    capsys.readouterr()
    assert evaluated(tmp_path, "knn", "direct")[0] == []
    assert "could not be read: {'undecodable': 2, 'truncated': 3}" in capsys.readouterr().out

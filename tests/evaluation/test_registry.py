"""The registry of evaluators: a user's own evaluator, registered from outside the package."""

import json
import pathlib
import re
from collections.abc import Iterator

import numpy as np
import pytest

from m3i_jax import main as command
from m3i_jax import schema
from m3i_jax.evaluation import registry
from m3i_jax.evaluation.registry import Evaluator, register_evaluator
from m3i_jax.modes import figure_evaluators
from tests.test_main import TINY

# A file for --config, as a user would write it.
CONFIG = """
import jax.numpy as jnp

from m3i_jax.config import default_config
from m3i_jax.evaluation.registry import EvalContext, EvalInputs, Evaluator, register_evaluator


def norms(inputs: EvalInputs):
    def run(context: EvalContext):
        queries = context("queries")
        yield "eval/norms/images", len(queries.vectors)
        norms = (queries.vectors**2).sum(1)
        yield "eval/norms/mean", norms.mean()  # of numpy
        yield "eval/norms/most", jnp.asarray(norms).max()

    return run


register_evaluator(Evaluator(name="norms", build=norms, needs=("labels",)))


def get_config():
    return default_config()
"""


@pytest.fixture(autouse=True)
def own_registry() -> Iterator[None]:
    """What a test registers beside all built-in evaluators is forgotten after it."""
    assert figure_evaluators.__name__ in {each.build.__module__ for each in registry.evaluators()}
    with registry.EVALUATORS.temporary():
        yield


def test_an_evaluator_from_outside_reports_in_the_log_of_a_run(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.py").write_text(CONFIG)
    run = tmp_path / "run"
    own = {
        "train.batch_size": 16,
        "train.steps": 1,
        "optim.warmup_steps": 0,
        "objective.forms": "mim",
    }
    own |= {f"evaluate.{each.setting}": False for each in registry.evaluators()}
    settings = dict(text.removeprefix("--config.").split("=") for text in TINY) | own
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    arguments = ["--config", str(tmp_path / "own.py"), "--workdir", str(run), *overrides]
    assert command.main(arguments) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = {name: value for line in lines for name, value in line.items()}
    held_out = re.search(r"([\d,]+) held out", capsys.readouterr().out)
    assert held_out and values["eval/norms/images"] == int(held_out[1]) > 1
    np.testing.assert_allclose(values["eval/norms/mean"], 1.0, rtol=1e-5)  # normalised features

    # the settings are those of the run, not those of the file
    own = ["--config", str(tmp_path / "own.py"), "--config.evaluate.batch_size=8"]
    assert command.main(["--mode=eval", "--workdir", str(run), *own]) == 0
    found = json.loads((run / "eval.json").read_text())["results"]["norms"]
    assert found.keys() == {"eval/norms/images", "eval/norms/mean", "eval/norms/most"}
    assert all(type(value) in (int, float) for value in found.values())
    np.testing.assert_allclose(found["eval/norms/mean"], 1.0, rtol=1e-5)


def test_built_in_evaluators_have_a_setting_and_run_in_its_order() -> None:
    settings = [each.setting for each in registry.evaluators()]
    fields = list(schema.Evaluate.__dataclass_fields__)
    assert all(settings) and settings == sorted(settings, key=fields.index)
    assert [each.name for each in registry.evaluators()] == settings


def test_an_evaluator_is_checked_when_it_is_registered() -> None:
    def build(inputs):
        return lambda context: iter(())

    for wrong, message in (
        (Evaluator(name="knn", build=build), "this name is built in"),
        (Evaluator(name="", build=build), "needs a name"),
        (Evaluator(name="toy", build=build, needs=("boxes",)), "unknown needs boxes"),
        (Evaluator(name="toy", build=build, setting="toy"), "no setting 'toy'"),
    ):
        with pytest.raises(ValueError, match=message):
            register_evaluator(wrong)
    first = Evaluator(name="toy", build=build)
    again = Evaluator(name="toy", build=build, title="another")
    for each in (first, again):  # a cell of a notebook that runs twice
        register_evaluator(each)
    assert registry.evaluators()[-1] is again and first not in registry.evaluators()


def test_a_setting_enables_an_evaluator() -> None:
    off = Evaluator(name="toy", setting="linear", build=lambda inputs: None)
    assert not off.enabled(schema.Evaluate(linear=False))
    assert off.enabled(schema.Evaluate(linear=True))
    assert Evaluator(name="toy", build=lambda inputs: None).enabled(schema.Evaluate())

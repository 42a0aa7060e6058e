"""A task from outside the package: a class, a line that registers it, and this test of it. No file
of the package knows it; and none that runs a task knows those of the package."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m3i_jax import main as command
from m3i_jax import modes, parallel, schema
from m3i_jax.data import pipeline, record_batches
from m3i_jax.data.sources import base
from m3i_jax.errors import UserError
from m3i_jax.modes import task_views
from m3i_jax.training import optimizer, task, trainer
from m3i_jax.training.segment_task import SegmentTask
from tests import toy

PACKAGE = pathlib.Path(trainer.__file__).parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColorBatchBuilder(record_batches.RecordBatchBuilder):
    """Batches of the mean colours of images, float32 [B, 3]."""

    def large(self) -> dict[str, tuple[int, ...]]:
        return {}

    def arrays(self, first: int) -> task.Batch:
        return {"color": np.zeros((self.rows, 3), np.float32)}

    def uniforms(self, first: int) -> np.ndarray:
        return np.zeros((self.rows, 1))

    def fill_row(self, record: base.Record, row: int, u: np.ndarray, batch: task.Batch) -> None:
        image = np.asarray(record.image, np.float32)
        batch["color"][row] = image.mean((0, 1)) / 255


@dataclasses.dataclass(frozen=True)
class MeanColor(task.Task):
    """Learns the mean colour of all images."""

    traits = schema.TaskTraits()

    def init(self, rng: jax.Array) -> Any:
        return {"encoder": {"color": jnp.zeros(3)}}

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        b = self.config.train.batch_size
        return {
            "color": jax.ShapeDtypeStruct((b, 3), "float32"),
            "position": jax.ShapeDtypeStruct((b, 2), "uint32"),
        }

    def _loss(self, params: Any, batch: task.Batch) -> jax.Array:
        return jnp.square(params["encoder"]["color"] - batch["color"]).mean()

    def gradients(self, params: Any, opt: Any, batch: task.Batch) -> task.StepGradients:
        loss, grads = jax.value_and_grad(self._loss)(params, batch)
        return task.StepGradients(grads, loss, {"loss/color": loss}, {})

    def optimizer(self, *, steps: int, warmup: int) -> optax.GradientTransformationExtraArgs:
        return optimizer.build_chain(self.config, steps=steps, warmup=warmup)

    def batches(
        self, source: Any, tokenizer: Any, *, start: int, host: int = 0, hosts: int = 1, **_: Any
    ) -> pipeline.Batches:
        data, batch = self.config.data, self.config.train.batch_size
        rows = batch // hosts
        builder = ColorBatchBuilder(
            data=data,
            seed=self.config.seed,
            source=source,
            rows=rows,
            batch=batch,
            first=start + host * rows,
        )
        return pipeline.iterate(builder)

    def pullbacks(self, state: Any, batch: task.Batch) -> tuple[Any, list[Any]]:
        return jax.vjp(lambda tree: self._loss(tree, batch), state.params)[1], []

    def panel_outputs(self, state: Any, batch: task.Batch) -> dict[str, jax.Array]:
        return {"color": state.params["encoder"]["color"]}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with task.TASK_KINDS.temporary(), task_views.VIEWS.temporary():
        task.register_task("mean_color", MeanColor)
        yield
    schema.TASKS.pop("mean_color", None)


def test_it_trains_a_step_through_the_trainer() -> None:
    config = toy.settings(
        task="mean_color",
        data__captions="no",
        optim__warmup_steps="0",
        optim__lr="0.1",
        train__batch_size="8",
        objective__forms="supervised",
    )
    one = trainer.Trainer(config, parallel.make_mesh((8, 1, 1)), 0)
    state = one.init()
    color = np.random.default_rng(0).random((8, 3)).astype(np.float32)
    batch = {"color": color, "position": np.zeros((8, 2), np.uint32)}
    assert batch.keys() == trainer.abstract_batch(config).keys()
    state, metrics = one.step(state, parallel.to_global(one.mesh, batch))
    assert float(metrics["loss/color"]) == pytest.approx(float(np.square(color).mean()), rel=1e-6)
    np.testing.assert_allclose(state.params["encoder"]["color"], 0.1, rtol=1e-4)  # Adam's step
    assert float(metrics["loss"]) == float(metrics["loss/color"]) and int(state.step) == 1


def test_it_runs_from_the_command_line(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is trained, saved, resumed and shown like the tasks of the package."""
    arguments = [
        "--config",
        "configs/quickstart.py",
        "--config.task=mean_color",
        "--config.data.size=60",
        "--config.data.image_size=32",
        "--config.data.captions=no",
        "--config.train.batch_size=8",
        "--config.train.log_every=1",
        "--config.train.save_every=2",
        "--config.optim.lr=0.05",
        "--config.optim.warmup_steps=1",
        "--config.model.encoder.width=32",
        "--config.model.encoder.depth=1",
        "--config.model.encoder.heads=2",
    ]
    assert command.main([*arguments, "--config.train.steps=6", "--mode=show"]) == 0
    assert "encoder" in capsys.readouterr().out
    run = [*arguments, "--config.train.steps=6", "--workdir", str(tmp_path)]
    code = command.main(run)
    assert code == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss/color"] for row in rows if "loss/color" in row]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert command.main(run) == 0 and "done" in capsys.readouterr().out


def test_an_own_dense_task_keeps_no_average_without_its_setting() -> None:
    """`evaluate.encoder=ema` is refused before its first evaluation would fail."""

    class Smooth(SegmentTask):
        pass

    task.register_task("smooth", Smooth)
    try:
        asked = {"task": "smooth", "evaluate__encoder": "ema"}
        refusal = "'ema' needs optim.ema_of=all: config.task=smooth has no targets"
        for mode in ("train", "eval"):
            with pytest.raises(UserError, match=refusal):
                modes.refuse_missing(mode, toy.settings(**asked), "")
            modes.refuse_missing(mode, toy.settings(**asked, optim__ema_of="all"), "")
    finally:
        schema.TASKS.pop("smooth")


def test_names_of_tasks_are_checked() -> None:
    with pytest.raises(ValueError, match="cannot be named 'mean color'"):
        task.register_task("mean color", MeanColor)
    with pytest.raises(ValueError, match="cannot be named 'detect'"):
        task.register_task("detect", MeanColor)
    with pytest.raises(UserError, match="'colour' is not a task; use one of pretrain, segment"):
        task.task_kind("colour")
    with pytest.raises(UserError, match="config.task"):
        toy.settings(task="colour")
    assert task.register_task("mean_color", MeanColor) is MeanColor  # a module may be reloaded


@pytest.mark.parametrize("name", ["trainer", "step", "loop"])
def test_what_runs_a_task_names_none(name: str) -> None:
    """Neither in code nor in a comment; nor does it import one."""
    text = (PACKAGE / "training" / f"{name}.py").read_text()
    for word in schema.BUILT_IN_TASKS:
        assert not re.search(rf"\b{word}(ion|er|ing|_task)?\b", text, re.IGNORECASE), (name, word)
    assert not re.search(r"\bdense|config\.task\b", text)

"""Fine-tuning and probing a run: they start from its encoder, and each is one command on a
folder."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from m3i_jax import config as configuration
from m3i_jax import main as command
from m3i_jax import parallel
from m3i_jax.errors import UserError
from m3i_jax.modes import setup
from m3i_jax.training.checkpoint import Checkpoints
from m3i_jax.training.trainer import Trainer
from tests import toy


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The directory of a pre-training run with seed 7 and a checkpoint of its first step."""
    directory = tmp_path_factory.mktemp("pretrained")
    config = toy.settings(seed=7, objective__forms="mim", data__captions="no", data__classes=0)
    trainer = Trainer(config, parallel.make_mesh((1, 1, 1), jax.devices()[:1]), 0)
    checkpoints = Checkpoints(directory / "checkpoints", 1)
    checkpoints.save(3, trainer.init(), {"samples_seen": 0, "fingerprint": "none"})
    checkpoints.wait()
    checkpoints.close()
    (directory / "config.txt").write_text(configuration.config_to_text(config))
    return directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Two classes: horizontal and vertical stripes, of any colour, width and phase."""
    directory, r = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(240):
        wave = np.sin(np.arange(48) * r.uniform(0.5, 1.2) + r.uniform(0, 6)) > 0
        colours = r.integers(0, 256, (2, 3))
        pixels = np.where(np.broadcast_to(wave[:, None], (48, 48))[..., None], *colours).astype(
            np.uint8
        )
        name = "lying" if i % 2 else "standing"
        (directory / name).mkdir(exist_ok=True)
        Image.fromarray(pixels if i % 2 else pixels.swapaxes(0, 1)).save(
            directory / name / f"{i}.png"
        )
    return directory


def test_fine_tuning_starts_from_the_encoder_of_the_run(run: pathlib.Path) -> None:
    config = configuration.load_config(
        f"configs/transfer/finetune.py:path=/pictures,from={run},ema=0.9,batch_size=16"
    )
    config.data.update({"size": 64, "classes": toy.CLASSES})
    made = configuration.resolve(config)
    trainer = Trainer(made, parallel.make_mesh((1, 1, 1), jax.devices()[:1]), 0)
    state = trainer.init()
    there = toy.settings(seed=7, objective__forms="mim", data__captions="no", data__classes=0)
    pretrained = Trainer(there, trainer.mesh, 0).init()
    for tree in (state.params, state.opt["target"].params):
        assert set(tree) == {"encoder", "pool", "category"}
        for own, theirs in zip(
            jax.tree.leaves(tree["encoder"]),
            jax.tree.leaves(pretrained.params["encoder"]),
            strict=True,
        ):
            np.testing.assert_array_equal(own, theirs)
    assert 1e-5 < np.asarray(state.params["category"]["kernel"]).std() < 3e-5


def test_an_encoder_of_another_shape_is_refused(run: pathlib.Path) -> None:
    config = configuration.load_config(
        f"configs/transfer/finetune.py:path=/pictures,from={run},batch_size=16"
    )
    config.data.update({"size": 64, "classes": 2})
    config.model.encoder.width = 64
    with pytest.raises(UserError, match="init_from"):
        Trainer(
            configuration.resolve(config), parallel.make_mesh((1, 1, 1), jax.devices()[:1]), 0
        ).init()


def test_a_begun_run_needs_no_source(
    run: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a preemption the same command reads the settings that the run saved."""
    source, tuned = tmp_path / "source", tmp_path / "tuned"
    source.mkdir()
    shutil.copy(run / "config.txt", source)
    arguments = ["--config", f"configs/transfer/finetune.py:path=/pictures,from={source}"]
    arguments += ["--workdir", str(tuned), "--config.train.batch_size=16"]

    def settings() -> str:
        read = command._settings(*command._parse(arguments))
        done = setup.complete_config(read, classes=toy.CLASSES, captions=False, size=64)
        return configuration.config_to_text(done)

    before = settings()
    shutil.rmtree(source)
    with pytest.raises(UserError, match="does not exist"):
        settings()
    (tuned / "checkpoints").mkdir(parents=True)
    (tuned / "config.txt").write_text(before)
    with pytest.raises(UserError, match="does not exist"):  # it saved no step
        settings()
    (tuned / "checkpoints" / "3").mkdir()
    capsys.readouterr()
    assert settings() == before
    assert "does not exist any more: the run, which started from it" in capsys.readouterr().out
    other = before.replace(f"init_from = '{source}'", "init_from = '/other'")
    (tuned / "config.txt").write_text(other)
    with pytest.raises(UserError, match="does not exist"):
        settings()


@pytest.mark.slow
def test_fine_tuning_and_probe_on_a_folder_in_one_command(
    run: pathlib.Path, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Fine-tuning learns the direction of stripes, measured on held-out images; a probe runs to its
    end."""
    shared = [
        "--config.model.dtype=float32",
        "--config.parallel.mesh=(1,2,4)",
        "--config.evaluate.batch_size=32",
    ]
    spec = f"path={folder},from={run},batch_size=32"
    tuned = [
        "--config.optim.lr=3e-3",
        "--config.optim.layer_decay=0.9",
        "--config.train.log_every=10",
        "--config.data.augment.erase_p=0.0",
    ]
    assert (
        command.main(
            [
                "--config",
                f"configs/transfer/finetune.py:{spec},epochs=30,ema=0.9",
                "--workdir",
                str(tmp_path / "a"),
                *shared,
                *tuned,
            ]
        )
        == 0
    )
    probe = [
        "--config",
        f"configs/transfer/probe.py:{spec},epochs=3",
        "--workdir",
        str(tmp_path / "b"),
        *shared,
    ]
    assert command.main(probe) == 0
    found = []
    for name in "ab":
        lines = [
            json.loads(line)
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        found.append([line["eval/direct/top1"] for line in lines if "eval/direct/top1" in line])
    # a few steps of LARS at its rate for 32 images change nearly nothing
    assert found[0][-1] > 0.9 > found[0][0] and len(found[1]) == 2
    assert (
        command.main(
            ["--mode=eval", "--workdir", str(tmp_path / "a"), "--config.evaluate.encoder=ema"]
        )
        == 0
    )
    assert json.loads((tmp_path / "a/eval.json").read_text())["encoder"] == "ema"

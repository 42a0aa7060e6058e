"""A run that starts from other weights, by the command line: its log lines, and its first loss."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest

from m3i_jax import config as configuration
from m3i_jax import main as command
from m3i_jax import parallel
from m3i_jax.interop import tensor_files
from m3i_jax.modes import setup as jobs
from m3i_jax.objective import positions
from m3i_jax.parallel.sharding import path_text
from m3i_jax.training.trainer import Trainer
from tests import saved, toy
from tests.interop.published_vit import ENCODERS, OTHERS, weights

SMALL = [
    "data.size=80", "data.holdout=0.2", "data.image_size=32", "data.captions=no",
    "train.batch_size=8", "train.steps=3",
    "train.log_every=1", "train.panel_every=0", "train.eval_every=0", "train.save_every=10",
    "optim.warmup_steps=1", "optim.lr=0.01",
    "model.dtype=float32", "model.encoder.patch_size=8", "model.encoder.width=32",
    "model.encoder.depth=2", "model.encoder.heads=2",
    "model.decoder.width=32", "model.decoder.depth=1", "model.decoder.heads=2",
    "model.pool.width=24", "model.pool.heads=2",
    "objective.forms=mim,supervised", "evaluate.knn=false", "evaluate.direct=false",
    "evaluate.embedding=false",
    "evaluate.attention=false", "evaluate.confusion=false", "model.encoder.drop_path=0.0",
    "parallel.mesh=(1,2,4)",
]  # fmt: skip
SIZES = {"width": 32, "depth": 2, "heads": 2, "patch": 8, "grid": 4}


def timm(directory: pathlib.Path) -> tuple[str, list[str]]:
    tensor_files.write_safetensors(
        directory / "vit.safetensors", weights(ENCODERS["timm"] + "|" + OTHERS["timm"], **SIZES)
    )
    return str(directory / "vit.safetensors"), [
        "model.encoder.positions=learned",
        "model.encoder.final_norm=true",
    ]


def mae(directory: pathlib.Path) -> tuple[str, list[str]]:
    """Weights with the fixed position table, whose halves are exchanged."""
    fixed = np.concatenate([np.zeros((1, 32)), np.roll(positions.sincos_2d(4, 32), 16, -1)]).astype(
        np.float32
    )[None]
    tensor_files.write_safetensors(
        directory / "mae.safetensors", {**weights(ENCODERS["mae"], **SIZES), "pos_embed": fixed}
    )
    return str(directory / "mae.safetensors"), [
        "model.encoder.positions=sincos_columns",
        "model.encoder.final_norm=true",
    ]


def google(directory: pathlib.Path) -> tuple[str, list[str]]:
    tensor_files.write_npz(directory / "vit.npz", weights(ENCODERS["google"], **SIZES))
    return str(directory / "vit.npz"), [
        "model.encoder.positions=learned",
        "model.encoder.final_norm=true",
    ]


def ours(directory: pathlib.Path) -> tuple[str, list[str]]:
    saved.run(directory, toy.settings(objective__forms="mim", data__captions="no", data__classes=0))
    return str(directory), []


def qkv(layout: str, path: str) -> np.ndarray:
    """The qkv kernel [D, 3 D] of the first block, read from the file."""
    if layout == "google":
        table, at = (
            tensor_files.read_tensors(path),
            "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/{}/kernel",
        )
        return np.concatenate(
            [np.asarray(table[at.format(n)]).reshape(32, 32) for n in ("query", "key", "value")], 1
        )
    return np.asarray(tensor_files.read_tensors(path)["blocks.0.attn.qkv.weight"]).T


@pytest.mark.slow
@pytest.mark.parametrize("layout", (timm, ours, mae, google), ids=lambda layout: layout.__name__)
def test_the_first_loss_is_that_of_the_given_weights(
    layout, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    path, more = layout(tmp_path / "there")
    settings = [f"--config.{item}" for item in [*SMALL, *more]]
    call = [
        "--config",
        "configs/quickstart.py",
        "--workdir",
        str(tmp_path / "run"),
        *settings,
        f"--config.init_from={path}",
    ]
    assert command.main(call) == 0
    out = capsys.readouterr().out
    # Three steps of 0.01 after a warm-up of one: the log of a run warns before its first step.
    assert "warning: optim.lr=0.01: the learning rates of all 3 steps sum to 0.015," in out
    matched, here, taken = re.search(
        r"init_from .*: (\d+) of (\d+) arrays, [\d,]+ numbers: (.*)", out
    ).groups()  # type: ignore[union-attr]
    assert "encoder (" in taken
    missed = re.search(r"missing, initialized randomly: (.*)", out)[1]  # type: ignore[index]
    assert (
        "encoder" not in missed
        and "pool" in missed
        and "category" in missed
        and ("decoder" in missed) != (layout is ours)
    )
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert sorted(losses) == [1, 2, 3] and all(np.isfinite(list(losses.values())))

    # the same first step with the encoder set in the test, and without it
    config = configuration.load_config("configs/quickstart.py")
    configuration.apply_overrides(config, [*SMALL, *more])
    job = jobs.open_setup(
        configuration.resolve(config), str(tmp_path / "other"), trains=[("mim", "supervised")]
    )
    trainer = Trainer(job.config, job.mesh, 0)
    source = {}
    if layout is ours:
        params = saved.random(
            toy.settings(objective__forms="mim", data__captions="no", data__classes=0), seed=1
        )
        source = {name: array for name, array in saved.flat(params).items()}
    else:
        from m3i_jax.interop import vit_weights

        source = vit_weights.load_vit(tensor_files.read_tensors(path)).arrays
        np.testing.assert_allclose(
            source["encoder/blocks/attention/qkv/kernel"][0], qkv(layout.__name__, path), atol=1e-6
        )
    batch = next(job.batches(0))
    found = []
    for given in (source, {}):
        state = trainer.init()
        replaced = []

        def put(at, leaf, given=given, replaced=replaced):
            name = path_text(at)
            path = re.sub(r"^(params/|opt/target/params/)", "", name)
            if path == name or path not in given or given[path].shape != leaf.shape:
                return leaf
            replaced.append(name)
            return jax.device_put(np.asarray(given[path], leaf.dtype), leaf.sharding)

        state = jax.tree_util.tree_map_with_path(put, state)
        if given:
            assert sum(name.startswith("params/") for name in replaced) == int(matched) < int(here)
            assert any(name.startswith("opt/target/params/encoder") for name in replaced)
        _, metrics = trainer.step(state, parallel.to_global(job.mesh, batch))
        found.append(float(metrics["loss"]))
    assert losses[1] == pytest.approx(found[0], rel=1e-5) and abs(found[1] - found[0]) > 1e-3

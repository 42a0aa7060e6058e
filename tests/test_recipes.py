"""Golden values of the paper's Table 7 recipes, and the scaling rule for other batch sizes."""

import dataclasses
import pathlib
from typing import Any

import jax
import pytest

from m3i_jax import config as configuration
from m3i_jax import main as command
from m3i_jax import parallel, schema, validation
from m3i_jax.data.sources import mixture
from m3i_jax.errors import UserError
from m3i_jax.modes import show
from m3i_jax.parallel.chips import CHIPS
from m3i_jax.profiling import flops, hardware, traffic_model
from m3i_jax.training import trainer
from tests.bench import formula
from tests.quick_show import leave_out_traffic

ROOT = pathlib.Path(__file__).parent.parent


def recipe(arguments: str = "") -> schema.Config:
    return configuration.resolve(
        configuration.load_config(
            str(ROOT / "configs/m3i.py") + (f":{arguments}" if arguments else "")
        )
    )


def read(config: schema.Config, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


# Golden: Table 7, column ViT-B/16 and values common to both columns.
TABLE_7 = {
    "model.decoder.depth": 4,
    "model.decoder.width": 768,
    "model.decoder.mlp_ratio": 3072 / 768,
    "model.decoder.heads": 16,
    "model.encoder.width": 768,
    "model.pool.width": 768,
    "model.pool.heads": 16,
    "data.mask": "blockwise",
    "data.mask_ratio": 0.5,
    "data.image_size": 224,
    "optim.b1": 0.9,
    "optim.b2": 0.95,
    "optim.lr": 1e-3,
    "optim.weight_decay": 0.1,
    "optim.ema": 0.995,
    "optim.ema_schedule": "cosine",
    "objective.label_smoothing": 0.1,
    "model.encoder.drop_path": 0.1,
    "model.encoder.drop_path_rule": "linear",
}


@pytest.mark.parametrize("data", ["imagenet", "yfcc", "joint"])
def test_table_7(data: str) -> None:
    config = recipe(f"data={data}")
    assert {key: read(config, key) for key in TABLE_7} == TABLE_7
    assert config.model.text.depth == 12 and config.model.text.width == 768  # BERT-Base


# Golden: Table 7, column InternImage-H, where it differs.
TABLE_7_H = TABLE_7 | {
    "model.decoder.width": 1024,
    "model.decoder.mlp_ratio": 4096 / 1024,
    "model.encoder.width": 1024,
    "data.image_size": 192,
    "model.encoder.drop_path": 0.2,
    "model.encoder.drop_path_rule": "uniform",
}


def test_table_7_of_the_largest_run() -> None:
    config = recipe("data=joint,model=internimage_h")
    assert {key: read(config, key) for key in TABLE_7_H} == TABLE_7_H
    assert (config.train.batch_size, config.train.epochs, config.optim.warmup_epochs) == (
        40_000,
        30,
        1,
    )
    assert (config.grid, config.tokens, config.hidden) == (
        12,
        144,
        72,
    ) and config.optim.offset_lr == 0.1
    assert {
        name: validation.fit_batch_to_mesh(config, (n, 1, 1))[0].train.batch_size
        for name, n in (("64 chips", 64), ("256 chips", 256))
    } == {"64 chips": 40_064, "256 chips": 40_448}
    assert validation.fit_batch_to_mesh(config, (2, 4, 8))[1] == ""  # 40,000 divides by 16


LENGTHS = {
    # recipe: (epochs, batch, steps an epoch, steps, warm-up)
    "data=imagenet": (1600, 4096, 312, 499_200, 12_480),
    "data=imagenet,epochs=400.0": (400, 4096, 312, 124_800, 12_480),
    "data=yfcc": (138, 4096, 3_620, 499_560, 12_670),
    "data=joint": (30, 40_000, 11_050, 331_500, 11_050),
    "data=imagenet,batch_size=1024": (1600, 1024, 1_251, 2_001_600, 50_040),
    "data=imagenet,epochs=100.0": (100, 4096, 312, 31_200, 3_120),  # warm-up is at most a tenth
}


@pytest.mark.parametrize("arguments", LENGTHS)
def test_lengths(arguments: str) -> None:
    epochs, batch, *golden = LENGTHS[arguments]
    config = recipe(arguments)
    assert (config.train.epochs, config.train.batch_size) == (epochs, batch)
    assert list(dataclasses.astuple(trainer.run_length(config))) == golden


def test_yfcc_is_as_many_steps_as_imagenet() -> None:
    """Section 4.2: both have the same number of iterations."""
    steps = [trainer.run_length(recipe(f"data={data}")).steps for data in ("imagenet", "yfcc")]
    assert abs(steps[1] / steps[0] - 1) < 1e-3


def test_another_batch_size() -> None:
    """Proportional below 4,096, constant above: the paper has the same values at 40,000."""
    small, large = recipe("batch_size=256").optim, recipe("batch_size=16384").optim
    assert small.lr == pytest.approx(1e-3 / 16) and 1 - small.ema == pytest.approx(0.005 / 16)
    assert (
        (large.lr, large.ema)
        == (1e-3, 0.995)
        == (recipe("data=joint").optim.lr, recipe("data=joint").optim.ema)
    )
    assert small.warmup_epochs == large.warmup_epochs == 40


@pytest.mark.parametrize("file", ["m3i.py", "forms.py", "folder.py", "transfer/probe.py"])
def test_an_impossible_batch_size_is_refused_by_its_own_name(file: str) -> None:
    with pytest.raises(UserError, match=r"config.train.batch_size: -4 must be at least 1"):
        configuration.resolve(configuration.load_config(f"{ROOT}/configs/{file}:batch_size=-4"))


def test_data_sources() -> None:
    imagenet, yfcc, joint = (
        recipe(f"data={data},path=/d/").data for data in ("imagenet", "yfcc", "joint")
    )
    assert (imagenet.path, imagenet.split, imagenet.holdout_split) == ("/d", "train", "val")
    assert (imagenet.classes, imagenet.captions) == (1000, "no")
    assert (yfcc.path, yfcc.classes, yfcc.captions, yfcc.holdout) == ("/d/*.tar", 0, "yes", 0)
    entries = [mixture.parse_entry(text) for text in joint.mixture]
    assert [(e.kind, e.path) for e in entries] == [
        ("folder", "/d/imagenet22k"),
        ("tars", "/d/laion400m/*.tar"),
        ("tars", "/d/yfcc15m/*.tar"),
        ("tars", "/d/cc12m/*.tar"),
    ]
    assert (
        all(e.weight is None for e in entries)
        and joint.classes == 21_841
        and joint.captions == "yes"
        and joint.size == 442_000_000
    )


def test_models_and_refusals() -> None:
    large, huge = recipe("model=vit_l16").model, recipe("model=vit_h14")
    assert (large.encoder.depth, large.encoder.width, large.decoder.width) == (
        24,
        1024,
        1024,
    ) and huge.grid == 16
    for arguments, expected in (
        ("model=vit", "is not one of vit_tiny"),
        ("data=laion", "imagenet, yfcc, joint"),
    ):
        with pytest.raises(UserError, match=expected):
            recipe(arguments)


def test_show(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The printed plan of a recipe, with a small network so that tracing is fast."""
    arguments = "data=joint"
    leave_out_traffic(monkeypatch)
    monkeypatch.chdir(ROOT)
    small = [
        "--config.model.encoder.depth=1",
        "--config.model.decoder.depth=1",
        "--config.model.text.depth=1",
    ]
    assert (
        command.main(
            [
                "--config",
                f"configs/m3i.py:{arguments}",
                "--mode=show",
                "--config.report.mfu=0.5",
                *small,
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    length = trainer.run_length(recipe(arguments))
    assert (
        f"{length.steps:,} of " in out
        and f"warm-up {length.warmup:,}" in out
        and "assumed" not in out
    )
    assert "loss/text" in out and "loss/category" in out
    assert f"{length.steps * recipe(arguments).train.batch_size:,}, " in out
    assert "at 50% of the peak" in out and all(f"\n{name} " in out for name, *_ in hardware.SLICES)


@pytest.mark.slow
def test_operations_of_the_largest_run() -> None:
    """1.52 TFLOP per mixed view from shapes alone, and the sum of a formula per part."""
    config = recipe("data=joint,model=internimage_h")
    run = trainer.Trainer(config, parallel.make_mesh((1, 1, 1), jax.devices()[:1]), 49_408)
    counted = (
        flops.count_flops(run.trace, run.template, trainer.abstract_batch(config)).total
        / config.train.batch_size
    )
    assert 0.97 < counted / 1.52e12 < 1.03 and 0.97 < counted / formula.step(run.task.plan) < 1.03


def test_days_of_the_paper_s_run() -> None:
    """Golden, by hand: 279.4 GFLOP per view, 1600 epochs of 312 steps of 4,096, on 16 chips of 197
    TFLOP/s at 0.45."""
    total = 279.36e9 * 4096 * 499_200
    by_hand = total / (16 * 197e12 * 0.45) / 3600 / 24
    assert (
        hardware.training_days(total, kind="v5e", chips=16, mfu=0.45) == pytest.approx(by_hand)
        and 4.6 < by_hand < 4.7
    )
    traffic = dict.fromkeys(("tpu", "cuda"), traffic_model.StepTraffic(2e9, 1e10, 0.0))
    table = traffic_model.bound_rows(
        hardware.SLICES, flops=total / 499_200, traffic=traffic, state=2e9, params=150_000_000,
        images=4096, steps=499_200, mfu=0.45,
    )  # fmt: skip
    rows = {row[0]: row for row in table}
    assert (
        rows["v5litepod-16"][3] == "4.7"
        and rows["h100:1"][3] == "14.9"
        and rows["v6e-256"][3] == "0.06"
    )
    # 256 images of 2 GB and 10 GB of state on each of 16 chips, at 819 GB/s
    assert rows["v5litepod-16"][4] == f"{522e9 / 819e9 * 499_200 / 86_400:.1f}" == "3.7"
    # 1.2 GB of sums of gradients, at 200 GB/s; between hosts a GPU has 50 GB/s
    assert (
        rows["v5litepod-16"][5] == f"{150e6 * 8 * 15 / 16 / 200e9 * 499_200 / 86_400:.2f}" == "0.03"
    )
    assert [rows[name][6] for name in ("v5litepod-16", "v6e-256")] == ["FLOPs", "memory"]


def test_a_slice_without_room_for_the_state_has_no_days() -> None:
    run: dict[str, Any] = {
        "flops": 1e15, "params": 10**10, "images": 512, "steps": 100, "mfu": 0.5,
        "traffic": dict.fromkeys(("tpu", "cuda"), traffic_model.StepTraffic(1e9, 1e9, 0.0)),
    }  # fmt: skip
    # chips of 15.75 GiB
    for state, fits in ((16 * 15.7 * 2**30, True), (16 * 15.8 * 2**30, False)):
        (row,) = traffic_model.bound_rows([("v5litepod-16", "v5e", 16)], state=state, **run)
        assert row[2] == "15.75 GiB"
        assert (row[3:] == ("-", "-", "-", "no room for the state")) is not fits, row


def test_slices_are_of_known_chips_and_named_once() -> None:
    names = [name for name, *_ in hardware.SLICES]
    assert len(set(names)) == len(names) and {kind for _, kind, _ in hardware.SLICES} == set(CHIPS)


def test_the_share_of_the_peak_is_a_share() -> None:
    config = configuration.default_config()
    for wrong in (0.0, 1.5):
        configuration.apply_overrides(config, [f"report.mfu={wrong}"])
        with pytest.raises(UserError, match="report.mfu"):
            configuration.resolve(config)


def test_show_knows_what_it_assumes() -> None:
    done, assumed = show.assume_data(recipe("data=joint"))
    assert not assumed and done.data.classes == 21_841 and done.data.captions == "yes"

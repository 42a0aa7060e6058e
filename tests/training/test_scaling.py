"""Values of the open settings, and the warnings about runs that are too short to learn."""

import dataclasses
import math
import pathlib

import pytest

from m3i_jax import config as configuration
from m3i_jax import main as command
from m3i_jax import schema, validation
from m3i_jax.errors import UserError
from m3i_jax.models import backbones
from m3i_jax.modes import setup as jobs
from m3i_jax.training import optimizer, scaling, trainer
from tests import toy
from tests.quick_show import leave_out_estimates

ROOT = pathlib.Path(__file__).parent.parent.parent
SOURCES = {
    "folder": "path=/images",
    "tars": "path=/t/*.tar",
    "mixture": "sources=folder:/a",
    "tfds": "name=x",
}


def made(name: str, size: int, *overrides: str, **arguments: object) -> schema.Config:
    """A shipped configuration, with open settings filled as for a source of `size` images."""
    arguments_text = ",".join(
        filter(None, [SOURCES.get(name, ""), *(f"{k}={v}" for k, v in arguments.items())])
    )
    config = configuration.load_config(f"{ROOT}/configs/{name}.py:{arguments_text}")
    configuration.apply_overrides(config, overrides)
    return jobs.complete_config(
        configuration.resolve(config), classes=10, captions=False, size=size
    )


@pytest.mark.parametrize(
    ("batch", "epochs", "size"),
    [
        (4096, 400, scaling.IMAGENET),
        (4096, 1600, scaling.IMAGENET),
        (4096, 138, 14_829_396),
        (40_000, 30, 442_000_000),
    ],
)
def test_the_paper_s_runs_have_the_paper_s_values(batch: int, epochs: int, size: int) -> None:
    """Table 7: the same learning rate and momentum for ImageNet, YFCC and the joint run; the
    ablations warm up for 40 of 400 epochs."""
    config = made("folder", size, model="vit_b16", batch_size=batch, epochs=epochs)
    assert (config.optim.lr, config.optim.ema) == (1e-3, 0.995)
    assert (config.data.crop_scale, config.data.augment) == ((0.08, 1.0), schema.Augment())
    assert config.optim.warmup_epochs == pytest.approx(epochs / 10)


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_stays_open(name: str) -> None:
    config = made(name, 6000, model="vit_tiny", batch_size=64, epochs=11)
    assert scaling.open_settings(config) == []
    validation.validate_settings(config)
    # Table 7 in proportion to the batch, 1.6e-5 and 0.99992, left such a run where it began.
    assert 1e-3 <= config.optim.lr <= 4e-3 and 0.95 <= config.optim.ema <= 0.99
    # A short run has no time to learn from strong distortions, and colours tell categories apart.
    a = config.data.augment
    assert config.data.crop_scale[0] >= 0.4
    assert (a.jitter_p, a.grayscale_p, a.blur_p, a.solarize_p) == (0.0, 0.0, (0.0, 0.0), (0.0, 0.0))


@pytest.mark.parametrize(
    ("size", "epochs", "evaluations"),
    [
        (6000, 50, range(8, 9)),
        (6000, 11, range(5, 7)),  # every two epochs: an evaluation encodes all training images
        (6000, 1, range(1, 2)),
        (scaling.IMAGENET, 400, range(1601, 1603)),  # every 5,000 steps, as before
    ],
)
def test_curves_of_a_short_run_have_a_shape(size: int, epochs: int, evaluations: range) -> None:
    train = made("folder", size, model="vit_tiny", batch_size=64, epochs=epochs).train
    steps = math.ceil(epochs * size / 64)
    assert math.ceil(steps / train.eval_every) in evaluations  # the last is at the end
    assert train.panel_every == train.eval_every


def test_what_is_set_is_kept() -> None:
    asked = (
        "optim.lr=1e-3",
        "optim.ema=0.995",
        "optim.warmup_epochs=2",
        "data.crop_scale=(0.08,1.0)",
        "data.augment.blur_sigma=(0.1,2.0)",
        "train.eval_every=0",
    )
    config = made("folder", 6000, *asked, model="vit_tiny", batch_size=64, epochs=11)
    assert (config.optim.lr, config.optim.ema, config.optim.warmup_epochs) == (1e-3, 0.995, 2.0)
    assert (config.data.crop_scale, config.data.augment.blur_sigma) == ((0.08, 1.0), (0.1, 2.0))
    assert config.train.eval_every == 0
    plain = schema.Config()
    assert (
        scaling.fill_open_settings(
            dataclasses.replace(plain, data=dataclasses.replace(plain.data, size=60))
        ).optim
        == plain.optim
    )


def test_a_rate_that_follows_is_not_below_the_last_one() -> None:
    """A cosine from it would rise; a rate that is given is refused where it is read."""
    plain = schema.Config(data=schema.Data(size=6000))
    optim = dataclasses.replace(plain.optim, lr=0.0, min_lr=0.1)
    with pytest.raises(UserError, match=r"optim\.min_lr: 0\.1 exceeds .*, 0\.00.*set optim\.lr"):
        scaling.fill_open_settings(dataclasses.replace(plain, optim=optim))


def test_a_rule_with_other_rates_than_adam_needs_its_own() -> None:
    """The rates of the rule are of AdamW; LARS's are hundreds of times higher."""
    plain = schema.Config(data=schema.Data(size=6000))
    for rule in schema.UPDATE_RULES:
        optim = dataclasses.replace(plain.optim, lr=0.0, rule=rule)
        config = dataclasses.replace(plain, optim=optim)
        if rule != "lars":
            assert scaling.fill_open_settings(config).optim.lr > 0
            continue
        with pytest.raises(UserError, match=r"optim\.lr: 0 .*AdamW.*optim\.rule=lars; set"):
            scaling.fill_open_settings(config)
        given = dataclasses.replace(config, optim=dataclasses.replace(optim, lr=2.0))
        assert scaling.fill_open_settings(given).optim.lr == 2.0


def test_length_and_batch_of_an_override_count() -> None:
    """`--config.train.steps` is applied after the configuration file, and the rule uses it."""
    plain = made("folder", 6000, model="vit_tiny", batch_size=64, epochs=400)
    changes = ("train.steps=924", "train.batch_size=64", "data.image_size=32")
    short = made("folder", 6000, *changes, model="vit_tiny", batch_size=256, epochs=400)
    assert short.optim.lr > plain.optim.lr and short.optim.ema < plain.optim.ema
    assert trainer.run_length(short).warmup == pytest.approx(92, abs=2)
    assert short.data.augment.blur_sigma[1] == pytest.approx(2 * 32 / 224, abs=1e-3)


@pytest.mark.parametrize("width", [96, 384, 768, 1280])
@pytest.mark.parametrize(
    "known", [scaling.PRETRAINING, scaling.FINETUNING, backbones.INTERN_IMAGE.finetuning.reference]
)
def test_the_rules_are_bounded(known: scaling.Reference, width: int) -> None:
    sizes, batches = [10.0**e for e in range(4, 12)], [32, 64, 256, 1024, 4096, 65536]
    assert (
        scaling.scaling_strength(known, sizes[0]) == 0
        and scaling.scaling_strength(known, sizes[-1]) == 1
    )
    short = known.most * (96 / width) ** (2 / 3)
    for samples in sizes:
        rates = [scaling.scaled_lr(known, batch=b, samples=samples, width=width) for b in batches]
        assert rates == sorted(rates)
        assert rates[-1] <= max(known.lr, short) * (1 + 1e-9)
        for batch in batches:
            memory = 1 / (1 - scaling.scaled_momentum(batch=batch, steps=samples / batch))
            assert 10 - 1e-6 <= memory <= max(10, samples / batch / 20) * (1 + 1e-6)
            # In samples never more than the paper's 200 steps of 4,096.
            assert memory * batch <= max(200 * 4096, 200 * batch) * (1 + 1e-6)
    longest = [
        scaling.scaled_lr(known, batch=b, samples=known.samples, width=width) for b in batches
    ]
    assert longest[-1] == pytest.approx(known.lr)
    assert longest[0] == pytest.approx(known.lr * (32 / known.batch) ** 0.5)


def warned(config: schema.Config) -> list[str]:
    length = trainer.run_length(config)
    return scaling.scaling_warnings(config, steps=length.steps, warmup=length.warmup)


def short_run(**changes: object) -> list[str]:
    config = toy.settings(train__steps=924, optim__warmup_steps=92, **changes)
    return warned(config)


def test_a_run_that_cannot_move_is_warned_of() -> None:
    """Learning rate and momentum of Table 7 in proportion to a batch of 64, in a run of 924
    steps."""
    rate, memory = short_run(optim__lr=1.6e-5, optim__ema=0.99992)
    assert "optim.lr=1.6e-05" in rate and "924 steps sum to 0.0074" in rate and "optim.lr=0" in rate
    assert "optim.ema=0.99992" in memory and "12,500 steps" in memory and "96%" in memory
    assert short_run(optim__lr=1e-3, optim__ema=0.98) == []
    # A rate that stays moves twice as far as one that falls, and one that falls at the end as far
    # as its schedule says: 45.5 + 666 + 83.5 steps of the peak.
    changes = {"optim__lr": 4e-5, "optim__ema": 0.98}
    assert "sum to 0.018" in short_run(**changes)[0]
    assert short_run(**changes, optim__schedule="constant") == []
    assert short_run(**changes, optim__schedule="wsd", optim__decay_share=0.18) == []
    assert len(short_run(**changes, optim__schedule="steps", optim__milestones=(0.5,))) == 1
    # The half of a cosine moves half as much as a constant momentum does.
    assert len(short_run(optim__lr=1e-3, optim__ema=0.998)) == 1
    assert short_run(optim__lr=1e-3, optim__ema=0.998, optim__ema_schedule="constant") == []


@pytest.mark.parametrize(
    ("schedule", "unread"),
    [
        ("cosine", ["decay_share=0.3", "milestones=(0.5,)"]),
        ("wsd", ["milestones=(0.5,)"]),
        ("steps", ["min_lr=1e-06", "decay_share=0.3"]),
        ("poly", ["min_lr=1e-06", "decay_share=0.3", "milestones=(0.5,)"]),
        ("constant", ["min_lr=1e-06", "decay_share=0.3", "milestones=(0.5,)"]),
    ],
)
def test_a_setting_that_the_schedule_does_not_read_is_warned_of(
    schedule: str, unread: list[str]
) -> None:
    """The rate of a schedule changes with the settings that it reads, and with no other."""
    values = {"min_lr": 1e-6, "decay_share": 0.3, "milestones": (0.5,)}
    rates = {"optim__lr": 1e-3, "optim__ema": 0.98, "optim__schedule": schedule}
    given = {f"optim__{key}": value for key, value in values.items()}
    words = short_run(**rates, **given)
    assert [line.split(" has no effect")[0] for line in words] == [
        f"warning: optim.{each}" for each in unread
    ]
    for key, value in values.items():
        plain, changed = (
            [float(optimizer.lr_schedule(o, steps=100, warmup=10)(k)) for k in (50, 85, 99)]
            for o in (
                schema.Optim(lr=1e-3, schedule=schedule),
                schema.Optim(lr=1e-3, schedule=schedule, **{key: value}),
            )
        )
        assert (plain == changed) == any(each.startswith(key) for each in unread)


@pytest.mark.parametrize(
    "changes",
    [
        {"objective__target_encoder": "shared"},
        {"objective__forms": "supervised"},
        {"optim__rule": "lars", "optim__lr": 1e-5, "objective__forms": "supervised"},
        {"model__encoder__freeze": True, "optim__lr": 1e-5, "objective__forms": "supervised"},
    ],
)
def test_no_warning_of_what_is_not_used(changes: dict[str, object]) -> None:
    assert short_run(**{"optim__lr": 1e-3, "optim__ema": 0.99999} | changes) == []


def test_the_filled_values_are_not_warned_of() -> None:
    for batch in (32, 256, 1024):
        for epochs in (5, 50, 5000):
            config = made("folder", 6000, model="vit_tiny", batch_size=batch, epochs=epochs)
            assert warned(config) == [], (batch, epochs)


def test_show_says_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    leave_out_estimates(monkeypatch)
    spec = "configs/folder.py:path=/images,model=vit_tiny,batch_size=64,epochs=11"
    few = ["--config.data.size=6000", "--config.data.image_size=32", "--mode=show"]
    assert command.main(["--config", spec, *few]) == 0
    out = capsys.readouterr().out
    assert "warning" not in out and "optim.lr, optim.ema, optim.warmup_epochs" in out
    assert (
        command.main(
            ["--config", spec, *few, "--config.optim.lr=1.6e-5", "--config.optim.ema=0.99992"]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "warning: optim.lr=1.6e-05" in out and "warning: optim.ema=0.99992" in out

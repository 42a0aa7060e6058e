"""Named methods trained with other than their published settings: one log line with every such key
and no other."""

import pathlib

import pytest

from m3i_jax import config as configuration
from m3i_jax import published_settings, schema
from m3i_jax.modes import show
from m3i_jax.objective import published
from m3i_jax.objective.prototype_targets import PrototypeSoftmax
from m3i_jax.training import plan
from tests import toy
from tests.quick_show import leave_out_estimates

ROOT = pathlib.Path(__file__).parents[1]


def resolved(spec: str, *overrides: str) -> schema.Config:
    cfg = (
        configuration.load_config(f"{ROOT}/configs/{spec}")
        if spec
        else configuration.default_config()
    )
    configuration.apply_overrides(cfg, list(overrides))
    return configuration.resolve(cfg)


def keys(lines: list[str]) -> set[str]:
    return {line.split(" ")[0] for line in lines}


def test_every_named_method_has_settings():
    assert published_settings.SETTINGS.keys() == published.PUBLISHED.keys()


@pytest.mark.parametrize("name", published.PUBLISHED)
def test_recipe_has_no_difference_and_default_has_all(name):
    for batch in ("", ",batch_size=1024", ",batch_size=16384"):
        assert (
            published_settings.unpublished_settings_note(resolved(f"forms.py:form={name}{batch}"))
            == ""
        )
    plain = configuration.default_config()
    expected = set()
    for key, value in published_settings.SETTINGS[name].items():
        at = plain
        for part in key.split("."):
            at = at[part]
        expected |= {key} if at != value else set()
    config = resolved("", f"objective.forms={name}")
    assert keys(published_settings.published_differences(config)[name]) == expected and expected
    line = published_settings.unpublished_settings_note(config)
    assert (
        "\n" not in line
        and all(key in line for key in expected)
        and f"configs/forms.py:form={name}" in line
    )


def test_values_of_publications():
    """He et al. 2022, section 4 and appendix A: a decoder of 8 blocks of 512, 75 % hidden, 1,600
    epochs at a batch of 4,096, 1.5e-4 for 256 images, weight decay 0.05."""
    mae = resolved("forms.py:form=mae,batch_size=4096")
    assert (mae.model.decoder.width, mae.model.decoder.depth) == (512, 8)
    assert (mae.data.mask, mae.data.mask_ratio, mae.train.epochs) == ("uniform", 0.75, 1600.0)
    assert (mae.optim.lr, mae.optim.weight_decay) == pytest.approx((1.5e-4 * 16, 0.05))


def test_the_line_has_both_values():
    line = published_settings.unpublished_settings_note(resolved("", "objective.forms=mae"))
    assert (
        "mae: data.mask blockwise instead of uniform, data.mask_ratio 0.5 instead of 0.75" in line
        and "train.epochs" not in line
    )


def test_steps_override_epochs_and_rates_scale_with_the_batch():
    differences = published_settings.published_differences(
        resolved("forms.py:form=clip", "train.steps=100", "optim.warmup_steps=7", "optim.lr=1e-3")
    )
    assert differences == {
        "clip": [
            "optim.lr 0.001 instead of 0.0005",
            "optim.warmup_steps 7 instead of optim.warmup_epochs 1",
            "train.steps 100 instead of train.epochs 25",
        ]
    }
    assert keys(
        published_settings.published_differences(resolved("forms.py:form=mae,size=tiny"))["mae"]
    ) >= {"optim.lr", "train.steps", "model.decoder.width"}


def test_rates_are_those_of_the_batch_that_they_were_published_for():
    """capi's of 16,384 images; the rate at the end stays below the peak; a method that is joined
    with another keeps its own."""
    for batch, expected in (
        (40_000, (1e-3, 9.549e-5, 0.999)),
        (16_384, (1e-3, 9.549e-5, 0.999)),
        (4096, (2.5e-4, 2.387e-5, 0.99975)),
    ):
        optim = resolved(f"forms.py:form=capi,batch_size={batch}").optim
        assert (optim.lr, optim.min_lr, optim.ema) == pytest.approx(expected, rel=1e-3)
    joined = configuration.load_config(f"{ROOT}/configs/forms.py:form=capi+dino").optim
    assert (joined.lr, joined.ema) == pytest.approx((8e-3, 0.968))
    clip = resolved("forms.py:form=clip,batch_size=64").optim
    assert (clip.lr, clip.min_lr) == pytest.approx((5e-4 / 64, 1e-5 / 64))


@pytest.mark.parametrize(
    ("name", "batch", "expected"),
    [
        # of public commands and configurations
        ("mae", 4096, {"lr": 2.4e-3, "min_lr": 0.0, "b2": 0.95, "weight_decay": 0.05}),
        ("data2vec", 2048, {"lr": 2e-3, "min_lr": 1e-5, "ema": 0.9998}),
        ("feature_distillation", 2048, {"lr": 1.2e-3, "min_lr": 2e-5}),
        ("milan", 4096, {"lr": 2.4e-3}),
        # 1e-6 + 9.99e-4 (1 + cos(785 / 985 pi)) / 2: 785 epochs of a cosine of 985
        ("msn", 1024, {"lr": 1e-3, "min_lr": 9.92e-5, "ema": 0.996, "warmup_start": 0.2}),
        ("densecl", 256, {"ema": 0.999}),
        ("dino", 512, {"lr": 1e-3, "min_lr": 1e-6, "ema": 0.996}),
        ("simdino", 512, {"lr": 1e-3, "min_lr": 1e-6, "ema": 0.996}),
        ("ibot", 1024, {"lr": 2e-3, "min_lr": 1e-6, "ema": 0.996}),
        ("dinov2", 2048, {"lr": 4e-3 * 2**0.5, "min_lr": 1e-6, "ema": 0.992}),
        ("dinov3_gram", 4096, {"lr": 4e-4, "ema": 0.994}),
        ("ijepa", 2048, {"lr": 1e-3, "min_lr": 1e-6, "ema": 0.996}),
        ("siamese_im", 4096, {"lr": 1e-3, "ema": 0.995}),
        ("siglip", 32_768, {"lr": 1e-3, "weight_decay": 0.1}),
        ("siglip", 512, {"lr": 1e-3, "weight_decay": 0.1}),
        ("lejepa", 256, {"lr": 5e-4, "min_lr": 5e-7}),
        ("lejepa", 128, {"lr": 2.5e-4, "min_lr": 2.5e-7}),
    ],
)
def test_the_batch_of_a_publication_has_its_rates(
    name: str, batch: int, expected: dict[str, float]
) -> None:
    optim = resolved(f"forms.py:form={name},batch_size={batch}").optim
    assert {key: getattr(optim, key) for key in expected} == pytest.approx(expected, rel=1e-3)


def test_show_prints_the_line(capsys, monkeypatch):
    leave_out_estimates(monkeypatch)
    config = toy.settings(objective__forms="simclr")
    assert show.run(config, workdir=None) == 0
    assert (
        published_settings.unpublished_settings_note(config) in capsys.readouterr().out.splitlines()
    )


def test_each_combined_method_is_compared_with_its_own_settings():
    """The last method's settings apply; the line lists those of the first that they replace."""
    differences = published_settings.published_differences(resolved("forms.py:form=byol+moco_v3"))
    assert differences.keys() == {"byol"} and keys(differences["byol"]) == {
        "optim.ema",
        "optim.warmup_epochs",
        "train.epochs",
    }


@pytest.mark.parametrize(
    "forms", ["capi+dinov3_gram", "dino+dinov3_gram", "dino+ibot", "ibot+dino", "dinov2+ibot"]
)
def test_a_joined_row_keeps_the_assignments_of_each(forms):
    """The constraint and the temperature of each row alone; a value that is given is that of
    all."""

    def assignments(*overrides, form=forms):
        config = resolved(f"forms.py:form={form},batch_size=4096", *overrides)
        terms, _ = plan.terms_of(config.objective, 1)
        kept = [t for t in terms if isinstance(t.posterior, PrototypeSoftmax)]
        return [(t.posterior.constraint, t.posterior.target_temperature) for t in kept]

    alone = [each for name in forms.split("+") for each in assignments(form=name)]
    assert assignments() == alone
    assert ("position_sinkhorn" in dict(alone)) == ("capi" in forms)
    given = ("objective.prototype_targets=sinkhorn", "objective.target_temperature=(0.1,0.2)")
    assert set(assignments(*given)) == {("sinkhorn", (0.1, 0.2))}


def test_paper_forms_have_no_line():
    assert (
        published_settings.unpublished_settings_note(resolved("forms.py:form=k"))
        == published_settings.unpublished_settings_note(resolved("quickstart.py"))
        == ""
    )

import jax
import pytest

from m3i_jax import config as configuration
from m3i_jax.models import m3i, presets
from m3i_jax.objective.terms import FORMS


def built(name):
    config = configuration.default_config()
    config.model.update(presets.preset(name))
    if name == "vit_h14":
        config.data.image_size = 224  # 16 x 16 patches of 14
    return configuration.resolve(config)


@pytest.mark.parametrize(
    "name,patch,width,depth,heads",
    [
        ("vit_s16", 16, 384, 12, 6),
        ("vit_b16", 16, 768, 12, 12),
        ("vit_l16", 16, 1024, 24, 16),
        ("vit_h14", 14, 1280, 32, 16),
    ],
)
def test_sizes(name, patch, width, depth, heads):
    settings = built(name)
    e = settings.model.encoder
    assert (e.patch_size, e.width, e.depth, e.heads) == (patch, width, depth, heads)
    shapes = jax.eval_shape(
        lambda key: m3i.init(settings, key, (), classes=0, vocabulary=0), jax.random.key(0)
    )
    counted = dict(m3i.parameter_table(shapes))["encoder"]
    assert counted == depth * (12 * width**2 + 13 * width) + (3 * patch**2 + 1) * width + width


def test_vit_b16_is_the_default():
    assert built("vit_b16").model == configuration.resolve(configuration.default_config()).model


def test_vit_tiny_is_tiny():
    settings = built("vit_tiny")
    shapes = jax.eval_shape(
        lambda key: m3i.init(settings, key, FORMS["m3i"], classes=10, vocabulary=1000),
        jax.random.key(0),
    )
    assert sum(count for _, count in m3i.parameter_table(shapes)) < 1.5e6


def test_a_preset_replaces_that_of_another_backbone():
    config = configuration.default_config()
    presets.apply_preset(config, "internimage_pico")
    presets.apply_preset(config, "vit_s16")
    assert config.model.backbone == "vit" and config.model.encoder.width == 384


def test_an_unknown_name_is_answered_with_those_there_are():
    with pytest.raises(KeyError, match="vit_b32.*vit_tiny, vit_s16"):
        presets.preset("vit_b32")

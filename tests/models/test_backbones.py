"""Encoders behind one face: InternImage as an encoder of the objective, what it cannot do, and the
layers of either."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import config as configuration
from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.models import (
    backbones,
    intern_image,
    intern_image_backbone,
    m3i,
    presets,
    vit,
    vit_backbone,
)
from m3i_jax.objective import masks, mixing, terms
from m3i_jax.training import optimizer, plan
from tests import toy

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def chosen(name: str, **data: object) -> schema.Config:
    config = configuration.default_config()
    presets.apply_preset(config, name)
    config.data.update({"classes": 1000, "captions": "yes", "size": 100_000, **data})
    return configuration.resolve(config)


# Of the published backbones with the fusion of M3I to the width of the decoder: stage 4 to 4 D,
# stage 3 to D, both with biases.
FUSED = {"t": 512, "s": 640, "b": 896, "l": 1024, "xl": 1024, "h": 1024, "g": 1024}


@pytest.mark.parametrize("size", FUSED)
def test_presets_are_whole_models(size: str) -> None:
    name, width = f"internimage_{size}", FUSED[size]
    config, net = chosen(name, image_size=192), intern_image.PRESETS[f"internimage_{size}"]
    e, d, pool = config.model.encoder, config.model.decoder, config.model.pool
    assert (e.width, d.width, pool.width, config.tokens, config.optim.clip) == (
        width,
        width,
        768,
        144,
        5.0,
    )
    assert width // d.heads == width // pool.heads == 64
    assert intern_image_backbone.intern_image_config(config.model) == net
    shapes = jax.eval_shape(
        lambda key: m3i.init(config, key, terms.FORMS["m3i"], classes=1000, vocabulary=49_408),
        jax.random.key(0),
    )
    found = dict(m3i.parameter_table(shapes))
    assert (
        found["encoder"]
        == intern_image.parameter_count(net)
        + (8 * net.width + 1) * 4 * width
        + (4 * net.width + 1) * width
    )
    assert found["pool"] == 3 * (width**2 + width + 2 * width) + (width + 1) * 768
    assert found["text"] == 123_650_304


def test_the_largest_model_of_the_paper_in_numbers() -> None:
    """Golden: section 8.2's backbone, the fusion, and attention pooling from 1024 to 768."""
    config = chosen("internimage_h", image_size=192)
    shapes = jax.eval_shape(
        lambda key: m3i.init(config, key, terms.FORMS["m3i"], classes=0, vocabulary=9),
        jax.random.key(0),
    )
    found = dict(m3i.parameter_table(shapes))
    assert (found["encoder"], found["pool"]) == (1_073_122_480 + 11_801_600, 3_942_144)
    assert (
        config.model.encoder.drop_path == 0.2
        and backbones.backbone_drop_rates(config.model).tolist() == [np.float32(0.2)] * 50
    )


@functools.cache
def started(**changes: object) -> tuple[schema.Config, dict]:
    config = toy.settings(**toy.INTERN, **changes)
    return config, jit(
        lambda key: backbones.get_backbone(config.model).init(config.model, key, mask_token=True)
    )(jax.random.key(0))


@functools.cache
def encoder():
    config, _ = started()
    return jit(
        lambda params, patches, index, hidden: m3i.encode(
            config, params, patches, index=index, hidden=hidden
        )
    )


def patches(seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, 16, 192)), jnp.float32)


def test_cells_that_are_not_read_are_filled_and_have_no_feature() -> None:
    """What a ViT drops, a convolution sees as the learned vector; the features of the cells that
    are read go on."""
    _, params = started()
    index = jnp.array([[0, 3, 7, 12], [1, 2, 8, 15]])
    hidden = jnp.ones((2, 16), bool).at[jnp.arange(2)[:, None], index].set(False)
    read = encoder()(params, patches(), index, None)
    filled = encoder()(params, patches(), None, hidden)
    assert read.shape == (2, 4, 32)
    np.testing.assert_allclose(read, mixing.gather(filled, index), atol=1e-6)
    whole = encoder()(params, patches(), None, None)
    assert np.abs(whole - filled).max() > 1e-2


def test_both_in_one_call_and_means_over_blocks_are_refused() -> None:
    config, params = started()
    with pytest.raises(ValueError, match="not both"):
        m3i.encode(
            config, params, patches(), index=jnp.zeros((2, 1), int), hidden=jnp.zeros((2, 16), bool)
        )
    with pytest.raises(ValueError, match="cannot be averaged"):
        m3i.encode(config, params, patches(), blocks=2)


@pytest.mark.parametrize("cell", [8, 16])
def test_mixing_patches_is_mixing_pixels(cell: int) -> None:
    """Cells as large as a patch, and of two by two patches: twice as large as the stride of the
    dense features, as 32 is to 16."""
    config = toy.settings(**toy.INTERN, data__mask_cell=cell)
    side = 32 // cell
    mask = masks.blockwise(0, 0, 4, grid=side, hidden=side * side // 2)
    views = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype(np.float32)
    shown = mask.reshape(4, side, side).repeat(cell, 1).repeat(cell, 2)[..., None]
    by_pixel = np.where(shown, views, views[[1, 0, 3, 2]])
    by_patch = mixing.mix(
        vit.patchify(jnp.asarray(views), 8), masks.upsample_masks(mask, config.cell)
    )
    np.testing.assert_array_equal(intern_image.unpatchify(by_patch, config.grid), by_pixel)
    assert config.hidden == 8 and config.cell == cell // 8


def test_cells_of_the_images_in_the_paper() -> None:
    for cell, wanted in ((0, (12, 1, 72)), (16, (12, 1, 72)), (32, (12, 2, 72)), (96, (12, 6, 72))):
        config = chosen("internimage_h", image_size=192, mask_cell=cell)
        assert (config.grid, config.cell, config.hidden) == wanted


REFUSED = {
    "objective.isolate=true": "look across the seam",
    "objective.forms=data2vec": "mean over the last",
    "objective.forms=moco_v3": "cls token",
    "model.pool.kind=cls": "cls token",
    "model.encoder.cls_token=true": "has no cls token",
    "model.encoder.final_norm=true": "must be false",
    "model.encoder.freeze_patch_embed=true": "no patch embedding",
    "model.encoder.depth=3": "is a setting of the ViT",
    "model.encoder.heads=3": "is a setting of the ViT",
    "model.encoder.positions=learned": "is a setting of the ViT",
    "model.encoder.embedding_norm=true": "is a setting of the ViT",
    "model.encoder.norm_eps=1e-5": "is a setting of the ViT",
    "model.encoder.activation=gelu_tanh": "is a setting of the ViT",
    "model.encoder.position_grid=4": "is a setting of the ViT",
    "model.encoder.layer_scale=1e-5": "is a setting of the ViT",
    "model.encoder.registers=4": "is a setting of the ViT",
    "model.encoder.patch_size=16": "must be 8",
    "data.image_size=40": "multiple of 16",
    "data.mask_cell=12": "multiple of model.encoder.patch_size",
    "data.mask_cell=24": "divides data.image_size",
    "model.intern_image.depths=(1,1,1)": "must be four numbers",
    "model.intern_image.groups=(3,1,2,2)": "divide the channels",
    "model.intern_image.kernel=4": "must be odd",
    "model.intern_image.width=7": "even",
    "model.intern_image.offset_scale=0": "positive",
    "model.intern_image.extra_norm=-1": "negative",
    "model.intern_image.mlp_std=-1": "negative",
    "model.pool.std=-1": "negative",
    "optim.offset_lr=2": "0..1",
    "optim.fan_in_lr=-1": "negative",
}


@pytest.mark.parametrize("assignment", REFUSED)
def test_what_it_cannot_do_is_refused_in_one_line(assignment: str) -> None:
    key, _, value = assignment.partition("=")
    with pytest.raises(UserError, match=REFUSED[assignment]) as refusal:
        plan.build_plan(toy.settings(**(toy.INTERN | {key.replace(".", "__"): value})))
    assert "\n" not in str(refusal.value)


def test_every_setting_of_the_vit_is_refused_for_a_convolution() -> None:
    for key, (_, default, text, choices) in configuration.setting_table().items():
        if key.startswith("model.encoder.") and text.startswith("ViT"):
            number = "true" if isinstance(default, bool) else f"{default}1"
            other = choices[-1] if choices else number
            changed = {key.replace(".", "__"): other}
            with pytest.raises(UserError, match=key):
                plan.build_plan(toy.settings(**(toy.INTERN | changed)))


def test_heads_of_a_vit_divide_its_width() -> None:
    for heads in (3, 5):
        with pytest.raises(UserError, match=f"encoder.heads: {heads} must divide the width 32"):
            plan.build_plan(toy.settings(model__encoder__heads=heads))


# InternImage-H: 50 layers; distance from the last, for the learning rate decay ** distance.
LAYERS_H = {
    "stem/conv1/kernel": 49,
    "mask_token": 49,
    "stage0/norm/scale": 43,
    "stage0/down/conv/kernel": 43,
    "stage1/down/norm/bias": 37,
    "stage2/norm/scale": 5,
    "stage2/down/conv/kernel": 5,
    "stage2/extra_norms/scale": 0,
    "stage3/norm/bias": 0,
    "fusion/deep/kernel": 0,
}


def test_layers_of_the_encoder() -> None:
    model = chosen("internimage_h", image_size=192).model
    below = functools.partial(backbones.get_backbone(model).layers_above, model)
    assert {path: below(path) for path in LAYERS_H} == LAYERS_H
    assert [
        below(f"stage{n}/layers/mlp/fc1/kernel").tolist()[:: length - 1]
        for n, length in enumerate((6, 6, 32, 6))
    ] == [[49, 44], [43, 38], [37, 6], [5, 0]]
    # 51 - id in dense tasks, ids by the names in mmdetection's form
    below = functools.partial(backbones.get_backbone(model).map_layers_above, model)
    moved = {path: above + 1 for path, above in LAYERS_H.items() if above}
    del moved["mask_token"]
    moved |= {"stem/conv1/kernel": 51, "stage3/norm/bias": 6}
    assert {path: below(path) for path in moved} == moved
    assert below("stage2/extra_norms/scale").tolist() == [38, 37, 36, 35, 34]
    assert [
        below(f"stage{n}/layers/mlp/fc1/kernel").tolist()[:: length - 1]
        for n, length in enumerate((6, 6, 32, 6))
    ] == [[50, 45], [44, 39], [38, 7], [6, 1]]
    # twelve blocks: 0.65 ** (13 - id), ids as in MAE's fine-tuning
    vit_b, plain = vit_backbone.VIT.layers_above, schema.Model()
    assert (
        vit_b(plain, "patch_embed/kernel") == vit_b(plain, "cls_token") == 13
        and vit_b(plain, "norm/scale") == 0
    )
    assert vit_b(plain, "blocks/mlp/fc1/kernel").tolist() == list(range(12, 0, -1))


def test_rates_of_every_kind_of_parameter() -> None:
    config = toy.settings(**toy.INTERN, optim__layer_decay=0.5, optim__center_lr=0.25)
    rates = {
        "encoder/stage0/layers/dcn/offsets/kernel": 0.1 / 8,
        "encoder/stage3/layers/dcn/offsets/bias": 0.1,
        "encoder/stage3/layers/dcn/center/kernel": 0.25,
        "encoder/stage3/layers/dcn/mask/kernel": 1.0,
        "encoder/stage1/layers/norm1/scale": 0.25,
        "encoder/stem/conv2/bias": 0.125,
        "encoder/stage0/down/conv/kernel": 0.25,
        "encoder/fusion/shallow/kernel": 1.0,
        "decoder/blocks/mlp/fc1/kernel": 1.0,
        "text/blocks/norm1/scale": 1.0,
    }
    assert {
        path: float(np.squeeze(optimizer.lr_factor(config, path))) for path in rates
    } == pytest.approx(rates)
    slow = toy.settings(
        **toy.INTERN, optim__layer_decay=0.5, optim__center_lr=0.25, optim__encoder_lr=0.5
    )
    for path, rate in rates.items():
        assert np.squeeze(optimizer.lr_factor(slow, path)) == pytest.approx(
            rate / 2 if path.startswith("encoder/") else rate
        )


def scaled(config: schema.Config) -> dict[str, Any]:
    """What updates of ones become."""
    params = jax.eval_shape(
        lambda key: m3i.init(config, key, terms.FORMS["sim"], classes=0, vocabulary=0),
        jax.random.key(0),
    )
    return optimizer.scale_by_lr_factor(config).update(
        jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), params), ()
    )[0]


def test_matrices_of_many_inputs_learn_slower_if_asked() -> None:
    changes = {
        "model__intern_image__depths": "(1,1,3,1)",
        "model__decoder__projector_depth": "1",
        "model__encoder__cls_token": "false",
    }
    config = toy.settings(**(toy.INTERN | changes), optim__fan_in_lr=24)
    updates = scaled(config)
    stage, decoder = updates["encoder"]["stage2"], updates["decoder"]
    rates = [
        (updates["encoder"]["stem"]["conv1"]["kernel"], 24 / 27),
        # adds up 9 numbers, whatever its channels
        (stage["layers"]["dcn"]["depthwise"]["kernel"], 1.0),
        (stage["layers"]["mlp"]["fc1"]["kernel"], 24 / 32),
        (stage["layers"]["mlp"]["fc2"]["kernel"], 24 / 128),
        (stage["layers"]["mlp"]["fc2"]["bias"], 1.0),
        (stage["layers"]["dcn"]["offsets"]["kernel"], 0.1 * 24 / 32),
        (stage["down"]["conv"]["kernel"], 24 / (9 * 32)),
        (decoder["blocks"]["mlp"]["fc2"]["kernel"], 24 / 128),
        (decoder["projector"]["mlp"]["fc1"]["kernel"], 24 / 32),
        (decoder["mask_token"], 1.0),
    ]
    for update, rate in rates:
        np.testing.assert_allclose(update, rate, rtol=1e-6)


def test_updates_are_scaled_by_their_rates() -> None:
    config = toy.settings(**toy.INTERN, optim__layer_decay=0.5)
    updates = scaled(config)
    assert sorted(updates) == ["decoder", "encoder"]
    np.testing.assert_allclose(
        updates["encoder"]["stage1"]["layers"]["dcn"]["offsets"]["kernel"], 0.1 * 0.25, rtol=1e-6
    )
    np.testing.assert_array_equal(updates["decoder"]["mask_token"], 1.0)


def test_norms_scales_and_tokens_are_not_decayed() -> None:
    config = toy.settings(**(toy.INTERN | {"model__intern_image__extra_norm": 1}))
    params = jax.eval_shape(
        lambda key: m3i.init(config, key, terms.FORMS["sim"], classes=0, vocabulary=0),
        jax.random.key(0),
    )["encoder"]
    kept = jax.tree_util.tree_leaves_with_path(optimizer.decay_mask({"encoder": params})["encoder"])
    names = {"/".join(k.key for k in path): flag for path, flag in kept}
    assert (
        "mask_token" in names
        and "stage2/extra_norms/scale" in names
        and "stage3/layers/gamma2" in names
    )
    assert all(flag == name.endswith("kernel") for name, flag in names.items())

"""Maps of a backbone at their strides, for images of any height and width."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.models import backbones, intern_image, intern_image_backbone, vit, vit_maps
from m3i_jax.objective import positions
from tests import toy

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def images(height: int, width: int, seed: int = 0) -> jax.Array:
    shape = (2, height, width, 3)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def encoder(**changes: object) -> tuple[schema.Config, Any]:
    config = toy.settings(**changes)
    backbone = backbones.get_backbone(config.model)
    return config, jit(lambda key: backbone.init(config.model, key, grid=config.grid))(
        jax.random.key(0)
    )


def stages(config: schema.Config, params: Any, x: jax.Array) -> dict[int, jax.Array]:
    """Maps by their strides."""
    backbone, maps = backbones.get_backbone(config.model), config.dense.maps
    assert backbone.stages is not None and backbone.map_strides is not None
    call = functools.partial(backbone.stages, config.model, maps=maps, size=config.data.image_size)
    outputs = jit(lambda p, x: call(p, x))(params, x)
    return dict(zip(backbone.map_strides(config.model, maps), outputs, strict=True))


POSITIONS = {
    "sincos": {},
    "learned": {"model__encoder__positions": "learned"},
    "no cls, final norm": {
        "model__encoder__positions": "learned",
        "model__encoder__cls_token": "false",
        "model__encoder__final_norm": "true",
    },
    "of another grid": {"model__encoder__position_grid": "3"},
}


@pytest.mark.parametrize("changes", POSITIONS.values(), ids=POSITIONS)
def test_the_map_of_a_vit_is_its_features_at_the_size_it_was_trained_at(
    changes: dict[str, str],
) -> None:
    config, params = encoder(**changes)
    x, first = images(32, 32), int(config.model.encoder.cls_token)
    maps = stages(config, params, x)
    features = jit(lambda p, x: vit.apply(config.model, p, vit.patchify(x, 8), grid=config.grid))(
        params, x
    )
    assert {stride: m.shape for stride, m in maps.items()} == {8: (2, 4, 4, 32)}
    np.testing.assert_array_equal(maps[8].reshape(2, 16, 32), features[:, first:])


def test_positions_of_another_grid_are_resized() -> None:
    """Rows and columns are resized by themselves: a table of a function of the row is that of the
    square grid with as many rows, whatever the columns. `positions.resized` has torch's numbers."""
    config, params = encoder(model__encoder__positions="learned")
    rows, columns = np.meshgrid(np.arange(4.0), np.arange(4.0), indexing="ij")
    table = np.zeros((17, 32), np.float32)
    table[1:, 0], table[1:, 1] = rows.ravel(), columns.ravel()
    resized = vit_maps.position_table(
        config.model, {"positions": jnp.asarray(table)[None]}, 4, (12, 8)
    )
    got = np.asarray(resized).reshape(12, 8, 32)
    tall, narrow = (positions.resized(table[1:], n).reshape(n, n, 32) for n in (12, 8))
    np.testing.assert_allclose(got[..., 0], tall[:, :1, 0].repeat(8, 1), atol=1e-5)
    np.testing.assert_allclose(got[..., 1], narrow[:1, :, 1].repeat(12, 0), atol=1e-5)
    assert not got[..., 2:].any()
    maps = stages(config, params, images(24, 56))
    assert {stride: m.shape for stride, m in maps.items()} == {8: (2, 3, 7, 32)}


def test_fixed_positions_of_a_wide_image_are_the_trained_table_resized() -> None:
    encoder = schema.Encoder(width=8, position_grid=4)
    wide = vit.fixed_positions(encoder, (4, 6)).reshape(4, 6, 8)
    table = positions.sincos_2d(4, 8).reshape(4, 4, 8)
    # half of the width encodes one coordinate alone: it does not change along the other axis
    constant = np.ptp(table, axis=1).max(0) < 1e-6
    assert constant.sum() == 4
    np.testing.assert_allclose(wide[..., constant], table[:, :1, constant].repeat(6, 1), atol=1e-5)


def test_sides_that_no_patch_divides_are_refused() -> None:
    config, params = encoder()
    with pytest.raises(ValueError, match="multiples of the patch"):
        stages(config, params, images(32, 36))


def test_gradients_reach_the_positions_through_the_resize() -> None:
    config, params = encoder(model__encoder__positions="learned")

    def total(params: Any) -> jax.Array:
        return vit_maps.stages(config.model, params, images(16, 24), size=32)[0].sum()

    table = jit(jax.grad(total))(params)["positions"]
    assert np.isfinite(table).all() and (np.abs(table).sum(-1) > 0).all()


def test_the_stages_of_intern_image() -> None:
    """Maps of any size at their strides; fused they are the dense features, and without the fusion
    those are the last map."""
    config, params = encoder(**toy.INTERN)
    call = backbones.get_backbone(config.model).stages
    assert call is not None
    maps = jax.eval_shape(lambda p, x: call(config.model, p, x, size=32), params, images(32, 64))
    assert [m.shape for m in maps] == [(2, 16 // 2**i, 32 // 2**i, 8 * 2**i) for i in range(4)]
    strides = backbones.INTERN_IMAGE.map_strides
    assert strides is not None and strides(config.model, config.dense.maps) == (2, 4, 8, 16)
    net = intern_image_backbone.intern_image_config(config.model)

    def all_of(p: Any, x: jax.Array) -> tuple[jax.Array, ...]:
        maps = list(call(config.model, p, x, size=32))
        plain = intern_image.apply(dataclasses.replace(net, fused=0), p, x)
        fused = intern_image.fuse(net, p, maps)
        return maps[3].reshape(2, -1, 64), plain, fused, intern_image.apply(net, p, x)

    last, plain, fused, features = jit(all_of)(params, images(32, 32))
    assert plain.shape == (2, 4, 64) and features.shape == (2, 16, 32)
    np.testing.assert_allclose(last, plain, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(fused, features, rtol=1e-5, atol=1e-5)

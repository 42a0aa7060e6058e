import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.models import layers, vit
from m3i_jax.objective import mixing, positions

# compiling is what takes the time here
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

ENCODER = schema.Encoder(patch_size=2, width=8, depth=2, heads=2, mlp_ratio=2.0)
MODEL = schema.Model(encoder=ENCODER, dtype="float32")


def with_encoder(**changes):
    return dataclasses.replace(MODEL, encoder=dataclasses.replace(ENCODER, **changes))


def random_tree(model, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: vit.init(model, key), jax.random.key(0))
    return jax.tree.map(lambda s: jnp.asarray(0.5 * rng.normal(size=s.shape), jnp.float32), shapes)


def without_branches(params):
    """Blocks that add nothing: what goes in comes out."""
    return {**params, "blocks": jax.tree.map(jnp.zeros_like, params["blocks"])}


def placed(params, x):
    """Patch embeddings at their positions, before any block."""
    return np.asarray(
        x @ params["patch_embed"]["kernel"] + params["patch_embed"]["bias"]
    ) + positions.sincos_2d(3, 8)


def pixels(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.cache
def compiled(model):
    return jit(lambda params, x, settings: vit.apply(model, params, x, grid=3, **settings))


def run(model, **settings):
    return lambda params, x: compiled(model)(params, x, settings)


def test_patches_are_row_major_and_inside_row_column_channel():
    images = np.arange(2 * 6 * 4 * 3).reshape(2, 6, 4, 3)
    patches = vit.patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    for cell in range(6):
        r, c = divmod(cell, 2)
        np.testing.assert_array_equal(
            patches[1, cell], images[1, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].ravel()
        )


def test_images_that_are_no_multiple_of_the_patch_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 6, 5, 3\).*2"):
        vit.patchify(np.zeros((1, 6, 5, 3)), 2)


def test_parameters_of_vit_b16():
    params = jax.eval_shape(lambda key: vit.init(schema.Model(), key), jax.random.key(0))
    count = {
        name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in params.items()
    }
    # golden; together 85 645 824
    assert count == {"patch_embed": 590_592, "cls_token": 768, "blocks": 85_054_464}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_names_and_shapes():
    params = jax.eval_shape(
        lambda key: vit.init(with_encoder(final_norm=True), key), jax.random.key(0)
    )
    got = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert got == {
        "patch_embed/kernel": (12, 8),
        "patch_embed/bias": (8,),
        "cls_token": (1, 1, 8),
        "norm/scale": (8,),
        "norm/bias": (8,),
        "blocks/norm1/scale": (2, 8),
        "blocks/norm1/bias": (2, 8),
        "blocks/norm2/scale": (2, 8),
        "blocks/norm2/bias": (2, 8),
        "blocks/attention/qkv/kernel": (2, 8, 24),
        "blocks/attention/qkv/bias": (2, 24),
        "blocks/attention/out/kernel": (2, 8, 8),
        "blocks/attention/out/bias": (2, 8),
        "blocks/mlp/fc1/kernel": (2, 8, 16),
        "blocks/mlp/fc1/bias": (2, 16),
        "blocks/mlp/fc2/kernel": (2, 16, 8),
        "blocks/mlp/fc2/bias": (2, 8),
    }


def test_the_patch_embedding_starts_as_a_matrix_not_as_a_convolution():
    model = schema.Model(encoder=schema.Encoder(width=768, depth=1, mlp_ratio=0.01))
    params = jit(lambda key: vit.init(model, key))(jax.random.key(0))
    # golden: sqrt(6 / 1536)
    assert np.abs(params["patch_embed"]["kernel"]).max() == pytest.approx(0.0625, rel=1e-3)
    assert not np.asarray(params["patch_embed"]["bias"]).any()
    assert np.std(params["cls_token"]) == pytest.approx(0.02, rel=0.1)


def test_cls_comes_first_without_a_position_and_patches_get_theirs():
    params, x = without_branches(random_tree(MODEL)), pixels(1, 2, 9, 12)
    z = run(MODEL)(params, x)
    embedded = x @ params["patch_embed"]["kernel"] + params["patch_embed"]["bias"]
    np.testing.assert_allclose(z[:, 1:], embedded + positions.sincos_2d(3, 8), atol=1e-5)
    np.testing.assert_array_equal(z[:, 0], np.broadcast_to(params["cls_token"][0], (2, 8)))
    bare = run(with_encoder(cls_token=False))(params, x)
    np.testing.assert_allclose(bare, z[:, 1:], atol=1e-6)


def test_dropping_by_index_is_gathering_by_hand():
    params, x = random_tree(MODEL), pixels(1, 2, 9, 12)
    index = np.array([[7, 0, 3], [1, 2, 8]])
    z = run(MODEL, index_BxK=jnp.asarray(index))(params, x)
    assert z.shape == (2, 4, 8)
    every = run(MODEL, index_BxK=jnp.tile(jnp.arange(9), (2, 1)))(params, x)
    np.testing.assert_allclose(every, run(MODEL)(params, x), atol=1e-5)
    # The other patches are not seen at all, and the order of the kept ones only orders the output.
    hidden = np.ones((2, 9), bool)
    np.put_along_axis(hidden, index, False, 1)
    np.testing.assert_array_equal(
        run(MODEL, index_BxK=jnp.asarray(index))(params, jnp.where(hidden[..., None], 99.0, x)), z
    )
    order = np.array([2, 0, 1])
    turned = run(MODEL, index_BxK=jnp.asarray(index[:, order]))(params, x)
    np.testing.assert_allclose(turned[:, 1:], z[:, 1:][:, order], atol=1e-5)


def test_dropped_patches_keep_their_own_positions():
    params, x = without_branches(random_tree(MODEL)), pixels(1, 2, 9, 12)
    index = np.array([[7, 0, 3], [1, 2, 8]])
    z, full = run(MODEL, index_BxK=jnp.asarray(index))(params, x), run(MODEL)(params, x)
    np.testing.assert_allclose(
        z[:, 1:], np.take_along_axis(np.asarray(full)[:, 1:], index[..., None], 1), atol=1e-6
    )


def test_mixing_pixels_is_mixing_patch_embeddings():
    params, images = without_branches(random_tree(MODEL)), pixels(1, 2, 6, 6, 3)
    mask = np.array([[1, 0, 1, 1, 0, 0, 1, 0, 1], [0, 1, 1, 0, 1, 0, 0, 1, 1]], bool)
    wide = mask.reshape(2, 3, 3).repeat(2, 1).repeat(2, 2)[..., None]
    of_pixels = run(MODEL)(params, vit.patchify(jnp.where(wide, images, images[::-1]), 2))
    of_embeddings = mixing.mix(run(MODEL)(params, vit.patchify(images, 2))[:, 1:], mask)
    np.testing.assert_allclose(of_pixels[:, 1:], of_embeddings, atol=1e-6)


@pytest.mark.parametrize("freeze", [True, False])
def test_every_parameter_learns_but_a_frozen_patch_embedding(freeze):
    model = with_encoder(freeze_patch_embed=freeze, final_norm=True)
    params, x, g = random_tree(model), pixels(1, 2, 9, 12), pixels(2, 2, 10, 8)
    grads = jit(jax.grad(lambda p: (vit.apply(model, p, x, grid=3) * g).sum()))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.isfinite(leaf).all()
        assert np.asarray(leaf).any() != (freeze and name.startswith("patch_embed")), name


def test_final_norm_is_applied_last():
    params, x = random_tree(with_encoder(final_norm=True)), pixels(1, 2, 9, 12)
    raw, normed = np.asarray(run(MODEL)(params, x)), run(with_encoder(final_norm=True))(params, x)
    unit = (raw - raw.mean(-1, keepdims=True)) / np.sqrt(raw.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(
        normed, unit * params["norm"]["scale"] + params["norm"]["bias"], atol=1e-4
    )


def test_stochastic_depth_is_off_by_default_and_follows_the_factors():
    params, x = random_tree(with_encoder(drop_path=0.5)), pixels(1, 2, 9, 12)
    model = with_encoder(drop_path=0.5)
    np.testing.assert_array_equal(run(model)(params, x), run(MODEL)(params, x))
    nothing = run(model, keep_BxLx2=jnp.zeros((2, 2, 2)))(params, x)
    np.testing.assert_array_equal(nothing, run(MODEL)(without_branches(params), x))


def test_scan_equals_loop():
    params, x = random_tree(MODEL), pixels(1, 2, 9, 12)
    np.testing.assert_allclose(
        run(dataclasses.replace(MODEL, scan=True))(params, x),
        run(MODEL)(params, x),
        rtol=1e-5,
        atol=1e-5,
    )


def test_bfloat16_rounds_but_does_not_change_the_function():
    params, x = random_tree(MODEL), pixels(1, 2, 9, 12)
    got, exact = (
        run(dataclasses.replace(MODEL, dtype="bfloat16"))(params, x),
        np.asarray(run(MODEL)(params, x)),
    )
    assert got.dtype == jnp.bfloat16
    assert np.abs(np.asarray(got, np.float32) - exact).mean() < 0.02 * np.abs(exact).mean()


HIDDEN = np.array([[1, 0, 1, 1, 0, 0, 1, 0, 1], [0, 1, 1, 0, 1, 0, 0, 1, 1]], bool)


def test_the_mask_token_stands_for_hidden_cells_at_their_positions():
    params = without_branches(random_tree(MODEL)) | {"mask_token": pixels(7, 1, 1, 8)}
    x = pixels(1, 2, 9, 12)
    z = run(MODEL, hidden_BxN=jnp.asarray(HIDDEN))(params, x)
    embedded = np.asarray(x @ params["patch_embed"]["kernel"] + params["patch_embed"]["bias"])
    expected = np.where(
        HIDDEN[..., None], np.asarray(params["mask_token"]), embedded
    ) + positions.sincos_2d(3, 8)
    np.testing.assert_allclose(z[:, 1:], expected, atol=1e-5)


def test_what_hidden_cells_show_does_not_matter_and_no_gradient_reaches_it():
    params, x = random_tree(MODEL) | {"mask_token": pixels(7, 1, 1, 8)}, pixels(1, 2, 9, 12)
    filled = run(MODEL, hidden_BxN=jnp.asarray(HIDDEN))
    np.testing.assert_array_equal(
        filled(params, jnp.where(HIDDEN[..., None], 99.0, x)), filled(params, x)
    )
    of_params, of_x = jit(
        jax.grad(
            lambda p, x: vit.apply(MODEL, p, x, grid=3, hidden_BxN=jnp.asarray(HIDDEN)).sum(),
            (0, 1),
        )
    )(params, x)
    assert np.asarray(of_params["mask_token"]).all()
    assert not np.asarray(of_x)[HIDDEN].any() and np.asarray(of_x)[~HIDDEN].any(-1).all()


def test_a_mask_token_changes_the_start_of_nothing_else():
    with_token, without = jit(
        lambda key: tuple(vit.init(MODEL, key, mask_token=m) for m in (True, False))
    )(jax.random.key(0))
    token = with_token.pop("mask_token")
    assert token.shape == (1, 1, 8) and 0.005 < np.std(token) < 0.05
    jax.tree.map(np.testing.assert_array_equal, with_token, without)


def test_cells_are_dropped_or_filled_not_both():
    with pytest.raises(ValueError, match="not both"):
        vit.apply(
            MODEL,
            {},
            jnp.zeros((2, 9, 12)),
            grid=3,
            index_BxK=jnp.zeros((2, 4), int),
            hidden_BxN=jnp.asarray(HIDDEN),
        )


@pytest.mark.parametrize("blocks,scan,remat", [(3, False, "none"), (2, True, "full")])
def test_mean_over_the_last_blocks_is_that_of_running_them_by_hand(blocks, scan, remat):
    model = dataclasses.replace(with_encoder(depth=3, final_norm=True), scan=scan, remat=remat)
    params, x = random_tree(model), pixels(1, 2, 9, 12)
    keep = jnp.asarray(np.random.default_rng(2).choice([0.0, 1.25], (2, 3, 2)), jnp.float32)
    mean = jit(lambda p, x: vit.apply(model, p, x, grid=3, keep_BxLx2=keep, blocks=blocks))(
        params, x
    )
    z, normed = (
        np.concatenate([np.broadcast_to(params["cls_token"], (2, 1, 8)), placed(params, x)], 1),
        [],
    )
    for layer in range(3):
        z = one_block(
            jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"]), z, keep[:, layer]
        )
        wide = np.asarray(z, np.float64)
        normed.append(
            (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
        )
    np.testing.assert_allclose(mean, np.mean(normed[-blocks:], 0), rtol=1e-4, atol=1e-4)


@jit
def one_block(params, z, keep):
    return layers.block(8, 2, 2.0, "float32").apply({"params": params}, z, keep)


def test_a_mean_over_blocks_is_float32_and_there_are_only_so_many():
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    made = jax.eval_shape(
        lambda p: vit.apply(model, p, jnp.zeros((2, 9, 12)), grid=3, blocks=2), random_tree(model)
    )
    assert made.dtype == jnp.float32
    with pytest.raises(ValueError, match="encoder of 2 blocks has no mean over its last 3"):
        vit.apply(MODEL, random_tree(MODEL), jnp.zeros((2, 9, 12)), grid=3, blocks=3)


def test_a_wrong_grid_is_named():
    with pytest.raises(ValueError, match=r"\(2, 9, 12\).*grid of 4 has 16"):
        vit.apply(MODEL, {}, jnp.zeros((2, 9, 12)), grid=4)

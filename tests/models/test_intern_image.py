"""Sizes, variants and the running of layers. What the net computes is compared with the published
one in tests/interop."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import parallel
from m3i_jax.models import intern_image, intern_image_layer, vit
from m3i_jax.models.intern_image import PRESETS, InternImageConfig
from m3i_jax.profiling import flops

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# Golden: parameters of the backbone without fusion, pooling and classifier.
COUNTS = {
    "t": 28_754_672,
    "s": 48_502_560,
    "b": 94_909_920,
    "l": 218_952_370,
    "xl": 328_971_228,
    "h": 1_073_122_480,
    "g": 3_052_781_184,
}
SMALL = InternImageConfig(
    width=8,
    depths=(1, 1, 3, 1),
    groups=(1, 1, 2, 2),
    kernel=3,
    extra_norm=2,
    fused=6,
    stem_strides=(2, 1),
)


@pytest.mark.parametrize("size", COUNTS)
def test_parameter_counts(size):
    model = PRESETS[f"internimage_{size}"]
    assert intern_image.parameter_count(model) == COUNTS[size]
    params = jax.eval_shape(lambda key: intern_image.init(model, key), jax.random.key(0))
    found = sum(
        math.prod(leaf.shape)
        for name, part in params.items()
        if name != "fusion"
        for leaf in jax.tree.leaves(part)
    )
    assert found == COUNTS[size]


def test_fusion_and_fill_of_the_largest_model_of_the_paper():
    params = jax.eval_shape(
        lambda key: intern_image.init(PRESETS["internimage_h"], key, mask_token=True),
        jax.random.key(0),
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(params["fusion"])) == 10_489_856 + 1_311_744
    assert params["mask_token"].shape == (1, 1, 1, 320)


@functools.cache
def start(model, mask_token=False):
    return jit(lambda key: intern_image.init(model, key, mask_token=mask_token))(jax.random.key(0))


def test_first_values():
    model = PRESETS["internimage_pico"]
    params = start(dataclasses.replace(model, layer_scale=0.25))
    assert jax.tree.map(jnp.shape, params) == intern_image.shapes(
        dataclasses.replace(model, layer_scale=0.25)
    )
    layers = params["stage2"]["layers"]
    for name in ("offsets", "mask"):
        assert not any(leaf.any() for leaf in jax.tree.leaves(layers["dcn"][name]))
    np.testing.assert_array_equal(layers["gamma1"], 0.25)
    # the toy; all others as published:
    np.testing.assert_allclose(layers["mlp"]["fc1"]["kernel"].std(), 128**-0.5, rtol=0.03)
    np.testing.assert_allclose(layers["mlp"]["fc2"]["kernel"].std(), 512**-0.5, rtol=0.03)
    assert {name for name, preset in PRESETS.items() if preset.mlp_std != 0.02} == {
        "internimage_pico"
    }
    published = start(dataclasses.replace(model, mlp_std=0.02))["stage2"]["layers"]
    np.testing.assert_allclose(published["mlp"]["fc1"]["kernel"].std(), 0.02, rtol=0.03)
    largest = {
        "stem/conv2/kernel": (9 * 16) ** -0.5,
        "stem/conv1/bias": 27**-0.5,
        "stage2/layers/dcn/input/kernel": (3 / 128) ** 0.5,
        "stage2/layers/dcn/depthwise/kernel": 1 / 3,
        "stage2/layers/dcn/depthwise/bias": 1 / 3,
        "stage1/down/conv/kernel": (9 * 64) ** -0.5,
        "fusion/deep/kernel": 256**-0.5,
        "fusion/shallow/bias": 128**-0.5,
    }
    for path, bound in largest.items():
        leaf = functools.reduce(lambda node, name: node[name], path.split("/"), params)
        assert 0.8 * bound < np.abs(leaf).max() <= bound, path
    assert not np.array_equal(
        layers["dcn"]["input"]["kernel"][0], layers["dcn"]["input"]["kernel"][1]
    )


def test_the_fill_moves_no_other_draw():
    without, filled = start(SMALL), dict(start(SMALL, True))
    assert 0.005 < np.abs(filled.pop("mask_token")).mean() < 0.03
    jax.tree.map(np.testing.assert_array_equal, without, filled)


def images(size=16, batch=2, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, size, size, 3)), jnp.float32)


def lively(model, seed=0):
    """Parameters with offsets, masks and shares that are not zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: leaf + jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32),
        start(model, True),
    )


KEEP = np.stack([np.full((6, 2), 1.25), np.tile([0.0, 1.25], (6, 1))]).astype(np.float32)


def run_stage(part, x, **settings):
    layer = intern_image._layer(SMALL, 2)
    return intern_image_layer.run_layers(
        layer,
        part["layers"],
        x,
        keep_BxLx2=KEEP[:, 1:4],
        extra_norms=part["extra_norms"],
        every=2,
        **settings,
    )


def test_scan_changes_no_number():
    params, x = (
        lively(SMALL)["stage2"],
        jnp.asarray(np.random.default_rng(1).normal(size=(2, 2, 2, 32)), jnp.float32),
    )
    loop, scan = (jit(functools.partial(run_stage, scan=scan))(params, x) for scan in (False, True))
    assert np.abs(loop - x).max() > 0.1
    np.testing.assert_allclose(loop, scan, atol=1e-5)


def test_chunks_of_images_change_no_number(monkeypatch):
    """Neither outputs nor gradients of a stage with stochastic depth and a norm between layers."""
    params, x = (
        lively(SMALL)["stage2"],
        jnp.asarray(np.random.default_rng(1).normal(size=(2, 2, 2, 32)), jnp.float32),
    )

    def gradient(remat):
        run = lambda part, x: jnp.square(run_stage(part, x, scan=True, remat=remat)).sum()
        used = {name: params[name] for name in ("layers", "extra_norms")}
        return jit(jax.value_and_grad(run, (0, 1)))(used, x)

    whole = gradient("none")
    monkeypatch.setattr(intern_image_layer, "chunk_rows", lambda layer, x: 1.0)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max())
    jax.tree.map(close, whole, gradient("full"))


def test_devices_take_chunks_of_their_own_images(monkeypatch):
    """Two devices of two images each take theirs one after the other in two turns: with four, a
    device would have no image of a chunk, or half of one."""
    monkeypatch.setattr(intern_image_layer, "chunk_rows", lambda layer, x: 1.0)
    layer, x = intern_image._layer(SMALL, 2), np.zeros((4, 2, 2, 32), np.float32)
    is_shape = lambda node: isinstance(node, tuple)
    params = jax.tree.map(
        lambda shape: np.zeros((1, *shape), np.float32), layer.shapes(), is_leaf=is_shape
    )
    run = lambda x: intern_image_layer.run_layers(layer, params, x, remat="full")
    with jax.set_mesh(parallel.make_mesh((2, 1, 1), jax.devices()[:2])):
        program = str(jax.make_jaxpr(run)(x))
    assert "length=2" in program and "length=4" not in program


def test_a_tpu_takes_few_images_at_once_where_it_can_hold_the_gradients_of_the_weights():
    model = intern_image.InternImageConfig()

    def images_at_once(stage):
        x = jax.ShapeDtypeStruct((80, 48 >> stage, 48 >> stage, 320 << stage), jnp.bfloat16)
        return intern_image_layer.chunk_rows(intern_image._layer(model, stage), x)

    with parallel.assumed_platform("tpu"):
        assert [round(images_at_once(stage)) for stage in range(3)] == [2, 4, 9]
        assert images_at_once(3) is None
    assert images_at_once(0) is None


@pytest.mark.slow
def test_gradients():
    """Every parameter gets one, and remat and loops change none."""

    def loss(params, scan, remat):
        z = intern_image.apply(SMALL, params, images(), keep_BxLx2=KEEP, scan=scan, remat=remat)
        return (jnp.arange(6.0) * jnp.square(z)).mean()

    grads, *others = (
        jax.jit(jax.grad(loss), static_argnums=(1, 2))(lively(SMALL), *s)
        for s in ((True, "none"), (True, "full"), (False, "full"))
    )
    dead = {
        "/".join(k.key for k in path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
        if not np.asarray(leaf).any()
    }
    assert dead == {"mask_token"}  # hidden cells were not given
    for other in others:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(a).max()),
            grads,
            other,
        )


@pytest.mark.slow
@pytest.mark.parametrize("norm", ("pre", "post", "res_post"))
def test_what_is_kept_by_name_needs_no_product_twice(norm):
    model = dataclasses.replace(SMALL, norm=norm, layer_scale=0.1 if norm == "post" else 0.0)
    model = dataclasses.replace(model, depths=(1, 1, 2, 1))
    params = jax.eval_shape(lambda key: intern_image.init(model, key), jax.random.key(0))

    def products(remat):
        gradient = jax.grad(
            lambda p: jnp.square(
                intern_image.apply(model, p, images(), remat=remat, method="dense")
            ).sum()
        )
        return flops.count_flops(gradient, params).dot

    names, none = products("names"), products("none")
    assert none < products("full")
    # But for the product with ones that hands every channel its group's share: too large to keep
    # for what it costs.
    assert none <= names < 1.002 * none and (names == none) == (not model.center_scale)


@functools.cache
def forward():
    return jit(
        lambda params, keep, hidden: intern_image.apply(
            SMALL, params, images(), keep_BxLx2=keep, hidden_BxN=hidden, scan=True
        )
    )


def test_stochastic_depth_skips_branches_of_their_own_rows():
    params, shown = lively(SMALL), np.zeros((2, 4), bool)
    ones = np.ones((2, 6, 2), np.float32)
    whole = forward()(params, ones, shown)
    half = ones.copy()
    half[1] = 0
    dropped = forward()(params, half, shown)
    np.testing.assert_array_equal(dropped[0], whole[0])
    assert np.abs(dropped[1] - whole[1]).max() > 0.1
    silent = dict(params)  # branches that add nothing do the same
    for stage in range(4):
        layers = dict(params[f"stage{stage}"]["layers"])
        for norm in ("res_norm1", "res_norm2"):
            layers[norm] = jax.tree.map(jnp.zeros_like, layers[norm])
        silent[f"stage{stage}"] = {**params[f"stage{stage}"], "layers": layers}
    np.testing.assert_allclose(dropped[1], forward()(silent, ones, shown)[1], atol=1e-5)


def test_hidden_cells_show_nothing_of_the_image():
    params, ones = lively(SMALL), np.ones((2, 6, 2), np.float32)
    hidden = np.ones((2, 4), bool)
    z = forward()(params, ones, hidden)
    np.testing.assert_allclose(z[0], z[1], atol=1e-5)  # two images, both hidden
    hidden[1, 2] = False
    part = forward()(params, ones, hidden)
    np.testing.assert_array_equal(part[0], z[0])
    assert np.abs(part[1] - z[1]).max() > 1e-3


def test_images_and_patches():
    x = images(12)
    np.testing.assert_array_equal(intern_image.unpatchify(vit.patchify(x, 4), 3), x)


def test_what_does_not_fit_is_refused():
    shapes = jax.eval_shape(
        lambda key: intern_image.init(SMALL, key, mask_token=True), jax.random.key(0)
    )

    def run(**settings):
        size = settings.pop("size", 16)
        return jax.eval_shape(
            lambda params: intern_image.apply(SMALL, params, images(size), **settings), shapes
        )

    with pytest.raises(ValueError, match=r"\(2, 24, 24, 3\).*multiples of 16"):
        run(size=24)
    with pytest.raises(ValueError, match=r"keep factors.*\[B, 6, 2\]"):
        run(keep_BxLx2=jnp.ones((2, 5, 2)))
    with pytest.raises(ValueError, match="hidden cells.*8x8"):
        run(hidden_BxN=jnp.zeros((2, 9), bool))
    with pytest.raises(ValueError, match="fused"):
        intern_image.fuse(dataclasses.replace(SMALL, fused=0), {}, [])


@pytest.mark.parametrize(("kernel", "dtype"), ((5, "float32"), (3, "bfloat16")))
def test_all_forms_of_the_depthwise_convolution(kernel, dtype):
    r = np.random.default_rng(0)
    x, g = (jnp.asarray(r.normal(size=(2, 7, 9, 6)), dtype) for _ in range(2))
    weight, bias = (
        jnp.asarray(r.normal(size=(kernel, kernel, 6)), jnp.float32),
        jnp.asarray(r.normal(size=6), jnp.float32),
    )
    weight = weight.astype(dtype).astype(jnp.float32)  # what a product in bfloat16 makes of it
    value = (
        intern_image_layer._shifted_sum(x, weight, bias),
        intern_image_layer._convolved(x, weight, bias),
    )
    by_shift, by_row = (
        intern_image_layer._shifted_sum_backward(sums, x, weight, g)
        for sums in (intern_image_layer._by_shift, intern_image_layer._by_row)
    )
    gradients = by_shift, intern_image_layer._convolved_backward(x, weight, g), by_row
    wide = np.pad(
        np.asarray(x, np.float64), ((0, 0), (kernel // 2,) * 2, (kernel // 2,) * 2, (0, 0))
    )
    wanted = (
        sum(
            wide[:, i : i + 7, j : j + 9] * np.asarray(weight, np.float64)[i, j]
            for i in range(kernel)
            for j in range(kernel)
        )
        + bias
    )
    np.testing.assert_allclose(
        np.asarray(value[1], np.float64),
        wanted,
        atol=0.02 * np.abs(wanted).max() if dtype == "bfloat16" else 1e-5,
    )
    for ours, theirs in zip(
        (value[1], *gradients[1], *gradients[2]),
        (value[0], *gradients[0], *gradients[0]),
        strict=True,
    ):
        assert ours.dtype == theirs.dtype
        scale = np.abs(np.asarray(theirs, np.float32)).max()
        np.testing.assert_allclose(
            np.asarray(ours, np.float32),
            np.asarray(theirs, np.float32),
            atol=(0.01 if dtype == "bfloat16" else 1e-5) * scale,
        )

"""Two composed copies of a backbone: against a rendering with loops over stages and cells, and what
holds for any backbone with stages."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.models import backbones, composite, intern_image
from m3i_jax.models.intern_image_backbone import PRESETS, intern_image_config
from m3i_jax.models.intern_image_layer import convolve, norm_layer, run_layers
from m3i_jax.models.layers import gelu

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
VIT = schema.Model(
    encoder=schema.Encoder(
        patch_size=4, width=8, depth=3, heads=2, positions="learned", freeze_patch_embed=False
    ),
    dtype="float32",
)
VIT_MAPS = schema.Maps(window=2, global_blocks=(2,), relative="decomposed", blocks=(1, 2))


def internimage():
    """A model of three layers, the deepest stage of one, with norms after the stages."""
    net = schema.InternImage(
        **{field.name: getattr(intern_image.PRESETS["internimage_pico"], field.name)
           for field in dataclasses.fields(schema.InternImage)}
    )  # fmt: skip
    net = dataclasses.replace(
        net, width=8, depths=(1, 1, 1, 1), groups=(1, 1, 2, 2), stem_strides=(2, 1)
    )
    return schema.Model(
        backbone="intern_image",
        encoder=schema.Encoder(patch_size=8, width=16),
        intern_image=net,
        dtype="float32",
    )


def composed(model, maps, size):
    two = composite.compose(backbones.get_backbone(model), maps, size=size)

    def init(key):
        params = two.init(model, key, mask_token=False, grid=size // model.encoder.patch_size)
        return two.init_maps(model, maps, params, size=size)

    return two, init


def shaken(init, seed=0):
    """First values with noise on all, so that offsets, gammas and tables count."""
    r = np.random.default_rng(seed)
    add = lambda leaf: np.asarray(leaf) + 0.1 * r.normal(size=leaf.shape).astype(np.float32)
    return jax.tree.map(add, jit(init)(jax.random.key(seed)))


def images(size, seed=0):
    return np.random.default_rng(seed).normal(size=(2, *size, 3)).astype(np.float32)


def by_hand(model, params, x):
    """Maps of both copies of an InternImage, the composition in float64 cell by cell."""
    net, second = intern_image_config(model), params["second"]

    @functools.partial(jit, static_argnums=0)
    def stage(i, part, x):
        """The map of a stage, and the input of the next one."""
        y = norm_layer(part["norm"], run_layers(intern_image._layer(net, i), part["layers"], x))
        if i == 3:
            return y, y
        return y, norm_layer(part["down"]["norm"], convolve(part["down"]["conv"], y, 2))

    @jit
    def stem(part, x):
        x = gelu(norm_layer(part["norm1"], convolve(part["conv1"], x, net.stem_strides[0])))
        return norm_layer(part["norm2"], convolve(part["conv2"], x, net.stem_strides[1]))

    first, start = [], stem(params["stem"], x)
    x = start
    for i in range(4):
        y, x = stage(i, params[f"stage{i}"], x)
        first.append(y)
    f = [np.asarray(y, np.float64) for y in first]
    out, x = [], start
    for i in range(4):
        fed = f[i].copy()
        for j in range(i + 1, 4):
            link = params["links"][f"stage{i}"][f"from{j}"]
            deeper = f[j] @ link["kernel"] + link["bias"]
            for row, column in np.ndindex(*fed.shape[1:3]):
                fed[:, row, column] += deeper[:, row >> (j - i), column >> (j - i)]
        x = np.asarray(x + params["gamma"][f"stage{i}"] * fed, np.float32)
        y, x = stage(i, second[f"stage{i}"], x)
        out.append(y)
    return first, out


def test_the_second_copy_is_fed_with_the_maps_of_the_first():
    model, maps = internimage(), schema.Maps(composite=2)
    two, init = composed(model, maps, 32)
    params, x = shaken(init), images((16, 32))
    assert not {"stem", "fusion"} & params["second"].keys()
    run = jit(lambda params, x: two.copies(model, params, x, maps=maps, size=32))
    for ours, theirs in zip(run(params, x), by_hand(model, params, x), strict=True):
        for y, wanted in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(y, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("model", "maps", "size"),
    [(internimage(), schema.Maps(), 16), (VIT, VIT_MAPS, 16)],
    ids=["internimage", "vit"],
)
def test_at_the_start_both_copies_are_the_backbone_and_gamma_learns(model, maps, size):
    """Same weights in both and gamma 0, for a backbone of several strides and one with windows."""
    two, init = composed(model, maps, size)
    one = backbones.get_backbone(model)
    params = shaken(init)
    plain = {n: leaf for n, leaf in params.items() if n not in ("second", "links", "gamma")}
    params["second"] = {n: leaf for n, leaf in plain.items() if n not in one.stem_parameters}
    params["gamma"] = jax.tree.map(np.zeros_like, params["gamma"])
    layers = one.depth(model)
    keep = (1.0 + np.arange(2 * layers * 2).reshape(2, layers, 2) / 10).astype(np.float32)
    x = images((size, size))

    def run(params):
        both = two.copies(
            model, params, x, maps=maps, size=size, keep_BxLx2=np.concatenate([keep, keep], 1)
        )
        return sum(jnp.square(y).sum() for y in both[1]), both

    (_, both), grads = jit(jax.value_and_grad(run, has_aux=True))(params)
    alone = jit(lambda params: one.stages(model, params, x, maps=maps, size=size, keep_BxLx2=keep))(
        plain
    )
    for copy in both:
        for y, wanted in zip(copy, alone, strict=True):
            np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(grads["gamma"]))
    # with gamma 0 the links have no effect yet, and the stem learns from the second copy
    assert not any(np.abs(g).max() for g in jax.tree.leaves(grads["links"]))
    stem = next(name for name in one.stem_parameters if name in grads)
    assert max(np.abs(g).max() for g in jax.tree.leaves(grads[stem])) > 1e-3


def test_gamma_starts_at_zero_and_the_copies_differ_without_pretrained_weights():
    model = internimage()
    _, init = composed(model, schema.Maps(), 16)
    params = jit(init)(jax.random.key(0))
    assert not any(leaf.any() for leaf in jax.tree.leaves(params["gamma"]))
    kernel = lambda tree: tree["stage1"]["layers"]["mlp"]["fc1"]["kernel"]
    assert not (kernel(params) == kernel(params["second"])).any()
    link = params["links"]["stage0"]["from2"]["kernel"]
    assert link.shape == (32, 8) and 0.9 / 32**0.5 < np.abs(link).max() <= 1 / 32**0.5


def test_parameters_of_internimage_h_composed():
    preset = PRESETS["internimage_h"]
    model = schema.Model(
        backbone="intern_image",
        encoder=schema.Encoder(**preset["encoder"]),
        intern_image=schema.InternImage(**preset["intern_image"]),
    )
    _, init = composed(model, schema.Maps(), 64)
    tree = jax.eval_shape(init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(tree))
    c = [320, 640, 1280, 2560]
    stem = 27 * 160 + 9 * 160 * 320 + 2 * (160 + 320) + 160 + 320
    links = sum(c[i] * (c[j] + 1) for i in range(4) for j in range(i + 1, 4))
    assert count == 2 * 1_073_122_480 - stem + links + sum(c) == 2_152_954_720


def test_layers_of_both_copies_learn_alike():
    model = internimage()
    two, _ = composed(model, schema.Maps(), 16)
    one = backbones.get_backbone(model)
    for path in ("stage0/layers/norm1/scale", "stage2/down/conv/kernel"):
        for ours in (path, f"second/{path}"):
            np.testing.assert_array_equal(
                two.layers_above(model, ours), one.layers_above(model, path)
            )
    assert two.layers_above(model, "links/stage0/from1/kernel") == 0
    assert two.layers_above(model, "gamma/stage3") == 0

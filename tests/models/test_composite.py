"""Two composed copies of a backbone: against a rendering with loops over stages and cells, and what
holds for any backbone with stages."""

import dataclasses
import functools

import jax
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


@functools.cache
def copies(model, maps, size):
    """(first values with noise, the maps of both copies, those of one): functions of images and of
    what stochastic depth keeps of every layer, compiled."""
    two, init = composed(model, maps, size)
    one = backbones.get_backbone(model)
    settings = {"maps": maps, "size": size}
    both = jit(lambda p, x, keep: two.copies(model, p, x, **settings, keep_BxLx2=keep))
    alone = jit(lambda p, x, keep: one.stages(model, p, x, **settings, keep_BxLx2=keep))
    return shaken(init), both, alone


def test_the_second_copy_is_fed_with_the_maps_of_the_first():
    model, x = internimage(), images((16, 32))
    params, both, _ = copies(model, schema.Maps(composite=2), 32)
    assert not {"stem", "fusion"} & params["second"].keys()
    keep = np.ones((2, 8, 2), np.float32)
    for ours, theirs in zip(both(params, x, keep), by_hand(model, params, x), strict=True):
        for y, wanted in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(y, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("model", "maps", "size"),
    [(internimage(), schema.Maps(composite=2), (16, 32)), (VIT, VIT_MAPS, (16, 16))],
    ids=["internimage", "vit"],
)
def test_at_the_start_both_copies_are_the_backbone_and_gamma_learns(model, maps, size):
    """Same weights in both and gamma 0, for a backbone of several strides and one with windows."""
    params, both, alone = copies(model, maps, size[1])
    one = backbones.get_backbone(model)
    plain = {n: leaf for n, leaf in params.items() if n not in ("second", "links", "gamma")}
    params = params | {
        "second": {n: leaf for n, leaf in plain.items() if n not in one.stem_parameters},
        "gamma": jax.tree.map(np.zeros_like, params["gamma"]),
    }
    layers, x = one.depth(model), images(size)
    keep = (1.0 + np.arange(2 * layers * 2).reshape(2, layers, 2) / 10).astype(np.float32)
    run = lambda **more: both(params | more, x, np.concatenate([keep, keep], 1))
    start = run()
    wanted = alone(plain, x, keep)
    for copy in start:
        for y, z in zip(copy, wanted, strict=True):
            np.testing.assert_allclose(y, z, rtol=0, atol=1e-5 * np.abs(z).max())

    def moved(found):
        """By how much the maps of each copy moved."""
        return [
            max(float(np.abs(a - b).max()) for a, b in zip(*pair, strict=True))
            for pair in zip(start, found, strict=True)
        ]

    # with gamma 0 the links have no effect yet; each gamma moves the second copy alone, and the
    # stem both
    assert moved(run(links=jax.tree.map(lambda leaf: leaf + 1, params["links"]))) == [0, 0]
    for name, gamma in params["gamma"].items():
        first, second = moved(run(gamma=params["gamma"] | {name: gamma + np.float32(0.1)}))
        assert first == 0 and second > 1e-3, name
    stem = {n: params[n] for n in one.stem_parameters if n in params}
    assert min(moved(run(**jax.tree.map(lambda leaf: leaf * np.float32(1.1), stem)))) > 1e-3


def test_gamma_starts_at_zero_and_the_copies_differ_without_pretrained_weights():
    model = internimage()
    _, init = composed(model, schema.Maps(), 16)
    params = jit(init)(jax.random.key(0))
    assert not any(leaf.any() for leaf in jax.tree.leaves(params["gamma"]))
    kernel = lambda tree: tree["stage1"]["layers"]["mlp"]["fc1"]["kernel"]
    assert not (kernel(params) == kernel(params["second"])).any()
    link = params["links"]["stage0"]["from2"]["kernel"]
    assert link.shape == (32, 8) and 0.9 / 32**0.5 < np.abs(link).max() <= 1 / 32**0.5


@pytest.mark.slow
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
                two.layers_above(model, ours), one.map_layers_above(model, path)
            )
    assert two.layers_above(model, "links/stage0/from1/kernel") == 0
    assert two.layers_above(model, "gamma/stage3") == 0

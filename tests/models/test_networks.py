"""ViT, InternImage and the DCNv3 layer as plain functions and as modules of flax: the same numbers
as within the package, gradients through both kinds of module, and names that can be found."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import m3i_jax
from m3i_jax import schema
from m3i_jax.evaluation import load
from m3i_jax.models import networks
from tests import saved, toy

SMALL = {
    "ViT": m3i_jax.ViT(width=8, depth=2, heads=2, patch_size=8, image_size=16),
    "InternImage": m3i_jax.InternImage(
        config=networks.InternImageConfig(
            width=4, depths=(1, 1, 1, 1), groups=(1, 1, 2, 2), kernel=3, fused=8, extra_norm=0,
            norm="post", stem_strides=(2, 1),
        )
    ),
    "DCNv3": m3i_jax.DCNv3(width=4, groups=2, center_scale=True),
}  # fmt: skip


def inputs(kind: str) -> jax.Array:
    shape = (2, 5, 6, 4) if kind == "DCNv3" else (2, 16, 16, 3)
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def test_names_are_found() -> None:
    assert {"ViT", "InternImage", "DCNv3", "dcnv3", "load"} <= set(dir(m3i_jax))
    assert m3i_jax.ViT.preset("vit_b16").depth == 12
    assert m3i_jax.InternImage.preset("internimage_t", fused=0).config.fused == 0


# features of an InternImage are those of its file in modes/test_export.py
@pytest.mark.parametrize("backbone", ["vit", pytest.param("intern_image", marks=pytest.mark.slow)])
def test_a_loaded_encoder_is_such_a_function(backbone: str, tmp_path) -> None:
    """Of normalised images, with the parameters of the run: the tokens that `features` gives."""
    sizes = toy.INTERN if backbone == "intern_image" else {}
    saved.run(tmp_path, toy.settings(**sizes, objective__forms="mim"))
    model = load.load(str(tmp_path), pool="tokens")
    images = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    augment = model.config.data.augment
    normal = (images / 255 - np.array(augment.mean)) / np.array(augment.std)
    tokens = jax.jit(model.network)(model.params["encoder"], jnp.asarray(normal, jnp.float32))
    np.testing.assert_allclose(tokens, model.features(images, ready=True), rtol=1e-4, atol=1e-4)
    of_run = model.params["encoder"]
    shapes = jax.eval_shape(model.network.init, jax.random.key(0))
    expected = {k: v for k, v in of_run.items() if k != "mask_token"}
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, expected)


@pytest.mark.parametrize("kind", ["ViT", "DCNv3"])
def test_modules_compute_the_same(kind: str) -> None:
    """Output and gradient of the modules of Linen and NNX equal those of the plain function."""
    network, x = SMALL[kind], inputs(kind)
    module = network.linen()
    variables = jax.jit(module.init)(jax.random.key(3), x)
    params = variables["params"]["network"]

    @jax.jit
    def plain(params, x):
        return jax.value_and_grad(lambda p: (network(p, x) ** 2).sum())(params)

    @jax.jit
    def linen(variables, x):
        return jax.value_and_grad(lambda v: (module.apply(v, x) ** 2).sum())(variables)

    value, grads = plain(params, x)
    assert value > 0 and any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    of_linen, linen_grads = linen(variables, x)
    np.testing.assert_allclose(of_linen, value, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        linen_grads["params"]["network"],
        grads,
    )
    model = network.nnx(nnx.Rngs(0))
    model.parameters = nnx.data(jax.tree.map(nnx.Param, params))

    @nnx.jit
    def of_nnx(model, x):
        return nnx.value_and_grad(lambda m: (m(x) ** 2).sum())(model)

    nnx_value, state = of_nnx(model, x)
    np.testing.assert_allclose(nnx_value, value, rtol=1e-5)
    theirs = jax.tree.leaves(nnx.to_pure_dict(state)["parameters"])
    for a, b in zip(theirs, jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_modules_of_internimage_compute_the_same() -> None:
    """Its output alone: the two modules are those of the networks above, and so are gradients."""
    network, x = SMALL["InternImage"], inputs("InternImage")
    module = network.linen()
    variables = jax.jit(module.init)(jax.random.key(3), x)
    params = variables["params"]["network"]
    wanted = jax.jit(network)(params, x)
    assert np.abs(wanted).max() > 0
    np.testing.assert_allclose(jax.jit(module.apply)(variables, x), wanted, rtol=1e-5, atol=1e-6)
    model = network.nnx(nnx.Rngs(0))
    model.parameters = nnx.data(jax.tree.map(nnx.Param, params))
    ours = nnx.jit(lambda model, x: model(x))(model, x)
    np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "make, why",
    [
        (lambda: m3i_jax.ViT(norm="rmsnorm"), "ViT: norm: 'rmsnorm' is not one of layer, rms"),
        (lambda: m3i_jax.ViT(positions="sin-cos"), "ViT: positions: .* did you mean sincos?"),
        (lambda: m3i_jax.ViT(width=64, heads=6), "ViT: heads: 6 must divide the width 64"),
        (lambda: m3i_jax.ViT(depth=0), "ViT: depth: 0 must be at least 1"),
        (
            lambda: m3i_jax.InternImage.preset("internimage_t", depths=[4, 4, 18]),
            "InternImage: depths: .* must be four numbers",
        ),
        (
            lambda: m3i_jax.InternImage.preset("internimage_t", norm="Pre"),
            "InternImage: norm: 'Pre' is not one of pre, post, res_post",
        ),
    ],
)
def test_unknown_sizes_are_refused(make, why) -> None:
    """They were read as the default: layer norm, the sin-cos table."""
    with pytest.raises(ValueError, match=why):
        make()


def test_pixels_that_are_not_normalised_are_refused() -> None:
    """They were computed with, as values up to 255."""
    own = networks.BackboneNetwork(model=schema.Model(), image_size=224)
    intern = SMALL["InternImage"]
    for call in (SMALL["ViT"], intern, intern.maps, own):
        with pytest.raises(ValueError, match=r"type uint8; .* \.preprocessing\.mean and \.std"):
            call({}, jnp.zeros((1, 16, 16, 3), jnp.uint8))


@pytest.mark.parametrize("network", [m3i_jax.ViT, m3i_jax.InternImage])
def test_unknown_presets_name_the_known(network) -> None:
    near = "vit_b16" if network is m3i_jax.ViT else "internimage_b"
    with pytest.raises(KeyError, match=f"did you mean {near}?"):
        network.preset(near + "x")


def test_an_even_side_is_refused() -> None:
    """The gradient of such a depth-wise convolution was one cell off."""
    layer = m3i_jax.DCNv3(width=4, groups=2, kernel=4)
    params = jax.eval_shape(layer.init, jax.random.key(0))
    with pytest.raises(ValueError, match="side 4 has no centre"):
        jax.eval_shape(layer, params, inputs("DCNv3"))


def test_parameters_in_bfloat16_have_gradients() -> None:
    """The layer of a caller who keeps its parameters in bfloat16: gradients in their type, those of
    the same numbers in float32 to rounding."""
    layer, x = SMALL["DCNv3"], inputs("DCNv3")
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), layer.init(jax.random.key(0)))
    gradient = jax.jit(jax.grad(lambda params: (layer(params, x) ** 2).sum()))
    found = gradient(half)
    wanted = gradient(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(np.float32), b, rtol=0.01, atol=1e-6)


def test_an_optimizer_of_nnx_trains_the_layer() -> None:
    layer, x = SMALL["DCNv3"].nnx(nnx.Rngs(1)), inputs("DCNv3")
    optimizer = nnx.Optimizer(layer, optax.sgd(0.05), wrt=nnx.Param)

    @nnx.jit
    def step(layer, optimizer, x):
        value, grads = nnx.value_and_grad(lambda m: ((m(x) - x) ** 2).mean())(layer)
        optimizer.update(layer, grads)
        return value

    values = [float(step(layer, optimizer, x)) for _ in range(4)]
    assert values[-1] < values[0]

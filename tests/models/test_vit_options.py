"""Registers, rotary positions, SwiGLU, RMS norm, norms of queries and keys and layer scale, alone
and together: dropped tokens, scan, remat, meshes, pieces, export, modules of flax. Their values are
those of other projects (tests/interop/test_modern_encoders.py)."""

import dataclasses
import functools

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import m3i_jax
from m3i_jax import parallel, schema
from m3i_jax.errors import UserError
from m3i_jax.models import (
    backbones,
    decoder,
    gated,
    initializers,
    layers,
    norms,
    rope,
    scan_blocks,
    vit,
    vit_maps,
)
from m3i_jax.objective import positions
from m3i_jax.profiling import flops

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
ALL = schema.Encoder(
    patch_size=2,
    width=16,
    depth=2,
    heads=2,
    mlp_ratio=2.0,
    positions="rope",
    registers=3,
    norm="rms",
    final_norm=True,
    qk_norm=True,
    layer_scale=0.5,
    activation="swiglu",
    freeze_patch_embed=False,
)
MODEL = schema.Model(encoder=ALL, dtype="float32")
GRID, ROWS = 3, 8
X = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, GRID * GRID, 12)), jnp.float32)
INDEX = jnp.asarray(
    np.stack([np.random.default_rng(i).permutation(9)[:5] for i in range(ROWS)]), jnp.int32
)


def changed(**changes) -> schema.Model:
    return dataclasses.replace(MODEL, encoder=dataclasses.replace(ALL, **changes))


@functools.cache
def parameters(model: schema.Model = MODEL):
    """Of `init`, with noise: layer scales and norms that are equal would hide mistakes."""
    r = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda key: vit.init(model, key, grid=GRID), jax.random.key(0))
    return jax.tree.map(
        lambda s: (
            jnp.asarray(0.7 + 0.4 * r.normal(size=s.shape), jnp.float32)
            if s.shape[-1:] and s.ndim == 1
            else jnp.asarray(0.4 * r.normal(size=s.shape), jnp.float32)
        ),
        shapes,
    )


def close(found, expected, scale: float = 1.0) -> None:
    compare = functools.partial(np.testing.assert_allclose, rtol=2e-4 * scale, atol=2e-5 * scale)
    jax.tree.map(compare, jax.device_get(found), jax.device_get(expected))


def test_defaults_have_none_of_them() -> None:
    """Names and shapes of the parameters of a default encoder are those of before."""
    shapes = jax.eval_shape(lambda key: vit.init(schema.Model(), key), jax.random.key(0))
    assert sorted(shapes) == ["blocks", "cls_token", "patch_embed"]
    assert sorted(shapes["blocks"]) == ["attention", "mlp", "norm1", "norm2"]
    assert sorted(shapes["blocks"]["attention"]) == ["out", "qkv"]


def test_the_first_values_of_the_options() -> None:
    model = changed(layer_scale=1e-5)
    params = jax.jit(lambda: vit.init(model, jax.random.key(0)))()
    blocks = params["blocks"]
    np.testing.assert_array_equal(blocks["gamma2"], np.full((2, 16), 1e-5, np.float32))
    np.testing.assert_array_equal(blocks["attention"]["norm_k"]["scale"], np.ones((2, 8)))
    assert sorted(blocks["mlp"]) == ["fc1", "fc2", "gate"] and set(blocks["norm1"]) == {"scale"}
    assert params["registers"].shape == (1, 3, 16) and 0.01 < params["registers"].std() < 0.03
    plain = jax.jit(lambda: vit.init(changed(registers=0), jax.random.key(0)))()
    for name in plain:  # the others start the same without registers
        jax.tree.map(np.testing.assert_array_equal, params[name], plain[name]) if (
            name != "blocks"
        ) else None


def test_registers_stay_inside() -> None:
    """Nothing has rows for them: tokens, means over blocks, attention, maps."""
    params = parameters()
    assert vit.apply(MODEL, params, X, grid=GRID).shape == (ROWS, 10, 16)
    assert vit.apply(MODEL, params, X, grid=GRID, blocks=2).shape == (ROWS, 10, 16)
    weights = jit(lambda p: vit.last_attention(MODEL, p, X, grid=GRID))(params)
    assert weights.shape == (ROWS, 2, 10, 10)
    assert float(weights.sum(-1).max()) < 1  # a part of the attention goes to the registers
    images = jnp.zeros((1, 4, 8, 3))
    (found,) = jax.eval_shape(
        lambda p: vit_maps.stages(MODEL, p, images, maps=schema.Maps(), size=6), params
    )
    assert found.shape == (1, 2, 4, 16)


@pytest.mark.parametrize("cls_token", [True, False])
def test_dropped_tokens_keep_their_positions(cls_token: bool) -> None:
    """All cells in another order are the same features in another order; two cells that change
    places are not."""
    model = changed(cls_token=cls_token)
    params, order = parameters(model), np.random.default_rng(3).permutation(9)
    run = jit(lambda index: vit.apply(model, params, X, grid=GRID, index_BxK=index))
    every = jnp.broadcast_to(jnp.asarray(order), (ROWS, 9))
    first = int(cls_token)
    whole = jit(lambda: vit.apply(model, params, X, grid=GRID))()
    close(run(every)[:, first:], whole[:, first:][:, order])
    moved = jit(lambda: vit.apply(model, params, X[:, order], grid=GRID))()
    assert np.abs(moved[:, first:] - whole[:, first:][:, order]).max() > 1e-3


def test_products_depend_on_the_difference_of_positions() -> None:
    """Moved by one row and one column, all products of queries and keys stay; on a grid twice as
    fine, a patch is turned as far as the cell that it is half of."""
    r = np.random.default_rng(4)
    q, k = (jnp.asarray(r.normal(size=(1, 16, 1, 8)), jnp.float32) for _ in "qk")
    centres = rope.patch_centres(4)

    def products(shift):
        angles = rope.axial_angles(centres + shift, 8, 100.0)[None]
        turn = np.cos(angles), np.sin(angles)
        return jnp.einsum("bqhe,bkhe->qk", rope.turn_heads(q, turn), rope.turn_heads(k, turn))

    close(products(np.array([0.5, 0.5])), products(np.zeros(2)))
    fine = rope.patch_centres(8).reshape(4, 2, 4, 2, 2).mean((1, 3)).reshape(16, 2)
    np.testing.assert_allclose(fine, centres, atol=1e-12)


def test_target_positions_mean_the_same() -> None:
    """The queries of the decoder, and the cells of the tokens that it reads, are in the frame of
    the input view; nothing of them depends on the positions of the encoder."""
    box, flip = jnp.array([[0.1, 0.2, 0.9, 0.8]]), jnp.array([False])
    other = jnp.array([[0.3, 0.1, 0.7, 0.9]])
    raw = positions.relative_positions(box, flip, other, flip, grid=GRID, width=16)
    found = []
    for model in (changed(positions="sincos"), MODEL):
        model = dataclasses.replace(model, decoder=schema.Decoder(width=16, depth=1, heads=2))
        params = jax.jit(lambda model=model: decoder.init(model, jax.random.key(0)))()
        found.append(decoder.decoder_queries(model, params, raw))
    np.testing.assert_array_equal(*found)


def loss(model, params, **settings):
    r = np.random.default_rng(5)
    keep = jnp.asarray(r.choice([0.0, 1.25], (ROWS, 2, 2)), jnp.float32)
    z = vit.apply(model, params, X, grid=GRID, keep_BxLx2=keep, **settings)
    return (z * jnp.asarray(r.normal(size=z.shape))).sum()


@functools.cache
def expected(masked: bool):
    settings = {"index_BxK": INDEX} if masked else {}
    return jax.device_get(
        jit(jax.value_and_grad(lambda p: loss(MODEL, p, **settings)))(parameters())
    )


@pytest.mark.parametrize(
    "masked,scan,remat",
    [
        (True, True, "none"),
        (True, True, "names"),
        pytest.param(False, False, "full", marks=pytest.mark.slow),
        (False, True, "half"),
    ],
)
def test_scan_and_remat_change_no_number(masked, scan, remat, monkeypatch) -> None:
    monkeypatch.setattr(scan_blocks, "ROWS", 4)  # two pieces
    model = dataclasses.replace(MODEL, scan=scan, remat=remat)
    settings = {"index_BxK": INDEX} if masked else {}
    run = jit(jax.value_and_grad(lambda p: loss(model, p, **settings)))
    close(run(parameters()), expected(masked), 5)


@pytest.mark.parametrize("masked", [True, False])
def test_a_mesh_changes_no_number(masked: bool, monkeypatch) -> None:
    """Weights split over fsdp, gathered block by block; rotations of each image go with its row."""
    monkeypatch.setattr(parallel.sharding, "SMALL", 64)
    mesh = parallel.make_mesh((2, 2, 2), jax.devices()[:8])
    layout = parallel.tree_shardings(mesh, parameters())
    assert "fsdp" in str(layout["blocks"]["mlp"]["gate"]["kernel"].spec)
    settings = {"index_BxK": INDEX} if masked else {}
    model = dataclasses.replace(MODEL, scan=True)
    with jax.set_mesh(mesh):
        run = jit(jax.value_and_grad(lambda p: loss(model, p, **settings)), in_shardings=(layout,))
        close(run(jax.device_put(parameters(), layout)), expected(masked), 5)


@pytest.mark.parametrize("window", [0, 2])
def test_maps_are_those_of_the_tokens(window: int) -> None:
    """The map of a square is the patch tokens; windows that hold the map see all of it, without cls
    and registers."""
    model = changed(final_norm=False)
    own = changed(final_norm=False, cls_token=False, registers=0) if window else model
    params = parameters(model)
    maps = schema.Maps(window=GRID if window else 0)
    tree = vit_maps.init_maps(model, maps, params, size=6)
    assert ("registers" in tree) == (not window)
    images = X.reshape(ROWS, GRID, GRID, 2, 2, 3).swapaxes(2, 3).reshape(ROWS, 6, 6, 3)
    found = jit(lambda p: vit_maps.stages(model, p, images, maps=maps, size=6)[0])(tree)
    tokens = jit(lambda p: vit.apply(own, p, X, grid=GRID))(params)
    close(found.reshape(ROWS, 9, 16), tokens[:, 0 if window else 1 :])


def test_gradients_of_the_new_layers_are_those_of_autodiff() -> None:
    r = np.random.default_rng(6)
    x, y = (jnp.asarray(r.normal(size=(3, 5, 8)), jnp.float32) for _ in "xy")
    scale = jnp.asarray(r.normal(size=8), jnp.float32)
    plain = lambda x, s: x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * s
    for ours, theirs, arguments in (
        (norms.rms_norm, plain, (x, scale)),
        (gated.swiglu, lambda a, b: jax.nn.silu(a) * b, (x, y)),
    ):
        weighted = lambda *a, f: (f(*a) * jnp.cos(jnp.arange(8.0))).sum()
        close(
            jit(jax.grad(functools.partial(weighted, f=ours), (0, 1)))(*arguments),
            jit(jax.grad(functools.partial(weighted, f=theirs), (0, 1)))(*arguments),
        )


def test_an_exported_program_and_the_modules_of_flax() -> None:
    network = m3i_jax.ViT(
        image_size=6, patch_size=2, width=16, depth=2, heads=2, positions="rope", registers=3,
        norm="rms", qk_norm=True, layer_scale=0.5, activation="swiglu", mlp_ratio=2.0,
    )  # fmt: skip
    params = jax.jit(network.init)(jax.random.key(0))
    images = jnp.asarray(np.random.default_rng(7).normal(size=(2, 6, 6, 3)), jnp.float32)
    tokens = jit(network)(params, images)
    module = network.linen()
    close(jit(module.apply)({"params": {"network": params}}, images), tokens)
    model = network.nnx(nnx.Rngs(0))
    assert jit(lambda x: model(x))(images).shape == tokens.shape == (2, 10, 16)
    (rows,) = jax.export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((rows, 6, 6, 3), jnp.float32)
    exported = jax.export.export(jax.jit(lambda x: network(params, x)))(shape)
    close(exported.call(images), tokens)


def test_the_kernel_for_tpus_reads_turned_queries_and_keys(monkeypatch) -> None:
    """In the interpreter, with the value and the gradients of the compiler's attention."""
    one = layers.block(
        128, 4, 1.0, "float32", "rms", activation="swiglu", qk_norm=True, layer_scale=True, rope=100
    )
    r = np.random.default_rng(8)
    shapes = initializers.shapes_of(one, jnp.zeros((1, 1, 128)))
    tree = jax.tree.map(lambda s: jnp.asarray(0.3 * r.normal(size=s.shape), jnp.float32), shapes)
    x = jnp.asarray(r.normal(size=(2, 11, 128)), jnp.float32)
    turn = rope.axial_rotation(3, 32, 100.0, prefix=2)

    def loss(tree, x, rows):
        y = one.apply({"params": tree}, x, None, None, rows, rotation=turn)
        return (y * jnp.cos(jnp.arange(128.0))).sum()

    mesh = parallel.make_mesh((1, 1, 1), jax.devices()[:1])
    rows, found = slice(3, None), []
    for kernel in (False, True):
        with monkeypatch.context() as patch, jax.set_mesh(mesh):
            only = ("tpu",) if kernel else ()
            patch.setattr(
                parallel, "kernels", lambda rows, platforms=("tpu",), only=only: platforms == only
            )
            run = lambda tree, x: jax.value_and_grad(loss, (0, 1))(tree, x, rows)
            traced = jax.jit(run).trace(tree, x)  # a new function: traces are cached
            assert ("pallas_call" in str(traced.jaxpr)) == kernel
            found.append(traced.lower().compile()(tree, x))
    close(found[1], found[0], 5)


def test_flops_are_those_of_the_shapes() -> None:
    """A ViT-B/16 with all options on 224 pixels: registers cost what their tokens cost, all else no
    product but that of the gate."""
    encoder = dataclasses.replace(
        ALL, patch_size=16, width=768, depth=12, heads=12, mlp_ratio=8 / 3, registers=4
    )
    model = schema.Model(encoder=encoder)
    tree = jax.eval_shape(lambda key: vit.init(model, key), jax.random.key(0))
    patches = jax.ShapeDtypeStruct((1, 196, 768), jnp.float32)
    run = functools.partial(vit.apply, model, grid=14)
    n, t, d, f = 196, 196 + 5, 768, 2048
    block = 2 * t * (4 * d * d + 3 * d * f) + 4 * t * t * d
    formula = 2 * n * d * d + 12 * block
    assert 1 <= flops.count_flops(run, tree, patches).total / formula < 1.001


def test_heads_that_cannot_be_turned_are_refused() -> None:
    encoder = schema.Encoder(width=12, heads=2, positions="rope")
    config = schema.Config(model=schema.Model(encoder=encoder))
    with pytest.raises(UserError, match="config.model.encoder.positions: 'rope' needs heads"):
        backbones.validate_backbone(config)

"""Functions of rows that gather their weights by hand: where the gathers stand in the program, and
the same numbers on any mesh."""

import dataclasses
import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import parallel, schema
from m3i_jax.models import initializers, intern_image, layers, pooling, scan_blocks
from m3i_jax.profiling import hlo, topology

DEPTH, WIDTH, ROWS, TOKENS = 5, 32, 16, 6
KEEP = np.random.default_rng(0).choice([0.0, 1.25], (ROWS, DEPTH, 2)).astype(np.float32)
WHERE = np.random.default_rng(1).random((ROWS, TOKENS)) < 0.8
X = np.random.default_rng(2).normal(size=(ROWS, TOKENS, WIDTH)).astype(np.float32)


@pytest.fixture(autouse=True)
def split_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    # or nothing of a toy would be worth a split; norms and biases stay whole
    monkeypatch.setattr(parallel.sharding, "SMALL", 1024)
    monkeypatch.setattr(scan_blocks, "ROWS", 1)  # two pieces on each of eight devices


@functools.cache
def params(norm: str = "layer"):
    one = layers.block(WIDTH, 4, 2.0, "float32", norm)
    return one, jax.jit(lambda key: initializers.init_blocks(one, key, width=WIDTH, depth=DEPTH))(
        jax.random.key(0)
    )


def gradients(shape: tuple[int, int, int], norm: str = "layer", **settings):
    """(compiled value and gradients of a stack of blocks on a mesh, their arguments laid out)."""
    mesh = parallel.make_mesh(shape, jax.devices()[: np.prod(shape)])
    one, tree = params(norm)

    def loss(tree, x, keep, where):
        y = scan_blocks.run_blocks(one, tree, x, keep_BxLx2=keep, where_BxT=where, **settings)
        return (y * jnp.arange(1.0, 1 + y.shape[-1])).sum()

    rows = parallel.data_sharding(mesh)
    layout = parallel.tree_shardings(mesh, tree)
    arguments = jax.device_put((tree, X, KEEP, WHERE), (layout, rows, rows, rows))
    whole = parallel.replicated(mesh)
    with jax.set_mesh(mesh):
        run = jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=(whole, (layout, rows)))
        return run.lower(*arguments).compile(), arguments


@functools.cache
def on_one_device(norm: str = "layer"):
    run, arguments = gradients((1, 1, 1), norm)
    return jax.device_get(run(*arguments))


def close(got, want) -> None:
    # the bias of a key has no gradient, only rounding
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(want))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max() + 1e-6 * scale
        ),
        jax.device_get(got),
        want,
    )


@pytest.mark.parametrize("keep", [False, True])
def test_the_scan_gathers_one_block_at_a_time(keep: bool) -> None:
    run, arguments = gradients((1, 8, 1), scan=True, remat="names", keep_gathered=keep)
    text = run.as_text()
    gathers = [
        (times, each)
        for times, each, _ in hlo.executed_counts(hlo.parse_hlo(text))
        if re.fullmatch("all-gather(-start)?", each.opcode)
    ]
    # One matrix of all kernels of a block, [D, 3 D + D + 2 D + 2 D], in the loop of the forward
    # and, unless kept, in that of the backward.
    assert len(gathers) == (1 if keep else 2)
    assert all(
        times == DEPTH and (WIDTH, 8 * WIDTH) in [array.shape for array in each.arrays]
        for times, each in gathers
    ), gathers
    # No kernel of all blocks stands whole anywhere, nor its gradient.
    for columns in (3 * WIDTH, WIDTH, 2 * WIDTH):
        assert f"f32[{DEPTH},{WIDTH},{columns}]" not in text
    assert f"f32[{DEPTH},{2 * WIDTH},{WIDTH}]" not in text
    kept = f"f32[{DEPTH},{WIDTH},{8 * WIDTH}]" in text
    assert kept == keep
    close(run(*arguments), on_one_device())


def traced(width: int, depth: int, x_BxT: tuple[int, int], **settings):
    """(gradients of a stack of blocks as a function, abstract arguments) for the mesh in use."""
    one = layers.block(width, 4, 4.0, "bfloat16")
    tree = jax.eval_shape(
        lambda: initializers.init_blocks(one, jax.random.key(0), width=width, depth=depth)
    )
    loss = lambda tree, x: jnp.square(
        scan_blocks.run_blocks(one, tree, x, **settings).astype(jnp.float32)
    ).sum()
    return jax.grad(loss, (0, 1)), tree, jax.ShapeDtypeStruct((*x_BxT, width), jnp.bfloat16)


@pytest.mark.parametrize("remat", ["none", "half"])  # in one, and in two pieces
def test_a_block_adds_its_gradients_up_once_and_by_rows(remat: str) -> None:
    with jax.set_mesh(parallel.make_mesh((1, 8, 1))):
        run, *arguments = traced(WIDTH, DEPTH, (ROWS, TOKENS), scan=True, remat=remat)
        program = jax.make_jaxpr(run)(*arguments)
    made, scattered, added = {}, [], []

    def walk(jaxpr) -> None:
        for each in jaxpr.eqns:
            made.update((var, each) for var in each.outvars)
            scattered.extend([each] if each.primitive.name == "reduce_scatter" else [])
            added.extend(var.aval for var in each.invars if each.primitive.name.startswith("psum"))
            for inner in jax.core.jaxprs_in_params(each.params):
                walk(inner)

    walk(program.jaxpr)
    (one,) = scattered  # in the body of the scan, outside that of the pieces
    assert one.invars[0].aval.str_short() == f"bfloat16[{WIDTH},{12 * WIDTH}]"
    # A layout by columns is what makes an all-reduce of it, and a slice, on a TPU.
    pin = made[one.invars[0]]
    assert pin.primitive.name == "layout_constraint" and pin.params["layout"].major_to_minor == (
        0,
        1,
    )
    # norms and biases, once a stack
    assert added and all(each.size < DEPTH * WIDTH * WIDTH for each in added), added


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_tpu_scatters_the_gradients_of_blocks_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes of a chip's tiles: of smaller ones it adds up all gradients whole."""
    monkeypatch.setattr(scan_blocks, "ROWS", 8)
    mesh = parallel.make_mesh(
        (1, 8, 1), topology.topology_devices(topology.parse_topology("v5e:2x4"))
    )
    place = lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)
    with jax.set_mesh(mesh):
        run, tree, x = traced(256, 3, (128, 16), scan=True, remat="names")
        layout, rows = parallel.tree_shardings(mesh, tree), parallel.data_sharding(mesh)
        done = (
            jax.jit(run, out_shardings=(layout, rows))
            .lower(jax.tree.map(place, tree, layout), place(x, rows))
            .compile()
        )
    found = hlo.collective_traffic(hlo.parse_hlo(done.as_text()))
    assert found["reduce-scatter"].count == 3
    assert found["all-reduce"].received < found["reduce-scatter"].received / 8  # norms and biases


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        pytest.param((2, 4, 1), {"scan": True, "remat": "full"}, marks=pytest.mark.slow),
        ((2, 2, 2), {"scan": True, "remat": "names", "keep_gathered": True}),
        ((1, 8, 1), {}),
        ((1, 8, 1), {"scan": True, "remat": "half"}),
        pytest.param((4, 2, 1), {"remat": "names"}, marks=pytest.mark.slow),
        ((8, 1, 1), {"scan": True, "remat": "half"}),  # replicas alone: the partitioner's work
        # statistics of all rows, which no device holds
        ((1, 8, 1), {"norm": "batch", "scan": True}),
    ],
)
def test_blocks_of_many_devices_are_those_of_one(
    shape: tuple[int, int, int], settings: dict
) -> None:
    run, arguments = gradients(shape, **settings)
    close(run(*arguments), on_one_device(settings.get("norm", "layer")))


def test_heads_gather_once_and_scatter_once() -> None:
    """The pool's four matrices travel together; a dense layer outside of it gathers its own."""
    model = schema.Model(
        encoder=schema.Encoder(width=WIDTH), pool=schema.Pool(width=WIDTH, heads=2), dtype="float32"
    )
    one = layers.Dense(40, jnp.float32)
    shapes = {
        "pool": jax.eval_shape(lambda key: pooling.init(model, key), jax.random.key(0)),
        "category": initializers.shapes_of(one, X[0]),
    }
    tree = jax.jit(lambda key: initializers.init_params(key, shapes))(jax.random.key(1))

    def loss(tree, x):
        return jnp.square(
            one.apply({"params": tree["category"]}, pooling.apply(model, tree["pool"], x))
        ).sum()

    want = jax.device_get(jax.jit(jax.grad(loss))(tree, X))
    mesh = parallel.make_mesh((1, 8, 1))
    layout = parallel.tree_shardings(mesh, tree)
    arguments = jax.device_put((tree, X), (layout, parallel.data_sharding(mesh)))
    with jax.set_mesh(mesh):
        run = jax.jit(jax.grad(loss), out_shardings=layout).lower(*arguments).compile()
    assert hlo.collective_traffic(hlo.parse_hlo(run.as_text()))["all-gather"].count == 2
    close(run(*arguments), want)


def test_by_hand_is_nothing_where_nothing_is_split() -> None:
    def program(shape, x, tree):
        mesh = parallel.make_mesh(shape)
        run = lambda opened, p, x, *_: x @ opened(p)["fc1/kernel"]
        with jax.set_mesh(mesh):
            return str(
                jax.make_jaxpr(
                    lambda p, x: parallel.with_fsdp_gather(
                        run, p, x, dtype="float32", stacked=False
                    )
                )(tree, x)
            )

    tree, small = {"fc1/kernel": jnp.ones((64, 64))}, {"fc1/kernel": jnp.ones((64, 8))}
    assert "shard_map" in program((1, 8, 1), jnp.ones((16, 64)), tree)
    assert "shard_map" not in program((8, 1, 1), jnp.ones((16, 64)), tree)  # replicas alone
    # rows that do not divide
    assert "shard_map" not in program((1, 8, 1), jnp.ones((12, 64)), tree)
    assert "shard_map" not in program((1, 8, 1), jnp.ones((16, 64)), small)  # whole on every device


@functools.cache
def small_intern_image():
    """(settings of a small InternImage, its parameters)"""
    model = dataclasses.replace(
        intern_image.PRESETS["internimage_pico"], depths=(1, 1, 4, 1), extra_norm=2, fused=32
    )
    tree = jax.jit(lambda key: intern_image.init(model, key))(jax.random.key(0))
    offsets = tree["stage2"]["layers"]["dcn"]["offsets"]
    noise = np.random.default_rng(0).normal(size=offsets["kernel"].shape, scale=0.1)
    offsets["kernel"] = offsets["kernel"] + noise
    return model, tree


def convolved(shape: tuple[int, int, int], **settings):
    """(compiled value and gradients of a small InternImage on a mesh, their arguments laid out)."""
    mesh = parallel.make_mesh(shape, jax.devices()[: np.prod(shape)])
    model, tree = small_intern_image()
    images = np.random.default_rng(1).normal(size=(24, 32, 32, 3)).astype(np.float32)

    def loss(tree, x):
        y = intern_image.apply(model, tree, x, **settings)
        return (y * jnp.arange(1.0, 1 + y.shape[-1])).sum()

    rows, layout, whole = (
        parallel.data_sharding(mesh),
        parallel.tree_shardings(mesh, tree),
        parallel.replicated(mesh),
    )
    arguments = jax.device_put((tree, images), (layout, rows))
    with jax.set_mesh(mesh):
        run = jax.jit(jax.value_and_grad(loss), out_shardings=(whole, layout))
        return run.lower(*arguments).compile(), arguments


@pytest.mark.slow
def test_internimage_gathers_one_layer_at_a_time() -> None:
    run, arguments = convolved((1, 8, 1), scan=True, remat="names")
    text = run.as_text()
    gathers = [
        times
        for times, each, _ in hlo.executed_counts(hlo.parse_hlo(text))
        if re.fullmatch("all-gather(-start)?", each.opcode)
    ]
    # of the stage of four layers; no kernel of all four stands whole anywhere
    assert max(gathers) == 4
    for name, kernel in ("fc1", (128, 512)), ("fc2", (512, 128)):
        assert arguments[0]["stage2"]["layers"]["mlp"][name]["kernel"].shape == (4, *kernel)
        assert (
            f"f32[4,{kernel[0]},{kernel[1]}]" not in text
            and f"f32[2,2,{kernel[0]},{kernel[1]}]" not in text
        )
    # Rows stay where they are: every map is of three images a device.
    assert not re.search(r"f32\[24,\d+,\d+,\d+\]", text)
    alone, there = convolved((1, 1, 1), scan=True)
    close(run(*arguments), jax.device_get(alone(*there)))

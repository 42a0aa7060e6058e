"""Losses and networks inside `jax.shard_map` with its check of types: each device has its rows, all
share scalars and parameters, and gradients of what they share are those of all rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import m3i_jax
from m3i_jax.objective.manual_axes import vary_like
from tests.objective.numeric import normal
from tests.objective.public_losses import LOSSES

DEVICES = 8
ROWS, SHARED = PartitionSpec("data"), PartitionSpec()


def shard_map(function, in_specs, out_specs):
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


def check(function, rows, shared, types_alone=False):
    """Value and gradients on eight devices against those of eight parts on one, which a large
    program leaves out: JAX checks the types before it compiles."""
    floats = [i for i, r in enumerate(rows) if np.issubdtype(r.dtype, np.floating)]

    def of(chosen, shared, rows):
        whole = list(rows)
        for i, r in zip(floats, chosen, strict=True):
            whole[i] = r
        return function(tuple(whole), shared)

    def on_device(rows, shared):
        chosen = [rows[i] for i in floats]
        value, grads = jax.value_and_grad(of, (0, 1))(chosen, shared, rows)
        return jax.lax.psum(value, "data"), grads

    def on_one(rows, shared):
        chosen = [rows[i] for i in floats]

        def summed(chosen, shared):
            cut = lambda x: x.reshape(DEVICES, -1, *x.shape[1:])
            parts = jax.tree.map(cut, (chosen, rows))
            return jax.vmap(of, (0, None, 0))(parts[0], shared, parts[1]).sum()

        return jax.value_and_grad(summed, (0, 1))(chosen, shared)

    run = shard_map(on_device, (ROWS, SHARED), (SHARED, (ROWS, SHARED)))
    if types_alone:
        return jax.eval_shape(run, rows, shared)
    got = run(rows, shared)
    wanted = jax.jit(on_one)(rows, shared)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), got, wanted)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_inside_shard_map_equal_those_of_the_parts(name):
    check(*LOSSES[name])


def networks():
    norms = {"norm": "rms", "activation": "swiglu"}
    size = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 1, "heads": 2}
    return {
        "ViT": (m3i_jax.ViT(**size), 16),
        "ViT of RMS norms and SwiGLU": (m3i_jax.ViT(**size, **norms), 16),
        "DCNv3": (m3i_jax.DCNv3(width=3, groups=1), 8),  # of a map above the size of products
    }


@pytest.mark.parametrize(
    "name",
    # DCNv3 is computed so below, and its layer is part of InternImage
    [pytest.param(n, marks=() if n == "ViT" else pytest.mark.slow) for n in networks()],
)
def test_gradients_of_networks_inside_shard_map_equal_those_of_the_parts(name):
    network, side = networks()[name]
    images = normal(DEVICES, side, side, 3)
    params = jax.jit(network.init)(jax.random.key(0))
    loss = lambda rows, params: jnp.square(network(params, rows[0])).mean()
    check(loss, (images,), params)


@pytest.mark.slow
def test_an_intern_image_inside_shard_map_has_gradients():
    network = m3i_jax.InternImage.preset("internimage_pico", depths=(1,) * 4)
    params = jax.eval_shape(network.init, jax.random.key(0))
    loss = lambda rows, params: jnp.square(network(params, rows[0])).mean()
    made = check(loss, (normal(DEVICES, 16, 16, 3),), params, types_alone=True)
    assert jax.tree.map(jnp.shape, made[1][1]) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize("method", [pytest.param("auto", marks=pytest.mark.slow), "band", "gather"])
def test_dcnv3_inside_shard_map_equals_that_of_the_parts(method):
    x, offset = normal(DEVICES, 8, 8, 4), normal(DEVICES, 8, 8, 1, 9, 2, seed=1)
    mask = np.abs(normal(8, 8, 1, 9, seed=2))  # that all devices share

    def loss(rows, mask):
        whole = jnp.broadcast_to(mask, (len(rows[0]), *mask.shape))
        return jnp.sin(m3i_jax.dcnv3(*rows, whole, groups=1, method=method)).sum()

    check(loss, (x, offset), mask)


def test_assignments_and_nms_inside_shard_map_equal_those_of_the_parts():
    cost, boxes = normal(DEVICES, 3, 4), np.abs(normal(DEVICES, 6, 4))
    boxes[..., 2:] += boxes[..., :2]
    scores = normal(DEVICES, 6, seed=1)

    def one(cost, boxes, scores):
        return m3i_jax.hungarian(cost), m3i_jax.nms(boxes, scores, 0.3)

    each = jax.vmap(one)
    on_device = lambda *rows: jax.tree.map(lambda x: x[None], one(*(r[0] for r in rows)))
    got = shard_map(on_device, ROWS, ROWS)
    wanted = each(cost, boxes, scores)
    jax.tree.map(np.testing.assert_array_equal, got(cost, boxes, scores), wanted)


def test_a_cast_adds_the_missing_axes_alone():
    def on_device(x, w):
        both = vary_like({"x": x, "w": w, "n": 3}, x)
        assert both["n"] == 3 and both["x"] is x
        assert jax.typeof(both["w"]).manual_axis_type.varying == {"data"}
        return both["w"] + x

    run = shard_map(on_device, (ROWS, SHARED), ROWS)
    assert run(jnp.zeros(DEVICES), jnp.ones(())).tolist() == [1.0] * DEVICES
    w = jnp.ones(())
    assert vary_like(w, jnp.zeros(2)) is w

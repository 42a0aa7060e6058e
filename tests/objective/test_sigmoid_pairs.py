"""The sigmoid loss of images and captions against its formula in numpy (float64), in chunks, and by
a ring over devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import parallel
from m3i_jax.objective import losses, sigmoid_pairs
from tests.objective import entropy_reference as reference
from tests.objective.numeric import mean, normal

SCALE, BIAS = 1.3, -2.0


@jax.jit
def of_all(u, v, log_scale, bias, where, group):
    return jax.value_and_grad(
        lambda *x: mean(sigmoid_pairs.text_sigmoid(*x, where, group_B=group)), (0, 1, 2, 3)
    )(u, v, log_scale, bias)


def inputs(rows=6):
    return normal(rows, 5), normal(rows, 5, seed=1), np.float32(SCALE), np.float32(BIAS)


@pytest.mark.parametrize("grouped", [False, True])
def test_value_and_gradients_are_those_of_numpy(grouped):
    group = np.array([0, 1, 1, 2, 1, 3]) if grouped else np.arange(6)
    value, grads = of_all(*inputs(), np.ones(6, np.float32), group)
    exact = [np.asarray(x, np.float64) for x in inputs()]
    f = lambda *x: reference.text_sigmoid(*x, group=group)
    np.testing.assert_allclose(value, f(*exact), rtol=1e-6)
    for grad, expected in zip(grads, reference.gradient(f, *exact), strict=True):
        np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5)


def test_pairs_of_weight_0_are_ignored():
    u, v, scale, bias = inputs()
    where = np.array([1, 0, 1, 1, 0, 1], np.float32)
    keep = where > 0
    ones = np.ones(4, np.float32)
    expected, kept = of_all(u[keep], v[keep], scale, bias, ones, np.arange(4))
    u[1], v[4] = np.nan, np.inf
    value, grads = of_all(u, v, scale, bias, where, np.arange(6))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for grad, same in zip(grads[:2], kept[:2], strict=True):
        np.testing.assert_allclose(grad[keep], same, rtol=1e-5, atol=1e-7)
        assert not np.asarray(grad)[~keep].any()
    np.testing.assert_allclose(grads[2:], kept[2:], rtol=1e-5)
    total, count = jax.jit(sigmoid_pairs.text_sigmoid)(u, v, scale, bias, np.zeros(6))
    assert (float(total), float(count)) == (0, 0)


@pytest.mark.parametrize("chunk", [1, 4, 6, 100])
def test_chunks_change_nothing(chunk):
    run = jax.jit(
        jax.value_and_grad(
            lambda *x: mean(sigmoid_pairs.text_sigmoid(*x, chunk=chunk)), (0, 1, 2, 3)
        )
    )
    expected = of_all(*inputs(), np.ones(6, np.float32), np.arange(6))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        run(*inputs()),
        expected,
    )


def test_the_softmax_cost_is_that_of_clip_in_one_direction():
    @jax.jit
    def both(u, v, scale, bias):
        _, count, nll = sigmoid_pairs.text_sigmoid_sums(u, v, scale, bias)
        return nll / count, mean(losses.boltzmann(u, v, jnp.arange(6), temperature=np.exp(-SCALE)))

    np.testing.assert_allclose(*both(*inputs()), rtol=1e-5)


def test_value_at_the_published_start():
    """Of unrelated embeddings: about 10 an image."""
    u, v = normal(12, 512), normal(12, 512, seed=1)
    value = jax.jit(lambda *x: mean(sigmoid_pairs.text_sigmoid(*x)))(u, v, np.log(10.0), -10.0)
    assert 9.3 < value < 10.7


def test_the_gradient_by_a_weight_is_the_cost_of_its_row():
    u, v, scale, bias = inputs()
    where = np.array([1, 2, 0, 1, 0.5, 1], np.float32)
    run = jax.jit(jax.grad(lambda w: sigmoid_pairs.text_sigmoid(u, v, scale, bias, w, chunk=4)[0]))
    keep = where > 0
    logits = np.exp(SCALE) * reference.unit(u) @ reference.unit(v).T + BIAS
    cost = np.log1p(np.exp(np.where(np.eye(6), -logits, logits)))[np.ix_(keep, keep)].sum(1)
    np.testing.assert_allclose(run(where)[keep], cost, rtol=1e-4)


def test_no_pair_at_all_is_no_loss():
    nothing = np.zeros((0, 4), np.float32)
    run = jax.jit(sigmoid_pairs.text_sigmoid_sums)
    assert [float(x) for x in run(nothing, nothing, 1.0, -1.0)] == [0, 0, 0]


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"axes are \('data',\), and the mesh .* has no 'data'"):
        sigmoid_pairs.text_sigmoid(normal(3, 4), normal(3, 4), 0.0, 0.0, axes=("data",))
    with pytest.raises(ValueError, match=r"image and text"):
        sigmoid_pairs.text_sigmoid(normal(3, 4), normal(2, 4), 0.0, 0.0)


def test_a_ring_over_devices_is_one_device():
    """To 1e-6, with every axis that splits rows; no device holds more than its own block of pairs,
    its memory does not depend on their number, and only captions with their gradients move."""
    rows_of_one, width = 32, 8

    def arrays(devices):
        rows = rows_of_one * devices
        group = np.random.default_rng(2).integers(0, rows, rows)
        where = (np.arange(rows) % 5 != 3).astype(np.float32)
        return (
            *(normal(rows, width), normal(rows, width, seed=1)),
            *(np.float32(SCALE), np.float32(BIAS), where, group),
        )

    def loss(axes, *x):
        total, count, nll = sigmoid_pairs.text_sigmoid_sums(*x[:5], group_B=x[5], axes=axes)
        return total / count, nll / count

    def compiled(mesh, axes, x):
        with jax.set_mesh(mesh):
            rows = parallel.data_sharding(mesh)
            placed = [
                jax.device_put(a, rows if np.ndim(a) else parallel.replicated(mesh)) for a in x
            ]
            run = jax.jit(jax.value_and_grad(lambda *x: loss(axes, *x), (0, 1, 2, 3), has_aux=True))
            made = run.lower(*placed).compile()
            return made, made(*placed)

    one = parallel.make_mesh((1, 1, 1), jax.devices()[:1])
    memory, sent = {}, {}
    for shape in ((2, 1, 1), (4, 1, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2)):
        devices = shape[0] * shape[1]
        count = devices * shape[2]
        mesh = parallel.make_mesh(shape, jax.devices()[:count])
        with jax.set_mesh(mesh):
            axes = parallel.split_axes(rows_of_one * devices)
        assert axes == tuple(a for a in ("replica", "fsdp") if mesh.shape[a] > 1)
        x = arrays(devices)
        program, ring = compiled(mesh, axes, x)
        _, expected = compiled(one, (), x)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), ring, expected
        )
        text = program.as_text()
        assert "all-gather" not in text and "all-to-all" not in text, shape
        if shape[1:] == (1, 1):
            memory[devices] = program.memory_analysis().temp_size_in_bytes
            shapes = re.findall(r"= \(?(\w+)\[([\d,]*)\][^=]* collective-permute", text)
            sent[devices] = sum(
                {"f32": 4, "s32": 4, "pred": 1}[kind]
                * int(np.prod([int(n) for n in size.split(",")]))
                for kind, size in shapes
            )
        # in each of as many steps as devices: captions, their numbers, weights, groups, gradients
        captions = rows_of_one * width * 4
        assert sent.get(devices, 0) in (0, 2 * captions + rows_of_one * (4 + 1 + 4)), sent
        largest = max(
            int(np.prod([int(n) for n in size.split(",")]))
            for size in re.findall(r"f32\[([\d,]+)\]", text)
        )
        assert largest <= max(rows_of_one**2, rows_of_one * width), (shape, largest)
    assert sent.keys() == memory.keys() and all(sent.values())
    assert max(memory.values()) <= 1.1 * min(memory.values()), memory


def test_scale_and_bias_are_one_number_each():
    """One number in an array, as modules keep it, had a value and no gradient."""
    u, v = normal(4, 3), normal(4, 3, seed=1)
    one = jax.jit(
        jax.value_and_grad(lambda s, b: sigmoid_pairs.text_sigmoid(u, v, s, b)[0], (0, 1))
    )
    value, grads = one(jnp.array([0.5]), jnp.array([[-2.0]]))
    wanted, wanted_grads = one(0.5, -2.0)
    assert value == wanted and [g.shape for g in grads] == [(1,), (1, 1)]
    assert [g.item() for g in grads] == [g.item() for g in wanted_grads]
    with pytest.raises(ValueError, match=r"bias has shape \[2\]; pass one number"):
        sigmoid_pairs.text_sigmoid(u, v, 0.5, jnp.zeros(2))

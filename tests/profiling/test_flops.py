"""Counts against hand counts, and against XLA where it counts right: programs without loops, on one
device."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from m3i_jax.profiling import flops
from m3i_jax.profiling.flops import FlopCount

A, B = jax.ShapeDtypeStruct((6, 5), jnp.float32), jax.ShapeDtypeStruct((5, 7), jnp.float32)
ONE = FlopCount(dot=2.0 * 6 * 5 * 7)


def xla(function, *arguments):
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


@pytest.mark.parametrize(
    "equation, left, right, macs",
    [
        ("ab,bc->ac", (6, 5), (5, 7), 6 * 5 * 7),
        ("bij,bjk->bik", (3, 6, 5), (3, 5, 7), 3 * 6 * 5 * 7),
        ("bnhd,bmhd->bhnm", (2, 9, 3, 4), (2, 8, 3, 4), 2 * 3 * 9 * 8 * 4),
        ("i,i->", (11,), (11,), 11),
    ],
)
def test_products(equation, left, right, macs):
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in (left, right)]
    function = functools.partial(jnp.einsum, equation)
    assert flops.count_flops(function, *shapes) == FlopCount(dot=2.0 * macs)
    assert xla(function, *shapes) == 2 * macs


CONVOLUTIONS = [
    # strides, padding, lhs dilation, rhs dilation, feature groups, batch groups; input NHWC, kernel
    # HWIO
    ((1, 1), "VALID", (1, 1), (1, 1), 1, 1, (2, 9, 8, 4), (3, 2, 4, 6)),
    ((1, 1), "SAME", (1, 1), (1, 1), 1, 1, (2, 9, 8, 4), (3, 3, 4, 6)),
    ((2, 3), ((2, 1), (0, 4)), (1, 1), (2, 1), 1, 1, (2, 9, 8, 4), (3, 3, 4, 6)),
    ((1, 1), ((2, 2), (2, 2)), (2, 3), (1, 1), 1, 1, (2, 5, 4, 4), (3, 3, 4, 6)),
    ((1, 1), "SAME", (1, 1), (1, 1), 4, 1, (2, 9, 8, 4), (5, 5, 1, 4)),
    ((1, 1), "VALID", (1, 1), (1, 1), 1, 2, (4, 9, 8, 3), (3, 2, 3, 6)),
    ((16, 16), "VALID", (1, 1), (1, 1), 1, 1, (2, 32, 32, 3), (16, 16, 3, 8)),
]


@pytest.mark.parametrize(
    "strides, padding, left_dilation, right_dilation, groups, batches, image, kernel", CONVOLUTIONS
)
def test_convolutions_equal_xla(
    strides, padding, left_dilation, right_dilation, groups, batches, image, kernel
):
    names = ("NHWC", "HWIO", "NHWC")

    def function(x, k):
        return jax.lax.conv_general_dilated(
            x, k, strides, padding, left_dilation, right_dilation, names, groups, batches
        )

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (image, kernel)]
    assert flops.count_flops(function, *shapes) == FlopCount(conv=xla(function, *shapes))


def test_convolutions_by_hand():
    def conv(x, k, groups=1, padding="VALID"):
        return jax.lax.conv_general_dilated(
            x,
            k,
            (1, 1),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    x = jnp.zeros((2, 10, 10, 4))
    assert flops.count_flops(conv, x, jnp.zeros((3, 3, 4, 6))).conv == 2 * 2 * 8 * 8 * 6 * 9 * 4
    depthwise = functools.partial(conv, groups=4)
    assert flops.count_flops(depthwise, x, jnp.zeros((5, 5, 1, 4))).conv == 2 * 2 * 6 * 6 * 4 * 25
    # "SAME": the border rows and columns see two of three taps.
    assert (
        flops.count_flops(functools.partial(conv, padding="SAME"), x, jnp.zeros((3, 3, 4, 6))).conv
        == 2 * 2 * 28 * 28 * 4 * 6
    )
    gradients = jax.grad(lambda x, k: (conv(x, k) ** 2).sum(), (0, 1))
    assert (
        flops.count_flops(gradients, x, jnp.zeros((3, 3, 4, 6))).conv
        == 3 * 2 * 2 * 8 * 8 * 6 * 9 * 4
    )


def mlp(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return (x**2).sum()


def test_backward_is_twice_the_forward_less_the_first_input():
    params, x = [jnp.zeros((8, 8))] * 3, jnp.zeros((4, 8))
    layer = 2.0 * 4 * 8 * 8
    assert flops.count_flops(mlp, params, x).dot == 3 * layer
    assert flops.count_flops(jax.grad(mlp), params, x).dot == (3 + 3 + 2) * layer
    assert flops.count_flops(jax.jit(jax.value_and_grad(mlp, (0, 1))), params, x).dot == 9 * layer


def test_close_to_xla_on_an_unrolled_network():
    params, x = (
        [jax.ShapeDtypeStruct((256, 256), jnp.float32)] * 3,
        jax.ShapeDtypeStruct((64, 256), jnp.float32),
    )
    assert flops.count_flops(jax.grad(mlp), params, x).dot == pytest.approx(
        xla(jax.grad(mlp), params, x), rel=0.01
    )


@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_counts_as_often_as_it_runs(remat):
    def body(x, w):
        return jnp.tanh(x @ w), None

    step = jax.checkpoint(body) if remat else body

    def scanned(stacked, x):
        return (jax.lax.scan(step, x, stacked)[0] ** 2).sum()

    stacked, x = jnp.zeros((5, 8, 8)), jnp.zeros((4, 8))
    layer = 2.0 * 4 * 8 * 8
    assert flops.count_flops(scanned, stacked, x).dot == 5 * layer
    # The gradient of x is carried from layer to layer: all three products in each, and a fourth
    # where the forward is repeated.
    assert flops.count_flops(jax.grad(scanned), stacked, x).dot == (3 + remat) * 5 * layer
    nested = jax.jit(
        lambda s, x: jax.lax.scan(lambda c, _: (c, scanned(s, x)), 0.0, None, length=3)
    )
    assert flops.count_flops(nested, stacked, x).dot == 15 * layer


def test_inside_calls_of_every_kind():
    @jax.custom_vjp
    def with_vjp(a, b):
        return a @ b

    with_vjp.defvjp(lambda a, b: (a @ b, (a, b)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))

    @jax.custom_jvp
    def with_jvp(a, b):
        return a @ b

    with_jvp.defjvp(
        lambda primals, tangents: (
            primals[0] @ primals[1],
            tangents[0] @ primals[1] + primals[0] @ tangents[1],
        )
    )
    for function in (
        with_vjp,
        with_jvp,
        jax.jit(with_vjp),
        jax.checkpoint(with_vjp),
        jax.jit(lambda a, b: with_jvp(a, b) + 1),
    ):
        assert flops.count_flops(function, A, B) == ONE
        assert (
            flops.count_flops(
                lambda a, b, f=function: jax.vjp(f, a, b)[1](jnp.zeros((6, 7))), A, B
            ).dot
            >= 2 * ONE.dot
        )
    assert flops.count_flops(
        jax.vmap(with_vjp), jnp.zeros((4, 6, 5)), jnp.zeros((4, 5, 7))
    ) == ONE.times(4)


def test_unused_ones_do_not_count():
    def wasteful(a, b):
        dead = jnp.sin(a @ b) @ b.T
        return a + 0 * a, dead.shape

    assert flops.count_flops(lambda a, b: wasteful(a, b)[0], A, B) == FlopCount()
    inner = jax.jit(lambda a, b: (a @ b, (2 * a) @ b))
    assert flops.count_flops(lambda a, b: inner(a, b)[0], A, B) == ONE


def test_a_condition_costs_its_dearest_branch():
    def function(p, a, b):
        return jax.lax.cond(p, lambda: a @ b, lambda: (a @ b @ b.T) @ b)

    assert flops.count_flops(function, True, A, B) == ONE.times(3)


def test_while_loops_are_refused_if_they_multiply_matrices():
    def loop(a, work):
        return jax.lax.while_loop(lambda c: c.sum() < 1, work, a)

    square = jnp.zeros((4, 4))
    assert flops.count_flops(functools.partial(loop, work=jnp.sin), square) == FlopCount()
    with pytest.raises(ValueError, match="while loop"):
        flops.count_flops(functools.partial(loop, work=lambda c: c @ c), square)

    def stated(a):
        with jax.named_scope("turns=3"):  # whoever wrote the loop says how often it turns
            return loop(a, lambda c: c @ c)

    assert flops.count_flops(stated, square) == FlopCount(dot=3 * 2 * 64.0)

    def carried(a):  # the product of a turn is wanted by the next, though not at the end
        with jax.named_scope("turns=3"):
            return jax.lax.while_loop(
                lambda c: c[1].sum() < 1, lambda c: (c[0] @ c[0], c[1] + c[0]), (a, a)
            )[1]

    assert flops.count_flops(carried, square) == FlopCount(dot=3 * 2 * 64.0)
    assert flops.count_flops(
        lambda a: jax.lax.fori_loop(0, 6, lambda _, c: c @ c, a), square
    ) == FlopCount(dot=6 * 2 * 64.0)
    assert (
        flops.count_flops(lambda key: jax.random.normal(key, (3,)), jax.random.key(0))
        == FlopCount()
    )


def test_a_share_of_a_device_counts_for_all_of_them():
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    a, b = jnp.zeros((8, 5)), jnp.zeros((5, 6))
    whole = FlopCount(dot=2.0 * 8 * 5 * 6)
    both = jax.shard_map(
        jnp.matmul,
        mesh=mesh,
        in_specs=(P("data"), P(None, "tensor")),
        out_specs=P("data", "tensor"),
    )
    assert flops.count_flops(both, a, b) == whole
    part = jax.shard_map(
        jnp.matmul, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), axis_names={"data"}
    )
    assert flops.count_flops(jax.jit(part), a, b) == whole
    placed = jax.device_put(a, NamedSharding(mesh, P("data")))
    assert flops.count_flops(jnp.matmul, placed, b) == whole


@pytest.mark.parametrize("estimate", (None, 99))
def test_a_kernel_counts_what_it_says_or_once_a_cell_of_its_grid(estimate):
    def kernel(a, b, out):
        out[...] = a[...] @ b[...]

    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((8, 7), jnp.float32),
        grid=(4,),
        in_specs=[pl.BlockSpec((2, 5), lambda i: (i, 0)), pl.BlockSpec((5, 7), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((2, 7), lambda i: (i, 0)),
        cost_estimate=estimate
        and pl.CostEstimate(flops=estimate, transcendentals=0, bytes_accessed=0),
    )
    assert flops.count_flops(call, jnp.zeros((8, 5)), jnp.zeros((5, 7))) == FlopCount(
        dot=estimate or 2.0 * 8 * 5 * 7
    )
    twice = lambda a, b: jax.lax.map(lambda _: call(a, b), jnp.arange(2)).sum() + (a @ b).sum()
    assert flops.kernel_flops(twice, jnp.zeros((8, 5)), jnp.zeros((5, 7))) == 2 * (estimate or 0)


def test_humanize_and_sums():
    assert [flops.format_flops(x) for x in (0, 999, 1e3, 12345, 2.795e11, 6.2e22, 3e25)] == [
        "0 FLOP",
        "999 FLOP",
        "1 kFLOP",
        "12.35 kFLOP",
        "279.5 GFLOP",
        "6.2e+04 EFLOP",
        "3e+07 EFLOP",
    ]
    assert (
        FlopCount(1, 2) + FlopCount(3, 4) == FlopCount(4, 6) and FlopCount(1, 2).times(3).total == 9
    )

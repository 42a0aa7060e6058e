"""The estimated memory traffic of a traced program against what its operations must move."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from m3i_jax import parallel
from m3i_jax.models import attention
from m3i_jax.parallel.chips import CHIPS
from m3i_jax.profiling import traffic_model

N = 256
ARRAY = jax.ShapeDtypeStruct((N, N), jnp.float32)
ONE = 4 * N * N  # bytes


def arrays(function, *more, platform="tpu"):
    """Estimated traffic in arrays."""
    return traffic_model.estimate_traffic(function, ARRAY, *more, platform=platform) / ONE


def scanned(x):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, None, length=5)[0]


@pytest.mark.parametrize(
    ("function", "expected"),
    (
        (lambda x: x + 1, 2),
        (lambda x: jnp.sin(x).reshape(-1) * 2, 2),
        (lambda x: jnp.tanh(x) @ x, 2 + 3),
        (lambda x: (jnp.tanh(x), jnp.sin(x)), 3),  # a pass with two results
        (lambda x: x.sum(), 1),
        (lambda x: x - x.max(1, keepdims=True), 1 + 2),  # the reduction first
        (lambda x: jax.nn.relu(x @ x) @ x, 2 + 2 + 3),  # a square reads its array once
        (scanned, 5 * (2 + 2)),
        (lambda x: x[:-1] + x[1:], 2),  # parts of an array that is read once
        (lambda x: jax.lax.dynamic_update_slice(x, x[:128], (0, 0)), 1),  # half, read and written
        (lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x + 1, x), 2),
    ),
    ids=range(11),
)
def test_passes_products_and_loops(function, expected):
    assert arrays(function) == pytest.approx(expected, rel=0.05)


def test_the_form_of_the_platform_counts():
    def run(x):
        forms = {"tpu": lambda x: x + 1, "default": lambda x: (x + 1) @ x}
        return jax.lax.platform_dependent(x, **forms)

    assert arrays(run) == 2 and arrays(run, platform="cuda") == 2 + 3
    assert parallel.platform() == jax.default_backend()


def test_what_a_tpu_computes_of_a_chunk_in_a_loop_within_a_loop_stays_near():
    def chunks(x):
        some = lambda c: jnp.tanh(c @ x) @ x
        turn = lambda y, _: (jax.lax.map(some, y), None)
        return jax.lax.scan(turn, x.reshape(4, N // 4, N), None, length=3)[0]

    # of each chunk the factor, and its rows twice; else two products and a pass between
    assert arrays(chunks) == 3 * 4 * (1 + 2 / 4)
    assert arrays(chunks, platform="cuda") == 3 * 4 * (2 * (1 + 2 / 4) + 2 / 4)


def test_attention_is_the_kernel_s():
    qkv = jax.ShapeDtypeStruct((32, 200, 3 * 128), jnp.bfloat16)
    size = qkv.size * 2

    def run(x):
        if attention.attention_kernel_fits(2, (x,)):
            return attention.attend_columns(2, (x,), None)
        return attention.attend_plainly(2, (x,), None)

    moved = {
        platform: traffic_model.estimate_traffic(run, qkv, platform=platform) / size
        for platform in ("tpu", "cuda", "cpu")
    }
    assert moved["tpu"] == pytest.approx(4 / 3, rel=0.01)
    assert moved["cuda"] == pytest.approx(4 / 3, rel=0.02)
    assert moved["cpu"] > 5


def days(kind: str, chips: int, **changes: Any) -> dict[str, float]:
    run = {
        "flops": 1e15, "traffic": traffic_model.StepTraffic(0.0, 4e9, 1e9), "state": 2e9,
        "params": 10**8, "images": 1024, "steps": 86_400, "mfu": 0.5,
    }  # fmt: skip
    return traffic_model.chip_days(kind=kind, chips=chips, **{**run, **changes})  # type: ignore[arg-type]


def test_every_device_makes_the_update_of_a_state_that_it_has() -> None:
    """Muon's products, 1e14 of 1e15 FLOPs: of 16 chips each has 1/16 of the rest. A state of 16 GB
    is split over all."""
    peak = CHIPS["v5e"].peak * 0.5
    of_chip = 9e14 / 16 + 1e14
    assert days("v5e", 16, update_flops=1e14)["FLOPs"] == pytest.approx(of_chip / peak)
    sharded = days("v5e", 16, update_flops=1e14, state=16e9)["FLOPs"]
    assert sharded == pytest.approx(1e15 / 16 / peak) == days("v5e", 16)["FLOPs"]


def test_both_devices_of_a_chip_have_the_state() -> None:
    """Two JAX devices of a TPU7x, of 94.75 GiB each: 4 GB of updates and 1 GB of weights, twice.
    Three times 40 GiB fit the chip, and no device of it."""
    bandwidth = CHIPS["tpu7x"].bandwidth
    assert days("tpu7x", 64)["memory"] == pytest.approx(10e9 / bandwidth)
    sharded = days("tpu7x", 64, state=40 * 2**30)["memory"]
    assert sharded == pytest.approx((4e9 / 64 + 2e9) / bandwidth)


def test_float32_is_half_as_fast_on_a_gpu() -> None:
    for kind, factor in (("h100", 2), ("v5e", 1)):
        plain, whole = (days(kind, 8, dtype=dtype)["FLOPs"] for dtype in ("bfloat16", "float32"))
        assert whole == pytest.approx(factor * plain)


def test_rows_say_where_a_batch_cannot_be_split() -> None:
    run = {
        "flops": 1e15, "state": 2e9, "params": 10**8, "images": 64, "steps": 10, "mfu": 0.5,
        "traffic": dict.fromkeys(("tpu", "cuda"), traffic_model.StepTraffic(1.0, 1.0, 1.0)),
    }  # fmt: skip
    slices = [("a", "v5e", 16), ("b", "tpu7x", 16)]  # of which b has 32 devices
    rows = traffic_model.bound_rows(slices, lambda devices: devices <= 16, **run)
    assert [row[-1] for row in rows] == ["FLOPs", "FLOPs; batch does not divide"]


@pytest.mark.parametrize(("chips", "seconds"), [(8, 0.0233333), (16, 0.025), (64, 0.035)])
def test_a_host_takes_in_what_other_hosts_have_once(chips: int, seconds: float) -> None:
    """A gradient of 4 GB over hosts of 8 A100s: 300 GB/s inside of one, 25 GB/s a GPU between them.
    All-reduced by a ring, 8 GB (1 - 1 / chips) come over the links of each GPU, and in two levels
    8 GB (1 - 1 / hosts) over the eight adapters of a host; `compile_report` counts the same."""
    no_traffic = traffic_model.StepTraffic(1.0, 1.0, 0.0)
    days = traffic_model.chip_days(
        flops=1.0, traffic=no_traffic, state=1.0, params=10**9, images=64,
        steps=86_400, kind="a100", chips=chips, mfu=0.5,
    )  # fmt: skip
    assert days["network"] == pytest.approx(seconds, rel=1e-4)

"""Attention on maps, block by block: relative positions against loops in numpy, windows, the order
of the blocks, and what a scan, a recomputation and pieces of a batch must not change."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import parallel
from m3i_jax.models import attention, initializers, layers, map_blocks, relative_bias
from tests.models.test_layers import close, jit, normal

BLOCK = layers.block(16, 2, 2.0, "float32")
GRID, WINDOW, DEPTH = (3, 5), 2, 5
WINDOWS = [WINDOW, 0] * 2 + [0]


@functools.cache
def tower() -> tuple[Any, Any]:
    shapes = jax.eval_shape(
        lambda key: initializers.init_blocks(BLOCK, key, width=16, depth=DEPTH), jax.random.key(0)
    )
    stacked = jax.tree.map(lambda s: 0.3 * normal(s.size, *s.shape), shapes)
    gammas = {f"gamma{n}": 1 + 0.3 * normal(n, DEPTH, 16) for n in (1, 2)}
    relative = {
        f"block{i}": {
            "rows": normal(2 * i, 2 * (window or 4) - 1, 8),
            "columns": normal(2 * i + 1, 2 * (window or 4) - 1, 8),
        }
        for i, window in enumerate(WINDOWS)
    }
    return {**stacked, **gammas}, relative


X = normal(50, 4, 15, 16)
KEEP = jnp.asarray(np.random.default_rng(3).choice([0.0, 1.25], (4, DEPTH, 2)), jnp.float32)


def value_and_gradients(ends: tuple[int, ...] = (3, 4), **settings: Any) -> Any:
    def weighted(stacked: Any, relative: Any, x: Any) -> tuple[jax.Array, Any]:
        outputs = map_blocks.run_map_blocks(
            map_blocks.MapBlock(block=BLOCK, grid=GRID),
            stacked, relative, x, windows=WINDOWS, ends=ends, keep_BxLx2=KEEP, **settings,
        )  # fmt: skip
        return sum((y * normal(9 + i, *y.shape)).sum() for i, y in enumerate(outputs)), outputs

    return jit(jax.value_and_grad(weighted, (0, 1, 2), has_aux=True))(*tower(), X)


@functools.cache
def in_a_loop() -> Any:
    return value_and_gradients()


@pytest.mark.parametrize(
    "scan,remat",
    [(True, "none"), pytest.param(False, "names", marks=pytest.mark.slow), (True, "full")],
)
def test_scan_and_remat_change_no_number_and_no_gradient(scan: bool, remat: str) -> None:
    close(value_and_gradients(scan=scan, remat=remat), in_a_loop(), 1e-4)


def test_pieces_change_no_number_and_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_blocks, "_TOKENS", 30)  # two images at once
    close(value_and_gradients(scan=True, remat="half"), in_a_loop(), 1e-4)


@pytest.mark.parametrize("shape", [pytest.param((2, 1, 1), marks=pytest.mark.slow), (1, 2, 1)])
def test_devices_change_no_number_and_no_gradient(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As replicas, and with the weights of a block gathered by every device."""
    monkeypatch.setattr(parallel.sharding, "SMALL", 256)
    gathered = []
    with_gather = parallel.with_fsdp_gather

    def watched(run: Any, *arguments: Any, **settings: Any) -> Any:
        def once(gather: Any, *arrays: Any) -> Any:
            gathered.append(isinstance(gather, functools.partial))
            return run(gather, *arrays)

        return with_gather(once, *arguments, **settings)

    monkeypatch.setattr(parallel, "with_fsdp_gather", watched)
    mesh = parallel.make_mesh(shape, jax.devices()[:2])
    with jax.set_mesh(mesh):
        close(value_and_gradients(scan=True, remat="full"), in_a_loop(), 1e-4)
    assert gathered[0] == (shape[1] == 2)


def test_no_keep_factor_leaves_the_input() -> None:
    call = functools.partial(
        map_blocks.run_map_blocks, map_blocks.MapBlock(block=BLOCK, grid=GRID),
        *tower(), X, windows=WINDOWS, ends=(4,),
    )  # fmt: skip
    (y,) = jit(lambda keep: call(keep_BxLx2=keep))(jnp.zeros((4, DEPTH, 2)))
    np.testing.assert_array_equal(y, X)
    with pytest.raises(ValueError, match=r"\(4, 2, 2\).*\(4, 5, 2\)"):
        call(keep_BxLx2=jnp.ones((4, 2, 2)))


def test_padding_is_a_key_and_no_output() -> None:
    """A window that is partly outside: as one of a larger map whose normalised cells there are
    zeros. A norm of scale 0 makes every cell such a zero, so all are equal keys."""
    stacked, relative = tower()
    first = jax.tree.map(lambda leaf: leaf[0], stacked)
    first |= {"relative": relative["block0"]}
    call = lambda grid, params, x: map_blocks.MapBlock(block=BLOCK, grid=grid)(
        params, x, None, WINDOW
    )
    x = X.reshape(4, 3, 5, 16)
    padded = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    # zeros stay zeros in this norm; the bias is what `to_windows` must not add to the padding
    unbiased = {**first, "norm1": {**first["norm1"], "bias": jnp.zeros(16)}}
    small = jit(functools.partial(call, (3, 5)))(unbiased, X)
    large = jit(functools.partial(call, (4, 6)))(unbiased, padded.reshape(4, 24, 16))
    close(small.reshape(4, 3, 5, 16), large.reshape(4, 4, 6, 16)[:, :3, :5], 1e-5)
    biased = jit(functools.partial(call, (3, 5)))(first, X)
    large = jit(functools.partial(call, (4, 6)))(first, padded.reshape(4, 24, 16))
    inside = np.abs(biased.reshape(4, 3, 5, 16) - large.reshape(4, 4, 6, 16)[:, :3, :5]).max((0, 3))
    assert (inside[:2, :4] < 1e-5).all() and (inside[2] > 1e-3).all()


@pytest.mark.parametrize(
    "windows,ends",
    [
        ([7, 7, 0] * 4, [11]),
        ([7] * 5 + [0] + [7] * 5 + [0], [11]),
        ([0] * 12, [3, 5, 7, 11]),
        ([7, 0, 0, 7, 7, 0, 7], [2, 6]),
        ([7, 7, 0] * 4, [1, 4]),
    ],
)
def test_the_order_of_blocks(windows: list[int], ends: list[int]) -> None:
    for scan in (False, True):
        found = map_blocks.stretches(windows, ends, scan=scan)
        order = [
            window
            for stretch in found
            for _ in range(stretch.repeats)
            for window, count in stretch.runs
            for _ in range(count)
        ]
        assert order == windows[: ends[-1] + 1]
        stops = itertools.accumulate(stretch.repeats * stretch.period for stretch in found)
        assert [stop - 1 for stop in stops] == ends


@pytest.mark.parametrize("of_a_unit", [2, 7])
def test_a_regular_pattern_is_one_window_block_and_one_global_block(of_a_unit: int) -> None:
    """ViTDet's B and H: what is compiled does not depend on the depth."""
    (stretch,) = map_blocks.stretches(([14] * of_a_unit + [0]) * 4, [4 * of_a_unit + 3], scan=True)
    assert stretch.repeats == 4 and stretch.runs == ((14, of_a_unit), (0, 1))


# ---- relative positions ----


@pytest.mark.parametrize("e", [8, 4])
def test_rows_and_columns_against_loops(e: int) -> None:
    """As longer queries and keys where a head is wider than rows and columns together, else added
    to the logits."""
    n, m = 3, 4
    q, k, v = (np.asarray(normal(i, 2, 2, n * m, e), np.float64) for i in range(3))
    tables = {"rows": normal(3, 2 * n - 1, e), "columns": normal(4, 2 * m - 1, e)}
    rows, columns = (np.asarray(tables[name], np.float64) for name in ("rows", "columns"))
    logits = q @ k.swapaxes(2, 3) / np.sqrt(e)
    cells = list(itertools.product(range(n), range(m)))
    for (i, (y, x)), (j, (a, b)) in itertools.product(enumerate(cells), enumerate(cells)):
        logits[:, :, i, j] += q[:, :, i] @ (rows[y - a + n - 1] + columns[x - b + m - 1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    wanted = weights / weights.sum(-1, keepdims=True) @ v

    def got(q: Any, k: Any, v: Any) -> jax.Array:
        relative = relative_bias.relative_positions_of(tables, (n, m), cls=False)
        assert relative is not None
        q, k, bias = relative(q, k)
        assert bool(bias) == (e < n + m) and (q.shape[-1] > e) == (e >= n + m)
        return attention.attend(q, k, v, None, bias, e**-0.5)

    close(jit(got)(*map(jnp.float32, (q, k, v))), wanted, 1e-5)


@pytest.mark.parametrize("cls", [False, True])
@pytest.mark.parametrize("grid", [(3, 3), (2, 5)])
def test_a_bias_table_is_read_by_the_offset_of_the_query(grid: tuple[int, int], cls: bool) -> None:
    """And of another map it is resized, row offsets and column offsets by themselves."""
    side, (n, m) = 3, grid
    table = normal(1, (2 * side - 1) ** 2 + 3 * cls, 4)
    old = np.asarray(table[:25], np.float64).reshape(5, 5, 4)
    at = [np.clip((np.arange(2 * s - 1) + 0.5) * 5 / (2 * s - 1) - 0.5, 0, 4) for s in grid]
    resized = np.apply_along_axis(lambda line: np.interp(at[0], np.arange(5), line), 0, old)
    resized = np.apply_along_axis(lambda line: np.interp(at[1], np.arange(5), line), 1, resized)
    wanted = np.zeros((4, n * m + cls, n * m + cls))
    cells = list(itertools.product(range(n), range(m)))
    for i, (y, x) in enumerate(cells):
        for j, (a, b) in enumerate(cells):
            wanted[:, i + cls, j + cls] = resized[y - a + n - 1, x - b + m - 1]
    if cls:
        wanted[:, 0, 1:], wanted[:, 1:, 0] = table[-3][:, None], table[-2][:, None]
        wanted[:, 0, 0] = table[-1]
    relative = relative_bias.relative_positions_of({"table": table}, grid, cls=cls)
    assert relative is not None
    _, _, (got,) = relative(*jnp.zeros((2, 1, 4, n * m + cls, 8)))
    close(got[0, ..., 0], wanted, 1e-5)


def test_a_table_with_a_wrong_number_of_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(28, 4\).*cls=False"):
        relative_bias.relative_positions_of({"table": jnp.zeros((28, 4))}, (3, 3), cls=False)


def test_gradients_of_a_bias_are_those_of_autodiff() -> None:
    """`attend` sums the gradients of the logits; the same function written plainly."""
    q, k, v = (normal(i, 2, 2, 6, 4) for i in range(3))
    parts = normal(3, 2, 2, 6, 2, 1), normal(4, 1, 2, 6, 1, 3), normal(5, 1, 2, 1, 2, 3)

    def plain(q: Any, k: Any, v: Any, parts: Any) -> jax.Array:
        logits = jnp.einsum("bhqe,bhte->bhqt", q, k) / 2
        total = logits.reshape(2, 2, 6, 2, 3) + parts[0] + parts[1] + parts[2]
        return jnp.einsum("bhqt,bhte->bhqe", jax.nn.softmax(total.reshape(2, 2, 6, 6)), v)

    noise = normal(6, 2, 2, 6, 4)
    gradients = [
        jit(jax.grad(lambda *a, f=f: (f(*a) * noise).sum(), (0, 1, 2, 3)))(q, k, v, parts)
        for f in (plain, lambda q, k, v, parts: attention.attend(q, k, v, None, parts))
    ]
    close(gradients[0], gradients[1], 1e-5)

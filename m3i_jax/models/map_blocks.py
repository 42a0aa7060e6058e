"""Transformer blocks on maps: attention in windows or of the whole map, relative positions and
layer scale (ViTDet; BEiT as in mmsegmentation); and their runner, which returns the outputs of
several blocks.

Where the kinds of the blocks repeat, such as two with windows and one without, one repetition is
the body of a `lax.scan`, and equal blocks in a row inside it are a scan of their own: compile time
does not grow with depth.

B images, n m cells a side of a map, T = n m tokens, plus one for cls, D width, L blocks, W windows
of w w cells, P chunks.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from m3i_jax import parallel
from m3i_jax.models import relative_bias
from m3i_jax.models.layers import Block, Params, add_branch, block_parts
from m3i_jax.models.rope import Rotation, axial_rotation
from m3i_jax.models.scan_blocks import (
    chunk_count,
    deal_rows,
    join_rows,
    split_blocks,
    with_remat,
)

_TOKENS = 4096  # of a chunk: a map of ViTDet; its attention is most of what a block recomputes


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapBlock:
    """Settings that all blocks of a tower on a map share.

    Attributes:
      block: heads, width of the MLP, precision, norm and activation.
      grid: rows and columns of the map.
      cls: whether a cls token comes first; not with windows.
      registers: tokens between cls and the map; not with windows or relative positions.
    """

    block: Block
    grid: tuple[int, int]
    cls: bool = False
    registers: int = 0

    def __call__(
        self, params: Params, x_BxTxD: jax.Array, keep_Bx2: jax.Array | None, window: int
    ) -> jax.Array:
        """Output of one block, `x += keep gamma1 Attention(norm(x))`, then with the MLP and gamma2.

        Args:
          params: of a `layers.Block`; `relative` {name: table}, and gamma1, gamma2 [D] if there is
            layer scale.
          x_BxTxD: the residual stream.
          keep_Bx2: stochastic depth as factors of the two branches; None: 1.
          window: side of the windows of attention in cells; 0: the whole map.
        """
        norm_module, attention, mlp = block_parts(self.block)

        def norm(n: int, x_BxTxD: jax.Array) -> jax.Array:
            return norm_module().apply({"params": params[f"norm{n}"]}, x_BxTxD)

        def add(n: int, x_BxTxD: jax.Array, branch_BxTxD: jax.Array) -> jax.Array:
            keep_B = None if keep_Bx2 is None else keep_Bx2[:, n - 1]
            return add_branch(x_BxTxD, branch_BxTxD, keep_B, params.get(f"gamma{n}"))

        h_WxTxD = norm(1, x_BxTxD)
        if window:
            h_WxTxD = to_windows(h_WxTxD, self.grid, window)
        sides = (window, window) if window else self.grid
        relative = relative_bias.relative_positions_of(
            params.get("relative", {}), sides, cls=self.cls
        )
        h_WxTxD = attention().apply(
            {"params": params["attention"]},
            h_WxTxD,
            None,
            None,
            relative=relative,
            rotation=self._rotation(x_BxTxD, window),
        )
        h_BxTxD = from_windows(h_WxTxD, self.grid, window) if window else h_WxTxD
        x_BxTxD = checkpoint_name(add(1, x_BxTxD, h_BxTxD), "middle")
        return add(2, x_BxTxD, mlp().apply({"params": params["mlp"]}, norm(2, x_BxTxD)))

    def _rotation(self, x_BxTxD: jax.Array, window: int) -> Rotation | None:
        """Rotary positions, of cells in the whole map, also within its windows."""
        one, (images, _, width) = self.block, x_BxTxD.shape
        if not one.rope:
            return None
        prefix = int(self.cls) + self.registers
        rotation = axial_rotation(self.grid, width // one.heads, one.rope, prefix=prefix)
        if not window:
            return rotation

        def windows(part: Any) -> jax.Array:
            own = to_windows(jnp.asarray(part), self.grid, window)
            return jnp.broadcast_to(own, (images, *own.shape)).reshape(-1, *own.shape[1:])

        return windows(rotation[0]), windows(rotation[1])


def to_windows(x_BxTxD: jax.Array, grid: tuple[int, int], window: int) -> jax.Array:
    """Returns a map of n x m cells as windows, row by row: [B W, w w, D]. What is missing to whole
    windows is zeros at the bottom and at the right.

    >>> to_windows(jnp.arange(1, 7).reshape(1, 6, 1), (2, 3), 2)[..., 0].tolist()
    [[1, 2, 4, 5], [3, 0, 6, 0]]
    """
    (n, m), (b, _, d) = grid, x_BxTxD.shape
    down, across = -(-n // window), -(-m // window)
    padding = ((0, 0), (0, down * window - n), (0, across * window - m), (0, 0))
    padded = jnp.pad(x_BxTxD.reshape(b, n, m, d), padding)
    split = padded.reshape(b, down, window, across, window, d)
    return split.swapaxes(2, 3).reshape(-1, window * window, d)


def from_windows(x_WxTxD: jax.Array, grid: tuple[int, int], window: int) -> jax.Array:
    """Inverts `to_windows`, without the padding: [B, n m, D].

    >>> x = jnp.arange(6).reshape(1, 6, 1)
    >>> from_windows(to_windows(x, (2, 3), 2), (2, 3), 2)[0, :, 0].tolist()
    [0, 1, 2, 3, 4, 5]
    """
    (n, m), d = grid, x_WxTxD.shape[-1]
    down, across = -(-n // window), -(-m // window)
    split = x_WxTxD.reshape(-1, down, across, window, window, d).swapaxes(2, 3)
    return split.reshape(-1, down * window, across * window, d)[:, :n, :m].reshape(-1, n * m, d)


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Consecutive blocks up to one whose output is wanted.

    Attributes:
      start: number of the first block.
      repeats: how often the runs follow each other.
      runs: (window, number of blocks) of the blocks with equal windows in a row.
    """

    start: int
    repeats: int
    runs: tuple[tuple[int, int], ...]

    @property
    def period(self) -> int:
        return sum(count for _, count in self.runs)


def stretches(windows: Sequence[int], ends: Sequence[int], *, scan: bool) -> list[Stretch]:
    """Returns how blocks are run: up to each block whose output is wanted.

    Args:
      windows: side of the windows of every block, 0 for the whole map.
      ends: numbers of the blocks whose outputs are wanted, rising.
      scan: whether to find repetitions, the fewest runs.

    >>> stretches([7, 7, 0] * 4, [11], scan=True)
    [Stretch(start=0, repeats=4, runs=((7, 2), (0, 1)))]
    >>> [stretch.runs for stretch in stretches([0] * 5, [1, 3], scan=True)]
    [((0, 2),), ((0, 2),)]
    """
    out, start = [], 0
    for end in ends:
        part = list(windows[start : end + 1])
        found = Stretch(start, 1, tuple((window, 1) for window in part))
        for period in range(len(part), 0, -1) if scan else ():
            repeats = len(part) // period
            runs = tuple(
                (window, len(list(same))) for window, same in itertools.groupby(part[:period])
            )
            if part[:period] * repeats == part and (
                period == len(part) or len(runs) < len(found.runs)
            ):
                found = Stretch(start, repeats, runs)
        out.append(found)
        start = end + 1
    return out


def run_map_blocks(
    one: MapBlock,
    stacked: Params,
    relative: Params,
    x_BxTxD: jax.Array,
    *,
    windows: Sequence[int],
    ends: Sequence[int],
    keep_BxLx2: jax.Array | None = None,
    scan: bool = False,
    remat: str = "none",
    keep_gathered: bool = False,
) -> tuple[jax.Array, ...]:
    """Runs stacked blocks one after the other; the outputs [B, T, D] of the blocks `ends`.

    Args:
      one: what the blocks have in common.
      stacked: parameters with a leading axis [L, ...], as of `MapBlock`, without `relative`.
      relative: {"block0": {name: table}, ...}; {}: no relative positions. Tables of blocks with
        equal windows have equal shapes.
      x_BxTxD: the residual stream.
      windows: side of the windows of every block, 0 for the whole map.
      ends: numbers of the blocks whose outputs are wanted, rising. Later blocks are not run.
      keep_BxLx2, scan, remat, keep_gathered: as of `scan_blocks.run_blocks`.

    Raises:
      ValueError: keep factors that are not [B, L, 2].
    """
    shape = (x_BxTxD.shape[0], len(windows), 2)
    if keep_BxLx2 is not None and keep_BxLx2.shape != shape:
        raise ValueError(
            f"keep factors have shape {keep_BxLx2.shape}; they must be {shape}: [B, L, 2]"
        )
    settings: dict[str, Any] = {"remat": remat, "scan": scan, "keep_gathered": keep_gathered}

    def run(
        gather: Callable[[Any], Any], params: Any, x: jax.Array, keep_LxBx2: Any, _: Any
    ) -> Any:
        tables = params["relative"]
        rows, tokens = parallel.rows_of_device(x.shape[0]), x.shape[1]
        count = 1 if remat == "none" else chunk_count(rows, _TOKENS / tokens)
        x = deal_rows(x, count)

        def stepper(window: int) -> Any:
            def step(x: jax.Array, layer: Any) -> jax.Array:
                own, keep_Bx2, table = layer
                own = {**gather({"blocks": own, "relative": tables})["blocks"], "relative": table}
                if count == 1:
                    return one(own, x, keep_Bx2, window)
                # as in `run_blocks`: the gradients of the chunks are added in float32
                own = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), own)
                chunk = with_remat(lambda x, keep: one(own, x, keep, window), remat, scan=True)
                return jax.lax.map(lambda part: chunk(*part), (x, keep_Bx2))

            return with_remat(step, **settings)

        plan = stretches(windows, ends, scan=scan)
        sizes = [stretch.repeats * stretch.period for stretch in plan]
        if rest := len(windows) - sum(sizes):
            sizes.append(rest)
        layers = split_blocks((params["blocks"], deal_rows(keep_LxBx2, count, 1)), sizes)
        outputs = []
        for stretch, own in zip(plan, layers, strict=False):
            parts = _runs_of(stretch, own, tables)
            x = _run_stretch(stretch, stepper, parts, x, scan=scan)
            outputs.append(join_rows(x, count))
        return tuple(outputs)

    keep_LxBx2 = None if keep_BxLx2 is None else keep_BxLx2.swapaxes(0, 1)
    gathered: Any = parallel.with_fsdp_gather(
        run,
        {"blocks": stacked, "relative": relative},
        x_BxTxD,
        keep_LxBx2,
        dtype=one.block.dtype,
        stacked=True,
    )
    return gathered


def _runs_of(stretch: Stretch, layers: Any, tables: Params) -> list[Any]:
    """(blocks, keep factors, tables) [repeats, count, ...] of every run, of those of the stretch,
    [repeats * period, ...]."""
    counts = [count for _, count in stretch.runs]
    leaves, structure = jax.tree.flatten(layers)
    folded = [leaf.reshape(stretch.repeats, stretch.period, *leaf.shape[1:]) for leaf in leaves]
    parts: list[Any] = []
    first = stretch.start
    for run in zip(*(jax.lax.split(leaf, counts, 1) for leaf in folded), strict=True):
        count = counts[len(parts)]
        own = [
            tables.get(f"block{first + repeat * stretch.period + i}", {})
            for repeat in range(stretch.repeats)
            for i in range(count)
        ]
        stacked = {
            name: jnp.stack([table[name] for table in own]).reshape(
                stretch.repeats, count, *own[0][name].shape
            )
            for name in own[0]
        }
        parts.append((*jax.tree.unflatten(structure, run), stacked))
        first += count
    return parts


def _run_stretch(
    stretch: Stretch, stepper: Callable[[int], Any], parts: list[Any], x: jax.Array, *, scan: bool
) -> jax.Array:
    def repetition(x: jax.Array, parts: list[Any]) -> jax.Array:
        for (window, count), layers in zip(stretch.runs, parts, strict=True):
            x = _run_layers(stepper(window), x, layers, count, scan=scan)
        return x

    return _run_layers(repetition, x, parts, stretch.repeats, scan=scan)


def _run_layers(step: Any, x: jax.Array, layers: Any, count: int, *, scan: bool) -> jax.Array:
    if scan and count > 1:
        return jax.lax.scan(lambda x, layer: (step(x, layer), None), x, layers)[0]
    for layer in split_blocks(layers, [1] * count):
        x = step(x, jax.tree.map(lambda leaf: leaf[0], layer))
    return x

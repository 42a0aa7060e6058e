"""DCNv3: time and bytes of method `auto` over the packed gather, at the four maps of InternImage-H
at 192 pixels.

    python -m tests.bench.dcnv3        # time on this machine
    python -m tests.bench.dcnv3 sizes  # every method by map size, the basis of `dcnv3.choose`
    python -m tests.bench.dcnv3 bytes  # bytes accessed on one TPU v5e chip; needs libtpu, no TPU
    python -m tests.bench.dcnv3 large  # traffic of a layer at 1,216 x 2,016 pixels on it; minutes

Times are the least of several alternating runs of forward and all gradients, with offsets drawn
from N(0, spread^2) pixels. The mean of the ratios is weighted by the number of layers per stage.
The bytes of a kernel are those that it reads and writes, as XLA counts a custom call.
"""

import importlib.util
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax.models import dcnv3
from m3i_jax.reporting import text_table
from tests.bench.figures import Figure

DEPTHS, SIDES, GROUPS, WIDTH = (6, 6, 32, 6), (48, 24, 12, 6), (10, 20, 40, 80), 32
BATCHES = (1, 2, 4, 4)


def inputs(
    batch: int, side: int, groups: int, *, width: int = WIDTH, spread: float = 1.0
) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    where = batch, side, side, groups
    x, ct = (
        rng.normal(size=(batch, side, side, groups * width)).astype(np.float32) for _ in range(2)
    )
    offset = spread * rng.normal(size=(*where, 9, 2)).astype(np.float32)
    return [x, offset, rng.dirichlet(np.ones(9), size=where).astype(np.float32), ct]


def both(method: str, groups: int):
    """Forward and all gradients."""

    def run(x, offset, mask, ct):
        y, back = jax.vjp(lambda *a: dcnv3.dcnv3(*a, groups=groups, method=method), x, offset, mask)
        return y, back(ct)

    return jax.jit(run)


def milliseconds(programs: dict, arrays: list, runs: int) -> dict[str, float]:
    """The least time of each program; the programs run in turns."""
    compiled = {name: program.lower(*arrays).compile() for name, program in programs.items()}
    arrays = [jnp.asarray(a) for a in arrays]
    least = dict.fromkeys(compiled, float("inf"))
    for turn in range(runs + 1):
        for name, program in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arrays))
            if turn:
                least[name] = min(least[name], 1e3 * (time.perf_counter() - start))
    return least


def times(runs: int = 9) -> None:
    for spread in (1.0, 0.25, 3.0):
        rows, ratios = [], []
        for batch, side, groups, depth in zip(BATCHES, SIDES, GROUPS, DEPTHS, strict=True):
            times = milliseconds(
                {m: both(m, groups) for m in ("gather", "auto")},
                inputs(batch, side, groups, spread=spread),
                runs,
            )
            ratios.append(times["auto"] / times["gather"])
            method = dcnv3.choose(side, side, jax.default_backend())
            rows.append(
                (
                    f"{batch}x{side}x{side}",
                    groups,
                    depth,
                    method,
                    *(f"{times[m]:.1f}" for m in times),
                    f"{ratios[-1]:.3f}",
                )
            )
        print(
            text_table.text_table(
                rows, ("map", "groups", "layers", "auto", "gather ms", "auto ms", "ratio")
            )
        )
        print(
            f"offsets of {spread} pixels: mean ratio by layers"
            f" {np.average(ratios, weights=DEPTHS):.3f}\n",
            flush=True,
        )


def figures(quick: bool) -> list[Figure]:
    ratios = []
    for batch, side, groups in [(1, 6, 2)] if quick else zip(BATCHES, SIDES, GROUPS, strict=True):
        times = milliseconds(
            {m: both(m, groups) for m in ("gather", "auto")},
            inputs(batch, side, groups),
            1 if quick else 9,
        )
        ratios.append(times["auto"] / times["gather"])
    mean = float(np.average(ratios, weights=DEPTHS[: len(ratios)]))
    out = [
        Figure(
            "DCNv3 forward and gradients over the packed gather, InternImage-H at 192 px, by"
            " layers",
            mean,
            0.45,
        )
    ]
    if not quick and importlib.util.find_spec("libtpu"):
        goals = {"12 x 12": 0.33, "6 x 6": 0.33, "all layers": 0.41}
        out += [
            Figure(f"DCNv3 bytes over the packed gather, v5e chip, {name}", ratio, goals.get(name))
            for name, ratio in bytes_accessed().items()
        ]
    return out


def sizes(runs: int = 5) -> None:
    rows = []
    for width in (16, 32):
        for side in (6, 7, 8, 10, 12, 14, 24, 28, 48, 56):
            arrays = inputs(1, side, 8, width=width)
            # minutes
            skip = (
                {"auto"}
                | ({"kernel"} if jax.default_backend() != "tpu" else set())
                | ({"dense"} if side > 28 else set())
            )
            methods = [m for m in dcnv3.METHODS if m not in skip]
            times = milliseconds({m: both(m, 8) for m in methods}, arrays, runs)
            auto = dcnv3.choose(side, side, jax.default_backend())
            rows.append(
                (
                    width,
                    side,
                    auto,
                    *(f"{times[m]:.1f}" if m in times else "" for m in dcnv3.METHODS[1:]),
                )
            )
    print(
        text_table.text_table(
            rows, ("channels a group", "side", "auto", *(f"{m} ms" for m in dcnv3.METHODS[1:]))
        )
    )


def compile_for_v5e(run, arrays: list):
    """`arrays`: shapes and types."""
    from jax.experimental import topologies

    from m3i_jax import parallel

    mesh = parallel.make_mesh(
        (1, 1, 1), topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[:1]
    )
    with jax.set_mesh(mesh):
        return run.lower(
            *(jax.ShapeDtypeStruct(*array, sharding=parallel.replicated(mesh)) for array in arrays)
        ).compile()


def counted(program) -> tuple[float, float, int]:
    """(GB accessed, MiB of temporaries, gathers and scatters) of a compiled program."""
    text = program.as_text()
    gathers = sum(text.count(f" {name}(") for name in ("gather", "scatter"))
    return (
        program.cost_analysis()["bytes accessed"] / 1e9,
        program.memory_analysis().temp_size_in_bytes / 2**20,
        gathers,
    )


def bytes_accessed(batch: int = 16) -> dict[str, float]:
    """Of one layer of every stage, bfloat16: bytes of `auto` over those of the gather, by map and
    over all layers. The matrix of `dense` is that of the whole map, also where `auto` takes bands
    on other machines."""
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    half = jnp.bfloat16
    methods = ("gather", "dense", "auto")
    rows, total, ratios = [], dict.fromkeys(methods, 0.0), {}
    for side, groups, depth in reversed(list(zip(SIDES, GROUPS, DEPTHS, strict=True))):
        where = batch, side, side, groups
        arrays = [
            ((batch, side, side, groups * WIDTH), half),
            ((*where, 9, 2), half),
            ((*where, 9), half),
            ((*where[:3], groups * WIDTH), half),
        ]
        times = {
            name: counted(compile_for_v5e(both(name, groups), arrays))
            for name in methods
            if name != "dense" or side <= 24
        }
        for name, (gigabytes, _, _) in times.items():
            total[name] += depth * gigabytes
        cells = [f"{times[m][i]:.2f}" if m in times else "" for i in (0, 1) for m in methods]
        ratios[f"{side} x {side}"] = times["auto"][0] / times["gather"][0]
        rows.append(
            (
                f"{batch}x{side}x{side}",
                *cells,
                times["auto"][2],
                f"{ratios[f'{side} x {side}']:.3f}",
            )
        )
    heads = [f"{m} {unit}" for unit in ("GB", "MiB") for m in methods]
    print(text_table.text_table(rows, ("map", *heads, "gathers of auto", "auto over gather")))
    print(f"all layers: {total['auto'] / total['gather']:.3f}")
    return ratios | {"all layers": total["auto"] / total["gather"]}


def large(stage: int = 0) -> tuple[float, float]:
    """Of one layer of a stage, one image, bfloat16: GB that the kernel and bands move."""
    from m3i_jax.profiling import hbm_traffic, hlo

    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    height, width, groups = 304 // 2**stage, 504 // 2**stage, GROUPS[stage]
    where = 1, height, width
    arrays = [((*where, groups * n), jnp.bfloat16) for n in (WIDTH, 18, 9, WIDTH)]
    kernel, band = (
        hbm_traffic.hbm_traffic(hlo.parse_hlo(compile_for_v5e(both(m, groups), arrays).as_text()))
        / 1e9
        for m in ("kernel", "band")
    )
    print(f"{height} x {width}, {groups} groups: kernel {kernel:.2f} GB, bands {band:.1f} GB")
    return kernel, band


if __name__ == "__main__":
    {"times": times, "sizes": sizes, "bytes": bytes_accessed, "large": large}[
        sys.argv[1] if len(sys.argv) > 1 else "times"
    ]()

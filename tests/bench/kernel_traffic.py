"""Memory traffic of kernels in programs compiled for a device that need not be there, an H100 or
another, against plain XLA (M3I_JAX_KERNELS=0), and of one layer of InternImage by operation.

    python -m tests.bench.kernel_traffic attention     # one layer, forward and gradients
    python -m tests.bench.kernel_traffic blocks        # four blocks of ViT-L in a scan
    python -m tests.bench.kernel_traffic depthwise     # gradient of a depth-wise kernel of side 5
    python -m tests.bench.kernel_traffic layer v6e:1x1 # of InternImage-H's third stage
    python -m tests.bench.kernel_traffic stages v6e:1x1 # each stage at the shapes of pre-training

Needs the extra `cuda` or `tpu`; each takes a minute, `stages` several.
`estimate` of `blocks` is that of --mode=show.
"""

import collections
import itertools
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from m3i_jax import parallel
from m3i_jax.models import (
    attention,
    initializers,
    intern_image,
    intern_image_layer,
    layers,
    scan_blocks,
)
from m3i_jax.profiling import hbm_traffic, hlo, libtpu_dump, topology, traffic_model

CHIP, GIB = sys.argv[2] if len(sys.argv) > 2 else "h100:1", 2**30
BATCH = 64


def compiled(function: Callable[..., Any], *arguments: Any, kernels: bool = True) -> Any:
    """The parsed program for one device."""
    top = topology.parse_topology(CHIP)
    mesh = parallel.make_mesh((1, 1, 1), topology.topology_devices(top)[:1])
    here = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here), arguments
    )
    os.environ["M3I_JAX_KERNELS"] = "1" if kernels else "0"
    with jax.set_mesh(mesh):
        lowered = jax.jit(lambda *some: function(*some)).lower(*placed)
    options = dict(topology.COMPILER[top.family.platform])
    if top.family.platform == "tpu":
        folder = pathlib.Path(tempfile.mkdtemp())
        done = libtpu_dump.compile_until_scheduled(lowered, options, folder)
    else:
        done = lowered.compile(compiler_options=options)
    return hlo.parse_hlo(done.as_text())


def shape(*sides: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sides, jnp.dtype(dtype))


def attention_layers() -> None:
    for tokens, heads, depth in ((197, 16, 64), (294, 16, 48)):
        x, g = shape(BATCH, tokens, 3 * heads * depth), shape(BATCH, tokens, heads * depth)
        moved = []
        for run in (attention.attend_columns, attention.attend_plainly):
            both = lambda x, g, run=run, heads=heads: (
                lambda y, pull: (y, pull(g))
            )(*jax.vjp(lambda x: run(heads, (x,), None), x))  # fmt: skip
            moved.append(hbm_traffic.hbm_traffic(compiled(both, x, g)))
        print(f"{tokens} tokens, {heads} heads of {depth}: {moved[0] / 2**20:.0f} MiB, plain"
              f" {moved[1] / 2**20:.0f}, ratio {moved[0] / moved[1]:.2f}", flush=True)  # fmt: skip


def blocks() -> None:
    width, depth = 1024, 4
    one = layers.block(width, 16, 4.0, "bfloat16")
    params = jax.eval_shape(
        lambda: initializers.init_blocks(one, jax.random.key(0), width=width, depth=depth)
    )
    x = shape(BATCH, 197, width)
    for remat in ("none", "names"):

        def gradient(params: Any, x: Any, remat: str = remat) -> Any:
            run = lambda p, x: scan_blocks.run_blocks(one, p, x, scan=True, remat=remat)
            return jax.grad(lambda p, x: run(p, x).astype(jnp.float32).sum(), (0, 1))(params, x)

        with_, without = (
            hbm_traffic.hbm_traffic(compiled(gradient, params, x, kernels=kernels)) / GIB
            for kernels in (True, False)
        )
        estimate = traffic_model.estimate_traffic(gradient, params, x, platform="cuda") / GIB
        print(f"remat={remat}: {with_:.2f} GiB, plain {without:.2f}, estimate over compiled"
              f" {traffic_model.COMPILED['cuda'] * estimate / with_:.2f}", flush=True)  # fmt: skip


def depthwise() -> None:
    x, kernel = shape(BATCH, 12, 12, 1280), shape(5, 5, 1280, dtype="float32")
    for kernels in (True, False):

        def gradient(x: Any, kernel: Any, g: Any) -> Any:
            run = lambda kernel, bias: intern_image_layer.depthwise(x, kernel, bias)
            return jax.vjp(run, kernel, jnp.zeros(x.shape[-1]))[1](g)

        moved = hbm_traffic.hbm_traffic(compiled(gradient, x, kernel, x, kernels=kernels))
        print(f"kernels={kernels}: {moved / (x.size * 2):.2f} times the map", flush=True)


def layer() -> None:
    x = shape(BATCH // 2, 12, 12, 1280)
    one = intern_image_layer.Layer(1280, 40, "res_post", 0.0, 1.0, 5, True, 5120)
    params = jax.tree.map(
        lambda sides: shape(2, *sides, dtype="float32"),
        one.shapes(),
        is_leaf=lambda node: isinstance(node, tuple),
    )

    def both(params: Any, x: Any, g: Any) -> Any:
        run = lambda p, x: intern_image_layer.run_layers(one, p, x, scan=True, remat="names")
        y, pull = jax.vjp(run, params, x)
        return y, pull(g)

    program, size = compiled(both, params, x, x), 2 * x.size * 2
    totals: dict[str, float] = collections.defaultdict(float)
    for times, each, fused in hlo.executed_counts(program):
        if not fused and (moved := hbm_traffic.instruction_traffic(program, each)):
            name = re.search(r'op_name="([^"]*)"', each.text)
            scope = re.sub(r"\d+", "#", name[1])[-80:] if name else "?"
            totals[f"{each.opcode} {scope}"] += times * moved
    print(f"{sum(totals.values()) / size:.0f} times the map, forward and backward, of which")
    for name, moved in sorted(totals.items(), key=lambda item: -item[1])[:30]:
        print(f"{moved / size:7.1f}  {name}")


def stages() -> None:
    """Of each stage of InternImage-H, by what the backward pass keeps, with 160 images of 192
    pixels: traffic of a layer in times the bytes of its map, and by kind of operation."""
    model, images = intern_image.InternImageConfig(), 160
    for stage, (remat, train) in itertools.product(
        range(4), (("names", True), ("full", True), ("full", False))
    ):
        one, side = intern_image._layer(model, stage), 48 >> stage
        x, depth = shape(images, side, side, one.width), (6, 6, 12, 6)[stage]
        every = model.extra_norm if stage == 2 else 0
        stacked = lambda sides, depth=depth: shape(depth, *sides, dtype="float32")
        params: dict[str, Any] = jax.tree.map(
            stacked, one.shapes(), is_leaf=lambda node: isinstance(node, tuple)
        )
        norms = (
            {name: shape(depth // every, one.width, dtype="float32") for name in ("scale", "bias")}
            if every
            else None
        )
        keep = shape(images, depth, 2, dtype="float32")

        def both(
            params: Any,
            norms: Any,
            x: Any,
            keep: Any,
            g: Any,
            remat: str = remat,
            train: bool = train,
            one: Any = one,
            every: int = every,
        ) -> Any:
            run = lambda p, n, x: intern_image_layer.run_layers(
                one, p, x, keep_BxLx2=keep, extra_norms=n, every=every, scan=True, remat=remat
            )
            y, pull = jax.vjp(run, params, norms, x)
            return (y, pull(g)) if train else y

        program, size = compiled(both, params, norms, x, keep, x), depth * x.size * 2
        kinds: dict[str, float] = collections.defaultdict(float)
        for times, each, fused in hlo.executed_counts(program):
            if not fused:
                moved = times * hbm_traffic.instruction_traffic(program, each) / size
                kinds[_kind(each.opcode, each.text)] += moved
        parts = ", ".join(
            f"{name} {kinds[name]:.1f}" for name in sorted(kinds) if kinds[name] > 0.1
        )
        print(f"stage {stage}, {remat}, {'training' if train else 'forward'}:"
              f" {sum(kinds.values()):.1f} times the map: {parts}", flush=True)  # fmt: skip


def _kind(opcode: str, text: str) -> str:
    name = re.search(r'op_name="([^"]*)"', text)
    last = name[1].split("/")[-1] if name else ""
    if opcode in ("copy-start", "slice", "slice-start"):
        return "into and out of the scratchpad"
    if opcode in ("copy", "reshape", "transpose"):
        return "changes of layout"
    if last in ("dynamic_slice", "dynamic_update_slice", "squeeze", "broadcast_in_dim"):
        return "stacks of values, weights and gradients"
    if opcode == "custom-call":
        return "sampling"
    if last == "dot_general":
        return "products"
    return "the rest"


if __name__ == "__main__":
    {
        "stages": stages,
        "attention": attention_layers,
        "blocks": blocks,
        "depthwise": depthwise,
        "layer": layer,
    }[sys.argv[1]]()
    sys.stdout.flush()
    os._exit(0)  # the compiler for TPUs goes on in a thread

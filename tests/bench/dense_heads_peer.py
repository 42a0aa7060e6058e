"""The heads of dense tasks, forward and all gradients in float32, over PyTorch
(tests/bench/dense_heads_torch.py) and torchvision's RoIAlign.

    python -m tests.bench.dense_heads_peer                     # all
    python -m tests.bench.dense_heads_peer upernet_128 --runs 9
    python -m tests.bench.dense_heads_peer one_thread    # processor time of one thread each

Both use the same weights and inputs; the losses must agree before anything is timed
(tests/bench/race.py). Names end with the side of the images in pixels. On a machine with other load
only the last form is fair: a second thread of PyTorch waits actively for the first.
"""

import pathlib
import sys
from typing import Any

import numpy as np

from tests.bench import race
from tests.bench.figures import Figure

NEEDS = ("torch", "torchvision")
TARGET = 1.0
AGREE = 1e-4  # relative, of the loss
STRIDES = (4, 8, 16, 32)
# images, side, channels, width, categories
UPERNET = {"32": (2, 32, 8, 8, 3), "96": (16, 96, 96, 32, 10), "256": (2, 256, 192, 128, 64)}
UPERNET["128"] = (16, 128, 128, 48, 16)
# images, side, patch, channels, width
PYRAMID = {"32": (2, 32, 8, 8, 8), "96": (16, 96, 8, 96, 48), "256": (4, 256, 16, 192, 128)}
# images, side, channels, boxes, bins, canonical side at stride 8
ROI = {"32": (2, 32, 4, 6, 7, 16), "96": (16, 96, 48, 24, 7, 56), "128": (4, 128, 64, 64, 14, 56)}
ROI["1024"] = (1, 1024, 256, 128, 7, 112)
TABLES: dict[str, Any] = {"upernet": UPERNET, "pyramid": PYRAMID, "roi": ROI}
NAMES = [f"{kind}_{side}" for kind, table in TABLES.items() for side in table if side != "32"]


def sizes(name: str) -> tuple[str, tuple[int, ...]]:
    kind, side = name.rsplit("_", 1)
    return kind, TABLES[kind][side]


def inputs(name: str) -> dict[str, Any]:
    """Maps [B, H, W, C] by stride, and boxes; fixed seed."""
    kind, (b, side, *rest) = sizes(name)
    rng, strides, c = np.random.default_rng(0), STRIDES, rest[0]
    if kind == "pyramid":
        strides, c = (rest[0],), rest[1]
    made: dict[str, Any] = {
        "maps": {
            s: rng.normal(size=(b, side // s, side // s, c)).astype(np.float32) for s in strides
        }
    }
    if kind == "roi":
        half = np.exp(rng.uniform(np.log(side / 24), np.log(side * 0.4), (b, rest[1], 2)))
        centre = rng.uniform(0, side, half.shape)
        boxes = np.concatenate([centre - half, centre + half], -1)
        made["boxes"] = boxes.clip(0, side).astype(np.float32)
    return made


def settings_of(name: str) -> Any:
    """The settings of the head or pyramid."""
    from m3i_jax import schema
    from m3i_jax.models.dense.pyramid import PyramidConfig

    kind, values = sizes(name)
    if kind == "upernet":
        return schema.Segment(strides=STRIDES, width=values[3], aux_width=values[3] // 2)
    _, _, patch, c, width = values
    return PyramidConfig(kind="simple", strides=STRIDES, sources=((patch, c),), width=width)


def ours(folder: pathlib.Path, name: str) -> Any:
    """The JAX step as a function that runs it and returns the loss. Writes the weights first."""
    import jax
    import jax.numpy as jnp

    from m3i_jax.models.dense import map_sampling, pyramid, upernet

    kind, values = sizes(name)
    given = jax.tree.map(jnp.asarray, inputs(name))
    params: Any = {}
    square = lambda x: jnp.square(x).mean()
    if kind == "roi":
        align = lambda maps, boxes: map_sampling.multilevel_roi_align(
            maps, boxes, values[4], (values[5], 8)
        )
        total = lambda params, maps: square(jax.vmap(align)(maps, given["boxes"]))
    elif kind == "pyramid":
        config = settings_of(name)
        params, _ = pyramid.init(config, jax.random.key(0))

        def total(params: Any, maps: Any) -> Any:
            made, _ = pyramid.apply(config, params, {}, maps, train=True)
            return sum(map(square, made.values()))
    else:
        settings = settings_of(name)
        channels = dict.fromkeys(STRIDES, values[2])
        params, statistics = upernet.init(settings, channels, values[4], jax.random.key(0))

        def total(params: Any, maps: Any) -> Any:
            logits, aux, _ = upernet.apply(settings, params, statistics, maps, train=True)
            assert aux is not None
            return square(logits) + square(aux)

    flat = {
        "/".join(str(key.key) for key in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    np.savez(folder / "weights.npz", **flat)
    run = jax.jit(jax.value_and_grad(total, (0, 1))).lower(params, given["maps"]).compile()
    return lambda: float(jax.block_until_ready(run(params, given["maps"]))[0])


def theirs(folder: pathlib.Path, name: str) -> Any:
    """The PyTorch step, from the weights of the JAX side."""
    import torch

    from tests.bench import dense_heads_torch

    torch.set_num_threads(race.THREADS)
    kind, values = sizes(name)
    params: Any = {}
    for path, value in np.load(folder / "weights.npz").items():
        *parents, last = path.split("/")
        node = params
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    given = inputs(name)
    maps = {
        s: torch.from_numpy(x).movedim(-1, 1).contiguous().requires_grad_()
        for s, x in given["maps"].items()
    }
    square = lambda x: x.square().mean()
    module: Any = None
    if kind == "roi":
        boxes = torch.from_numpy(given["boxes"])
        total = lambda: square(dense_heads_torch.roi_align(maps, boxes, values[4], (values[5], 8)))
    elif kind == "pyramid":
        module = dense_heads_torch.SimplePyramid(settings_of(name))
        total = lambda: sum(map(square, module(maps[values[2]])))
    else:
        channels = dict.fromkeys(STRIDES, values[2])
        module = dense_heads_torch.UperNet(settings_of(name), channels, values[4]).train()
        total = lambda: sum(map(square, module(maps)))
    weights = [*maps.values()]
    if module is not None:
        dense_heads_torch.load(module, params)
        weights += module.parameters()

    def step() -> float:
        loss = total()
        torch.autograd.grad(loss, weights, allow_unused=True)
        return loss.item()

    return step


def figures(quick: bool) -> list[Figure]:
    import jax

    out = []
    for name in [f"{kind}_32" for kind in TABLES] if quick else NAMES:
        result = race.race(
            "tests.bench.dense_heads_peer", name, 5 if quick else 7, sys.executable, AGREE
        )
        (a, b), (c, d) = result["wall"], result["processor"]
        label = f"{name}, forward and gradients over PyTorch, CPU, jax {jax.__version__}"
        out.append(
            Figure(label, a / b, None if quick else TARGET, note=f"processor time {c / d:.2f}")
        )
    return out


if __name__ == "__main__":
    race.main("tests.bench.dense_heads_peer", NAMES, AGREE)

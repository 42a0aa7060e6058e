"""The step of ViT M3I over the same step in plain PyTorch and timm (tests/bench/m3i_torch.py), on
this machine's processor in float32.

    python -m tests.bench.torch_peer                 # shapes A and B
    python -m tests.bench.torch_peer A --runs 9
    python -m tests.bench.torch_peer A --torch PYTHON    # torch and timm from another environment

A: width 384, 4 layers. B: width 192, 12 layers. Batch 8, 224 pixels, categories, decoder of 4
layers and 16 heads, two threads. Both use the same parameters and the same batch; the losses must
agree before anything is timed (tests/bench/race.py).
"""

import json
import pathlib
import sys
from typing import Any

import numpy as np

from tests.bench import race
from tests.bench.figures import Figure

SHAPES = {
    "A": {"width": 384, "heads": 6, "depth": 4},
    "B": {"width": 192, "heads": 3, "depth": 12},
    "toy": {"width": 48, "heads": 4, "depth": 2},
}
# of shape A with the newest jax; the older one and the deep, narrow shape are reported beside it
TARGET = 1.1
NEWEST = (0, 12)
NEEDS = ("torch", "timm")
CLASSES = 1000
AGREE = 1e-4


def settings(
    name: str,
    *,
    batch: int = 8,
    size: int = 224,
    dtype: str = "float32",
    model: dict[str, Any] | None = None,
) -> Any:
    """A completed configuration of a shape."""
    from m3i_jax import config as configuration

    config = configuration.default_config()
    if name == "toy":
        batch, size = min(batch, 4), 64
    shape = SHAPES.get(name, {})
    config.model.encoder.update({**shape, "patch_size": 16})
    if shape:
        config.model.decoder.update(
            {
                "width": shape["width"],
                "depth": 4 if name != "toy" else 2,
                "heads": 16 if name != "toy" else 4,
            }
        )
        config.model.pool.update({"width": shape["width"], "heads": 16 if name != "toy" else 4})
    config.model.update({"dtype": dtype, **(model or {})})
    config.data.update(
        {"image_size": size, "classes": CLASSES, "captions": "no", "size": 100 * batch}
    )
    config.train.update({"batch_size": batch, "steps": 1000})
    config.optim.update({"warmup_steps": 0, "lr": 1e-4})
    config.data.augment.update(
        {"jitter_p": 0.0, "grayscale_p": 0.0, "blur_p": (0.0, 0.0), "solarize_p": (0.0, 0.0)}
    )
    return configuration.resolve(config)


def batch_of(config: Any) -> dict[str, np.ndarray]:
    """A random batch with a fixed seed."""
    from m3i_jax.objective import masks

    r, b, side = np.random.default_rng(0), config.train.batch_size, config.data.image_size
    return {
        "views": r.integers(0, 256, (b, 2, side, side, 3)).astype(np.uint8),
        "box": (
            np.concatenate(
                [r.uniform(0, 100, (b, 2, 2)), r.uniform(60, 300, (b, 2, 2))], -1
            ).astype(np.float32)
        ),
        "flip": r.random((b, 2)) < 0.5,
        "mask": masks.blockwise(0, 0, b, grid=config.grid, hidden=config.hidden),
        "label": r.integers(0, CLASSES, b).astype(np.int32),
        "position": np.stack([np.zeros(b), np.arange(b)], -1).astype(np.uint32),
    }


def numbers(config: Any) -> dict[str, Any]:
    """The settings that the PyTorch side needs."""
    m, o = config.model, config.objective
    return {
        **{name: getattr(m.encoder, name) for name in ("width", "heads", "depth")},
        **{
            "ratio": m.encoder.mlp_ratio,
            "patch": m.encoder.patch_size,
            "grid": config.grid,
            "hidden": config.hidden,
        },
        **{f"decoder_{name}": getattr(m.decoder, name) for name in ("width", "heads", "depth")},
        **{
            "pool_heads": m.pool.heads,
            "pool_width": m.pool.width,
            "classes": CLASSES,
            "decay": config.optim.weight_decay,
        },
        **{
            "second_moment": o.second_moment,
            "smoothing": o.label_smoothing,
            "gamma": o.gamma,
            "balance_decay": o.balance_decay,
        },
        **{name: getattr(config.optim, name) for name in ("clip", "b1", "b2", "eps")},
    }


def hand_over(
    folder: pathlib.Path, config: Any, params: Any, trainer: Any, steps: int = 100
) -> None:
    """Write the start of the PyTorch side to files."""
    import jax

    from m3i_jax.objective import positions
    from m3i_jax.parallel.sharding import path_text
    from m3i_jax.training import views

    arrays = {
        f"params/{path_text(path)}": np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    arrays |= {
        f"batch/{name}": value for name, value in batch_of(config).items() if name != "position"
    }
    arrays["table/encoder"] = positions.sincos_2d(config.grid, config.model.encoder.width)
    arrays["table/decoder"] = positions.sincos_2d(config.grid, config.model.decoder.width)
    arrays["table/identity"] = positions.same_view_positions(
        config.grid, config.model.decoder.width
    )
    arrays["keep"] = np.asarray(views.drop_path_factors(config, batch_of(config)["position"], 0))
    arrays["lr"] = np.asarray([trainer.learning_rate(k) for k in range(steps)], np.float32)
    arrays["momentum"] = np.asarray(
        [trainer.scheduled(k + 1)["ema"] for k in range(steps)], np.float64
    )
    np.savez(folder / "start.npz", **arrays)
    (folder / "shape.json").write_text(json.dumps(numbers(config)))


def ours(folder: pathlib.Path, name: str) -> Any:
    """The JAX step as a function that runs it and returns the loss. Writes the files of the PyTorch
    side first."""
    import jax

    from m3i_jax import parallel
    from m3i_jax.training.trainer import Trainer

    config = settings(name)
    trainer = Trainer(config, parallel.make_mesh((1, 1, 1), jax.devices()[:1]), 0)
    state = trainer.init()
    hand_over(folder, config, state.params, trainer)
    batch = parallel.to_global(trainer.mesh, batch_of(config))

    def step() -> float:
        nonlocal state
        state, metrics = trainer.step(state, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return step


def theirs(folder: pathlib.Path, name: str = "") -> Any:
    """The PyTorch step, from the files of the JAX side."""
    import torch

    from tests.bench import m3i_torch

    torch.set_num_threads(race.THREADS)
    arrays = dict(np.load(folder / "start.npz"))
    peer = m3i_torch.Peer(json.loads((folder / "shape.json").read_text()), arrays)
    batch, keep, done = m3i_torch.batch_of(arrays), torch.from_numpy(arrays["keep"]), 0

    def step() -> float:
        nonlocal done
        out = peer.step(batch, keep, float(arrays["lr"][done]), float(arrays["momentum"][done]))
        done += 1
        return float(out["loss"])

    return step


def figures(quick: bool) -> list[Figure]:
    import jax

    out, new = [], tuple(map(int, jax.__version__.split(".")[:2])) >= NEWEST
    for name in ("toy",) if quick else ("A", "B"):
        result = race.race("tests.bench.torch_peer", name, 5 if quick else 7, sys.executable, AGREE)
        (a, b), (c, d) = result["wall"], result["processor"]
        label = f"ViT M3I step over PyTorch, CPU, shape {name}, jax {jax.__version__}"
        out.append(
            Figure(
                label,
                a / b,
                TARGET if name == "A" and new else None,
                note=f"processor time {c / d:.2f}",
            )
        )
        out.append(
            Figure(
                f"loss of the first step over PyTorch's, shape {name}: difference",
                result["differ"][0],
                AGREE,
            )
        )
    return out


if __name__ == "__main__":
    race.main("tests.bench.torch_peer", ["A", "B"], AGREE)

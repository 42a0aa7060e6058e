"""The step of ViT M3I over the same step in plain PyTorch and timm (tests/bench/m3i_torch.py), on this machine's processor in float32.

    python -m tests.bench.torch_peer                 # shapes A and B
    python -m tests.bench.torch_peer A --runs 9
    python -m tests.bench.torch_peer A --torch PYTHON    # torch and timm from another environment

A: width 384, 4 layers. B: width 192, 12 layers. Batch 8, 224 pixels, categories, decoder of 4 layers and 16 heads, two threads. Both start
from the same parameters and see the same batch; the losses must agree before anything is timed. Each runs in a process of its own with the
heap settings of tests/bench/heap.py, the two take turns, and the least of the runs counts. Other processes on the machine slow both
down: the load is printed with the result, and the ratio of the processor time is less sensitive to it.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from tests.bench.figures import Figure
from tests.bench.heap import MALLOC

SHAPES = {
    "A": {"width": 384, "heads": 6, "depth": 4},
    "B": {"width": 192, "heads": 3, "depth": 12},
    "toy": {"width": 48, "heads": 4, "depth": 2},
}
TARGET = 1.1  # of shape A with the newest jax; the older one and the deep, narrow shape are reported beside it
NEWEST = (0, 12)
CLASSES, THREADS = 1000, 2
AGREE = 1e-4


def settings(name: str, *, batch: int = 8, size: int = 224, dtype: str = "float32", model: dict[str, Any] | None = None) -> Any:
    """A completed configuration of a shape."""
    from m3i_jax import config as configuration

    config = configuration.default()
    if name == "toy":
        batch, size = min(batch, 4), 64
    shape = SHAPES.get(name, {})
    config.model.encoder.update({**shape, "patch_size": 16})
    if shape:
        config.model.decoder.update({"width": shape["width"], "depth": 4 if name != "toy" else 2, "heads": 16 if name != "toy" else 4})
        config.model.pool.update({"width": shape["width"], "heads": 16 if name != "toy" else 4})
    config.model.update({"dtype": dtype, **(model or {})})
    config.data.update({"image_size": size, "classes": CLASSES, "captions": "no", "size": 100 * batch})
    config.train.update({"batch_size": batch, "steps": 1000})
    config.optim.update({"warmup_steps": 0, "lr": 1e-4})
    config.data.augment.update({"jitter_p": 0.0, "grayscale_p": 0.0, "blur_p": (0.0, 0.0), "solarize_p": (0.0, 0.0)})
    return configuration.resolve(config)


def batch_of(config: Any) -> dict[str, np.ndarray]:
    """A random batch, always the same."""
    from m3i_jax.objective import masks

    r, b, side = np.random.default_rng(0), config.train.batch_size, config.data.image_size
    return {
        "views": r.integers(0, 256, (b, 2, side, side, 3)).astype(np.uint8),
        "box": np.concatenate([r.uniform(0, 100, (b, 2, 2)), r.uniform(60, 300, (b, 2, 2))], -1).astype(np.float32),
        "flip": r.random((b, 2)) < 0.5,
        "mask": masks.blockwise(0, 0, b, grid=config.grid, hidden=config.hidden),
        "label": r.integers(0, CLASSES, b).astype(np.int32),
        "position": np.stack([np.zeros(b), np.arange(b)], -1).astype(np.uint32),
    }


def numbers(config: Any) -> dict[str, Any]:
    """What the PyTorch side must know of a configuration."""
    m, o = config.model, config.objective
    return {
        **{name: getattr(m.encoder, name) for name in ("width", "heads", "depth")},
        **{"ratio": m.encoder.mlp_ratio, "patch": m.encoder.patch_size, "grid": config.grid, "hidden": config.hidden},
        **{f"decoder_{name}": getattr(m.decoder, name) for name in ("width", "heads", "depth")},
        **{"pool_heads": m.pool.heads, "pool_width": m.pool.width, "classes": CLASSES, "decay": config.optim.weight_decay},
        **{"second_moment": o.second_moment, "smoothing": o.label_smoothing, "gamma": o.gamma, "balance_decay": o.balance_decay},
        **{name: getattr(config.optim, name) for name in ("clip", "b1", "b2", "eps")},
    }


def hand_over(folder: pathlib.Path, config: Any, params: Any, trainer: Any, steps: int = 100) -> None:
    """Everything that the PyTorch side starts from, as files."""
    import jax

    from m3i_jax.objective import positions
    from m3i_jax.parallel.rules import path_of
    from m3i_jax.training import views

    arrays = {f"params/{path_of(path)}": np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    arrays |= {f"batch/{name}": value for name, value in batch_of(config).items() if name != "position"}
    arrays["table/encoder"] = positions.sincos_2d(config.grid, config.model.encoder.width)
    arrays["table/decoder"] = positions.sincos_2d(config.grid, config.model.decoder.width)
    arrays["table/identity"] = positions.identity(config.grid, config.model.decoder.width)
    arrays["keep"] = np.asarray(views.drop_path(config, batch_of(config)["position"], 0))
    arrays["lr"] = np.asarray([trainer.learning_rate(k) for k in range(steps)], np.float32)
    arrays["momentum"] = np.asarray([trainer.momentum(k + 1) for k in range(steps)], np.float64)
    np.savez(folder / "start.npz", **arrays)
    (folder / "shape.json").write_text(json.dumps(numbers(config)))


def ours(folder: pathlib.Path, name: str) -> Any:
    """Our step as a function that takes one and returns the loss; writes what the other side needs first."""
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


def theirs(folder: pathlib.Path) -> Any:
    """Their step, from the files of ours."""
    import torch

    from tests.bench import m3i_torch

    torch.set_num_threads(THREADS)
    arrays = dict(np.load(folder / "start.npz"))
    peer = m3i_torch.Peer(json.loads((folder / "shape.json").read_text()), arrays)
    batch, keep, done = m3i_torch.batch_of(arrays), torch.from_numpy(arrays["keep"]), 0

    def step() -> float:
        nonlocal done
        out = peer.step(batch, keep, float(arrays["lr"][done]), float(arrays["momentum"][done]))
        done += 1
        return float(out["loss"])

    return step


def contestant(side: str, folder: pathlib.Path, name: str) -> None:
    """Answers every line of its input with (loss, wall seconds, processor seconds) of one step."""
    step = ours(folder, name) if side == "jax" else theirs(folder)
    print("ready", flush=True)
    for _ in sys.stdin:
        wall, processor = time.perf_counter(), time.process_time()
        loss = step()
        print(json.dumps([loss, time.perf_counter() - wall, time.process_time() - processor]), flush=True)


class Running:
    """A contestant's process."""

    def __init__(self, python: str, side: str, folder: str, name: str) -> None:
        environment = {**os.environ, **MALLOC, "OMP_NUM_THREADS": str(THREADS), "JAX_PLATFORMS": "cpu"}
        command = [python, "-m", "tests.bench.torch_peer", name, "--side", side, "--folder", folder]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        if self.line() != "ready":
            raise RuntimeError(f"{side} did not start")

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def step(self) -> tuple[float, float, float]:
        assert self.process.stdin is not None
        print("go", file=self.process.stdin, flush=True)
        if not (told := self.line()):
            raise RuntimeError(f"{self.process.args!r} ended with {self.process.wait()}")
        return tuple(json.loads(told))  # type: ignore[return-value]

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


def race(name: str, runs: int, python: str) -> dict[str, Any]:
    """Losses of the first steps, and the least seconds of both.

    Raises:
      RuntimeError: the losses do not agree: then they do not compute the same thing, and no time means anything.
    """
    with tempfile.TemporaryDirectory() as folder:
        running = [Running(sys.executable, "jax", folder, name)]
        try:
            running.append(Running(python, "torch", folder, name))
            rounds = [[one.step() for one in running[:: 1 if turn % 2 else -1]][:: 1 if turn % 2 else -1] for turn in range(runs + 3)]
        finally:
            for one in running:
                one.end()
    differ = [abs(a[0] - b[0]) / abs(b[0]) for a, b in rounds]
    if differ[0] > AGREE:
        raise RuntimeError(f"the losses of the first step are {rounds[0][0][0]} and {rounds[0][1][0]}")
    timed = rounds[3:]
    least = {side: [min(pair[i][j] for pair in timed) for i in range(2)] for j, side in ((1, "wall"), (2, "processor"))}
    return {"differ": differ, "rounds": timed, "wall": least["wall"], "processor": least["processor"]}


def told(name: str, seen: dict[str, Any]) -> str:
    (ours_, theirs_), (a, b) = seen["wall"], seen["processor"]
    return (
        f"{name}: {ours_:.3f} s, PyTorch {theirs_:.3f} s, ratio {ours_ / theirs_:.3f} (processor time {a / b:.3f}); losses of three "
        f"steps differ by {', '.join(f'{d:.1e}' for d in seen['differ'][:3])}; {len(seen['rounds'])} runs, load {os.getloadavg()[0]:.1f}"
    )


def figures(quick: bool, python: str = sys.executable) -> list[Figure]:
    import jax

    out, new = [], tuple(map(int, jax.__version__.split(".")[:2])) >= NEWEST
    for name in ("toy",) if quick else ("A", "B"):
        seen = race(name, 5 if quick else 7, python)
        (a, b), (c, d) = seen["wall"], seen["processor"]
        label = f"ViT M3I step over PyTorch, CPU, shape {name}, jax {jax.__version__}"
        out.append(Figure(label, a / b, TARGET if name == "A" and new else None, note=f"processor time {c / d:.2f}"))
        out.append(Figure(f"loss of the first step over PyTorch's, shape {name}: difference", seen["differ"][0], AGREE))
    return out


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("names", nargs="*", default=["A", "B"])
    flags.add_argument("--runs", type=int, default=7)
    flags.add_argument("--torch", default=sys.executable)
    flags.add_argument("--side", default="")
    flags.add_argument("--folder", default="")
    given = flags.parse_args()
    if given.side:
        contestant(given.side, pathlib.Path(given.folder), given.names[0])
        return
    for name in given.names:
        print(told(name, race(name, given.runs, given.torch)), flush=True)


if __name__ == "__main__":
    main()

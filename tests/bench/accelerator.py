"""The train step of ViT-B/16 on an accelerator: MFU, the same step in PyTorch on the same card,
memory and attention.

    bash launch/bench.sh --gpu                               # everything, as one table
    python -m tests.bench.accelerator --batches 128,256,384  # every batch to try
    python -m tests.bench.accelerator --set model.remat=full # the JAX step with other settings
    python -m tests.bench.accelerator --toy                  # a functional check on any machine

bfloat16 products, float32 parameters, synthetic images, categories, no colour augmentation (the
PyTorch side has none). Batches grow until one does not fit or two in a row are no faster. Every
attempt has a separate process, so that its peak memory is measured alone. PyTorch:
tests/bench/m3i_torch.py with torch.compile, fused attention and fused AdamW, at its best batch of
the same list; the losses of the first step must agree. MFU is model FLOPs over the dense peak of
the chip (M3I_PEAK_TFLOPS if the chip is unknown). The predicted peak memory is the compiler's.
Attention: forward and all gradients of the variants that run on the device.
"""

import argparse
import ast
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from m3i_jax.reporting import text_table
from tests.bench import torch_peer
from tests.bench.figures import Figure

BATCHES, TOY_BATCHES = (64, 128, 192, 256, 384, 512, 768), (4, 8)
TOKENS, HEADS = (196, 294), ((12, 64), (16, 48))  # encoder and decoder of width 768
AGREE = 2e-2  # relative, of the first loss in bfloat16
GOAL, MEMORY = 0.45, 1.05


def settings(batch: int, toy: bool, changes: list[str]) -> Any:
    from m3i_jax import config as configuration

    settings_ = torch_peer.settings("toy" if toy else "b16", batch=batch, dtype="bfloat16")
    if toy:
        changes = [f"train.batch_size={batch}", *changes]
    if not changes:
        return settings_
    config = configuration.default_config()
    text = dict(
        line.split(" = ", 1)
        for line in configuration.config_to_text(settings_).splitlines()
        if " = " in line
    )
    configuration.apply_overrides(
        config, [f"{key}={_plain(value)}" for key, value in text.items()] + changes
    )
    return configuration.resolve(config)


def _plain(text: str) -> str:
    """A value of `config_to_text` in the syntax of the command line."""
    value = ast.literal_eval(text)
    return ",".join(map(str, value)) or "()" if isinstance(value, tuple) else str(value)


def timed(step: Callable[[], Any], finish: Callable[[Any], Any], steps: int) -> float:
    """Seconds per step of several steps that are dispatched without waiting."""
    for _ in range(3):
        finish(step())
    start = time.perf_counter()
    for _ in range(steps):
        out = step()
    finish(out)
    return (time.perf_counter() - start) / steps


def ours(
    batch: int, folder: pathlib.Path, toy: bool, changes: list[str], steps: int
) -> dict[str, Any]:
    """Speed and memory of the JAX step at one batch; writes the start of the PyTorch side."""
    import jax

    from m3i_jax import parallel
    from m3i_jax.modes import monitoring
    from m3i_jax.profiling import hardware
    from m3i_jax.training.trainer import Trainer, abstract_batch

    # Compiled ahead of time for its memory statistics; the call then reuses the program.
    monitoring.enable_compilation_cache(folder)
    config, device = settings(batch, toy, changes), jax.devices()[0]
    trainer = Trainer(config, parallel.make_mesh((1, 1, 1), [device]), 0)
    state = trainer.init()
    torch_peer.hand_over(folder, config, state.params, trainer)
    compiled = trainer.lower(abstract_batch(config)).compile()
    memory = compiled.memory_analysis()
    there = parallel.to_global(trainer.mesh, torch_peer.batch_of(config))
    first: list[float] = []

    def step() -> Any:
        nonlocal state
        state, metrics = trainer.step(state, there)
        if not first:
            first.append(float(metrics["loss"]))
        return metrics["loss"]

    seconds = timed(step, jax.block_until_ready, steps)
    stats = device.memory_stats() or {}
    chip = hardware.find_chip(device.device_kind, 1)
    peak = float(os.environ.get("M3I_PEAK_TFLOPS", 0)) * 1e12 or (
        chip.flops * chip.chips if chip else 0.0
    )
    all_buffers = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return {
        "device": device.device_kind,
        "loss": first[0],
        "rate": batch / seconds,
        "mfu": monitoring.model_flops(trainer) / seconds / peak if peak else None,
        "predicted": getattr(memory, "peak_memory_in_bytes", 0) or all_buffers,
        "measured": stats.get("peak_bytes_in_use"),
    }


def theirs(batch: int, folder: pathlib.Path, toy: bool, steps: int) -> dict[str, Any]:
    """Speed of the PyTorch step at one batch."""
    import torch

    from tests.bench import m3i_torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    arrays = dict(np.load(folder / "start.npz"))
    shape = json.loads((folder / "shape.json").read_text())
    peer = m3i_torch.Peer(shape, arrays, device=device, half=True, compiled=device == "cuda")
    there, keep = m3i_torch.batch_of(arrays, device), torch.from_numpy(arrays["keep"]).to(device)
    first: list[float] = []
    done = 0

    def step() -> Any:
        nonlocal done
        out = peer.step(there, keep, float(arrays["lr"][done]), float(arrays["momentum"][done]))[
            "loss"
        ]
        done += 1
        if not first:
            first.append(float(out))
        return out

    seconds = timed(
        step, lambda out: float(out) if device == "cpu" else torch.cuda.synchronize(), steps
    )
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"device": name, "loss": first[0], "rate": batch / seconds, "compiled": device == "cuda"}


def attention(toy: bool, steps: int) -> list[tuple[str, str, float]]:
    """(tokens x heads x width, variant, milliseconds) of forward and all gradients."""
    import jax
    import jax.numpy as jnp

    from m3i_jax.models import attention

    def public(kind: str) -> Callable[..., Any]:
        turn = lambda x: x.swapaxes(1, 2)  # noqa: E731 (JAX uses [B, T, H, E])
        return lambda q, k, v: turn(
            jax.nn.dot_product_attention(turn(q), turn(k), turn(v), implementation=kind)
        )  # type: ignore[arg-type]

    variants = {
        "ours": attention.attend,
        "jax.nn, xla": public("xla"),
        "jax.nn, cudnn": public("cudnn"),
    }
    if jax.devices()[0].platform != "gpu":
        del variants["jax.nn, cudnn"]
    out = []
    for tokens in (20,) if toy else TOKENS:
        for heads, width in ((2, 8),) if toy else HEADS:
            shape = (2 if toy else 128, heads, tokens, width)
            arrays = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(4)]
            for name, variant in variants.items():
                run = jax.jit(lambda q, k, v, g, variant=variant: jax.vjp(variant, q, k, v)[1](g))
                seconds = timed(functools.partial(run, *arrays), jax.block_until_ready, steps)
                out.append((f"{tokens} tokens, {heads} heads of {width}", name, 1e3 * seconds))
            columns = [attention.from_heads(array) for array in arrays]
            if attention.attention_kernel_fits(heads, tuple(columns[:3])):
                own = functools.partial(attention.attend_columns, heads)
                kernel = jax.jit(
                    lambda *a, own=own: jax.vjp(lambda *b: own(b, None), *a[:3])[1](a[3])
                )
                seconds = timed(functools.partial(kernel, *columns), jax.block_until_ready, steps)
                out.append((f"{tokens} tokens, {heads} heads of {width}", "kernel", 1e3 * seconds))
    return out


def child(*arguments: str) -> Any:
    """The output of a process of this module; None if it ran out of memory."""
    command = [sys.executable, "-m", "tests.bench.accelerator", *arguments]
    environment = dict(os.environ)
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in environment:  # the older name; JAX refuses both
        environment.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")  # it has the card to itself
    done = subprocess.run(
        command,
        text=True,
        capture_output=True,
        cwd=pathlib.Path(__file__).parent.parent.parent,
        env=environment,
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if any(
        sign in done.stderr for sign in ("RESOURCE_EXHAUSTED", "OutOfMemoryError", "out of memory")
    ):
        return None
    raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])


def best(
    side: str, batches: tuple[int, ...], folder: str, more: list[str], log: Callable[[str], None]
) -> dict[str, Any]:
    """The fastest batch of a side, with the first loss of every batch."""
    top: dict[str, Any] = {"rate": 0.0, "losses": {}}
    behind = 0
    for batch in batches:
        path = pathlib.Path(folder) / str(batch)
        path.mkdir(exist_ok=True)
        if side == "torch" and not (path / "start.npz").is_file():
            break
        result = child("--side", side, "--batch", str(batch), "--folder", str(path), *more)
        if result is None:
            log(f"{side}, {batch}: out of memory")
            break
        log(f"{side}, {batch}: {json.dumps(result)}")
        losses = top["losses"] | {batch: result["loss"]}
        behind = 0 if result["rate"] > 1.01 * top["rate"] else behind + 1
        if result["rate"] > top["rate"]:
            top = {**result, "batch": batch}
        top["losses"] = losses
        if behind == 2:
            break
    if not top["rate"]:
        raise RuntimeError(f"{side}: not even {batches[0]} images fit")
    return top


def figures(
    quick: bool,
    batches: tuple[int, ...] = (),
    changes: tuple[str, ...] = (),
    log: Callable[[str], None] = lambda line: None,
) -> list[Figure]:
    batches = batches or (TOY_BATCHES if quick else BATCHES)
    toy = [*(["--toy"] if quick else []), *(f"--set={change}" for change in changes)]
    with tempfile.TemporaryDirectory() as folder:
        jax_side = best("jax", batches, folder, toy, log)
        where = (
            f"{'toy' if quick else 'ViT-B/16'}, {jax_side['device']}, {jax_side['batch']} images"
        )
        rate = f"{jax_side['rate']:,.1f} mixed views a second"
        no_peak = "the peak of this device is not known: set M3I_PEAK_TFLOPS"
        out = [
            Figure(
                f"MFU of the step, {where}",
                jax_side["mfu"],
                GOAL,
                most=False,
                note=rate if jax_side["mfu"] else f"{no_peak}; {rate}",
            )
        ]
        off = jax_side["measured"] / jax_side["predicted"] if jax_side["measured"] else None
        note = (
            "this device does not count its memory"
            if off is None
            else f"{text_table.format_bytes(jax_side['measured'])}, ratio {off:.3f}"
        )
        out.append(
            Figure(
                f"peak of memory, measured and predicted apart, {where}",
                max(off, 1 / off) if off else None,
                MEMORY,
                note=note,
            )
        )
        try:
            other = best("torch", batches, folder, toy, log)
        except RuntimeError as error:
            absent = str(error).startswith("ModuleNotFoundError")
            out.append(
                Figure(
                    "speed over PyTorch on the same device",
                    None,
                    1.0,
                    most=False,
                    note="needs the extra bench" if absent else str(error)[:120],
                )
            )
        else:
            note = (
                f"{other['rate']:,.1f} a second at {other['batch']},"
                f" {'torch.compile' if other['compiled'] else 'not compiled'}"
            )
            out.append(
                Figure(
                    f"speed over PyTorch on the same device, {where}",
                    jax_side["rate"] / other["rate"],
                    1.0,
                    most=False,
                    note=note,
                )
            )
            both = jax_side["losses"].keys() & other["losses"].keys()
            difference = max(
                abs(jax_side["losses"][b] - other["losses"][b]) / abs(other["losses"][b])
                for b in both
            )
            out.append(
                Figure(
                    "loss of the first step over PyTorch's in bfloat16: difference",
                    difference,
                    AGREE,
                )
            )
    times = child("--side", "attention", *toy)
    least = {where: min(ms for case, _, ms in times if case == where) for where, _, _ in times}
    out += [
        Figure(f"attention, {case}: {name} over the fastest", ms / least[case], note=f"{ms:.3f} ms")
        for case, name, ms in times
    ]
    return out


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("--batches", default="", help="batch sizes to try, in this order")
    flags.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the JAX step"
    )
    flags.add_argument("--toy", action="store_true")
    for name in ("side", "folder"):
        flags.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    flags.add_argument("--batch", type=int, default=0, help=argparse.SUPPRESS)
    given = flags.parse_args()
    steps, folder = 2 if given.toy else 20, pathlib.Path(given.folder)
    if given.side == "jax":
        print(json.dumps(ours(given.batch, folder, given.toy, given.set, steps)))
    elif given.side == "torch":
        print(json.dumps(theirs(given.batch, folder, given.toy, steps)))
    elif given.side == "attention":
        print(json.dumps(attention(given.toy, steps)))
    else:
        batches = tuple(int(size) for size in given.batches.split(",") if size)
        rows = figures(
            given.toy, batches, tuple(given.set), log=lambda line: print(line, flush=True)
        )
        print(
            text_table.text_table(
                [figure.cells for figure in rows], ("figure", "measured", "target", "", "note")
            )
        )


if __name__ == "__main__":
    main()

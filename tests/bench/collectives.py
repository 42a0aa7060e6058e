"""Collectives and memory of one ViT-B/16 step, from the text of the program compiled for TPUs that are not there.

    pip install "jax[tpu]"                                 # libtpu compiles without a TPU
    python -m tests.bench.collectives                      # FSDP over 8, gathered weights dropped and kept
    python -m tests.bench.collectives --remat              # what each policy of model.remat costs and saves, data parallel
    python -m tests.bench.collectives key=value ...        # one program of your own, settings as on the command line of a run

received: bytes that reach a device, of a ring: (n - 1) / n of what an all-gather gives, n - 1 times what a reduce-scatter gives, both
for an all-reduce. What stands inside a loop counts as often as the loop runs. floor: weights of 119.5 M trained parameters in bfloat16,
gathered for the forward and again for the backward, their gradients scattered, and 85.6 M of the target encoder gathered once, all times
(n - 1) / n: 0.78 GB over 8. a layer and pass: collectives over the 16 blocks that hold trained parameters.
"""

import collections
import dataclasses
import math
import os
import re
import sys
import time
from typing import Any

import jax

from m3i_jax import config as configuration
from m3i_jax import parallel, schema
from m3i_jax.models import presets
from m3i_jax.reporting import flops, show
from m3i_jax.training.trainer import Trainer, abstract_batch

BYTES = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8, "u8": 1, "s8": 1, "pred": 1}
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")
TRAINED, TARGET = 119.5e6, 85.6e6  # ViT-B/16 with one decoder and a category head; its target encoder


@dataclasses.dataclass(frozen=True)
class Found:
    """One kind of collective: how often it runs a step, and the bytes it brings to a device."""

    times: float = 0.0
    received: float = 0.0


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """({name: instructions}, name of the entry) of a program in XLA's text."""
    found: dict[str, list[str]] = {}
    here = top = ""
    for line in text.split("\n"):
        if line[:1] not in (" ", "", "}") and line.endswith("{") and "->" in line:
            here = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line).group(1)  # type: ignore[union-attr]
            found[here], top = [], here if line.startswith("ENTRY") else top
        elif " = " in line and here:
            found[here].append(re.sub(r"(\[[\d,]*\])\{[^{}]*\}", r"\1", line))  # without layouts
    return found, top


def repeats(text: str) -> dict[str, float]:
    """How often every computation of a program runs: the body of a loop as often as its condition says."""
    found, top = computations(text)
    times: dict[str, float] = collections.defaultdict(float)

    def trips(line: str) -> int:
        known = re.search(r"known_trip_count[^\d]*(\d+)", line)
        if known:
            return int(known.group(1))
        condition = re.search(r"condition=%?([\w.\-]+)", line).group(1)  # type: ignore[union-attr]
        return max((int(n) for text in found[condition] for n in re.findall(r"constant\((\d+)\)", text)), default=1)

    def walk(name: str, count: float) -> None:
        times[name] += count
        for line in found[name]:
            if "to_apply" in line:
                continue  # of a reduction: one addition
            often = trips(line) if " while(" in line else 1
            for inner in re.findall(r"(?:calls|body)=%?([\w.\-]+)", line):
                walk(inner, count * often)

    walk(top, 1.0)
    return times


def size(shapes: str) -> int:
    return sum(
        BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
        if kind in BYTES
    )


def collectives(text: str, devices: int) -> dict[str, Found]:
    """What every kind of collective of a compiled program moves, {kind: Found}."""
    found, _ = computations(text)
    out: dict[str, Found] = {}
    seen = set()
    for name, count in repeats(text).items():
        for line in found[name]:
            hit = re.search(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
            if not hit:
                continue
            shapes, kind, start = hit.groups()
            if chain := re.search(r'chain_id="?\w+', line):  # an asynchronous one is printed once for every fusion it is spread over
                if (chain.group(), kind) in seen:
                    continue
                seen.add((chain.group(), kind))
            group = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
            iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
            n = len(group.group(1).split(",")) if group else int(iota.group(2)) if iota else devices
            given = size(shapes)
            if start and kind == "all-gather" or start and kind == "collective-permute":
                given = max(size(part) for part in re.findall(r"\b[a-z]+\d*\[[\d,]*\]", shapes))  # (operand, result, ...)
            share = {"reduce-scatter": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}.get(kind, (n - 1) / n)
            old = out.get(kind, Found())
            out[kind] = Found(old.times + count, old.received + count * given * share)
    return out


def settings(*changes: str) -> schema.Config:
    """ViT-B/16 on 1,000 categories, without captions, and without colour: it moves nothing between devices, and takes long to compile."""
    config = configuration.default()
    config.model.update(presets.preset("vit_b16"))
    base = ["data.size=100000", "data.classes=1000", "data.captions=no", "model.scan=true"]
    base += ["data.augment.jitter_p=0", "data.augment.grayscale_p=0", "data.augment.blur_p=0,0", "data.augment.solarize_p=0,0"]
    configuration.override(config, [*base, *changes])
    return configuration.resolve(config)


def compile_step(config: schema.Config, topology: str) -> tuple[Any, float]:
    """(the step compiled for a topology, seconds)."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    trainer = Trainer(config, parallel.make_mesh(config.parallel.mesh, devices), 49_408)
    start = time.time()
    return trainer.lower(abstract_batch(config)).compile(), time.time() - start


def products(config: schema.Config) -> float:
    """Operations of matrix products of a step of this configuration on one device, traced."""
    trainer = Trainer(config, parallel.make_mesh((1, 1, 1), jax.devices()[:1]), 49_408)
    return flops.count(trainer.trace, trainer.template, abstract_batch(config)).dot


def row(name: str, config: schema.Config, topology: str, devices: int) -> tuple[str, ...]:
    compiled, seconds = compile_step(config, topology)
    if dump := os.environ.get("DUMP"):
        with open(dump, "w") as file:
            file.write(compiled.as_text())
    found = collectives(compiled.as_text(), devices)
    received, times = (sum(getattr(each, field) for each in found.values()) for field in ("received", "times"))
    floor = 2 * (3 * TRAINED + TARGET) * (devices - 1) / devices
    memory = compiled.memory_analysis()
    kinds = ", ".join(f"{kind} {each.times:.0f} x, {each.received / 1e9:.3f} GB" for kind, each in sorted(found.items()))
    layers = config.model.encoder.depth + config.model.decoder.depth
    return (
        name, f"{received / 1e9:.3f}", f"{received / floor:.2f}", f"{times / layers:.1f}", f"{memory.peak_memory_in_bytes / 1e9:.2f}",
        f"{memory.temp_size_in_bytes / 1e9:.2f}", f"{seconds:.0f}", kinds,
    )  # fmt: skip


HEADERS = ("program", "GB received", "over floor", "a layer and pass", "peak GB", "temporary GB", "compile s", "kinds")


def main(wanted: list[str]) -> None:
    topology, devices = "v5e:2x4", 8
    if "--remat" in wanted:
        views, rows = 64, []
        cheapest = 0.0
        for remat in ("none", "dots", "names", "full"):
            config = settings(f"train.batch_size={views * devices}", f"model.remat={remat}", *(w for w in wanted if "=" in w))
            count = products(config)
            cheapest = cheapest or count
            rows.append((*row(f"{remat}, {count / cheapest:.3f} of the products", config, topology, devices)[:-1],))
            print(show.table(rows[-1:], HEADERS[:-1]), flush=True)
        return
    base = ["train.batch_size=256", "model.remat=names", "parallel.mesh=1,8,1"]
    if wanted:
        print(show.table([row(" ".join(wanted), settings(*base, *wanted), topology, devices)], HEADERS))
        return
    for name, changes in (("gathered twice", ()), ("gathered weights kept", ("model.keep_gathered=true",))):
        print(show.table([row(name, settings(*base, *changes), topology, devices)], HEADERS), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    main(sys.argv[1:])

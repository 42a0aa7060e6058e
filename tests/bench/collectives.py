"""Collectives and memory of one ViT-B/16 step, from the text of the program compiled for TPUs. No
TPU is needed.

    pip install "jax[tpu]"                           # libtpu compiles without a TPU
    python -m tests.bench.collectives                # FSDP over 8, weights kept or regathered
    python -m tests.bench.collectives --remat        # cost and saving of each model.remat policy
    python -m tests.bench.collectives key=value ...  # one program with these settings

- received: bytes that reach a device, counted by `profiling.hlo.collectives`.
- floor: bfloat16 weights of 119.5 M trained parameters, gathered in the forward and in the backward
  pass, their gradients scattered, and 85.6 M parameters of the target encoder gathered once, all
  times (n - 1) / n: 0.78 GB over 8.
- a layer and pass: collectives per block of the 16 blocks with trained parameters.
"""

import importlib.util
import sys
from typing import Any

from m3i_jax import config as configuration
from m3i_jax import schema
from m3i_jax.models import presets
from m3i_jax.modes import compile as mode
from m3i_jax.reporting import text_table
from tests.bench.figures import Figure

# parameters of ViT-B/16 with one decoder and a category head; of its target encoder
TRAINED, TARGET = 119.5e6, 85.6e6
TOPOLOGY, DEVICES = "v5e:2x4", 8
FLOOR = 2 * (3 * TRAINED + TARGET) * (DEVICES - 1) / DEVICES
FSDP = ("train.batch_size=256", "model.remat=names", "parallel.mesh=1,8,1")
HEADERS = (
    "program",
    "GB received",
    "over floor",
    "a layer and pass",
    "FLOPs",
    "peak GB",
    "temporary GB",
    "compile s",
    "kinds",
)


def settings(*changes: str) -> schema.Config:
    """ViT-B/16 on 1,000 categories, without captions and colour augmentation, which has no
    collectives and a long compile time."""
    config = configuration.default_config()
    config.model.update(presets.preset("vit_b16"))
    base = ["data.size=100000", "data.classes=1000", "data.captions=no", "model.scan=true"]
    base += [
        "data.augment.jitter_p=0",
        "data.augment.grayscale_p=0",
        "data.augment.blur_p=0,0",
        "data.augment.solarize_p=0,0",
    ]
    configuration.apply_overrides(config, [*base, *changes])
    return configuration.resolve(config)


def report(config: schema.Config) -> dict[str, Any]:
    """compile.json of a step with two more numbers: received (bytes per device) and layer
    (collectives per layer and pass)."""
    got = mode.report_program(config, mode.compile_target(TOPOLOGY, ""), 0)
    collectives = got["collectives"].values()
    layers = config.model.encoder.depth + config.model.decoder.depth
    return got | {
        "received": sum(each["received_bytes"] for each in collectives),
        "layer": sum(each["count"] for each in collectives) / layers,
    }


def row(name: str, got: dict[str, Any]) -> tuple[str, ...]:
    kinds = ", ".join(
        f"{kind} {each['count']} x, {each['received_bytes'] / 1e9:.3f} GB"
        for kind, each in got["collectives"].items()
    )
    return (
        name,
        f"{got['received'] / 1e9:.3f}",
        f"{got['received'] / FLOOR:.2f}",
        f"{got['layer']:.1f}",
        f"{got['flops']['ratio']:.3f}",
        f"{got['peak_bytes'] / 1e9:.2f}",
        f"{got['memory']['temporaries'] / 1e9:.2f}",
        f"{got['compile_seconds']:.0f}",
        kinds,
    )


def figures(quick: bool) -> list[Figure]:
    """For `tests.bench.report`; quick: two blocks instead of sixteen, as a functional check."""
    if importlib.util.find_spec("libtpu") is None:
        return [
            Figure("collectives of FSDP over 8 on v5e", None, note="needs libtpu: the extra tpu")
        ]
    small = ("model.encoder.depth=1", "model.decoder.depth=1") if quick else ()
    dropped = report(settings(*FSDP, *small))
    out = [
        Figure(
            "FSDP over 8 on v5e: bytes received over the floor",
            dropped["received"] / FLOOR,
            1.0,
            note=row("", dropped)[-1],
        ),
        Figure("FSDP over 8 on v5e: collectives a layer and pass", dropped["layer"], 5.0),
    ]
    if not quick:
        kept = report(settings(*FSDP, "model.keep_gathered=true"))
        out.append(
            Figure(
                "the same, gathered weights kept: bytes received over the floor",
                kept["received"] / FLOOR,
                0.75,
                note=row("", kept)[-1],
            )
        )
    return out


def main(arguments: list[str]) -> None:
    changes = [each for each in arguments if "=" in each]
    if "--remat" in arguments:
        programs = {
            remat: (f"train.batch_size={64 * DEVICES}", f"model.remat={remat}")
            for remat in ("none", "dots", "names", "half", "full")
        }
    elif arguments:
        programs = {" ".join(arguments): FSDP}
    else:
        programs = {
            "gathered twice": FSDP,
            "gathered weights kept": (*FSDP, "model.keep_gathered=true"),
        }
    for name, base in programs.items():
        print(
            text_table.text_table([row(name, report(settings(*base, *changes)))], HEADERS),
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])

"""Requirements of the dense runs of the paper's Tables 10 to 12 on accelerators that are not here:
the train step of the recipes with a ViT-B, compiled ahead of time and counted from the text of the
compiled program.

    python -m tests.bench.dense_compiled                # all: an hour of one core
    python -m tests.bench.dense_compiled remat largest

- remat: peak memory and matrix FLOPs of COCO's step by `model.remat`, two images on a v5e chip.
- largest: most images of COCO, LVIS and ADE20k on one chip, to a sixteenth.
- days: the published runs on named slices: whether they fit, and days. `at least` is the longest of
  compute, memory and network at the peak of each, without waiting.

Needs libtpu (extra tpu) and no TPU; a GPU's slice needs the extra cuda.
"""

import importlib.util
import math
import sys
from typing import Any

from m3i_jax import config as configuration
from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.modes import batch_search, show
from m3i_jax.modes import compile as mode
from m3i_jax.profiling import compile_report, hardware, topology
from m3i_jax.reporting import text_table as tables
from m3i_jax.reporting.text_table import format_bytes
from tests.bench.figures import Figure

PARTS = ("remat", "largest", "days")
HEADERS = ("figure", "measured", "target", "", "note")
RECIPES = {"Table 10, COCO": "coco", "Table 11, LVIS": "lvis", "Table 12, ADE20k": "ade20k"}
ONE_CHIP = ("v5e:1x1", "v6e:1x1", "v5p:1x1x1")
SLICES = ("v5litepod-64", "v6e-64", "v5p-32", "h100:8")  # names of `hardware.SLICES`


def settings(recipe: str, **changes: Any) -> schema.Config:
    """A recipe of configs/transfer, completed without data."""
    config = configuration.load_config(f"configs/transfer/{recipe}.py")
    configuration.apply_overrides(
        config, [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    )
    return show.assume_data(configuration.resolve(config))[0]


def compiled(target: str, config: schema.Config) -> dict[str, Any]:
    report = mode.report_program(config, mode.compile_target(target, ""), 0)
    print(compile_report.report_tables(report), flush=True)
    return report


def remat() -> list[Figure]:
    out = []
    for name in ("none", "names", "half", "full"):
        config = batch_search.with_batch(settings("coco", model__remat=name), 2)
        report = compiled("v5e:1x1", config)
        note = f"{format_bytes(report['peak_bytes'])}, FLOPs {report['flops']['ratio']:.3f}"
        share = report["peak_bytes"] / report["limit_bytes"]
        out.append(Figure(f"COCO, 2 images on v5e, remat {name}: peak", share, 1.0, note=note))
    return out


def largest() -> list[Figure]:
    out = []
    for what, recipe in RECIPES.items():
        for chip in ONE_CHIP:
            config = batch_search.with_batch(settings(recipe), 2)
            count, report, _ = mode.search_batch(config, mode.compile_target(chip, ""), 0)
            note = f"{format_bytes(report['peak_bytes'])} of {format_bytes(report['limit_bytes'])}"
            out.append(Figure(f"{what}: most images on {chip}", float(count), note=note))
    return out


def days() -> list[Figure]:
    out = []
    for what, recipe in RECIPES.items():
        for name in SLICES:
            kind, chips = {of: slice_ for of, *slice_ in hardware.SLICES}[name]
            sides = "x".join(map(str, topology.slice_shape(kind, chips)))
            try:
                report = compiled(f"{kind}:{sides}", settings(recipe))
            except UserError as error:
                out.append(Figure(f"{what} on {name}", None, note=str(error)))
                continue
            share = (report["peak_bytes"] or math.inf) / report["limit_bytes"]
            run = report.get("run", {})
            note = f"{report['batch_per_device']} images a chip" + (
                f"; {run['days']:.2f} days at least, {run['days_at_mfu']:.2f} at"
                f" {run['mfu']:.0%} of the peak"
                if run
                else ""
            )
            out.append(Figure(f"{what} on {name}: peak over a chip's", share, 1.0, note=note))
    return out


def figures(quick: bool, parts: tuple[str, ...] = ("remat",)) -> list[Figure]:
    """For `tests.bench.report`, one of the parts; quick: one small compilation."""
    if importlib.util.find_spec("libtpu") is None:
        what = "dense runs compiled for TPUs that are not here"
        return [Figure(what, None, note="needs libtpu: the extra tpu")]
    if quick:
        small = settings(
            "coco",
            data__image_size=128,
            model__encoder__depth=2,
            model__scan="false",
            dense__maps__global_blocks="(1,)",
        )
        report = compiled("v5e:1x1", batch_search.with_batch(small, 2))
        share = report["peak_bytes"] / report["limit_bytes"]
        return [Figure("COCO at toy size, v5e chip: peak over what it has", share, 1.0)]
    out = []
    for part in parts:
        out += (rows := {"remat": remat, "largest": largest, "days": days}[part]())
        # printed at once, so that a later failure loses nothing
        print(tables.text_table([figure.cells for figure in rows], HEADERS), flush=True)
    return out


if __name__ == "__main__":
    figures(False, tuple(sys.argv[1:]) or PARTS)

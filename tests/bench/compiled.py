"""Requirements of the ViT-B/16 train step on TPUs: compiled ahead of time, without a TPU, and
counted from the text of the compiled program.

    python -m tests.bench.compiled              # all, about thirty compilations
    python -m tests.bench.compiled slice chips  # slice, largest, loop, depth, scaling, chips

- slice: the paper's batch on v5e:4x4 in 4 microbatches.
- largest: most views on one v5e chip at no more than 1.10 times the model's FLOPs without
  microbatches and 1.02 times in four, by bisection over multiples of 64; and its peak memory over
  state, batch and residuals.
- loop: temporaries at 64 views over those of a loop over blocks that keeps autodiff's residuals.
- depth: compile time of an encoder of 48 blocks over that of 12, each the least of three. It
  generates code too, which takes minutes.
- scaling: FLOPs per device at 8, 64 and 256 chips with equal views per chip.
- chips: whether the paper's batch of ViT-B and ViT-L fits on slices of v5p and v6e, and days.

Needs libtpu (extra tpu), no TPU.
"""

import importlib.util
import math
import sys
from typing import Any

from m3i_jax import config as configuration
from m3i_jax import schema
from m3i_jax.modes import batch_search, show
from m3i_jax.modes import compile as mode
from m3i_jax.profiling import compile_report
from m3i_jax.reporting import text_table as tables
from m3i_jax.reporting.text_table import format_bytes
from tests.bench.figures import Figure

COLORLESS = {"jitter_p": "0", "grayscale_p": "0", "blur_p": "(0.0,0.0)", "solarize_p": "(0.0,0.0)"}
STEP = 64  # views per chip
PARTS = ("slice", "largest", "loop", "depth", "scaling", "chips")
SLICES = ("v5p:2x2x4", "v6e:4x4")
HEADERS = ("figure", "measured", "target", "", "note")


def settings(model: str = "vit_b16", **changes: Any) -> schema.Config:
    """The paper's ImageNet run with blocks in one scan."""
    config = configuration.load_config(f"configs/m3i.py:data=imagenet,model={model}")
    keys = {"model.scan": "true"} | {
        key.replace("__", "."): str(value) for key, value in changes.items()
    }
    configuration.apply_overrides(config, [f"{key}={value}" for key, value in keys.items()])
    return show.assume_data(configuration.resolve(config))[0]


def plain(model: str = "vit_b16", **changes: Any) -> schema.Config:
    """The same without photometric augmentation, which takes a third of the compile time and does
    not affect the figures."""
    return settings(
        model, **{f"data__augment__{key}": value for key, value in COLORLESS.items()}, **changes
    )


def got(topology: str, config: schema.Config, *, code: bool = False) -> dict[str, Any]:
    report = mode.report_program(config, mode.compile_target(topology, "", code=code), 0)
    print(compile_report.report_tables(report), flush=True)
    return report


def the_slice() -> list[Figure]:
    report = got("v5e:4x4", settings(model__remat="names", train__microbatches=4))
    share = report["peak_bytes"] / report["limit_bytes"]
    note = (
        f"256 views a chip in 4 microbatches, remat names, FLOPs {report['flops']['ratio']:.3f}"
        " times the model's"
    )
    return [
        Figure("v5e:4x4, ImageNet, 4,096 images: peak over what a chip has", share, 1.0, note=note)
    ]


def largest() -> list[Figure]:
    out = []
    for name, parts, most, remat in (
        ("in one", 1, 1.10, "half"),
        ("in four microbatches", 4, 1.02, "names"),
    ):
        tried: dict[int, dict[str, Any]] = {}

        def attempt(
            units: int,
            parts: int = parts,
            most: float = most,
            remat: str = remat,
            tried: Any = tried,
        ) -> batch_search.CompileTrial:
            config = settings(
                train__batch_size=units * STEP, train__microbatches=parts, model__remat=remat
            )
            report = tried[units] = got("v5e:1x1", config)
            cheap = "flops" in report and report["flops"]["ratio"] <= most
            fixed = sum(report["memory"].get(part, 0.0) for part in compile_report.STATE)
            # the compiler does not always report the required size
            peak = report["peak_bytes"] or math.nan
            return batch_search.CompileTrial(
                fits=report["fits"] and cheap, peak=peak, fixed=fixed, limit=report["limit_bytes"]
            )

        largest_count = batch_search.largest_batch(attempt, 256 // STEP)
        best = tried.get(largest_count)
        note = (
            f"FLOPs {best['flops']['ratio']:.3f} times the model's, remat {remat}" if best else ""
        )
        what = f"v5e chip: largest ViT-B batch {name}, FLOPs at most {most}"
        out.append(Figure(what, float(largest_count * STEP), 256.0, most=False, note=note))
        if best:
            note = f"{format_bytes(best['peak_bytes'])} at {largest_count * STEP} views"
            out.append(
                Figure(
                    f"the same: peak over state, batch and residuals, {name}",
                    best["peak_ratio"],
                    1.15,
                    note=note,
                )
            )
    return out


def loop() -> list[Figure]:
    named = got("v5e:1x1", plain(train__batch_size=64, model__remat="names"))
    plainly = got("v5e:1x1", plain(train__batch_size=64, model__scan="false"))
    share = named["memory"]["temporaries"] / plainly["memory"]["temporaries"]
    each = (
        f"{format_bytes(named['memory']['temporaries'])} over"
        f" {format_bytes(plainly['memory']['temporaries'])}"
    )
    return [
        Figure(
            "64 views on v5e: temporaries, scan with remat names over a loop without",
            share,
            0.85,
            note=each,
        ),
        Figure(
            "the same: matrix FLOPs",
            named["flops"]["compiled"] / plainly["flops"]["compiled"],
            1.02,
        ),
    ]


def chips() -> list[Figure]:
    out = []
    for model in ("vit_b16", "vit_l16"):
        for name in SLICES:
            report = got(name, plain(model, model__remat="names"))
            days = (
                f"{report['run']['days_at_mfu']:,.1f} days at {report['run']['mfu']:.0%} of the"
                " peak"
                if "run" in report
                else ""
            )
            note = f"{report['batch_per_device']} views a chip in one, {days}"
            share = (report["peak_bytes"] or math.inf) / report["limit_bytes"]
            out.append(
                Figure(
                    f"{name}, ImageNet, 4,096 images, {model}: peak over what a chip has",
                    share,
                    1.0,
                    note=note,
                )
            )
    return out


def depth() -> list[Figure]:
    seconds: dict[int, list[float]] = {12: [], 48: []}
    for layers in (12, 48) * 3:  # in turns, so that other load affects both equally
        config = plain(model__encoder__depth=layers, train__batch_size=2, model__remat="names")
        seconds[layers].append(got("v5e:1x1", config, code=True)["compile_seconds"])
        print(f"{layers} blocks: compiled in {seconds[layers][-1]:.1f} s", flush=True)
    least = {layers: min(each) for layers, each in seconds.items()}
    note = f"{least[48]:.1f} s over {least[12]:.1f} s, best of three"
    return [Figure("compile time, 48 blocks over 12", least[48] / least[12], 1.3, note=note)]


def scaling() -> list[Figure]:
    each = {}
    for name, chips in (("v5e:2x4", 8), ("v5e:8x8", 64), ("v5e:16x16", 256)):
        each[chips] = got(name, plain(train__batch_size=2 * chips, model__remat="names"))["flops"][
            "compiled"
        ]
    note = ", ".join(f"{chips}: {count / 1e9:,.2f} GFLOP" for chips, count in each.items())
    return [
        Figure(
            f"FLOPs of a device at {chips} chips over those at 8, off 1 by",
            abs(each[chips] / each[8] - 1),
            0.01,
            note=note,
        )
        for chips in (64, 256)
    ]


def figures(quick: bool, parts: tuple[str, ...] = PARTS) -> list[Figure]:
    """For `tests.bench.report`; quick: one small compilation."""
    if importlib.util.find_spec("libtpu") is None:
        return [
            Figure("compiled for TPUs that are not here", None, note="needs libtpu: the extra tpu")
        ]
    if quick:
        small = plain(train__batch_size=8, model__encoder__depth=1, model__decoder__depth=1)
        return [
            Figure(
                "v5e chip: peak over what it has, toy",
                (r := got("v5e:1x1", small))["peak_bytes"] / r["limit_bytes"],
                1.0,
            )
        ]
    runners = {
        "slice": the_slice,
        "largest": largest,
        "loop": loop,
        "depth": depth,
        "scaling": scaling,
        "chips": chips,
    }
    out = []
    for part in parts:
        out += (rows := runners[part]())
        # printed at once, so that a later failure loses nothing
        print(tables.text_table([figure.cells for figure in rows], HEADERS), flush=True)
    return out


if __name__ == "__main__":
    figures(False, tuple(sys.argv[1:]) or PARTS)

"""The model card of exported weights: what they are, what they were trained on and how well they
did, from what the run wrote down."""

import json
import pathlib

from m3i_jax import config as configuration
from m3i_jax import schema
from m3i_jax.evaluation.load import LoadedEncoder
from m3i_jax.models import backbones
from m3i_jax.version import __version__


def model_card_text(model: LoadedEncoder, workdir: pathlib.Path, format: str) -> str:
    """Markdown: the encoder, its pixels, data with fingerprint, metrics, licence, and every setting
    that is not at its default."""
    c = model.config
    e, a = c.model.encoder, c.data.augment
    licence = c.report.licence or (
        "not stated. The code that made them is Apache-2.0; whoever publishes them says under which"
        " licence (config.report.licence), and whether the data allow it"
    )
    rows = [
        (
            "weights",
            (
                f"{model.name.replace(str(workdir), workdir.name)}, written as {format} by m3i_jax"
                f" {__version__}"
            ),
        ),
        (
            "encoder",
            (
                f"{c.model.backbone}, patch {e.patch_size},"
                f" {backbones.get_backbone(c.model).describe(c.model)}"
            ),
        ),
        *backbones.get_backbone(c.model).card(c.model),
        (
            "input",
            (
                f"RGB, {c.data.image_size} x {c.data.image_size}, (x / 255 - mean) / std with mean"
                f" {a.mean} and std {a.std}"
            ),
        ),
        (
            "pictures",
            (
                f"short side resized to {model.preprocessing.short_side}, bicubic, centre cut out"
                f" (evaluate.crop={c.evaluate.crop:g})"
            ),
        ),
        ("objective", " + ".join(c.objective.forms)),
        ("licence", licence),
    ]
    lines = [
        "# Model card",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        "## Data",
        "",
    ]
    lines += [
        *_data(c, workdir),
        "",
        "## Metrics",
        "",
        *_metrics(workdir),
        "",
        "## Settings that are not at their default",
        "",
        "```text",
    ]
    return "\n".join([*lines, *_changed(c), "```", ""])


def _data(c: schema.Config, workdir: pathlib.Path) -> list[str]:
    file = workdir / "data.txt"
    told = (
        [f"- {line}" for line in file.read_text().splitlines()]
        if file.is_file()
        else ["- the run kept no data.txt"]
    )
    return [f"{c.data.classes} categories, captions: {c.data.captions}.", "", *told]


def _metrics(workdir: pathlib.Path) -> list[str]:
    """The last value of every loss and evaluation in the log, and what --mode=eval has measured of
    the run since."""
    file = workdir / "metrics.jsonl"
    last: dict[str, tuple[int, float]] = {}
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a run that was killed
            continue
        for name, value in row.items():
            if name.split("/")[0] in ("loss", "eval", "info", "collapse") and isinstance(
                value, int | float
            ):
                last[name] = (row["step"], value)
    file = workdir / "eval.json"
    alone = json.loads(file.read_text()) if file.is_file() else {}
    # and not of other weights
    if (
        pathlib.Path(alone.get("checkpoint", "")).parent.resolve()
        == (workdir / "checkpoints").resolve()
    ):
        found = {
            f"{name}, {alone['encoder']}": value
            for one in alone["results"].values()
            for name, value in one.items()
        }
        last |= {f"{name} (--mode=eval)": (alone["step"], value) for name, value in found.items()}
    if not last:
        return ["The run wrote none."]
    return [
        "| metric | last value | step |",
        "|---|---|---|",
        *(f"| {name} | {value:.4g} | {step} |" for name, (step, value) in last.items()),
    ]


def _changed(c: schema.Config) -> list[str]:
    usual = configuration.config_to_text(schema.Config()).splitlines()
    return [
        line
        for line, other in zip(configuration.config_to_text(c).splitlines(), usual, strict=True)
        if line != other
    ]

"""The model card of exported weights, README.md beside them: model, use, data, metrics and
settings, from the files of the run. It names no directory of this machine, and begins with the
metadata that the Hugging Face Hub reads."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from m3i_jax import config as configuration
from m3i_jax import schema
from m3i_jax.data.preprocessing import RESIZING
from m3i_jax.evaluation.load import LoadedEncoder
from m3i_jax.evaluation.load_dense import LoadedDense
from m3i_jax.models import backbones
from m3i_jax.reporting import run_log
from m3i_jax.schema.limits import TextLimit
from m3i_jax.version import __version__

FILE = "README.md"
# an absolute path, or one from the home directory, and not the rest of a URL
_PATH = re.compile(r"(?<![\w:/.~\-^])(?:~|\.{1,2})?/(?:[^\s'\",;|/]+/)*([^\s'\",;|/]+)/?")
# formats that `m3i_jax.load` reads, of an encoder and of a detector or segmenter
_READ_BACK, _DENSE_READ_BACK = ("timm", "hf", "orbax"), ("npz", "orbax")
_SOURCES = ("data.mixture", "curate.against")  # settings of entries KIND:PATH
_PIPELINE = {"detect": "object-detection", "segment": "image-segmentation"}
_LIBRARY = {"timm": "timm", "hf": "transformers"}


def model_card_text(model: LoadedEncoder | LoadedDense, workdir: pathlib.Path, format: str) -> str:
    """Returns Markdown: metadata, model, preprocessing, use, data with fingerprint, metrics,
    licence, and every setting that is not at its default."""
    c = model.config
    licence = c.report.licence or (
        "not stated. The code is Apache-2.0; set the licence of the weights by"
        " config.report.licence before you publish them, if the licences of the data allow it"
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
                f"{c.model.backbone}, patch {c.model.encoder.patch_size},"
                f" {backbones.get_backbone(c.model).describe(c.model)}"
            ),
        ),
        *backbones.get_backbone(c.model).card(c.model),
        *(_dense_rows(model) if isinstance(model, LoadedDense) else _encoder_rows(model)),
        ("licence", licence),
    ]
    lines = [
        *_metadata(c, format),
        "# Model card",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        *_use(c.task, format),
        "## Data",
        "",
    ]
    lines += [
        *_data(c, workdir),
        "",
        "## Metrics",
        "",
        *_metrics(workdir, c.evaluate),
        "",
        "## Settings that are not at their default",
        "",
        "```text",
    ]
    return without_directories("\n".join([*lines, *_changed(c), "```", ""]), configured_paths(c))


def _encoder_rows(model: LoadedEncoder) -> list[tuple[str, str]]:
    c = model.config
    side, a = c.data.image_size, c.data.augment
    return [
        (
            "input",
            (f"RGB, {side} x {side}, (x / 255 - mean) / std with mean {a.mean} and std {a.std}"),
        ),
        (
            "preprocessing",
            (
                f"{model.preprocessing.resized_side} resized to"
                f" {model.preprocessing.short_side}, {model.preprocessing.interpolation}, centre"
                f" crop (evaluate.crop={c.evaluate.crop:g})"
            ),
        ),
        ("objective", " + ".join(c.objective.forms)),
    ]


def _dense_rows(model: LoadedDense) -> list[tuple[str, str]]:
    c, a = model.config, model.config.data.augment
    head = c.dense.detect.head if c.task == "detect" else c.dense.segment.head
    more = ", ..." if len(model.names) > 10 else ""
    return [
        ("task", f"{c.task}, by {head}"),
        ("classes", f"{len(model.names)}: {', '.join(model.names[:10])}{more}"),
        (
            "input",
            (
                f"RGB, {c.data.image_size} pixels, scaled by `m3i_jax.load` and, in the model,"
                f" normalised with mean {a.mean} and std {a.std}"
            ),
        ),
    ]


def portable_settings(c: schema.Config) -> str:
    """Returns the text of settings with the last part of each path of this machine in the place of
    the path.

    >>> data = schema.Data(path="/data/me/my photos", split="train")
    >>> text = portable_settings(schema.Config(data=data))
    >>> "data.path = 'my photos'" in text, "data.split = 'train'" in text
    (True, True)
    """
    return configuration.config_to_text(_with_paths(c, _last_part))


def _with_paths(node: Any, change: Callable[[str, str], str], prefix: str = "") -> Any:
    """Returns settings with change(key, value) in the place of each value that names a path."""
    new: dict[str, Any] = {}
    for field in dataclasses.fields(node):
        value, key = getattr(node, field.name), prefix + field.name
        limits = field.metadata.get("limits")
        if dataclasses.is_dataclass(value):
            new[field.name] = _with_paths(value, change, key + ".")
        elif isinstance(limits, TextLimit) and limits.kind == "path":
            several = not isinstance(value, str)
            values = tuple(change(key, each) for each in (value if several else (value,)))
            new[field.name] = values if several else values[0]
    return dataclasses.replace(node, **new)


def _last_part(key: str, value: str) -> str:
    kind, colon, path = value.partition(":") if key in _SOURCES else ("", "", value)
    local = "/" in path and "://" not in path
    return f"{kind}{colon}{pathlib.PurePosixPath(path).name}" if local else value


def without_directories(text: str, paths: Iterable[str] = ()) -> str:
    """Returns the text with the last part of each path of this machine in place of the path.

    Args:
      text: to change.
      paths: relative paths, which the text alone does not tell from other words with a slash.

    >>> without_directories("folder '/data/me/photos', gs://bucket/x, 4/3, x / 255, ^encoder/")
    "folder 'photos', gs://bucket/x, 4/3, x / 255, ^encoder/"
    >>> without_directories("data.path = 'mine/photos'", ["mine/photos"])
    "data.path = 'photos'"
    """
    for path in sorted(paths, key=len, reverse=True):
        text = text.replace(path, pathlib.PurePosixPath(path).name)
    return _PATH.sub(lambda match: match[1], text)


def configured_paths(c: schema.Config) -> set[str]:
    """Returns the paths of this machine that the settings name."""
    given: set[str] = set()

    def note(key: str, value: str) -> str:
        given.add(re.sub("=[^=/]*$", "", value.partition(":")[2]) if key in _SOURCES else value)
        return value

    _with_paths(c, note)
    return {path for path in given if "/" in path and "://" not in path}


def _metadata(c: schema.Config, format: str) -> list[str]:
    """The YAML that the Hub reads."""
    name = c.report.licence
    known = re.fullmatch(r"[A-Za-z0-9.-]+", name)
    licence = [f"license: {name.lower()}"] if known else []
    if name and not known:
        licence = ["license: other", f"license_name: {json.dumps(name)}"]
    return [
        "---",
        f"library_name: {_LIBRARY.get(format, 'jax')}",
        *licence,
        f"pipeline_tag: {_PIPELINE.get(c.task, 'image-feature-extraction')}",
        "tags:",
        "- m3i",
        "- jax",
        "---",
        "",
    ]


def _use(task: str, format: str) -> list[str]:
    """How to compute features or predictions, if this package reads directories of the format."""
    if format not in (_DENSE_READ_BACK if task in _PIPELINE else _READ_BACK):
        return []
    call = f"found = model.{task}" if task in _PIPELINE else "vectors = model.features"
    return [
        "## Use",
        "",
        "With m3i_jax (`pip install 'm3i-jax[hub]'`):",
        "",
        "```python",
        "import m3i_jax",
        "",
        'model = m3i_jax.load("hf://OWNER/NAME")  # or the path of this directory',
        f'{call}("DIRECTORY_OF_IMAGES")',
        "```",
        "",
    ]


def _data(c: schema.Config, workdir: pathlib.Path) -> list[str]:
    file = workdir / "data.txt"
    lines = (
        [f"- {line}" for line in file.read_text().splitlines()]
        if file.is_file()
        else ["- the run has no data.txt"]
    )
    return [f"{c.data.classes} categories, captions: {c.data.captions}.", "", *lines]


def _settings_other(used: Mapping[str, Any], asked: schema.Evaluate) -> str:
    """Settings of an evaluation that are not those of the export, behind the name of a metric.

    >>> _settings_other({"encoder": "ema", "crop": 1.0, "squash": True}, schema.Evaluate(crop=1.0))
    ', encoder=ema, squash=true'
    """
    other = {name: value for name, value in used.items() if value != getattr(asked, name)}
    return "".join(
        f", {name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in other.items()
    )


def _metrics(workdir: pathlib.Path, asked: schema.Evaluate) -> list[str]:
    """The last value of every loss and evaluation metric in the log, and the results of --mode=eval
    for the run; with the settings that they were measured by where the export has others."""
    file = workdir / "metrics.jsonl"
    other = ""
    if file.is_file():
        own = configuration.load_from_workdir(str(workdir), "--workdir").evaluate
        other = _settings_other({name: own[name] for name in ("encoder", *RESIZING)}, asked)
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
                last[name + (other if name.startswith("eval/") else "")] = (row["step"], value)
    file = workdir / "eval.json"
    evaluation = json.loads(file.read_text()) if file.is_file() else {}
    # only results of this run, not of other weights
    if (
        pathlib.Path(evaluation.get("checkpoint", "")).parent.resolve()
        == (workdir / "checkpoints").resolve()
    ):
        seen = evaluation.get("preprocessing", {})
        used = {name: seen[name] for name in RESIZING if name in seen}
        other_eval = _settings_other(used, asked)
        cut = run_log.image_counts(evaluation, cut=True).items()
        how = "; ".join(["--mode=eval", *(f"{part} {count} images" for part, count in cut)])
        results = {
            f"{name}, {evaluation['encoder']}{other_eval}": value
            for metrics in evaluation["results"].values()
            for name, value in metrics.items()
        }
        last |= {f"{name} ({how})": (evaluation["step"], value) for name, value in results.items()}
    if not last:
        return ["The run has no metrics."]
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

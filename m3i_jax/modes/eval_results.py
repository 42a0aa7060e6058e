"""The results of --mode=eval: their file, the directory it lies in, and their table."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from m3i_jax import run_files
from m3i_jax.data.sources import base
from m3i_jax.errors import UserError
from m3i_jax.modes import eval_data
from m3i_jax.reporting import run_log, text_table
from m3i_jax.run_files import write_json_atomic

RESULT = "eval.json"
Values = dict[str, dict[str, float]]  # of each evaluator: its metrics


def weight_files(path: str) -> list[str]:
    """Returns name, size and time of a file of weights, or of the files of a directory but for
    results: what changes where weights are written anew. [] if nothing is there."""
    place = pathlib.Path(path)
    files = sorted(place.iterdir()) if place.is_dir() else [place]
    return [
        f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}"
        for file in files
        if file.is_file() and file.name != RESULT
    ]


@dataclasses.dataclass
class Results:
    """Results of an evaluation so far.

    Attributes:
      about: the header of the file; see `eval_header`.
      classes: number of categories of the data, for chance.
      values: of the trained weights.
      untrained: of the initial weights of the same network; {} if they are not evaluated.
      skipped: reason -> number of images that could not be read.
    """

    about: dict[str, Any]
    classes: int
    values: Values = dataclasses.field(default_factory=dict)
    untrained: Values = dataclasses.field(default_factory=dict)
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def chance(self) -> dict[str, float]:
        """Values that guessing yields, of the metrics for which that is defined."""
        named = {name: eval_data.chance_of(name, self.classes) for name in flat(self.values)}
        return {name: value for name, value in named.items() if value is not None}

    def count_skipped(self, counts: Mapping[str, int]) -> None:
        """Add images that could not be read. The image sets of an evaluation may be read again, by
        a resumed command or for other weights: of one reason, the larger number counts."""
        larger = {reason: max(n, self.skipped.get(reason, 0)) for reason, n in counts.items()}
        self.skipped = self.skipped | larger

    def write(self, path: pathlib.Path) -> None:
        """Write the file of results."""
        content = {**self.about, "results": self.values}
        if self.untrained:
            content["untrained"] = self.untrained
        if chance := self.chance:
            content |= {"classes": self.classes, "chance": chance}
        content["skipped"] = {reason: n for reason, n in self.skipped.items()}
        write_json_atomic(path, content, noted=True)

    def text(self) -> str:
        """Returns weights, data and all values as a table."""
        about, chance, untrained = self.about, self.chance, flat(self.untrained)
        counts = run_log.image_counts(about)
        data = "; ".join(
            f"{name} {counts[name]} of {part['name']}, {part['fingerprint']}"
            for name, part in about["data"].items()
        )
        if self.classes:
            data += f"; {self.classes:,} categories"
        columns = {"value": flat(self.values), "untrained": untrained, "chance": chance}
        columns = {name: values for name, values in columns.items() if values}
        rows = [
            (
                name,
                *(f"{part[name]:.4f}" if name in part else "" for part in columns.values()),
            )
            for name in flat(self.values)
        ]
        table = text_table.text_table(rows, ("what", *columns))
        return (
            f"step {about['step']:,} of {about['checkpoint']}, {about['encoder']} parameters;"
            f" accuracies are fractions\n{data}\n\n{table}"
        )


def flat(values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Returns the metrics of all evaluators as one dict.

    >>> flat({"knn": {"eval/knn/top1": 0.5}, "probe": {}})
    {'eval/knn/top1': 0.5}
    """
    return {name: value for metrics in values.values() for name, value in metrics.items()}


def result_dir(
    workdir: pathlib.Path, about: Mapping[str, Any], *, began: bool, name: str, of_run: bool
) -> pathlib.Path:
    """Returns the directory of results that are not those of the run in a working directory.

    Args:
      workdir: the working directory.
      about: see `Results`.
      began: the working directory has a run. If not, it may itself be the directory, unless it has
        results of something else.
      name: a short name of the data, given by --data; "": the directory is named by digits.
      of_run: the weights are those of the run, of which a later step replaces an earlier one.
    """
    if not name and not began and _of_same(workdir / RESULT, about, ("checkpoint", "data")):
        return workdir
    digits = base.stable_digest(json.dumps([about["data"], about["checkpoint"]], sort_keys=True))
    directory = workdir / f"eval-{digits[:8]}"
    if name:
        directory = workdir / f"eval-{name}"
        # other data of the same name, or other weights, do not replace these
        if not _of_same(directory / RESULT, about, ("data",) if of_run else ("checkpoint", "data")):
            directory = workdir / f"eval-{name}-{digits[:8]}"
    if not jax.process_index():
        directory.mkdir(mode=0o700, exist_ok=True)
    return directory


def _of_same(path: pathlib.Path, about: Mapping[str, Any], keys: tuple[str, ...]) -> bool:
    return earlier_results(path, {key: about[key] for key in keys}) is not None


def earlier_results(path: pathlib.Path, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the content of a result file whose header equals `about`; {} without a readable file,
    None if the header differs."""
    if not path.is_file():
        return {}
    try:
        saved = run_files.read_run_json(path)
    except (OSError, UserError) as error:
        print(f"warning: {error}: all evaluators run again", flush=True)
        return {}
    return saved if all(saved.get(key) == value for key, value in about.items()) else None


def read_earlier(path: pathlib.Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parts of a result file to continue, "results", "untrained" and "skipped"; empty
    ones if its header is another."""
    saved = earlier_results(path, about) or {}
    parts: dict[str, dict[str, Any]] = {}
    for part in ("results", "untrained", "skipped"):
        known = saved.get(part)
        parts[part] = known if isinstance(known, dict) else {}
    return parts

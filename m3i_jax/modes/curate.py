"""--mode=curate: decide which records of a source to train on.

Writes WORKDIR/keep.parquet (a keep-list, for data.keep, with the scores of each record),
left_out.parquet (key, reason, copy_of, scores), curate.json and curate.html. Descriptions of the
records are kept in WORKDIR/descriptions, so the same command goes on where it was stopped, and
other rules need not read the images again."""

import collections
import dataclasses
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from m3i_jax import interrupts, progress, schema
from m3i_jax.data import curation, dataset_scan, decode, engines, near_duplicates, splits
from m3i_jax.data.cores import usable_cores
from m3i_jax.data.record_batches import record_key
from m3i_jax.data.sources import base, keep_list, mixture, registry, score_table
from m3i_jax.errors import UserError
from m3i_jax.modes import features as feature_mode
from m3i_jax.modes.setup import index_directory, lock_workdir, make_workdir
from m3i_jax.reporting import data_page
from m3i_jax.run_files import write_json_atomic, write_text_atomic

EXAMPLES = 12  # of each reason on the page
_READ = ("key", "weight", "caption", "label")  # columns of a keep-list that a training reads
_MEASURED = ("sharpness", "entropy")  # columns of both lists
_OWN = ("key", *_MEASURED, "reason", "copy_of", "difference")  # that no score may replace
# of an outage perhaps: read again by the next command
_AGAIN = [decode.REASONS.index(reason) for reason in (decode.UNREADABLE, decode.UNREACHABLE)]
QUANTILES = (0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0)  # of scores on the page


def run(config: schema.Config, *, workdir: str, engine: str = "") -> int:
    engine = engine or "local"
    if engine not in engines.ENGINES:
        raise UserError(f"--engine={engine[:60]}: is not one of {', '.join(engines.ENGINES)}")
    keep_list.arrow_library()  # before the images are read
    if config.data.source == "mixture":
        raise UserError(
            "data.source='mixture': curate each source by itself, the others as curate.against, and"
            " give their keep-lists to data.keep"
        )
    directory, rules = pathlib.Path(workdir), config.curate
    workers = config.data.workers or usable_cores()

    def mapper(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        return engines.map_items(engine, function, items, workers=workers, directory=str(directory))

    make_workdir(directory)
    with lock_workdir(directory), interrupts.raise_interrupts():
        for files in directory.glob(f"{engines.TEMPORARY}*"):  # of a process that was killed
            shutil.rmtree(files)
        source = splits.open_source(config.data, cache=index_directory(config.data, directory))
        print(source.description(), flush=True)
        scores = _scores(source, rules)  # as all files here, refused before the images are read
        features = _features(source, rules)
        of_sets = dataclasses.replace(config.data, class_names="")
        sources = _open_evaluation(rules, of_sets, index_directory(config.data, directory))
        facts = _describe(source, config.data, directory, mapper)
        sets = [
            curation.EvaluationSet(each.name, _describe(each, of_sets, directory, mapper), each)
            for each in sources
        ]
        done = curation.decide(
            facts,
            rules,
            mapper,
            evaluation=sets,
            features=features,
            scores=scores,
            source=source,
            background=config.data.background,
        )
        scores = {name: facts[name] for name in _MEASURED} | scores
        report = _report(source, rules, done, sets, engine)
        report["scores"] = {name: _quantiles(scores[name], done.kept) for name in scores}
        _write_lists(source, done, sources, directory, scores)
        write_json_atomic(directory / "curate.json", report)
        examples = _examples(source, sources, facts, done, config.data)
        page = data_page.curation_page_html(report, examples)
        write_text_atomic(directory / "curate.html", page)
    for reason, count in report["left_out"].items():
        print(f"{count:>12,} {reason}")
    print(
        f"{report['kept']:>12,} of {report['records']:,} are kept: train on them with"
        f" --config.data.keep={directory / 'keep.parquet'}\n{directory / 'curate.html'}"
    )
    return 0


def _open_evaluation(rules: schema.Curate, data: schema.Data, cache: str) -> list[base.DataSource]:
    """Opens the evaluation sets of curate.against."""
    sources = []
    for text in rules.against:
        try:
            entry = mixture.parse_entry(text)
        except UserError as error:
            raise UserError(str(error).replace("data.mixture", "curate.against", 1)) from None
        sources.append(registry.open_kind(entry.kind, entry.path, entry.split, data, cache=cache))
    return sources


def _describe(
    source: base.DataSource,
    data: schema.Data,
    directory: pathlib.Path,
    mapper: curation.Mapper,
) -> dict[str, np.ndarray]:
    """The descriptions of all records; those of an earlier start are read. Chunks with records that
    could not be read then are described again: the disk or the network may be back."""
    describer = curation.RecordDescriber(source, data.background, data.missing)
    folder = directory / "descriptions" / describer.identity()
    facts: dict[str, np.ndarray] = {}  # filled chunk by chunk, in memory once

    def fill(chunk: int, arrays: dict[str, np.ndarray]) -> None:
        start = chunk * curation.CHUNK
        for name, values in arrays.items():
            if name not in facts:
                facts[name] = np.empty((len(source), *values.shape[1:]), values.dtype)
            facts[name][start : start + len(values)] = values

    todo = []
    for chunk in range(describer.chunks()):
        arrays = base.load_arrays(str(folder / f"{chunk:06d}.npz"))
        if arrays is not None and not np.isin(arrays["reason"], _AGAIN).any():
            fill(chunk, arrays)
        else:
            todo.append(chunk)
    described = progress.track_progress(
        mapper(describer, todo), f"reading {source.name}", len(todo), "chunks"
    )
    for chunk, arrays in zip(todo, described, strict=True):
        base.save_arrays(str(folder / f"{chunk:06d}.npz"), **arrays)
        fill(chunk, arrays)
    return facts


def _scores(source: base.DataSource, rules: schema.Curate) -> dict[str, np.ndarray]:
    """The columns of curate.scores by record.

    Raises:
      UserError: a column has the name of one that curation writes itself; or see `read_scores`.
    """
    names = list(curation.least_scores(rules))
    if rules.scores:
        scores = score_table.read_scores(source, rules.scores, names)
        if taken := [name for name in scores if name in _OWN]:
            raise UserError(
                f"curate.scores={rules.scores!r}: its column {taken[0]!r} has the name of one that"
                " curation writes itself: rename it, or name in curate.least the columns to read"
            )
        return scores
    if names:
        raise UserError(
            f"curate.least names {names[0]!r}, and curate.scores no file with that column"
        )
    return {}


def _quantiles(values: np.ndarray, kept: np.ndarray) -> dict[str, list[float]]:
    """The quantiles QUANTILES of all records and of those that are kept."""
    rows = {"all": values[np.isfinite(values)], "kept": values[kept][np.isfinite(values[kept])]}
    return {
        name: [round(float(value), 3) for value in np.quantile(each, QUANTILES)]
        for name, each in rows.items()
        if each.size
    }


def _features(source: base.DataSource, rules: schema.Curate) -> np.ndarray | None:
    """The features of a file by record, of norm 1; zeros where the file has none."""
    path = rules.features
    if not path:
        return None
    if not os.path.isfile(path):
        raise UserError(f"curate.features={path!r}: there is no such file; see --mode=features")
    try:
        columns, _ = feature_mode.read_feature_file(path)
    except UserError as error:
        raise UserError(f"curate.features={error}") from None
    rows = {key: row for row, key in enumerate(columns["keys"].tolist())}
    place = np.array([rows.get(record_key(source, i), -1) for i in range(len(source))])
    if (place < 0).all():
        raise UserError(
            f"curate.features={path!r}: none of its keys is in {source.name}: write it from this"
            " source"
        )
    if rules.duplicates != "none" and curation.needs_faiss(rules, int((place >= 0).sum())):
        near_duplicates.faiss_library()
    table = columns["features"].astype(np.float32)
    table /= np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    return np.where(place[:, None] >= 0, table[place], 0)


def _report(
    source: base.DataSource,
    rules: schema.Curate,
    done: curation.Decisions,
    sets: Sequence[curation.EvaluationSet],
    engine: str,
) -> dict[str, Any]:
    counts = collections.Counter(done.reason[done.reason >= 0].tolist())
    return {
        "source": source.name,
        "description": source.description(),
        "fingerprint": source.fingerprint(),
        "records": len(source),
        "kept": len(done.kept),
        "left_out": {curation.REASONS[i]: counts[i] for i in sorted(counts)},
        "evaluation": {
            each.name: {
                "images": len(each.facts["reason"]),
                "copies": int((done.evaluation == number).sum()),
            }
            for number, each in enumerate(sets)
        },
        "rules": dataclasses.asdict(rules),
        "engine": engine,
    }


def _write_lists(
    source: base.DataSource,
    done: curation.Decisions,
    sources: Sequence[base.DataSource],
    directory: pathlib.Path,
    scores: dict[str, np.ndarray],
) -> None:
    weights = getattr(source, "record_weights", None)
    keys: dict[str, int] = {}  # records with the same key are kept together
    for row in done.kept.tolist():
        keys.setdefault(base.source_key(source, row), row)
    rows = np.array(list(keys.values()), np.int64)
    columns = {name: scores[name][rows] for name in scores if name not in _READ}
    if weights is not None:
        columns["weight"] = weights[rows]
    keep_list.write_keep_list(str(directory / "keep.parquet"), list(keys), **columns)
    out = np.flatnonzero(done.reason >= 0).tolist()
    copies = [
        ""
        if done.of[row] < 0
        else record_key(_source_of(row, source, sources, done), int(done.of[row]))
        for row in out
    ]
    keep_list.write_keep_list(
        str(directory / "left_out.parquet"),
        [record_key(source, row) for row in out],
        reason=[curation.REASONS[done.reason[row]] for row in out],
        copy_of=[copy.encode("utf-8", "replace").decode() for copy in copies],
        difference=done.difference[out],
        **{name: scores[name][out] for name in scores if name not in _READ},
    )
    if isinstance(source, keep_list.KeptSource) and source.replaces:
        print("the captions and labels of data.keep are not in keep.parquet: join them by key")
    same = collections.Counter(base.source_key_hashes(source).tolist())
    if (shared := len(source) - len(same)) > 0:
        print(f"{shared:,} records share the key of an earlier one and are kept if one of them is")


def _source_of(
    row: int,
    source: base.DataSource,
    sources: Sequence[base.DataSource],
    done: curation.Decisions,
) -> base.DataSource:
    return source if done.evaluation[row] < 0 else sources[done.evaluation[row]]


def _examples(
    source: base.DataSource,
    sources: Sequence[base.DataSource],
    facts: dict[str, np.ndarray],
    done: curation.Decisions,
    data: schema.Data,
) -> dict[str, list[list[dict[str, Any]]]]:
    """A few records of each reason, evenly spread, each with that of which it is a copy."""
    examples: dict[str, list[list[dict[str, Any]]]] = {}
    for number, reason in enumerate(curation.REASONS):
        rows = np.flatnonzero(done.reason == number).tolist()
        for row in (rows[i] for i in dataset_scan.spread_indices(len(rows), EXAMPLES)):
            size = f"{facts['width'][row]} x {facts['height'][row]}"
            shown = [_image(source, row, f"left out, {size}", data)]
            if done.of[row] >= 0:
                other = _source_of(row, source, sources, done)
                note = f"{_stays(done, row, other)}, difference {done.difference[row]:.3f}"
                shown.append(_image(other, int(done.of[row]), note, data))
            examples.setdefault(reason, []).append(shown)
    return examples


def _stays(done: curation.Decisions, row: int, other: base.DataSource) -> str:
    """What became of the image of which a record is a copy: it may be left out for another
    reason."""
    if done.evaluation[row] >= 0:
        return f"of {other.name}"
    reason = done.reason[done.of[row]]
    return "kept" if reason < 0 else f"itself left out: {curation.REASONS[reason]}"


def _image(source: base.DataSource, row: int, note: str, data: schema.Data) -> dict[str, Any]:
    (record,) = decode.read_records(source, [row], data.missing)
    try:
        if isinstance(record, decode.BadRecord):
            raise record
        jpeg = dataset_scan.thumbnail(record, background=data.background)
    except decode.BadRecord as error:
        jpeg, note = None, error.detail
    return {"jpeg": jpeg, "key": record_key(source, row), "note": note}

"""--mode=data: report on the source before training: on the console, in WORKDIR/data.json and in
WORKDIR/data.html."""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from m3i_jax import parallel, schema
from m3i_jax.data import (
    annotation_stats,
    dataset_scan,
    dataset_stats,
    decode,
    pipeline,
    sampler,
    splits,
    tokenizer,
)
from m3i_jax.data.cores import usable_cores
from m3i_jax.data.sources import base
from m3i_jax.modes import monitoring
from m3i_jax.modes.setup import (
    complete_config,
    index_directory,
    make_workdir,
    starting_tokenizer,
    uses_tokenizer,
)
from m3i_jax.parallel.chips import CHIPS
from m3i_jax.reporting import data_page, data_report
from m3i_jax.run_files import write_json_atomic, write_text_atomic
from m3i_jax.training import trainer
from m3i_jax.training.task import make_task, task_kind

IN_MEMORY = 256  # readable records for the measurement of speed
EXAMPLES = 24  # examples on the page


def run(config: schema.Config, *, workdir: str) -> int:
    directory = pathlib.Path(workdir)
    make_workdir(directory)
    opened = splits.open_splits(config.data, cache=index_directory(config.data, directory))
    kind = task_kind(config.task)
    train, held_out = (kind.with_annotations(part) for part in opened)
    source = dataset_scan.ConcatSource(train, held_out)
    names = kind.class_names(train)
    classes = len(names) if config.data.classes < 0 else config.data.classes
    captions = pipeline.uses_captions(config.data, source)
    size = max(sampler.epoch_size(train), 1)
    done = complete_config(config, classes=classes, captions=captions, size=size)
    words = (
        tokenizer.open_tokenizer(
            done.data,
            train,
            str(directory / "tokenizer.json"),
            fixed=uses_tokenizer(directory),
            start=starting_tokenizer(done),
        )
        if captions or done.data.regions
        else None
    )
    indices = dataset_scan.spread_indices(len(source), config.report.survey)
    records = dataset_scan.scan_records(
        source,
        indices,
        threads=usable_cores(),
        background=config.data.background,
        missing=config.data.missing,
        progress=_progress(len(indices)),
    )
    readable = [record for record in records if not record.reason]
    speed = _read_speed(done, source, readable, words)
    report = {
        "source": {
            "description": source.description(),
            "name": source.name,
            "fingerprints": [train.fingerprint(), held_out.fingerprint()],
            "records": len(source),
            "held_out": len(held_out),
        },
        "sample": {
            "whole": len(indices) == len(source),
            "rule": f"record i x {len(source)} // {len(indices)} for i = 0, 1, ...",
        },
        **dataset_stats.dataset_stats(
            records,
            classes=source.classes,
            kept=classes,
            length=config.data.caption_length,
            ids=(lambda text: len(words.ids(text, cleaned=True))) if words else None,
            held_out=range(len(train), len(source)),
        ),
        "annotations": annotation_stats.annotation_stats(
            [record.annotations for record in readable if record.annotations],
            classes=source.classes,
            map_classes=source.map_classes,
            geometry=config.dense.geometry,
        ),
        "speed": {**dataclasses.asdict(speed), "cores": usable_cores()},
        "feeds": chips_fed(done, words.vocabulary if words else 0, usable_cores() * speed.pipeline),
    }
    if not report["sample"]["whole"]:
        report["duplicates"]["keys_in_both_parts"] = shared_keys(train, held_out)
    write_json_atomic(directory / "data.json", report)
    shown = _examples(source, spread_items(readable, EXAMPLES), config.data)
    twins = _twins(source, readable, config.data)
    write_text_atomic(
        directory / "data.html", data_page.data_page_html(report, images=shown, twins=twins)
    )
    print(data_report.report_text(report))
    print(f"\n{directory / 'data.json'}\n{directory / 'data.html'}")
    return 0


def shared_keys(train: base.DataSource, held_out: base.DataSource) -> int:
    """Returns how many keys both parts of a source have, without reading an image; 0 if the keys of
    a part are numbers, which say nothing of an image, or cannot be listed.

    >>> shared_keys(["a", "b"], ["c"])
    0
    """
    for part in (train, held_out):
        if not (hasattr(part, "key_hashes") or hasattr(part, "key")) or not len(part):
            return 0
        if pathlib.PurePath(base.source_key(part, 0)).stem.isdecimal():
            return 0
    return len(np.intersect1d(base.source_key_hashes(train), base.source_key_hashes(held_out)))


def _read_speed(
    config: schema.Config,
    source: dataset_scan.ConcatSource,
    readable: Sequence[Any],
    words: tokenizer.Tokenizer | None,
) -> dataset_scan.ReadSpeed:
    """The speed of reading and of making batches, from readable records that are held in memory."""
    read = decode.read_records(
        source,
        [record.index for record in spread_items(readable, IN_MEMORY)],
        config.data.missing,
    )
    held = [record for record in read if not isinstance(record, decode.BadRecord)]
    vocabulary = words.vocabulary if words else 0
    return dataset_scan.measure_speed(
        config,
        held,
        source,
        words,
        batches_of=lambda small, few: make_task(small, vocabulary).batches(
            few, words, start=0, views=(0, 1)
        ),
    )


def spread_items(items: Sequence[Any], count: int) -> list[Any]:
    """Returns at most `count` items, evenly spread.

    >>> spread_items("abcdef", 3)
    ['a', 'c', 'e']
    """
    return [items[i] for i in dataset_scan.spread_indices(len(items), count)]


def chips_fed(config: schema.Config, vocabulary: int, supply: float) -> dict[str, Any]:
    """Returns how many accelerators `supply` samples a second can feed.

    Args:
      config: completed settings; they determine the FLOPs of a step, and `report.mfu` the share of
        its peak that a chip reaches.
      vocabulary: entries of the tokenizer, 0 without captions.
      supply: samples a second that the host produces.

    Returns:
      "flops_per_image" of the model, "mfu", "image_size", "views" (whether a sample is two views
      of an image, or an annotated image) and "chips": for each kind of
      `chips.CHIPS` a row with its peak in FLOP/s, the samples a second that one chip consumes,
      and the number of chips that are fed.
    """
    one = parallel.make_mesh((1, 1, 1), jax.devices()[:1])
    # the cost of an image does not depend on the schedule, which may not fit the data yet
    train, optim = (
        dataclasses.replace(config.train, steps=1),
        dataclasses.replace(config.optim, warmup_steps=0),
    )
    step_trainer = trainer.Trainer(
        dataclasses.replace(config, train=train, optim=optim), one, vocabulary
    )
    cost, mfu = monitoring.mean_flops(step_trainer) / config.train.batch_size, config.report.mfu
    rows = [
        (kind, chip.peak, chip.peak * mfu / cost, supply * cost / (chip.peak * mfu))
        for kind, chip in CHIPS.items()
    ]
    return {
        "flops_per_image": cost,
        "mfu": mfu,
        "image_size": config.data.image_size,
        "views": config.traits.views,
        "chips": rows,
    }


def _progress(total: int) -> Any:
    if not sys.stderr.isatty():
        return None

    def show(done: int) -> None:
        print(
            f"\r{done:,} of {total:,} records",
            end="\n" if done == total else "",
            file=sys.stderr,
            flush=True,
        )

    return show


def _examples(
    source: base.DataSource, chosen: Sequence[dataset_scan.RecordInfo], data: schema.Data
) -> list[dict[str, Any]]:
    out, classes = [], source.classes
    for s, record in zip(
        chosen, decode.read_records(source, [s.index for s in chosen], data.missing), strict=True
    ):
        # it was readable before: the source has changed since
        if isinstance(record, decode.BadRecord):
            continue
        try:
            jpeg = dataset_scan.thumbnail(record, background=data.background)
        except decode.BadRecord:
            continue
        label = (
            classes[s.label]
            if 0 <= s.label < len(classes)
            else (str(s.label) if s.label >= 0 else "")
        )
        out.append(
            {
                "jpeg": jpeg,
                "key": s.key,
                "size": f"{s.width} x {s.height}",
                "label": label,
                "caption": s.caption or "",
            }
        )
    return out


def _twins(
    source: base.DataSource, readable: Sequence[dataset_scan.RecordInfo], data: schema.Data
) -> list[list[dict[str, Any]]]:
    groups: dict[bytes, list[dataset_scan.RecordInfo]] = {}
    for s in readable:
        groups.setdefault(s.content, []).append(s)
    several = sorted((g for g in groups.values() if len(g) > 1), key=len, reverse=True)[
        : dataset_stats.EXAMPLES
    ]
    return [_examples(source, g[:2], data) for g in several]

"""The input pipeline: turns records into batches, as a pure function of (seed, position). One
element of the Grain dataset is one host batch. A builder decides what a batch is: `iterate` takes
any, `iterate_batches` makes that of masked view pairs.

The only state is the position, the number of samples seen. Sample p has the same bytes for any
number of hosts, threads and worker processes and after any restart: its record, crops, mask and the
replacement of a bad record are closed forms of p. Partners are the neighbours 2k and 2k + 1, and
never the same record. Counts of bad records travel inside the batch, so the totals are exact for
the batches that were consumed, in whichever process they were built."""

import collections
import dataclasses
import functools
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from m3i_jax import schema
from m3i_jax.data import crops, decode, rand_augment, region_texts, shared_buffers
from m3i_jax.data.batch_builder import BatchBuilder
from m3i_jax.data.record_batches import (
    Batch,
    RecordBatchBuilder,
    describe_batch,
    record_key,
    summarize_bad_records,
)
from m3i_jax.data.sources import base
from m3i_jax.data.sources.base import DataSource
from m3i_jax.data.tokenizer import Tokenizer
from m3i_jax.data.workers import RestartingIterator, begin_worker
from m3i_jax.errors import TransientError, UserError

# Raised when a change gives the same (seed, position) other bytes. Where it does so for some
# settings alone, those are hashed beside it (`_fill`), and all other runs go on.
STREAM = 2
WINDOW = 10_000  # records over which data.max_bad_share is computed


def uses_captions(data: schema.Data, source: DataSource) -> bool:
    """Returns whether batches hold tokens.

    Raises:
        UserError: `data.captions` is "yes" and the source has none.

    >>> import types
    >>> uses_captions(schema.Data(captions="auto"), types.SimpleNamespace(captions=True))
    True
    """
    if data.captions == "yes" and not source.captions:
        raise UserError(
            f"data.captions='yes', but {source.name} has no captions: use 'auto', or put NAME.txt"
            " beside the images"
        )
    return data.captions != "no" and source.captions


def require_regions(data: schema.Data, source: DataSource) -> None:
    """Refuses `data.regions` for a source that annotates no objects.

    >>> require_regions(schema.Data(), [])
    """
    if data.regions and not region_texts.has_objects(source):
        raise UserError(
            f"data.regions=True, but {source.name} annotates no objects: use false, or a source"
            " that does, such as coco"
        )


def count_classes(data: schema.Data, source: DataSource) -> int:
    """Returns the number of classes of the run: `data.classes`, or all classes of the source.

    >>> import types
    >>> source = types.SimpleNamespace(classes=("cat", "dog"))
    >>> [count_classes(schema.Data(classes=count), source) for count in (-1, 0, 5)]
    [2, 0, 5]
    """
    return len(source.classes) if data.classes < 0 else data.classes


def stream_fingerprint(config: schema.Config, source: DataSource) -> str:
    """Hashes what decides which sample is at a position (seed, source, version of the stream) to 16
    hexadecimal digits. They are saved beside the position.

    >>> class Five:
    ...     def __len__(self): return 5
    ...     def fingerprint(self): return "0123456789abcdef"
    >>> len({stream_fingerprint(schema.Config(seed=seed), Five()) for seed in (1, 2)})
    2
    """
    return _digest(config, source, _resizer(config))


def earlier_fingerprints(config: schema.Config, source: DataSource) -> tuple[str, ...]:
    """Returns what earlier versions saved as the fingerprint of this very stream: that of a dense
    task named the resizer of views, which such a task does not use.

    >>> class Five:
    ...     def __len__(self): return 5
    ...     def fingerprint(self): return "0123456789abcdef"
    >>> config = schema.Config(task="detect")
    >>> stream_fingerprint(config, Five()) in earlier_fingerprints(config, Five())
    False
    >>> earlier_fingerprints(schema.Config(), Five())
    ()
    """
    if config.traits.views:
        return ()
    return (_digest(config, source, _EARLIER_RESIZER),)


# the only one beside Pillow's while dense tasks named it
_EARLIER_RESIZER = ["resizer fast 4"]


def _digest(config: schema.Config, source: DataSource, resizer: list[str]) -> str:
    return base.stable_digest(
        STREAM,
        config.seed,
        len(source),
        source.fingerprint(),
        *resizer,
        *_repeat(config),
        *_fill(config),
    )


def _resizer(config: schema.Config) -> list[str]:
    """Names the resizer that makes the pixels of views; empty for Pillow's, which is the default,
    and for tasks that have no views: dense tasks resize by `geometry` alone."""
    name = crops.choose_resizer(config.data.resizer)
    return [] if name == "pillow" or not config.traits.views else [f"resizer {name}"]


def _repeat(config: schema.Config) -> list[str]:
    """Names the threshold by which images of rare categories are repeated; empty without one."""
    threshold = config.dense.geometry.repeat
    return [f"repeat {threshold!r}"] if threshold else []


def _fill(config: schema.Config) -> list[str]:
    """Names the gray levels that RandAugment fills with; empty without it, and for those of
    ImageNet's mean, with which runs were filled before `data.augment.mean` decided."""
    fill = rand_augment.fill_levels(config.data.augment.mean)
    used = config.traits.views and config.data.rand_augment.ops
    return [f"fill {' '.join(map(str, fill))}"] if used and fill != rand_augment.FILL else []


def stream_identity(config: schema.Config, source: DataSource) -> str:
    """Lists what `stream_fingerprint` hashes in lines `key = value`, so that a diff shows what
    changed.

    >>> class Five:
    ...     name = "five"
    ...     def __len__(self): return 5
    ...     def fingerprint(self): return "0123456789abcdef"
    >>> config = schema.Config(seed=1, data=schema.Data(resizer="pillow"))
    >>> print(stream_identity(config, Five()), end="")
    order of the stream = version 2, seed 1
    source 1 = five, 5 images, fingerprint 0123456789abcdef
    """
    lines = {f"source {i}": line for i, line in enumerate(base.source_identity(source), 1)}
    stream = ", ".join(
        [
            f"version {STREAM}",
            f"seed {config.seed}",
            *_resizer(config),
            *_repeat(config),
            *_fill(config),
        ]
    )
    return "".join(f"{k} = {v}\n" for k, v in {"order of the stream": stream, **lines}.items())


class Batches(Iterator[Batch]):
    """Iterator over the batches of one host; see `iterate`.

    Attributes:
        skipped: reason -> bad records that were drawn and replaced in the consumed batches.
        noted: what else the builder counted in them, such as "caption_cut" and "label_dropped".
        record: int64 [B], index of the record that each row of the last batch shows.
    """

    def __init__(self, batches: RestartingIterator, builder: RecordBatchBuilder) -> None:
        self._batches, self._source = batches, builder.source
        self._limit, self._reasons = builder.data.max_bad_share, builder.reasons
        # of each batch: records drawn, bad ones by reason
        self._window: collections.deque[tuple[int, np.ndarray]] = collections.deque()
        self._samples, self._bad = 0, np.zeros(len(self._reasons), np.int64)  # their sums
        self._examples: dict[str, list[str]] = {reason: [] for reason in self._reasons}
        self.skipped = dict.fromkeys(self._reasons, 0)
        self.noted, self.record = dict.fromkeys(builder.notes, 0), np.zeros(0, np.int64)

    def __next__(self) -> Batch:
        batch = next(self._batches)
        skipped, example, noted, self.record = (
            batch.pop(name) for name in ("skipped", "example", "noted", "record")
        )
        for reason, count, index in zip(
            self._reasons, skipped.tolist(), example.tolist(), strict=True
        ):
            self.skipped[reason] += count
            if index >= 0 and len(self._examples[reason]) < 3:
                self._examples[reason].append(repr(record_key(self._source, index)))
        for name, count in zip(self.noted, noted.tolist(), strict=True):
            self.noted[name] += count
        self._check_bad_share(len(self.record), skipped)
        return batch

    def call_while_waiting(self, on_wait: Callable[[], None]) -> None:
        """Calls `on_wait` again and again while a batch is late; see `RestartingIterator`."""
        self._batches.on_wait = on_wait

    def counted(self) -> dict[str, float]:
        """Returns the metrics of the consumed batches: bad records, what else was counted, and
        restarts of workers, without zeros."""
        counts = {
            **{f"skipped/{reason}": n for reason, n in self.skipped.items()},
            **self.noted,
            "restarts": self._batches.restarts,
        }
        return {f"data/{name}": count for name, count in counts.items() if count}

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Counts of the consumed batches, for `go_on`."""
        return {"skipped": dict(self.skipped), "noted": dict(self.noted)}

    def go_on(self, counts: Mapping[str, Mapping[str, int]]) -> None:
        """Adds the counts of a run that is resumed, so that its log continues without a break."""
        for totals, name in ((self.skipped, "skipped"), (self.noted, "noted")):
            for key, count in counts.get(name, {}).items():
                totals[key] = totals.get(key, 0) + count

    def _check_bad_share(self, rows: int, skipped: np.ndarray) -> None:
        """Stops the run if too many of the last records were bad, as early as that is certain."""
        samples = rows + int(skipped.sum())
        self._window.append((samples, skipped))
        self._samples, self._bad = self._samples + samples, self._bad + skipped
        while self._samples - self._window[0][0] >= WINDOW:
            samples, skipped = self._window.popleft()
            self._samples, self._bad = self._samples - samples, self._bad - skipped
        bad, window = int(self._bad.sum()), max(self._samples, WINDOW)
        if bad > self._limit * window:
            counts = {
                reason: (n, self._examples[reason])
                for reason, n in zip(self._reasons, self._bad.tolist(), strict=True)
            }
            # a store that does not answer is no mistake: a scheduler starts the run again
            away = counts.get(decode.UNREACHABLE, (0, []))[0]
            raise (UserError if bad - away > self._limit * window else TransientError)(
                f"{bad:,} of the last {self._samples:,} records of {self._source.name} were bad,"
                f" more than data.max_bad_share={self._limit} of {window:,}:"
                f" {summarize_bad_records(counts)}; repair or remove them, or raise the limit"
            )

    def start(self) -> None:
        """Starts to prefetch, so that batches are built while the step compiles."""
        self._batches.start()

    def close(self) -> None:
        """Ends the threads and worker processes; the iterator cannot be used afterwards."""
        self._batches.close()


def iterate(builder: RecordBatchBuilder) -> Batches:
    """Iterates without end over the batches of a builder, from its position `first` on.

    The number of threads and workers, how long a batch may take, and the share of bad records at
    which the run stops are those of `builder.data`.

    Raises:
        UserError: worker processes lack shared memory; while iterating, too many records are bad.
    """
    data = builder.data
    if data.workers:
        _check_shared_memory(data.workers, sum(map(math.prod, builder.large().values())))
    threads = 0 if data.workers else data.threads
    make = functools.partial(_make_iterator, builder, data.workers, threads)
    describe = functools.partial(describe_batch, builder) if data.workers else None
    batches = RestartingIterator(make, workers=data.workers, limit=data.patience, describe=describe)
    return Batches(batches, builder)


def iterate_batches(
    config: schema.Config,
    source: DataSource,
    tokenizer: Tokenizer | None,
    *,
    start: int,
    host: int = 0,
    hosts: int = 1,
    views: tuple[int, ...] = (0, 1),
) -> Batches:
    """Iterates without end over one host's share of the global batches, from a position on.

    Args:
        config: of the run. `data.threads` and `data.workers` change only the speed.
        source: records to train on, at least two.
        tokenizer: of `data.caption_length` ids, or None to leave captions out.
        start: position of the first sample; even.
        host, hosts: which contiguous share of the rows to build.
        views: those that a loss or target reads. The others are black, which saves half of the
            work.

    Returns:
        An iterator of dicts of numpy arrays, with B = batch_size / hosts rows, S = image_size, N =
        patches, L = caption length. The partner of row b is row b ^ 1.

        views: uint8 [B, 2, S, S, 3], input and target view, not mirrored yet (on the device,
            `photometric.mirror` does that).
        views_<size>: uint8 [B, n, size, size, 3], the n small views of a size, in the order of
            `config.small_views`; only where `views` has one of them.
        box: float32 [B, 2, 4], top, left, height, width in pixels of the un-mirrored image. With m
            small views, [B, 2 + m, 4].
        flip: bool [B, 2], whether the view is to be mirrored; [B, 2 + m] with
            them.
        label: int32 [B], -1 if unknown.
        position: uint32 [B, 2], high and low word of the stream position.
        mask: bool [B, N], True = own image; `config.hidden` False per row, constant in a mask cell.
        blocks: only with data.mask=multi_block, int32 [B, M, K], the cells of the target blocks.
        tokens, length: only with a tokenizer, int32 [B, L] and int32 [B]; length 0 without caption.
        regions, region_length, region_given: only with a tokenizer and data.regions, int32 [B, 2,
            L], [B, 2] and [B, 2]: the texts of an object by task, their length (0: none), and how
            many of their tokens are given.

    Raises:
        UserError: the source has fewer than two records, or worker processes lack shared memory;
            while iterating, too many records are bad.
        ValueError: `start` or the share of a host is odd, or the tokenizer has another length.

    >>> class Gray:
    ...     name, classes, captions = "gray", (), False
    ...     def __len__(self): return 9
    ...     def __getitem__(self, i): return base.Record(str(i), np.full((40, 30, 3), i, np.uint8))
    >>> config = schema.Config(data=schema.Data(image_size=32), train=schema.Train(batch_size=4))
    >>> batches = iterate_batches(config, Gray(), None, start=0)
    >>> batch = next(batches)
    >>> batch["views"].shape, batch["mask"].shape
    ((4, 2, 32, 32, 3), (4, 4))
    >>> batches.close()
    """
    batch, data = config.train.batch_size, config.data
    if batch % (2 * hosts) or start % 2 or start < 0:
        raise ValueError(
            f"batch {batch} must be a multiple of 2 x {hosts} hosts, and start {start} even:"
            " partners are 2k and 2k + 1"
        )
    if len(source) < 2:
        raise UserError(
            f"{source.name} has {len(source)} images to train on, mixing needs 2: add images or"
            " lower data.holdout"
        )
    if tokenizer and tokenizer.length != data.caption_length:
        raise ValueError(
            f"the tokenizer pads captions to {tokenizer.length} ids, but data.caption_length is"
            f" {data.caption_length}"
        )
    rows = batch // hosts
    builder = BatchBuilder(
        data=data,
        seed=config.seed,
        grid=config.grid,
        cell=config.cell,
        hidden=config.hidden,
        source=source,
        tokenizer=tokenizer,
        classes=count_classes(data, source),
        rows=rows,
        batch=batch,
        first=start + host * rows,
        resizer=crops.choose_resizer(data.resizer),
        views=views,
        # those that no loss reads are not cut
        small_views=config.small_views if max(views) > 1 else (),
    )
    return iterate(builder)


def _make_iterator(
    builder: RecordBatchBuilder, workers: int, threads: int, number: int
) -> tuple[Any, shared_buffers.SharedBufferPool | None]:
    """Makes a Grain iterator over the batches from `number` on, and the pool of their memory."""
    import grain.python as grain  # seconds to import, and only runs that read data need it

    pool = shared_buffers.SharedBufferPool() if workers else None
    builder = dataclasses.replace(
        builder,
        first=builder.first + number * builder.batch,
        buffers=pool.writer() if pool else builder.buffers,
    )
    # By default Grain prefetches 500 elements, and an element is a whole batch.
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=max(threads, 2) if threads else 0
    )
    dataset = grain.MapDataset.range(2**40).map(builder).to_iter_dataset(options)
    if workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, also outside of absl.app.run
        # Small arrays are pickled, which is cheaper than a block of shared memory for each.
        dataset = grain.experimental.WithOptionsIterDataset(
            dataset, grain.experimental.DatasetOptions(min_shm_size=1 << 20)
        )
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1),
            begin_worker,
        )
    return iter(dataset), pool


def _check_shared_memory(workers: int, size: int) -> None:
    """Refuses a number of workers whose batches would overflow shared memory, which is a bus error.
    Each worker builds one batch and holds one that is ready; the trainer holds one more."""
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:  # this system has no /dev/shm
        return
    need = (2 * workers + 1) * size
    if need > free:
        raise UserError(
            f"data.workers={workers} needs {need / 2**20:,.0f} MiB of shared memory for its"
            f" batches, and /dev/shm has {free / 2**20:,.0f} free: use data.workers=0 with"
            " data.threads, or enlarge /dev/shm"
        )

"""--mode=show: print what a configuration means, within seconds and without reading images:
settings, plan of a step, parameters, FLOPs, memory, days on this machine and on common
accelerators."""

import dataclasses
import functools
import math
import os

import jax

from m3i_jax import config as configuration
from m3i_jax import parallel, schema, validation
from m3i_jax.data import geometry, pipeline, sampler, splits
from m3i_jax.data.sources import mixture
from m3i_jax.data.sources.base import DataSource
from m3i_jax.errors import UserError
from m3i_jax.models import m3i
from m3i_jax.modes import batch_search, monitoring, setup
from m3i_jax.modes.task_views import task_views
from m3i_jax.objective.caption_posterior import CAPTIONS
from m3i_jax.profiling import flops, hardware, this_machine, traffic_model
from m3i_jax.profiling.traffic_model import StepTraffic
from m3i_jax.reporting import text_table
from m3i_jax.training import scaling, step, trainer
from m3i_jax.training.plan import MissingAnnotations, build_plan
from m3i_jax.training.task import task_kind

_ROWS = 64  # images that the estimate of the memory traffic traces
_RENDERED = ("shapes", "scenes")
_LISTED = 50_000  # built-in images of which the objects are placed to count them
# of ImageNet-1k and CLIP, in place of values that only the data determine
ASSUMED = {"classes": 1000, "size": 1_281_167, "vocabulary": 49_408}
_MAP_CLASSES = 150  # of ADE20K; a class map has at most 255


def assume_data(config: schema.Config) -> tuple[schema.Config, list[str]]:
    """The configuration completed without opening the data, and the assumptions made. The names of
    a folder's files are read, if it lies on this machine, and built-in images are counted: they
    give all numbers."""
    d = config.data
    assumed: list[str] = []
    if opened := _listed_data(d, config.task):
        train, _ = opened
        classes = len(task_kind(config.task).class_names(train)) if d.classes < 0 else d.classes
        # of built-in images, `data.size` are those to render
        planned = round(d.size * (1 - _held_out_share(d))) if d.source == "folder" else 0
        captions, size = pipeline.uses_captions(d, train), planned or sampler.epoch_size(train)
        done = setup.complete_config(config, classes=classes, captions=captions, size=size)
        if captions and d.captions == "auto" and not _reads_captions(done):
            done = setup.complete_config(config, classes=classes, captions=False, size=size)
        return done, assumed
    classes = d.classes
    if classes < 0:
        of_task = _MAP_CLASSES if config.task == "segment" else ASSUMED["classes"]
        classes = 8 if d.source == "shapes" else of_task
        if d.source != "shapes":
            assumed.append(f"{classes} categories")
    captions = d.captions == "yes" or (d.captions == "auto" and d.source == "shapes")
    if d.captions == "auto" and d.source != "shapes":
        assumed.append("no captions")
    size = round(d.size * (1 - _held_out_share(d))) or ASSUMED["size"]
    if not d.size:
        assumed.append(f"{size:,} training images")
    done = setup.complete_config(config, classes=classes, captions=captions, size=size)
    if not captions and d.captions == "auto":
        _require_terms(done, assumed)
    return done, assumed


def _held_out_share(data: schema.Data) -> float:
    """The share of `data.size` images that a run holds out: none where a held-out split has its own
    images."""
    named = any(entry.held_out for entry in mixture.mixture_entries(data))
    return 0.0 if named else data.holdout


def size_lines(config: schema.Config) -> list[str]:
    """Lines on the length that a configuration is planned with, where `assume_data` counts nothing:
    what of `data.size` is held out, and that a keep-list is not read."""
    data, lines = config.data, list[str]()
    planned = data.source == "folder" and data.size  # also where the folder is here
    if _listed_data(data, config.task) and not planned:
        return lines
    if data.size and (share := _held_out_share(data)):
        images = round(data.size * (1 - share))
        lines.append(
            f"data.size={data.size:,} with {data.size - images:,} held out (data.holdout={share:g})"
            f" leaves {images:,} training images"
        )
    if any(data.keep):
        kept = "the number of images that it keeps, or the sum of their weights"
        what = "is taken as" if data.size else "is 0: give"
        lines.append(f"data.keep is not read: data.size {what} {kept}")
    return lines


def _require_terms(config: schema.Config, assumed: list[str]) -> None:
    """Refuse an objective that has no term if the data are as assumed, since they may not be."""
    for forms in task_kind(config.task).objectives(config):
        try:
            build_plan(setup.with_objective(config, forms))
        except MissingAnnotations:
            raise UserError(
                f"config.objective.forms: {', '.join(forms)}: predicts only annotations, and this"
                f" mode reads no data and assumes {', '.join(assumed)}; if the data have some, give"
                " --config.data.captions=yes or --config.data.classes=N"
            ) from None


@functools.lru_cache(maxsize=1)
def _listed_data(data: schema.Data, task: str) -> tuple[DataSource, DataSource] | None:
    """(training part, held-out part) of what is counted without reading images: a folder on this
    machine, of which only names of files are read, built-in images, and mixtures of them. None for
    other sources."""
    folder = data.source == "folder" and os.path.isdir(os.path.expanduser(data.path))
    if not folder and not (data.source in (*_RENDERED, "mixture") and _few_rendered(data)):
        return None
    kind = task_kind(task)
    train, held_out = map(kind.with_annotations, splits.open_splits(data))
    return kind.training_records(train), held_out


def _few_rendered(data: schema.Data) -> bool:
    """Whether all images are built-in ones, and few enough to be listed within seconds."""
    entries = mixture.mixture_entries(data)
    numbers = [entry.path or str(data.size) for entry in entries if entry.kind in _RENDERED]
    return (
        len(numbers) == len(entries)
        and all(number.isdecimal() and int(number) for number in numbers)
        and sum(map(int, numbers)) <= _LISTED
    )


def _reads_captions(config: schema.Config) -> bool:
    """Whether a term of the objective reads captions."""
    kind = task_kind(config.task)
    return any(
        build_plan(setup.with_objective(config, forms)).where("text", *CAPTIONS)
        for forms in kind.objectives(config)
    )


def _days(days: float) -> str:
    """A length of time in days, hours or minutes.

    >>> _days(12.34), _days(0.1), _days(0.002)
    ('12.3 days', '2.4 hours', '3 minutes')
    """
    if days >= 1:
        return f"{days:,.1f} days"
    hours = 24 * days
    return f"{hours:.1f} hours" if hours >= 1 else f"{math.ceil(60 * hours)} minutes"


def machine_line(total: float, state: float, mfu: float, dtype: str, peak: float = 0.0) -> str:
    """What a run means for the devices of this machine.

    Args:
      total: FLOPs of the whole run.
      state: bytes of parameters, moments and target.
      mfu: share of the peak that is assumed.
      dtype: of the products.
      peak: FLOP/s of one chip, if the settings give it.
    """
    machine = this_machine.describe_machine(dtype, peak)
    speed = f"{machine.flops / 1e12:,.3g} TFLOP/s"
    source = f"measured for products of {dtype} matrices" if machine.measured else "its peak"
    fits = "" if state < machine.memory else "; the state does not fit its memory"
    memory = "" if math.isinf(machine.memory) else f", {text_table.format_bytes(machine.memory)}"
    return (
        f"this machine: {machine.devices}{memory} free a device, {speed} ({source}):"
        f" {_days(total / (machine.flops * mfu) / 86_400)} at {mfu:.0%} of that{fits}"
    )


def vocabulary_size(config: schema.Config) -> int:
    """Entries of the tokenizer of a completed configuration, as far as known without data."""
    if config.data.captions != "yes" and not config.data.regions:
        return 0
    return ASSUMED["vocabulary"] if config.data.tokenizer == "clip" else config.data.vocabulary_size


def _rounded(config: schema.Config, shards: list[int]) -> list[tuple[int, str]]:
    """(batch size after rounding, the numbers of data shards that round to it)."""
    rounded: dict[int, list[int]] = {}
    for count in shards:
        rounded.setdefault(
            validation.fit_batch_to_mesh(config, (count, 1, 1))[0].train.batch_size, []
        ).append(count)
    return [(batch, f"{', '.join(map(str, on))} data shards") for batch, on in rounded.items()]


def estimated_traffic(step_trainer: trainer.Trainer, state: float) -> dict[str, StepTraffic]:
    """What a step moves to and from memory on a TPU and on a GPU, by `profiling.traffic_model`.

    Args:
      step_trainer: its blocks are traced once, by a scan, with a part of its batch.
      state: bytes of the state.
    """
    config = step_trainer.config
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, scan=True),
        train=dataclasses.replace(config.train, microbatches=1),
    )
    some = batch_search.with_batch(config, min(config.train.batch_size, _ROWS))
    run = functools.partial(
        step.train_step, dataclasses.replace(step_trainer.task, config=some), step_trainer.tx
    )
    params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(step_trainer.template.params))
    largest = {
        platform: traffic_model.step_traffic(
            run, step_trainer.template, trainer.abstract_batch(some),
            images=some.train.batch_size, state=state, params=params, platform=platform,
        )
        for platform in ("tpu", "cuda")
    }  # fmt: skip
    share = geometry.mean_canvas_share(config.dense.geometry)
    return {name: each._replace(image=each.image * share) for name, each in largest.items()}


def _divides(config: schema.Config, devices: int) -> bool:
    """Whether the batch, rounded up if so configured, can be split over so many devices."""
    tensor = max(config.parallel.mesh[2], 1)
    if devices % tensor:
        return False
    try:
        validation.fit_batch_to_mesh(config, (devices // tensor, 1, 1))
    except UserError:
        return False
    return True


def _amounts(
    config: schema.Config, step_trainer: trainer.Trainer, total: float, state: float, unit: str
) -> list[tuple[str, str]]:
    """Rows (what, how much) of a run. config: before it was completed; total: FLOPs a step; state:
    bytes of the state; unit: of the cost per image."""
    done, length = step_trainer.config, step_trainer.length
    images, samples = done.train.batch_size, length.steps * done.train.batch_size
    batch = trainer.abstract_batch(done).values()
    rows = [
        (
            "steps",
            f"{length.steps:,} of {images:,} images ({length.steps_per_epoch:,} an epoch, warm-up"
            f" {length.warmup:,})",
        ),
        (
            "samples",
            f"{samples:,}, {samples / done.data.size:,.1f} epochs of {done.data.size:,} images",
        ),
        (
            "matrix FLOPs a step",
            f"{total / 1e12:,.3f} TFLOP, {total / images / 1e9:,.2f} GFLOP {unit}",
        ),
        ("matrix FLOPs of the run", flops.format_flops(total * length.steps)),
        (
            "state",
            text_table.format_bytes(state) + " (parameters, moments, EMA target), before sharding",
        ),
        (
            "batch",
            text_table.format_bytes(sum(math.prod(s.shape) * s.dtype.itemsize for s in batch))
            + " a step from the host",
        ),
    ]
    if config.train.round_batch:
        shards = sorted({chips for _, _, chips in hardware.SLICES})
        rounded = "; ".join(f"{size:,} on {on}" for size, on in _rounded(config, shards))
        rows.append(("batch, rounded up", rounded))
    return rows


def run(config: schema.Config, *, workdir: str | None) -> int:
    from clu import parameter_overview

    del workdir
    task_kind(config.task).reject_unused_settings(config)
    done, assumed = assume_data(config)
    # One device is enough: shapes and counts do not depend on the mesh, which may be larger than
    # this machine.
    one = parallel.make_mesh((1, 1, 1), jax.devices()[:1])
    step_trainer = trainer.Trainer(done, one, vocabulary_size(done))
    batch = trainer.abstract_batch(done)
    length, images = step_trainer.length, done.train.batch_size
    leaves = jax.tree.leaves(step_trainer.template)
    state = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    print(configuration.config_to_text(done))
    overview = parameter_overview.get_parameter_overview(
        step_trainer.template.params, include_stats=False
    )
    print(overview)
    views = task_views(done.task)
    for table in views.tables(step_trainer, batch):
        print(table, "\n")
    print(
        text_table.text_table(
            [(part, f"{n:,}") for part, n in m3i.parameter_table(step_trainer.template.params)],
            ("part", "parameters"),
        ),
        "\n",
    )
    if unpublished := views.unpublished(done):
        print(f"{unpublished}\n")
    total = monitoring.mean_flops(step_trainer)
    amounts = _amounts(config, step_trainer, total, state, views.unit(done))
    print(text_table.text_table(amounts, ("what", "how much")))
    mfu = done.report.mfu
    print(
        f"\nby FLOPs at {mfu:.0%} of the peak (report.mfu), by memory traffic and by network at"
        " their peaks, without evaluation and input stalls; the longest binds. Traffic is estimated"
        " from the traced step (profiling/traffic_model.py): --mode=compile counts it in the"
        " compiled program"
    )
    update = monitoring.update_flops(step_trainer)
    bounds = traffic_model.bound_rows(
        hardware.SLICES,
        functools.partial(_divides, done),
        flops=total,
        update_flops=update,
        dtype=done.model.dtype,
        traffic=estimated_traffic(step_trainer, state),
        state=state,
        params=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(step_trainer.template.params)),
        images=images,
        steps=length.steps,
        mfu=mfu,
    )
    print(text_table.text_table(bounds, traffic_model.HEADERS))
    own = total + update * ((jax.device_count() if done.parallel.mesh[1] == 1 else 1) - 1)
    peak = done.report.peak_tflops * 1e12
    print(machine_line(own * length.steps, state, mfu, done.model.dtype, peak))
    for line in scaling.scaling_warnings(done, steps=length.steps, warmup=length.warmup):
        print(line)
    if left := scaling.open_settings(config):
        print(f"derived from batch size and length (training/scaling.py): {', '.join(left)}")
    for line in size_lines(config):
        print(line)
    if opened := _listed_data(config.data, config.task):
        train, held_out = opened
        how = "counted by the names of files" if config.data.source == "folder" else "counted"
        print(f"{how}: {train.description()}; {len(held_out):,} held out")
    if assumed:
        path = config.data.path if config.data.source == "folder" else ""
        why = f"{path!r} is not on this machine" if path else "this mode reads no data"
        print(f"assumed, since {why}: {', '.join(assumed)}")
    return 0

"""--mode=show: print what a configuration means, within seconds and without data: settings, plan of
a step, parameters, FLOPs, memory, days on common accelerators."""

import math

import jax

from m3i_jax import config as configuration
from m3i_jax import parallel, schema, validation
from m3i_jax.models import m3i
from m3i_jax.modes import monitoring, setup
from m3i_jax.modes.task_views import task_views
from m3i_jax.profiling import hardware
from m3i_jax.reporting import text_table
from m3i_jax.training import scaling, trainer

# of ImageNet-1k and CLIP, in place of values that only the data determine
ASSUMED = {"classes": 1000, "size": 1_281_167, "vocabulary": 49_408}


def assume_data(config: schema.Config) -> tuple[schema.Config, list[str]]:
    """The configuration completed without opening the data, and the assumptions step_trainer."""
    d, assumed = config.data, []
    classes = d.classes
    if classes < 0:
        classes = 8 if d.source == "shapes" else ASSUMED["classes"]
        if d.source != "shapes":
            assumed.append(f"{classes} categories")
    captions = d.captions == "yes" or (d.captions == "auto" and d.source == "shapes")
    if d.captions == "auto" and d.source != "shapes":
        assumed.append("no captions")
    size = d.size or ASSUMED["size"]
    if not d.size:
        assumed.append(f"{size:,} training images")
    if d.source == "shapes":
        size = round(size * (1 - d.holdout))
    return setup.complete_config(config, classes=classes, captions=captions, size=size), assumed


def vocabulary_size(config: schema.Config) -> int:
    """Entries of the tokenizer of a completed configuration, as far as known without data."""
    if config.data.captions != "yes":
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


def run(config: schema.Config, *, workdir: str | None) -> int:
    from clu import parameter_overview

    del workdir
    done, assumed = assume_data(config)
    # One device is enough: shapes and counts do not depend on the mesh, which may be larger than
    # this machine.
    one = parallel.make_mesh((1, 1, 1), jax.devices()[:1])
    step_trainer = trainer.Trainer(done, one, vocabulary_size(done))
    batch = trainer.abstract_batch(done)
    length, images = step_trainer.length, done.train.batch_size
    leaves = jax.tree.leaves(step_trainer.template)
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
    total = monitoring.model_flops(step_trainer)
    rows = [
        (
            "steps",
            (
                f"{length.steps:,} of {images:,} images ({length.steps_per_epoch:,} an epoch,"
                f" warm-up {length.warmup:,})"
            ),
        ),
        (
            "samples",
            (
                f"{length.steps * images:,}, {length.steps * images / done.data.size:,.1f} epochs"
                f" of {done.data.size:,} images"
            ),
        ),
        (
            "matrix FLOPs a step",
            f"{total / 1e12:,.3f} TFLOP, {total / images / 1e9:,.2f} GFLOP {views.unit}",
        ),
        ("matrix FLOPs of the run", f"{total * length.steps / 1e18:,.3f} exaFLOP"),
        (
            "state",
            text_table.format_bytes(
                sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
            )
            + " (parameters, moments, EMA target), before sharding",
        ),
        (
            "batch",
            text_table.format_bytes(
                sum(math.prod(s.shape) * s.dtype.itemsize for s in batch.values())
            )
            + " a step from the host",
        ),
    ]
    if config.train.round_batch:
        shards = sorted({chips for _, _, chips in hardware.SLICES})
        rows.append(
            (
                "batch, rounded up",
                "; ".join(f"{images:,} on {fewest}" for images, fewest in _rounded(config, shards)),
            )
        )
    print(text_table.text_table(rows, ("what", "how much")))
    mfu = done.report.mfu
    print(
        f"\nat {mfu:.0%} of the peak (report.mfu), without evaluation and input stalls;"
        " --mode=compile computes memory and time of a step"
    )
    print(text_table.text_table(hardware.slice_rows(total * length.steps, mfu), hardware.HEADERS))
    for line in scaling.scaling_warnings(done, steps=length.steps, warmup=length.warmup):
        print(line)
    if left := scaling.open_settings(config):
        print(f"derived from batch size and length (training/scaling.py): {', '.join(left)}")
    if assumed:
        print(f"assumed, since this mode reads no data: {', '.join(assumed)}")
    return 0

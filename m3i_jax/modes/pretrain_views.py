"""What the modes show of a pre-training run: evaluations of its features, panels, tables."""

from typing import Any

import jax
import numpy as np

from m3i_jax import parallel, published_settings, schema
from m3i_jax.modes import setup as jobs
from m3i_jax.modes import unnormalize
from m3i_jax.modes.task_views import TaskViews, register_task_views
from m3i_jax.profiling import flops
from m3i_jax.reporting import panels, text_table
from m3i_jax.training import plan_table
from m3i_jax.training.pretrain_task import Pretrain
from m3i_jax.training.trainer import Trainer


def _summary(config: schema.Config) -> str:
    share = config.data.crop_scale[0]
    return f"first momentum {config.optim.ema:.6g}, crops from {share:g} of an image"


def _tables(trainer: Trainer, batch: dict[str, Any]) -> list[str]:
    """The terms of the objective, and the calls of a step with their cost."""
    assert isinstance(trainer.task, Pretrain)
    plan = trainer.task.plan
    calls = plan_table.call_rows(plan, trainer.template.params, batch, flops.count_flops)
    return [
        text_table.text_table(plan_table.term_rows(plan), plan_table.HEADERS_TERMS),
        text_table.text_table(calls, plan_table.HEADERS_CALLS),
    ]


def draw_panel(
    job: jobs.Setup, trainer: Trainer, step: int, state: Any, batch: dict[str, np.ndarray]
) -> None:
    """Write WORKDIR/panels/<step>.png for the first rows of a batch, from the values that the step
    computes."""
    config, plan = job.config, job.plan
    # partners come in pairs
    rows = min(2 * -(-config.report.panel_rows // 2), config.train.batch_size)
    rows_of_batch = parallel.broadcast_from_host0(
        {name: value[:rows] for name, value in batch.items()}
    )
    arrays = {
        name: np.asarray(value, np.float32)
        for name, value in jax.device_get(trainer.panel_outputs(state, rows_of_batch)).items()
    }
    if jax.process_index():
        return

    read, kinds = plan.passes[0], ("input", "input_view", "view", "picture")
    images = {
        name: unnormalize.patches_to_images(config, arrays[name])
        for name in arrays
        if name.split("/")[-1] in kinds
    }
    captions, labels, mask = (
        unnormalize.decode_captions(job, rows_of_batch),
        unnormalize.label_names(job, rows_of_batch),
        np.asarray(rows_of_batch["mask"]),
    )
    halves = read.mixed and config.objective.pairing == "halves"
    if halves:  # a row is a pair of images; captions and labels are those of the first
        captions, labels, mask = captions[::2], labels[::2], mask[::2]
    if read.masked:
        side = config.data.image_size // config.grid
        hidden = (
            ~mask.reshape(-1, config.grid, config.grid).repeat(side, 1).repeat(side, 2)[..., None]
        )
        for term in (
            t for t in plan.terms if t.hidden and t.reads == read and f"{t.name}/picture" in images
        ):
            images[f"{term.name}/completed"] = np.where(
                hidden, images[f"{term.name}/picture"], images["input_view"]
            )
    directory = job.workdir / "panels"
    directory.mkdir(exist_ok=True)
    panels.write_panel(
        directory / f"{step:08d}.png",
        features=arrays,
        images=images,
        batch={"mask": mask},
        captions=captions,
        labels=labels,
        reads="mixed" if read.mixed else "masked" if read.masked else "whole",
        paired=not halves,
    )


register_task_views(
    "pretrain",
    TaskViews(
        draw_panel=draw_panel,
        tables=_tables,
        summary=_summary,
        unpublished=published_settings.unpublished_settings_note,
        unit="a mixed view",
    ),
)

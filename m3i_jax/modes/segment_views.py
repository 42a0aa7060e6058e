"""What the modes show of a segmentation run: panels of class maps."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from m3i_jax import schema
from m3i_jax.data.sources import base
from m3i_jax.modes import setup as jobs
from m3i_jax.modes.detect_views import content, few_rows
from m3i_jax.modes.task_views import TaskViews, register_task_views
from m3i_jax.reporting import dense_panels
from m3i_jax.training.trainer import Trainer


def content_map(batch: dict[str, np.ndarray], row: int) -> np.ndarray:
    """The class map of a row without its padding."""
    height, width = batch["size"][row]
    return np.asarray(batch["map"][row, :height, :width])


def _draw_panel(
    job: jobs.Setup, trainer: Trainer, step: int, state: Any, batch: dict[str, np.ndarray]
) -> None:
    """Write WORKDIR/panels/<step>.png: augmented images, their maps and the predicted ones."""
    few = few_rows(job.config, batch)
    outputs = jax.device_get(trainer.panel_outputs(state, few))
    if jax.process_index():
        return
    predicted = np.asarray(outputs["logits"]).argmax(-1).astype(np.uint8)
    rows = range(len(few["position"]))
    directory = job.workdir / "panels"
    directory.mkdir(exist_ok=True)
    dense_panels.write_map_sheet(
        directory / f"{step:08d}.png",
        [content(few, row) for row in rows],
        [content_map(few, row) for row in rows],
        [predicted[row, : few["size"][row, 0], : few["size"][row, 1]] for row in rows],
        names=job.classes,
        words=[f"step {step:,}"] * len(rows),
    )


def _draw_preview(
    job: jobs.Setup,
    path: pathlib.Path,
    batch: dict[str, np.ndarray],
    records: Sequence[base.Record],
) -> None:
    """Write a sheet of augmented images with their class maps."""
    rows = range(len(records))
    dense_panels.write_map_sheet(
        path,
        [content(batch, row) for row in rows],
        [content_map(batch, row) for row in rows],
        None,
        names=job.classes,
        words=[record.key for record in records],
    )


def _summary(config: schema.Config) -> str:
    low, high = config.dense.geometry.scale
    return f"images scaled by {low:g} to {high:g}, crops of {config.data.image_size} pixels"


register_task_views(
    "segment", TaskViews(draw_panel=_draw_panel, draw_preview=_draw_preview, summary=_summary)
)

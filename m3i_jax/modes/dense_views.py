"""Panels and previews of a run of detection or segmentation for the modes: panels of objects with
detections, or of class maps."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from m3i_jax import parallel, schema
from m3i_jax.data.geometry import bucket_canvases
from m3i_jax.data.sources import base
from m3i_jax.evaluation.detection_results import paste_mask, resized_mask
from m3i_jax.modes.setup import Setup
from m3i_jax.modes.task_views import TaskViews, register_task_views
from m3i_jax.reporting import dense_panels
from m3i_jax.reporting.dense_panels import DrawnObjects
from m3i_jax.training.trainer import Trainer


def few_rows(config: schema.Config, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the first rows of a batch, those of the first host on all hosts."""
    rows = min(config.report.panel_rows, len(batch["position"]))
    few: dict[str, np.ndarray] = parallel.broadcast_from_host0(
        {name: value[:rows] for name, value in batch.items()}
    )
    return few


def content(batch: dict[str, np.ndarray], row: int) -> np.ndarray:
    """Returns the image of a row without its padding."""
    height, width = batch["size"][row]
    return np.asarray(batch["image"][row, :height, :width])


def batch_objects(batch: dict[str, np.ndarray], row: int) -> DrawnObjects:
    """Returns the objects of a row of a batch, with their masks at the size of the image."""
    keep = np.flatnonzero(batch["classes"][row] >= 0)
    height, width = (int(n) for n in batch["size"][row])
    boxes = batch["boxes"][row][keep]
    masks = None
    if "masks" in batch:
        masks = [
            pasted(batch["masks"][row][k].astype(np.float32), box, (height, width))
            for k, box in zip(keep.tolist(), boxes, strict=True)
        ]
    return DrawnObjects(boxes=boxes, classes=batch["classes"][row][keep], masks=masks)


def pasted(mask_mxm: np.ndarray, box_4: np.ndarray, size: tuple[int, int]) -> np.ndarray | None:
    """Returns a mask in the frame of its box, at the size of the image."""
    if (box_4[2:] <= box_4[:2]).any():
        return None
    return paste_mask(mask_mxm, box_4, size).astype(bool)


def _predicted_objects(
    outputs: dict[str, np.ndarray], row: int, size: tuple[int, int]
) -> DrawnObjects:
    keep = np.flatnonzero(outputs["valid"][row])
    boxes = outputs["boxes"][row][keep]
    masks: list[np.ndarray | None] | None = None
    if "mask_logits" in outputs:
        stride, logits = int(outputs["mask_stride"][row]), outputs["mask_logits"][row][keep]
        masks = [resized_mask(mask, stride, content=size, size=size) for mask in logits]
    elif "masks" in outputs:
        found = outputs["masks"][row][keep]
        masks = [pasted(mask, box, size) for mask, box in zip(found, boxes, strict=True)]
    return DrawnObjects(
        boxes=boxes,
        classes=outputs["classes"][row][keep],
        scores=outputs["scores"][row][keep],
        masks=masks,
    )


def _draw_detect_panel(
    setup: Setup, trainer: Trainer, step: int, state: Any, batch: dict[str, np.ndarray]
) -> None:
    """Write WORKDIR/panels/<step>.png: augmented images with their objects, and the detections."""
    few = few_rows(setup.config, batch)
    outputs = jax.device_get(trainer.panel_outputs(state, few))
    if jax.process_index():
        return
    arrays = {name: np.asarray(value) for name, value in outputs.items()}
    rows = range(len(few["position"]))
    sizes = [(int(h), int(w)) for h, w in few["size"]]
    directory = setup.workdir / "panels"
    directory.mkdir(exist_ok=True)
    dense_panels.write_detection_sheet(
        directory / f"{step:08d}.png",
        [content(few, row) for row in rows],
        [batch_objects(few, row) for row in rows],
        [_predicted_objects(arrays, row, sizes[row]) for row in rows],
        names=setup.classes,
        words=[f"step {step:,}"] * len(rows),
    )


def _draw_detect_preview(
    setup: Setup,
    path: pathlib.Path,
    batch: dict[str, np.ndarray],
    records: Sequence[base.Record],
) -> None:
    """Write a sheet of augmented images with their objects."""
    rows = range(len(records))
    dense_panels.write_object_sheet(
        path,
        [content(batch, row) for row in rows],
        [batch_objects(batch, row) for row in rows],
        names=setup.classes,
        words=[record.key for record in records],
    )


def _detect_summary(config: schema.Config) -> str:
    rule, (low, high) = config.dense.geometry, config.dense.geometry.scale
    if canvases := bucket_canvases(rule):
        return f"images fitted into {', '.join(f'{h} x {w}' for h, w in canvases)} pixels"
    sides = f"{config.data.image_size}"
    if rule.rule == "range":
        sides = f"{rule.long} x {rule.short}"
    return f"images scaled by {low:g} to {high:g} times {sides} pixels"


register_task_views(
    "detect",
    TaskViews(
        draw_panel=_draw_detect_panel, draw_preview=_draw_detect_preview, summary=_detect_summary
    ),
)


def content_map(batch: dict[str, np.ndarray], row: int) -> np.ndarray:
    """Returns the class map of a row without its padding."""
    height, width = batch["size"][row]
    return np.asarray(batch["map"][row, :height, :width])


def _draw_segment_panel(
    setup: Setup, trainer: Trainer, step: int, state: Any, batch: dict[str, np.ndarray]
) -> None:
    """Write WORKDIR/panels/<step>.png: augmented images, their maps and the predicted ones."""
    few = few_rows(setup.config, batch)
    outputs = jax.device_get(trainer.panel_outputs(state, few))
    if jax.process_index():
        return
    predicted = np.asarray(outputs["logits"]).argmax(-1).astype(np.uint8)
    rows = range(len(few["position"]))
    directory = setup.workdir / "panels"
    directory.mkdir(exist_ok=True)
    dense_panels.write_map_sheet(
        directory / f"{step:08d}.png",
        [content(few, row) for row in rows],
        [content_map(few, row) for row in rows],
        [predicted[row, : few["size"][row, 0], : few["size"][row, 1]] for row in rows],
        names=setup.classes,
        words=[f"step {step:,}"] * len(rows),
    )


def _draw_segment_preview(
    setup: Setup,
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
        names=setup.classes,
        words=[record.key for record in records],
    )


def _segment_summary(config: schema.Config) -> str:
    low, high = config.dense.geometry.scale
    return f"images scaled by {low:g} to {high:g}, crops of {config.data.image_size} pixels"


register_task_views(
    "segment",
    TaskViews(
        draw_panel=_draw_segment_panel, draw_preview=_draw_segment_preview, summary=_segment_summary
    ),
)

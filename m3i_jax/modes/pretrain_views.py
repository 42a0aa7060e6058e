"""Output of a pre-training run for the modes: evaluations of its features, panels, tables. For
panels and the preview, model inputs are converted back to images, captions and class names."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from m3i_jax import parallel, published_settings, schema
from m3i_jax.data import decode
from m3i_jax.data.sources import base
from m3i_jax.modes.setup import Setup
from m3i_jax.modes.task_views import TaskViews, register_task_views
from m3i_jax.profiling import flops
from m3i_jax.reporting import panels, preview_sheet, text_table
from m3i_jax.training import plan_table, views
from m3i_jax.training.plan import build_plan
from m3i_jax.training.pretrain_task import Pretrain
from m3i_jax.training.trainer import Trainer


def _summary(config: schema.Config) -> str:
    share = config.data.crop_scale[0]
    return f"first momentum {config.optim.ema:.6g}, crops from {share:g} of an image"


def _unit(config: schema.Config) -> str:
    """What the FLOPs of a step are divided by: its images, each of which is the own one of one
    mixed view if an objective mixes and every image plays both roles."""
    mixed = any(read.mixed for read in build_plan(config).passes)
    return "a mixed view" if mixed and config.objective.pairing == "flip" else "an image"


def _tables(trainer: Trainer, batch: dict[str, Any]) -> list[str]:
    """The terms of the objective, and the calls of a step with their cost."""
    assert isinstance(trainer.task, Pretrain)
    plan = trainer.task.plan
    calls = plan_table.call_rows(plan, trainer.template.params, batch, flops.count_flops)
    return [
        text_table.text_table(plan_table.term_rows(plan), plan_table.HEADERS_TERMS),
        text_table.text_table(calls, plan_table.HEADERS_CALLS),
    ]


def _draw_panel(
    setup: Setup, trainer: Trainer, step: int, state: Any, batch: dict[str, np.ndarray]
) -> None:
    """Write WORKDIR/panels/<step>.png for the first rows of a batch, from the values that the step
    computes."""
    config, plan = setup.config, setup.plan
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

    read, kinds = plan.passes[0], ("input", "input_view", "view", "pixels")
    images = {
        name: patches_to_images(config, arrays[name])
        for name in arrays
        if name.split("/")[-1] in kinds
    }
    captions, labels, mask = (
        decode_captions(setup, rows_of_batch),
        label_names(setup, rows_of_batch),
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
            t for t in plan.terms if t.hidden and t.reads == read and f"{t.name}/pixels" in images
        ):
            images[f"{term.name}/completed"] = np.where(
                hidden, images[f"{term.name}/pixels"], images["input_view"]
            )
    directory = setup.workdir / "panels"
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


def _draw_preview(
    setup: Setup,
    path: pathlib.Path,
    batch: dict[str, np.ndarray],
    records: Sequence[base.Record],
) -> None:
    """Write a sheet of model inputs next to their original images."""
    patches_by_view = jax.jit(lambda b: views.augmented_patches(setup.config, b, (0, 1)))(batch)
    colored = {
        view: patches_to_images(setup.config, np.asarray(patches, np.float32))
        for view, patches in patches_by_view.items()
    }
    # with the colour augmentation of the device
    batch["views"] = np.stack([colored[0], colored[1]], 1)
    passes = setup.plan.passes
    blended = next((read for read in passes if read.blended), None)
    inputs = None
    if blended:
        blended_patches = jax.jit(
            lambda b, patches: views.encoder_input(
                setup.config,
                blended,
                views.pass_inputs(setup.config, passes, b)[blended],
                patches,
            )
        )(batch, patches_by_view)
        inputs = patches_to_images(setup.config, np.asarray(blended_patches, np.float32))
    captions = decode_captions(setup, batch)
    originals = [
        decode.decode_image(record.image, background=setup.config.data.background)
        for record in records
    ]
    has_column = {"input view": True, "target view": 1 in setup.plan.views}
    has_column["mask"] = any(read.masked or read.mixed for read in passes)
    has_column["mixed input"] = any(read.mixed for read in passes)
    columns = [name for name in preview_sheet.COLUMNS if has_column[name]]
    preview_sheet.write_preview(
        path,
        batch,
        captions=captions,
        classes=setup.classes,
        originals=originals,
        blended=inputs,
        columns=columns,
        halves=has_column["mixed input"] and setup.config.objective.pairing == "halves",
    )


register_task_views(
    "pretrain",
    TaskViews(
        draw_panel=_draw_panel,
        draw_preview=_draw_preview,
        tables=_tables,
        summary=_summary,
        unpublished=published_settings.unpublished_settings_note,
        unit=_unit,
    ),
)


def patches_to_images(config: schema.Config, patches_BxNxP: np.ndarray) -> np.ndarray:
    """Returns images, uint8 [B, S, S, 3], of normalised patches [B, N, p * p * 3]: the inverse of
    the preprocessing of a step."""
    patch, grid, augment = config.model.encoder.patch_size, config.grid, config.data.augment
    cells = np.asarray(patches_BxNxP, np.float32).reshape(-1, grid, grid, patch, patch, 3)
    pixels = cells.transpose(0, 1, 3, 2, 4, 5).reshape(-1, grid * patch, grid * patch, 3)
    std, mean = np.asarray(augment.std, np.float32), np.asarray(augment.mean, np.float32)
    return (np.clip(pixels * std + mean, 0, 1) * 255).round().astype(np.uint8)


def decode_captions(setup: Setup, batch: dict[str, np.ndarray]) -> list[str]:
    """Returns the captions of a batch, decoded from the tokens that the model reads; of an image
    without one, the text of its object."""
    texts = [""] * len(batch["label"])
    if setup.tokenizer is None:
        return texts
    arrays = [(batch["tokens"], batch["length"])] if "tokens" in batch else []
    if "regions" in batch:
        arrays.append((batch["regions"][:, -1], batch["region_length"][:, -1]))
    for tokens, lengths in arrays:
        for row, (ids, length) in enumerate(zip(tokens, lengths, strict=True)):
            texts[row] = texts[row] or setup.tokenizer.decode(ids[:length])
    return texts


def label_names(setup: Setup, batch: dict[str, np.ndarray]) -> list[str]:
    """Returns category names of a batch, "" without a label."""
    return [
        setup.classes[label] if 0 <= label < len(setup.classes) else "" for label in batch["label"]
    ]

"""--mode=preview: write WORKDIR/preview.png, a sheet of model inputs next to their original images,
to check the data before training."""

import jax
import numpy as np

from m3i_jax import schema
from m3i_jax.data import decode
from m3i_jax.data.sources import base
from m3i_jax.modes import setup as jobs
from m3i_jax.modes import unnormalize
from m3i_jax.reporting import preview_sheet
from m3i_jax.training import views

ROWS = 8


def run(config: schema.Config, *, workdir: str) -> int:
    job = jobs.open_setup(config, workdir)
    data = job.batches(0, views=(0, 1))
    try:
        batch = {name: value[: min(ROWS, len(value))] for name, value in next(data).items()}
        skipped = {reason: n for reason, n in data.skipped.items() if n}
        shown_records = base.read_items(job.train, data.record[: len(batch["label"])].tolist())
    finally:
        data.close()
    made = jax.jit(lambda b: views.augmented_patches(job.config, b, (0, 1)))(batch)
    shown = {
        crop: unnormalize.patches_to_images(job.config, np.asarray(patches, np.float32))
        for crop, patches in made.items()
    }
    # with the colour augmentation of the device
    batch["views"] = np.stack([shown[0], shown[1]], 1)
    passes = job.plan.passes
    blended = next((read for read in passes if read.blended), None)
    inputs = None
    if blended:
        shown_patches = jax.jit(
            lambda b, patches: views.encoder_input(
                job.config,
                blended,
                views.pass_inputs(job.config, passes, b)[blended],
                patches,
            )
        )(batch, made)
        inputs = unnormalize.patches_to_images(job.config, np.asarray(shown_patches, np.float32))
    captions = unnormalize.decode_captions(job, batch)
    originals = [
        decode.decode_image(record.image, background=config.data.background)
        for record in shown_records
    ]
    path = job.workdir / "preview.png"
    asked = {"input view": True, "target view": 1 in job.plan.views}
    asked["mask"] = any(read.masked or read.mixed for read in passes)
    asked["mixed input"] = any(read.mixed for read in passes)
    columns = [name for name in preview_sheet.COLUMNS if asked[name]]
    preview_sheet.write_preview(
        path,
        batch,
        captions=captions,
        classes=job.classes,
        originals=originals,
        blended=inputs,
        columns=columns,
    )
    print(
        f"{job.train.description()}\n{path}: {len(batch['label'])} samples"
        + (f"; skipped: {skipped}" if skipped else "")
    )
    return 0

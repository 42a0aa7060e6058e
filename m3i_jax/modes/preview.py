"""--mode=preview: a contact sheet of what the model will see, beside what it is cut from, before any of it is trained on:
WORKDIR/preview.png."""

import jax
import numpy as np

from m3i_jax import schema
from m3i_jax.data import records, sources
from m3i_jax.modes import job as jobs
from m3i_jax.modes import pictures
from m3i_jax.reporting import preview
from m3i_jax.training import plan, views

ROWS = 8


def run(config: schema.Config, *, workdir: str) -> int:
    job = jobs.open_job(config, workdir)
    data = job.batches(0, views=(0, 1))
    try:
        batch = {name: value[: min(ROWS, len(value))] for name, value in next(data).items()}
        skipped = {reason: n for reason, n in data.skipped.items() if n}
        shown_records = sources.read(job.train, data.record[: len(batch["label"])].tolist())
    finally:
        data.close()
    made = jax.jit(lambda b: views.patches(job.config, b, (0, 1)))(batch)
    shown = {crop: pictures.of_patches(job.config, np.asarray(patches, np.float32)) for crop, patches in made.items()}
    batch["views"] = np.stack([shown[0], shown[1]], 1)  # with the colours that the device gives them
    passes = plan.read(job.config).passes
    blended = next((read for read in passes if read.blended), None)
    inputs = None
    if blended:
        seen = jax.jit(lambda b, x: views.encoder_input(job.config, blended, 0, b, {blended.crop: x})["patches"])(batch, made[blended.crop])
        inputs = pictures.of_patches(job.config, np.asarray(seen, np.float32))
    captions = pictures.captions(job, batch)
    originals = [records.decode(record.image, background=config.data.background) for record in shown_records]
    path = job.workdir / "preview.png"
    asked = {"input view": True, "target view": 1 in plan.read(job.config).crops}
    asked["mask"] = any(read.masked or read.mixed for read in passes)
    asked["mixed input"] = any(read.mixed for read in passes)
    columns = [name for name in preview.COLUMNS if asked[name]]
    preview.write(path, batch, captions=captions, classes=job.classes, originals=originals, blended=inputs, columns=columns)
    print(f"{job.train.description()}\n{path}: {len(batch['label'])} samples" + (f"; skipped: {skipped}" if skipped else ""))
    return 0

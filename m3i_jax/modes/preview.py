"""--mode=preview: write WORKDIR/preview.png, a sheet of what a run trains on, to check data before
training: for pre-training model inputs next to their original images, for dense tasks augmented
images with their annotations."""

import dataclasses

from m3i_jax import schema
from m3i_jax.data.sources import base
from m3i_jax.modes.batch_search import with_batch
from m3i_jax.modes.setup import open_setup
from m3i_jax.modes.task_views import task_views
from m3i_jax.training.task import task_kind

ROWS = 8


def run(config: schema.Config, *, workdir: str) -> int:
    task_kind(config.task).reject_unused_settings(config)
    setup = open_setup(config, workdir, alone=True)
    # a row is a function of its position, and the canvas of a batch of that of its first row
    few = with_batch(setup.config, min(ROWS, setup.config.train.batch_size))
    task = dataclasses.replace(setup.task, config=few)
    data = task.batches(setup.train, setup.tokenizer, start=0, views=(0, 1))
    try:
        batch = next(data)
        skipped = {reason: n for reason, n in data.skipped.items() if n}
        rows = len(batch["position"])
        records = base.read_items(setup.train, data.record[:rows].tolist())
    finally:
        data.close()
    path = setup.workdir / "preview.png"
    task_views(config.task).draw_preview(setup, path, batch, records)
    print(
        f"{setup.train.description()}\n{path}: {rows} samples"
        + (f"; skipped: {skipped}" if skipped else "")
    )
    return 0

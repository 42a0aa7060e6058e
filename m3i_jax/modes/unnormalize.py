"""From arrays of the model's back to images and words for a person; shared by panels and the
preview sheet."""

import numpy as np

from m3i_jax import schema
from m3i_jax.modes.setup import Setup


def patches_to_images(config: schema.Config, patches_BxNxP: np.ndarray) -> np.ndarray:
    """uint8 [B, S, S, 3] of normalised patches [B, N, p * p * 3]: the inverse of what the step does
    to a view."""
    patch, grid, augment = config.model.encoder.patch_size, config.grid, config.data.augment
    cells = np.asarray(patches_BxNxP, np.float32).reshape(-1, grid, grid, patch, patch, 3)
    pixels = cells.transpose(0, 1, 3, 2, 4, 5).reshape(-1, grid * patch, grid * patch, 3)
    return (
        (
            np.clip(
                pixels * np.asarray(augment.std, np.float32) + np.asarray(augment.mean, np.float32),
                0,
                1,
            )
            * 255
        )
        .round()
        .astype(np.uint8)
    )


def decode_captions(job: Setup, batch: dict[str, np.ndarray]) -> list[str]:
    """The captions of a batch as the model reads them, cut where it cuts them."""
    if job.tokenizer is None:
        return [""] * len(batch["label"])
    return [
        job.tokenizer.decode(ids[:length])
        for ids, length in zip(batch["tokens"], batch["length"], strict=True)
    ]


def label_names(job: Setup, batch: dict[str, np.ndarray]) -> list[str]:
    """Names of the categories of a batch, empty where there is none."""
    return [job.classes[label] if 0 <= label < len(job.classes) else "" for label in batch["label"]]

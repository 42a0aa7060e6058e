"""Model inputs converted back to images, captions and class names, for panels and the preview."""

import numpy as np

from m3i_jax import schema
from m3i_jax.modes.setup import Setup


def patches_to_images(config: schema.Config, patches_BxNxP: np.ndarray) -> np.ndarray:
    """Images, uint8 [B, S, S, 3], of normalised patches [B, N, p * p * 3]: the inverse of the
    preprocessing of a step."""
    patch, grid, augment = config.model.encoder.patch_size, config.grid, config.data.augment
    cells = np.asarray(patches_BxNxP, np.float32).reshape(-1, grid, grid, patch, patch, 3)
    pixels = cells.transpose(0, 1, 3, 2, 4, 5).reshape(-1, grid * patch, grid * patch, 3)
    std, mean = np.asarray(augment.std, np.float32), np.asarray(augment.mean, np.float32)
    return (np.clip(pixels * std + mean, 0, 1) * 255).round().astype(np.uint8)


def decode_captions(job: Setup, batch: dict[str, np.ndarray]) -> list[str]:
    """The captions of a batch, decoded from the tokens that the model reads."""
    if job.tokenizer is None:
        return [""] * len(batch["label"])
    return [
        job.tokenizer.decode(ids[:length])
        for ids, length in zip(batch["tokens"], batch["length"], strict=True)
    ]


def label_names(job: Setup, batch: dict[str, np.ndarray]) -> list[str]:
    """Category names of a batch, "" without a label."""
    return [job.classes[label] if 0 <= label < len(job.classes) else "" for label in batch["label"]]

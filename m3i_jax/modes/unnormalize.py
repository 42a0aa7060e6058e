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
    """The captions of a batch, decoded from the tokens that the model reads; of an image without
    one, the text of its object."""
    texts = [""] * len(batch["label"])
    if job.tokenizer is None:
        return texts
    arrays = [(batch["tokens"], batch["length"])] if "tokens" in batch else []
    if "regions" in batch:
        arrays.append((batch["regions"][:, -1], batch["region_length"][:, -1]))
    for tokens, lengths in arrays:
        for row, (ids, length) in enumerate(zip(tokens, lengths, strict=True)):
            texts[row] = texts[row] or job.tokenizer.decode(ids[:length])
    return texts


def label_names(job: Setup, batch: dict[str, np.ndarray]) -> list[str]:
    """Category names of a batch, "" without a label."""
    return [job.classes[label] if 0 <= label < len(job.classes) else "" for label in batch["label"]]

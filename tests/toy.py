"""Tiny settings, batches and sources that the tests share."""

import numpy as np

from m3i_jax import config as configuration
from m3i_jax import schema
from m3i_jax.objective import masks

COLORLESS = {"jitter_p": 0.0, "grayscale_p": 0.0, "blur_p": (0.0, 0.0), "solarize_p": (0.0, 0.0)}
CLASSES, VOCABULARY, CAPTION = 5, 300, 8
# An InternImage of four layers on the same 16 cells, as overrides: what the sizes of any backbone
# are, and its own.
INTERN_IMAGE = {
    "model.backbone": "intern_image",
    "model.encoder.depth": "12",
    "model.encoder.heads": "12",
    "model.encoder.cls_token": "false",
    "model.encoder.freeze_patch_embed": "false",
    "model.intern_image.width": "8",
    "model.intern_image.depths": "(1,1,1,1)",
    "model.intern_image.groups": "(1,1,2,2)",
    "model.intern_image.kernel": "3",
    "model.intern_image.stem_strides": "(2,1)",
    "model.intern_image.extra_norm": "0",
    "model.intern_image.norm": "post",
    "model.intern_image.layer_scale": "0.5",
}
INTERN = {key.replace(".", "__"): value for key, value in INTERN_IMAGE.items()}


def settings(**changes: object) -> schema.Config:
    """A complete configuration of a network of two blocks on 16 cells; `changes` are dotted keys
    with __ for the dot."""
    config = configuration.default_config()
    config.model.update({
        "encoder": {"patch_size": 8, "width": 32, "depth": 2, "heads": 2, "drop_path": 0.1},
        "decoder": {"width": 32, "depth": 1, "heads": 2}, "pool": {"width": 24, "heads": 2},
        "text": {"width": 32, "depth": 1, "heads": 2, "embed": 16},
        "captioner": {"width": 24, "depth": 2, "heads": 2}, "dtype": "float32",
    })  # fmt: skip
    config.data.update(
        {
            "image_size": 32,
            "classes": CLASSES,
            "captions": "yes",
            "caption_length": CAPTION,
            "size": 800,
            "vocabulary_size": VOCABULARY,
        }
    )
    config.train.update({"batch_size": 16, "steps": 20, "log_every": 1})
    config.optim.update({"warmup_steps": 2, "ema": 0.9})
    config.data.augment.update(COLORLESS)  # colour is compiled in where a test asks for it
    configuration.apply_overrides(
        config, [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    )
    return configuration.resolve(config)


def batch(config: schema.Config, seed: int = 0) -> dict[str, np.ndarray]:
    """A random batch; row 1 has no category, row 2 no caption, row 4 neither."""
    r, b, side = np.random.default_rng(seed), config.train.batch_size, config.data.image_size
    box = np.concatenate([r.uniform(0, 20, (b, 2, 2)), r.uniform(20, 80, (b, 2, 2))], -1).astype(
        np.float32
    )
    out = {
        "views": r.integers(0, 256, (b, 2, side, side, 3)).astype(np.uint8),
        "box": box,
        "flip": r.random((b, 2)) < 0.5,
        "mask": masks.blockwise(seed, 0, b, grid=config.grid, hidden=config.hidden),
        "label": r.integers(0, CLASSES, b).astype(np.int32),
        "position": np.stack([np.zeros(b), np.arange(b) + seed * b], -1).astype(np.uint32),
    }
    out["label"][[1, 4]] = -1
    if config.data.mask == "inverse_block":
        options = {"grid": config.grid, "hidden": config.hidden}
        out["mask"] = masks.inverse_block(seed, 0, b, **options)
    if config.data.mask == "multi_block":
        out["mask"], out["blocks"] = masks.multi_block(
            seed,
            0,
            b,
            grid=config.grid,
            hidden=config.hidden,
            blocks=config.data.mask_blocks,
            share=config.data.mask_block_share,
        )
    if config.data.captions == "yes":
        out["tokens"] = r.integers(3, VOCABULARY, (b, CAPTION)).astype(np.int32)
        out["length"] = r.integers(3, CAPTION + 1, b).astype(np.int32)
        out["length"][[2, 4]] = 0
    if config.data.regions:
        out["regions"] = r.integers(3, VOCABULARY, (b, 2, CAPTION)).astype(np.int32)
        out["region_length"] = r.integers(5, CAPTION + 1, (b, 2)).astype(np.int32)
        out["region_given"] = np.tile(np.array([3, 2], np.int32), (b, 1))
        out["region_length"][[3, 4]] = 0
    if small := len(config.small_views):
        for group in set(config.small_views):
            count = sum(other.size == group.size for other in config.small_views)
            shape = (b, count, group.size, group.size, 3)
            out[f"views_{group.size}"] = r.integers(0, 256, shape).astype(np.uint8)
        out["box"] = np.concatenate([out["box"], np.ones((b, small, 4), np.float32)], 1)
        out["flip"] = np.concatenate([out["flip"], r.random((b, small)) < 0.5], 1)
    return out

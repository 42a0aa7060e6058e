"""Tiny settings and batches of the dense tasks: a ViT of two blocks on 16 patches, small heads."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from m3i_jax import parallel, schema, validation
from m3i_jax.training import trainer
from tests import toy

CLASSES = 3
SIDE = 32
SHARED = {
    "model.encoder.width": 16,
    "model.encoder.mlp_ratio": 2.0,
    "model.encoder.drop_path": 0.2,
    "model.encoder.freeze_patch_embed": False,
    "data.captions": "no",
    "data.classes": CLASSES,
    "train.batch_size": 8,
    "optim.ema": 1.0,
    "optim.b2": 0.999,
}
DETECT = {
    "dense.maps.window": 2,
    "dense.maps.global_blocks": (1,),
    "dense.maps.relative": "decomposed",
    "dense.geometry.max_objects": 3,
    "dense.geometry.mask_size": 14,
    "dense.detect.strides": (4, 8, 16),
    "dense.detect.anchor_sizes": (6, 12, 24),
    "dense.detect.canonical": (12, 8),
    "dense.detect.width": 8,
    "dense.detect.rpn_convs": 1,
    "dense.detect.rpn_samples": 16,
    "dense.detect.proposals": (12, 8),
    "dense.detect.test_proposals": (12, 8),
    "dense.detect.rois": 6,
    "dense.detect.roi_foreground": 0.5,
    "dense.detect.box_convs": 1,
    "dense.detect.box_hidden": 16,
    "dense.detect.mask_convs": 1,
    "dense.detect.candidates": 24,
    "dense.detect.detections": 5,
}
DINO = DETECT | {
    "dense.detect.head": "dino",
    "dense.detect.masks": False,
    "dense.detect.strides": (8, 16),
    "dense.detect.score_threshold": 0.0,
    "dense.detect.dino.queries": 8,
    "dense.detect.dino.heads": 2,
    "dense.detect.dino.sampled": 2,
    "dense.detect.dino.encoder_depth": 1,
    "dense.detect.dino.depth": 2,
    "dense.detect.dino.hidden": 16,
    "dense.detect.dino.denoising": 6,
    "dense.detect.dino.projection_bias": False,  # at this width the group norm takes it away
}
INSTANCES = DETECT | {
    "dense.detect.head": "mask2former",
    "dense.detect.score_threshold": 0.0,
    "dense.detect.mask2former.queries": 5,
    "dense.detect.mask2former.heads": 2,
    "dense.detect.mask2former.encoder_depth": 1,
    "dense.detect.mask2former.encoder_hidden": 8,
    "dense.detect.mask2former.depth": 2,
    "dense.detect.mask2former.hidden": 8,
    # with few, two objects between the points cost the same, and may swap their queries
    "dense.detect.mask2former.points": 256,
}
SEGMENT = {
    "dense.maps.relative": "table",
    "dense.maps.blocks": (0, 1),
    "dense.segment.strides": (2, 8),
    "dense.geometry.photometric": True,
    "dense.segment.head": "linear",
    "dense.segment.width": 8,
    "dense.segment.aux_width": 4,
    "dense.segment.pool_scales": (1, 2),
    "dense.segment.dropout": 0.3,
    "dense.segment.divide_by": "labelled",
    "dense.segment.mask2former.queries": 5,
    "dense.segment.mask2former.heads": 2,
    "dense.segment.mask2former.encoder_depth": 1,
    "dense.segment.mask2former.encoder_hidden": 8,
    "dense.segment.mask2former.depth": 2,
    "dense.segment.mask2former.hidden": 8,
    "dense.segment.mask2former.points": 24,
}
# changes of a toy of segmentation for the head; the last two of three strides attend
MASK2FORMER = {
    "dense__segment__head": "mask2former",
    "dense__segment__strides": "(4,8,16)",
    "dense__maps__blocks": "()",
}
TASKS = {"detect": DETECT, "dino": DINO, "instances": INSTANCES, "segment": SEGMENT}
DETECTORS = ("dino", "instances")  # are runs of detection


def flags(task: str, values: Mapping[str, object], head: str) -> list[str]:
    """The values as flags of a command line, without those that the head does not read."""
    config = schema.Config(task=task)
    part = dataclasses.replace(getattr(config.dense, task), head=head)
    config = dataclasses.replace(config, dense=dataclasses.replace(config.dense, **{task: part}))
    of_head = f"dense.{task}."
    unread = tuple(n for n in validation.unread_by_task(config) if n.startswith(of_head))
    return [
        f"--config.{key}={str(value).replace(' ', '')}"
        for key, value in values.items()
        if not any(key == n or (n[-1] == "." and key.startswith(n)) for n in unread)
    ]


def dense_settings(task: str, **changes: object) -> schema.Config:
    """A complete configuration of a task, or of detection by DINO or Mask2Former; `changes` are
    dotted keys with __ for the dot."""
    values = SHARED | TASKS[task]
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    texts = {
        key.replace(".", "__"): str(value).lower() if isinstance(value, bool) else str(value)
        for key, value in values.items()
    }
    return toy.settings(task="detect" if task in DETECTORS else task, **texts)


def dense_batch(config: schema.Config, seed: int = 0) -> dict[str, np.ndarray]:
    """A random batch like those of the task: images of several sizes, of which some have no object
    and no labelled pixel."""
    r, b, side = np.random.default_rng(seed), config.train.batch_size, config.data.image_size
    size = r.integers(side // 2, side + 1, (b, 2)).astype(np.int32)
    size[0] = side
    inside = (np.arange(side) < size[:, :1])[:, :, None] & (np.arange(side) < size[:, 1:])[:, None]
    batch = {
        "image": (r.integers(0, 256, (b, side, side, 3)) * inside[..., None]).astype(np.uint8),
        "size": size,
        "position": np.stack([np.zeros(b), np.arange(b) + seed * b], -1).astype(np.uint32),
    }
    if config.task == "segment":
        labels = r.integers(0, config.data.classes, (b, side, side))
        labels[r.random(labels.shape) < 0.1] = 255
        labels[1] = 255
        return batch | {"map": np.where(inside, labels, 255).astype(np.uint8)}
    g = config.dense.geometry
    corner = r.uniform(0, 0.6, (b, g.max_objects, 2))
    boxes = np.concatenate([corner, corner + r.uniform(0.2, 0.4, corner.shape)], -1)
    classes = r.integers(0, config.data.classes, (b, g.max_objects))
    count = r.integers(1, g.max_objects + 1, b)
    count[1] = 0
    there = np.arange(g.max_objects) < count[:, None]
    batch |= {
        "boxes": (boxes * np.tile(size[:, None, ::-1], 2) * there[..., None]).astype(np.float32),
        "classes": np.where(there, classes, -1).astype(np.int32),
    }
    if not config.dense.detect.masks:
        return batch
    masks = r.random((b, g.max_objects, g.mask_size, g.mask_size)) < 0.7
    return batch | {"masks": (masks & there[..., None, None]).astype(np.uint8)}


def make_trainer(config: schema.Config, devices: int = 1) -> trainer.Trainer:
    """Data parallel on some of the devices."""
    mesh = parallel.make_mesh((-1, 1, 1), jax.devices()[:devices])
    return trainer.Trainer(config, mesh, 0)

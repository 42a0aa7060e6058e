"""The small DINO of tests/data/make_dino.py and of its test: sizes, parameters by name, inputs."""

import zlib
from typing import Any

import numpy as np

WIDTH, HEADS, HIDDEN, POINTS = 64, 4, 48, 2
ENCODER_DEPTH, DEPTH, QUERIES, CLASSES = 2, 3, 12, 5
CHANNELS, STRIDES, SIDE = [6, 10], (8, 16), 64
DENOISING, LABEL_NOISE, BOX_NOISE = 50, 0.25, 0.4
OBJECTS, DETECTIONS = 4, 20
WHOLE = 200  # parameters of at most so many numbers have their whole gradient stored


def parameter(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values of the reference's parameter of this name, float64. The stream of RandomState never
    changes."""
    # heads that the reference shares have the name of the first
    draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) == 1:
        one = name.endswith("weight")  # of a norm
        values = float(one) + 0.2 * draw
        return values - 2.0 if "class_embed" in name else values
    if "embed" in name and "bbox" not in name and "class" not in name or "label_enc" in name:
        return draw
    scale = 0.5 if "bbox_embed" in name else 1.0
    if "sampling_offsets" in name:
        scale = 2.0
    return scale * draw / np.sqrt(np.prod(shape[1:]))


def inputs() -> dict[str, Any]:
    """Three images of several sizes with one to four objects: maps, sizes, objects, and the random
    numbers of denoising. Objects come first."""
    r = np.random.RandomState(5)
    grids = [SIDE // stride for stride in STRIDES]
    size = np.array([[64, 64], [41, 64], [64, 50]], np.int32)
    counts = [3, 1, 4]
    boxes, classes = np.zeros((3, OBJECTS, 4)), np.full((3, OBJECTS), -1, np.int32)
    for i, n in enumerate(counts):
        corner = r.uniform(0, 0.6, (n, 2))
        both = np.concatenate([corner, corner + r.uniform(0.1, 0.4, (n, 2))], 1)
        boxes[i, :n] = both * np.tile(size[i, ::-1], 2)
        classes[i, :n] = r.randint(0, CLASSES, n)
    slots = 2 * DENOISING
    shapes = {"relabel": (slots,), "category": (slots,), "sign": (slots, 4), "move": (slots, 4)}
    return {
        "maps": [
            r.standard_normal((3, g, g, c)).astype(np.float32)
            for g, c in zip(grids, CHANNELS, strict=True)
        ],
        "size": size,
        "boxes": boxes.astype(np.float32),
        "classes": classes,
        "draws": {
            name: r.uniform(size=(3, *shape)).astype(np.float32) for name, shape in shapes.items()
        },
    }


def summary(flat: np.ndarray) -> np.ndarray:
    """Norm of an array, and its sum weighted by cos(0), cos(1), ..."""
    flat = np.asarray(flat, np.float64).ravel()
    return np.array([np.sqrt((flat**2).sum()), (flat * np.cos(np.arange(flat.size))).sum()])

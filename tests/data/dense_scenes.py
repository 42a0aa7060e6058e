"""Small annotated images and class maps from a seed: the inputs of make_detectron2.py and
make_mmseg.py, which run the reference implementations on them."""

import numpy as np

SIDE, SLOTS, MASK, CLASSES = 128, 5, 112, 3
SIZES = ((128, 128), (104, 128), (128, 88))  # height and width of the content
OBJECTS = (
    ((9.3, 12.8, 61.7, 58.1, 0), (40.2, 30.5, 118.9, 121.4, 1), (80.6, 5.2, 97.3, 19.9, 2))
    + ((3.1, 96.7, 13.4, 106.2, 1),),
    ((20.7, 16.3, 103.5, 88.6, 2), (71.4, 8.9, 122.8, 31.6, 0)),
    (),
)


def outline(kind: int, side: int = 28) -> np.ndarray:
    """uint8 [MASK, MASK]: a shape in the frame of its box, in squares of MASK / side cells. With
    squares of four cells no bin centre of a mask target of 28 x 28 of that very box lies on an
    edge, where a target would hang on the last bit."""
    y, x = (np.mgrid[:side, :side] + 0.5) / side * 2 - 1
    shapes = (
        x**2 + y**2 < 1,
        np.abs(x) < (y + 1.15) / 2,
        (np.abs(x) > 0.35) | (np.abs(y) < 0.4),
        x + 0.5 * y < 0.6,
    )
    return np.kron(shapes[kind % 4], np.ones((MASK // side, MASK // side))).astype(np.uint8)


def texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """float [height, width, 3] in 0..255: a few waves and noise."""
    y, x = np.mgrid[:height, :width] / SIDE
    waves = [np.sin(2 * np.pi * (a * x + b * y) + c) for a, b, c in rng.uniform(0.4, 3, (6, 3))]
    smooth = np.stack([waves[0] + waves[3], waves[1] + waves[4], waves[2] + waves[5]], -1)
    return np.clip(127.5 + 45 * smooth + rng.normal(0, 9, smooth.shape), 0, 255)


def detection_batch(seed: int = 7) -> dict[str, np.ndarray]:
    """A batch as a detection task has it: image uint8 [3, SIDE, SIDE, 3] with zeros right of and
    below the content, size int32 [3, 2], boxes float32 [3, SLOTS, 4], classes int32 [3, SLOTS] (-1:
    no object), masks uint8 [3, SLOTS, MASK, MASK] in the frame of the box."""
    rng = np.random.default_rng(seed)
    images = np.zeros((len(SIZES), SIDE, SIDE, 3), np.uint8)
    boxes = np.zeros((len(SIZES), SLOTS, 4), np.float32)
    classes = np.full((len(SIZES), SLOTS), -1, np.int32)
    masks = np.zeros((len(SIZES), SLOTS, MASK, MASK), np.uint8)
    for i, ((height, width), objects) in enumerate(zip(SIZES, OBJECTS, strict=True)):
        image = texture(rng, height, width)
        for slot, (*box, category) in enumerate(objects):
            boxes[i, slot], classes[i, slot] = box, category
            masks[i, slot] = outline(category + (slot > 2))
            x0, y0, x1, y1 = box
            y = np.floor((np.arange(height) + 0.5 - y0) / (y1 - y0) * MASK).astype(int)
            x = np.floor((np.arange(width) + 0.5 - x0) / (x1 - x0) * MASK).astype(int)
            inside = ((y >= 0) & (y < MASK))[:, None] & ((x >= 0) & (x < MASK))
            drawn = masks[i, slot][np.clip(y, 0, MASK - 1)][:, np.clip(x, 0, MASK - 1)] * inside > 0
            image[drawn] = 0.3 * image[drawn] + 0.7 * rng.uniform(0, 255, 3)
        images[i, :height, :width] = image.astype(np.uint8)
    return {
        "image": images,
        "size": np.array(SIZES, np.int32),
        "boxes": boxes,
        "classes": classes,
        "masks": masks,
    }


def mask_targets(masks: np.ndarray, boxes: np.ndarray, rois: np.ndarray, side: int) -> np.ndarray:
    """bool [R, side, side]: masks [R, MASK, MASK] in the frame of boxes [R, 4], bilinear at the bin
    centres of rois [R, 4] with zeros outside, at least one half. In float64."""
    out = np.zeros((len(rois), side, side), bool)
    for r, (mask, box, roi) in enumerate(
        zip(masks.astype(float), boxes.astype(float), rois.astype(float), strict=True)
    ):
        weights = []
        for axis in (1, 0):
            low, high = box[axis], box[axis + 2]
            centres = roi[axis] + (np.arange(side) + 0.5) / side * (roi[axis + 2] - roi[axis])
            places = (centres - low) / (high - low) * MASK - 0.5
            weights.append(np.maximum(0, 1 - np.abs(places[:, None] - np.arange(MASK))))
        out[r] = weights[0] @ mask @ weights[1].T >= 0.5
    return out

"""Decodes a class map. All rules about bad maps are here."""

import io

import numpy as np
from PIL import Image

from m3i_jax.data import decode
from m3i_jax.data.decode import BadRecord

NO_MAP, MAP_SIZE, MAP_CLASS = "no_map", "map_size", "map_class"
UNLABELLED = 255
_MODES = ("1", "L", "P", "I", "I;16")


def decode_map(encoded: bytes | np.ndarray, classes: int) -> np.ndarray:
    """Decodes a map and checks its classes.

    Args:
        encoded: a PNG (or another lossless image) whose pixels, or palette numbers, are classes; or
            the classes, uint8 [height, width].
        classes: number of classes.

    Returns:
        uint8 [height, width], 0..classes-1, or 255 where unlabelled.

    Raises:
        BadRecord: "no_map": the bytes are no image of one channel; "map_class": a pixel has another
            class; "too_large", as for images.

    >>> decode_map(np.array([[0, 255]], np.uint8), 1).tolist()
    [[0, 255]]
    >>> decode_map(np.array([[3]], np.uint8), 3)
    Traceback (most recent call last):
    m3i_jax.data.decode.BadRecord: map_class: class 3 in the map; the source has 3 (0 to 2)
    """
    map_HxW = read_map(encoded) if isinstance(encoded, bytes) else encoded
    counts = np.bincount(map_HxW.ravel(), minlength=UNLABELLED + 1)
    counts[UNLABELLED] = 0
    if counts[classes:].any():
        worst = int(np.flatnonzero(counts)[-1])
        raise BadRecord(
            MAP_CLASS, f"class {worst} in the map; the source has {classes} (0 to {classes - 1})"
        )
    return map_HxW


def read_map(encoded: bytes) -> np.ndarray:
    """Decodes the numbers of a map, uint8 [height, width].

    Raises:
        BadRecord: see `decode_map`.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=("PNG", "BMP", "TIFF", "GIF"))
        if image.width * image.height > decode.PIXEL_LIMIT:
            raise BadRecord(decode.TOO_LARGE, f"a map of {image.width} x {image.height} pixels")
        if image.mode not in _MODES:
            raise BadRecord(NO_MAP, f"its map has the mode {image.mode} instead of one channel")
        numbers = np.asarray(image)
    except BadRecord:
        raise
    except Exception as error:  # Pillow's readers raise many types for a damaged file
        raise BadRecord(
            NO_MAP, f"its map cannot be decoded: {type(error).__name__}: {error}"[:200]
        ) from error
    if numbers.dtype != np.uint8 and (numbers.min() < 0 or numbers.max() > UNLABELLED):
        raise BadRecord(
            MAP_CLASS, f"class {int(numbers.max())} in the map; at most 255 can be read"
        )
    return numbers.astype(np.uint8)

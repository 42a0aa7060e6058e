"""Scores of the quality of an image that need no model: sharpness and entropy of its gray
values."""

import numpy as np
from PIL import Image

SIDE = 128  # largest shorter side at which an image is scored, so that sizes are comparable


def small_gray(image: Image.Image) -> np.ndarray:
    """Returns the gray values of an image at no more than 128 pixels of its shorter side, uint8.

    >>> small_gray(Image.new("RGB", (512, 256))).shape
    (128, 256)
    """
    short = min(image.size)
    if short > SIDE:
        width, height = (max(1, round(side * SIDE / short)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image.convert("L"))


def sharpness(gray: np.ndarray) -> float:
    """Returns the standard deviation of the Laplacian (four neighbours) of gray values.

    >>> steps = np.kron(np.eye(2), np.ones((8, 8))) * 255
    >>> smooth = np.add.outer(np.arange(16), np.arange(16)) * 8
    >>> round(sharpness(steps), 1), sharpness(smooth)
    (145.7, 0.0)
    """
    x = gray.astype(np.float32)
    middle = x[1:-1, 1:-1]
    if not middle.size:
        return 0.0
    laplacian = x[:-2, 1:-1] + x[2:, 1:-1] + x[1:-1, :-2] + x[1:-1, 2:] - 4 * middle
    return float(laplacian.std())


def entropy(gray: np.ndarray) -> float:
    """Returns the entropy of the histogram of uint8 gray values in bits, 0 to 8.

    >>> entropy(np.array([[0, 0], [255, 255]], np.uint8)), entropy(np.zeros((2, 2), np.uint8))
    (1.0, 0.0)
    """
    share = np.bincount(gray.ravel(), minlength=256) / max(gray.size, 1)
    share = share[share > 0]
    return float(abs((share * np.log2(share)).sum()))

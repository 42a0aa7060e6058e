"""Perceptual hashes of small thumbnails, of whole images and of many crops of them, by which copies
are found after re-encoding, resizing and cropping.

A thumbnail is 32 x 32 RGB whatever the aspect ratio, so a crop of one image, stretched to a square,
is compared with the whole of another. The hash states which of the 63 lowest frequencies (discrete
cosine transform) of the gray values are positive, without the mean; bit 0 is 0."""

import functools

import numpy as np
from PIL import Image

SIDE = 32  # pixels of a thumbnail
FREQUENCIES = 8  # of the hash, along each axis
_GRAY = np.array([0.299, 0.587, 0.114], np.float32)
_FLAT = 36.0  # variance of pixel values below which an image counts as flat
# A frequency is positive above this share of their root mean square: those that symmetric drawings
# lack would else be random bits.
_POSITIVE = 0.03
_SHIFT = 25.0  # largest difference of the mean of a colour
_STEPS = (0.04, 0.02, 0.01)  # of the search for the edges of a crop, in shares of the image

Region = tuple[float, float, float, float]  # top, bottom, left, right, in shares of the image


def make_thumbnail(image: Image.Image) -> np.ndarray:
    """Returns the thumbnail of an RGB image, uint8 [32, 32, 3].

    >>> make_thumbnail(Image.new("RGB", (90, 20), (9, 9, 9))).mean().item()
    9.0
    """
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.uint8)


@functools.cache
def crop_regions() -> tuple[Region, ...]:
    """Returns the regions that are hashed: the whole image, then squares and stripes of it.

    >>> crop_regions()[0], len(crop_regions())
    ((0.0, 1.0, 0.0, 1.0), 94)
    """
    regions = [(0.0, 1.0, 0.0, 1.0)]
    for side in (0.9, 0.8, 0.7):
        places = np.linspace(0, 1 - side, 5).tolist()
        regions += [(y, y + side, x, x + side) for y in places for x in places]
    for side in (0.875, 0.75, 0.625):
        for place in np.linspace(0, 1 - side, 3).tolist():
            regions += [(0.0, 1.0, place, place + side), (place, place + side, 0.0, 1.0)]
    return tuple(regions)


def interval_matrix(start: float, end: float) -> np.ndarray:
    """Returns the matrix that stretches a part of 32 samples to all of them, by linear
    interpolation: float32 [32, 32].

    >>> np.array_equal(interval_matrix(0.0, 1.0), np.eye(32))
    True
    """
    place = (start + (np.arange(SIDE) + 0.5) / SIDE * (end - start)) * SIDE - 0.5
    place = place.clip(0, SIDE - 1)
    low = np.minimum(place.astype(int), SIDE - 2)
    share = (place - low).astype(np.float32)
    matrix = np.zeros((SIDE, SIDE), np.float32)
    rows = np.arange(SIDE)
    matrix[rows, low], matrix[rows, low + 1] = 1 - share, share
    return matrix


@functools.cache
def _bases() -> tuple[np.ndarray, np.ndarray]:
    """Returns the transforms of the rows and of the columns of every region, [R, 8, 32]."""
    angle = np.pi / SIDE * np.outer(np.arange(FREQUENCIES), np.arange(SIDE) + 0.5)
    cosine = np.cos(angle).astype(np.float32)
    regions = crop_regions()
    rows = np.stack([cosine @ interval_matrix(y0, y1) for y0, y1, _, _ in regions])
    columns = np.stack([cosine @ interval_matrix(x0, x1) for _, _, x0, x1 in regions])
    return rows, columns


def region_hashes(thumbnail: np.ndarray, regions: int | None = None) -> np.ndarray:
    """Returns the hashes of the first `regions` regions of a thumbnail, or of all: uint64 [R].

    >>> image = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
    >>> dark = (image * 0.5).astype(np.uint8)
    >>> int(np.bitwise_count(region_hashes(image, 1) ^ region_hashes(dark, 1))[0]) < 3
    True
    """
    rows, columns = (basis[:regions] for basis in _bases())
    gray_HxW = thumbnail.astype(np.float32) @ _GRAY
    frequencies = (rows @ gray_HxW @ columns.swapaxes(1, 2)).reshape(len(rows), -1)
    frequencies[:, 0] = 0  # the mean
    least = _POSITIVE * np.sqrt((frequencies**2).mean(1, keepdims=True))
    bits = frequencies > np.maximum(least, 1e-3)
    return np.packbits(bits, 1, bitorder="little").view("<u8")[:, 0]


def crop_thumbnails(thumbnail: np.ndarray, regions: list[Region]) -> np.ndarray:
    """Returns regions of a thumbnail, each stretched to its size: float32 [R, 32, 32, 3]."""
    rows = np.stack([interval_matrix(y0, y1) for y0, y1, _, _ in regions])
    columns = np.stack([interval_matrix(x0, x1) for _, _, x0, x1 in regions])
    channels = thumbnail.astype(np.float32).transpose(2, 0, 1)  # [3, H, W]
    crops = rows[:, None] @ channels[None] @ columns.swapaxes(1, 2)[:, None]
    return crops.transpose(0, 2, 3, 1)


def relative_difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns how much thumbnails differ: the mean squared difference of their colours without the
    mean of each, over the smaller of their variances; infinity if the means differ by a tenth.
    Squares of 2 x 2 pixels are compared, since a crop is blurred by its enlargement.

    Args:
        a, b: [..., 32, 32, 3], values 0..255.

    Returns:
        [...], 0 for equal ones, about 2 for unrelated ones.

    >>> x = np.random.default_rng(0).random((32, 32, 3)) * 255
    >>> relative_difference(x, x).item(), round(relative_difference(x, x[::-1]).item())
    (0.0, 2)
    """
    a, b = _halved(a), _halved(b)
    mean_a, mean_b = a.mean((-3, -2), keepdims=True), b.mean((-3, -2), keepdims=True)
    a, b = a - mean_a, b - mean_b
    least = np.minimum((a**2).mean((-3, -2, -1)), (b**2).mean((-3, -2, -1)))
    ratio = ((a - b) ** 2).mean((-3, -2, -1)) / np.maximum(least, _FLAT)
    far = np.abs(mean_a - mean_b).max((-3, -2, -1)) > _SHIFT
    return np.where(far, np.inf, ratio)


def _halved(x: np.ndarray) -> np.ndarray:
    *some, height, width, channels = x.shape
    squares = x.astype(np.float32).reshape(*some, height // 2, 2, width // 2, 2, channels)
    return squares.mean((-4, -2))


def fit_crop(whole: np.ndarray, part: np.ndarray, region: Region) -> tuple[float, Region]:
    """Searches for the crop of one thumbnail that is most like another, from a first guess.

    Args:
        whole: uint8 [32, 32, 3], of which a crop is searched.
        part: uint8 [32, 32, 3].
        region: the guess.

    Returns:
        (`relative_difference` of the best crop, the crop).
    """
    best = float(relative_difference(crop_thumbnails(whole, [region]), part)[0])
    for step in _STEPS:
        for _ in range(4):
            moved = _moved(region, step)
            differences = relative_difference(crop_thumbnails(whole, moved), part)
            if differences.min() >= best:
                break
            best, region = float(differences.min()), moved[int(differences.argmin())]
    return best, region


def _moved(region: Region, step: float) -> list[Region]:
    """Returns the regions with one edge, or two opposite edges, moved by a step."""
    y0, y1, x0, x1 = region
    moved = []
    for up, down, left, right in (
        *((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)),
        *((1, 1, 0, 0), (0, 0, 1, 1), (1, -1, 1, -1)),
    ):
        for sign in (-step, step):
            new = (y0 + up * sign, y1 + down * sign, x0 + left * sign, x1 + right * sign)
            a, b, c, d = (min(max(edge, 0.0), 1.0) for edge in new)
            if b - a >= 0.4 and d - c >= 0.4:
                moved.append((a, b, c, d))
    return moved

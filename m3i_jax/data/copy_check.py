"""Confirms copies at a higher resolution than that of the thumbnails by which they were found: a
copy differs a little everywhere, a look-alike, such as another playing card, much in a few
places."""

import numpy as np
from PIL import Image

from m3i_jax.data.perceptual_hash import Region

SIDE = 64  # pixels at which images are compared, unless one of them is smaller
BLOCKS = 8  # along each axis
_SHIFT = 1  # pixels by which a block may be displaced
_WEIGHTS = np.array([1.0, 0.5, 0.5], np.float32)  # of brightness and colours
# of the search for the region: first the smooth images, last a turn without a step
_SIDES = (SIDE, 16, 16, 32, 32, SIDE, SIDE, SIDE)
_STEP = 0.03  # most of an edge in a turn, in shares of the image
_LEAST = 0.3  # smallest side of a region
_FLAT = 36.0  # variance of pixel values below which an image counts as flat


def block_differences(whole: Image.Image, region: Region, part: Image.Image) -> np.ndarray:
    """Returns how much each block of an image differs from a region of another one: the mean
    squared difference, less a common shift of each colour, at the best displacement by one pixel,
    over the smaller variance of both images.

    Args:
        whole: RGB image.
        region: of it, top, bottom, left, right in shares.
        part: RGB image that may show this region.

    Returns:
        float32 [8, 8].

    >>> image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8))
    >>> same = block_differences(image, (0.0, 1.0, 0.0, 1.0), image)
    >>> other = image.copy()
    >>> other.paste((0, 0, 0), (0, 0, 20, 20))
    >>> changed = block_differences(image, (0.0, 1.0, 0.0, 1.0), other)
    >>> same.max().item(), changed.argmax().item(), bool(changed.max() > 0.5)
    (0.0, 0, True)
    """
    top, bottom, left, right = region
    width, height = whole.size
    box = (left * width, top * height, right * width, bottom * height)
    short = min(*part.size, int(box[2] - box[0]), int(box[3] - box[1]))
    side = max(min(SIDE, short), 2 * BLOCKS) // BLOCKS * BLOCKS
    # JPEGs have half the resolution in colour, which is most of what small copies differ in
    a = np.asarray(_small(whole.convert("YCbCr"), side, box), np.float32) * _WEIGHTS
    b = np.asarray(_small(part.convert("YCbCr"), side), np.float32) * _WEIGHTS
    a, b = a - a.mean((0, 1)), b - b.mean((0, 1))
    least = max(min(float((a**2).mean()), float((b**2).mean())), _FLAT)
    padded = np.pad(a, ((_SHIFT, _SHIFT), (_SHIFT, _SHIFT), (0, 0)), "edge")
    shifts = range(2 * _SHIFT + 1)
    step = side // BLOCKS
    best = np.full((BLOCKS, BLOCKS), np.inf, np.float32)
    for y in shifts:
        for x in shifts:
            squares = ((padded[y : y + side, x : x + side] - b) ** 2).mean(2)
            blocks = squares.reshape(BLOCKS, step, BLOCKS, step).mean((1, 3))
            best = np.minimum(best, blocks)
    return best / least


def align_region(whole: Image.Image, region: Region, part: Image.Image) -> Region:
    """Returns the region near a first guess that is most like another image: least squares in the
    four edges by the gradient of the gray values (Gauss-Newton), to a fraction of a pixel.

    >>> rng = np.random.default_rng(0)
    >>> small = Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8))
    >>> whole = small.resize((200, 200), Image.Resampling.BICUBIC)
    >>> part = whole.crop((20, 10, 190, 180))
    >>> np.round(align_region(whole, (0.06, 0.91, 0.09, 0.96), part), 2).tolist()
    [0.05, 0.9, 0.1, 0.95]
    """
    gray, other = whole.convert("L"), part.convert("L")
    best, best_region, edges = np.inf, region, np.array(region)
    for turn, side in enumerate(_SIDES):
        top, bottom, left, right = edges.tolist()
        box = (left * gray.width, top * gray.height, right * gray.width, bottom * gray.height)
        a = np.asarray(_small(gray, side, box), np.float32)
        rest = np.asarray(_small(other, side), np.float32) - a
        error = float(rest.var())
        if side == SIDE and error < best:
            best, best_region = error, (top, bottom, left, right)
        if turn == len(_SIDES) - 1:
            break
        along = (np.arange(side, dtype=np.float32) + 0.5) / side
        dy, dx = np.gradient(a)
        dy, dx = dy * (side / (bottom - top)), dx * (side / (right - left))
        columns = [dy * (1 - along[:, None]), dy * along[:, None], dx * (1 - along), dx * along]
        jacobian = np.stack([*(column.ravel() for column in columns), np.ones(a.size)], 1)
        normal = jacobian.T @ jacobian
        normal[np.diag_indices(5)] += 1e-3 * np.trace(normal) / 5
        step = np.linalg.solve(normal, jacobian.T @ rest.ravel())[:4]
        edges = (edges + step.clip(-_STEP, _STEP)).clip(0, 1)
        if edges[1] - edges[0] < _LEAST or edges[3] - edges[2] < _LEAST:
            break
    return best_region


def _small(
    image: Image.Image, side: int, box: tuple[float, float, float, float] | None = None
) -> Image.Image:
    return image.resize((side, side), Image.Resampling.BILINEAR, box=box)


def detail_difference(whole: Image.Image, region: Region, part: Image.Image) -> float:
    """Returns the mean of the four largest `block_differences`, at the best region near `region`.

    >>> image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8))
    >>> detail_difference(image, (0.0, 1.0, 0.0, 1.0), image)
    0.0
    """
    blocks = block_differences(whole, align_region(whole, region, part), part)
    return float(np.sort(blocks, axis=None)[-4:].mean())

"""Images of rare categories come more often: LVIS's repeat factors, and the order of a stream that
follows such weights, in closed form."""

from collections.abc import Sequence

import numpy as np

from m3i_jax.objective.rng import RECORD, hash64, permute

_FRACTION = 24  # bits of an epoch's offset, so that slot + offset is exact in float64


def category_shares(categories_of_images: Sequence[np.ndarray], classes: int) -> np.ndarray:
    """Returns the share of the images that have each category.

    Args:
        categories_of_images: of each image the categories of its objects, in any order and number.
        classes: number of categories.

    Returns:
        float64 [classes].

    >>> images = [np.array([0, 0, 2]), np.array([2]), np.array([], int)]
    >>> category_shares(images, 4).round(3).tolist()
    [0.333, 0.0, 0.667, 0.0]
    """
    count = np.zeros(classes, np.int64)
    for categories in categories_of_images:
        count[np.unique(np.asarray(categories, np.int64))] += 1
    return count / max(1, len(categories_of_images))


def repeat_factors(
    share_of_images_with_category: np.ndarray,
    categories_of_images: Sequence[np.ndarray],
    threshold: float,
) -> np.ndarray:
    """Returns how often each image occurs in an epoch, on average (LVIS; Gupta et al., CVPR 2019).

    A category that a share f of the images has asks for max(1, sqrt(threshold / f)); an image gets
    the most that one of its categories asks for, and 1 if it has none.

    Args:
        share_of_images_with_category: [C], `category_shares`.
        categories_of_images: of each image the categories of its objects.
        threshold: share from which a category asks for no more than 1; LVIS: .001. 0: all are 1.

    Returns:
        float64 [images], >= 1.

    >>> images = [np.array([0]), np.array([0, 1]), np.array([0]), np.array([], int)]
    >>> repeat_factors(category_shares(images, 2), images, threshold=1.0).round(3).tolist()
    [1.155, 2.0, 1.155, 1.0]
    """
    share = np.asarray(share_of_images_with_category, np.float64)
    ratio = np.divide(threshold, share, out=np.zeros_like(share), where=share > 0)
    factor = np.maximum(1.0, np.sqrt(ratio))
    lengths = np.array([len(categories) for categories in categories_of_images], np.int64)
    factors = np.ones(len(lengths))
    if lengths.sum():
        every = np.concatenate([np.asarray(c, np.int64) for c in categories_of_images])
        np.maximum.at(factors, np.repeat(np.arange(len(lengths)), lengths), factor[every])
    return factors


def weighted_epoch_size(cumulative_weights: np.ndarray) -> int:
    """Returns the number of samples of an epoch of `records_at_weighted`: the sum of the weights,
    rounded up.

    >>> weighted_epoch_size(np.cumsum([1.0, 2.5]))
    4
    """
    return int(np.ceil(cumulative_weights[-1])) if len(cumulative_weights) else 0


def records_at_weighted(
    cumulative_weights: np.ndarray,
    seed: int,
    positions: np.ndarray,
    attempt: int = 0,
    source: int = 0,
) -> np.ndarray:
    """Returns the record at each position of a stream in which record i occurs in proportion to its
    weight: `sample_index` with weights.

    An epoch has N slots, N being the sum S of the weights rounded up. The slots are S / N <= 1
    apart on a line on which record i owns a part as long as its weight; one random offset per epoch
    shifts them all, and a keyed permutation shuffles them. So in every epoch each record occurs as
    often as its expected number, w N / S, rounded down or up, and any position is found without the
    ones before it. The reference (detectron2) rounds every weight by a draw of its own, so that the
    length of its epochs varies; the expected frequencies are the same.

    Args:
        cumulative_weights: [records], `np.cumsum` of positive weights.
        seed: of the run.
        positions: [R] stream positions, in samples.
        attempt: number of draws for this position that were refused.
        source: number of the source in a mixture.

    Returns:
        int64 [R], indices of records.

    >>> ends = np.cumsum([1.0, 1.0, 2.0])
    >>> np.bincount(records_at_weighted(ends, 0, np.arange(8))).tolist()
    [2, 2, 4]
    """
    ends = np.asarray(cumulative_weights, np.float64)
    size = weighted_epoch_size(ends)
    epoch, rank = np.divmod(np.asarray(positions, np.int64), size)
    slot = permute(rank, size, hash64(seed, RECORD, source, epoch, attempt))
    word = hash64(seed, RECORD, source, epoch, attempt, 1)  # a further word: another number
    offset = (word >> np.uint64(64 - _FRACTION)).astype(np.float64) * 2.0**-_FRACTION
    place = (slot + offset) * (ends[-1] / size)
    return np.minimum(np.searchsorted(ends, place, side="right"), len(ends) - 1)

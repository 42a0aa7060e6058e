"""Finds images that are copies of each other, or crops, among many: candidates by bands of
perceptual hashes, confirmed on thumbnails. Pure functions of arrays, so any engine can run them."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from m3i_jax.data import perceptual_hash
from m3i_jax.errors import UserError

BANDS, _BITS = 4, 16  # of a hash
# values that differ in at most two bits
_PROBES = np.array(
    sorted(
        {1 << i ^ 1 << j for i in range(_BITS) for j in range(_BITS)}
        | {1 << i for i in range(_BITS)}
    ),
    np.int64,
)
MOST = 32  # candidates of one image that are confirmed, those with the nearest hashes
_PROBED = 32  # clusters that are searched for like features
_QUERIES = 4096  # images whose like features are searched for at a time
_LOOSE = 1.5  # difference below which the edges of a crop are searched for; 2: unrelated


@dataclasses.dataclass(frozen=True)
class NearFinder:
    """Finds the images of a set of which an image has a copy, or a crop, in another set.

    Two hashes are compared if at least one of their four bands differs in at most two bits: those
    that differ in at most 11 of 64 bits always are, others by chance.

    Attributes:
        hashes: uint64 [N], of the images that are searched, whole.
        thumbnails: uint8 [N, 32, 32, 3], of them.
        queries: uint8 [Q, 32, 32, 3], of those whose crops are searched for; `thumbnails` itself
            for the copies within one set.
        same: whether both are one set; an image is then no copy of itself.
        distance: most bits in which hashes differ.
        difference: most of `perceptual_hash.relative_difference`.
        crops: whether crops of the queries are searched for, or only whole images.
    """

    hashes: np.ndarray
    thumbnails: np.ndarray
    queries: np.ndarray
    same: bool
    distance: int
    difference: float
    crops: bool = True
    _order: np.ndarray = dataclasses.field(init=False, repr=False)  # [4, N]
    _starts: np.ndarray = dataclasses.field(init=False, repr=False)  # [4, 65537]

    def __post_init__(self) -> None:
        """Makes, of each band, the images by their bits there, and where each value starts: once,
        not in each process that gets the finder."""
        order = np.empty((BANDS, len(self.hashes)), np.uint32)
        starts = np.empty((BANDS, (1 << _BITS) + 1), np.int64)
        for band in range(BANDS):
            values = _band(self.hashes, band)
            order[band] = np.argsort(values, kind="stable")
            starts[band] = np.searchsorted(values[order[band]], np.arange((1 << _BITS) + 1))
        object.__setattr__(self, "_order", order)
        object.__setattr__(self, "_starts", starts)

    def __call__(self, rows: Iterable[int]) -> np.ndarray:
        """Returns the pairs of some queries, float64 [P, 7]: query, image, difference, and the
        region of the query that the image shows."""
        pairs = [pair for row in rows for pair in self._pairs(row)]
        return np.array(pairs, np.float64).reshape(-1, 7)

    def _pairs(self, row: int) -> list[tuple[float, ...]]:
        thumbnail = self.queries[row]
        asked = perceptual_hash.region_hashes(thumbnail, None if self.crops else 1)
        regions, images, bits = self._candidates(asked)
        if self.same:
            other = images != row
            regions, images, bits = regions[other], images[other], bits[other]
        # of each image the region with the nearest hash; the whole image at equal distance
        order = np.lexsort((regions, bits, images))
        first = np.ones(len(order), bool)
        first[1:] = images[order][1:] != images[order][:-1]
        nearest = order[first]
        nearest = nearest[np.argsort(bits[nearest], kind="stable")][:MOST]
        if not nearest.size:
            return []
        known = perceptual_hash.crop_regions()
        guesses = [known[i] for i in regions[nearest].tolist()]
        found, numbers = self.thumbnails[images[nearest]], images[nearest].tolist()
        crops = perceptual_hash.crop_thumbnails(thumbnail, guesses)
        differences = perceptual_hash.relative_difference(crops, found).tolist()
        pairs: list[tuple[float, ...]] = []
        for guess, part, image, value in zip(guesses, found, numbers, differences, strict=True):
            if self.crops and self.difference < value <= _LOOSE:
                value, guess = perceptual_hash.fit_crop(thumbnail, part, guess)
            if value <= self.difference:
                pairs.append((row, image, value, *guess))
        return pairs

    def _candidates(self, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (region, image, differing bits) of the hashes that may be near, with repeats."""
        regions, images = [], []
        for band, (order, starts) in enumerate(zip(self._order, self._starts, strict=True)):
            values = (_band(asked, band)[:, None] ^ _PROBES).ravel()
            begin = starts[values]
            count = starts[values + 1] - begin
            place = np.repeat(begin - count.cumsum() + count, count) + np.arange(count.sum())
            images.append(order[place])
            regions.append(np.repeat(np.arange(len(values)) // len(_PROBES), count))
        region, image = np.concatenate(regions), np.concatenate(images)
        bits = np.bitwise_count(asked[region] ^ self.hashes[image])
        near = bits <= self.distance
        return region[near], image[near], bits[near]


def _band(hashes: np.ndarray, band: int) -> np.ndarray:
    return ((hashes >> np.uint64(band * _BITS)) & np.uint64((1 << _BITS) - 1)).astype(np.int64)


def choose_best(count: int, pairs: np.ndarray, rank: Sequence[int]) -> np.ndarray:
    """Decides which images stay: the first of those that are like each other, in an order.

    An image is left out if it is paired with one that stays, not if it is only paired with one that
    is left out, so no chain of similar images joins unlike ones.

    Args:
        count: number of images.
        pairs: [P, 2 or more], numbers of two images that are like each other.
        rank: numbers of the images, the best first.

    Returns:
        int64 [count], -1 of an image that stays, else the one for which it is left out.

    >>> choose_best(4, np.array([[0, 1], [1, 2]]), [0, 1, 2, 3]).tolist()
    [-1, 0, -1, -1]
    """
    neighbours: dict[int, list[int]] = {}
    for a, b in np.asarray(pairs)[:, :2].astype(int).tolist():
        neighbours.setdefault(a, []).append(b)
        neighbours.setdefault(b, []).append(a)
    result = np.full(count, -1, np.int64)
    decided = np.zeros(count, bool)
    for image in rank:
        if decided[image]:
            continue
        decided[image] = True
        for other in neighbours.get(image, ()):
            if not decided[other]:
                decided[other], result[other] = True, image
    return result


def similar_features(features: np.ndarray, rows: Iterable[int], least: float) -> np.ndarray:
    """Returns the pairs (row, other, 1 - cosine) of rows whose features are at least so similar,
    exactly, float64 [P, 3]; `other` comes before the row.

    Args:
        features: float [N, D], of norm 1.
        rows: of which the neighbours are searched.
        least: smallest cosine.

    >>> x = np.array([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
    >>> similar_features(x, range(3), 0.7).round(2).tolist()
    [[2.0, 0.0, 0.2]]
    """
    numbers = np.fromiter(rows, np.int64)
    if not numbers.size:
        return np.zeros((0, 3))
    cosine = features[numbers] @ features[: numbers.max() + 1].T
    row, other = np.nonzero(cosine >= least)
    earlier = other < numbers[row]
    row, other = row[earlier], other[earlier]
    return np.stack([numbers[row], other, 1 - cosine[row, other]], 1).astype(np.float64)


def faiss_library() -> Any:
    """Returns the module faiss.

    Raises:
        UserError: it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise UserError(
            "the features of so many images (curate.neighbours) are compared by the package faiss,"
            " which is not installed: pip install 'm3i-jax[neighbours]', or set"
            " curate.neighbours=exact"
        ) from None
    return faiss


def approximate_features(features: np.ndarray, least: float) -> np.ndarray:
    """Returns the pairs of `similar_features` that faiss finds in the nearest of about 4 sqrt(N)
    clusters: the cosines are exact, some pairs are missing.

    Args:
        features: float32 [N, D], of norm 1.
        least: smallest cosine.

    Raises:
        UserError: faiss is not installed.
    """
    faiss = faiss_library()
    x = np.ascontiguousarray(features, np.float32)
    clusters = max(int(4 * len(x) ** 0.5), 1)
    if len(x) < 40 * clusters:  # k-means asks for 39 vectors a cluster
        clusters = max(len(x) // 40, 1)
    quantizer = faiss.IndexFlatIP(x.shape[1])
    index = faiss.IndexIVFFlat(quantizer, x.shape[1], clusters, faiss.METRIC_INNER_PRODUCT)
    index.nprobe = min(_PROBED, clusters)
    index.train(x[:: max(len(x) // (64 * clusters), 1)])
    index.add(x)
    parts = [np.zeros((0, 3))]
    for start in range(0, len(x), _QUERIES):
        asked = x[start : start + _QUERIES]
        limits, cosines, others = index.range_search(asked, least)
        rows = start + np.repeat(np.arange(len(asked)), np.diff(limits.astype(np.int64)))
        earlier = others < rows
        found = (rows[earlier], others[earlier], 1 - cosines[earlier])
        parts.append(np.stack(found, 1).astype(np.float64))
    return np.concatenate(parts)

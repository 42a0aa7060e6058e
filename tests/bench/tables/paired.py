"""Which held-out images a run classifies rightly by kNN, and the paired comparison of two methods
on the same images (`tests.bench.tables`)."""

import math
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from m3i_jax.data.sources.base import stable_digest
from m3i_jax.evaluation.knn import rank_classes
from m3i_jax.modes.features import read_feature_file


def knn_hits(file: pathlib.Path, *, k: int, temperature: float) -> dict[str, Any]:
    """The hits of kNN on the held-out images of a file of --mode=features that have a label.

    Returns:
      images: digest of keys and labels, equal for runs that can be paired; count: their number;
      knn: a bit for each in the order of the keys, as hexadecimal digits; first: bits that say
      whether an image is the first of its key, since drawings of one thing are not independent.
    """
    columns, _ = read_feature_file(str(file))
    features = columns["features"].astype(np.float32)
    features /= np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    labels, held_out = columns["labels"], columns["held_out"]
    by_key = np.argsort(columns["keys"], kind="stable")
    queries, index = (
        by_key[(held_out[by_key] == held) & (labels[by_key] >= 0)] for held in (True, False)
    )
    _, order_QxC = rank_classes(
        (features[queries], labels[queries]),
        (features[index], labels[index]),
        k=k,
        temperature=temperature,
    )
    named = [f"{columns['keys'][row]} {labels[row]}" for row in queries]
    first = [name != before for name, before in zip(named, ["", *named], strict=False)]
    return {
        "images": stable_digest(*named),
        "count": len(queries),
        "knn": _pack(order_QxC[:, 0] == labels[queries]),
        "first": _pack(np.array(first)),
    }


def _pack(bits: np.ndarray) -> str:
    return np.packbits(bits).tobytes().hex()


def unpack_hits(hits: Mapping[str, Any], name: str = "knn") -> np.ndarray:
    """The hits, or another column of bits, as booleans.

    >>> unpack_hits({"count": 3, "knn": "a0"}).tolist()
    [True, False, True]
    """
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(hits[name]), np.uint8))
    return bits[: hits["count"]].astype(bool)


def key_numbers(hits: Mapping[str, Any]) -> np.ndarray:
    """The number of the key of every image, from 0.

    >>> key_numbers({"count": 5, "first": "a8"}).tolist()
    [0, 0, 1, 1, 2]
    """
    return np.cumsum(unpack_hits(hits, "first")) - 1


class Paired(NamedTuple):
    """One method minus another: shares of hits.

    Attributes:
      difference: of the means over seeds.
      error: standard error over keys and seeds.
      p: two-sided probability of a difference as large if the methods were equal (normal).
      seeds: whether the deviation of seeds is known and part of the error.
    """

    difference: float
    error: float
    p: float
    seeds: bool = True


def paired_difference(
    one_SxN: np.ndarray,
    other_TxN: np.ndarray,
    key_N: np.ndarray,
    seed_variance: float | None,
) -> Paired:
    """Compare the hits of two methods on the same N images, with S and T seeds.

    Keys and seeds are both samples, so that their variances add: that of the differences of the
    means over seeds, summed over the images of a key, and that of a mean over images from seed to
    seed. What the two share is counted twice, so the error is rather too large.

    Args:
      key_N: number of the key of every image (`key_numbers`).
      seed_variance: of the accuracy of a single seed; None: not known, and left out.

    >>> same = np.array([[True, False, True, True]])
    >>> paired_difference(same, same, np.arange(4), None)
    Paired(difference=0.0, error=0.0, p=1.0, seeds=False)
    """
    of_images = one_SxN.mean(0) - other_TxN.mean(0)
    difference, keys = float(of_images.mean()), int(key_N.max()) + 1
    of_keys = np.bincount(key_N, of_images - difference, minlength=keys)
    variance = keys / (keys - 1) * float((of_keys**2).sum()) / of_images.size**2
    variance += (seed_variance or 0.0) * (1 / len(one_SxN) + 1 / len(other_TxN))
    error, seeds = math.sqrt(variance), seed_variance is not None
    if not error:
        return Paired(difference, error, float(difference == 0), seeds)
    p = 2 * statistics.NormalDist().cdf(-abs(difference) / error)
    return Paired(difference, error, p, seeds)


def pooled_variance(accuracies: Iterable[Sequence[float]]) -> float | None:
    """The variance of a seed, pooled over methods, each with the accuracies of its seeds; None
    unless one has two. A deviation of two or three seeds alone would be too uncertain for a test.

    >>> pooled_variance([(1.0, 3.0), (5.0, 5.0), (7.0,)]), pooled_variance([(1.0,)])
    (1.0, None)
    """
    several = [list(of) for of in accuracies if len(of) > 1]
    squares = sum((len(of) - 1) * statistics.variance(of) for of in several)
    return squares / sum(len(of) - 1 for of in several) if several else None


def compare_with(reference: str, results: Sequence[Mapping[str, Any]]) -> dict[str, Paired]:
    """{row: `paired_difference` of its hits and those of the row `reference`}, of the results of
    one set and protocol that have hits on the same images."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        if "hits" in result:
            found.setdefault(result["form"], []).append(result["hits"])
    known = found.get(reference, [])
    images = {hits["images"] for hits in known}
    if len(images) != 1:
        return {}
    same = {
        title: np.stack(rows)
        for title, of in found.items()
        if (rows := [unpack_hits(hits) for hits in of if hits["images"] in images])
    }
    variance = pooled_variance(hits_SxN.mean(1).tolist() for hits_SxN in same.values())
    base, keys = same.pop(reference), key_numbers(known[0])
    return {title: paired_difference(hits, base, keys, variance) for title, hits in same.items()}


def paired_text(paired: Paired | None) -> str:
    """The cell of a table, in per cent; without p where the deviation of seeds is not known.

    >>> paired_text(Paired(0.0123, 0.004, 0.002)), paired_text(None)
    ('+1.2 ± 0.4, p 0.002', '-')
    >>> paired_text(Paired(0.0123, 0.004, 0.002, seeds=False))
    '+1.2 ± 0.4 (one seed)'
    """
    if paired is None:
        return "-"
    difference, error = 100 * paired.difference, 100 * paired.error
    if not paired.seeds:
        return f"{difference:+.1f} ± {error:.1f} (one seed)"
    p = "p < 0.001" if paired.p < 0.001 else f"p {paired.p:.3f}"
    return f"{difference:+.1f} ± {error:.1f}, {p}"

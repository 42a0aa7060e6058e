"""Which held-out images a run classifies rightly by kNN, and the paired comparison of two methods
on the same images (`tests.bench.tables`)."""

import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from m3i_jax.data.sources.base import stable_digest
from m3i_jax.evaluation.knn import rank_classes
from m3i_jax.modes.features import read_feature_file


def knn_hits(file: pathlib.Path, *, k: int, temperature: float) -> dict[str, Any]:
    """The hits of kNN on the held-out images of a file of --mode=features that have a label.

    Returns:
      images: digest of keys and labels, equal for runs that can be paired; count: their number;
      knn: a bit for each in the order of the keys, as hexadecimal digits.
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
    named = (f"{columns['keys'][row]} {labels[row]}" for row in queries)
    return {
        "images": stable_digest(*named),
        "count": len(queries),
        "knn": np.packbits(order_QxC[:, 0] == labels[queries]).tobytes().hex(),
    }


def unpack_hits(hits: Mapping[str, Any]) -> np.ndarray:
    """The hits as booleans.

    >>> unpack_hits({"count": 3, "knn": "a0"}).tolist()
    [True, False, True]
    """
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(hits["knn"]), np.uint8))
    return bits[: hits["count"]].astype(bool)


class Paired(NamedTuple):
    """One method minus another: shares of hits.

    Attributes:
      difference: of the means over seeds.
      error: standard error over images and, with two seeds of both or more, over seeds.
      p: two-sided probability of a difference as large if the methods were equal (normal).
    """

    difference: float
    error: float
    p: float


def paired_difference(one_SxN: np.ndarray, other_TxN: np.ndarray) -> Paired:
    """Compare the hits of two methods on the same N images, with S and T seeds.

    Images and seeds are both samples, so that their variances add: that of the N differences of the
    means over seeds, and that of the means over images of the seeds of either method. What the two
    share is counted twice, so the error is rather too large.

    >>> same = np.array([[True, False, True, True]])
    >>> paired_difference(same, same)
    Paired(difference=0.0, error=0.0, p=1.0)
    """
    of_images = one_SxN.mean(0) - other_TxN.mean(0)
    variance = of_images.var(ddof=1) / of_images.size
    if min(len(one_SxN), len(other_TxN)) > 1:
        variance += sum(hits.mean(1).var(ddof=1) / len(hits) for hits in (one_SxN, other_TxN))
    difference, error = float(of_images.mean()), math.sqrt(variance)
    if not error:
        return Paired(difference, error, float(difference == 0))
    p = 2 * statistics.NormalDist().cdf(-abs(difference) / error)
    return Paired(difference, error, p)


def compare_with(reference: str, results: Sequence[Mapping[str, Any]]) -> dict[str, Paired]:
    """{row: `paired_difference` of its hits and those of the row `reference`}, of the results of
    one set and protocol that have hits on the same images."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        if "hits" in result:
            found.setdefault(result["form"], []).append(result["hits"])
    known = found.pop(reference, [])
    images = {hits["images"] for hits in known}
    if len(images) != 1:
        return {}
    base = np.stack([unpack_hits(hits) for hits in known])
    same = {title: [h for h in hits if h["images"] in images] for title, hits in found.items()}
    return {
        title: paired_difference(np.stack([unpack_hits(h) for h in hits]), base)
        for title, hits in same.items()
        if hits
    }


def paired_text(paired: Paired | None) -> str:
    """The cell of a table, in per cent.

    >>> paired_text(Paired(0.0123, 0.004, 0.002)), paired_text(None)
    ('+1.2 ± 0.4, p 0.002', '-')
    """
    if paired is None:
        return "-"
    difference, error = 100 * paired.difference, 100 * paired.error
    p = "p < 0.001" if paired.p < 0.001 else f"p {paired.p:.3f}"
    return f"{difference:+.1f} ± {error:.1f}, {p}"

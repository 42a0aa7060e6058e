"""Computes the statistics of scanned records: sizes, aspect ratios, categories, captions, bad
records and duplicates, as values that JSON can hold."""

import collections
import math
from collections.abc import Callable, Container, Sequence
from typing import Any

import numpy as np

from m3i_jax.data import decode
from m3i_jax.data.dataset_scan import RecordInfo

SIDES = (0, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)  # pixels, lower edges
# width over height, lower edges
ASPECTS = (0.0, 1 / 3, 1 / 2, 2 / 3, 3 / 4, 9 / 10, 10 / 9, 4 / 3, 3 / 2, 2.0, 3.0)
ASPECT_NAMES = ("1:3", "1:2", "2:3", "3:4", "9:10", "10:9", "4:3", "3:2", "2:1", "3:1")
# ids per caption without start and end, lower edges
TOKENS = (0, 1, 5, 9, 17, 25, 33, 49, 65, 76, 129, 257)
EXAMPLES = 5
Histogram = list[tuple[str, int]]


def histogram(
    values: Sequence[float], edges: Sequence[float], names: Sequence[str] = ()
) -> Histogram:
    """Counts values between edges, without the empty bins at both ends. `names` are those of all
    edges but the first; without names, the values are whole numbers.

    >>> histogram([1, 40, 40, 70], (0, 32, 64, 128))
    [('below 32', 1), ('32-63', 2), ('64-127', 1)]
    >>> histogram([0.7, 2.5], (0.0, 0.5, 1.0, 2.0), ("1:2", "1:1", "2:1"))
    [('1:2-1:1', 1), ('1:1-2:1', 0), ('2:1 and more', 1)]
    """
    bins = np.searchsorted(np.asarray(edges), np.asarray(values, np.float64), "right") - 1
    counts = np.bincount(bins, minlength=len(edges))
    text = list(names) or [f"{edge:g}" for edge in edges[1:]]
    ends = text[1:] if names else [f"{edge - 1:g}" for edge in edges[2:]]
    between = [
        start if start == end else f"{start}-{end}" for start, end in zip(text, ends, strict=False)
    ]
    labels = [f"below {text[0]}", *between, f"{text[-1]} and more"]
    bars = [(label, int(count)) for label, count in zip(labels, counts, strict=True)]
    used = [i for i, (_, count) in enumerate(bars) if count]
    return bars[used[0] : used[-1] + 1] if used else []


def dataset_stats(
    infos: Sequence[RecordInfo],
    *,
    classes: Sequence[str],
    kept: int,
    length: int,
    ids: Callable[[str], int] | None,
    held_out: Container[int] = (),
) -> dict[str, Any]:
    """Computes all statistics of the scanned records.

    Args:
        infos: of the records, in any order.
        classes: names of the classes of the source.
        kept: number of classes that the run uses; labels beyond are dropped.
        length: ids to which a caption is cut, start and end included.
        ids: returns the number of ids of a cleaned caption; None if captions are not used.
        held_out: indices of the held-out records.

    Returns:
        The sections "pictures", "bad", "sizes", "categories", "captions" and "duplicates".

    >>> info = RecordInfo(0, "a", "PNG", 9, b"x", "", "", 30, 40, 0, "a cat")
    >>> def count_words(text): return len(text.split())
    >>> stats = dataset_stats([info, info], classes=("cat",), kept=1, length=8, ids=count_words)
    >>> stats["duplicates"]["records"], stats["categories"]["table"], stats["captions"]["median"]
    (1, [('cat', 2)], 2)
    """
    good = [s for s in infos if not s.reason]
    return {
        "pictures": {
            "looked_at": len(infos),
            "usable": len(good),
            "bad": len(infos) - len(good),
            "with_label": sum(s.label >= 0 for s in good),
            "with_caption": sum(s.caption is not None for s in good),
            "with_neither": sum(s.label < 0 and s.caption is None for s in good),
            "bytes": sum(s.size for s in infos),
            "formats": collections.Counter(s.kind for s in good).most_common(),
        },
        "bad": _bad(infos),
        "sizes": _sizes(good),
        "categories": _categories(good, classes, kept),
        "captions": _captions(good, length, ids),
        "duplicates": _duplicates(good, held_out),
    }


def _bad(infos: Sequence[RecordInfo]) -> list[dict[str, Any]]:
    rows = []
    for reason in dict.fromkeys((*decode.REASONS, *(s.reason for s in infos if s.reason))):
        if bad := [s for s in infos if s.reason == reason]:
            examples = [(s.key, s.detail) for s in bad[:EXAMPLES]]
            rows.append({"reason": reason, "count": len(bad), "examples": examples})
    return sorted(rows, key=lambda row: -row["count"])


def _sizes(good: Sequence[RecordInfo]) -> dict[str, Any]:
    sides, aspects = [min(s.height, s.width) for s in good], [s.width / s.height for s in good]
    return {
        "short_side": histogram(sides, SIDES),
        "aspect": histogram(aspects, ASPECTS, ASPECT_NAMES),
        "median_height": _percentile([s.height for s in good], 50),
        "median_width": _percentile([s.width for s in good], 50),
    }


def _categories(good: Sequence[RecordInfo], classes: Sequence[str], kept: int) -> dict[str, Any]:
    labels = np.array([s.label for s in good if s.label >= 0], np.int64)
    counts = np.bincount(labels, minlength=max(len(classes), kept))
    names = [classes[i] if i < len(classes) else str(i) for i in range(len(counts))]
    used = counts[:kept] if kept else counts
    share = used[used > 0] / max(int(used.sum()), 1)
    order = np.argsort(-counts, kind="stable")
    return {
        "in_source": len(classes),
        "used": kept,
        "dropped": int(counts[kept:].sum()) if kept else 0,
        "empty": [names[i] for i in range(len(used)) if not used[i]],
        "smallest": int(used.min()) if len(used) else 0,
        "median": float(np.median(used)) if len(used) else 0.0,
        "largest": int(used.max()) if len(used) else 0,
        # exp(entropy), the number of classes of equal size with the same entropy
        "effective": (
            round(float(math.exp(-(share * np.log(share)).sum())), 2) if len(share) else 0.0
        ),
        "table": [(names[i], int(counts[i])) for i in order],
    }


def _captions(
    good: Sequence[RecordInfo], length: int, ids: Callable[[str], int] | None
) -> dict[str, Any]:
    texts = [s.caption for s in good if s.caption is not None]
    if ids is None or not texts:
        return {"used": ids is not None, "count": len(texts), "limit": length}
    counts = [ids(text) for text in texts]
    return {
        "used": True,
        "count": len(texts),
        "limit": length,
        "different": len(set(texts)),
        "mean": round(float(np.mean(counts)), 2),
        "median": _percentile(counts, 50),
        "percentile_95": _percentile(counts, 95),
        "longest": max(counts),
        "truncated": sum(count > length - 2 for count in counts),
        "tokens": histogram(counts, TOKENS),
    }


def _duplicates(good: Sequence[RecordInfo], held_out: Container[int]) -> dict[str, Any]:
    groups: dict[bytes, list[RecordInfo]] = {}
    for s in good:
        groups.setdefault(s.content, []).append(s)
    repeated = sorted((g for g in groups.values() if len(g) > 1), key=len, reverse=True)
    return {
        "records": sum(len(g) - 1 for g in repeated),
        "groups": len(repeated),
        "with_several_labels": sum(len({s.label for s in g}) > 1 for g in repeated),
        "in_both_parts": sum(len({s.index in held_out for s in g}) > 1 for g in repeated),
        "examples": [[s.key for s in g[:EXAMPLES]] for g in repeated[:EXAMPLES]],
    }


def _percentile(values: Sequence[int], share: float) -> int:
    return int(np.percentile(values, share, method="lower")) if values else 0

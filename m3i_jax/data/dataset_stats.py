"""Figures of a survey: sizes, aspects, categories, captions, bad records and duplicates, as plain
numbers and lists that JSON holds."""

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
# ids of a caption without start and end, lower edges
TOKENS = (0, 1, 5, 9, 17, 25, 33, 49, 65, 76, 129, 257)
EXAMPLES = 5
Histogram = list[tuple[str, int]]


def histogram(
    values: Sequence[float], edges: Sequence[float], names: Sequence[str] = ()
) -> Histogram:
    """Counts between edges, in order, without the empty bins at both ends. `names` are those of the
    edges but the first; without them, the values are whole numbers.

    >>> histogram([1, 40, 40, 70], (0, 32, 64, 128))
    [('below 32', 1), ('32-63', 2), ('64-127', 1)]
    >>> histogram([0.7, 2.5], (0.0, 0.5, 1.0, 2.0), ("1:2", "1:1", "2:1"))
    [('1:2-1:1', 1), ('1:1-2:1', 0), ('2:1 and more', 1)]
    """
    places = np.searchsorted(np.asarray(edges), np.asarray(values, np.float64), "right") - 1
    counts = np.bincount(places, minlength=len(edges))
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
    seen: Sequence[RecordInfo],
    *,
    classes: Sequence[str],
    kept: int,
    length: int,
    ids: Callable[[str], int] | None,
    held_out: Container[int] = (),
) -> dict[str, Any]:
    """Everything that is counted.

    Args:
        seen: what each record told, in any order.
        classes: names of the source's categories.
        kept: how many of them the run uses; labels beyond are dropped.
        length: ids a caption is cut to, start and end included.
        ids: number of ids of a cleaned caption, or None where captions are not used.
        held_out: indices of the records that are held out.

    Returns:
        The sections "pictures", "bad", "sizes", "categories", "captions" and "duplicates".

    >>> one = RecordInfo(0, "a", "PNG", 9, b"x", "", "", 30, 40, 0, "a cat")
    >>> made = dataset_stats([one, one], classes=("cat",), kept=1, length=8, ids=lambda text: len(text.split()))
    >>> made["duplicates"]["records"], made["categories"]["table"], made["captions"]["median"]
    (1, [('cat', 2)], 2)
    """
    good = [s for s in seen if not s.reason]
    return {
        "pictures": {
            "looked_at": len(seen),
            "usable": len(good),
            "bad": len(seen) - len(good),
            "with_label": sum(s.label >= 0 for s in good),
            "with_caption": sum(s.caption is not None for s in good),
            "with_neither": sum(s.label < 0 and s.caption is None for s in good),
            "bytes": sum(s.size for s in seen),
            "formats": collections.Counter(s.kind for s in good).most_common(),
        },
        "bad": _bad(seen),
        "sizes": _sizes(good),
        "categories": _categories(good, classes, kept),
        "captions": _captions(good, length, ids),
        "duplicates": _duplicates(good, held_out),
    }


def _bad(seen: Sequence[RecordInfo]) -> list[dict[str, Any]]:
    out = []
    for reason in decode.REASONS:
        found = [s for s in seen if s.reason == reason]
        if found:
            out.append(
                {
                    "reason": reason,
                    "count": len(found),
                    "examples": [(s.key, s.detail) for s in found[:EXAMPLES]],
                }
            )
    return sorted(out, key=lambda row: -row["count"])


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
    inside = counts[:kept] if kept else counts
    share = inside[inside > 0] / max(int(inside.sum()), 1)
    order = np.argsort(-counts, kind="stable")
    return {
        "in_source": len(classes),
        "used": kept,
        "dropped": int(counts[kept:].sum()) if kept else 0,
        "empty": [names[i] for i in range(len(inside)) if not inside[i]],
        "smallest": int(inside.min()) if len(inside) else 0,
        "median": float(np.median(inside)) if len(inside) else 0.0,
        "largest": int(inside.max()) if len(inside) else 0,
        # exp(entropy): as many equally large ones would be as uncertain
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
    twice = sorted((g for g in groups.values() if len(g) > 1), key=len, reverse=True)
    return {
        "records": sum(len(g) - 1 for g in twice),
        "groups": len(twice),
        "with_several_labels": sum(len({s.label for s in g}) > 1 for g in twice),
        "in_both_parts": sum(len({s.index in held_out for s in g}) > 1 for g in twice),
        "examples": [[s.key for s in g[:EXAMPLES]] for g in twice[:EXAMPLES]],
    }


def _percentile(values: Sequence[int], share: float) -> int:
    return int(np.percentile(values, share, method="lower")) if values else 0

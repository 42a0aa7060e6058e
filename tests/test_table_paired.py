"""Hits of kNN and the paired comparison of two methods (`tests.bench.tables.paired`)."""

import pathlib

import numpy as np
import pytest

from tests.bench.tables import paired


def test_methods_are_compared_on_the_same_images(tmp_path: pathlib.Path) -> None:
    """Hits of a file of features, and a difference whose error is that of a paired test."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 8)).astype(np.float32)
    labels, keys_ = rng.integers(-1, 2, 60), np.array([f"{n:02d}" for n in range(60)])
    held_out = np.arange(60) >= 40
    order = rng.permutation(60)
    found = []
    for name, at in (("a", np.arange(60)), ("b", order)):
        columns = {"keys": keys_, "labels": labels, "held_out": held_out, "features": features}
        np.savez(
            tmp_path / f"{name}.npz", about=np.array("{}"), **{k: v[at] for k, v in columns.items()}
        )
        found.append(paired.knn_hits(tmp_path / f"{name}.npz", k=1, temperature=1.0))
    assert found[0] == found[1]  # the order of the images does not matter
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    index, queries = (np.flatnonzero((held_out == held) & (labels >= 0)) for held in (0, 1))
    nearest = index[(unit[queries] @ unit[index].T).argmax(1)]
    expected = (labels[nearest] == labels[queries]).tolist()
    assert paired.unpack_hits(found[0]).tolist() == expected

    # McNemar's test has the same statistic up to the variance under equality
    one, other = rng.random(1000) < 0.6, rng.random(1000) < 0.5
    more, less = (one & ~other).sum(), (other & ~one).sum()
    got = paired.paired_difference(one[None], other[None], np.arange(1000), None)
    assert got.difference == pytest.approx((more - less) / 1000)
    z = (more - less) / (more + less - (more - less) ** 2 / 1000) ** 0.5
    assert got.difference / got.error == pytest.approx(z, rel=1e-3)
    assert 0.01 < got.p < 0.02
    # two drawings of one thing that are hit alike are one image
    twice = [np.repeat(hits, 2)[None] for hits in (one, other)]
    doubled = paired.paired_difference(*twice, np.repeat(np.arange(1000), 2), None)
    assert doubled[:3] == pytest.approx(got[:3])
    assert paired.paired_difference(*twice, np.arange(2000), None).error < 0.75 * got.error


def test_seeds_are_part_of_the_error_of_rows_with_one() -> None:
    """The deviation of a seed comes from the rows that have several."""

    def result_of(form: str, seed: int, hit: int) -> dict:
        hits = np.arange(100) < hit
        packed = {"knn": np.packbits(hits).tobytes().hex(), "first": "ff" * 13}
        return {"form": form, "seed": seed, "hits": {"images": "", "count": 100} | packed}

    one = [result_of("M3I", 0, 50), result_of("MAE", 0, 40), result_of("sim", 0, 30)]
    alone = paired.compare_with("M3I", one)
    assert set(alone) == {"MAE", "sim"} and not alone["MAE"].seeds
    # two rows with variances of 32 and 8 square points each
    more = [*one, result_of("M3I", 1, 58), result_of("MAE", 1, 44)]
    both = paired.compare_with("M3I", more)
    variance = 20e-4
    difference = np.arange(100) < 54, np.arange(100) < 30  # means over seeds have halves
    halves = np.where((np.arange(100) >= 50) & (np.arange(100) < 58), 0.5, difference[0])
    images = (halves - difference[1]).var(ddof=1) / 100
    assert both["sim"].error == pytest.approx((images + variance * (1 / 2 + 1)) ** 0.5)
    assert both["sim"].seeds and both["sim"].difference == pytest.approx(-0.24)

"""Where two methods cross over widths and steps: planes, their errors, text and page."""

import re

import numpy as np
import pytest

from tests.bench.tables import crossing, paired
from tests.bench.tables import page as table_page
from tests.bench.tables import results as table_results
from tests.bench.tables import rows as table_rows
from tests.bench.tables import sets as table_sets

METHODS = ("M3I", "supervised")
SCALING = table_sets.Set(
    "scaling",
    "",
    "",
    {},
    rows=table_rows.scaling_rows(METHODS, (750, 1500, 3000)),
    fitted=METHODS,
)


def pack(hits: np.ndarray, drawings: int = 1) -> dict[str, object]:
    """Hits of images of which `drawings` in a row have the same key."""
    bits = {"knn": hits, "first": np.arange(len(hits)) % drawings == 0}
    packed = {name: np.packbits(of).tobytes().hex() for name, of in bits.items()}
    return {"images": "", "count": len(hits)} | packed


def _scaling_results(one: table_sets.Set, images: int = 1000) -> list[dict[str, object]]:
    """Runs whose accuracies are planes: M3I is level with `supervised` at 3,000 steps."""
    out = []
    for title, row in one.rows.items():
        width = np.log2(int(row.settings["model.encoder.width"]) / 96)
        steps = np.log2(row.steps / 1500)
        m3i = title.startswith("M3I")
        accuracy = 0.40 + 0.03 * width + 0.06 * steps if m3i else 0.42 + 0.03 * width + 0.04 * steps
        hits = np.arange(images) < round(images * accuracy)
        out.append(
            {
                "set": one.name,
                "protocol": "epochs",
                "form": title,
                "seed": 0,
                "values": {
                    "eval/knn/top1": hits.mean(),
                    "loss": 1.0,
                    "loss/equal_weights": 2.0 * 2 ** (-0.1 * width - 0.2 * steps),
                    "steps": row.steps,
                    "seconds": 1.0,
                    "flops": row.steps * 4.0**width * (2e9 if m3i else 1e9),
                },
                "hits": pack(hits),
            }
        )
    return out


def test_two_methods_cross_where_their_planes_do() -> None:
    one = SCALING
    results = _scaling_results(one)
    runs = [crossing.runs_of(one, method, results) for method in one.fitted]
    planes = crossing.resample_planes(runs, 4000)
    np.testing.assert_allclose(planes[0][0], [0.40, 0.03, 0.06], atol=1e-3)
    assert crossing.level_steps(planes, 192)[0] == pytest.approx(3000, rel=0.05)
    # A plane at the centre of nine runs is their mean, and the error that of a mean over images.
    error = (runs[0].hits_RxN.mean(0) - runs[1].hits_RxN.mean(0)).std() / np.sqrt(1000)
    assert crossing.lead(planes, 96, 1500)[1:].std() == pytest.approx(error, rel=0.15)
    # Drawings of one thing are one: hits that come in pairs have an error larger by sqrt(2).
    pairs = [dict(r, hits=pack(paired.unpack_hits(r["hits"]), 2)) for r in results]
    runs = [crossing.runs_of(one, method, pairs) for method in one.fitted]
    error_of_pairs = crossing.lead(crossing.resample_planes(runs, 4000), 96, 1500)[1:].std()
    assert error_of_pairs == pytest.approx(error * np.sqrt(2), rel=0.15)
    text = table_results.tables_text({one.name: one}, results)
    # Steps of M3I cost twice as much: at equal FLOPs 0.40 + 0.06 s = 0.42 + 0.04 (s + 1), s = 3.
    equal = re.search(r"\| FLOPs \| 96 \|.*\| ([\d,]+) \(", text)
    assert equal and float(equal[1].replace(",", "")) == pytest.approx(12000, rel=0.05)
    assert "-0.100 | -0.200 |" in text and "12,000 (extrapolated)" in text
    page = table_page.tables_page({one.name: one}, results, table_results.TITLES)
    assert (
        page.count("<path") == 6
        and " at TFLOP " in page
        and " at step " not in page
        and "M3I, width 192" in page
    )


def test_residuals_widen_the_error_of_a_crossing() -> None:
    """Runs that scatter by three points about their planes, which no resampling of images shows."""
    one, rng = SCALING, np.random.default_rng(0)
    errors = []
    for scatter in (0.0, 0.03):
        results = _scaling_results(one)
        for result in results:
            share = np.clip(
                paired.unpack_hits(result["hits"]).mean() + scatter * rng.normal(), 0, 1
            )
            hits = np.arange(1000) < round(1000 * share)
            result["hits"] = pack(hits)
        runs = [crossing.runs_of(one, method, results) for method in one.fitted]
        errors.append(crossing.lead(crossing.resample_planes(runs), 96, 1500)[1:].std())
    # A plane at the centre of nine runs is their mean; the lead is the difference of two.
    assert errors[1] == pytest.approx(np.hypot(errors[0], 0.03 * np.sqrt(2 / 9)), rel=0.5)
    assert errors[1] > 2 * errors[0]

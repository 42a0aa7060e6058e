"""How kNN accuracy grows with width and steps, and where two methods cross, with error bars
(`tests.bench.tables`)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from m3i_jax.reporting import svg_charts
from tests.bench.tables.paired import key_numbers, unpack_hits
from tests.bench.tables.sets import Set

WIDTH, STEPS = 96, 1500  # where the constant of a fit is measured
FURTHER = 4  # times the longest run: how far the text extrapolates
REPLICATES = 2000
Results = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Runs:
    """The runs of one method at several widths and steps.

    Attributes:
      design_Rx3: 1, log2(width / 96), log2(steps / 1500) of every run.
      hits_RxN: which held-out images kNN classifies rightly.
      key_N: number of the key of every image; [0] without runs.
      loss_R: at the end of a run, with the weights of the start of training: the balance of M3I
        moves, which a power law would not describe.
      flops_R: of a run.
    """

    design_Rx3: np.ndarray
    hits_RxN: np.ndarray
    key_N: np.ndarray
    loss_R: np.ndarray
    flops_R: np.ndarray

    @property
    def steps_R(self) -> np.ndarray:
        return STEPS * 2.0 ** self.design_Rx3[:, 2]

    @property
    def flops_a_step(self) -> dict[int, float]:
        """{width: FLOPs of a step}."""
        widths = np.rint(WIDTH * 2.0 ** self.design_Rx3[:, 1]).astype(int)
        return dict(zip(widths.tolist(), (self.flops_R / self.steps_R).tolist(), strict=True))


def runs_of(image_set: Set, method: str, results: Results) -> Runs:
    """The runs of a method among the results of a set."""
    found, key_N = [], np.zeros(0, int)
    for result in results:
        row = image_set.rows.get(result["form"])
        if row is None or row.searched != method:
            continue
        place = (int(row.settings["model.encoder.width"]) / WIDTH, row.steps / STEPS)
        values, key_N = result["values"], key_numbers(result["hits"])
        loss = values.get("loss/equal_weights", values["loss"])
        hits = unpack_hits(result["hits"])
        found.append(([1.0, *np.log2(place)], hits, loss, values["flops"]))
    design, hits, loss, flops = zip(*found, strict=True) if found else ((), (), (), ())
    design_Rx3 = np.array(design).reshape(-1, 3)
    return Runs(design_Rx3, np.array(hits), key_N, np.array(loss), np.array(flops))


def fit_plane(design_Rx3: np.ndarray, value_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares of value = a + b log2(width / 96) + c log2(steps / 1500).

    Returns:
      (a, b, c) and the R residuals, scaled to the variance of the errors: a residual is smaller
      than its error by sqrt(1 - h), h the leverage of its run, which is largest at the corners.

    >>> design = np.array([[1.0, w, s] for w in (-1, 0, 1) for s in (-1, 0, 1)])
    >>> np.round(fit_plane(design, design @ [0.4, 0.02, 0.05])[0], 3).tolist()
    [0.4, 0.02, 0.05]
    """
    plane_3, *_ = np.linalg.lstsq(design_Rx3, value_R, rcond=None)
    orthogonal, _ = np.linalg.qr(design_Rx3)
    unexplained_R = np.maximum(1 - (orthogonal**2).sum(1), 1e-6)
    return plane_3, (value_R - design_Rx3 @ plane_3) / np.sqrt(unexplained_R)


def resample_planes(
    runs: Sequence[Runs], replicates: int = REPLICATES, seed: int = 0
) -> list[np.ndarray]:
    """Planes of kNN accuracy of every method, and how far they would differ with other images and
    seeds.

    A replicate draws the keys of the held-out images anew with replacement, the same for all
    methods, and gives every run its residual with a random sign (the wild bootstrap), which stands
    for seeds and for what a plane does not describe.

    Returns:
      For every method (1 + replicates, 3): first the plane of the runs as they are.
    """
    rng = np.random.default_rng(seed)
    key_N, keys = runs[0].key_N, int(runs[0].key_N.max()) + 1
    weights_PxN = rng.multinomial(keys, np.full(keys, 1 / keys), size=replicates)[:, key_N]
    weights_PxN = weights_PxN / weights_PxN.sum(1, keepdims=True)
    planes = []
    for one in runs:
        plane_3, residual_R = fit_plane(one.design_Rx3, one.hits_RxN.mean(1))
        accuracy_PxR = weights_PxN @ one.hits_RxN.T
        signs_PxR = rng.choice([-1.0, 1.0], size=accuracy_PxR.shape)
        value_PxR = accuracy_PxR + signs_PxR * residual_R
        replicate_3xP = np.linalg.lstsq(one.design_Rx3, value_PxR.T, rcond=None)[0]
        planes.append(np.concatenate([plane_3[None], replicate_3xP.T]))
    return planes


def lead(
    planes: Sequence[np.ndarray], width: float, steps: float, ratio: float = 1.0
) -> np.ndarray:
    """Accuracy of the first method minus that of the second for every replicate.

    Args:
      ratio: steps of the second for one of the first; more than 1 at equal FLOPs if its steps are
        cheaper.
    """
    place_3 = np.array([1.0, np.log2(width / WIDTH), np.log2(steps / STEPS)])
    other_3 = place_3 + [0.0, 0.0, np.log2(ratio)]
    return planes[0] @ place_3 - planes[1] @ other_3


def level_steps(planes: Sequence[np.ndarray], width: float, ratio: float = 1.0) -> np.ndarray:
    """Steps of the first method from which it leads, for every replicate; infinite where it gains
    no more with steps than the second: then it never leads, or did before.

    >>> planes = [np.array([[0.40, 0.0, 0.06]]), np.array([[0.42, 0.0, 0.04]])]
    >>> level_steps(planes, 96), level_steps(planes[::-1], 96)
    (array([3000.]), array([inf]))
    """
    behind = -lead(planes, width, STEPS, ratio)
    slope = planes[0][:, 2] - planes[1][:, 2]
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        steps = STEPS * np.exp2(behind / slope)
    return np.where(slope > 0, steps, np.inf)


def crossing_text(image_set: Set, results: Results) -> str:
    """The planes of both methods of `image_set.fitted`, the lead of the first and where it begins,
    as Markdown; "" unless each has at least 5 runs, of several widths and steps."""
    methods = image_set.fitted
    if not methods:
        return ""
    runs = [runs_of(image_set, method, results) for method in methods]
    if any(len(r.loss_R) < 5 or np.linalg.matrix_rank(r.design_Rx3) < 3 for r in runs):
        return ""
    planes = resample_planes(runs)
    one, other = methods
    lines = [
        "kNN fitted as a + b log2(width / 96) + c log2(steps / 1500), loss as a power law:",
        "",
    ]
    lines += ["| method | a % | b % | c % | loss ~ width^ | loss ~ steps^ |", "|---|" + "---:|" * 5]
    for method, of, plane in zip(methods, runs, planes, strict=True):
        power_3, _ = fit_plane(of.design_Rx3, np.log2(of.loss_R))
        fitted = (
            f"{100 * v:.1f} ± {100 * e:.1f}"
            for v, e in zip(plane[0], plane[1:].std(0), strict=True)
        )
        lines.append(f"| {method} | {' | '.join(fitted)} | {power_3[1]:.3f} | {power_3[2]:.3f} |")
    steps = sorted({round(float(s)) for s in runs[0].steps_R})
    steps += [FURTHER * steps[-1]]
    costs = [of.flops_a_step for of in runs]
    titles = [f"{n:,} steps" for n in steps[:-1]] + [f"{steps[-1]:,} (extrapolated)"]
    lines += [
        "",
        f"{one} minus {other}, points of kNN, and the steps of {one} from which it leads:",
    ]
    lines += ["", f"| equal | width | {' | '.join(titles)} | leads from (90 %) |"]
    lines += ["|---|" + "---:|" * (len(steps) + 2)]
    for equal in ("images", "FLOPs"):
        for width in sorted(set(costs[0]) & set(costs[1])):
            ratio = costs[0][width] / costs[1][width] if equal == "FLOPs" else 1.0
            leads = (lead(planes, width, n, ratio) for n in steps)
            cells = [f"{100 * d[0]:+.1f} ± {100 * d[1:].std():.1f}" for d in leads]
            cells += [_range_text(level_steps(planes, width, ratio))]
            if planes[0][0, 2] <= planes[1][0, 2]:
                cells[-1] = "gains less with steps"
            lines.append(f"| {equal} | {width} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _range_text(steps_P: np.ndarray) -> str:
    """
    >>> _range_text(np.array([2000.0, *np.linspace(1000, 3000, 101)]))
    '2,000 (1,100 to 2,900)'
    >>> _range_text(np.array([np.inf, 1000.0, np.inf, np.inf]))
    'never (1,000 to never)'
    """

    def text(steps: float) -> str:
        return f"{steps:,.0f}" if steps < 1e6 else "never"

    low, high = np.quantile(steps_P[1:], (0.05, 0.95), method="nearest")
    return f"{text(steps_P[0])} ({text(low)} to {text(high)})"


def crossing_charts(image_set: Set, results: Results) -> str:
    """kNN over FLOPs of both methods at every width, as HTML; "" without runs."""
    curves, last = [], 0.0
    for number, method in enumerate(image_set.fitted):
        of = runs_of(image_set, method, results)
        if not len(of.loss_R):
            continue
        for tone, width in enumerate(sorted(of.flops_a_step)):
            mine = np.isclose(of.design_Rx3[:, 1], np.log2(width / WIDTH))
            flops = np.unique(of.flops_R[mine])
            means = [100 * of.hits_RxN[mine & (of.flops_R == f)].mean() for f in flops]
            tera = (flops * 1e-12).tolist()
            last = max(last, *tera)
            curves.append(
                svg_charts.SvgCurve(
                    f"{method}, width {width}", tera, means, f"c{3 * number + tone}"
                )
            )
    if not curves:
        return ""
    legend = "".join(f"<span><i class={c.tone}></i>{c.name}</span>" for c in curves)
    chart = svg_charts.svg_chart("kNN, % over TFLOP", curves, last=last, linear=True, axis="TFLOP")
    return f'<div class="legend">{legend}</div><div class="charts">{chart}</div>'

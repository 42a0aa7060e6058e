"""Evaluators that draw: where the encoder looks, which classes it takes for which, what it reads
into images, whom it holds to be alike.

Each gives an exhibit in WORKDIR/pictures, <step>-<kind>.png and .json, which `report.html` shows;
the embedding report a figure too. They run when a training is done and in --mode=eval, on the
features that the other evaluators have made already."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from m3i_jax import privacy
from m3i_jax.data import eval_batches
from m3i_jax.data.preprocessing import Preprocessing
from m3i_jax.evaluation import attention_maps
from m3i_jax.evaluation.feature_extraction import EvalContext, Metric, Predictions, extract_set
from m3i_jax.evaluation.zero_shot import ClassPrompts
from m3i_jax.modes.setup import Setup
from m3i_jax.reporting import confusion_matrix as confused
from m3i_jax.reporting import embedding_map, figures, image_grid, panels
from m3i_jax.reporting.figures import Figure, FigureLine, FigureRow, FigureTile

# images whose neighbours or whose attention is shown; that are named; texts of one of them
ROWS, FEW, TEXTS = 12, 8, 5
Batches = Callable[[list[int]], eval_batches.EvaluationBatches]


@dataclasses.dataclass
class FigureWriter:
    """Where and under which name an evaluation draws, and how its images are read.

    Attributes:
      job: the run.
      name: gives the beginning of the names of files, a step.
      about: gives a few words on the weights.
      attempt: what to do with something that draws; a run under way does not end because of it.
    """

    job: Setup
    name: Callable[[], str]
    about: Callable[[], str]
    attempt: Callable[[Callable[[], None]], None] = lambda draw: draw()

    def draw(self, draw: Callable[[], None]) -> None:
        """Call something that draws, on the first host alone: it must not wait for others."""
        if not jax.process_index():
            self.attempt(draw)

    def write(self, kind: str, title: str, note: str, rows: Sequence[FigureRow]) -> None:
        """WORKDIR/pictures/<step>-<kind>."""
        note = privacy.redact(f"{note}; {self.about()}")
        figures.write_figure(
            self.job.workdir / "pictures", f"{self.name()}-{kind}", Figure(title, note, rows)
        )

    def tiles(self, records: Sequence[int]) -> list[image_grid.Image.Image]:
        """The views of records that can be read, as an evaluation sees them."""
        data, preprocessing = self.job.config.data, Preprocessing.of(self.job.config)
        read = eval_batches.evaluation_batches(
            self.job.held_out,
            records,
            preprocessing,
            len(records),
            threads=data.threads,
            missing=data.missing,
        )
        side = image_grid.side_of_tile(data.image_size, self.job.config.grid)
        return [image_grid.image_tile(view, side) for view in next(read)["views"]]

    def class_of(self, label: int) -> str:
        return self.job.classes[label] if 0 <= label < len(self.job.classes) else ""

    def pictures(self, count: int) -> str:
        return f"{count:,} held-out image" + "s" * (count != 1)


def spread_rows(count: int, most: int) -> list[int]:
    """At most `most` of so many rows, evenly spread.

    >>> spread_rows(10, 3), spread_rows(2, 3)
    ([0, 3, 6], [0, 1])
    """
    few = min(most, count)
    return [i * count // few for i in range(few)]


def neighbors_figure(easel: FigureWriter) -> Metric:
    """eval/embedding/same_class, the share of images whose nearest neighbour is of their class, and
    two exhibits."""

    def run(seen: EvalContext) -> Iterator[tuple[str, float]]:
        found = seen("queries")
        if len(found.vectors) < 2:
            return
        easel.draw(lambda: _alike(easel, found.vectors, found.labels, found.records))
        easel.draw(lambda: _map(easel, found.vectors, found.labels))
        share = embedding_map.neighbor_agreement(found.vectors, found.labels)
        if share is not None:
            yield "eval/embedding/same_class", share

    return run


def _alike(
    easel: FigureWriter, vectors_NxD: np.ndarray, label_N: np.ndarray, record_N: np.ndarray
) -> None:
    asked = spread_rows(len(vectors_NxD), ROWS)
    alike, cosine = embedding_map.nearest_neighbors(
        vectors_NxD, asked, easel.job.config.evaluate.neighbours
    )
    used = list(dict.fromkeys([*asked, *alike.reshape(-1).tolist()]))
    tile = dict(zip(used, easel.tiles(record_N[used].tolist()), strict=True))
    rows = []
    for row, near, close in zip(asked, alike.tolist(), cosine.tolist(), strict=True):
        own = easel.class_of(label_N[row])
        names = [easel.class_of(label) for label in label_N[near]]
        others = [
            FigureTile(tile[n], name, f"{c:.2f}", name == own if name and own else None)
            for n, name, c in zip(near, names, close, strict=True)
        ]
        rows.append(FigureRow([FigureTile(tile[row], own), *others]))
    note = (
        f"first the image, then those of {easel.pictures(len(vectors_NxD))} most alike to it, with"
        " their cosines"
    )
    easel.write("neighbours", "Nearest neighbours", note, rows)


def _map(easel: FigureWriter, vectors_NxD: np.ndarray, label_N: np.ndarray) -> None:
    how = easel.job.config.evaluate.map
    image, key = embedding_map.embedding_image(
        embedding_map.project_to_2d(vectors_NxD, how), label_N, easel.job.classes
    )
    note = (
        f"{easel.pictures(len(vectors_NxD))}, "
        + {"pca": "first two principal components of their features", "tsne": "t-SNE"}[how]
    )
    easel.write(
        "map",
        "Map of the features",
        note,
        [FigureRow([FigureTile(image)], [FigureLine(name, chip=colour) for name, colour in key])],
    )


def confusion_figure(
    easel: FigureWriter, ask: Callable[[EvalContext], tuple[Predictions, np.ndarray]], by: str
) -> Metric:
    """An exhibit of which classes are taken for which by a classifier: a matrix, and the most
    frequent errors."""

    def run(seen: EvalContext) -> Iterator[tuple[str, float]]:
        answers, _ = ask(seen)
        if len(answers.labels):
            easel.draw(lambda: _matrix(easel, answers, by))
        yield from ()

    return run


def _matrix(easel: FigureWriter, answers: Predictions, by: str) -> None:
    counts = confused.count_confusions(answers.labels, answers.guesses)
    classes = confused.shown_classes(counts)
    share = confused.row_shares(counts, classes)
    others = bool(share[:, -1].any())
    name = {
        one: easel.class_of(one) or str(one)
        for one in {*classes, *counts.true.tolist(), *counts.guessed.tolist()}
    }
    lines = [
        FigureLine(f"{name[true]} taken for {name[guess]}", part)
        for true, guess, part in confused.confused_pairs(counts)
    ]
    right = float((answers.labels == answers.guesses).mean())
    note = (
        f"a row is a class, a column what {by} says; {100 * right:.1f} % of"
        f" {easel.pictures(len(answers.labels))} are right"
    )
    if others:
        note += f"; the {len(classes)} classes with most errors"
    image = confused.confusion_image(share, [name[one] for one in classes], others)
    easel.write(
        "confusion",
        "Which classes are taken for which",
        note,
        [FigureRow([FigureTile(image)], lines)],
    )


def attention_figure(easel: FigureWriter, batches: Batches, *, pooled: bool) -> Metric:
    """An exhibit of where the encoder looks in some images, and of its dense features in
    colours."""
    look = attention_maps.compile_maps(easel.job.config, easel.job.mesh, pooled=pooled)

    def run(seen: EvalContext) -> Iterator[tuple[str, float]]:
        found = seen("queries")
        if chosen := spread_rows(len(found.records), ROWS):
            records, labels = found.records[chosen].tolist(), found.labels[chosen].tolist()
            made = [
                maps
                for maps, _ in extract_set(
                    easel.job.mesh, look, seen.params, batches(records), seen.poll
                )
            ]
            maps = {name: np.concatenate([each[name] for each in made]) for name in made[0]}
            easel.draw(lambda: _maps(easel, maps, records, labels))
        yield from ()

    return run


def _maps(
    easel: FigureWriter, maps: dict[str, np.ndarray], records: list[int], labels: list[int]
) -> None:
    (colours,) = panels.feature_rgb([maps["features"]])
    last = (
        "the last block (of its cls token)"
        if easel.job.config.model.encoder.cls_token
        else "the last block (of all cells)"
    )
    kinds = {
        name: words
        for name, *words in (
            ("pooling", "pooling", "the attention pooling"),
            ("last", "last block", last),
        )
        if name in maps
    }
    rows = []
    for row, (tile, label) in enumerate(zip(easel.tiles(records), labels, strict=True)):
        looks_at = [
            FigureTile(image_grid.weight_tile(maps[name][row], tile.width), words)
            for name, (words, _) in kinds.items()
        ]
        rows.append(
            FigureRow(
                [
                    FigureTile(tile, easel.class_of(label) or "picture"),
                    *looks_at,
                    FigureTile(image_grid.color_tile(colours[row], tile.width), "features"),
                ]
            )
        )
    where = " and ".join(told for _, told in kinds.values())
    note = (
        (f"where {where} looks, mean over the heads, darkest where most; then " if where else "")
        + "the dense features, their first three principal components over these images as red,"
        " green and blue"
    )
    easel.write("attention", "Where it looks, and what it tells apart", note, rows)


def zero_shot_figure(easel: FigureWriter, said: ClassPrompts, *, pictures: str) -> Metric:
    """An exhibit of some images and the class names that fit them best, as captions."""

    def run(seen: EvalContext) -> Iterator[tuple[str, float]]:
        found = seen(pictures)
        known = np.flatnonzero((found.labels >= 0) & (found.labels < len(said.names)))
        if len(known):
            chosen = known[spread_rows(len(known), FEW)]
            name, share_QxC = said.probabilities(seen, found.vectors[chosen])
            easel.draw(
                lambda: _named(
                    easel,
                    said,
                    name,
                    found.records[chosen].tolist(),
                    found.labels[chosen].tolist(),
                    share_QxC,
                )
            )
        yield from ()

    return run


def _named(
    easel: FigureWriter,
    said: ClassPrompts,
    name: str,
    records: list[int],
    labels: list[int],
    share_QxC: np.ndarray,
) -> None:
    rows = []
    for tile, label, share_C in zip(easel.tiles(records), labels, share_QxC, strict=True):
        best = np.argsort(-share_C, kind="stable")[:TEXTS].tolist()
        rows.append(
            FigureRow(
                [FigureTile(tile, easel.class_of(label))],
                [FigureLine(said.names[b], float(share_C[b]), right=b == label) for b in best],
            )
        )
    note = (
        f"the class names that fit an image best, as captions ({len(said.sets[name])} templates),"
        f" and how probable the model holds each of all {len(said.names):,} to be; below the image"
        " its class"
    )
    easel.write("zero_shot", "Zero-shot examples", note, rows)

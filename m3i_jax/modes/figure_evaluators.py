"""Evaluators that draw figures: nearest neighbours and a map of the features, attention maps,
confusion matrix, zero-shot examples.

Each writes WORKDIR/pictures/<step>-<kind>.png and .json, which `report.html` shows; the embedding
evaluator also reports a metric. They run at the last step of a training and in --mode=eval, on the
features that the other evaluators use."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from m3i_jax import privacy
from m3i_jax.data import eval_batches
from m3i_jax.data.preprocessing import Preprocessing
from m3i_jax.evaluation import category_head, feature_extraction, knn, registry, zero_shot
from m3i_jax.evaluation.feature_extraction import EvalContext, Metric, Predictions, extract_set
from m3i_jax.evaluation.zero_shot import ClassPrompts
from m3i_jax.modes.setup import Setup
from m3i_jax.reporting import confusion_matrix, embedding_map, figures, image_grid, panels
from m3i_jax.reporting.figures import Figure, FigureLine, FigureRow, FigureTile

MAX_ROWS = 12  # images whose neighbours or attention are drawn
MAX_EXAMPLES = 8  # images of the zero-shot examples
MAX_CLASSES = 5  # class names listed beside an example
Batches = Callable[[list[int]], eval_batches.EvaluationBatches]


@dataclasses.dataclass
class FigureWriter:
    """Writes the figures of an evaluation and reads the images shown in them.

    Attributes:
      setup: the run.
      name: () -> prefix of the file names, the step.
      about: () -> a few words on the weights, for the caption.
      attempt: calls a function that draws; during training it logs a failure instead of raising.
    """

    setup: Setup
    name: Callable[[], str]
    about: Callable[[], str]
    attempt: Callable[[Callable[[], None]], None] = lambda draw: draw()

    def draw(self, draw: Callable[[], None]) -> None:
        """Call a function that draws, on the first host alone: it must not wait for the others."""
        if not jax.process_index():
            self.attempt(draw)

    def write(self, kind: str, title: str, note: str, rows: Sequence[FigureRow]) -> None:
        """Write WORKDIR/pictures/<step>-<kind>."""
        note = privacy.redact(f"{note}; {self.about()}")
        figures.write_figure(
            self.setup.workdir / "pictures", f"{self.name()}-{kind}", Figure(title, note, rows)
        )

    def tiles(self, records: Sequence[int]) -> list[image_grid.Image.Image]:
        """Returns the evaluation views of the readable ones of these records, as tiles."""
        data = self.setup.config.data
        batches = eval_batches.evaluation_batches(
            self.setup.held_out,
            records,
            Preprocessing.of(self.setup.config),
            len(records),
            threads=data.threads,
            missing=data.missing,
        )
        side = image_grid.side_of_tile(data.image_size, self.setup.config.grid)
        return [image_grid.image_tile(view, side) for view in next(batches)["views"]]

    def class_name(self, label: int) -> str:
        """Returns the name of a category, "" without one."""
        return self.setup.classes[label] if 0 <= label < len(self.setup.classes) else ""

    def count_images(self, count: int) -> str:
        """Returns the number of images, for a caption."""
        return f"{count:,} held-out image" + "s" * (count != 1)


def spread_rows(count: int, limit: int) -> list[int]:
    """Returns at most `limit` of `count` rows, evenly spread.

    >>> spread_rows(10, 3), spread_rows(2, 3)
    ([0, 3, 6], [0, 1])
    """
    rows = min(limit, count)
    return [i * count // rows for i in range(rows)]


def neighbors_figure(writer: FigureWriter) -> Metric:
    """eval/embedding/same_class, the share of images whose nearest neighbour is of their class, and
    two figures: nearest neighbours, and a map of the features."""

    def run(context: EvalContext) -> Iterator[tuple[str, float]]:
        queries = context("queries")
        if len(queries.vectors) < 2:
            return
        writer.draw(
            lambda: _draw_neighbors(writer, queries.vectors, queries.labels, queries.records)
        )
        writer.draw(lambda: _draw_map(writer, queries.vectors, queries.labels))
        share = embedding_map.neighbor_agreement(queries.vectors, queries.labels, context.poll)
        if share is not None:
            yield "eval/embedding/same_class", share

    return run


def _draw_neighbors(
    writer: FigureWriter, vectors_NxD: np.ndarray, label_N: np.ndarray, record_N: np.ndarray
) -> None:
    query_rows = spread_rows(len(vectors_NxD), MAX_ROWS)
    neighbor_rows, cosines = embedding_map.nearest_neighbors(
        vectors_NxD, query_rows, writer.setup.config.evaluate.neighbours
    )
    shown = list(dict.fromkeys([*query_rows, *neighbor_rows.reshape(-1).tolist()]))
    tile = dict(zip(shown, writer.tiles(record_N[shown].tolist()), strict=True))
    rows = []
    for row, neighbors, values in zip(
        query_rows, neighbor_rows.tolist(), cosines.tolist(), strict=True
    ):
        own = writer.class_name(label_N[row])
        names = [writer.class_name(label) for label in label_N[neighbors]]
        others = [
            FigureTile(tile[n], name, f"{cosine:.2f}", name == own if name and own else None)
            for n, name, cosine in zip(neighbors, names, values, strict=True)
        ]
        rows.append(FigureRow([FigureTile(tile[row], own), *others]))
    note = (
        "the first of a row is the query, then its nearest neighbours of"
        f" {writer.count_images(len(vectors_NxD))}, with the cosine of their features"
    )
    writer.write("neighbours", "Nearest neighbours", note, rows)


def _draw_map(writer: FigureWriter, vectors_NxD: np.ndarray, label_N: np.ndarray) -> None:
    method = writer.setup.config.evaluate.map
    image, key = embedding_map.embedding_image(
        embedding_map.project_to_2d(vectors_NxD, method), label_N, writer.setup.classes
    )
    note = (
        f"{writer.count_images(len(vectors_NxD))}, "
        + {"pca": "first two principal components of their features", "tsne": "t-SNE"}[method]
    )
    lines = [FigureLine(name, chip=colour) for name, colour in key]
    writer.write("map", "Map of the features", note, [FigureRow([FigureTile(image)], lines)])


def confusion_figure(
    writer: FigureWriter,
    predict: Callable[[EvalContext], tuple[Predictions, np.ndarray]],
    classifier: str,
) -> Metric:
    """Yields a figure of the errors of a classifier: confusion matrix and most frequent confusions.

    Args:
      writer: writes it.
      predict: gives the predictions, for instance `knn.knn_predictions`.
      classifier: its name in the caption.
    """

    def run(context: EvalContext) -> Iterator[tuple[str, float]]:
        predictions, _ = predict(context)
        if len(predictions.labels):
            writer.draw(lambda: _draw_confusion(writer, predictions, classifier))
        yield from ()

    return run


def _draw_confusion(writer: FigureWriter, predictions: Predictions, classifier: str) -> None:
    counts = confusion_matrix.count_confusions(predictions.labels, predictions.guesses)
    classes = confusion_matrix.shown_classes(counts)
    share = confusion_matrix.row_shares(counts, classes)
    others = bool(share[:, -1].any())
    name = {
        label: writer.class_name(label) or str(label)
        for label in {*classes, *counts.true.tolist(), *counts.guessed.tolist()}
    }
    lines = [
        FigureLine(f"{name[true]} classified as {name[guess]}", part)
        for true, guess, part in confusion_matrix.confused_pairs(counts)
    ]
    accuracy = float((predictions.labels == predictions.guesses).mean())
    note = (
        f"rows are classes, columns the predictions of {classifier}; {100 * accuracy:.1f} % of"
        f" {writer.count_images(len(predictions.labels))} are right"
    )
    if others:
        note += f"; the {len(classes)} classes with most errors"
    image = confusion_matrix.confusion_image(share, [name[label] for label in classes], others)
    writer.write("confusion", "Confusion matrix", note, [FigureRow([FigureTile(image)], lines)])


def attention_figure(writer: FigureWriter, batches: Batches, *, pooled: bool) -> Metric:
    """Yields a figure of the attention of the encoder in some images, and of its dense features as
    colours.

    Args:
      writer: writes it.
      batches: record numbers -> batches of their clean views.
      pooled: whether the objective trains an attention pooling, which is then drawn too.
    """
    compiled = feature_extraction.compile_maps(
        writer.setup.config, writer.setup.mesh, pooled=pooled
    )

    def run(context: EvalContext) -> Iterator[tuple[str, float]]:
        queries = context("queries")
        if rows := spread_rows(len(queries.records), MAX_ROWS):
            records, labels = queries.records[rows].tolist(), queries.labels[rows].tolist()
            parts = [
                part
                for part, _ in extract_set(
                    writer.setup.mesh, compiled, context.params, batches(records), context.poll
                )
            ]
            maps = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            writer.draw(lambda: _draw_attention(writer, maps, records, labels))
        yield from ()

    return run


def _draw_attention(
    writer: FigureWriter, maps: dict[str, np.ndarray], records: list[int], labels: list[int]
) -> None:
    (colours,) = panels.feature_rgb([maps["features"]])
    tokens = "its cls token" if writer.setup.config.model.encoder.cls_token else "all cells"
    # name of a map -> (words below its tile, words of the caption)
    kinds = {
        name: words
        for name, words in (
            ("pooling", ("pooling", "the attention pooling")),
            ("last", ("last block", f"the last block (of {tokens})")),
        )
        if name in maps
    }
    rows = []
    for row, (tile, label) in enumerate(zip(writer.tiles(records), labels, strict=True)):
        attention = [
            FigureTile(image_grid.weight_tile(maps[name][row], tile.width), words)
            for name, (words, _) in kinds.items()
        ]
        features = FigureTile(image_grid.color_tile(colours[row], tile.width), "features")
        first = FigureTile(tile, writer.class_name(label) or "image")
        rows.append(FigureRow([first, *attention, features]))
    layers = " and ".join(words for _, words in kinds.values())
    note = (
        f"attention of {layers}, mean over the heads, darkest where largest; then "
        if layers
        else ""
    ) + (
        "the dense features, their first three principal components over these images as red,"
        " green and blue"
    )
    writer.write("attention", "Attention and dense features", note, rows)


def zero_shot_figure(writer: FigureWriter, prompts: ClassPrompts, *, image_set: str) -> Metric:
    """Yields a figure of some images and the class names that fit them best, as captions.

    Args:
      writer: writes it.
      prompts: the classes as captions.
      image_set: see `zero_shot.measure`.
    """

    def run(context: EvalContext) -> Iterator[tuple[str, float]]:
        queries = context(image_set)
        labelled = np.flatnonzero((queries.labels >= 0) & (queries.labels < len(prompts.names)))
        if len(labelled):
            rows = labelled[spread_rows(len(labelled), MAX_EXAMPLES)]
            template_set, probability_QxC = prompts.probabilities(context, queries.vectors[rows])
            writer.draw(
                lambda: _draw_examples(
                    writer,
                    prompts,
                    template_set,
                    queries.records[rows].tolist(),
                    queries.labels[rows].tolist(),
                    probability_QxC,
                )
            )
        yield from ()

    return run


def _draw_examples(
    writer: FigureWriter,
    prompts: ClassPrompts,
    template_set: str,
    records: list[int],
    labels: list[int],
    probability_QxC: np.ndarray,
) -> None:
    rows = []
    for tile, label, probability_C in zip(
        writer.tiles(records), labels, probability_QxC, strict=True
    ):
        best = np.argsort(-probability_C, kind="stable")[:MAX_CLASSES].tolist()
        lines = [
            FigureLine(prompts.names[b], float(probability_C[b]), right=b == label) for b in best
        ]
        rows.append(FigureRow([FigureTile(tile, writer.class_name(label))], lines))
    note = (
        "the class names that fit an image best, as captions"
        f" ({len(prompts.sets[template_set])} templates), and their probability among all"
        f" {len(prompts.names):,}; below the image its class"
    )
    writer.write("zero_shot", "Zero-shot examples", note, rows)


def _build_embedding(inputs: registry.EvalInputs) -> Metric:
    if inputs.config.evaluate.map == "tsne":
        embedding_map.tsne_class()  # drawn at the end of a run
    return neighbors_figure(inputs.figures)


def _build_confusion(inputs: registry.EvalInputs) -> Metric:
    if inputs.config.evaluate.direct and registry.CATEGORY_HEAD in inputs.available:
        return confusion_figure(
            inputs.figures, category_head.shared_predictions(inputs), "the category head"
        )
    return confusion_figure(
        inputs.figures,
        knn.knn_predictions(inputs.config),
        f"kNN (k = {inputs.config.evaluate.k})",
    )


for _evaluator in (
    registry.Evaluator(
        name="embedding",
        setting="embedding",
        reads=("map", "neighbours"),
        build=_build_embedding,
        last_only=True,
    ),
    registry.Evaluator(
        name="attention",
        setting="attention",
        build=lambda inputs: attention_figure(
            inputs.figures,
            inputs.record_batches,
            pooled=inputs.pooled and inputs.config.model.pool.kind == "attention",
        ),
        last_only=True,
    ),
    registry.Evaluator(
        name="confusion",
        setting="confusion",
        reads=("k", "temperature"),
        needs=(registry.LABELS, registry.CLASSIFIER),
        build=_build_confusion,
        last_only=True,
    ),
    registry.Evaluator(
        name="examples",
        setting="examples",
        reads=("templates",),
        needs=(registry.TEXT_TOWER, registry.TOKENIZER, registry.LABELS, registry.NAMES),
        build=lambda inputs: zero_shot_figure(
            inputs.figures, zero_shot.shared_prompts(inputs), image_set=inputs.pooled_set
        ),
        last_only=True,
    ),
):
    registry.register_evaluator(_evaluator)

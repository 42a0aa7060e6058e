"""The embedding report of held-out pictures: WORKDIR/embedding/<step>-neighbours.png and <step>-map.png, and one figure, the share of
pictures whose nearest neighbour is of their class."""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from m3i_jax.data import central
from m3i_jax.evaluation.features import Measure, Seen
from m3i_jax.modes.job import Job
from m3i_jax.reporting import embedding

ROWS = 12  # pictures whose neighbours are shown


def measure(job: Job, name: Callable[[], str]) -> Measure:
    """eval/embedding/same_class, where there are classes, and the pictures; `name` gives the beginning of the files' names."""

    def run(seen: Seen) -> Iterator[tuple[str, float]]:
        found = seen("queries")
        if len(found.vectors) < 2:
            return
        if not jax.process_index():
            write(job, found.vectors, found.labels, found.records, name())
        share = embedding.agreement(found.vectors, found.labels)
        if share is not None:
            yield "eval/embedding/same_class", share

    return run


def write(job: Job, vectors_NxD: np.ndarray, label_N: np.ndarray, record_N: np.ndarray, name: str) -> None:
    """Both pictures of features of held-out records."""
    ask, data, count = job.config.evaluate, job.config.data, len(vectors_NxD)
    place = job.workdir / "embedding"
    place.mkdir(exist_ok=True)
    asked = [i * count // min(ROWS, count) for i in range(min(ROWS, count))]
    alike, cosine = embedding.nearest(vectors_NxD, asked, ask.neighbours)
    shown = list(dict.fromkeys([*asked, *alike.reshape(-1).tolist()]))
    read = central.evaluation_batches(
        job.held_out, record_N[shown].tolist(), data.image_size, len(shown), background=data.background, crop=ask.crop, threads=data.threads
    )
    pictures = next(read)["views"]
    number = {row: i for i, row in enumerate(shown)}
    words = [job.classes[label] if 0 <= label < len(job.classes) else "" for label in label_N[shown].tolist()]
    rows = [(number[a], [number[n] for n in found]) for a, found in zip(asked, alike.tolist(), strict=True)]
    title = f"{count:,} pictures of {job.held_out.name}: nearest neighbours by cosine"
    embedding.write_neighbours(place / f"{name}-neighbours.png", pictures, rows, cosine, words, title)
    how = {"pca": "first two principal components", "tsne": "t-SNE"}[ask.map]
    points = embedding.flat(vectors_NxD, ask.map)
    embedding.write_map(place / f"{name}-map.png", points, label_N, job.classes, f"{count:,} pictures of {job.held_out.name}: {how}")

"""What the features of a run gained over those of its initial weights, on every labelled image: kNN
accuracy where each image is classified by all others. For runs that read no labels, whose training
images may then be counted, too: five times as many images as are held out.

    python -m tests.bench.leave_one_out RUN...

RUN is a workdir with a checkpoint, and all have the same data. Seeds of a row are the directories
`ROW-SEED`, which are averaged image by image.
"""

import collections
import dataclasses
import io
import pathlib
import sys

import jax
import numpy as np
from PIL import Image

from m3i_jax import config as configuration
from m3i_jax import parallel, schema
from m3i_jax.data import splits, tokenizer
from m3i_jax.evaluation import load
from m3i_jax.reporting import text_table
from m3i_jax.training.trainer import Trainer

NEIGHBOURS, TEMPERATURE = 20, 0.07


def hits(features_NxD: np.ndarray, label_N: np.ndarray) -> np.ndarray:
    """Whether each row has the label that most of its nearest other rows vote for, bool [N].

    >>> x = np.repeat(np.eye(2), 30, 0) + 0.01 * np.random.default_rng(0).normal(size=(60, 2))
    >>> print(hits(x, np.repeat([0, 1], 30)).mean())
    1.0
    """
    x = features_NxD / np.linalg.norm(features_NxD, axis=1, keepdims=True)
    similarity = x @ x.T
    np.fill_diagonal(similarity, -np.inf)
    nearest = np.argpartition(-similarity, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
    weight = np.exp((np.take_along_axis(similarity, nearest, 1) - 1) / TEMPERATURE)
    votes = np.zeros((len(x), label_N.max() + 1))
    np.add.at(votes, (np.arange(len(x))[:, None], label_N[nearest]), weight)
    out: np.ndarray = votes.argmax(1) == label_N
    return out


def labelled_images(data: schema.Data) -> tuple[list[np.ndarray], np.ndarray]:
    """(RGB images on white, labels) of both parts of a data set."""
    parts = splits.open_splits(data)
    records = [part[i] for part in parts for i in range(len(part)) if part[i].label >= 0]
    images = []
    for record in records:
        with Image.open(io.BytesIO(record.image)) as opened:
            opened = opened.convert("RGBA")
            white = Image.new("RGBA", opened.size, "white")
            images.append(np.asarray(Image.alpha_composite(white, opened).convert("RGB")))
    return images, np.array([record.label for record in records])


def gains(run: str, images: list[np.ndarray], label_N: np.ndarray) -> np.ndarray:
    """Hits at the end of a run minus those at its initial weights, [N]."""
    config = configuration.resolve(configuration.load_from_workdir(run, "RUN"))
    trained, words = load.load(run), pathlib.Path(run) / "tokenizer.json"
    vocabulary = (
        tokenizer.Tokenizer.load(str(words), config.data.caption_length).vocabulary
        if words.is_file()
        else 0
    )
    one = parallel.make_mesh((1, 1, 1), jax.devices()[:1])
    start = Trainer(dataclasses.replace(config, init_from=""), one, vocabulary).init().params
    initial = dataclasses.replace(trained, params={part: start[part] for part in trained.params})
    after, before = (
        hits(np.asarray(model.features(images), np.float64), label_N)
        for model in (trained, initial)
    )
    return after.astype(float) - before


def main(runs: list[str]) -> None:
    rows: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    config = configuration.resolve(configuration.load_from_workdir(runs[0], "RUN"))
    images, label_N = labelled_images(config.data)
    for run in runs:
        rows[pathlib.Path(run).name.rpartition("-")[0]].append(gains(run, images, label_N))
    table = []
    for name, found in rows.items():
        mean_N = np.mean(found, 0)
        of_seeds = ", ".join(f"{100 * each.mean():.1f}" for each in found)
        error = 100 * mean_N.std() / len(mean_N) ** 0.5
        table.append((name, of_seeds, f"{100 * mean_N.mean():.1f}", f"{error:.2f}"))
    print(f"{len(images):,} labelled images")
    print(text_table.text_table(table, ("row", "gain of each seed", "mean", "error by images")))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Zero-shot classification by captions: the names of the classes put into templates, embedded as
texts, and compared with the images.

Of a class every prompt is embedded and normalised, their mean normalised again; the class of an
image is the most similar one. M3I's Table 5 compares with numbers of 7 templates and of images
whose short side is resized to the very size of the view: set evaluate.crop=1."""

import json
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from m3i_jax.errors import UserError
from m3i_jax.evaluation.category_head import head_accuracy, top_k_hits
from m3i_jax.evaluation.feature_extraction import EvalContext, Metric
from m3i_jax.evaluation.text_embedder import TextEmbedder

# The two sets of prompts that CLIP was published with for ImageNet; in a mean their order does not
# matter, so the 80 are told by parts.
SEVEN = (
    "itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.", "a {} in a video game.", "art of the {}.",
    "a photo of the small {}.",
)  # fmt: skip
_PICTURES = (
    "art", "graffiti", "itap", "a photo", "a bad photo", "a black and white photo", "a blurry photo", "a bright photo", "a close-up photo",
    "a cropped photo", "a dark photo", "a doodle", "a drawing", "a good photo", "a jpeg corrupted photo", "a low resolution photo",
    "a painting", "a pixelated photo", "a rendering", "a rendition", "a sculpture", "a sketch", "a tattoo",
)  # fmt: skip
_KINDS = ("clean", "cool", "dirty", "hard to see", "large", "nice", "small", "weird")
_MADE = ("cartoon", "embroidered", "origami", "plastic", "plushie", "toy")
EIGHTY = (
    *(f"{picture} of {article} {{}}." for picture in _PICTURES for article in ("a", "the")),
    *(f"a photo of {article} {kind} {{}}." for kind in _KINDS for article in ("a", "the")),
    *(f"{article} {made} {{}}." for made in _MADE for article in ("a", "the")),
    *(f"{article} {{}} in a video game." for article in ("a", "the")),
    *("a photo of many {}.", "a photo of my {}.", "a photo of one {}.", "itap of my {}."),
)
SETS = {"7": SEVEN, "80": EIGHTY}


def prompt_templates(name: str) -> tuple[str, tuple[str, ...]]:
    """(name for the log, templates) of a set: "7", "80", or a file with a template a line or a JSON
    list of them.

    Raises:
      UserError: there is no such set or file, or a template has no {} for the name.

    >>> prompt_templates("7")[1][0]
    'itap of a {}.'
    """
    if name in SETS:
        return name, SETS[name]
    place = pathlib.Path(name)
    if not place.is_file():
        raise UserError(
            f"config.evaluate.templates: {name!r} is none of {', '.join(SETS)}, and there is no"
            " such file; give a template a line"
        )
    try:
        text = place.read_text("utf-8")
        found = (
            json.loads(text)
            if place.suffix == ".json"
            else [line.strip() for line in text.splitlines()]
        )
    except ValueError as error:
        raise UserError(
            f"config.evaluate.templates: {name}: cannot be read ({error}); give a template a line,"
            " or a JSON list"
        ) from None
    if not isinstance(found, list) or not all(isinstance(line, str) for line in found):
        raise UserError(
            f"config.evaluate.templates: {name}: holds no list of texts; give a template a line, or"
            " a JSON list"
        )
    lines = tuple(line for line in found if line and not line.startswith("#"))
    wrong = [line for line in lines if line.count("{}") != 1]
    if wrong or not lines:
        told = f"{wrong[0]!r} does not have one {{}}" if wrong else "it has no templates"
        raise UserError(
            f"config.evaluate.templates: {name}: {told}; write {{}} where the name of the class"
            " stands"
        )
    return place.stem, lines


def prompt_tokens(name: str) -> str:
    """The name of a class as a caption would have it.

    >>> prompt_tokens("tabby_cat"), prompt_tokens("hot dog, red hot")
    ('tabby cat', 'hot dog, red hot')
    """
    return " ".join(name.replace("_", " ").split())


def ensemble_embeddings(embedded_TxCxE: np.ndarray) -> np.ndarray:
    """Class representations [C, E]: each prompt at length 1, their mean over the templates, at
    length 1 again.

    >>> ensemble_embeddings(np.array([[[3.0, 0.0]], [[0.0, 1.0]]])).round(3).tolist()
    [[0.707, 0.707]]
    """
    prompts = embedded_TxCxE / np.maximum(
        np.linalg.norm(embedded_TxCxE, axis=-1, keepdims=True), 1e-12
    )
    mean_CxE = prompts.mean(0)
    return mean_CxE / np.maximum(np.linalg.norm(mean_CxE, axis=-1, keepdims=True), 1e-12)


class ClassPrompts:
    """The classes as captions: what `measure` compares images with, and a person can be shown.

    Args:
      embed: both sides of the joint space.
      classes: their names, in the order of the labels.
      sets: names of sets of templates, or files.

    Raises:
      UserError: see `prompt_templates`.
    """

    def __init__(self, embed: TextEmbedder, classes: Sequence[str], sets: Sequence[str]) -> None:
        self.embed, self.names, self.sets = (
            embed,
            [prompt_tokens(name) for name in classes],
            dict(prompt_templates(name) for name in sets),
        )

    def classes(self, seen: EvalContext) -> dict[str, np.ndarray]:
        """{set of templates: representations [C, E]}, once an evaluation."""

        def make() -> dict[str, np.ndarray]:
            prompts = list(
                dict.fromkeys(
                    template.format(name)
                    for lines in self.sets.values()
                    for template in lines
                    for name in self.names
                )
            )
            # a prompt of two sets is embedded once
            place = {prompt: row for row, prompt in enumerate(prompts)}
            embedded = self.embed.texts(seen.params, prompts, seen.poll)
            rows = {
                key: np.array([[place[t.format(word)] for word in self.names] for t in lines])
                for key, lines in self.sets.items()
            }
            return {key: ensemble_embeddings(embedded[at]) for key, at in rows.items()}

        return seen.once("zero-shot classes", make)

    def probabilities(self, seen: EvalContext, vectors_QxW: np.ndarray) -> tuple[str, np.ndarray]:
        """(the first set of templates, probability [Q, C] of every class): softmax of the cosines
        at the temperature of the model."""
        name, classes_CxE = next(iter(self.classes(seen).items()))
        cosine_QxC = self.embed.images(seen.params, vectors_QxW, seen.poll) @ classes_CxE.T
        logits_QxC = np.exp(np.asarray(seen.params["logit_scale"], np.float64)) * cosine_QxC.astype(
            np.float64
        )
        share_QxC = np.exp(logits_QxC - logits_QxC.max(1, keepdims=True))
        return name, share_QxC / share_QxC.sum(1, keepdims=True)


def measure(said: ClassPrompts, *, pictures: str = "queries") -> Metric:
    """eval/zero_shot/7/top1, ... of the images of a set that have a category.

    Args:
      said: the classes.
      images: name of the set; its features must be those of the pooling that the text term trains.
    """

    def run(seen: EvalContext) -> Iterator[tuple[str, float]]:
        found = seen(pictures)
        known = (found.labels >= 0) & (found.labels < len(said.names))
        if not known.any():
            return
        images = said.embed.images(seen.params, found.vectors[known], seen.poll)
        for name, made in said.classes(seen).items():
            for top, value in head_accuracy(
                top_k_hits(images @ made.T, found.labels[known]), len(said.names)
            ):
                yield f"eval/zero_shot/{name}/{top}", value

    return run

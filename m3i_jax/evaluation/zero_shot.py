"""Zero-shot classification: class names are put into prompt templates, embedded as texts, and
compared with the images.

The representation of a class is the normalised mean of its normalised prompt embeddings; an image
gets the class with the largest cosine. M3I's Table 5 compares with results of 7 templates and of
images whose short side is resized to the size of the view, by bilinear interpolation: set
evaluate.crop=1 and evaluate.interpolation=bilinear for that.

The names of ImageNet's classes, as its lists give them, are the first synonyms of WordNet. CLIP's
authors measured with names that they curated; `data.class_names` takes a file of those."""

import json
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from m3i_jax.errors import UserError
from m3i_jax.evaluation import registry
from m3i_jax.evaluation.category_head import head_accuracy, top_k_hits
from m3i_jax.evaluation.feature_extraction import EvalContext, Metric
from m3i_jax.evaluation.text_embedder import TextEmbedder, shared_embedder
from m3i_jax.models import m3i

# The two prompt sets that CLIP published for ImageNet. A mean does not depend on their order, so
# the 80 are composed from parts.
SEVEN = (
    "itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.",
    "a {} in a video game.", "art of the {}.", "a photo of the small {}.",
)  # fmt: skip
_MEDIA = (
    "art", "graffiti", "itap", "a photo", "a bad photo", "a black and white photo",
    "a blurry photo", "a bright photo", "a close-up photo", "a cropped photo", "a dark photo",
    "a doodle", "a drawing", "a good photo", "a jpeg corrupted photo", "a low resolution photo",
    "a painting", "a pixelated photo", "a rendering", "a rendition", "a sculpture", "a sketch",
    "a tattoo",
)  # fmt: skip
_KINDS = ("clean", "cool", "dirty", "hard to see", "large", "nice", "small", "weird")
_MATERIALS = ("cartoon", "embroidered", "origami", "plastic", "plushie", "toy")
EIGHTY = (
    *(f"{medium} of {article} {{}}." for medium in _MEDIA for article in ("a", "the")),
    *(f"a photo of {article} {kind} {{}}." for kind in _KINDS for article in ("a", "the")),
    *(f"{article} {material} {{}}." for material in _MATERIALS for article in ("a", "the")),
    *(f"{article} {{}} in a video game." for article in ("a", "the")),
    *("a photo of many {}.", "a photo of my {}.", "a photo of one {}.", "itap of my {}."),
)
SETS = {"7": SEVEN, "80": EIGHTY}


def prompt_templates(name: str) -> tuple[str, tuple[str, ...]]:
    """Returns (name for metrics, templates) of a set: "7", "80", or a file with a template a line
    or a JSON list of templates.

    Raises:
      UserError: no such set or file, or a template without exactly one {} for the class name.

    >>> prompt_templates("7")[1][0]
    'itap of a {}.'
    """
    if name in SETS:
        return name, SETS[name]
    path = pathlib.Path(name)
    if not path.is_file():
        raise UserError(
            f"config.evaluate.templates: {name!r} is neither one of {', '.join(SETS)} nor a file;"
            " give one of these, or a file with a template a line"
        )
    try:
        text = path.read_text("utf-8")
        content = (
            json.loads(text)
            if path.suffix == ".json"
            else [line.strip() for line in text.splitlines()]
        )
    except ValueError as error:
        raise UserError(
            f"config.evaluate.templates: {name}: cannot be read ({error}); give a template a line,"
            " or a JSON list"
        ) from None
    if not isinstance(content, list) or not all(isinstance(line, str) for line in content):
        raise UserError(
            f"config.evaluate.templates: {name}: is not a list of texts; give a template a line, or"
            " a JSON list"
        )
    lines = tuple(line for line in content if line and not line.startswith("#"))
    wrong = [line for line in lines if line.count("{}") != 1]
    if wrong or not lines:
        problem = f"{wrong[0]!r} does not have one {{}}" if wrong else "it has no templates"
        raise UserError(
            f"config.evaluate.templates: {name}: {problem}; write {{}} in place of the class name"
        )
    return path.stem, lines


def prompt_tokens(name: str) -> str:
    """Returns the name of a class as it is written in a prompt.

    >>> prompt_tokens("tabby_cat"), prompt_tokens("hot dog, red hot")
    ('tabby cat', 'hot dog, red hot')
    """
    return " ".join(name.replace("_", " ").split())


def fill_template(template: str, name: str) -> str:
    """Returns a prompt: the name of a class in the place of {}; other braces stay.

    >>> fill_template("a {} in {braces}", "cat")
    'a cat in {braces}'
    """
    return template.replace("{}", name)


def ensemble_embeddings(embedded_TxCxE: np.ndarray) -> np.ndarray:
    """Returns class representations [C, E]: the normalised mean over T templates of the normalised
    prompt embeddings.

    >>> ensemble_embeddings(np.array([[[3.0, 0.0]], [[0.0, 1.0]]])).round(3).tolist()
    [[0.707, 0.707]]
    """
    prompts = embedded_TxCxE / np.maximum(
        np.linalg.norm(embedded_TxCxE, axis=-1, keepdims=True), 1e-12
    )
    mean_CxE = prompts.mean(0)
    return mean_CxE / np.maximum(np.linalg.norm(mean_CxE, axis=-1, keepdims=True), 1e-12)


class ClassPrompts:
    """The classes as prompts, and their representations.

    Args:
      embed: embeds images and texts.
      classes: class names, in the order of the labels.
      sets: names of template sets, or files.

    Raises:
      UserError: see `prompt_templates`; or two sets have one name for their metrics.
    """

    def __init__(self, embed: TextEmbedder, classes: Sequence[str], sets: Sequence[str]) -> None:
        self.embed = embed
        self.names = [prompt_tokens(name) for name in classes]
        self.sets: dict[str, tuple[str, ...]] = {}
        for given in sets:
            name, lines = prompt_templates(given)
            if name in self.sets:
                raise UserError(
                    f"config.evaluate.templates: {given}: there is another set of the name"
                    f" {name!r}, of which the metrics would be eval/zero_shot/{name}/..., too;"
                    " rename the file"
                )
            self.sets[name] = lines

    def classes(self, context: EvalContext) -> dict[str, np.ndarray]:
        """Returns {template set: class representations [C, E]}, computed once an evaluation."""

        def make() -> dict[str, np.ndarray]:
            prompts = list(
                dict.fromkeys(
                    fill_template(template, name)
                    for lines in self.sets.values()
                    for template in lines
                    for name in self.names
                )
            )
            # a prompt of two sets is embedded once
            row_of = {prompt: row for row, prompt in enumerate(prompts)}
            embedded = self.embed.texts(context.params, prompts, context.poll)
            rows_TxC = {
                key: np.array(
                    [[row_of[fill_template(t, name)] for name in self.names] for t in lines]
                )
                for key, lines in self.sets.items()
            }
            return {key: ensemble_embeddings(embedded[rows]) for key, rows in rows_TxC.items()}

        return context.once("zero-shot classes", make)

    def probabilities(
        self, context: EvalContext, vectors_QxW: np.ndarray
    ) -> tuple[str, np.ndarray]:
        """Returns (name of the first template set, class probabilities [Q, C]): softmax of the
        cosines at the temperature of the model."""
        name, classes_CxE = next(iter(self.classes(context).items()))
        cosine_QxC = self.embed.images(context.params, vectors_QxW, context.poll) @ classes_CxE.T
        scale = np.exp(np.asarray(m3i.text_log_scale(context.params), np.float64))
        logits_QxC = scale * cosine_QxC.astype(np.float64)
        share_QxC = np.exp(logits_QxC - logits_QxC.max(1, keepdims=True))
        return name, share_QxC / share_QxC.sum(1, keepdims=True)


def shared_prompts(inputs: registry.EvalInputs) -> ClassPrompts:
    """Returns the prompts of a run, shared by all evaluators that use them."""
    return inputs.once(
        "class prompts",
        lambda: ClassPrompts(
            shared_embedder(inputs), inputs.classes, inputs.config.evaluate.templates
        ),
    )


def measure(prompts: ClassPrompts, *, image_set: str = "queries") -> Metric:
    """eval/zero_shot/7/top1, ... of the images of a set that have a category. Categories of one
    name, as of two sources of a mixture, are one: a prompt cannot tell them apart.

    Args:
      prompts: the classes.
      image_set: name of the set; its features are those of the pooling that the text term trains.
    """

    _, first, of_class = np.unique(prompts.names, return_index=True, return_inverse=True)

    def run(context: EvalContext) -> Iterator[tuple[str, float]]:
        features = context(image_set)
        labelled = (features.labels >= 0) & (features.labels < len(prompts.names))
        if not labelled.any():
            return
        images = prompts.embed.images(context.params, features.vectors[labelled], context.poll)
        for name, classes_CxE in prompts.classes(context).items():
            named = of_class[features.labels[labelled]]
            rank_Q = top_k_hits(images @ classes_CxE[first].T, named)
            for top, value in head_accuracy(rank_Q, len(first)):
                yield f"eval/zero_shot/{name}/{top}", value

    return run


registry.register_evaluator(
    registry.Evaluator(
        name="zero_shot",
        title="zero-shot",
        setting="zero_shot",
        reads=("templates",),
        needs=(registry.TEXT_TOWER, registry.TOKENIZER, registry.LABELS, registry.NAMES),
        build=lambda inputs: measure(shared_prompts(inputs), image_set=inputs.pooled_set),
    )
)

"""Zero-shot classification: template sets, their mean, and the metric with known text
embeddings."""

import hashlib
import pathlib

import numpy as np
import pytest

from m3i_jax.errors import UserError
from m3i_jax.evaluation import feature_extraction, zero_shot


def test_the_published_template_sets() -> None:
    assert len(zero_shot.SEVEN) == 7 and len(set(zero_shot.EIGHTY)) == len(zero_shot.EIGHTY) == 80
    assert set(zero_shot.SEVEN) < set(zero_shot.EIGHTY)
    assert all(
        template.count("{}") == 1 and template.endswith(".") for template in zero_shot.EIGHTY
    )
    some = {
        "a photo of a hard to see {}.",
        "the embroidered {}.",
        "itap of my {}.",
        "graffiti of the {}.",
        "a jpeg corrupted photo of a {}.",
    }
    assert some < set(zero_shot.EIGHTY)
    # of the sorted list of openai/CLIP, notebooks/Prompt_Engineering_for_ImageNet.ipynb
    digest = hashlib.sha256("\n".join(sorted(zero_shot.EIGHTY)).encode()).hexdigest()
    assert digest == "a8a4822f2921936e2ef07cf2e7a5df69be9532aab2f3f4880156bb03563e2467"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("images.txt", "# remarks\na {}.\n\nthe {} there\n"),
        ("images.json", '["a {}.", "the {} there"]'),
    ],
)
def test_templates_of_a_file(name: str, text: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / name).write_text(text)
    assert zero_shot.prompt_templates(str(tmp_path / name)) == ("images", ("a {}.", "the {} there"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "a photo\n", "'a photo' does not have one {}"),
        ("a.txt", "{} and {}\n", "does not have one"),
        ("a.txt", "\n", "it has no templates"),
        ("a.json", "{", "cannot be read"),
        ("a.json", '{"a": 1}', "is not a list of texts"),
        ("", "", "nor a file; give one of these"),
    ],
)
def test_invalid_templates_are_refused(
    name: str, text: str, message: str, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / (name or "absent.txt")
    if name:
        path.write_text(text)
    with pytest.raises(UserError, match="config.evaluate.templates") as error:
        zero_shot.prompt_templates(str(path))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_two_sets_of_one_name_are_refused(tmp_path: pathlib.Path) -> None:
    """Their metrics would have one name, and one of them was left out."""
    (tmp_path / "7.txt").write_text("a {}.\n")
    sets = ("7", str(tmp_path / "7.txt"))
    with pytest.raises(UserError, match="7.txt: there is another set of the name '7'"):
        zero_shot.ClassPrompts(Embedder(), ["cat"], sets)


def test_the_mean_is_over_normalised_prompts() -> None:
    """All prompts have the same weight, whatever the norm of their embedding."""
    made = np.random.default_rng(0).normal(size=(3, 4, 5)) * np.array([1, 10, 100])[:, None, None]
    got = zero_shot.ensemble_embeddings(made)
    for c in range(4):
        wanted = sum(prompt[c] / np.linalg.norm(prompt[c]) for prompt in made) / 3
        np.testing.assert_allclose(got[c], wanted / np.linalg.norm(wanted))


class Embedder:
    """Embeds texts by a table and images by the identity."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def texts(self, params, texts, poll):
        self.asked.append(texts)
        return np.stack(
            [np.random.default_rng(sum(map(ord, text))).normal(size=6) for text in texts]
        )

    def images(self, params, x, poll):
        return x


def test_the_metric_embeds_every_prompt_once_and_leaves_out_unlabelled_images(
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / "one.txt").write_text("a {} in a video game.\n")  # one of the set of seven too
    names, r, embed = ["hot_dog", "cat"], np.random.default_rng(1), Embedder()
    x, label = r.normal(size=(30, 6)).astype(np.float32), r.integers(-1, 3, 30).astype(np.int32)
    context = feature_extraction.EvalContext(
        {
            "images": lambda params, poll: (
                feature_extraction.ImageFeatures(x, label, np.arange(30)),
                {},
            )
        },
        {},
        lambda: None,
    )
    prompts = zero_shot.ClassPrompts(embed, names, ("7", str(tmp_path / "one.txt")))
    got = dict(zero_shot.measure(prompts, image_set="images")(context))
    assert prompts.classes(context)["7"].shape == (2, 6)  # the cached representations
    (asked,) = embed.asked
    assert len(asked) == len(set(asked)) == 14 and "art of the hot dog." in asked
    known = (label >= 0) & (label < 2)
    assert known.sum() < 30 and sorted(got) == ["eval/zero_shot/7/top1", "eval/zero_shot/one/top1"]
    for name, lines in (("7", zero_shot.SEVEN), ("one", ("a {} in a video game.",))):
        classes = []
        for word in ("hot dog", "cat"):
            rows = [Embedder().texts({}, [line.format(word)], None)[0] for line in lines]
            mean = np.mean([row / np.linalg.norm(row) for row in rows], 0)
            classes.append(mean / np.linalg.norm(mean))
        right = (x[known] @ np.array(classes).T).argmax(1) == label[known]
        assert got[f"eval/zero_shot/{name}/top1"] == pytest.approx(right.mean())


def test_other_braces_of_a_template_stay(tmp_path: pathlib.Path) -> None:
    (tmp_path / "set.txt").write_text("a {} {c}\n{} {\n")
    prompts = zero_shot.ClassPrompts(Embedder(), ["cat"], (str(tmp_path / "set.txt"),))
    context = feature_extraction.EvalContext({}, {}, lambda: None)
    assert prompts.classes(context)["set"].shape == (1, 6)
    assert prompts.embed.asked == [["a cat {c}", "cat {"]]


def test_classes_of_one_name_are_one() -> None:
    """Two sources of a mixture with classes of their own may both have a cat."""
    r = np.random.default_rng(4)
    x, label = r.normal(size=(40, 6)).astype(np.float32), r.integers(0, 2, 40).astype(np.int32)
    found = []
    for names, labels in (
        (["cat", "hot_dog"], label),
        (["cat", "hot dog", "hot_dog", "cat"], np.where(np.arange(40) % 2, label, 3 - label)),
    ):
        features = feature_extraction.ImageFeatures(x, labels, np.arange(40))
        context = feature_extraction.EvalContext(
            {"images": lambda params, poll, found=features: (found, {})}, {}, lambda: None
        )
        prompts = zero_shot.ClassPrompts(Embedder(), names, ("7",))
        found.append(dict(zero_shot.measure(prompts, image_set="images")(context)))
    assert found[0] == found[1] and 0 < found[0]["eval/zero_shot/7/top1"] < 1


def test_probabilities_use_the_temperature_of_the_model() -> None:
    prompts = zero_shot.ClassPrompts(Embedder(), ["hot_dog", "cat", "owl"], ("80", "7"))
    context = feature_extraction.EvalContext(
        {}, {"logit_scale": np.float32(np.log(20.0))}, lambda: None
    )
    x = np.random.default_rng(3).normal(size=(4, 6))
    name, got = prompts.probabilities(context, x)
    weights = np.exp(20 * x @ prompts.classes(context)["80"].T)
    assert name == "80"
    np.testing.assert_allclose(got, weights / weights.sum(1, keepdims=True), rtol=1e-5)

"""The evaluators of a run: what its configuration asks for, as far as its data and its objective
can feed it. The same while training and in --mode=eval."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from m3i_jax.data import eval_batches
from m3i_jax.data.preprocessing import Preprocessing
from m3i_jax.errors import UserError
from m3i_jax.evaluation import (
    attentive_probe,
    category_head,
    few_shot,
    knn,
    linear_probe,
    logistic_regression,
    retrieval,
    zero_shot,
)
from m3i_jax.evaluation import feature_extraction as frozen
from m3i_jax.evaluation.text_embedder import TextEmbedder
from m3i_jax.modes import figure_evaluators
from m3i_jax.modes.setup import Setup

Say = Callable[[str], None]
# Every evaluator, its name for people, and what it cannot do without; in the order in which they
# run.
EVALUATORS: dict[str, tuple[str, tuple[str, ...]]] = {
    "knn": ("kNN", ("classes",)),
    "linear": ("linear", ("classes",)),
    "few_shot": ("few-shot", ("classes",)),
    "probe": ("probe", ("classes",)),
    "attentive": ("attentive", ("classes",)),
    "direct": ("direct", ("category",)),
    "zero_shot": ("zero-shot", ("text", "classes")),
    "retrieval": ("retrieval", ("text",)),
    "embedding": ("embedding", ()),
    "attention": ("attention", ()),
    "confusion": ("confusion", ("classes", "classifier")),
    "examples": ("examples", ("text", "classes")),
}
# not while a run is under way: once, when it is done
DRAWN = ("embedding", "attention", "confusion", "examples")


def eval_rows(job: Setup) -> int:
    """Rows of a device step of evaluation: at least what is asked for, and a multiple of the
    devices."""
    shards = job.mesh.shape["replica"] * job.mesh.shape["fsdp"]
    return -(-job.config.evaluate.batch_size // shards) * shards


def host_eval_batches(job: Setup, source: Any, limit: int) -> eval_batches.EvaluationBatches:
    """This host's share of clean views of at most `limit` images, spread evenly over the source;
    batches divide over the devices."""
    count = min(limit, len(source))
    return chosen_batches(job, source, [i * len(source) // count for i in range(count)])


def chosen_batches(job: Setup, source: Any, indices: list[int]) -> eval_batches.EvaluationBatches:
    """This host's share of clean views of some images."""
    data = job.config.data
    hosts = {"host": jax.process_index(), "hosts": jax.process_count()}
    return eval_batches.evaluation_batches(
        source,
        indices,
        Preprocessing.of(job.config),
        eval_rows(job),
        threads=max(1, data.threads),
        missing=data.missing,
        **hosts,
    )


def enabled_evaluators(job: Setup, say: Say, *, thorough: bool = True) -> list[str]:
    """Names of the evaluators that are asked for and can be fed; a line for those asked for that
    cannot.

    Not `thorough`: only for those that are asked for because a source has categories. All others
    are on by default and stand for the term of the objective that they measure, and for nothing
    where it is not trained."""
    ask, terms = job.config.evaluate, job.plan
    by_category = bool(terms.where("category"))
    without = {
        "classes": "" if job.classes else "the source has no categories",
        "category": "" if by_category else "the objective trains no categories",
        "text": (
            ""
            if terms.where("text") and job.tokenizer is not None
            else "the objective trains no captions"
        ),
        "classifier": (
            "" if ask.knn or (ask.direct and by_category) else "neither kNN nor direct is evaluated"
        ),
    }
    out: list[str] = []
    lacking: dict[str, list[str]] = {}
    for name, (title, needs) in EVALUATORS.items():
        if not getattr(ask, name):
            continue
        if missing := [without[need] for need in needs if without[need]]:
            if thorough or (needs == ("classes",)):
                lacking.setdefault(missing[0], []).append(title)
        else:
            out.append(name)
    for why, titles in lacking.items():
        say(
            f"no {' and '.join(filter(None, (', '.join(titles[:-1]), titles[-1])))} evaluation:"
            f" {why}"
        )
    if out and not len(job.held_out):
        say("no evaluation: no images are held out; set config.data.holdout")
        return []
    return out


def enabled_metrics(
    job: Setup, say: Say, *, easel: figure_evaluators.FigureWriter, thorough: bool = True
) -> tuple[dict[str, frozen.Metric], dict[str, frozen.ImageSet]]:
    """({name: measure}, {name: set of images}) of what is wanted.

    Args:
      job: the run.
      say: told what cannot be fed.
      easel: where and under which name is drawn.
      thorough: as of `enabled_evaluators`.

    Raises: UserError: pooled features of an objective that trains no pooling; templates that cannot
      be read.
    """
    config, ask, terms = job.config, job.config.evaluate, job.plan
    trained = bool(terms.where("category", "text"))
    if ask.features == "attention" and not trained:
        raise UserError(
            "config.evaluate.features: 'attention' needs an objective that trains the pooling:"
            " category or text; use 'auto' or 'mean'"
        )
    names = enabled_evaluators(job, say, thorough=thorough)
    statistics = (
        trained and config.model.pool.kind != "attention" and config.model.pool.norm == "batch"
    )
    pool = (ask.features == "attention" or (ask.features == "auto" and trained)) and not statistics
    index = functools.partial(host_eval_batches, job, job.train, ask.train_limit)
    queries = functools.partial(host_eval_batches, job, job.held_out, ask.query_limit)
    extract = frozen.Extractor(config, job.mesh, attention=pool)
    sets = {
        "index": frozen.image_sets(extract, index),
        "queries": frozen.image_sets(extract, queries),
    }
    pooled = "queries"
    if (
        not pool
        and not statistics
        and {"direct", "zero_shot", "retrieval", "examples"} & set(names)
    ):
        pooled = "pooled queries"
        sets[pooled] = frozen.image_sets(
            frozen.Extractor(config, job.mesh, attention=True), queries
        )

    head = category_head.head_predictions(
        config, pictures=pooled, statistics="index" if statistics else ""
    )
    by_head = ask.direct and bool(terms.where("category"))
    made: dict[str, Callable[[], frozen.Metric]] = {
        "knn": lambda: knn.measure(config),
        "linear": logistic_regression.measure,
        "few_shot": lambda: few_shot.measure(config),
        "probe": lambda: linear_probe.measure(config),
        "attentive": lambda: attentive_probe.measure(
            config,
            job.mesh,
            functools.partial(host_eval_batches, job, job.train, ask.attentive_limit),
            queries,
            eval_rows(job),
        ),
        "direct": lambda: category_head.measure(config, head),
        "zero_shot": lambda: zero_shot.measure(said, pictures=pooled),
        "retrieval": lambda: retrieval.measure(
            job.mesh, job.held_out, embed, pictures=pooled, missing=config.data.missing
        ),
        "embedding": lambda: figure_evaluators.neighbors_figure(easel),
        "attention": lambda: figure_evaluators.attention_figure(
            easel,
            functools.partial(chosen_batches, job, job.held_out),
            pooled=pool and config.model.pool.kind == "attention",
        ),
        "confusion": lambda: figure_evaluators.confusion_figure(
            easel,
            head if by_head else knn.knn_predictions(config),
            "the category head" if by_head else f"the vote of {ask.k} neighbours",
        ),
        "examples": lambda: figure_evaluators.zero_shot_figure(easel, said, pictures=pooled),
    }
    if {"zero_shot", "retrieval", "examples"} & set(names):
        assert job.tokenizer is not None
        embed = TextEmbedder(config, job.mesh, job.tokenizer, eval_rows(job))
        said = zero_shot.ClassPrompts(embed, job.classes, ask.templates)
    return {name: made[name]() for name in made if name in names}, sets


def make_evaluators(
    job: Setup, say: Say, total: int, attempt: Callable[[Callable[[], None]], None]
) -> list[Any]:
    """The evaluators of a run that trains for `total` steps: one that shares the features of all
    measures, or none. At the last step those that draw are among them; `attempt` calls what
    draws."""
    step, encoder = [0], job.config.evaluate.encoder
    easel = figure_evaluators.FigureWriter(
        job, lambda: f"{step[0]:08d}", lambda: f"step {step[0]:,}, {encoder} parameters", attempt
    )
    found, sets = enabled_metrics(job, say, easel=easel, thorough=False)
    if not found:
        return []
    usual = frozen.make_evaluator(
        job.config, sets, [measure for name, measure in found.items() if name not in DRAWN]
    )
    last = frozen.make_evaluator(job.config, sets, found.values())

    def at(state: Any, poll: Callable[[], None]) -> Any:
        step[0] = int(state.step)
        return (last if step[0] == total else usual)(state, poll)

    return [at]

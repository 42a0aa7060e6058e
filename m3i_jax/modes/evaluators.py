"""The evaluators of a run: what its configuration asks for, as far as its data and its objective can feed it. The same while training and
in --mode=eval."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from m3i_jax.data import central
from m3i_jax.errors import UserError
from m3i_jax.evaluation import attentive, direct, few_shot, knn, linear, probe, retrieval, zero_shot
from m3i_jax.evaluation import features as frozen
from m3i_jax.evaluation.texts import Embedder
from m3i_jax.modes import drawn
from m3i_jax.modes.job import Job
from m3i_jax.training import plan

Say = Callable[[str], None]
# Every evaluator, its name for people, and what it cannot do without; in the order in which they run.
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
DRAWN = ("embedding", "attention", "confusion", "examples")  # not while a run is under way: once, when it is done


def rows(job: Job) -> int:
    """Rows of a device step of evaluation: at least what is asked for, and a multiple of the devices."""
    shards = job.mesh.shape["replica"] * job.mesh.shape["fsdp"]
    return -(-job.config.evaluate.batch_size // shards) * shards


def batches(job: Job, source: Any, limit: int) -> central.EvaluationBatches:
    """This host's share of clean views of at most `limit` pictures, spread evenly over the source; batches divide over the devices."""
    count = min(limit, len(source))
    return chosen(job, source, [i * len(source) // count for i in range(count)])


def chosen(job: Job, source: Any, indices: list[int]) -> central.EvaluationBatches:
    """This host's share of clean views of some pictures."""
    data = job.config.data
    hosts = {"host": jax.process_index(), "hosts": jax.process_count()}
    return central.evaluation_batches(
        source, indices, data.image_size, rows(job), background=data.background, crop=job.config.evaluate.crop,
        threads=max(1, data.threads), missing=data.missing, **hosts,
    )  # fmt: skip


def wanted(job: Job, say: Say, *, thorough: bool = True) -> list[str]:
    """Names of the evaluators that are asked for and can be fed; a line for those asked for that cannot.

    Not `thorough`: only for those that are asked for because a source has categories. All others are on by default and stand for the term
    of the objective that they measure, and for nothing where it is not trained.
    """
    ask, terms = job.config.evaluate, plan.read(job.config)
    by_category = bool(terms.where("category"))
    without = {
        "classes": "" if job.classes else "the source has no categories",
        "category": "" if by_category else "the objective trains no categories",
        "text": "" if terms.where("text") and job.tokenizer is not None else "the objective trains no captions",
        "classifier": "" if ask.knn or (ask.direct and by_category) else "neither kNN nor direct is evaluated",
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
        say(f"no {' and '.join(filter(None, (', '.join(titles[:-1]), titles[-1])))} evaluation: {why}")
    if out and not len(job.held_out):
        say("no evaluation: no pictures are held out; set config.data.holdout")
        return []
    return out


def measures(job: Job, say: Say, *, easel: drawn.Easel, thorough: bool = True) -> tuple[dict[str, frozen.Measure], dict[str, frozen.Set]]:
    """({name: measure}, {name: set of pictures}) of what is wanted.

    Args:
      job: the run.
      say: told what cannot be fed.
      easel: where and under which name is drawn.
      thorough: as of `wanted`.

    Raises:
      UserError: pooled features of an objective that trains no pooling; templates that cannot be read.
    """
    config, ask, terms = job.config, job.config.evaluate, plan.read(job.config)
    trained = bool(terms.where("category", "text"))
    if ask.features == "attention" and not trained:
        raise UserError(
            "config.evaluate.features: 'attention' needs an objective that trains the pooling: category or text; use 'auto' or 'mean'"
        )
    names = wanted(job, say, thorough=thorough)
    statistics = trained and config.model.pool.kind != "attention" and config.model.pool.norm == "batch"
    pool = (ask.features == "attention" or (ask.features == "auto" and trained)) and not statistics
    index = functools.partial(batches, job, job.train, ask.train_limit)
    queries = functools.partial(batches, job, job.held_out, ask.query_limit)
    extract = frozen.Extractor(config, job.mesh, attention=pool)
    sets = {"index": frozen.pictures(extract, index), "queries": frozen.pictures(extract, queries)}
    pooled = "queries"
    if not pool and not statistics and {"direct", "zero_shot", "retrieval", "examples"} & set(names):
        pooled = "pooled queries"
        sets[pooled] = frozen.pictures(frozen.Extractor(config, job.mesh, attention=True), queries)

    head = direct.classifier(config, pictures=pooled, statistics="index" if statistics else "")
    by_head = ask.direct and bool(terms.where("category"))
    made: dict[str, Callable[[], frozen.Measure]] = {
        "knn": lambda: knn.measure(config),
        "linear": linear.measure,
        "few_shot": lambda: few_shot.measure(config),
        "probe": lambda: probe.measure(config),
        "attentive": lambda: attentive.measure(
            config, job.mesh, functools.partial(batches, job, job.train, ask.attentive_limit), queries, rows(job)
        ),
        "direct": lambda: direct.measure(config, head),
        "zero_shot": lambda: zero_shot.measure(said, pictures=pooled),
        "retrieval": lambda: retrieval.measure(job.mesh, job.held_out, embed, pictures=pooled, missing=config.data.missing),
        "embedding": lambda: drawn.neighbours(easel),
        "attention": lambda: drawn.looks(
            easel, functools.partial(chosen, job, job.held_out), pooled=pool and config.model.pool.kind == "attention"
        ),
        "confusion": lambda: drawn.confusion(
            easel, head if by_head else knn.classifier(config), "the category head" if by_head else f"the vote of {ask.k} neighbours"
        ),
        "examples": lambda: drawn.examples(easel, said, pictures=pooled),
    }
    if {"zero_shot", "retrieval", "examples"} & set(names):
        assert job.tokenizer is not None
        embed = Embedder(config, job.mesh, job.tokenizer, rows(job))
        said = zero_shot.Spoken(embed, job.classes, ask.templates)
    return {name: made[name]() for name in made if name in names}, sets


def of_job(job: Job, say: Say, total: int, attempt: Callable[[Callable[[], None]], None]) -> list[Any]:
    """The evaluators of a run that trains for `total` steps: one that shares the features of all measures, or none. At the last step those
    that draw are among them; `attempt` calls what draws."""
    step, encoder = [0], job.config.evaluate.encoder
    easel = drawn.Easel(job, lambda: f"{step[0]:08d}", lambda: f"step {step[0]:,}, {encoder} parameters", attempt)
    found, sets = measures(job, say, easel=easel, thorough=False)
    if not found:
        return []
    usual = frozen.evaluator(job.config, sets, [measure for name, measure in found.items() if name not in DRAWN])
    last = frozen.evaluator(job.config, sets, found.values())

    def at(state: Any, poll: Callable[[], None]) -> Any:
        step[0] = int(state.step)
        return (last if step[0] == total else usual)(state, poll)

    return [at]

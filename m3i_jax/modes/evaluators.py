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
from m3i_jax.modes import embedding
from m3i_jax.modes.job import Job
from m3i_jax.training import plan

Say = Callable[[str], None]
BY_LABEL = {"knn": "kNN", "linear": "linear", "few_shot": "few-shot", "probe": "probe", "attentive": "attentive"}


def rows(job: Job) -> int:
    """Rows of a device step of evaluation: at least what is asked for, and a multiple of the devices."""
    shards = job.mesh.shape["replica"] * job.mesh.shape["fsdp"]
    return -(-job.config.evaluate.batch_size // shards) * shards


def batches(job: Job, source: Any, limit: int) -> central.EvaluationBatches:
    """This host's share of clean views of at most `limit` pictures, spread evenly over the source; batches divide over the devices."""
    count, data = min(limit, len(source)), job.config.data
    indices = [i * len(source) // count for i in range(count)]
    hosts = {"host": jax.process_index(), "hosts": jax.process_count()}
    return central.evaluation_batches(
        source, indices, data.image_size, rows(job), background=data.background, crop=job.config.evaluate.crop,
        threads=max(1, data.threads), **hosts,
    )  # fmt: skip


def wanted(job: Job, say: Say) -> list[str]:
    """Names of the evaluators that are asked for and can be fed; one line for each asked for that cannot.

    A term that the objective does not train is no such line: `direct`, `zero_shot` and `retrieval` stand for it where it is trained.
    """
    ask, terms = job.config.evaluate, plan.read(job.config)
    by_category, by_text = bool(terms.where("category")), bool(terms.where("text")) and job.tokenizer is not None
    out = []
    if lacking := [told for name, told in BY_LABEL.items() if getattr(ask, name) and not job.classes]:
        say(f"no {' and '.join(lacking)} evaluation: the source has no categories")
    for name in (*BY_LABEL, "direct", "zero_shot", "retrieval", "embedding"):
        fed = {"direct": by_category, "zero_shot": by_text and bool(job.classes), "retrieval": by_text, "embedding": True}
        if getattr(ask, name) and fed.get(name, bool(job.classes)):
            out.append(name)
    if out and not len(job.held_out):
        say("no evaluation: no pictures are held out; set config.data.holdout")
        return []
    return out


def measures(job: Job, say: Say, *, picture: Callable[[], str] = lambda: "") -> tuple[dict[str, frozen.Measure], dict[str, frozen.Set]]:
    """({name: measure}, {name: set of pictures}) of what is wanted.

    Args:
      job: the run.
      say: told what cannot be fed.
      picture: gives the name under which the embedding report is written.

    Raises:
      UserError: pooled features of an objective that trains no pooling; templates that cannot be read.
    """
    config, ask, terms = job.config, job.config.evaluate, plan.read(job.config)
    trained = bool(terms.where("category", "text"))
    if ask.features == "attention" and not trained:
        raise UserError(
            "config.evaluate.features: 'attention' needs an objective that trains the pooling: category or text; use 'auto' or 'mean'"
        )
    names = wanted(job, say)
    statistics = trained and config.model.pool.kind != "attention" and config.model.pool.norm == "batch"
    pool = (ask.features == "attention" or (ask.features == "auto" and trained)) and not statistics
    index = functools.partial(batches, job, job.train, ask.train_limit)
    queries = functools.partial(batches, job, job.held_out, ask.query_limit)
    extract = frozen.Extractor(config, job.mesh, attention=pool)
    sets = {"index": frozen.pictures(extract, index), "queries": frozen.pictures(extract, queries)}
    pooled = "queries"
    if not pool and not statistics and {"direct", "zero_shot", "retrieval"} & set(names):
        pooled = "pooled queries"
        sets[pooled] = frozen.pictures(frozen.Extractor(config, job.mesh, attention=True), queries)

    made: dict[str, Callable[[], frozen.Measure]] = {
        "knn": lambda: knn.measure(config),
        "linear": linear.measure,
        "few_shot": lambda: few_shot.measure(config),
        "probe": lambda: probe.measure(config),
        "attentive": lambda: attentive.measure(
            config, job.mesh, functools.partial(batches, job, job.train, ask.attentive_limit), queries, rows(job)
        ),
        "direct": lambda: direct.measure(config, pictures=pooled, statistics="index" if statistics else ""),
        "zero_shot": lambda: zero_shot.measure(embed, job.classes, ask.templates, pictures=pooled),
        "retrieval": lambda: retrieval.measure(job.mesh, job.held_out, embed, pictures=pooled),
        "embedding": lambda: embedding.measure(job, picture),
    }
    if {"zero_shot", "retrieval"} & set(names):
        assert job.tokenizer is not None
        embed = Embedder(config, job.mesh, job.tokenizer, rows(job))
    return {name: made[name]() for name in made if name in names}, sets


def of_job(job: Job, say: Say) -> list[Any]:
    """The evaluators of a run that trains: one that shares the features of all measures, or none."""
    step = [0]
    found, sets = measures(job, say, picture=lambda: f"{step[0]:08d}")
    if not found:
        return []
    run = frozen.evaluator(job.config, sets, found.values())

    def at(state: Any, poll: Callable[[], None]) -> Any:
        step[0] = int(state.step)
        return run(state, poll)

    return [at]

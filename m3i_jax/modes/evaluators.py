"""The evaluators of a run: those of the registry that its settings enable and that its data and
objective can feed. The same during training and in --mode=eval."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from m3i_jax import schema
from m3i_jax.data import eval_batches, sampler
from m3i_jax.data.preprocessing import Preprocessing
from m3i_jax.data.sources import base
from m3i_jax.errors import UserError
from m3i_jax.evaluation import feature_extraction, registry
from m3i_jax.modes import annotated_figures as annotated_figures  # registers its evaluators
from m3i_jax.modes import figure_evaluators
from m3i_jax.modes.setup import Setup
from m3i_jax.training.pretrain_task import Pretrain

Log = Callable[[str], None]


def eval_rows(setup: Setup) -> int:
    """Returns images a device step of evaluation: `evaluate.batch_size`, rounded up to a multiple
    of the data shards."""
    shards = setup.mesh.shape["replica"] * setup.mesh.shape["fsdp"]
    return -(-setup.config.evaluate.batch_size // shards) * shards


def host_eval_batches(setup: Setup, source: Any, limit: int) -> eval_batches.EvaluationBatches:
    """Returns this host's share of the clean views of at most `limit` images, those of
    `spread_records`."""
    return chosen_batches(setup, source, sampler.spread_records(len(source), limit))


def chosen_batches(setup: Setup, source: Any, indices: list[int]) -> eval_batches.EvaluationBatches:
    """Returns this host's share of the clean views of the given records."""
    data = setup.config.data
    return eval_batches.evaluation_batches(
        source,
        indices,
        Preprocessing.of(setup.config),
        eval_rows(setup),
        threads=max(1, data.threads),
        missing=data.missing,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )


def numbers_alone(classes: Sequence[str]) -> bool:
    """Whether the names of classes are numbers, as those of labels in tar files. Ten and fewer may
    be digits that the images show.

    >>> numbers_alone([str(i) for i in range(20)]), numbers_alone(["cat", "dog"])
    (True, False)
    """
    return len(classes) > 10 and all(name.isdecimal() for name in classes)


def _unmet_needs(setup: Setup, *, heads: bool) -> dict[str, str]:
    """{need: why it is not met}; `heads`: whether the weights have the heads of the objective."""
    settings, category, text = setup.config.evaluate, False, False
    if heads and isinstance(setup.task, Pretrain):
        category, text = (bool(setup.task.plan.where(of)) for of in ("category", "text"))
    no_tokenizer = "" if setup.tokenizer is not None else "the data have no captions"
    reasons = {
        registry.LABELS: "" if setup.classes else "the source has no categories",
        registry.NAMES: (
            "the categories are numbers and have no names; give them as data.class_names"
            if numbers_alone(setup.classes)
            else ""
        ),
        registry.TOKENIZER: no_tokenizer,
        registry.CAPTIONS: no_tokenizer
        or ("" if setup.held_out.captions else "the held-out images have no captions"),
        registry.CATEGORY_HEAD: "" if category else "the objective trains no category head",
        registry.TEXT_TOWER: "" if text else "the objective trains no text tower",
        registry.CLASSIFIER: (
            ""
            if settings.knn or (settings.direct and category)
            else "neither kNN nor the category head is evaluated"
        ),
    }
    return {need: reason for need, reason in reasons.items() if reason}


def refuse_disabled(config: schema.Config, given: Collection[str]) -> None:
    """Refuse settings of evaluators that are all disabled.

    Args:
      config: settings.
      given: keys of the settings that a command sets.

    Raises:
      UserError: names the setting, and those that enable an evaluator that reads it.
    """
    readers: dict[str, list[registry.Evaluator]] = {}
    for each in registry.evaluators():
        if config.task in each.tasks:
            for name in each.reads:
                readers.setdefault(name, []).append(each)
    for name, those in readers.items():
        enabled = any(each.enabled(config.evaluate) for each in those)
        if f"evaluate.{name}" in given and not enabled:
            switches = " or ".join(f"evaluate.{each.setting}=true" for each in those)
            raise UserError(
                f"config.evaluate.{name}: has no effect, because no evaluator that reads it is"
                f" enabled; set {switches}, or leave it out"
            )


def enabled_evaluators(
    setup: Setup, log: Log, *, thorough: bool = True, heads: bool = True
) -> list[registry.Evaluator]:
    """Returns the evaluators that the settings enable and that have what they need; logs a line for
    those that lack something.

    Args:
      setup: the run.
      log: receives the lines.
      thorough: log every evaluator that is skipped. Else only those that need labels alone: the
        others are enabled by default, and measure a term that this objective does not train.
      heads: whether the weights have the heads of the objective. Without, evaluators that need one
        are skipped and not logged.
    """
    unmet = _unmet_needs(setup, heads=heads)
    out: list[registry.Evaluator] = []
    skipped: dict[str, list[str]] = {}
    for evaluator in registry.evaluators():
        measures = setup.config.task in evaluator.tasks
        if not measures or not evaluator.enabled(setup.config.evaluate):
            continue
        if reasons := [unmet[need] for need in evaluator.needs if need in unmet]:
            by_head = not heads and registry.HEADS.intersection(evaluator.needs)
            if not by_head and (thorough or evaluator.needs == (registry.LABELS,)):
                skipped.setdefault(reasons[0], []).append(evaluator.title or evaluator.name)
        else:
            out.append(evaluator)
    for reason, titles in skipped.items():
        names = " and ".join(filter(None, (", ".join(titles[:-1]), titles[-1])))
        log(f"no {names} evaluation: {reason}")
    if out and not len(setup.held_out):
        log("no evaluation: no images are held out; set config.data.holdout")
        return []
    return out


def enabled_metrics(
    setup: Setup,
    log: Log,
    *,
    figures: figure_evaluators.FigureWriter,
    thorough: bool = True,
    heads: bool = True,
) -> tuple[dict[str, feature_extraction.Metric], dict[str, feature_extraction.ImageSet]]:
    """Returns ({name of an evaluator: its metric}, {name: image set}) of `enabled_evaluators`.

    Args:
      setup: the run.
      log, thorough, heads: see `enabled_evaluators`.
      figures: writes the figures.

    Raises:
      UserError: `evaluate.features` is attention, and the objective trains no pooling; or a file of
        templates cannot be read.
    """
    if isinstance(setup.task, Pretrain):
        inputs, image_sets = _feature_inputs(setup, setup.task, figures, heads=heads)
    else:
        inputs, image_sets = _inputs(setup, figures, heads=heads), {}
    inputs = dataclasses.replace(inputs, log=log)
    enabled = enabled_evaluators(setup, log, thorough=thorough, heads=heads)
    return {each.name: _with_plain_values(each.build(inputs)) for each in enabled}, image_sets


def _with_plain_values(metric: feature_extraction.Metric) -> feature_extraction.Metric:
    """The same metric; scalars of numpy and JAX become numbers of Python, which JSON can hold."""

    def measure(context: feature_extraction.EvalContext) -> Iterator[tuple[str, float]]:
        for name, value in metric(context):
            yield name, _plain_value(value)

    return measure


def _plain_value(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic | np.ndarray | jax.Array) else value


def _inputs(
    setup: Setup, figures: figure_evaluators.FigureWriter, *, heads: bool
) -> registry.EvalInputs:
    """What evaluators of any task get."""
    limit = setup.config.evaluate.query_limit
    return registry.EvalInputs(
        config=setup.config,
        mesh=setup.mesh,
        classes=setup.classes,
        tokenizer=setup.tokenizer,
        held_out=setup.held_out,
        available=frozenset(registry.NEEDS) - _unmet_needs(setup, heads=heads).keys(),
        batch_size=eval_rows(setup),
        index_batches=functools.partial(host_eval_batches, setup, setup.train),
        query_batches=functools.partial(host_eval_batches, setup, setup.held_out, limit),
        record_batches=functools.partial(chosen_batches, setup, setup.held_out),
        pooled=False,
        figures=figures,
        task=setup.task,
    )


def _feature_inputs(
    setup: Setup, task: Pretrain, figures: figure_evaluators.FigureWriter, *, heads: bool
) -> tuple[registry.EvalInputs, dict[str, feature_extraction.ImageSet]]:
    """(inputs, image sets) of evaluators of frozen features."""
    config, settings, plan = setup.config, setup.config.evaluate, task.plan
    trained = bool(plan.where("category", "text"))
    if settings.features == "attention" and not trained:
        raise UserError(
            "config.evaluate.features: 'attention' needs an objective that trains the pooling:"
            " category or text; use 'auto' or 'mean'"
        )
    if settings.features == "cls" and not config.model.encoder.cls_token:
        raise UserError(
            "config.evaluate.features: 'cls' needs the cls token; set model.encoder.cls_token, or"
            " use 'auto' or 'mean'"
        )
    batch_norm = (
        trained and config.model.pool.kind != "attention" and config.model.pool.norm == "batch"
    )
    pool = plan.image_feature if settings.features == "auto" else settings.features
    pool = "mean" if pool == "attention" and batch_norm else pool
    pooled = pool == "attention"
    # what the heads read; with batch norm, whose statistics come from a set, before it
    of_heads = "mean" if batch_norm else "attention"
    before = "" if pool == of_heads else feature_extraction.POOLED
    inputs = dataclasses.replace(
        _inputs(setup, figures, heads=heads),
        pooled=pooled,
        pooled_set=f"{before}queries",
        statistics_set=f"{before}index" if batch_norm else "",
    )
    batches: dict[str, Callable[[], Any]] = {
        "index": functools.partial(inputs.index_batches, settings.train_limit),
        "queries": inputs.query_batches,
    }
    sources = {"index": setup.train, "queries": setup.held_out}

    def image_set(extract: feature_extraction.Extractor, name: str) -> feature_extraction.ImageSet:
        key = functools.partial(base.source_key, sources[name])
        return feature_extraction.image_sets(extract, batches[name], key)

    extract = feature_extraction.Extractor(config, setup.mesh, pool=pool)
    image_sets = {name: image_set(extract, name) for name in batches}
    if before:
        extract = feature_extraction.Extractor(config, setup.mesh, pool=of_heads)
        image_sets |= {
            before + name: image_set(extract, name)
            for name in (("queries", "index") if batch_norm else ("queries",))
        }
    return inputs, image_sets


def make_evaluators(
    setup: Setup, log: Log, total: int, attempt: Callable[[Callable[[], None]], None]
) -> list[Any]:
    """Returns the evaluation of a run of `total` steps: [(state, poll) -> iterator of (name,
    value)], or [] if no evaluator is enabled. All evaluators share the features. Those with
    `last_only` run at the last step alone; `attempt` calls what draws a figure."""
    step, encoder = [0], setup.config.evaluate.encoder
    figures = figure_evaluators.FigureWriter(
        setup, lambda: f"{step[0]:08d}", lambda: f"step {step[0]:,}, {encoder} parameters", attempt
    )
    metrics, image_sets = enabled_metrics(setup, log, figures=figures, thorough=False)
    if not metrics:
        return []
    last_only = {each.name for each in registry.evaluators() if each.last_only}
    usual = feature_extraction.make_evaluator(
        setup.config, image_sets, [m for name, m in metrics.items() if name not in last_only], log
    )
    last = feature_extraction.make_evaluator(setup.config, image_sets, metrics.values(), log)

    def evaluate(state: Any, poll: Callable[[], None]) -> Any:
        step[0] = int(state.step)
        return (last if step[0] == total else usual)(state, poll)

    return [evaluate]

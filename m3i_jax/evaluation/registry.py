"""The registry of evaluators, those that draw figures included.

An evaluator is one value: its name, the setting that enables it, what it needs, and a function that
builds its metrics. A built-in one is registered at the end of its own file in this folder, or in
`modes/figure_evaluators.py` if it draws; its setting is a field of `schema.Evaluate`. A user
registers an evaluator from outside, for instance in the file given to `--config`:

    from m3i_jax.evaluation.registry import EvalContext, EvalInputs, Evaluator, register_evaluator

    def feature_spread(inputs: EvalInputs):
        def run(context: EvalContext):
            yield "eval/spread/std", float(context("queries").vectors.std(0).mean())
        return run

    register_evaluator(Evaluator(name="spread", build=feature_spread))
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import jax

from m3i_jax import evaluation, schema
from m3i_jax.data.sources import base
from m3i_jax.data.tokenizer import Tokenizer
from m3i_jax.evaluation.feature_extraction import EvalContext, Metric
from m3i_jax.registries import Registry

__all__ = ["EvalContext", "EvalInputs", "Evaluator", "Metric", "evaluators", "register_evaluator"]

# What an evaluator can need.
LABELS = "labels"  # the source has categories
NAMES = "names"  # the categories have names, not only numbers
TOKENIZER = "tokenizer"  # texts can be tokenized
CAPTIONS = "captions"  # held-out images have captions, and these can be tokenized
CATEGORY_HEAD = "category_head"  # the objective trains a category head
TEXT_TOWER = "text_tower"  # the objective trains a text tower
CLASSIFIER = "classifier"  # kNN or the category head is evaluated too
NEEDS = (LABELS, NAMES, TOKENIZER, CAPTIONS, CATEGORY_HEAD, TEXT_TOWER, CLASSIFIER)
HEADS = frozenset({CATEGORY_HEAD, TEXT_TOWER})


@dataclasses.dataclass(kw_only=True)
class EvalInputs:
    """Inputs that a run gives to its evaluators. Built once a run, so that what evaluators compile
    from it is compiled once.

    Attributes:
      config: the settings of the run.
      mesh: devices; batches are split over its data axes.
      classes: names of the categories, in the order of the labels.
      tokenizer: of captions; None without captions.
      held_out: the source of the query images.
      available: those of `NEEDS` that are met.
      batch_size: images a device step, a multiple of the data shards.
      index_batches: limit -> batches of clean views of at most so many training images.
      query_batches: () -> batches of clean views of the query images.
      record_batches: record numbers of `held_out` -> batches of their clean views.
      pooled: whether the features of the sets "index" and "queries" are attention-pooled.
      pooled_set: name of the set of query images with features of the pooling that the objective
        trains.
      statistics_set: the set whose mean and variance replace those of a batch where the pooling has
        batch norm; "" without batch norm.
      figures: the `FigureWriter` of the run.
      task: the `Task` of the run.
      log: receives lines for the user.
    """

    config: schema.Config
    mesh: jax.sharding.Mesh
    classes: tuple[str, ...]
    tokenizer: Tokenizer | None
    held_out: base.DataSource
    available: frozenset[str]
    batch_size: int
    index_batches: Callable[[int], Any]
    query_batches: Callable[[], Any]
    record_batches: Callable[[list[int]], Any]
    pooled: bool
    pooled_set: str = "queries"
    statistics_set: str = ""
    figures: Any = None
    task: Any = None
    log: Callable[[str], None] = print
    _cache: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Returns the result of the first call of `make` under this name: several evaluators share
        it."""
        if name not in self._cache:
            self._cache[name] = make()
        return self._cache[name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator:
    """One entry of the registry.

    Attributes:
      name: unique; its metrics are named eval/<name>/....
      build: inputs of the run -> metric. The metric is called at every evaluation with its
        `EvalContext` (features of the image sets, parameters) and yields (metric name, value).
      needs: some of `NEEDS`. Without one of them the evaluator is skipped, which is logged.
      setting: the field of `config.evaluate` that enables it; "": enabled once registered.
      reads: fields of `config.evaluate` that it reads, and not every evaluator.
      title: its name in messages; "": `name`.
      tasks: values of `config.task` whose runs it measures.
      last_only: run it at the last step of a run and in --mode=eval alone, as figures are drawn.
    """

    name: str
    build: Callable[[EvalInputs], Metric]
    needs: tuple[str, ...] = ()
    setting: str = ""
    reads: tuple[str, ...] = ()
    title: str = ""
    tasks: tuple[str, ...] = ("pretrain",)
    last_only: bool = False

    def enabled(self, settings: schema.Evaluate) -> bool:
        """Returns whether the settings of a run enable it."""
        return not self.setting or bool(getattr(settings, self.setting))

    @property
    def of_package(self) -> bool:
        """Whether its code is part of this package, of which `code_digest` shows a change."""
        return self.build.__module__.startswith("m3i_jax.")


_SETTINGS = tuple(field.name for field in dataclasses.fields(schema.Evaluate))
EVALUATORS: Registry[Evaluator] = Registry(
    "evaluator",
    made_in=lambda evaluator: evaluator.build.__module__,
    replace=True,
    valid=bool,  # part of the name of a metric
)


def register_evaluator(evaluator: Evaluator) -> None:
    """Add an evaluator to the registry; the package calls it at the end of each evaluator's file.
    One of the same name from outside the package is replaced, so that a cell of a notebook can run
    twice.

    Raises:
      ValueError: the name is empty or that of a built-in evaluator; a need that does not exist; a
        setting that is not a field of `config.evaluate`.

    >>> register_evaluator(Evaluator(name="toy", build=lambda inputs: None, needs=("boxes",)))
    Traceback (most recent call last):
    ValueError: evaluator toy: unknown needs boxes; known are labels, names, tokenizer, ...
    """
    name = evaluator.name
    if not evaluator.of_package:
        _load_builtin()
    if unknown := [need for need in evaluator.needs if need not in NEEDS]:
        raise ValueError(
            f"evaluator {name}: unknown needs {', '.join(unknown)}; known are {', '.join(NEEDS)}"
        )
    if evaluator.setting and evaluator.setting not in _SETTINGS:
        raise ValueError(
            f"evaluator {name}: config.evaluate has no setting {evaluator.setting!r}; leave"
            " `setting` out to enable it without one"
        )
    if unknown := [field for field in evaluator.reads if field not in _SETTINGS]:
        raise ValueError(
            f"evaluator {name}: reads {unknown[0]!r}, which config.evaluate does not have; leave it"
            " out of `reads`"
        )
    EVALUATORS.register(name, evaluator)


def _load_builtin() -> None:
    """Import every file of this folder: each registers its evaluators."""
    for module in pkgutil.iter_modules(evaluation.__path__):
        importlib.import_module(f"m3i_jax.evaluation.{module.name}")


def evaluators() -> tuple[Evaluator, ...]:
    """Returns all registered evaluators in the order in which they run: that of their settings in
    `schema.Evaluate`, then those without a setting."""
    _load_builtin()
    position = {setting: number for number, setting in enumerate(_SETTINGS)}
    return tuple(
        sorted(EVALUATORS.values(), key=lambda each: position.get(each.setting, len(position)))
    )

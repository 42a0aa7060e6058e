"""The interface of a task: everything that the trainer, the loop and the pipeline ask of what a run
trains, as one value; the state of a run, and the registry of tasks.

The tasks of this package are the files training/NAME_task.py, imported when they are first needed.
Another package adds its own:

    from m3i_jax.training.task import Task, register_task

    class Denoise(Task): ...

    register_task("denoise", Denoise)

Then `--config.task=denoise` trains it with the same loop, checkpoints, sharding and resume. What
the modes show of a task is in modes/task_views.py."""

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from m3i_jax import parallel, schema
from m3i_jax.data.pipeline import Batches
from m3i_jax.data.sources.base import DataSource
from m3i_jax.data.sources.relabelled import RelabelledSource
from m3i_jax.data.tokenizer import Tokenizer
from m3i_jax.errors import UserError
from m3i_jax.registries import Registry
from m3i_jax.training.unused_model_settings import reject_unused_model_settings

Batch = dict[str, Any]


@flax.struct.dataclass
class State:
    """step: int32 scalar, optimizer steps taken. params: all trained parameters. opt: the state of
    a named optax chain, so that `opt["target"].params` is the EMA target and `opt["balance"]` the
    gradient-norm statistics."""

    step: jax.Array
    params: Any
    opt: Any


def create(params: Any, tx: optax.GradientTransformation) -> State:
    """Returns a state at step 0. Trace it under `jax.eval_shape` for a template that allocates
    nothing."""
    return State(step=jnp.zeros([], jnp.int32), params=params, opt=tx.init(params))


class StepGradients(NamedTuple):
    """Loss, gradients and metrics that a task computes of one batch.

    grads: a tree like the parameters. loss: the scalar that decides whether a step is skipped.
    metrics: scalars for the log. extras: keyword arguments of the optimizer chain; each link takes
    those that it knows."""

    grads: Any
    loss: jax.Array
    metrics: dict[str, jax.Array]
    extras: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """The interface of what a run trains.

    Attributes:
      config: completed settings; what they leave open is filled in.
      vocabulary: entries of the tokenizer, 0 without captions.
      category_counts: training images that show each category, for losses that need them; () if
        the task reads none or no data are open.
      traits: of the kind; see `schema.TaskTraits`.
    """

    config: schema.Config
    vocabulary: int = 0
    category_counts: tuple[int, ...] = ()
    traits: ClassVar[schema.TaskTraits] = schema.TaskTraits()

    @abc.abstractmethod
    def init(self, rng: jax.Array) -> Any:
        """Returns the tree of initial parameters. The encoder is under "encoder"."""

    @abc.abstractmethod
    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of one global batch."""

    @abc.abstractmethod
    def gradients(self, params: Any, opt: Any, batch: Batch) -> StepGradients:
        """Loss and gradients of one global batch, which may be processed in microbatches.

        Args:
          params: the parameters.
          opt: state of the optimizer chain, for links that hold statistics.
          batch: arrays like `batch_shapes`.
        """

    @abc.abstractmethod
    def optimizer(self, *, steps: int, warmup: int) -> optax.GradientTransformationExtraArgs:
        """Returns the named optax chain of a run of this length."""

    @abc.abstractmethod
    def batches(
        self,
        source: DataSource,
        tokenizer: Tokenizer | None,
        *,
        start: int,
        host: int = 0,
        hosts: int = 1,
        views: tuple[int, ...] = (),
    ) -> Batches:
        """Returns this host's share of the batches from sample `start` on (law 5). `views`: what to
        cut of an image, for tasks with several views; (): what the task reads."""

    @abc.abstractmethod
    def pullbacks(self, state: State, batch: Batch) -> tuple[Any, list[Any]]:
        """Returns (arrays that live from the forward pass to the backward, [others of which one set
        lives at a time]) of a batch that is one microbatch; only their shapes are read."""

    @abc.abstractmethod
    def panel_outputs(self, state: State, batch: Batch) -> dict[str, jax.Array]:
        """Returns arrays of a few rows of a batch, for people."""

    @property
    def category_parameters(self) -> tuple[str, ...]:
        """Patterns of the paths of parameters that belong to single categories; they restart where
        `init_from` has other categories."""
        return ()

    def waiting(self, state: State, batch: Batch) -> Any:
        """Returns arrays that are computed of all microbatches before the first gradient."""
        return ()

    def scheduled(self, step: int, *, steps: int) -> dict[str, float]:
        """Scheduled values of a step for the log, beside the learning rate."""
        return {}

    def after_init(self, state: State, shardings: State) -> State:
        """Returns the initial state, with what the task loads into its optimizer state, in the
        shardings of the state: what steps read of other runs, such as frozen targets. Not called
        for a state that is only evaluated (`Trainer.init(targets=False)`)."""
        return state

    @classmethod
    def objectives(cls, config: schema.Config) -> list[tuple[str, ...]]:
        """Objectives that the data are opened for, each a tuple of forms; [] if none is read."""
        return []

    @classmethod
    def class_names(cls, source: DataSource) -> tuple[str, ...]:
        """Returns names of the categories that are predicted."""
        return source.classes

    @classmethod
    def with_annotations(cls, source: DataSource) -> DataSource:
        """Returns a source, to train on or held out, with the annotations that the task reads."""
        return source

    @classmethod
    def with_classes(cls, source: DataSource, names: tuple[str, ...]) -> DataSource:
        """Returns a source with its `class_names` renumbered to those of another list, by name."""
        return RelabelledSource(source, names)

    @classmethod
    def training_records(cls, source: DataSource) -> DataSource:
        """Returns the records of a source to train on."""
        return source

    @classmethod
    def count_categories(cls, config: schema.Config, source: DataSource) -> tuple[int, ...]:
        """`category_counts` of the training data."""
        return ()

    @classmethod
    def reject_unused_settings(cls, config: schema.Config) -> None:
        """Refuse a setting that this task or its network does not read, with a UserError."""
        reject_unused_model_settings(config)


TASK_KINDS: Registry[type[Task]] = Registry(
    "task",
    choices=list(schema.TASKS),
    home=lambda name: f"{__package__}.{name}_task",
    made_in=lambda kind: kind.__module__,
    replace=True,
    unknown=lambda name, names: UserError(
        f"config.task: {name!r} is not a task; use one of {', '.join(names)}"
    ),
)


def register_task(name: str, kind: type[Task]) -> type[Task]:
    """Adds a task to the values of `config.task`.

    Registering the same name again replaces it, so that a module can be reloaded.

    Raises:
      ValueError: the name is not an identifier, or belongs to a task of this package.

    >>> register_task("pretrain", type("Other", (), {"__module__": "elsewhere"}))
    Traceback (most recent call last):
    ValueError: task 'pretrain' exists already: a task cannot be named 'pretrain', ...
    """
    TASK_KINDS.register(name, kind)
    schema.TASKS.setdefault(name, kind.traits)
    return kind


def task_kind(name: str) -> type[Task]:
    """Returns the class of a task by its name.

    Raises:
      UserError: no task of that name is registered.

    >>> task_kind("pretrain").__name__
    'Pretrain'
    """
    return TASK_KINDS[name]


def make_task(
    config: schema.Config, vocabulary: int = 0, category_counts: tuple[int, ...] = ()
) -> Task:
    """Returns the task of a completed configuration."""
    return task_kind(config.task)(config, vocabulary, category_counts)


def split_microbatches(tree: Any, count: int, units: int) -> Any:
    """Reshapes [B, ...] -> [k, B/k, ...]. Units of B / units neighbouring rows are dealt in turn,
    so that each device keeps its rows and the rows of a unit stay together on any mesh. Arrays with
    one row a unit are split in the same way.

    >>> import numpy as np
    >>> split_microbatches(np.arange(8), 2, 4).tolist()
    [[0, 1, 4, 5], [2, 3, 6, 7]]
    """

    def one(x: jax.Array) -> jax.Array:
        dealt = x.reshape(units // count, count, -1, *x.shape[1:]).swapaxes(0, 1)
        return parallel.hint(dealt.reshape(count, -1, *x.shape[1:]), None, parallel.DATA)

    return jax.tree.map(one, tree)


def merge_microbatches(tree: Any, count: int, units: int) -> Any:
    """Returns the inverse of `split_microbatches`: rows in the order and with the sharding of the
    batch.

    >>> import numpy as np
    >>> merge_microbatches(np.array([[0, 1, 4, 5], [2, 3, 6, 7]]), 2, 4).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """

    def one(x: jax.Array) -> jax.Array:
        collected = x.reshape(count, units // count, -1, *x.shape[2:]).swapaxes(0, 1)
        return parallel.hint(collected.reshape(-1, *x.shape[2:]), parallel.DATA)

    return jax.tree.map(one, tree)

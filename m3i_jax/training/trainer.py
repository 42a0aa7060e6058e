"""Sets up a run before its first step: its length, shapes, shardings, initial state and compiled
functions."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from m3i_jax import parallel, schema
from m3i_jax.errors import DoesNotFit, UserError
from m3i_jax.schema.limits import INT32
from m3i_jax.training import init_from, optimizer, scaling, step
from m3i_jax.training.task import State, Task, create, make_task


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunLength:
    """The length of a run in optimizer steps. The last partial batch of an epoch is dropped."""

    steps_per_epoch: int
    steps: int
    warmup: int


def _full_steps(epochs: float, per_epoch: int) -> int:
    # rounded before it is cut: 0.29 * 100 is 28.999999999999996
    return int(round(epochs * per_epoch, 6))


def run_length(config: schema.Config) -> RunLength:
    """Returns the optimizer steps of a completed configuration.

    Raises:
      UserError: if an epoch has no full batch, or the warm-up is longer than the run.

    >>> run_length(schema.Config(data=schema.Data(size=1_281_167)))
    RunLength(steps_per_epoch=312, steps=499200, warmup=12480)
    """
    size, batch, t, o = config.data.size, config.train.batch_size, config.train, config.optim
    per_epoch = size // batch
    if not per_epoch and not (t.steps and o.warmup_steps >= 0):
        raise UserError(
            f"config.train.batch_size: {batch} is more than the {size} training images; set it to"
            f" at most {size - size % 2}"
        )
    steps = t.steps or max(1, _full_steps(t.epochs, per_epoch))
    if steps > INT32:
        raise UserError(
            f"config.train.epochs: {t.epochs!r} are {steps:,} steps, and a run has at most"
            f" {INT32:,}; lower it"
        )
    warmup = o.warmup_steps if o.warmup_steps >= 0 else _full_steps(o.warmup_epochs, per_epoch)
    if warmup > steps:
        if o.warmup_steps >= 0:
            raise UserError(
                f"config.optim.warmup_steps: {warmup} is more than the run's {steps} steps;"
                " lower it"
            )
        raise UserError(
            f"config.optim.warmup_epochs: {o.warmup_epochs!r} are {warmup} steps, more than the"
            f" run's {steps}; lower it or set warmup_steps"
        )
    return RunLength(steps_per_epoch=per_epoch, steps=steps, warmup=warmup)


class Trainer:
    """Compiled functions and layouts of a run.

    Args: config: completed settings (data.classes, data.captions, data.size known); what they leave
      open is filled in (`scaling.fill_open_settings`).
      mesh: devices.
      vocabulary: entries of the tokenizer, 0 without captions.
      task: of this configuration; None: built here.
    """

    def __init__(
        self,
        config: schema.Config,
        mesh: jax.sharding.Mesh,
        vocabulary: int,
        task: Task | None = None,
    ):
        filled = scaling.fill_open_settings(config)
        self.task = make_task(filled, vocabulary, task.category_counts if task else ())
        if task and task.config == filled:
            self.task = task  # with what it has computed already
        config = filled
        self.config, self.mesh, self.vocabulary = config, mesh, vocabulary
        self.length = run_length(config)
        steps, warmup = self.length.steps, self.length.warmup
        self.tx = self.task.optimizer(steps=steps, warmup=warmup)
        self.learning_rate = optimizer.lr_schedule(config.optim, steps=steps, warmup=warmup)
        self.template = jax.eval_shape(self._create)
        self.shardings = parallel.tree_shardings(mesh, self.template)
        replicated = parallel.replicated(mesh)
        self._step = parallel.Program(
            functools.partial(step.train_step, self.task, self.tx),
            name="train_step",
            announced="the train step",
            in_shardings=(self.shardings, parallel.data_sharding(mesh)),
            out_shardings=(self.shardings, replicated),
            donate_argnums=0,
        )
        self._panel = parallel.Program(
            lambda state, batch: self.task.panel_outputs(state, batch),
            name="panel",
            out_shardings=replicated,
        )

    def scheduled(self, step: int) -> dict[str, float]:
        """Returns the learning rate of a step and what else the task schedules, for the log. Steps
        that were skipped are not counted, as by the links of the optimizer."""
        values = self.task.scheduled(step, steps=self.length.steps)
        return {"lr": float(self.learning_rate(step - 1)), **values}

    def _params(self) -> Any:
        return self.task.init(jax.random.key(self.config.seed))

    def _create(self) -> State:
        return create(self._params(), self.tx)

    def check_state_fits(self) -> None:
        """Refuse a state that the devices cannot hold, before any of it is allocated or read. The
        memory of a step beside the state is not checked; --mode=compile does that.

        Raises:
          DoesNotFit: with the memory needed, the memory available, and a way out.
        """
        needed = parallel.bytes_per_device(self.template, self.shardings)
        available = parallel.device_memory(self.mesh)
        if needed <= available:
            return
        devices = self.mesh.devices.size
        leaves = jax.tree.leaves(self.template)
        total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        enough = -(-total // max(int(available), 1))
        way = (
            "config.parallel.mesh=(1,-1,1) splits it over all of them"
            if total < devices * available
            else f"it needs {enough:,} or more of them"
        )
        all_, each, limit = (f"{size / 2**30:,.1f} GiB" for size in (total, needed, available))
        raise DoesNotFit(
            f"config.parallel.mesh: the state (parameters, moments and target, {all_} in all) takes"
            f" {each} of each of the {devices} {self.mesh.devices.flat[0].platform} device(s),"
            f" which have {limit}; {way}, or use a smaller model; --mode=compile --suggest lists"
            " what fits"
        )

    def init(
        self,
        log: Callable[[str], None] = print,
        classes: tuple[str, ...] = (),
        *,
        targets: bool = True,
    ) -> State:
        """Returns the state at step 0, created with its shardings, so that no device holds more
        than its share. It includes what `init_from` names, also in the EMA target; `log` gets the
        report of it. `classes`: names of the categories, by which heads of other categories
        restart. `targets`: read the frozen encoders of other runs; False: they keep first values,
        which an evaluation does not read."""
        if self.config.init_from:
            params = parallel.Program(
                self._params, name="init", out_shardings=self.shardings.params
            )()
            params = init_from.initialize_from(
                self.config,
                params,
                self.shardings.params,
                log,
                classes=classes,
                of_categories=self.task.category_parameters,
            )
            state = parallel.Program(
                lambda params: create(params, self.tx),
                name="init",
                out_shardings=self.shardings,
            )(params)
        else:
            state = parallel.Program(self._create, name="init", out_shardings=self.shardings)()

        return self.task.after_init(state, self.shardings) if targets else state

    def step(self, state: State, batch: dict[str, jax.Array]) -> tuple[State, dict[str, jax.Array]]:
        """Takes one step; `state` is donated. Returns at once, while the device computes."""
        with jax.set_mesh(self.mesh):
            return self._step(state, batch)

    def lower(self, batch: dict[str, jax.ShapeDtypeStruct]) -> Any:
        """Returns the lowered step, for counting and ahead-of-time compilation."""
        # an abstract mesh: no constant is placed on devices that may not exist
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return self._step.lower(self.template, batch)

    def residual_bytes(self, batch: dict[str, jax.ShapeDtypeStruct]) -> float:
        """Returns bytes that live from the forward pass to the backward, counted on the traced
        program: what the task keeps of a batch that is one microbatch, without state and batch."""
        closed, (common, sets) = jax.make_jaxpr(self.task.pullbacks, return_shape=True)(
            self.template, batch
        )
        outputs, arguments = iter(closed.jaxpr.outvars), set(closed.jaxpr.invars)

        def residuals(tree: Any) -> set[Any]:
            variables = [next(outputs) for _ in jax.tree.leaves(tree)]
            return {v for v in variables if isinstance(v, core.Var)} - arguments

        of_all = residuals(common)
        each = [of_all | residuals(one) for one in sets] or [of_all]
        return max(
            float(sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in variables))
            for variables in each
        )

    def waiting_bytes(self, batch: dict[str, jax.ShapeDtypeStruct]) -> float:
        """Returns bytes of the arrays of a batch that wait until its microbatch is computed."""
        arrays = jax.eval_shape(self.task.waiting, self.template, batch)
        leaves = jax.tree.leaves(arrays)
        return float(sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves))

    def panel_outputs(self, state: State, batch: dict[str, Any]) -> dict[str, jax.Array]:
        """Returns arrays for a panel of a few rows, as of the task."""
        return self._panel(state, batch)

    def trace(self, state: State, batch: dict[str, Any]) -> Any:
        """Returns the step without `jit`, for tracing."""
        return step.train_step(self.task, self.tx, state, batch)


def abstract_batch(config: schema.Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of one global batch of a completed configuration."""
    return make_task(config).batch_shapes()

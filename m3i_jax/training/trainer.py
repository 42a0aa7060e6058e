"""What a run is made of before its first step: shapes, shardings, the initial state and the
compiled functions."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from m3i_jax import parallel, schema
from m3i_jax.errors import DoesNotFit, UserError
from m3i_jax.models import m3i
from m3i_jax.schema.limits import INT32
from m3i_jax.training import checkpoint, init_from, optimizer, plan, scaling, state, step


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunLength:
    """The length of a run in optimizer steps. The last partial batch of an epoch is dropped."""

    steps_per_epoch: int
    steps: int
    warmup: int


def run_length(config: schema.Config) -> RunLength:
    """Steps of a run, defined here and nowhere else.

    Raises:
      UserError: if an epoch has no full batch.

    >>> run_length(schema.Config(data=schema.Data(size=1_281_167)))
    Length(steps_per_epoch=312, steps=499200, warmup=12480)
    """
    size, batch, t, o = config.data.size, config.train.batch_size, config.train, config.optim
    per_epoch = size // batch
    if not per_epoch and not (t.steps and o.warmup_steps >= 0):
        raise UserError(
            f"config.train.batch_size: {batch} is more than the {size} training images; set it to"
            f" at most {size - size % 2}"
        )
    steps = t.steps or max(1, int(t.epochs * per_epoch))
    if steps > INT32:
        raise UserError(
            f"config.train.epochs: {t.epochs!r} are {steps:,} steps, and a run has at most"
            f" {INT32:,}; lower it"
        )
    warmup = o.warmup_steps if o.warmup_steps >= 0 else int(o.warmup_epochs * per_epoch)
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
    """

    def __init__(self, config: schema.Config, mesh: jax.sharding.Mesh, vocabulary: int):
        config = scaling.fill_open_settings(config)
        self.config, self.mesh, self.plan, self.length = (
            config,
            mesh,
            plan.build_plan(config),
            run_length(config),
        )
        self.vocabulary = vocabulary
        self.tx = optimizer.build_optimizer(
            config, self.plan.terms, steps=self.length.steps, warmup=self.length.warmup
        )
        self.momentum = optimizer.ema_momentum(config.optim, steps=self.length.steps)
        self.learning_rate = optimizer.lr_schedule(
            config.optim, steps=self.length.steps, warmup=self.length.warmup
        )
        uses = {t.target.of for t in self.plan.terms}
        make = functools.partial(
            m3i.init,
            config,
            terms=self.plan.terms,
            classes=config.data.classes if "category" in uses else 0,
            vocabulary=vocabulary if "text" in uses else 0,
        )
        self._params = lambda: make(rng=jax.random.key(config.seed))
        self._create = lambda: state.create(self._params(), self.tx)
        self.template = jax.eval_shape(self._create)
        self.shardings = parallel.tree_shardings(mesh, self.template)
        whole = parallel.replicated(mesh)
        self._step = parallel.Program(
            functools.partial(step.train_step, self.plan, self.tx),
            name="train_step",
            in_shardings=(self.shardings, parallel.data_sharding(mesh)),
            out_shardings=(self.shardings, whole),
            donate_argnums=0,
        )
        self._look = parallel.Program(
            functools.partial(step.panel_outputs, self.plan),
            name="look_inside",
            out_shardings=whole,
        )

    def check_room(self) -> None:
        """Refuse a state that the devices cannot hold, before anything of it is made or read. What
        a step needs beside it is not judged: --mode=compile knows that.

        Raises:
          DoesNotFit: says what it needs, what there is and what would do.
        """
        need, room = (
            parallel.bytes_per_device(self.template, self.shardings),
            parallel.device_memory(self.mesh),
        )
        if need <= room:
            return
        devices, whole = (
            self.mesh.devices.size,
            sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.template)),
        )
        wanted = -(-whole // max(int(room), 1))
        way = (
            "config.parallel.mesh=(1,-1,1) splits it over all of them"
            if whole < devices * room
            else f"it needs {wanted:,} or more of them"
        )
        all_, each, there = (f"{size / 2**30:,.1f} GiB" for size in (whole, need, room))
        raise DoesNotFit(
            f"config.parallel.mesh: the state (parameters, moments and target, {all_} in all) takes"
            f" {each} of each of the {devices} {self.mesh.devices.flat[0].platform} device(s),"
            f" which have {there}; {way}, or use a smaller model; --mode=compile --suggest knows"
            " what fits"
        )

    def init(self, say: Callable[[str], None] = print) -> state.State:
        """The state at step 0, made where it will live: no device ever holds more than its share.
        What `init_from` names is in it, in the momentum target too, and `say` gets the account of
        it."""
        if self.config.init_from:
            params = parallel.Program(
                self._params, name="init", out_shardings=self.shardings.params
            )()
            params = init_from.initialize_from(self.config, params, self.shardings.params, say)
            made = parallel.Program(
                lambda params: state.create(params, self.tx),
                name="init",
                out_shardings=self.shardings,
            )(params)
        else:
            made = parallel.Program(self._create, name="init", out_shardings=self.shardings)()
        if "frozen" not in made.opt:
            return made
        frozen, layout = made.opt["frozen"], self.shardings.opt["frozen"].params["encoder"]
        teacher = checkpoint.load_encoder(
            self.config.objective.target_checkpoint, self.template.params["encoder"], layout
        )
        opt = made.opt.copy()  # of its own kind: to JAX another mapping is another tree
        opt["frozen"] = frozen._replace(params={**frozen.params, "encoder": teacher})
        return made.replace(opt=opt)

    def step(
        self, current: state.State, batch: dict[str, jax.Array]
    ) -> tuple[state.State, dict[str, jax.Array]]:
        """One step; `current` is donated. Returns at once, the device works on."""
        with jax.set_mesh(self.mesh):
            return self._step(current, batch)

    def lower(self, batch: dict[str, jax.ShapeDtypeStruct]) -> Any:
        """The lowered step for counting and ahead-of-time compilation."""
        # no constant is put on devices that may not be there
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return self._step.lower(self.template, batch)

    def residuals(self, batch: dict[str, jax.ShapeDtypeStruct]) -> float:
        """Bytes that live from the forward pass to the backward, counted on the traced program:
        what the encoder and the dearer of the two groups of losses keep of a batch that is computed
        at once, without what is there anyway, state and batch."""
        pull = functools.partial(step.loss_pullbacks, self.plan)
        closed, (encoder, groups) = jax.make_jaxpr(pull, return_shape=True)(self.template, batch)
        kept, given = iter(closed.jaxpr.outvars), set(closed.jaxpr.invars)

        def arrays(tree: Any) -> set[Any]:
            mine = [next(kept) for _ in jax.tree.leaves(tree)]
            return {v for v in mine if isinstance(v, core.Var)} - given

        of_encoder = arrays(encoder)
        each = [of_encoder | arrays(group) for group in groups]
        return max(
            float(sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in mine))
            for mine in each
        )

    def looked(self, batch: dict[str, jax.ShapeDtypeStruct]) -> float:
        """Bytes of the views and targets of a batch: those of one microbatch wait for the
        others."""
        found = jax.eval_shape(
            functools.partial(step.views_and_targets, self.plan), self.template, batch
        )
        return float(
            sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(found))
        )

    def look_inside(self, current: state.State, batch: dict[str, Any]) -> dict[str, jax.Array]:
        """Arrays for a panel of a few rows."""
        return self._look(current, batch)

    def trace(self, current: state.State, batch: dict[str, Any]) -> Any:
        """The step untransformed, for tracing."""
        return step.train_step(self.plan, self.tx, current, batch)


def abstract_batch(config: schema.Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of one global batch of a completed configuration."""
    b, s, n = config.train.batch_size, config.data.image_size, config.tokens
    shapes = {
        "views": ((b, 2, s, s, 3), "uint8"), "box": ((b, 2, 4), "float32"), "flip": ((b, 2), "bool"), "mask": ((b, n), "bool"),
        "label": ((b,), "int32"), "position": ((b, 2), "uint32"),
    }  # fmt: skip
    if config.data.captions == "yes":
        shapes |= {"tokens": ((b, config.data.caption_length), "int32"), "length": ((b,), "int32")}
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}

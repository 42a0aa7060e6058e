"""The base of segmentation and detection as tasks: annotated images, an encoder that makes maps, a
pyramid, a head with losses as sums over images or pixels.

Parameters are {"encoder", "pyramid", "head"}. Running statistics of batch norms are the entry
`opt["running"].statistics` of the optimizer state, with the same two parts.

k microbatches of B/k give the losses of one batch of B, since every sum is divided once by a number
that is known before. Batch norm is the exception: its statistics are those of one microbatch, over
all devices."""

import abc
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from m3i_jax import schema
from m3i_jax.augment import dense_photometric
from m3i_jax.errors import UserError
from m3i_jax.models import composite, vit
from m3i_jax.models.dense import pyramid
from m3i_jax.objective import stream_keys
from m3i_jax.training import optimizer, views
from m3i_jax.training.task import Batch, State, StepGradients, Task, split_microbatches

_FIRST_COPY = np.uint32(1 << 31)  # of a position's upper word: random numbers of its own
Values = dict[str, jax.Array]
Maps = dict[int, jax.Array]
Divisor = jax.Array | dict[str, jax.Array]


class RunningState(NamedTuple):
    """statistics: running means and variances of batch norms, a tree."""

    statistics: Any


def track_running(initial: Any) -> optax.GradientTransformationExtraArgs:
    """Returns a link that holds running statistics and takes their new values from the step.

    `update` passes updates through and replaces the statistics by the keyword argument
    `running_statistics`.
    """

    def update(
        updates: Any, state: Any, params: Any = None, *, running_statistics: Any, **_: Any
    ) -> tuple[Any, RunningState]:
        return updates, RunningState(running_statistics)

    def init(params: Any) -> RunningState:
        return RunningState(jax.tree.map(lambda x: jnp.array(x, copy=True), initial()))

    return optax.GradientTransformationExtraArgs(init, update)


def normalize_images(
    config: schema.Config, images_BxSxSx3: jax.Array, size_Bx2: jax.Array
) -> jax.Array:
    """uint8 or float images in 0..255, normalised by `data.augment.mean` and `std`, then 0 beyond
    their size, float32.

    >>> out = normalize_images(schema.Config(), jnp.full((1, 2, 3, 3), 255), jnp.array([[2, 1]]))
    >>> out[0, 0, :, 0].round(2).tolist()
    [2.25, 0.0, 0.0]
    """
    a = config.data.augment
    mean, std = (np.asarray(v, np.float32) for v in (a.mean, a.std))
    x = (images_BxSxSx3.astype(jnp.float32) / 255 - mean) / std
    rows, columns = jnp.arange(x.shape[1]), jnp.arange(x.shape[2])
    inside = (rows < size_Bx2[:, :1])[:, :, None] & (columns < size_Bx2[:, 1:])[:, None]
    return jnp.where(inside[..., None], x, 0)


def image_keys(config: schema.Config, position_Bx2: jax.Array, purpose: int) -> jax.Array:
    """Returns a random key per image [B], a function of (seed, purpose, stream position)."""
    base = stream_keys.purpose_key(config.seed, purpose)

    def one(words_2: jax.Array) -> jax.Array:
        return stream_keys.position_key(base, words_2)

    return jax.vmap(one)(position_Bx2)


@dataclasses.dataclass(frozen=True)
class DenseTask(Task):
    """A head on the maps of an encoder. Subclasses say which pyramid and head."""

    @abc.abstractmethod
    def pyramid_config(self, sources: tuple[tuple[int, int], ...]) -> pyramid.PyramidConfig:
        """Returns the pyramid for maps of these (stride, channels)."""

    @abc.abstractmethod
    def init_head(self, rng: jax.Array) -> tuple[Any, Any]:
        """Returns (parameters, running statistics) of the head."""

    @abc.abstractmethod
    def annotation_shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns {array of a batch: (shape, dtype)} beside image, size and position."""

    @abc.abstractmethod
    def divisor(self, batch: Batch) -> Divisor:
        """Returns what the sums of the losses of a batch are divided by: one number, or one for
        each loss by its name. It depends on annotations alone."""

    @abc.abstractmethod
    def loss_sums(
        self, params: Any, statistics: Any, maps: Maps, batch: Batch
    ) -> tuple[Values, Values, Any]:
        """Returns (losses with their weights, each a sum; other values, each a sum over images; new
        statistics) of a batch."""

    @abc.abstractmethod
    def predict(self, params: Any, statistics: Any, batch: Batch) -> dict[str, jax.Array]:
        """Returns predictions for the images of a batch, of which image and size are read."""

    @functools.cached_property
    def sources(self) -> tuple[tuple[int, int], ...]:
        """(stride, channels) of the maps of the encoder."""
        backbone, side = composite.of_run(self.config), self.config.data.image_size
        if backbone.stages is None or backbone.map_strides is None:
            raise UserError(
                f"config.model.backbone: {self.config.model.backbone!r} has no maps, which"
                f" config.task={self.config.task} needs; choose another"
            )
        strides = backbone.map_strides(self.config.model, self.config.dense.maps)
        shape = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        maps = jax.eval_shape(
            lambda images: self._stages(self._init_encoder(jax.random.key(0)), images)[-1], shape
        )
        return tuple(zip(strides, (x.shape[-1] for x in maps), strict=True))

    def pyramid(self) -> pyramid.PyramidConfig:
        """Returns the pyramid of this run.

        Raises:
          UserError: the encoder's maps cannot give the strides that the head reads.
        """
        try:
            return self.pyramid_config(self.sources)
        except ValueError as error:
            raise UserError(
                f"config.dense.{self.config.task}.strides: {error}; choose other strides or another"
                " model"
            ) from None

    def init(self, rng: jax.Array) -> Any:
        of_encoder, of_pyramid, of_head = jax.random.split(rng, 3)
        return {
            "encoder": self._init_encoder(of_encoder),
            "pyramid": pyramid.init(self.pyramid(), of_pyramid)[0],
            "head": self.init_head(of_head)[0],
        }

    def init_statistics(self) -> Any:
        """Returns running statistics before the first step."""
        rng = jax.random.key(0)
        return {"pyramid": pyramid.init(self.pyramid(), rng)[1], "head": self.init_head(rng)[1]}

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        b, s = self.config.train.batch_size, self.config.data.image_size
        shapes = {
            "image": ((b, s, s, 3), "uint8"),
            "size": ((b, 2), "int32"),
            **self.annotation_shapes(),
            "position": ((b, 2), "uint32"),
        }
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}

    def optimizer(self, *, steps: int, warmup: int) -> optax.GradientTransformationExtraArgs:
        return optimizer.build_chain(
            self.config,
            steps=steps,
            warmup=warmup,
            last=(
                *optimizer.average_link(self.config.optim, steps=steps),
                ("running", track_running(self.init_statistics)),
            ),
        )

    def scheduled(self, step: int, *, steps: int) -> dict[str, float]:
        if self.config.optim.ema_of != "all":
            return {}
        return {"ema": optimizer.ema_momentum(self.config.optim, steps=steps)(step)}

    def gradients(self, params: Any, opt: Any, batch: Batch) -> StepGradients:
        count, images = self.config.train.microbatches, batch["position"].shape[0]
        divisor, statistics = self.divisor(batch), opt["running"].statistics

        def part_gradients(statistics: Any, part: Batch) -> tuple[Any, Any, Any]:
            loss = functools.partial(self._loss, statistics=statistics, batch=part)
            (_, (values, counts, new)), grads = jax.value_and_grad(
                lambda tree: loss(tree, divisor), has_aux=True
            )(params)
            return grads, (values, counts), new

        if count == 1:
            grads, sums, statistics = part_gradients(statistics, batch)
        else:
            rows = split_microbatches(batch, count, images)

            def add(carry: Any, part: Batch) -> tuple[Any, None]:
                total, statistics = carry
                grads, sums, statistics = part_gradients(statistics, part)
                return (jax.tree.map(jnp.add, total, (grads, sums)), statistics), None

            shapes = jax.eval_shape(part_gradients, statistics, jax.tree.map(lambda x: x[0], rows))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[:2])
            ((grads, sums), statistics), _ = jax.lax.scan(add, (zeros, statistics), rows)
        values, counts = sums
        parts = divide(values, divisor)
        metrics = {f"loss/{name}": value for name, value in parts.items()}
        metrics |= {name: value / images for name, value in counts.items()}
        loss = sum(parts.values(), jnp.zeros(()))
        return StepGradients(grads, loss, metrics, {"running_statistics": statistics})

    def pullbacks(self, state: State, batch: Batch) -> tuple[Any, list[Any]]:
        divisor, statistics = self.divisor(batch), state.opt["running"].statistics
        loss = functools.partial(self._loss, statistics=statistics, batch=batch)
        return jax.vjp(lambda tree: loss(tree, divisor), state.params, has_aux=True)[1], []

    def panel_outputs(self, state: State, batch: Batch) -> dict[str, jax.Array]:
        return self.predict(state.params, state.opt["running"].statistics, batch)

    def _loss(
        self, params: Any, divisor: Divisor, *, statistics: Any, batch: Batch
    ) -> tuple[jax.Array, Any]:
        *others, last = self.encoder_maps(params, batch, train=True)
        values: Values = {}
        weight = self.config.dense.maps.composite_weight
        for maps in others if weight else ():
            # the loss on the maps of the first of two copies, as a batch of its own
            upper, lower = batch["position"][:, 0] ^ _FIRST_COPY, batch["position"][:, 1]
            own = batch | {"position": jnp.stack([upper, lower], 1)}
            more, _, statistics = self._head_sums(params, statistics, maps, own)
            values = {name: weight * value for name, value in more.items()}
        more, counts, new = self._head_sums(params, statistics, last, batch)
        values = {name: value + values.get(name, 0) for name, value in more.items()}
        total = sum(divide(values, divisor).values(), jnp.zeros(()))
        return total, (values, counts, jax.lax.stop_gradient(new))

    def _head_sums(
        self, params: Any, statistics: Any, maps: tuple[jax.Array, ...], batch: Batch
    ) -> tuple[Values, Values, Any]:
        read, of_pyramid = self._pyramid_maps(params, statistics, maps, train=True)
        with jax.named_scope("head"):
            values, counts, of_head = self.loss_sums(params, statistics, read, batch)
        return values, counts, {"pyramid": of_pyramid, "head": of_head}

    def images(self, batch: Batch, *, train: bool) -> jax.Array:
        """Returns normalised images of a batch, float32; in training, after changes of colour."""
        images = batch["image"]
        if train and self.config.dense.geometry.photometric:
            images = dense_photometric.dense_photometric(
                images, batch["position"], seed=self.config.seed
            )
        return normalize_images(self.config, images, batch["size"])

    def maps(self, params: Any, statistics: Any, batch: Batch, *, train: bool) -> tuple[Maps, Any]:
        """Returns (maps that the head reads, new statistics of the pyramid)."""
        last = self.encoder_maps(params, batch, train=train)[-1]
        return self._pyramid_maps(params, statistics, last, train=train)

    def encoder_maps(
        self, params: Any, batch: Batch, *, train: bool
    ) -> tuple[tuple[jax.Array, ...], ...]:
        """Returns the maps of the encoder; of two composed copies in training, those of each, the
        maps that predictions read last."""
        config, encoder = self.config, params["encoder"]
        if config.model.encoder.freeze:
            encoder = jax.lax.stop_gradient(encoder)
        keep = None
        if train and config.model.encoder.drop_path:
            draws = [
                views.drop_path_factors(config, batch["position"], copy)
                for copy in range(config.dense.maps.composite)
            ]
            keep = jnp.concatenate([factors for factors in draws if factors is not None], 1)
        with jax.named_scope("views"):
            images = self.images(batch, train=train)
        with jax.named_scope("encoder"):
            return self._stages(encoder, images, keep)

    def _pyramid_maps(
        self, params: Any, statistics: Any, maps: tuple[jax.Array, ...], *, train: bool
    ) -> tuple[Maps, Any]:
        with jax.named_scope("pyramid"):
            return pyramid.apply(
                self.pyramid(),
                params["pyramid"],
                statistics["pyramid"],
                maps,
                train=train,
                momentum=self.config.dense.segment.norm_momentum,
            )

    def _init_encoder(self, rng: jax.Array) -> Any:
        model, config = self.config.model, self.config
        backbone = composite.of_run(config)
        params = backbone.init(model, rng, mask_token=False, grid=self._position_grid())
        return backbone.init_maps(model, config.dense.maps, params, size=config.data.image_size)

    def _position_grid(self) -> int:
        """Cells a side of the position table, those of the pre-training images."""
        return vit.position_size(self.config) // self.config.model.encoder.patch_size

    def _stages(
        self, encoder: Any, images: jax.Array, keep: jax.Array | None = None
    ) -> tuple[tuple[jax.Array, ...], ...]:
        backbone = composite.of_run(self.config)
        settings: dict[str, Any] = {
            "maps": self.config.dense.maps,
            "size": self.config.data.image_size,
            "keep_BxLx2": keep,
        }
        if backbone.copies is not None:
            return backbone.copies(self.config.model, encoder, images, **settings)
        assert backbone.stages is not None
        return (backbone.stages(self.config.model, encoder, images, **settings),)


def one_stride(sources: tuple[tuple[int, int], ...]) -> bool:
    """Returns whether all maps of an encoder have one stride, as a ViT's.

    >>> one_stride(((16, 768), (16, 768))), one_stride(((4, 64), (8, 128)))
    (True, False)
    """
    return len({stride for stride, _ in sources}) == 1


def divide(values: Values, divisor: Divisor) -> Values:
    """Sums of losses by their divisors.

    >>> divide({"a": jnp.array(6.0)}, {"a": jnp.array(2.0)})["a"].item()
    3.0
    """
    if isinstance(divisor, dict):
        return {name: value / divisor[name] for name, value in values.items()}
    return {name: value / divisor for name, value in values.items()}


def sum_images(values: Mapping[str, tuple[jax.Array, jax.Array]]) -> Values:
    """Returns the sums of {name: (sum over images, images)}."""
    return {name: total for name, (total, _) in values.items()}

"""Frozen features of whole data sets: what every evaluator starts from. Each set of pictures is read and encoded once an evaluation,
however many measures look at it."""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import parallel, schema
from m3i_jax.data import photometric
from m3i_jax.models import m3i, vit


def image_features(config: schema.Config, attention: bool, params: Any, views_BxSxSx3: jax.Array) -> jax.Array:
    """L2-normalised features [B, D] float32 of clean uint8 views (no colour augmentation, no masking): the pooling that the
    objective trains (M3I section 3.4), or the mean of the patch tokens."""
    pixels = photometric.normalize(views_BxSxSx3.astype(jnp.float32) / 255, config.data.augment)
    z_BxTxD = m3i.encode(config, params["encoder"], vit.patchify(pixels, config.model.encoder.patch_size).astype(config.model.dtype))
    first = int(config.model.encoder.cls_token)
    x_BxNxD, cls_BxD = z_BxTxD[:, first:], z_BxTxD[:, 0] if first else None
    vector_BxD = (m3i.pool(config, params, x_BxNxD, cls=cls_BxD) if attention else x_BxNxD.astype(jnp.float32).mean(1)).astype(jnp.float32)
    return vector_BxD * jax.lax.rsqrt(jnp.square(vector_BxD).sum(-1, keepdims=True) + 1e-12)


class Features(NamedTuple):
    """vectors [n, D] float32, L2-normalised; labels [n] int32, -1 = none; records [n] int64, their places in the source."""

    vectors: np.ndarray
    labels: np.ndarray
    records: np.ndarray


class Extractor:
    """Features of batches `{views, label, index, valid}`; compiled once for all calls.

    Args:
      config: the run's settings.
      mesh: batches are split over its data axes; their size must divide by those.
      attention: whether features are attention-pooled, or the mean of the patch tokens.
    """

    def __init__(self, config: schema.Config, mesh: jax.sharding.Mesh, *, attention: bool = False):
        self._mesh, self._width = mesh, config.model.pool.width if attention else config.model.encoder.width
        self._features = jax.jit(functools.partial(image_features, config, attention), out_shardings=parallel.replicated(mesh))

    def __call__(self, params: Any, batches: Iterable[dict[str, np.ndarray]], poll: Callable[[], None] = lambda: None) -> Features:
        """Those of the valid rows, in order. `params` holds the part "encoder" and, for attention pooling, "pool". `poll` is called
        between batches and may raise."""
        parts = [Features(np.zeros((0, self._width), np.float32), np.zeros(0, np.int32), np.zeros(0, np.int64))]
        for batch in batches:
            poll()
            views, valid = jax.device_put(batch["views"], parallel.data_sharding(self._mesh)), batch["valid"]
            parts.append(Features(np.asarray(self._features(params, views))[valid], batch["label"][valid], batch["index"][valid]))
        return Features(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


class Seen:
    """What the measures of one evaluation share: `seen(name)` is the features of a set, extracted when first asked for.

    Attributes:
      params: parameters that are evaluated.
      poll: to be called between pieces of work; may raise.
      skipped: reason -> pictures that could not be read.

    >>> seen = Seen({"index": lambda params, poll: (print("extracted"), {})}, params={}, poll=lambda: None)
    >>> seen("index") is seen("index")
    extracted
    True
    """

    def __init__(self, sets: "Mapping[str, Set]", params: Any, poll: Callable[[], None]) -> None:
        self._sets, self._made, self.params, self.poll = sets, {}, params, poll  # type: ignore[var-annotated]
        self.skipped: collections.Counter[str] = collections.Counter()

    def __call__(self, name: str) -> Features:
        if name not in self._made:
            self._made[name], skipped = self._sets[name](self.params, self.poll)
            self.skipped.update(skipped)
        return self._made[name]


Set = Callable[[Any, Callable[[], None]], tuple[Features, Mapping[str, int]]]
Measure = Callable[[Seen], Iterator[tuple[str, float]]]


def pictures(extract: Extractor, batches: Callable[[], Any]) -> Set:
    """A set of pictures: `batches` gives a fresh iterator, whose `skipped` says in the end what could not be read."""

    def run(params: Any, poll: Callable[[], None]) -> tuple[Features, Mapping[str, int]]:
        read = batches()
        return extract(params, read, poll), getattr(read, "skipped", {})

    return run


def evaluator(config: schema.Config, sets: Mapping[str, Set], measures: Iterable[Measure]) -> Any:
    """An evaluator of the online encoder, or of the target with `evaluate.target`: (state, poll) -> iterator of (name, value)."""
    measures = tuple(measures)

    def run(state: Any, poll: Callable[[], None]) -> Iterator[tuple[str, float]]:
        params = {**state.params, "encoder": state.opt["target"].params["encoder"]} if config.evaluate.target else state.params
        seen = Seen(sets, params, poll)
        for measure in measures:
            yield from measure(seen)
        for reason, count in seen.skipped.items():
            yield f"data/skipped/evaluation/{reason}", count

    return run

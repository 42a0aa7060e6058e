"""Frozen features of whole data sets: what every evaluator starts from. Each set of images is read
and encoded once an evaluation, however many measures look at it."""

import collections
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import parallel, schema
from m3i_jax.models import m3i, pooling
from m3i_jax.training import views


def extract_features(
    config: schema.Config, pool: str, params: Any, pixels_BxSxSx3: jax.Array
) -> jax.Array:
    """What is read from images of the model's size as they are (no colour augmentation, no
    masking): float32, [B, D], or of `tokens` [B, T, D] with cls first.

    Args: config: of the run; `config.model`, the pixels' mean and std and the image size are read.
      pool: attention: the pooling that the objective trained (M3I section 3.4); mean: of the patch
      tokens; cls: that token; tokens: all. params: with `encoder` and, for attention, `pool`.
      pixels_BxSxSx3: uint8, or floats in 0..1.
    """
    z_BxTxD = drop_cls(config, params, pixels_BxSxSx3)
    first = int(config.model.encoder.cls_token)  # an InternImage has none
    if pool == "attention":
        cls = z_BxTxD[:, 0] if first else None
        return pooling.apply(
            config.model, params.get("pool", {}), z_BxTxD[:, first:], cls_BxD=cls
        ).astype(jnp.float32)
    z_BxTxD = z_BxTxD.astype(jnp.float32)
    return (
        z_BxTxD
        if pool == "tokens"
        else z_BxTxD[:, 0]
        if pool == "cls"
        else z_BxTxD[:, first:].mean(1)
    )


def drop_cls(config: schema.Config, params: Any, pixels_BxSxSx3: jax.Array) -> jax.Array:
    """Tokens [B, T, D] of images as they are, cls first, in the compute precision."""
    return m3i.encode(config, params["encoder"], views.plain_patches(config, pixels_BxSxSx3))


class FeatureSpec(NamedTuple):
    """vectors [n, D] float32, L2-normalised; labels [n] int32, -1 = none; records [n] int64, their
    places in the source; lengths [n] float32, what the vectors were divided by (None: not kept)."""

    vectors: np.ndarray
    labels: np.ndarray
    records: np.ndarray
    lengths: np.ndarray | None = None

    @property
    def raw(self) -> np.ndarray:
        """[n, D], as the pooling gave them."""
        if self.lengths is None:
            raise ValueError("these features were normalised without keeping their lengths")
        return self.vectors * self.lengths[:, None]


class Extractor:
    """Features of batches `{views, label, index, valid}`; compiled once for all calls.

    Args: config: the run's settings. mesh: batches are split over its data axes; their size must
      divide by those. Of several hosts each brings its own rows, and gets all. attention: whether
      features are attention-pooled, or the mean of the patch tokens.
    """

    def __init__(self, config: schema.Config, mesh: jax.sharding.Mesh, *, attention: bool = False):
        self._mesh, self._width = (
            mesh,
            (config.model.pooled if attention else config.model.encoder.width),
        )
        pool = "attention" if attention else "mean"
        whole = parallel.replicated(mesh)
        self._features = parallel.Program(
            functools.partial(extract_features, config, pool), name="features", out_shardings=whole
        )

    def __call__(
        self,
        params: Any,
        batches: Iterable[dict[str, np.ndarray]],
        poll: Callable[[], None] = lambda: None,
    ) -> FeatureSpec:
        """Those of the valid rows, in order. `params` holds the part "encoder" and, for attention
        pooling, "pool". `poll` is called between batches and may raise."""
        vectors, labels, index = (
            [np.zeros((0, self._width), np.float32)],
            [np.zeros(0, np.int32)],
            [np.zeros(0, np.int64)],
        )
        for found, rows in extract_set(self._mesh, self._features, params, batches, poll):
            vectors.append(found)
            labels.append(rows["label"])
            index.append(rows["index"])
        raw_NxD = np.concatenate(vectors)
        length_N = np.sqrt(np.square(raw_NxD).sum(1) + 1e-12)
        return FeatureSpec(
            raw_NxD / length_N[:, None], np.concatenate(labels), np.concatenate(index), length_N
        )


def extract_set(
    mesh: jax.sharding.Mesh,
    function: Callable[[Any, jax.Array], Any],
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    poll: Callable[[], None],
) -> Iterator[tuple[Any, dict[str, np.ndarray]]]:
    """(outputs, {label, index}) of the valid rows of each batch, on every host; the device works
    while the next batch is read. The function may give an array or a tree of them."""

    def fetch(out: Any, rows: dict[str, np.ndarray]) -> tuple[Any, dict[str, np.ndarray]]:
        rows = parallel.allgather_rows(mesh, rows)
        valid = rows.pop("valid")
        return jax.tree.map(lambda x: np.asarray(x)[valid], out), {
            name: x[valid] for name, x in rows.items()
        }

    pending: Any = None
    for batch in batches:
        poll()
        pixels = parallel.to_global(mesh, {"views": batch["views"]})["views"]
        out = function(params, pixels)
        if pending is not None:
            yield fetch(*pending)
        pending = out, {name: batch[name] for name in ("label", "index", "valid")}
    if pending is not None:
        yield fetch(*pending)


class Predictions(NamedTuple):
    """What a classifier says of the images whose class is known: labels [q] and guesses [q]."""

    labels: np.ndarray
    guesses: np.ndarray


class EvalContext:
    """What the measures of one evaluation share: `seen(name)` is the features of a set, extracted
    when first asked for, and `seen.once(name, make)` anything else that more than one of them
    wants.

    Attributes:
      params: parameters that are evaluated.
      poll: to be called between pieces of work; may raise.
      skipped: reason -> images that could not be read.

    >>> seen = EvalContext({"index": lambda params, poll: (print("extracted"), {})}, params={}, poll=lambda: None)
    >>> seen("index") is seen("index")
    extracted
    True
    """

    def __init__(
        self, sets: "Mapping[str, ImageSet]", params: Any, poll: Callable[[], None]
    ) -> None:
        self._sets, self.params, self.poll = sets, params, poll
        self._made: dict[str, Any] = {}
        self.skipped: collections.Counter[str] = collections.Counter()

    def __call__(self, name: str) -> FeatureSpec:
        def extract() -> FeatureSpec:
            found, skipped = self._sets[name](self.params, self.poll)
            self.skipped.update(skipped)
            return found

        return self.once(f"set {name}", extract)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, made when first asked for under this name."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


def encoder_params(config: schema.Config, state: Any) -> Any:
    """What is evaluated of a state: the online parameters or, with evaluate.encoder=ema, the
    average where there is one."""
    if config.evaluate.encoder == "online":
        return state.params
    average = state.opt["target"].params
    return {
        **state.params,
        **{part: average[part] for part in ("encoder", *WHOLE) if part in average},
    }


def gather_from_hosts(skipped: Mapping[str, int]) -> dict[str, int]:
    """The counts of all hosts together."""
    total: collections.Counter[str] = collections.Counter()
    for text in parallel.exchange_values("evaluation", json.dumps(dict(skipped))):
        total.update(json.loads(text))
    return dict(total)


# parts that an average either has whole or not at all
WHOLE = ("pool", "category", "image_projection", "text", "logit_scale")
ImageSet = Callable[[Any, Callable[[], None]], tuple[FeatureSpec, Mapping[str, int]]]
Metric = Callable[[EvalContext], Iterator[tuple[str, float]]]


def image_sets(extract: Extractor, batches: Callable[[], Any]) -> ImageSet:
    """A set of images: `batches` gives a fresh iterator, whose `skipped` says in the end what could
    not be read."""

    def run(params: Any, poll: Callable[[], None]) -> tuple[FeatureSpec, Mapping[str, int]]:
        read = batches()
        return extract(params, read, poll), gather_from_hosts(getattr(read, "skipped", {}))

    return run


def make_evaluator(
    config: schema.Config, sets: Mapping[str, ImageSet], measures: Iterable[Metric]
) -> Any:
    """An evaluator of the online encoder or its EMA (`evaluate.encoder`): (state, poll) -> iterator
    of (name, value)."""
    measures = tuple(measures)

    def run(state: Any, poll: Callable[[], None]) -> Iterator[tuple[str, float]]:
        seen = EvalContext(sets, encoder_params(config, state), poll)
        for measure in measures:
            yield from measure(seen)
        for reason, count in seen.skipped.items():
            yield f"data/skipped/evaluation/{reason}", count

    return run

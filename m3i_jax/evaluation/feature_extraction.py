"""Frozen features of whole data sets, the input of every evaluator. Each set of images is read and
encoded once an evaluation, however many evaluators use it. Also attention maps and dense features
of single images, for figures."""

import collections
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import parallel, progress, schema
from m3i_jax.errors import UserError
from m3i_jax.models import backbones, m3i, pooling
from m3i_jax.training import schedule_free, views

AttentionMaps = dict[str, jax.Array]


class NotFiniteError(UserError):
    """The features of an image are not finite."""


def extract_features(
    config: schema.Config, pool: str, params: Any, pixels_BxSxSx3: jax.Array
) -> jax.Array:
    """Returns features of views without augmentation or masking: float32 [B, D], or [B, T, D] for
    pool="tokens", cls first.

    Args:
      config: settings of the run; reads `model`, `data.image_size` and the mean and std of pixels.
      pool: attention: the pooling that the objective trains (M3I section 3.4); mean: mean of the
        patch tokens; cls: the cls token; tokens: all tokens.
      params: with `encoder` and, for attention, `pool`.
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
    if pool == "tokens":
        return z_BxTxD
    return z_BxTxD[:, 0] if pool == "cls" else z_BxTxD[:, first:].mean(1)


def drop_cls(config: schema.Config, params: Any, pixels_BxSxSx3: jax.Array) -> jax.Array:
    """Returns tokens [B, T, D] of views without augmentation, cls first, in the compute
    precision."""
    return m3i.encode(config, params["encoder"], views.plain_patches(config, pixels_BxSxSx3))


class ImageFeatures(NamedTuple):
    """Features of a set of images: vectors [n, D] float32, L2-normalised; labels [n] int32, -1 =
    none; records [n] int64, indices in the source; lengths [n] float32, the norms before the
    normalisation (None: not kept)."""

    vectors: np.ndarray
    labels: np.ndarray
    records: np.ndarray
    lengths: np.ndarray | None = None

    @property
    def raw(self) -> np.ndarray:
        """Vectors [n, D] before the normalisation."""
        if self.lengths is None:
            raise ValueError("these features were normalised without keeping their lengths")
        return self.vectors * self.lengths[:, None]


def check_finite(
    features_Bx: np.ndarray, record_B: np.ndarray, key: Callable[[int], str] = "record {}".format
) -> None:
    """Refuse features of which one is not finite: a similarity or a fit of it would be of no image.

    Args:
      features_Bx: features of B images, of any shape.
      record_B: numbers of their records.
      key: number of a record -> its name in the message.

    Raises:
      NotFiniteError: names the first image.

    >>> check_finite(np.array([[1.0], [np.nan]]), np.array([4, 9]))
    Traceback (most recent call last):
    m3i_jax.evaluation.feature_extraction.NotFiniteError: record 9: the features of this image ...
    """
    finite = np.isfinite(features_Bx)
    if not finite.all():
        first = int(np.flatnonzero(~finite.reshape(len(finite), -1).all(1))[0])
        raise NotFiniteError(
            f"{key(int(record_B[first]))}: the features of this image are not finite (NaN or Inf),"
            " because the weights diverged or the model overflows; use other weights, or"
            " model.dtype=float32"
        )


class Extractor:
    """Computes features of batches `{views, label, index, valid}`; compiled once for all calls.

    Args:
      config: settings of the run.
      mesh: batches are split over its data axes, so their size is a multiple of the data shards.
        Each host passes its own rows and receives the features of all hosts.
      pool: attention, mean or cls, as of `extract_features`.
    """

    def __init__(self, config: schema.Config, mesh: jax.sharding.Mesh, *, pool: str = "mean"):
        self._mesh = mesh
        self._width = config.model.pooled if pool == "attention" else config.model.encoder.width
        self._features = parallel.Program(
            functools.partial(extract_features, config, pool),
            name="features",
            announced="the features of the evaluation",
            out_shardings=parallel.replicated(mesh),
        )

    def __call__(
        self,
        params: Any,
        batches: Iterable[dict[str, np.ndarray]],
        poll: Callable[[], None] = lambda: None,
        key: Callable[[int], str] = "record {}".format,
    ) -> ImageFeatures:
        """Features of the valid rows, in order. `params` has the part "encoder" and, for attention
        pooling, "pool". `poll` is called between batches and may raise. `key` names a record in the
        message of a NotFiniteError."""
        vectors, labels, index = (
            [np.zeros((0, self._width), np.float32)],
            [np.zeros(0, np.int32)],
            [np.zeros(0, np.int64)],
        )
        for vectors_BxD, rows in extract_set(self._mesh, self._features, params, batches, poll):
            check_finite(vectors_BxD, rows["index"], key)
            vectors.append(vectors_BxD)
            labels.append(rows["label"])
            index.append(rows["index"])
        raw_NxD = np.concatenate(vectors)
        length_N = np.sqrt(np.square(raw_NxD).sum(1) + 1e-12)
        return ImageFeatures(
            raw_NxD / length_N[:, None], np.concatenate(labels), np.concatenate(index), length_N
        )


def extract_set(
    mesh: jax.sharding.Mesh,
    function: Callable[[Any, jax.Array], Any],
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    poll: Callable[[], None],
) -> Iterator[tuple[Any, dict[str, np.ndarray]]]:
    """Yields (outputs, {label, index}) of the valid rows of each batch, on every host. The device
    computes while the next batch is read. `function` returns an array or a tree of arrays."""

    def fetch(out: Any, rows: dict[str, np.ndarray]) -> tuple[Any, dict[str, np.ndarray]]:
        rows = parallel.allgather_rows(mesh, rows)
        valid = rows.pop("valid")
        return jax.tree.map(lambda x: np.asarray(x)[valid], out), {
            name: x[valid] for name, x in rows.items()
        }

    pending: Any = None
    bar = progress.track_progress(
        batches,
        "evaluation",
        getattr(batches, "total", None),
        size=lambda batch: len(batch["valid"]) * parallel.host_names(),
    )
    for batch in bar:
        poll()
        pixels = parallel.to_global(mesh, {"views": batch["views"]})["views"]
        out = function(params, pixels)
        if pending is not None:
            yield fetch(*pending)
        pending = out, {name: batch[name] for name in ("label", "index", "valid")}
    if pending is not None:
        yield fetch(*pending)


POOLED = "pooled "  # before the name of a set of the same images, with features of another pooling


class Predictions(NamedTuple):
    """Labels [q] and predicted classes [q] of the images that have a label."""

    labels: np.ndarray
    guesses: np.ndarray


class EvalContext:
    """One evaluation of one set of parameters, as evaluators see it: `context(name)` gives the
    features of an image set, extracted at the first call, and `context.once(name, make)` any other
    result that several evaluators share.

    Attributes:
      params: the parameters that are evaluated.
      poll: to be called between pieces of work; may raise.
      skipped: reason -> number of images that could not be read, counted once however many
        readings there are.

    >>> image_sets = {"index": lambda params, poll: (print("extracted"), {})}
    >>> context = EvalContext(image_sets, params={}, poll=lambda: None)
    >>> context("index") is context("index")
    extracted
    True
    """

    def __init__(
        self, image_sets: "Mapping[str, ImageSet]", params: Any, poll: Callable[[], None]
    ) -> None:
        self._image_sets, self.params, self.poll = image_sets, params, poll
        self._cache: dict[str, Any] = {}
        self.skipped: collections.Counter[str] = collections.Counter()
        self._skipped_of: dict[str, collections.Counter[str]] = {}

    def __call__(self, name: str) -> ImageFeatures:
        def extract() -> ImageFeatures:
            features, skipped = self._image_sets[name](self.params, self.poll)
            self.count_skipped(name.removeprefix(POOLED), skipped)
            return features

        return self.once(f"set {name}", extract)

    def count_skipped(self, images: str, skipped: Mapping[str, int]) -> None:
        """Add the images that a reading could not use to `skipped`. Of several readings of the same
        images, which have one name, the one with the most counts.

        >>> context = EvalContext({}, params={}, poll=lambda: None)
        >>> context.count_skipped("queries", {"empty": 2})
        >>> context.count_skipped("queries", {"empty": 2, "truncated": 1})
        >>> dict(context.skipped)
        {'empty': 2, 'truncated': 1}
        """
        counted = self._skipped_of.setdefault(images, collections.Counter())
        for reason, count in skipped.items():  # a count of 0 is logged too
            more = max(count - counted[reason], 0)
            counted[reason] += more
            self.skipped[reason] += more

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Returns the result of the first call of `make` under this name."""
        if name not in self._cache:
            self._cache[name] = make()
        return self._cache[name]


def encoder_params(config: schema.Config, state: Any) -> Any:
    """Returns the parameters of a state that are evaluated: the online ones or, with
    evaluate.encoder=ema, the average of every part that has one; and `running`, the running
    statistics of batch norms, if the task has any."""
    link = state.opt.get("running") if hasattr(state.opt, "get") else None
    running = {} if link is None else {"running": link.statistics}
    online = schedule_free.averaged_params(state.opt, state.params)
    if config.evaluate.encoder == "online":
        return {**online, **running} if running else online
    average = state.opt["target"].params
    return {
        **online,
        **{part: average[part] for part in ("encoder", *WHOLE) if part in average},
        **running,
    }


def gather_from_hosts(skipped: Mapping[str, int]) -> dict[str, int]:
    """Returns the counts summed over all hosts."""
    total: collections.Counter[str] = collections.Counter()
    for text in parallel.exchange_values("evaluation", json.dumps(dict(skipped))):
        total.update(json.loads(text))
    return dict(total)


# parts that an average holds completely or not at all
WHOLE = (
    *("pool", "category", "image_projection", "text", "logit_scale", "scalars", "captioner"),
    *("pyramid", "head"),
)
ImageSet = Callable[[Any, Callable[[], None]], tuple[ImageFeatures, Mapping[str, int]]]
Metric = Callable[[EvalContext], Iterator[tuple[str, float]]]


def image_sets(
    extract: Extractor,
    batches: Callable[[], Any],
    key: Callable[[int], str] = "record {}".format,
) -> ImageSet:
    """Returns an image set: `batches` gives a fresh iterator, whose attribute `skipped` counts at
    its end the images that could not be read; `key` names its records in messages."""

    def run(params: Any, poll: Callable[[], None]) -> tuple[ImageFeatures, Mapping[str, int]]:
        iterator = batches()
        features = extract(params, iterator, poll, key)
        return features, gather_from_hosts(getattr(iterator, "skipped", {}))

    return run


def make_evaluator(
    config: schema.Config,
    image_sets: Mapping[str, ImageSet],
    metrics: Iterable[Metric],
    log: Callable[[str], None],
) -> Any:
    """Yields an evaluation of the online encoder or its EMA (`evaluate.encoder`): (state, poll) ->
    iterator of (name, value). Where features are not finite, it ends with a line of the log: the
    run goes on, and may recover."""
    metrics = tuple(metrics)

    def run(state: Any, poll: Callable[[], None]) -> Iterator[tuple[str, float]]:
        context = EvalContext(image_sets, encoder_params(config, state), poll)
        try:
            for metric in metrics:
                yield from metric(context)
        except NotFiniteError as error:
            log(f"warning: this evaluation was stopped: {error}")
        for reason, count in context.skipped.items():
            yield f"data/skipped/evaluation/{reason}", count

    return run


def attention_maps(
    config: schema.Config, pooled: bool, params: Any, views_BxSxSx3: jax.Array
) -> AttentionMaps:
    """Maps over the cells of clean uint8 views, float32.

    features [B, N, D]: output of the encoder for every cell.
    pooling [B, N]: attention weights of the attention pooling, mean over its heads; if `pooled`.
    last [B, N]: attention weights of the last block, mean over its heads, from the cls token or,
      without one, from all tokens; if the backbone has attention.

    Args:
      config: settings of the run.
      pooled: whether the objective trains an attention pooling.
      params: with `encoder` and, if pooled, `pool`.
      views_BxSxSx3: images of the model's size.
    """
    model, first = config.model, int(config.model.encoder.cls_token)
    x_BxNxD = drop_cls(config, params, views_BxSxSx3)[:, first:]
    out = {"features": x_BxNxD.astype(jnp.float32)}
    if pooled:
        out["pooling"] = pooling.pooling_weights(model, params["pool"], x_BxNxD).mean(1)
    if attention := backbones.get_backbone(model).attention:
        weights_BxTxT = attention(
            model, params["encoder"], views.plain_patches(config, views_BxSxSx3), grid=config.grid
        ).mean(1)
        out["last"] = weights_BxTxT[:, 0, first:] if first else weights_BxTxT.mean(1)
    return out


def compile_maps(
    config: schema.Config, mesh: jax.sharding.Mesh, *, pooled: bool
) -> Callable[[Any, jax.Array], AttentionMaps]:
    """`attention_maps` as a compiled function of (params, views). Rows are split over the data axes
    of the mesh; results are replicated."""
    return parallel.Program(
        functools.partial(attention_maps, config, pooled),
        name="maps",
        out_shardings=parallel.replicated(mesh),
    )

"""The whole network of an objective as one parameter tree, and thin functions of its parts (M3I
sections 3.3 and 3.4).

    encoder            f_theta: one pass over an input, mixed or not decoder            f_psi of
    dense targets pool               pooling, shared by the two that follow category
    linear, its columns are the category representations image_projection   linear without bias into
    the joint space of text text, logit_scale  the encoder of captions, and the logarithm of the
    inverse temperature heads              projector, predictor and prototypes of every space by its
    name; linear maps of tokens

The first is what a run makes; all others are heads, and only those that the terms of the objective
need are there. `encode` takes the encoder's own tree, so that the momentum target is the same call;
the others take a tree that has their part in it.

B rows, N cells, K tokens, D encoder width, W width of the part, P numbers of a patch, C classes, E
joint space."""

import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax import schema
from m3i_jax.models import backbones, decoder, pooling, text
from m3i_jax.models import heads as small
from m3i_jax.models.initializers import init_params, shapes_of
from m3i_jax.models.layers import Dense, Params
from m3i_jax.objective.posteriors import Prototypes
from m3i_jax.objective.terms import DENSE_TARGETS, DecoderHead, LinearHead, ProjectionHead, Terms

# A new one goes to the end: the random keys go by place.
PARTS = (
    "encoder",
    "decoder",
    "pool",
    "category",
    "image_projection",
    "text",
    "logit_scale",
    "heads",
)
_INVERSE_TEMPERATURE = 1 / 0.07  # of CLIP at the start


def _category(classes: int) -> Dense:
    return Dense(classes, jnp.float32)


def _image_projection(model: schema.Model) -> Dense:
    return Dense(model.text.embed, jnp.float32, use_bias=False)


def init(
    config: schema.Config, rng: jax.Array, terms: Terms, *, classes: int, vocabulary: int
) -> dict[str, Any]:
    """All parameters that an objective trains, float32. A part starts the same whether or not the
    others are there.

    Args:
      config: settings; `config.model` and `config.data.caption_length` are read.
      rng: key.
      terms: the objective; what no term reads is not there.
      classes: categories; 0: no category head.
      vocabulary: token ids; 0: no text tower.

    Raises:
      ValueError: spaces of one name that differ in their projectors, or in their predictors.

    >>> from m3i_jax.objective.terms import FORMS
    >>> make = lambda key: init(schema.Config(), key, FORMS["m3i"], classes=1000, vocabulary=0)
    >>> parameter_table(jax.eval_shape(make, jax.random.key(0)))
    [('encoder', 85645824), ('decoder', 30713856), ('pool', 2366976), ('category', 769000)]
    """
    model, row = config.model, jnp.zeros((1, config.model.pooled))
    keys = dict(zip(PARTS, jax.random.split(rng, len(PARTS)), strict=True))
    targets = {t.target.of for t in terms}
    by_category, by_text = (
        "category" in targets and classes > 0,
        "text" in targets and vocabulary > 0,
    )
    backbone = backbones.get_backbone(model)
    filled = any(
        p.filled or (p.masked and not backbone.can_drop_tokens) for t in terms for p in t.passes
    )
    params: dict[str, Any] = {
        "encoder": backbone.init(model, keys["encoder"], mask_token=filled, grid=config.grid)
    }
    dense = {t.target.of for t in terms if isinstance(t.head, DecoderHead)}
    if dense:
        params["decoder"] = decoder.init(model, keys["decoder"], of=dense)
    # a pooling may have no parameters
    if (by_category or by_text) and (made := pooling.init(model, keys["pool"])):
        params["pool"] = made
    if by_category:
        normal = {"kernel": model.category_std} if model.category_std else None
        params["category"] = init_params(
            keys["category"], shapes_of(_category(classes), row), normal
        )
    if by_text:
        shapes = shapes_of(_image_projection(model), row)
        params["image_projection"] = init_params(
            keys["image_projection"], shapes, {"kernel": model.pooled**-0.5}
        )
        params["text"] = text.init(
            model, keys["text"], vocabulary=vocabulary, length=config.data.caption_length
        )
        params["logit_scale"] = jnp.asarray(math.log(_INVERSE_TEMPERATURE), jnp.float32)
    if made := _init_heads(model, keys["heads"], terms):
        params["heads"] = made
    return params


def _init_heads(model: schema.Model, rng: jax.Array, terms: Terms) -> dict[str, Any]:
    def key(name: str) -> jax.Array:
        return jax.random.fold_in(rng, zlib.crc32(name.encode()))

    out: dict[str, Any] = {}
    for of in DENSE_TARGETS:
        if any(isinstance(t.head, LinearHead) and t.target.of == of for t in terms):
            out[f"linear_{of}"] = small.init_linear(model, key(f"linear_{of}"), of)
    for name in sorted({t.head.name for t in terms if isinstance(t.head, ProjectionHead)}):
        mine = [
            (t, t.head) for t in terms if isinstance(t.head, ProjectionHead) and t.head.name == name
        ]
        predictors = {head.predictor for _, head in mine} - {None}
        if len({head.projector for _, head in mine}) > 1 or len(predictors) > 1:
            raise ValueError(
                f"two spaces are called {name!r} and share parameters, but their projectors or"
                " predictors differ"
            )
        whole = ProjectionHead(
            name=name, projector=mine[0][1].projector, predictor=next(iter(predictors), None)
        )
        out[name] = small.init_projection(
            model, key(name), whole, any(isinstance(t.posterior, Prototypes) for t, _ in mine)
        )
    return out


def target_parts(config: schema.Config, terms: Terms, params: Params) -> dict[str, Any]:
    """The part of the parameters that a target encoder keeps a copy of: the encoder, and whatever a
    learned target goes through after it.

    That is the decoder's embedding and projector, if it has one and predicts tokens, and the
    projectors of the spaces of targets that have no gradient; never predictors or prototypes
    (SiameseIM, BYOL, MoCo v3).

    Args:
      config: settings; `config.model.decoder.projector_depth` is read.
      terms: the objective.
      params: as of `init`, or their shapes.

    >>> from m3i_jax.objective.terms import FORMS
    >>> shapes = jax.eval_shape(lambda key: init(schema.Config(), key, FORMS["instance"], classes=0, vocabulary=0), jax.random.key(0))
    >>> parts = target_parts(schema.Config(), FORMS["instance"], shapes)
    >>> sorted(parts), parts["heads"].keys(), parts["heads"]["global"].keys()
    (['encoder', 'heads'], dict_keys(['global']), dict_keys(['projector']))
    """
    without_gradient = [t for t in terms if t.target.encoder in ("ema", "frozen", "shared")]
    out: dict[str, Any] = {"encoder": params["encoder"]}
    if config.model.decoder.projector_depth and any(
        isinstance(t.head, DecoderHead) for t in without_gradient
    ):
        out["decoder"] = {part: params["decoder"][part] for part in ("embed", "projector")}
    spaces = sorted(
        {
            t.head.name
            for t in without_gradient
            if isinstance(t.head, ProjectionHead) and t.head.projector is not None
        }
    )
    if spaces:
        out["heads"] = {name: {"projector": params["heads"][name]["projector"]} for name in spaces}
    return out


def parameter_table(params: Params) -> list[tuple[str, int]]:
    """(part, numbers in it) of every top-level part, of arrays or of their shapes.

    >>> parameter_table({"encoder": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}, "logit_scale": jnp.zeros(())})
    [('encoder', 9), ('logit_scale', 1)]
    """
    order = [part for part in PARTS if part in params] + sorted(set(params) - set(PARTS))
    return [
        (part, sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params[part])))
        for part in order
    ]


def encode(
    config: schema.Config,
    encoder: Params,
    patches_BxNxP: jax.Array,
    *,
    index: jax.Array | None = None,
    keep: jax.Array | None = None,
    hidden: jax.Array | None = None,
    blocks: int = 1,
) -> jax.Array:
    """Features [B, T, D] of every token, cls first where there is one: the backbone's `apply` on
    the grid of the configuration.

    Args:
      config: settings.
      encoder: `params["encoder"]`, or the momentum target.
      patches_BxNxP: as of `vit.patchify`.
      index: [B, K], cells that are read, the only ones to have features; None: all.
      keep: [B, L, 2], factors of stochastic depth; None: off.
      hidden: bool [B, N], cells that the mask token stands for; None: none.
      blocks: more than 1: the mean over the normalised outputs of this many last blocks, float32.

    >>> config, none = schema.Config(data=schema.Data(image_size=32)), ()
    >>> shapes = jax.eval_shape(lambda key: init(config, key, none, classes=0, vocabulary=0), jax.random.key(0))
    >>> jax.eval_shape(lambda p, x: encode(config, p, x), shapes["encoder"], jnp.zeros((2, 4, 768))).shape
    (2, 5, 768)
    """
    if config.model.encoder.freeze:
        encoder = jax.lax.stop_gradient(encoder)
    settings: dict[str, Any] = {
        "index_BxK": index,
        "keep_BxLx2": keep,
        "hidden_BxN": hidden,
        "blocks": blocks,
    }
    return backbones.get_backbone(config.model).apply(
        config.model, encoder, patches_BxNxP, grid=config.grid, **settings
    )


def queries(config: schema.Config, params: Params, raw_xNx2W: jax.Array) -> jax.Array:
    """Decoder queries [B, N, W] or [N, W] of target positions: `decoder.decoder_queries`.

    >>> from m3i_jax.objective import positions
    >>> from m3i_jax.objective.terms import FORMS
    >>> config = schema.Config(data=schema.Data(image_size=32))
    >>> shapes = jax.eval_shape(lambda key: init(config, key, FORMS["mim"], classes=0, vocabulary=0), jax.random.key(0))
    >>> jax.eval_shape(lambda p: queries(config, p, positions.same_view_positions(config.grid, 768)), shapes).shape
    (4, 768)
    """
    return decoder.decoder_queries(config.model, params["decoder"], raw_xNx2W)


def decode(
    config: schema.Config,
    params: Params,
    z_BxKxD: jax.Array,
    index_BxK: jax.Array,
    query_BxNxW: jax.Array,
    cls_BxD: jax.Array | None = None,
) -> jax.Array:
    """What the decoder makes of the queries to one image a row, [B, N, W]: `decoder.apply`.
    `decode_head` makes predictions of it.

    >>> from m3i_jax.objective.terms import FORMS
    >>> config = schema.Config(data=schema.Data(image_size=32))
    >>> shapes = jax.eval_shape(lambda key: init(config, key, FORMS["mim"], classes=0, vocabulary=0), jax.random.key(0))
    >>> z, index, query = jnp.zeros((3, 2, 768)), jnp.zeros((3, 2), int), jnp.zeros((4, 768))
    >>> jax.eval_shape(lambda p: decode(config, p, z, index, query), shapes).shape
    (3, 4, 768)
    """
    return decoder.apply(
        config.model,
        params["decoder"],
        z_BxKxD,
        index_BxK,
        query_BxNxW,
        grid=config.grid,
        cls_BxD=cls_BxD,
    )


def decode_head(config: schema.Config, params: Params, rows_BxNxW: jax.Array, of: str) -> jax.Array:
    """Predicted tokens [B, N, D] or pixels [B, N, P] from what `decode` gives:
    `decoder.prediction_head`.

    >>> from m3i_jax.objective.terms import FORMS
    >>> shapes = jax.eval_shape(lambda key: init(schema.Config(), key, FORMS["mim_pixel"], classes=0, vocabulary=0), jax.random.key(0))
    >>> jax.eval_shape(lambda p: decode_head(schema.Config(), p, jnp.zeros((3, 4, 768)), "pixels"), shapes).shape
    (3, 4, 768)
    """
    return decoder.prediction_head(config.model, params["decoder"], rows_BxNxW, of)


def target_projection(config: schema.Config, part: Params, z_BxTxD: jax.Array) -> jax.Array:
    """Dense target features behind the decoder's projector, [B, T, W]; z itself without one:
    `decoder.project_targets`.

    Args:
      config: settings.
      part: the target's `decoder`, as of `target_parts`; not read without a projector.
      z_BxTxD: features of every token of a clean view, cls among them.

    >>> target_projection(schema.Config(), {}, jnp.zeros((2, 197, 768))).shape
    (2, 197, 768)
    """
    return decoder.project_targets(config.model, part, z_BxTxD)


def pool(
    config: schema.Config,
    params: Params,
    x_BxKxD: jax.Array,
    mask_BxK: jax.Array | None = None,
    cls: jax.Array | None = None,
) -> jax.Array:
    """One vector [B, W] of an image's own tokens, or of its cls feature [B, D]: `pooling.apply`.

    >>> from m3i_jax.objective.terms import FORMS
    >>> shapes = jax.eval_shape(lambda key: init(schema.Config(), key, FORMS["supervised"], classes=9, vocabulary=0), jax.random.key(0))
    >>> jax.eval_shape(lambda p: pool(schema.Config(), p, jnp.zeros((3, 98, 768))), shapes).shape
    (3, 768)
    """
    return pooling.apply(config.model, params.get("pool", {}), x_BxKxD, mask_BxK, cls)


def linear(config: schema.Config, params: Params, x_BxNxD: jax.Array, of: str) -> jax.Array:
    """Predicted tokens [B, N, D] or pixels [B, N, P] at the cells of the encoder's own tokens:
    `heads.apply_linear`.

    >>> from m3i_jax.objective.terms import FULL, LinearHead, token_term
    >>> terms = (tokens(FULL, 0, head=LinearHead()),)
    >>> shapes = jax.eval_shape(lambda key: init(schema.Config(), key, terms, classes=0, vocabulary=0), jax.random.key(0))
    >>> jax.eval_shape(lambda p: linear(schema.Config(), p, jnp.zeros((3, 4, 768)), "tokens"), shapes).shape
    (3, 4, 768)
    """
    return small.apply_linear(config.model, params["heads"][f"linear_{of}"], x_BxNxD)


def project(
    config: schema.Config, heads: Mapping[str, Params], projection: ProjectionHead, x_xD: jax.Array
) -> jax.Array:
    """What the targets of a space go through, [..., W]: `heads.apply_projector`.

    Args:
      config: settings.
      heads: `params["heads"]`, or those of the target; not read where the space has no projector.
      projection: the space.
      x_xD: pooled features [B, D], or every token by itself [B, N, D].

    >>> project(schema.Config(), {}, ProjectionHead(), jnp.zeros((2, 768))).shape
    (2, 768)
    """
    return small.apply_projector(config.model, heads.get(projection.name, {}), projection, x_xD)


def predict(
    config: schema.Config, heads: Mapping[str, Params], projection: ProjectionHead, x_xD: jax.Array
) -> jax.Array:
    """The prediction in a space, [..., W]: `heads.apply_predictor`, with the arguments of
    `project`.

    >>> from m3i_jax.objective.terms import FORMS, MOCO
    >>> shapes = jax.eval_shape(lambda key: init(schema.Config(), key, FORMS["instance"], classes=0, vocabulary=0), jax.random.key(0))
    >>> jax.eval_shape(lambda p: predict(schema.Config(), p["heads"], MOCO, jnp.zeros((2, 768))), shapes).shape
    (2, 256)
    """
    return small.apply_predictor(config.model, heads.get(projection.name, {}), projection, x_xD)


def category_logits(config: schema.Config, params: Params, pooled_BxW: jax.Array) -> jax.Array:
    """Logits [B, C] of the category posterior, float32: rounded logits would round the loss (M3I
    section 3.4).

    >>> from m3i_jax.objective.terms import FORMS
    >>> shapes = jax.eval_shape(lambda key: init(schema.Config(), key, FORMS["supervised"], classes=10, vocabulary=0), jax.random.key(0))
    >>> jax.eval_shape(lambda p: category_logits(schema.Config(), p, jnp.zeros((3, 768))), shapes).shape
    (3, 10)
    """
    return _category(params["category"]["bias"].shape[-1]).apply(
        {"params": params["category"]}, pooled_BxW
    )


def image_embedding(config: schema.Config, params: Params, pooled_BxW: jax.Array) -> jax.Array:
    """Image side [B, E] of the text posterior, float32, not normalised (M3I section 3.4).

    >>> from m3i_jax.objective.terms import FORMS
    >>> make = lambda key: init(schema.Config(), key, FORMS["weakly_supervised"], classes=0, vocabulary=9)
    >>> shapes = jax.eval_shape(make, jax.random.key(0))
    >>> jax.eval_shape(lambda p: image_embedding(schema.Config(), p, jnp.zeros((3, 768))), shapes).shape
    (3, 768)
    """
    return _image_projection(config.model).apply({"params": params["image_projection"]}, pooled_BxW)


def text_embedding(
    config: schema.Config, params: Params, tokens_BxL: jax.Array, length_B: jax.Array
) -> jax.Array:
    """Caption side [B, E] of the text posterior, float32, not normalised: `text.apply`.

    >>> from m3i_jax.objective.terms import FORMS
    >>> make = lambda key: init(schema.Config(), key, FORMS["weakly_supervised"], classes=0, vocabulary=9)
    >>> shapes = jax.eval_shape(make, jax.random.key(0))
    >>> jax.eval_shape(lambda p: text_embedding(schema.Config(), p, jnp.zeros((3, 77), int), jnp.full(3, 5)), shapes).shape
    (3, 768)
    """
    return text.apply(config.model, params["text"], tokens_BxL, length_B)

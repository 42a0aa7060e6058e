"""The network of an objective as one parameter tree (M3I sections 3.3 and 3.4).

    encoder             f_theta: one pass over an input, mixed or not
    decoder             f_psi of dense targets
    pool                pooling, shared by the two parts that follow
    category            linear; its columns are the category representations
    image_projection    linear without bias into the joint space of images and text
    text, logit_scale   the encoder of captions, and the logarithm of the inverse temperature
    scalars             what posteriors of text train beside embeddings, by term (SigLIP)
    captioner           decoder of the tokens of captions
    heads               projector, predictor and prototypes of every space by its name; linear maps
                        of tokens

Pre-training produces the encoder; the other parts are heads, created only if a term of the
objective needs them. `encode` takes the encoder's tree alone, so that the EMA target is the same
call. The modules decoder, pooling, text and heads apply the other parts.

B rows, N cells, K tokens, D encoder width, W width of the part, P numbers of a patch, C classes, E
joint space."""

import dataclasses
import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.models import backbones, captioner, decoder, heads, pooling, text
from m3i_jax.models.initializers import init_params, shapes_of
from m3i_jax.models.layers import Dense, Params
from m3i_jax.objective.caption_posterior import CAPTIONS
from m3i_jax.objective.derived_terms import ENCODERS, linear_name
from m3i_jax.objective.posteriors import Prototypes
from m3i_jax.objective.terms import (
    ClusterHead,
    DecoderHead,
    LinearHead,
    ProjectionHead,
    Term,
    Terms,
)

# Append new parts at the end: a random key belongs to a position.
PARTS = (
    "encoder",
    "decoder",
    "pool",
    "category",
    "image_projection",
    "text",
    "logit_scale",
    "heads",
    "scalars",
    "captioner",
)
_INVERSE_TEMPERATURE = 1 / 0.07  # of CLIP at the start


def _category(classes: int) -> Dense:
    return Dense(classes, jnp.float32)


def _image_projection(model: schema.Model) -> Dense:
    return Dense(model.text.embed, jnp.float32, use_bias=False)


def init(
    config: schema.Config, rng: jax.Array, terms: Terms, *, classes: int, vocabulary: int
) -> dict[str, Any]:
    """Returns all parameters that an objective trains, float32. The initial values of a part do not
    depend on which other parts exist.

    Args:
      config: settings; `config.model` and `config.data.caption_length` are read.
      rng: key.
      terms: the objective; parts that no term reads are not created.
      classes: categories; 0: no category head.
      vocabulary: token ids; 0: no text tower and no decoder of captions.

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
    by_category = "category" in targets and classes > 0
    by_text = "text" in targets and vocabulary > 0
    backbone = backbones.get_backbone(model)
    mask_token = any(
        p.mask_tokens or (p.masked and not backbone.can_drop_tokens)
        for t in terms
        for p in t.passes
    )
    init_encoder = functools.partial(backbone.init, model, keys["encoder"], grid=config.grid)
    params: dict[str, Any] = {"encoder": init_encoder(mask_token=mask_token)}
    if mask_token:  # `apply` would ignore which cells are hidden
        without = jax.eval_shape(functools.partial(init_encoder, mask_token=False))
        if len(jax.tree.leaves(without)) == len(jax.tree.leaves(params["encoder"])):
            raise UserError(
                f"config.model.backbone: {model.backbone} has no parameter for hidden cells, which"
                " this objective needs; its `init` must add one where mask_token is true"
            )
    # an assignment to clusters is predicted by their prototypes instead of a map of the decoder's
    dense = {
        "clusters" if t.head.clusters else t.target.of
        for t in terms
        if isinstance(t.head, DecoderHead)
    }
    if dense:
        params["decoder"] = decoder.init(model, keys["decoder"], of=dense)
    # a pooling may have no parameters
    if (by_category or by_text) and (pool := pooling.init(model, keys["pool"])):
        params["pool"] = pool
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
        trained = {t.name: _scalars(t) for t in terms if t.target.of == "text"}
        if scalars := {name: each for name, each in trained.items() if each}:
            params["scalars"] = scalars
        if len(scalars) < len(trained):
            params["logit_scale"] = jnp.asarray(math.log(_INVERSE_TEMPERATURE), jnp.float32)
    if targets & set(CAPTIONS) and vocabulary > 0:
        params["captioner"] = captioner.init(
            model, keys["captioner"], vocabulary=vocabulary, length=config.data.caption_length
        )
    if named_heads := _init_heads(model, keys["heads"], terms):
        params["heads"] = named_heads
    return params


def _scalars(term: Term) -> dict[str, jax.Array]:
    return {name: jnp.asarray(v, jnp.float32) for name, v in term.posterior.scalars.items()}


def text_log_scale(params: Params) -> jax.Array:
    """Returns the logarithm of the scale of the similarities of images and captions, that of the
    first term by name if several have their own.

    >>> print(text_log_scale({"scalars": {"text": {"logit_scale": jnp.ones(())}}}))
    1.0
    """
    if "logit_scale" in params:
        scale: jax.Array = params["logit_scale"]
        return scale
    of_term = params["scalars"][min(params["scalars"])]
    return jnp.asarray(of_term["logit_scale"])


def _init_heads(model: schema.Model, rng: jax.Array, terms: Terms) -> dict[str, Any]:
    def key(name: str) -> jax.Array:
        return jax.random.fold_in(rng, zlib.crc32(name.encode()))

    out: dict[str, Any] = {}
    for t in terms:
        if isinstance(t.head, LinearHead) and (name := linear_name(t)) not in out:
            out[name] = heads.init_linear(model, key(name), t.target.of, t.head.width)
    predicted = {t.head.clusters for t in terms if isinstance(t.head, DecoderHead)}
    for name in sorted({t.head.name for t in terms if isinstance(t.head, ClusterHead)}):
        width = model.decoder.width if name in predicted else 0
        out[name] = heads.init_clusters(model, key(name), width)
    for name in sorted({t.head.name for t in terms if isinstance(t.head, ProjectionHead)}):
        same = [
            (t, t.head) for t in terms if isinstance(t.head, ProjectionHead) and t.head.name == name
        ]
        predictors = {head.predictor for _, head in same} - {None}
        projectors = {(head.projector, head.prototypes) for _, head in same}
        if len(projectors) > 1 or len(predictors) > 1:
            raise ValueError(
                f"two spaces are called {name!r} and share parameters, but their projectors or"
                " predictors differ"
            )
        ((projector, prototypes),) = projectors
        predictor = next(iter(predictors), None)
        space = ProjectionHead(
            name=name, projector=projector, predictor=predictor, prototypes=prototypes
        )
        by_posterior = any(isinstance(t.posterior, Prototypes) for t, _ in same)
        if parts := heads.init_projection(model, key(name), space, by_posterior):
            out[name] = parts  # the space of the encoder's features has none
    return out


def target_parts(config: schema.Config, terms: Terms, params: Params) -> dict[str, Any]:
    """Returns the parameters that a target encoder has a copy of: the encoder, and the modules that
    its features go through to become targets.

    These are the decoder's embedding and projector, if it has a projector and predicts tokens, and
    the projectors of the spaces of targets without gradient, with their prototypes where the space
    ends in similarities to them (DINO); never predictors or MSN's prototypes (SiameseIM, BYOL, MoCo
    v3).

    Args:
      config: settings; `config.model.decoder.projector_depth` is read.
      terms: the objective.
      params: as of `init`, or their shapes.

    >>> from m3i_jax.objective.terms import FORMS
    >>> config, terms = schema.Config(), FORMS["instance"]
    >>> make = lambda key: init(config, key, terms, classes=0, vocabulary=0)
    >>> parts = target_parts(config, terms, jax.eval_shape(make, jax.random.key(0)))
    >>> sorted(parts), parts["heads"].keys(), parts["heads"]["global"].keys()
    (['encoder', 'heads'], dict_keys(['global']), dict_keys(['projector']))
    """
    without_gradient = [t for t in terms if t.target.encoder in ENCODERS]
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
        parts = {
            t.head.name: ("projector", "prototypes", "prototype_norms")
            if t.head.prototypes
            else ("projector",)
            for t in without_gradient
            if isinstance(t.head, ProjectionHead)
        }
        out["heads"] = {
            name: {part: x for part, x in params["heads"][name].items() if part in parts[name]}
            for name in spaces
        }
    return out


def trained_parts(terms: Terms, params: Params) -> dict[str, Any]:
    """Returns the heads that make targets as they are trained, of which no target encoder has a
    copy: the clusters of `ClusterHead`.

    >>> trained_parts((), {})
    {'heads': {}}
    """
    names = sorted({t.head.name for t in terms if isinstance(t.head, ClusterHead)})
    return {"heads": {name: {"clusters": params["heads"][name]["clusters"]} for name in names}}


def parameter_table(params: Params) -> list[tuple[str, int]]:
    """Returns (part, number of parameters) of every top-level part, of arrays or of their shapes.

    >>> encoder = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}
    >>> parameter_table({"encoder": encoder, "logit_scale": jnp.zeros(())})
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
    """Returns features [B, T, D] of every token, cls first where there is one. No gradient reaches
    a frozen encoder (`model.encoder.freeze`).

    Args:
      config: settings.
      encoder: `params["encoder"]`, or that of a target.
      patches_BxNxP: as of `vit.patchify`, of a large or a small view.
      index: [B, K], the cells to read, which are the only ones with features; None: all.
      keep: [B, L, 2], keep factors of stochastic depth; None: off.
      hidden: bool [B, N], cells replaced by the mask token; None: none.
      blocks: if more than 1, the mean over the normalised outputs of this many last blocks,
        float32.

    >>> config = schema.Config(data=schema.Data(image_size=32))
    >>> make = lambda key: init(config, key, (), classes=0, vocabulary=0)["encoder"]
    >>> encoder, patches = jax.eval_shape(make, jax.random.key(0)), jnp.zeros((2, 4, 768))
    >>> jax.eval_shape(lambda p, x: encode(config, p, x), encoder, patches).shape
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
    backbone, model = backbones.get_backbone(config.model), config.model
    grid = math.isqrt(patches_BxNxP.shape[1])
    if grid != config.grid and backbone.resizes_positions and not model.encoder.position_grid:
        # positions of a small view are those of a large one, resized
        own = dataclasses.replace(model.encoder, position_grid=config.grid)
        model = dataclasses.replace(model, encoder=own)
    return backbone.apply(model, encoder, patches_BxNxP, grid=grid, **settings)


def category_logits(params: Params, pooled_BxW: jax.Array) -> jax.Array:
    """Returns logits [B, C] of the category posterior, float32: rounded logits would round the loss
    (M3I section 3.4).

    >>> from m3i_jax.objective.terms import FORMS
    >>> config = schema.Config()
    >>> make = lambda key: init(config, key, FORMS["supervised"], classes=10, vocabulary=0)
    >>> shapes, pooled = jax.eval_shape(make, jax.random.key(0)), jnp.zeros((3, 768))
    >>> jax.eval_shape(lambda p: category_logits(p, pooled), shapes).shape
    (3, 10)
    """
    return _category(params["category"]["bias"].shape[-1]).apply(
        {"params": params["category"]}, pooled_BxW
    )


def image_embedding(config: schema.Config, params: Params, pooled_BxW: jax.Array) -> jax.Array:
    """Returns image embeddings [B, E] of the text posterior, float32, not normalised (M3I section
    3.4).

    >>> from m3i_jax.objective.terms import FORMS
    >>> config, terms = schema.Config(), FORMS["weakly_supervised"]
    >>> make = lambda key: init(config, key, terms, classes=0, vocabulary=9)
    >>> shapes, pooled = jax.eval_shape(make, jax.random.key(0)), jnp.zeros((3, 768))
    >>> jax.eval_shape(lambda p: image_embedding(config, p, pooled), shapes).shape
    (3, 768)
    """
    return _image_projection(config.model).apply({"params": params["image_projection"]}, pooled_BxW)

"""DINO (Zhang et al., ICLR 2023) on a pyramid of maps: parameters, losses, detections of a batch.

Tokens of all levels go through a deformable encoder; the best of them become boxes, which the
layers of a decoder refine. Every layer, and the encoder, is matched with the objects by itself,
inside the compiled program.

Losses are sums, which the task divides by the number of objects of the whole batch, at least one
per image: as in the references, whose processes average that number, with one image a process. So
the value does not depend on how a batch is cut into microbatches, devices and hosts. Denoising
groups are of each image by itself.

B images, M objects, Q matched queries, S slots of noised objects, T = S + Q, I layers, K
categories, D detections.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax import parallel, schema
from m3i_jax.errors import UserError
from m3i_jax.models.dense import denoising, dino_decoder, dino_encoder
from m3i_jax.models.initializers import fill
from m3i_jax.models.layers import Params
from m3i_jax.objective import box_matching
from m3i_jax.objective.boxes import center_boxes, clip_boxes, corner_boxes, nms
from m3i_jax.objective.dense_losses import federated_categories

WEIGHTS = {"cls": 1.0, "l1": 5.0, "giou": 2.0}
Values = dict[str, tuple[jax.Array, jax.Array]]
Maps = Mapping[int, jax.Array]


def init(
    settings: schema.Detect, channels: Mapping[int, int], classes: int, rng: jax.Array
) -> Params:
    """Returns parameters {"encoder", "decoder", "content", "labels"}: the two transformers, the
    contents of matched queries [Q, D] and those of noised objects by class [K, D], both N(0, 1).

    Args:
      channels: {stride: channels of its map}; the head makes that of the last stride if it is not
        given.
      classes: number of categories.

    Raises:
      ValueError: maps are missing.
      UserError: attention heads that do not divide the width.

    >>> settings = schema.Detect(strides=(8, 16, 32, 64), head="dino", masks=False)
    >>> channels = {8: 512, 16: 1024, 32: 2048}
    >>> shapes = jax.eval_shape(lambda key: init(settings, channels, 91, key), jax.random.key(0))
    >>> sum(leaf.size for leaf in jax.tree.leaves(shapes))  # the authors' and 256 less, a class
    23438014
    """
    if missing := set(dino_encoder.levels_read(settings)) - set(channels):
        raise ValueError(
            f"channels {dict(channels)} of the pyramid; the levels {sorted(missing)} of"
            " dense.detect.strides are missing"
        )
    width, heads = settings.width, settings.dino.heads
    if width % heads or width % 4:
        raise UserError(
            f"config.dense.detect.width: {width} must be a multiple of 4 and of"
            f" dense.detect.dino.heads, {heads}"
        )
    of_encoder, of_decoder, of_tables = jax.random.split(rng, 3)
    tables = {"content": (settings.dino.queries, width), "labels": (classes, width)}
    return {
        "encoder": dino_encoder.init_encoder(settings, channels, classes, of_encoder),
        "decoder": dino_decoder.init_decoder(settings, len(settings.strides), classes, of_decoder),
        **fill(of_tables, tables, lambda path, shape: ("normal", 1.0)),
    }


def object_divisor(classes_BxM: jax.Array) -> jax.Array:
    """Returns what the sums of the losses are divided by: objects of the batch, at least one per
    image.

    >>> print(object_divisor(jnp.array([[3, 3, 1], [0, -1, -1]])))
    4.0
    """
    return jnp.maximum((classes_BxM >= 0).sum(), len(classes_BxM)).astype(jnp.float32)


def draw_noise(
    settings: schema.Detect, objects: int, classes: int, keys_B: jax.Array
) -> dict[str, Any]:
    """Returns the random numbers of the losses of B images: "denoising", of
    `denoising.denoising_draws`, and "categories" [B, K] for the federated loss.

    >>> sorted(draw_noise(schema.Detect(), 5, 80, jax.random.split(jax.random.key(0), 2)))
    ['denoising']
    """
    slots = denoising.denoising_slots(settings.dino.denoising, objects)

    def one(key: jax.Array) -> dict[str, Any]:
        draws: dict[str, Any] = {}
        if slots:
            draws["denoising"] = denoising.denoising_draws(jax.random.fold_in(key, 0), slots)
        if settings.loss == "federated":
            draws["categories"] = jax.random.uniform(
                jax.random.fold_in(key, 1), (classes,), jnp.float32
            )
        return draws

    return jax.vmap(one)(keys_B)


def losses(
    settings: schema.Detect,
    params: Params,
    maps: Maps,
    size_Bx2: jax.Array,
    boxes_BxMx4: jax.Array,
    classes_BxM: jax.Array,
    masks_BxMxSxS: jax.Array | None,
    keys_B: jax.Array,
    *,
    frequency_K: Any = None,
) -> tuple[Values, Values]:
    """Returns the training losses and other values for the log, each {name: (sum over images,
    images)}.

    Args:
      params: as of `init`.
      maps: {stride: [B, H, W, C]}.
      size_Bx2: int32, (height, width) of the images without padding.
      boxes_BxMx4: float32, pixels, x0 y0 x1 y1.
      classes_BxM: int32; -1 where there is no object.
      masks_BxMxSxS: not read.
      keys_B: a random key per image, the same at every restart.
      frequency_K: images that have each category, for the federated loss; None: all equal.

    Returns:
      losses: cls, l1 and giou of the last layer; with aux_, of the layers before; with enc_, of the
        selected tokens; with dn_, of the noised objects in all layers. Weights are in them.
      counts: objects and denoising groups per image.

    Raises:
      UserError: more objects or fewer tokens than queries.

    >>> dino = schema.Dino(heads=2, hidden=16, queries=9, depth=2)
    >>> settings = schema.Detect(strides=(8, 16), width=8, dino=dino)
    >>> params = jax.eval_shape(lambda key: init(settings, {8: 8}, 3, key), jax.random.key(0))
    >>> targets = jnp.zeros((2, 5, 4)), jnp.zeros((2, 5), int), None
    >>> keys, maps = jax.random.split(jax.random.key(0), 2), {8: jnp.zeros((2, 4, 4, 8))}
    >>> call = lambda params: losses(settings, params, maps, jnp.full((2, 2), 32), *targets, keys)
    >>> [list(values) for values in jax.eval_shape(call, params)]
    [['aux_cls', 'aux_giou', 'aux_l1', 'cls', 'dn_cls', 'dn_giou', 'dn_l1', 'enc_cls', 'enc_giou',
      'enc_l1', 'giou', 'l1'], ['denoising_groups', 'objects']]
    """
    del masks_BxMxSxS
    classes = params["labels"].shape[0]
    draws = draw_noise(settings, boxes_BxMx4.shape[1], classes, keys_B)
    if frequency_K is not None:
        draws["frequency"] = jnp.broadcast_to(
            jnp.asarray(frequency_K, jnp.float32), draws["categories"].shape
        )
    sums, counts = losses_from_noise(
        settings, params, maps, size_Bx2, boxes_BxMx4, classes_BxM, draws
    )
    images, values = jnp.float32(len(size_Bx2)), {}
    for name, sum_BxI in sums.items():
        part, _, kind = name.rpartition("_")
        weighted_I = WEIGHTS[kind] * sum_BxI.sum(0)
        values[name] = weighted_I.sum() if part else weighted_I[-1]
        if not part:
            values[f"aux_{kind}"] = weighted_I[:-1].sum()
    return (
        {name: (value, images) for name, value in sorted(values.items())},
        {name: (value_B.sum(), images) for name, value_B in sorted(counts.items())},
    )


def losses_from_noise(
    settings: schema.Detect,
    params: Params,
    maps: Maps,
    size_Bx2: jax.Array,
    boxes_BxMx4: jax.Array,
    classes_BxM: jax.Array,
    draws: Mapping[str, Any],
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns the sums of `losses` with given random numbers, those of `draw_noise`: cls, l1 and
    giou of every image and layer [B, I], without weights, the same with dn_, and enc_ [B, 1]; and
    the counts of every image [B]."""
    dino, objects = settings.dino, boxes_BxMx4.shape[1]
    if objects > dino.queries:
        raise UserError(
            f"config.dense.detect.dino.queries: {dino.queries} queries cannot be matched with"
            f" {objects} objects; set at least as many, or a smaller dense.geometry.max_objects"
        )
    classes = params["labels"].shape[0]
    size_Bx1x4 = jnp.tile(size_Bx2[:, None, ::-1], 2).astype(jnp.float32)
    targets_BxMx4 = center_boxes(boxes_BxMx4 / size_Bx1x4)

    encoder = params["encoder"]
    with jax.named_scope("dino_encoder"):
        memory, shapes, valid_BxLx2 = dino_encoder.encode_levels(settings, encoder, maps, size_Bx2)
        found = dino_encoder.select_tokens(settings, encoder, memory, shapes, valid_BxLx2)
    content_BxTxD, start_BxTx4 = _matched_queries(params, found)
    visible_BxTxT, noised = None, None
    if dino.denoising:
        noised = jax.vmap(
            lambda boxes, classes_M, draw: denoising.noise_objects(
                boxes,
                classes_M,
                draw,
                number=dino.denoising,
                classes=classes,
                label_noise=dino.label_noise,
                box_noise=dino.box_noise,
            )
        )(targets_BxMx4, classes_BxM, draws["denoising"])
        content_BxTxD = jnp.concatenate([params["labels"][noised.class_S], content_BxTxD], 1)
        # as logits, which nothing on the border of the image has
        boxes_BxSx4 = jax.nn.sigmoid(dino_decoder.box_logit(noised.boxes_Sx4))
        start_BxTx4 = jnp.concatenate([boxes_BxSx4, start_BxTx4], 1)
        visible_BxTxT = jax.vmap(lambda group: denoising.visible_keys(group, dino.queries))(
            noised.group_S
        )
    with jax.named_scope("dino_decoder"):
        logits_BxIxTxK, boxes_BxIxTx4 = dino_decoder.decode(
            settings,
            params["decoder"],
            content_BxTxD,
            start_BxTx4,
            memory,
            shapes,
            valid_BxLx2,
            visible_BxTxT,
        )
    kept_BxK = _kept_categories(settings, classes_BxM, draws)
    slots = start_BxTx4.shape[1] - dino.queries
    # the encoder's set is matched as the layers' are
    logits = jnp.concatenate([logits_BxIxTxK[:, :, slots:], found.logits_BxQxK[:, None]], 1)
    boxes = jnp.concatenate([boxes_BxIxTx4[:, :, slots:], found.boxes_BxQx4[:, None]], 1)
    with jax.named_scope("matching"):
        match_BxIxM = _match(logits, boxes, classes_BxM, targets_BxMx4)
    of_sets = jax.vmap(
        jax.vmap(_set_losses, (0, 0, 0, None, None, None)), (0, 0, 0, 0, 0, _axis(kept_BxK))
    )(logits, boxes, match_BxIxM, classes_BxM, targets_BxMx4, kept_BxK)
    sums = {name: value_BxI[:, :-1] for name, value_BxI in of_sets.items()}
    sums |= {f"enc_{name}": value_BxI[:, -1:] for name, value_BxI in of_sets.items()}
    counts = {"objects": (classes_BxM >= 0).sum(1).astype(jnp.float32)}
    if noised is not None:
        of_noised = jax.vmap(
            jax.vmap(_noised_losses, (0, 0, None, None, None, None)),
            (0, 0, 0, 0, 0, _axis(kept_BxK)),
        )(
            logits_BxIxTxK[:, :, :slots],
            boxes_BxIxTx4[:, :, :slots],
            noised,
            classes_BxM,
            targets_BxMx4,
            kept_BxK,
        )
        sums |= {f"dn_{name}": value_BxI for name, value_BxI in of_noised.items()}
        counts["denoising_groups"] = noised.groups
    return sums, counts


def _axis(array: Any) -> int | None:
    return None if array is None else 0


def _matched_queries(params: Params, found: dino_encoder.Selected) -> tuple[jax.Array, jax.Array]:
    """Contents [B, Q, D], learned, and boxes [B, Q, 4] of the matched queries at the start."""
    start_BxQx4 = jax.lax.stop_gradient(found.boxes_BxQx4)
    content_QxD = params["content"]
    return jnp.broadcast_to(content_QxD, (len(start_BxQx4), *content_QxD.shape)), start_BxQx4


def _kept_categories(
    settings: schema.Detect, classes_BxM: jax.Array, draws: Mapping[str, Any]
) -> jax.Array | None:
    """Categories that the federated loss of every image covers, bool [B, K]; None: all. Background
    is one of those counted, as in Mask R-CNN."""
    if settings.loss != "federated":
        return None

    def one(classes_M: jax.Array, uniform_K: jax.Array, frequency_K: Any) -> jax.Array:
        background = jnp.full(1, len(uniform_K), classes_M.dtype)
        return federated_categories(
            jnp.concatenate([classes_M, background]),
            jnp.append(classes_M >= 0, True),
            uniform_K,
            frequency_K,
            count=settings.federated_classes,
        )

    frequency = draws.get("frequency")
    return jax.vmap(one, (0, 0, _axis(frequency)))(classes_BxM, draws["categories"], frequency)


def _match(
    logits_BxIxQxK: jax.Array,
    boxes_BxIxQx4: jax.Array,
    classes_BxM: jax.Array,
    targets_BxMx4: jax.Array,
) -> jax.Array:
    """The query of every object, int32 [B, I, M], every device for its own images: a loop over all
    images would wait for the slowest device at each of its steps."""
    arrays = jax.lax.stop_gradient((logits_BxIxQxK, boxes_BxIxQx4, classes_BxM, targets_BxMx4))

    def run(*some_Bx: jax.Array) -> jax.Array:
        return jax.vmap(jax.vmap(box_matching.match_predictions, (0, 0, None, None)))(*some_Bx)

    if not parallel.is_single_device(len(classes_BxM)):
        return run(*arrays)
    matched: jax.Array = parallel.per_device(run, *arrays)
    return matched


def _set_losses(
    logits_QxK: jax.Array,
    boxes_Qx4: jax.Array,
    match_M: jax.Array,
    classes_M: jax.Array,
    targets_Mx4: jax.Array,
    kept_K: jax.Array | None,
) -> dict[str, jax.Array]:
    learned_Q = box_matching.matched_classes(match_M, classes_M, len(logits_QxK))
    l1, giou = box_matching.box_pair_losses(
        boxes_Qx4[jnp.maximum(match_M, 0)], targets_Mx4, match_M >= 0
    )
    cls = box_matching.focal_class_loss(logits_QxK, learned_Q, None, kept_K)
    return {"cls": cls, "l1": l1, "giou": giou}


def _noised_losses(
    logits_SxK: jax.Array,
    boxes_Sx4: jax.Array,
    noised: denoising.NoisedObjects,
    classes_M: jax.Array,
    targets_Mx4: jax.Array,
    kept_K: jax.Array | None,
) -> dict[str, jax.Array]:
    """Positive slots learn their object, negative ones background; means over the groups."""
    learned_S = jnp.where(noised.positive_S, classes_M[noised.object_S], -1)
    cls = box_matching.focal_class_loss(logits_SxK, learned_S, noised.group_S >= 0, kept_K)
    l1, giou = box_matching.box_pair_losses(
        boxes_Sx4, targets_Mx4[noised.object_S], noised.positive_S
    )
    return {name: x / noised.groups for name, x in (("cls", cls), ("l1", l1), ("giou", giou))}


def detect(
    settings: schema.Detect, params: Params, maps: Maps, size_Bx2: jax.Array
) -> dict[str, jax.Array]:
    """Returns detections of every image, by falling score: the best of all pairs of query and
    category.

    Args:
      params: as of `init`.
      maps: {stride: [B, H, W, C]}.
      size_Bx2: int32, (height, width) of the images without padding.

    Returns:
      boxes [B, D, 4] in pixels of the input, scores [B, D], classes int32 [B, D], valid bool
      [B, D], where there is a detection; cut int32 [B], 0.

    >>> dino = schema.Dino(heads=2, hidden=16, queries=9, depth=2)
    >>> settings = schema.Detect(strides=(8, 16), width=8, detections=7, dino=dino)
    >>> params = jax.eval_shape(lambda key: init(settings, {8: 8}, 3, key), jax.random.key(0))
    >>> maps = {8: jnp.zeros((2, 4, 4, 8))}
    >>> call = lambda params: detect(settings, params, maps, jnp.full((2, 2), 32))
    >>> {name: array.shape for name, array in jax.eval_shape(call, params).items()}
    {'boxes': (2, 7, 4), 'classes': (2, 7), 'cut': (2,), 'scores': (2, 7), 'valid': (2, 7)}
    """
    encoder = params["encoder"]
    memory, shapes, valid_BxLx2 = dino_encoder.encode_levels(settings, encoder, maps, size_Bx2)
    found = dino_encoder.select_tokens(settings, encoder, memory, shapes, valid_BxLx2)
    content_BxQxD, start_BxQx4 = _matched_queries(params, found)
    logits, boxes = dino_decoder.decode(
        settings, params["decoder"], content_BxQxD, start_BxQx4, memory, shapes, valid_BxLx2
    )
    score_BxP = jax.nn.sigmoid(logits[:, -1]).reshape(len(logits), -1)
    score_BxD, pair_BxD = jax.lax.top_k(score_BxP, min(settings.detections, score_BxP.shape[1]))
    class_BxD = (pair_BxD % logits.shape[-1]).astype(jnp.int32)
    query_BxDx1 = (pair_BxD // logits.shape[-1])[..., None]
    size_Bx1x4 = jnp.tile(size_Bx2[:, None, ::-1], 2).astype(jnp.float32)
    boxes_BxDx4 = corner_boxes(jnp.take_along_axis(boxes[:, -1], query_BxDx1, 1)) * size_Bx1x4
    boxes_BxDx4 = jax.vmap(clip_boxes)(boxes_BxDx4, size_Bx2)
    valid_BxD = (score_BxD > settings.score_threshold) & jnp.isfinite(boxes_BxDx4).all(-1)
    if settings.dino.nms < 1:
        valid_BxD = jax.vmap(
            lambda boxes, scores, classes, valid: nms(
                boxes, scores, settings.dino.nms, groups_N=classes, valid_N=valid
            )
        )(boxes_BxDx4, score_BxD, class_BxD, valid_BxD)
    return {
        "boxes": jnp.where(valid_BxD[..., None], boxes_BxDx4, 0.0),
        "scores": jnp.where(valid_BxD, score_BxD, 0.0),
        "classes": jnp.where(valid_BxD, class_BxD, 0),
        "valid": valid_BxD,
        "cut": jnp.zeros(len(size_Bx2), jnp.int32),
    }

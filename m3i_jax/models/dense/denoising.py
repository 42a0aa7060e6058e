"""Contrastive denoising (Zhang et al., DINO, ICLR 2023): noised copies of the objects as further
queries of the decoder, in training. It restores the positive ones and rejects the negative ones,
whose noise is larger, so that no matching is needed to learn from them.

The slots of an image are in groups, each of all its objects twice: first positive, then negative.
How many groups fit follows from the number of objects, a traced number; slots beyond the last group
are blocked as keys and weigh nothing. So no shape depends on the data. Everything is of one image,
as in a reference that has one image a process; `jax.vmap` makes it of many.

M objects, S slots, Q matched queries, K categories.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from m3i_jax.objective.boxes import center_boxes, corner_boxes


class NoisedObjects(NamedTuple):
    """Slots of one image.

    Attributes:
      class_S: int32, the class whose embedding a slot begins with, noised.
      boxes_Sx4: float32, (centre, sides) in shares of the image, noised.
      object_S: int32, the object that a slot is made of.
      group_S: int32, -1 where there is no noised object.
      positive_S: bool, whether the slot is to be restored; False for unused ones.
      groups: float32 scalar, number of groups.
    """

    class_S: jax.Array
    boxes_Sx4: jax.Array
    object_S: jax.Array
    group_S: jax.Array
    positive_S: jax.Array
    groups: jax.Array


def denoising_slots(number: int, objects: int) -> int:
    """Slots of an image with up to `objects` objects, for groups of about `number` objects in all;
    0: no denoising.

    >>> denoising_slots(100, 20), denoising_slots(100, 300), denoising_slots(0, 20)
    (200, 600, 0)
    """
    return 2 * max(number, objects) if number else 0


def denoising_draws(key: jax.Array, slots: int) -> dict[str, jax.Array]:
    """Returns the uniform random numbers of an image: "relabel" and "category" [S], "sign" and
    "move" [S, 4].

    >>> {name: x.shape for name, x in denoising_draws(jax.random.key(0), 6).items()}
    {'relabel': (6,), 'category': (6,), 'sign': (6, 4), 'move': (6, 4)}
    """
    shapes = {"relabel": (slots,), "category": (slots,), "sign": (slots, 4), "move": (slots, 4)}
    return {
        name: jax.random.uniform(jax.random.fold_in(key, purpose), shape, jnp.float32)
        for purpose, (name, shape) in enumerate(shapes.items())
    }


def noise_objects(
    boxes_Mx4: jax.Array,
    classes_M: jax.Array,
    draws: Mapping[str, jax.Array],
    *,
    number: int,
    classes: int,
    label_noise: float,
    box_noise: float,
) -> NoisedObjects:
    """Noised copies of the objects of one image.

    A group has every object twice, so that there are `floor(number / objects)` groups, at least
    one. Every corner moves by `box_noise` times up to half a side if positive, and by half a side
    to a whole one if negative, and stays in the image. A class is replaced by any with probability
    `label_noise`.

    Args:
      boxes_Mx4: (centre, sides) in shares of the image.
      classes_M: int; -1 where there is no object.
      draws: of `denoising_draws`.
      number: objects of all groups, about.
      classes: K.
      label_noise, box_noise: see `schema.Dino`.

    >>> boxes, classes = jnp.array([[0.5, 0.5, 0.4, 0.2], [0, 0, 0, 0]]), jnp.array([3, -1])
    >>> draws = denoising_draws(jax.random.key(0), 4)
    >>> noised = noise_objects(
    ...     boxes, classes, draws, number=2, classes=5, label_noise=0.0, box_noise=0.0
    ... )
    >>> noised.class_S.tolist(), noised.group_S.tolist(), noised.positive_S.tolist()
    ([3, 3, 3, 3], [0, 0, 1, 1], [True, False, True, False])
    """
    valid_M = classes_M >= 0
    count = valid_M.sum()
    each = jnp.maximum(count, 1)
    groups = jnp.maximum(number // each, 1)
    slot_S = jnp.arange(len(draws["relabel"]))
    used_S = (slot_S < 2 * groups * each) & (count > 0)
    within_S = slot_S % (2 * each)
    # objects need not be in the first rows
    object_S = jnp.argsort(~valid_M, stable=True)[within_S % each].astype(jnp.int32)
    positive_S = used_S & (within_S < each)

    class_S = jnp.maximum(classes_M[object_S], 0)
    other_S = jnp.minimum((draws["category"] * classes).astype(class_S.dtype), classes - 1)
    class_S = jnp.where(draws["relabel"] < label_noise, other_S, class_S)

    corners_Sx4 = corner_boxes(boxes_Mx4)[object_S]
    half_Sx4 = jnp.tile(boxes_Mx4[object_S, 2:] / 2, 2)
    share_Sx4 = draws["move"] + jnp.where(positive_S, 0.0, 1.0)[:, None]
    move_Sx4 = jnp.where(draws["sign"] < 0.5, -1.0, 1.0) * share_Sx4 * half_Sx4 * box_noise
    return NoisedObjects(
        class_S=class_S.astype(jnp.int32),
        boxes_Sx4=center_boxes(jnp.clip(corners_Sx4 + move_Sx4, 0.0, 1.0)),
        object_S=object_S,
        group_S=jnp.where(used_S, slot_S // (2 * each), -1).astype(jnp.int32),
        positive_S=positive_S,
        groups=groups.astype(jnp.float32),
    )


def visible_keys(group_S: jax.Array, queries: int) -> jax.Array:
    """Returns which keys each query of the decoder attends to, bool [S + Q, S + Q]: every query all
    matched queries, and a noised object those of its own group.

    >>> visible_keys(jnp.array([0, 1, -1]), 1).astype(int).tolist()
    [[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1]]
    """
    group_T = jnp.concatenate([group_S, jnp.full(queries, -1, group_S.dtype)])
    is_matched_T = jnp.arange(len(group_T)) >= len(group_S)
    same_TxT = (group_T[:, None] == group_T) & (group_T >= 0)
    return same_TxT | is_matched_T

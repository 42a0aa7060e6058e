"""The shapes of DINO and Mask2Former in tests.bench.dense_peer: settings, batch, first values and
loss.

Their heads have the sizes of small images in configs/transfer/ (detect.py, segment.py), the encoder
and its maps are those of the other shapes. The PyTorch side (tests/bench/dense_query_torch.py) is
made of Transformers' modules. Both sides get the same random numbers: the points of Mask2Former, of
which the masks of an image share their candidates, since Transformers lists its masks in the order
of the queries; and the noise of DINO's denoising queries.
"""

from typing import Any

import numpy as np

HEADS = ("dino", "mask2former")
DINO_STRIDES = (8, 16, 32)  # the head makes the last map itself
NAMES = ("relabel", "category", "sign", "move")  # of the draws of denoising


def head_settings(task: str, toy: bool) -> Any:
    """The section of the head."""
    from m3i_jax import schema

    width, hidden, heads = (32, 32, 2) if toy else (64, 128, 4)
    if task == "dino":
        dino = schema.Dino(
            queries=20 if toy else 100,
            heads=heads,
            encoder_depth=2,
            depth=2 if toy else 3,
            hidden=hidden,
            denoising=10 if toy else 20,
        )
        return schema.Detect(head="dino", masks=False, strides=DINO_STRIDES, width=width, dino=dino)
    own = schema.Mask2Former(
        queries=12 if toy else 40,
        heads=heads,
        encoder_depth=2,
        encoder_hidden=hidden,
        depth=3,
        hidden=hidden,
        points=64 if toy else 1024,
    )
    return schema.Segment(head="mask2former", strides=(4, 8, 16, 32), width=width, mask2former=own)


def map_strides(task: str) -> tuple[int, ...]:
    """Strides of the maps that the pyramid makes."""
    return DINO_STRIDES[:-1] if task == "dino" else (4, 8, 16, 32)


def class_maps(r: np.random.Generator, images: int, side: int, stuff: int) -> np.ndarray:
    """Maps of blocks of two to `stuff` categories each, and unlabelled blocks."""
    out = np.full((images, side // 8, side // 8), 255)
    for image in out:
        shown = r.permutation(stuff)[: r.integers(2, stuff + 1)]
        image[:] = r.choice([*shown, 255], image.shape)
    return out.repeat(8, 1).repeat(8, 2).astype(np.uint8)


def draws(shape: dict[str, Any], objects: int, stuff: int) -> dict[str, np.ndarray]:
    """Uniform random numbers of the losses."""
    from m3i_jax.models.dense import denoising
    from m3i_jax.models.dense.mask2former_losses import mask_slots, uncertain_count

    r, b, head = np.random.default_rng(1), shape["batch"], shape["head"]
    if shape["task"] == "dino":
        slots = denoising.denoising_slots(head.dino.denoising, objects)
        sizes = ((slots,), (slots,), (slots, 4), (slots, 4))
        pairs = zip(NAMES, sizes, strict=True)
        return {f"draw_{name}": r.random((b, *size)).astype(np.float32) for name, size in pairs}
    own, slots = head.mask2former, mask_slots(head, stuff)
    sets, candidates = own.depth + 1, int(own.points * own.oversample)
    fresh = own.points - uncertain_count(head)
    share = lambda n: np.broadcast_to(r.random((sets, b, 1, n, 2)), (sets, b, slots, n, 2))
    points = {
        "match": r.random((sets, b, own.points, 2)),
        "candidates": share(candidates),
        "fresh": share(fresh),
    }
    return {f"points_{name}": x.astype(np.float32) for name, x in points.items()}


def numbers(shape: dict[str, Any], classes: int, stuff: int) -> dict[str, Any]:
    """What the PyTorch side needs."""
    head = shape["head"]
    own = head.dino if shape["task"] == "dino" else head.mask2former
    out = {
        "width": head.width,
        "queries": own.queries,
        "attention_heads": own.heads,
        "sampled": own.sampled,
        "encoder_depth": own.encoder_depth,
        "depth": own.depth,
        "hidden": own.hidden,
        "strides": map_strides(shape["task"]),
    }
    if shape["task"] == "dino":
        return out | {
            "classes": classes,
            "levels": len(head.strides),
            "denoising": own.denoising,
            "label_noise": own.label_noise,
            "box_noise": own.box_noise,
        }
    return out | {
        "classes": stuff,
        "encoder_hidden": own.encoder_hidden,
        "points": own.points,
        "oversample": own.oversample,
        "uncertain": own.uncertain,
        "none_weight": own.none_weight,
        "weights": (own.class_weight, own.mask_weight, own.dice_weight),
    }


def first_values(shape: dict[str, Any], classes: int, stuff: int, key: Any) -> Any:
    """Parameters of the head. Places that a layer reads are moved off the borders of cells, and
    queries differ clearly, so that no choice hangs on a bit."""
    import jax

    from m3i_jax.models.dense import dino, mask2former

    channels = shape["pyramid"].channels
    if shape["task"] == "dino":
        params = dino.init(shape["head"], channels, classes, key)
    else:
        params, _ = mask2former.init(shape["head"], channels, stuff, key)

    def moved(path: Any, leaf: Any) -> Any:
        names = ["", "", *(str(part.key) for part in path)]
        r = np.random.default_rng(sum(map(ord, "/".join(names))))
        drawn = r.normal(size=leaf.shape).astype(np.float32)
        if names[-2] in ("offsets", "weights"):
            return leaf + 0.3 * drawn * (leaf.shape[-2] ** -0.5 if names[-1] == "kernel" else 1)
        if names[-3:-1] == ["boxes", "fc3"]:
            return leaf + 0.3 * drawn * (leaf.shape[-2] ** -0.5 if names[-1] == "kernel" else 1)
        if names[-2:] == ["classes", "kernel"]:
            return 3 * leaf
        return leaf

    return jax.tree_util.tree_map_with_path(moved, params)


def loss(shape: dict[str, Any], params: Any, maps: Any, batch: Any) -> Any:
    """The loss of the head."""
    import jax.numpy as jnp

    from m3i_jax.models.dense import dino, mask2former, mask2former_task
    from m3i_jax.models.dense.mask2former_losses import (
        MaskPoints,
        class_masks,
        mask2former_losses,
    )

    head = shape["head"]
    if shape["task"] == "dino":
        sums, _ = dino.losses_from_noise(
            head,
            params,
            maps,
            batch["size"],
            batch["boxes"],
            batch["classes"],
            {"denoising": {name: batch[f"draw_{name}"] for name in NAMES}},
        )
        total = sum(
            dino.WEIGHTS[name.rpartition("_")[2]] * value.sum() for name, value in sums.items()
        )
        return total / dino.object_divisor(batch["classes"])
    made = mask2former.apply(head, params, maps)
    classes = made.classes_SxBxQxK1.shape[-1] - 1
    points = MaskPoints(*(batch[f"points_{name}"] for name in ("match", "candidates", "fresh")))
    truth = class_masks(head, batch["map"], classes)
    keys = jnp.zeros(len(batch["map"]), jnp.uint32)  # not read: the points are given
    sums_Sx3, _ = mask2former_losses(head, made, truth, keys, points)
    divisors = mask2former_task.mask_divisors(head, batch["map"], classes)
    values = mask2former_task.weighted_losses(head.mask2former, sums_Sx3)
    return sum(value / divisors[name] for name, value in values.items())

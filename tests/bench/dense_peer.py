"""Training steps of Mask R-CNN, UperNet, DINO and Mask2Former over the same steps in PyTorch with
the operations of torchvision (tests/bench/dense_step_torch.py) and the modules of Transformers
(tests/bench/dense_query_torch.py), on this machine's processor in float32.

    python -m tests.bench.dense_peer                    # all four
    python -m tests.bench.dense_peer one_thread dino    # processor time of one thread each
    python -m tests.bench.dense_peer detect --runs 9
    python -m tests.bench.dense_peer --torch PYTHON     # torch and torchvision from another place

detect: Mask R-CNN on a ViT of width 96 and 4 blocks, 96 pixels, batch 16, 0.94 M parameters.
segment: UperNet on the same encoder. dino, mask2former: those heads, of a width of 64
(tests/bench/dense_queries.py). _wide: encoder of width 192, 192 pixels, batch 4. The sides use the
same parameters, batch and random numbers. Losses and gradients of all parameters must agree before
anything is timed (tests/bench/race.py).
"""

import importlib.util
import json
import pathlib
import sys
from typing import Any

import numpy as np

from tests.bench import dense_queries, race
from tests.bench.figures import Figure

NEEDS = ("torch", "torchvision")
TARGET = 1.0  # with the newest jax
NEWEST = (0, 12)
AGREE = 1e-4  # relative, of the loss
# Median and largest relative difference of gradients: a place on the border of two cells, or a
# value at the kink of a ReLU, may fall on either side.
TYPICAL, WORST = 1e-3, 3e-2
LR, DECAY, CLIP, CLASSES, STUFF = 1e-3, 0.05, 1.0, 6, 10
NAMES = {
    "detect": "Mask R-CNN",
    "segment": "UperNet",
    "dino": "DINO",
    "mask2former": "Mask2Former",
}
STRIDES, OBJECTS = (4, 8, 16, 32), 8
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def settings(name: str) -> dict[str, Any]:
    """Model, maps, pyramid and head of a shape."""
    from m3i_jax import schema
    from m3i_jax.models.dense.pyramid import PyramidConfig

    wide, toy = name.endswith("wide"), name.endswith("toy")
    width, size, depth = (192, 192, 6) if wide else (32, 64, 2) if toy else (96, 96, 4)
    encoder = schema.Encoder(
        patch_size=8,
        width=width,
        depth=depth,
        heads=max(1, width // 32),
        freeze_patch_embed=False,
        final_norm=False,
        cls_token=False,
    )
    task, pixels, strides = name.partition("_")[0], width // 2, STRIDES
    head: Any
    if task in dense_queries.HEADS:
        head = dense_queries.head_settings(task, toy)
        maps, kind, strides = schema.Maps(), "rescale", dense_queries.map_strides(task)
    elif task == "detect":
        head = schema.Detect(
            strides=STRIDES,
            anchor_sizes=(12, 24, 48, 96),
            width=pixels,
            rpn_convs=1,
            rpn_samples=64,
            proposals=(100, 100),
            rois=24,
            box_convs=0,
            box_hidden=128,
            mask_convs=2,
            canonical=(56, 8),
        )
        maps = schema.Maps(
            window=size // 16, global_blocks=tuple(range(1, depth, 2)), relative="decomposed"
        )
        kind = "simple"
    else:
        head = schema.Segment(width=width // 3, aux_width=width // 3, strides=STRIDES)
        maps, kind = schema.Maps(), "rescale"
    return {
        "model": schema.Model(encoder=encoder, dtype="float32"),
        "maps": maps,
        "pyramid": PyramidConfig(kind=kind, strides=strides, sources=((8, width),), width=pixels),
        "head": head,
        "size": size,
        "batch": 4 if wide else 2 if toy else 16,
        "task": task,
    }


def batch_of(shape: dict[str, Any]) -> dict[str, np.ndarray]:
    """A random batch with a fixed seed: up to OBJECTS ellipses an image, or maps of blocks."""
    r, b, side = np.random.default_rng(0), shape["batch"], shape["size"]
    batch = {
        "image": r.integers(0, 256, (b, side, side, 3)).astype(np.uint8),
        "size": r.integers(side - 16, side + 1, (b, 2)).astype(np.int32),
    }
    if shape["task"] == "mask2former":
        return batch | {"map": dense_queries.class_maps(r, b, side, STUFF)}
    if shape["task"] == "segment":
        blocks = r.integers(0, STUFF + 1, (b, side // 8, side // 8))
        labels = np.where(blocks == STUFF, 255, blocks).repeat(8, 1).repeat(8, 2)
        return batch | {"map": labels.astype(np.uint8)}
    corner = r.uniform(0, 0.6, (b, OBJECTS, 2)) * side
    extent = np.exp(r.uniform(np.log(10), np.log(side * 0.6), (b, OBJECTS, 2)))
    limit = np.tile(batch["size"][:, None, ::-1], 2)
    boxes = np.minimum(np.concatenate([corner, corner + extent], -1), limit)
    count = r.integers(1, OBJECTS + 1, b)
    classes = np.where(
        np.arange(OBJECTS) < count[:, None], r.integers(0, CLASSES, (b, OBJECTS)), -1
    )
    # of 112 pixels, every fourth place of a target would lie between two cells: a tie
    grid = (np.arange(100) + 0.5) / 50 - 1
    ellipse = grid[:, None] ** 2 + grid**2 <= 1
    return batch | {
        "boxes": boxes.astype(np.float32),
        "classes": classes.astype(np.int32),
        "masks": np.broadcast_to(ellipse, (b, OBJECTS, 100, 100)).astype(np.uint8),
    }


def numbers(shape: dict[str, Any]) -> dict[str, Any]:
    """What the PyTorch side needs."""
    head, encoder, maps = shape["head"], shape["model"].encoder, shape["maps"]
    out = {
        "task": shape["task"],
        "size": shape["size"],
        "patch": encoder.patch_size,
        "heads": encoder.heads,
        "window": maps.window,
        "global_blocks": maps.global_blocks,
        "strides": STRIDES,
        "lr": LR,
        "decay": DECAY,
        "clip": CLIP,
        "channels": list(shape["pyramid"].channels.values()),
    }
    if shape["task"] in dense_queries.HEADS:
        return out | dense_queries.numbers(shape, CLASSES, STUFF)
    if shape["task"] == "segment":
        return out | {
            "dropout": head.dropout,
            "aux_weight": head.aux_weight,
            "pools": head.pool_scales,
        }
    return out | {
        "classes": CLASSES,
        "anchor_sizes": head.anchor_sizes,
        "ratios": head.anchor_ratios,
        "rpn_convs": head.rpn_convs,
        "rpn_samples": head.rpn_samples,
        "rpn_nms": head.rpn_nms,
        "candidates": head.proposals[0],
        "proposals": head.proposals[1],
        "rois": head.rois,
        "foreground": head.roi_foreground,
        "box_convs": head.box_convs,
        "mask_convs": head.mask_convs,
        "canonical": head.canonical,
    }


def first_values(shape: dict[str, Any]) -> tuple[Any, Any]:
    """Parameters and batch statistics. Last layers are larger than in training, so that proposals
    and their order do not hang on a bit."""
    import jax

    from m3i_jax.models import vit, vit_maps
    from m3i_jax.models.dense import mask_rcnn, pyramid, task_heads

    keys = jax.random.split(jax.random.key(0), 3)
    model, maps, size = shape["model"], shape["maps"], shape["size"]
    encoder = vit.init(model, keys[0], grid=size // model.encoder.patch_size)
    encoder = vit_maps.init_maps(model, maps, encoder, size=size)
    neck, neck_statistics = pyramid.init(shape["pyramid"], keys[1])
    channels, head_statistics = shape["pyramid"].channels, {}
    if shape["task"] in dense_queries.HEADS:
        head = dense_queries.first_values(shape, CLASSES, STUFF, keys[2])
    elif shape["task"] == "detect":
        head = mask_rcnn.init(shape["head"], channels, CLASSES, keys[2])
        for name in ("logits", "deltas"):
            head["rpn"][name]["kernel"] *= {"logits": 30.0, "deltas": 5.0}[name]
    else:
        head, head_statistics = task_heads.segmentation_head(shape["head"]).init(
            shape["head"], channels, STUFF, keys[2]
        )
    params = {"encoder": encoder, "pyramid": neck, "head": head}
    return params, {"pyramid": neck_statistics, "head": head_statistics}


def loss_of(shape: dict[str, Any], params: Any, statistics: Any, batch: Any) -> tuple[Any, Any]:
    """The loss and the new batch statistics."""
    import jax.numpy as jnp

    from m3i_jax.models import vit_maps
    from m3i_jax.models.dense import map_sampling, mask_rcnn, pyramid, upernet
    from m3i_jax.objective import dense_losses

    side, head = shape["size"], shape["head"]
    image = (batch["image"].astype(jnp.float32) - 255 * jnp.array(MEAN)) / (255 * jnp.array(STD))
    inside = jnp.arange(side) < batch["size"][..., None]
    shown = inside[:, 0, :, None, None] & inside[:, 1, None, :, None]
    (last,) = vit_maps.stages(
        shape["model"],
        params["encoder"],
        jnp.where(shown, image, 0.0),
        maps=shape["maps"],
        size=side,
    )
    maps, neck = pyramid.apply(
        shape["pyramid"], params["pyramid"], statistics["pyramid"], {8: last}, train=True
    )
    if shape["task"] in dense_queries.HEADS:
        return dense_queries.loss(shape, params["head"], maps, batch), statistics
    if shape["task"] == "detect":
        draws = {"anchors": batch["anchor_draws"], "regions": batch["region_draws"]}
        given = (batch[name] for name in ("size", "boxes", "classes", "masks"))
        losses, _ = mask_rcnn.losses_from_draws(head, params["head"], maps, *given, draws)
        return sum(total / count for total, count in losses.values()), statistics
    logits, aux, new = upernet.apply(
        head,
        params["head"],
        statistics["head"],
        maps,
        train=True,
        uniform_BxC=batch["dropout"],
    )

    def cost(logits_BxHxWxK: Any) -> Any:
        whole = map_sampling.resize_bilinear(logits_BxHxWxK, (side, side))
        total, _, count = dense_losses.pixel_cross_entropy(whole, batch["map"])
        return total / count

    return cost(logits) + head.aux_weight * cost(aux), {"pyramid": neck, "head": new}


def draws_of(shape: dict[str, Any]) -> dict[str, np.ndarray]:
    """Uniform random numbers of the losses."""
    r, b, head = np.random.default_rng(1), shape["batch"], shape["head"]
    if shape["task"] in dense_queries.HEADS:
        return dense_queries.draws(shape, OBJECTS, STUFF)
    if shape["task"] == "segment":
        return {"dropout": r.random((b, head.width + head.aux_width)).astype(np.float32)}
    anchors = sum((shape["size"] // stride) ** 2 for stride in STRIDES) * len(head.anchor_ratios)
    return {
        "anchor_draws": r.random((b, anchors)).astype(np.float32),
        "region_draws": r.random((b, head.proposals[1] + OBJECTS)).astype(np.float32),
    }


def ours(folder: pathlib.Path, name: str) -> Any:
    """The JAX step as a function that runs it and returns the loss. Writes the start of the PyTorch
    side, and the gradients, to files first."""
    import functools

    import jax
    import jax.numpy as jnp
    import optax

    from m3i_jax.models import vit_maps
    from m3i_jax.parallel.sharding import path_text

    shape = settings(name)
    params, statistics = first_values(shape)
    batch = {**batch_of(shape), **draws_of(shape)}
    loss = jax.value_and_grad(functools.partial(loss_of, shape), has_aux=True)
    decayed = jax.tree_util.tree_map_with_path(
        lambda path, _: path_text(path).endswith("kernel"), params
    )
    tx = optax.chain(
        optax.clip_by_global_norm(CLIP), optax.adamw(LR, weight_decay=DECAY, mask=decayed)
    )

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        params, opt, statistics = state
        (value, statistics), grads = loss(params, statistics, batch)
        updates, opt = tx.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt, statistics), value

    named = lambda tree: {
        path_text(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    grid = shape["size"] // shape["model"].encoder.patch_size
    table = vit_maps.position_table(shape["model"], params["encoder"], grid, (grid, grid))
    quick = {"xla_backend_optimization_level": 0}  # not timed
    _, grads = jax.jit(loss, compiler_options=quick)(params, statistics, batch)
    np.savez(
        folder / "start.npz",
        table=np.asarray(table, np.float32),
        **{f"params/{path}": value for path, value in named(params).items()},
        **{f"gradients/{path}": value for path, value in named(grads).items()},
        **{f"batch/{key}": value for key, value in batch.items()},
    )
    (folder / "shape.json").write_text(json.dumps(numbers(shape)))
    state = jax.tree.map(jnp.array, (params, tx.init(params), statistics))
    given = jax.device_put(batch)
    run = jax.jit(step, donate_argnums=0).lower(state, given).compile()

    def once() -> float:
        nonlocal state
        state, value = run(state, given)
        jax.block_until_ready(state)
        return float(value)

    return once


def theirs(folder: pathlib.Path, name: str) -> Any:
    """The PyTorch step, from the files of the JAX side.

    Raises:
      RuntimeError: the gradients differ.
    """
    import torch

    from tests.bench import dense_step_torch

    kind: Any = dense_step_torch.Peer
    if name.partition("_")[0] in dense_queries.HEADS:
        from tests.bench.dense_query_torch import QueryPeer as kind
    torch.set_num_threads(race.THREADS)
    arrays = dict(np.load(folder / "start.npz"))
    peer = kind(json.loads((folder / "shape.json").read_text()), arrays)
    peer.loss().backward()
    wanted = peer.named(arrays, "gradients/")
    off = {
        path: float(np.linalg.norm(p.grad.numpy() - wanted[path]) / np.linalg.norm(wanted[path]))
        for path, p in peer.params.items()
        if p.grad is not None and np.linalg.norm(wanted[path]) > 1e-7
    }
    if not (np.median(list(off.values())) <= TYPICAL and max(off.values()) <= WORST):
        worst = max(off, key=off.__getitem__)
        raise RuntimeError(f"the gradients of {worst} differ by {off[worst]:.1e}")
    peer.running = {
        path: (torch.zeros_like(mean), torch.ones_like(mean))
        for path, (mean, _) in peer.running.items()
    }
    return peer.step


def figures(quick: bool) -> list[Figure]:
    import jax

    out, new = [], tuple(map(int, jax.__version__.split(".")[:2])) >= NEWEST
    target = TARGET if new and not quick else None
    for task, head in NAMES.items():
        name = f"{task}_toy" if quick else task
        what = f"{head} step over PyTorch, CPU, {name}, jax {jax.__version__}"
        if task in dense_queries.HEADS and importlib.util.find_spec("transformers") is None:
            out.append(Figure(what, None, target, note="needs transformers: the extra torch"))
            continue
        result = race.race("tests.bench.dense_peer", name, 5 if quick else 7, sys.executable, AGREE)
        (a, b), (c, d) = result["wall"], result["processor"]
        out.append(Figure(what, a / b, target, note=f"processor time {c / d:.2f}"))
    return out


if __name__ == "__main__":
    race.main("tests.bench.dense_peer", list(NAMES), AGREE)

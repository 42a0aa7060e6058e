"""Floating-point operations of one train step of ViT-B/16: counted on the program, over a formula written from the paper's shapes.

    python -m tests.bench.flops

dot: matrix products and convolutions of the traced, unrolled step, per mixed view. formula: below. all: what XLA counts in the lowered
step, elementwise work included; "other" is what exceeds dot, over dot.
"""

import jax

from m3i_jax import config as configuration
from m3i_jax import parallel, schema
from m3i_jax.models import presets
from m3i_jax.reporting import flops, show
from m3i_jax.training.trainer import Trainer, abstract_batch

FLOOR = 279.5e9  # with the patch embedding trained; 287.0e9 before the dead rows of the last decoder layer are left out


def formula(c: schema.Config, vocabulary: int = 0) -> float:
    """Operations a mixed view, from shapes alone: a multiply-add is two, a trained product three times its forward."""
    e, d, t = c.model.encoder, c.model.decoder, c.model.text
    n, shown, patch = c.tokens, c.tokens - c.hidden, 3 * c.model.encoder.patch_size**2

    def block(tokens: int, width: int) -> int:
        return 12 * tokens * width**2 + 2 * tokens**2 * width

    blocks, embed = e.depth * block(n + 1, e.width), n * patch * e.width
    online = 3 * blocks + (1 if e.freeze_patch_embed else 2) * embed
    target = 2 * (blocks + embed)
    whole = shown + n
    last = 2 * whole * d.width**2 + 10 * n * d.width**2 + 2 * n * whole * d.width  # only rows that predict, keys and values of all
    decoder = 3 * (shown * e.width * d.width + (d.depth - 1) * block(whole, d.width) + last + n * d.width * e.width)
    positions = 2 * n * 2 * d.width * d.width  # of role j; those of role i are the same for the whole batch. The input takes no gradient
    pool = 3 * (2 * shown * e.width**2 + e.width**2 + 2 * shown * e.width + e.width * c.model.pool.width)
    moment = 2 * 2 * n * e.width**2  # C of two views; p C of two predictions, whose gradient costs none
    total = online + target + 2 * decoder + positions + 2 * pool + moment
    if c.data.classes > 0:
        total += 3 * 2 * c.model.pool.width * c.data.classes
    if c.data.captions == "yes":
        length, b = c.data.caption_length, c.train.batch_size
        total += 3 * (t.depth * block(length, t.width) + t.width * t.embed + 2 * c.model.pool.width * t.embed)
        total += 3 * 2 * b * t.embed  # both roles against all captions of the batch
    return 2.0 * total


def variant(name: str, **changes: str) -> schema.Config:
    config = configuration.default()
    config.model.update(presets.preset("vit_b16"))
    assignments = {"data.size": "100000", "data.classes": "1000", "data.captions": "no", "train.batch_size": "64", **changes}
    configuration.override(config, [f"{key}={value}" for key, value in assignments.items()])
    return configuration.resolve(config)


VARIANTS = {
    "m3i, category": {},
    "m3i, category, patch embedding trained": {"model.encoder.freeze_patch_embed": "false"},
    "m3i, category, fixed weight": {"objective.weighting": "fixed"},
    "m3i, text, 77 tokens": {"data.classes": "0", "data.captions": "yes"},
    "m3i, category, 4 microbatches": {"train.microbatches": "4"},
}


def measure(config: schema.Config) -> tuple[float, float, float]:
    """(dot and convolution operations, formula, all operations of the lowered step), a mixed view."""
    trainer = Trainer(config, parallel.make_mesh((1, 1, 1), jax.devices()[:1]), 49_408)
    batch = abstract_batch(config)
    counted = flops.count(trainer.trace, trainer.template, batch)
    lowered = trainer.lower(batch).cost_analysis()["flops"] if config.train.microbatches == 1 else float("nan")
    images = config.train.batch_size
    return (counted.dot + counted.conv) / images, formula(config), lowered / images


def main() -> None:
    rows, seen = [], {}
    for name, changes in VARIANTS.items():
        seen[name] = dot, wanted, everything = measure(variant(name, **changes))
        giga = [f"{count / 1e9:.2f}" for count in (dot, wanted, everything)]
        rows.append((name, giga[0], giga[1], f"{dot / wanted:.4f}", giga[2], f"{everything / dot - 1:.2%}"))
    print(show.table(rows, ("ViT-B/16 step", "dot GFLOP a view", "formula", "ratio", "all", "other")))
    category = seen["m3i, category, patch embedding trained"][0]
    print(f"over the floor of {FLOOR / 1e9} GFLOP: {category / FLOOR:.4f}; over 287.0: {category / 287.0e9:.4f}")
    print(f"dynamic over fixed weighting: {seen['m3i, category'][0] / seen['m3i, category, fixed weight'][0]:.5f}")


if __name__ == "__main__":
    main()

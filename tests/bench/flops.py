"""FLOPs and memory of one train step of ViT-B/16 for every form, named method and combination, and
of the paper's largest run.

    python -m tests.bench.flops                 # all rows
    python -m tests.bench.flops m3i k mim+clip  # some

- dot: matrix products and convolutions of the traced, unrolled step, per image.
- formula: tests/bench/formula.py, from shapes.
- all: XLA's count for the lowered step, elementwise operations included; "other" is the excess over
  dot, relative to dot.
- temporary: peak temporary memory of the ViT-S/16 step compiled for CPU at 16 images with blocks in
  one scan, from the compiler's statistics. Only with --memory, which compiles each step
  (XLA_FLAGS=--xla_backend_optimization_level=0 compiles faster to the same buffers).
"""

import dataclasses
import pathlib
import sys

import jax

from m3i_jax import config as configuration
from m3i_jax import parallel, published_settings, schema
from m3i_jax.models import presets
from m3i_jax.objective import entropy_terms, published, registry, terms
from m3i_jax.objective.caption_posterior import CAPTIONS
from m3i_jax.profiling import flops
from m3i_jax.reporting import text_table
from m3i_jax.training.trainer import Trainer, abstract_batch
from tests.bench import formula
from tests.bench.figures import Figure

# With a trained patch embedding; 287.0e9 with the unused rows of the last decoder layer.
FLOOR = 279.5e9
SETS = ("mim+clip", "sim+supervised", "mim+instance", "m3i_unmixed")
VARIANTS = {
    "m3i, category": {},
    "m3i, category, patch embedding trained": {"model.encoder.freeze_patch_embed": "false"},
    "m3i, category, fixed weight": {"objective.weighting": "fixed"},
    "m3i, text, 77 tokens": {"data.classes": "0", "data.captions": "yes"},
    "m3i, category, 4 microbatches": {"train.microbatches": "4"},
}


def variant(forms: str = "m3i", **changes: str) -> schema.Config:
    """ViT-B/16 on 1,000 categories, 64 images per step."""
    config = configuration.default_config()
    config.model.update(presets.preset("vit_b16"))
    names = [terms.LETTERS.get(name, name) for name in forms.split("+")]
    settings = {"objective.forms": ",".join(names)}
    for name in names:
        if name in published_settings.SETTINGS:
            settings |= {k: str(v) for k, v in published_settings.SETTINGS[name].items()}
    text = (
        any(t.target.of in ("text", *CAPTIONS) for name in names for t in _predictions(name))
        and forms != "m3i"
    )
    base = {
        "data.size": "100000",
        "data.classes": "1000",
        "data.captions": "yes" if text else "no",
        "train.batch_size": "64",
    }
    base |= {"objective.target_checkpoint": "(a run)"} | settings | changes
    configuration.apply_overrides(config, [f"{key}={value}" for key, value in base.items()])
    return configuration.resolve(config)


def joint() -> schema.Config:
    """The paper's InternImage-H on categories and captions at the recipe's batch."""
    config = configuration.load_config(
        str(pathlib.Path(__file__).parent.parent.parent / "configs/m3i.py")
        + ":data=joint,model=internimage_h"
    )
    return configuration.resolve(config)


def _predictions(name: str) -> terms.Terms:
    return entropy_terms.predictions_of(registry.form(name))


def measure(config: schema.Config) -> tuple[float, float, float]:
    """(dot and convolution FLOPs, formula, all FLOPs of the lowered step), per image."""
    trainer = Trainer(config, parallel.make_mesh((1, 1, 1), jax.devices()[:1]), 49_408)
    batch = abstract_batch(config)
    counted = flops.count_flops(trainer.trace, trainer.template, batch)
    lowered = (
        trainer.lower(batch).cost_analysis()["flops"]
        if config.train.microbatches == 1
        else float("nan")
    )
    images = config.train.batch_size
    return (counted.dot + counted.conv) / images, formula.step(trainer.task.plan), lowered / images


def temporary(forms: str) -> float:
    """Peak temporary bytes of the ViT-S/16 step compiled for this machine at 16 images."""
    base = variant(forms, **{"train.batch_size": "16", "model.scan": "true"})
    small = presets.preset("vit_s16")
    encoder = dataclasses.replace(base.model.encoder, **{k: v for k, v in small["encoder"].items()})
    decoder = dataclasses.replace(
        base.model.decoder, width=min(base.model.decoder.width, 384), heads=8
    )
    config = dataclasses.replace(
        base, model=dataclasses.replace(base.model, encoder=encoder, decoder=decoder)
    )
    trainer = Trainer(config, parallel.make_mesh((1, 1, 1), jax.devices()[:1]), 49_408)
    return trainer.lower(abstract_batch(config)).compile().memory_analysis().temp_size_in_bytes


def row(name: str, config: schema.Config, memory: bool = False) -> tuple[tuple[str, ...], float]:
    dot, formula_count, everything = measure(config)
    giga = [f"{count / 1e9:.2f}" for count in (dot, formula_count, everything)]
    cells = (
        name,
        giga[0],
        giga[1],
        f"{dot / formula_count:.4f}",
        giga[2],
        f"{everything / dot - 1:.2%}",
    )
    return (*cells, text_table.format_bytes(temporary(name))) if memory else cells, dot


def figures(quick: bool) -> list[Figure]:
    names = ["m3i, category"] if quick else [*VARIANTS]
    settings = {name: variant(**VARIANTS[name]) for name in names}  # type: ignore[arg-type]
    if quick:
        encoder, decoder = schema.Encoder(depth=2), schema.Decoder(depth=2)
        small = {
            n: dataclasses.replace(c.model, encoder=encoder, decoder=decoder)
            for n, c in settings.items()
        }
        settings = {n: dataclasses.replace(c, model=small[n]) for n, c in settings.items()}
    rows = {name: measure(config) for name, config in settings.items()}
    out = [
        Figure(f"FLOPs of the ViT-B/16 step over the formula: {name}", dot / formula_count, 1.02)
        for name, (dot, formula_count, _) in rows.items()
    ]
    dot, _, everything = rows["m3i, category"]
    out.append(
        Figure("elementwise FLOPs over those of matrix products", everything / dot - 1, 0.02)
    )
    if not quick:
        trained, fixed = (
            rows["m3i, category, patch embedding trained"][0],
            rows["m3i, category, fixed weight"][0],
        )
        out.append(
            Figure(
                f"FLOPs of the step over the floor of {FLOOR / 1e9} GFLOP an image",
                trained / FLOOR,
                1.02,
            )
        )
        out.append(Figure("FLOPs of dynamic over fixed weighting", dot / fixed, 1.005))
    return out


def main(arguments: list[str]) -> None:
    memory = "--memory" in arguments
    names = [name for name in arguments if name != "--memory"]
    headers = (
        "ViT-B/16 step",
        "dot GFLOP an image",
        "formula",
        "ratio",
        "all",
        "other",
        *(("temporary, ViT-S/16, 16 images",) if memory else ()),
    )
    if not names:
        rows = {name: row(name, variant(**changes)) for name, changes in VARIANTS.items()}  # type: ignore[arg-type]
        print(text_table.text_table([cells for cells, _ in rows.values()], headers[:6]))
        dots = {name: dot for name, (_, dot) in rows.items()}
        trained = dots["m3i, category, patch embedding trained"]
        print(
            f"over the floor of {FLOOR / 1e9} GFLOP: {trained / FLOOR:.4f}; over 287.0:"
            f" {trained / 287.0e9:.4f}"
        )
        print(
            "dynamic over fixed weighting:"
            f" {dots['m3i, category'] / dots['m3i, category, fixed weight']:.5f}\n"
        )
        cells, dot = row("InternImage-H, joint", joint())
        print(text_table.text_table([cells], headers[:6]))
        print(f"over 1.52 TFLOP: {dot / 1.52e12:.4f}\n")
        names = [*terms.LETTERS, "m3i", *published.PUBLISHED, *SETS]
    print(text_table.text_table([row(name, variant(name), memory)[0] for name in names], headers))


if __name__ == "__main__":
    main(sys.argv[1:])

"""FLOPs of a train step of detection by DINO and segmentation by Mask2Former on an InternImage,
computed from shapes alone, and the counts of the traced steps of the paper's Table 2 over them.

    python -m tests.bench.dense_formula                 # all: minutes
    python -m tests.bench.dense_formula objects365

A multiply-add counts as two operations; a trained product costs three times its forward pass, one
whose input needs no gradient twice. Reading maps at places counts four cells for every place, and a
depth-wise convolution tap by tap; the traced step, whose products with zeros are no work of the
model, has neither. It has the matching and the losses at points of Mask2Former, which the formula
leaves out.
"""

import dataclasses
import sys

from m3i_jax import config as configuration
from m3i_jax import schema
from m3i_jax.data import geometry
from m3i_jax.models.dense import denoising
from m3i_jax.reporting import text_table
from tests.bench.figures import Figure

# The runs of Table 2: the canvas of 2000 x 1200 in multiples of 32, crops of 896.
CANVAS = {"dense.maps.composite": "2", "dense.geometry.buckets": "(1216,2016)"}
RUNS: dict[str, tuple[str, dict[str, str]]] = {
    "objects365": ("objects365.py:head=dino,model=internimage_h,multi_scale=True", CANVAS),
    "coco": ("coco.py:head=dino,model=internimage_h,multi_scale=True", CANVAS),
    "ade20k": ("ade20k.py:head=mask2former,model=internimage_h,image_size=896,steps=80000", {}),
}


def cells(c: schema.Config, stride: int) -> int:
    """Cells of a map."""
    side = c.data.image_size
    canvases = geometry.bucket_canvases(c.dense.geometry) or ((side, side),)
    height, width = max(canvases, key=lambda each: each[0] * each[1])
    return -(-height // stride) * -(-width // stride)


def links(c: schema.Config) -> int:
    """Forward multiply-adds of the 1 x 1 convolutions that join the two copies of a backbone."""
    m = c.model.intern_image
    widths = [m.width * 2**stage for stage in range(len(m.depths))]
    strides = [m.stem_strides[0] * m.stem_strides[1] * 2**stage for stage in range(len(m.depths))]
    return sum(
        cells(c, strides[deeper]) * widths[deeper] * widths[stage]
        for deeper in range(len(widths))
        for stage in range(deeper)
    )


def encoder(c: schema.Config) -> tuple[int, int]:
    """Forward multiply-adds of the maps, (all, those whose input needs no gradient), without the
    stem in a second copy."""
    m = c.model.intern_image
    stride = m.stem_strides[0]
    first = cells(c, stride) * 27 * m.width // 2
    stride *= m.stem_strides[1]
    stem = first + cells(c, stride) * 9 * m.width**2 // 2
    total = stem
    for stage, (depth, groups) in enumerate(zip(m.depths, m.groups, strict=True)):
        w = m.width * 2**stage
        products = 2 * w**2 + w * groups * (27 + m.center_scale) + round(2 * m.mlp_ratio * w**2)
        total += depth * cells(c, stride) * (products + 9 * 4 * w + m.kernel**2 * w)
        stride *= 2
        if stage < len(m.depths) - 1:
            total += cells(c, stride) * 9 * w * 2 * w
    if c.dense.maps.composite == 2:
        total += total - stem + links(c)
    return total, first


def deformable_layers(tokens: int, width: int, places: int, hidden: int, heads: int) -> int:
    """A layer of the deformable encoder; places: of a query, over heads, levels and points."""
    products = 2 * width**2 + 3 * places * width + 2 * width * hidden
    return tokens * (products + 4 * places * width // heads)


def dino(c: schema.Config) -> float:
    """A third of the multiply-adds of DINO in training, for one set of maps."""
    s, m = c.dense.detect, c.model.intern_image
    d, own, classes = s.width, s.dino, c.data.classes
    first = m.stem_strides[0] * m.stem_strides[1]
    channels = {first * 2**stage: m.width * 2**stage for stage in range(len(m.depths))}
    total = float(sum(cells(c, n) * channels[n] * d for n in s.strides[:-1]))
    total += cells(c, s.strides[-1]) * 9 * channels[s.strides[-2]] * d
    tokens = sum(cells(c, stride) for stride in s.strides)
    places = own.heads * len(s.strides) * own.sampled
    total += own.encoder_depth * deformable_layers(tokens, d, places, own.hidden, own.heads)
    box = 2 * d**2 + 4 * d
    total += tokens * (d**2 + d * classes) + own.queries * box
    slots = denoising.denoising_slots(own.denoising, c.dense.geometry.max_objects)
    queries = slots + own.queries
    layer = tokens * d**2 + 2 * queries**2 * d  # values; self-attention
    layer += queries * (3 * d**2 + 4 * d**2 + 2 * d**2 + 3 * places * d)
    layer += queries * (2 * d * own.hidden + 4 * places * d // own.heads + d * classes + box)
    # the box that the next layer starts from has no gradient
    return total + own.depth * (layer + queries * box / 3)


def mask2former(c: schema.Config) -> float:
    """A third of the multiply-adds of Mask2Former in training."""
    s, m = c.dense.segment, c.model.intern_image
    d, own, classes = s.width, s.mask2former, c.data.classes
    first = m.stem_strides[0] * m.stem_strides[1]
    channels = {first * 2**stage: m.width * 2**stage for stage in range(len(m.depths))}
    finest, *attending = s.strides
    total = float(sum(cells(c, n) * channels[n] * d for n in s.strides))
    tokens, fine = sum(cells(c, n) for n in attending), cells(c, finest)
    places = own.heads * len(attending) * own.sampled
    total += own.encoder_depth * deformable_layers(tokens, d, places, own.encoder_hidden, own.heads)
    total += fine * 10 * d**2  # the 3 x 3 convolution and the mask features
    q = own.queries
    for layer in range(own.depth):
        n = cells(c, attending[::-1][layer % len(attending)])
        total += 2 * q * d**2 + 2 * n * d**2 + 2 * q * n * d
        total += 4 * q * d**2 + 2 * q**2 * d + 2 * q * d * own.hidden
    return total + (own.depth + 1) * (q * (d * (classes + 1) + 3 * d**2) + fine * d * q)


def step(c: schema.Config) -> float:
    """FLOPs of a train step per image."""
    total, first = encoder(c)
    head = dino(c) if c.task == "detect" else mask2former(c)
    sets = c.dense.maps.composite if c.dense.maps.composite_weight else 1
    return 2.0 * (3 * (total - first) + 2 * first + 3 * sets * head)


def reading(c: schema.Config) -> float:
    """The part of `step` that is no product: reading maps at places, depth-wise convolutions."""
    m = c.model.intern_image
    total = 0.0
    for stage, depth in enumerate(m.depths):
        stride = m.stem_strides[0] * m.stem_strides[1] * 2**stage
        total += depth * cells(c, stride) * (9 * 4 + m.kernel**2) * m.width * 2**stage
    total *= c.dense.maps.composite
    if c.task == "detect":
        s, own, sets = c.dense.detect, c.dense.detect.dino, c.dense.maps.composite
        slots = denoising.denoising_slots(own.denoising, c.dense.geometry.max_objects)
        tokens = sum(cells(c, stride) for stride in s.strides)
        tokens = own.encoder_depth * tokens + own.depth * (slots + own.queries)
        return 6.0 * (total + sets * tokens * 4 * len(s.strides) * own.sampled * s.width)
    masks = c.dense.segment
    tokens = masks.mask2former.encoder_depth * sum(cells(c, n) for n in masks.strides[1:])
    levels = len(masks.strides) - 1
    return 6.0 * (total + tokens * 4 * levels * masks.mask2former.sampled * masks.width)


def settings(name: str) -> schema.Config:
    """One of RUNS, two images a step."""
    from m3i_jax.modes import show

    recipe, changes = RUNS[name]
    config = configuration.load_config(f"configs/transfer/{recipe}")
    configuration.apply_overrides(config, [f"{key}={value}" for key, value in changes.items()])
    done = show.assume_data(configuration.resolve(config))[0]
    return dataclasses.replace(done, train=dataclasses.replace(done.train, batch_size=2))


def counted(c: schema.Config) -> float:
    """Matrix FLOPs of the traced step per image, without rematerialisation."""
    import jax

    from m3i_jax import parallel
    from m3i_jax.modes import monitoring
    from m3i_jax.training.trainer import Trainer

    one = Trainer(c, parallel.make_mesh((1, 1, 1), jax.devices()[:1]), 0)
    return monitoring.model_flops(one) / c.train.batch_size


def figures(quick: bool, names: tuple[str, ...] = tuple(RUNS)) -> list[Figure]:
    out = []
    for name in names[-1:] if quick else names:
        c = settings(name)
        a, b = counted(c), step(c)
        note = f"{a / 1e12:.2f} TFLOP an image"
        out.append(
            Figure(f"FLOPs of Table 2's step over the formula: {name}", a / b, 1.01, note=note)
        )
    return out


if __name__ == "__main__":
    rows = figures(False, tuple(sys.argv[1:]) or tuple(RUNS))
    print(
        text_table.text_table([row.cells for row in rows], ("figure", "measured", "target", "", ""))
    )

"""Settings of the detection head dino."""

import dataclasses

from m3i_jax.schema.limits import DEPTH, EVERY, HEADS, SHARE, WIDTH, NumberLimit, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dino:
    """The head dino; its width is `dense.detect.width`. The defaults are those of its authors;
    InternImage's detectors have other denoising (noise of 1.0; H: 1000 queries), heads of their own
    for every layer, and no biases in the projections."""

    queries: int = option(
        900, "boxes that are predicted per image; at least `dense.geometry.max_objects`", EVERY
    )
    heads: int = option(8, "attention heads of both transformers; they divide the width", HEADS)
    sampled: int = option(4, "places per level that a head of deformable attention reads", EVERY)
    encoder_depth: int = option(6, "layers of the encoder", DEPTH)
    depth: int = option(6, "layers of the decoder", DEPTH)
    hidden: int = option(2048, "width of the hidden layers of both transformers", WIDTH)
    shared_heads: bool = option(
        True, "one class and one box head for all layers of the decoder, instead of one per layer"
    )
    projection_bias: bool = option(True, "biases of the convolutions that read the maps")
    denoising: int = option(
        100,
        "pairs of noised objects per image that the decoder restores in training, in as many groups"
        " of all objects as fit (InternImage-H: 1000); 0: none",
        NumberLimit(0, 100_000),
    )
    label_noise: float = option(
        0.25, "share of the noised objects that begin with the embedding of a random class", SHARE
    )
    box_noise: float = option(
        0.4,
        "largest move of a corner of a restored box, in half sides; twice that for boxes to be"
        " rejected (InternImage: 1.0)",
        NumberLimit(0, 10),
    )
    nms: float = option(
        1.0, "IoU above which a lower detection of the same class is dropped; 1: none is", SHARE
    )
    remat: bool = option(
        False, "compute the layers of both transformers again in the backward pass"
    )

"""Dense tasks: how an encoder makes maps, how annotated images become batches, and the heads of
segmentation and detection. The defaults are ViTDet's Mask R-CNN on COCO and mmsegmentation's
UperNet on ADE20k; recipes in configs/transfer set what differs."""

import dataclasses

from m3i_jax.schema.limits import (
    DEPTH,
    EVERY,
    HEADS,
    SHARE,
    STD,
    WEIGHT,
    WIDTH,
    ListLimit,
    NumberLimit,
    option,
    section,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dino:
    """The head dino; its width is `dense.detect.width`. The defaults are those of its authors;
    InternImage's detectors have other denoising (noise of 1.0; H: 1000 pairs of noised objects),
    heads of their own for every layer, and no biases in the projections."""

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
        1.0, "IoU above which a lower detection of the same class is dropped; 1: all stay", SHARE
    )
    remat: bool = option(
        False, "compute the layers of both transformers again in the backward pass"
    )


# Values of dense.detect.head and dense.segment.head; models/dense/task_heads.py adds those that
# other packages register.
DETECTION_HEADS = ["mask_rcnn", "dino", "mask2former"]
SEGMENTATION_HEADS = ["upernet", "linear", "mask2former"]

SIDES = NumberLimit(1, 2**16)
OPEN_BLOCKS = NumberLimit(0, 1024, count=ListLimit(most=64, rising=True, unique=True, open=True))
LEVELS = ListLimit(fewest=1, most=8, rising=True, unique=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Maps:
    """The maps of the encoder. All but the last two apply to the ViT only."""

    window: int = option(
        0,
        "side in patches of the windows of local attention; 0: all blocks are global",
        NumberLimit(0, 4096),
    )
    global_blocks: tuple[int, ...] = option(
        (),
        "blocks with global attention where dense.maps.window is set (ViTDet-B: 2, 5, 8, 11)",
        OPEN_BLOCKS,
    )
    relative: str = option(
        "none",
        "relative positions in attention; decomposed: by row and column (ViTDet); table: one bias"
        " per offset and head (BEiT, mmsegmentation)",
        "none",
        "decomposed",
        "table",
    )
    blocks: tuple[int, ...] = option(
        (),
        "blocks whose outputs become maps, one per stride of the pyramid; (): the last block for"
        " all (mmsegmentation's ViT-B: 3, 5, 7, 11)",
        OPEN_BLOCKS,
    )
    layer_scale: float = option(
        0.0, "initial layer scale of both branches of a block; 0: no layer scale (BEiT: 1)", STD
    )
    image_size: int = option(
        0,
        "side in pixels of the pre-training images, to which the position table belongs; 0: that of"
        " `data.image_size`",
        NumberLimit(0, 2**16),
    )
    composite: int = option(
        1,
        "copies of the encoder; 2: CBNet: maps of the first feed the stages of the second, whose"
        " maps heads read",
        NumberLimit(1, 2),
    )
    composite_weight: float = option(
        0.5, "weight of the losses on the maps of the first of two copies; 0: none", WEIGHT
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Resizing, cropping and flipping of annotated images on the host."""

    rule: str = option(
        "jitter",
        "jitter: scale by a uniform factor so that the image fits data.image_size times it"
        " (large-scale jitter, ViTDet); range: by `long` and `short` times the factor"
        " (mmsegmentation); buckets: to fit the canvas of the batch (DINO)",
        "jitter",
        "range",
        "buckets",
    )
    buckets: tuple[int, ...] = option(
        (),
        "rule buckets, detection: height, width, height, width, ... of canvases in pixels, one of"
        " which every batch has at random; a step is compiled for each",
        NumberLimit(32, 2**16, count=ListLimit(fewest=0, most=32, open=True)),
    )
    crop_p: float = option(
        0.0,
        "rule buckets: probability that a random window of the image is resized in the place of the"
        " whole (DETR and its successors: 0.5)",
        SHARE,
    )
    crop_short: tuple[int, ...] = option(
        (400, 500, 600),
        "rule buckets: short sides in pixels, to one of which the image is resized before a window"
        " is drawn",
        NumberLimit(1, 2**16, count=ListLimit(fewest=1, most=32)),
    )
    crop_sides: tuple[int, ...] = option(
        (384, 600),
        "rule buckets: smallest and largest side in pixels of the window, whose height and width"
        " are drawn by themselves",
        NumberLimit(1, 2**16, count=ListLimit(fewest=2, most=2, rising=True)),
    )
    test_short: int = option(
        0,
        "detection: limit of the short side of an image at evaluation, in pixels, beside that of"
        " the long one by data.image_size (DINO: 800); 0: none",
        NumberLimit(0, 2**16),
    )
    scale: tuple[float, ...] = option(
        (0.1, 2.0),
        "smallest and largest random scale factor",
        NumberLimit(0.01, 100, count=ListLimit(fewest=2, most=2, rising=True)),
    )
    long: int = option(
        2048, "rule range: limit of the long side in pixels, times the factor", SIDES
    )
    short: int = option(
        512, "rule range: limit of the short side in pixels, times the factor", SIDES
    )
    flip_p: float = option(0.5, "probability of a horizontal flip", SHARE)
    category_share: float = option(
        1.0,
        "segmentation: a crop is drawn again, up to ten times, until no category has more than this"
        " share of its labelled pixels (mmsegmentation: 0.75); 1: no such rule",
        SHARE,
    )
    photometric: bool = option(
        False, "brightness, contrast, saturation and hue as in mmsegmentation, on the device"
    )
    max_objects: int = option(
        100,
        "objects per image of a batch; more are cut and counted (LVIS: 300)",
        NumberLimit(1, 10_000),
    )
    mask_size: int = option(
        112, "side of the stored mask of an object, in the frame of its box", NumberLimit(1, 1024)
    )
    repeat: float = option(
        0.0,
        "images with categories rarer than this share of the images are repeated by"
        " sqrt(threshold / share) (LVIS: 0.001); 0: none",
        SHARE,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask2Former:
    """The head mask2former of segmentation and of detection; its width is `dense.segment.width` or
    `dense.detect.width`. The defaults are those of its authors for ADE20k at a width of 256;
    InternImage-H has a width of 1024, 32 attention heads, hidden layers of 4096 and 200 queries."""

    queries: int = option(100, "masks that are predicted per image", EVERY)
    heads: int = option(8, "attention heads of both transformers; they divide the width", HEADS)
    sampled: int = option(
        4, "places per level that an attention head of the pixel decoder reads", EVERY
    )
    encoder_depth: int = option(6, "layers of the pixel decoder", NumberLimit(0, 1024))
    encoder_hidden: int = option(1024, "width of the hidden layers of the pixel decoder", WIDTH)
    depth: int = option(9, "layers of the masked decoder", DEPTH)
    hidden: int = option(2048, "width of the hidden layers of the masked decoder", WIDTH)
    max_classes: int = option(
        64,
        "segmentation: categories per image that have a mask in the loss; the smallest of more are"
        " cut and counted",
        EVERY,
    )
    points: int = option(
        12_544, "points per mask in the matching and in the losses of masks", EVERY
    )
    oversample: float = option(
        3.0, "candidates per point, of which the least certain are taken", NumberLimit(1, 100)
    )
    uncertain: float = option(
        0.75, "share of the points that are the least certain candidates; the others are new", SHARE
    )
    class_weight: float = option(2.0, "weight of the classification loss and cost", WEIGHT)
    mask_weight: float = option(5.0, "weight of the masks' cross-entropy and its cost", WEIGHT)
    dice_weight: float = option(5.0, "weight of the dice loss and its cost", WEIGHT)
    none_weight: float = option(
        0.1, "weight of queries without a mask in the classification loss", SHARE
    )
    remat: bool = option(
        False, "compute the layers of both transformers again in the backward pass"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """Semantic segmentation."""

    head: str = option(
        "upernet",
        "upernet: pyramid pooling and FPN; linear: one linear layer on the last map; mask2former:"
        " masks and their categories from learned queries; or a registered head",
        SEGMENTATION_HEADS,
    )
    strides: tuple[int, ...] = option(
        (4, 8, 16, 32),
        "strides of the maps that the head reads, in pixels; upernet pools the coarsest, and"
        " mask2former makes its masks at the finest",
        NumberLimit(1, 4096, count=LEVELS),
    )
    width: int = option(768, "channels of the head (mmsegmentation's default: 512)", WIDTH)
    pool_scales: tuple[int, ...] = option(
        (1, 2, 3, 6),
        "sides of the pooled maps of the pyramid pooling module",
        NumberLimit(1, 64, count=LEVELS),
    )
    aux_width: int = option(
        256, "channels of the auxiliary head; 0: no auxiliary head", NumberLimit(0, 2**20)
    )
    aux_weight: float = option(0.4, "weight of the auxiliary loss", WEIGHT)
    dropout: float = option(
        0.1,
        "share of the channels that are dropped before the classifier",
        NumberLimit(0, 1, natural=True, below=True),
    )
    classifier_std: float = option(
        0.01,
        "standard deviation of the classifiers' first values (mmsegmentation: 0.01, with which a"
        " head of tens of channels hardly moves for the first hundred steps)",
        STD,
    )
    divide_by: str = option(
        "all",
        "divisor of the pixel loss: all pixels, ignored ones included (mmsegmentation), or the"
        " labelled ones",
        "all",
        "labelled",
    )
    norm_momentum: float = option(
        0.1, "share of the new statistics in batch norm's running ones", SHARE
    )
    mask2former: Mask2Former = section(Mask2Former)
    test_stride: int = option(
        0,
        "stride in pixels of the sliding window of evaluation; 0: half of data.image_size",
        NumberLimit(0, 2**16),
    )
    test_whole: int = option(
        0,
        "evaluate whole images, resized to sides that are multiples of this many pixels; 0: in"
        " sliding windows",
        NumberLimit(0, 2**16),
    )
    test_scales: tuple[float, ...] = option(
        (1.0,),
        "scale factors of the images at evaluation, whose predictions are averaged",
        NumberLimit(0.1, 10, count=ListLimit(fewest=1, most=32, unique=True)),
    )
    test_flip: bool = option(
        False, "average with the predictions of the mirrored images at evaluation"
    )
    test_average: str = option(
        "auto",
        "what is averaged over scales and mirrored images; auto: probabilities, which for the masks"
        " of mask2former are the sums over its queries, as they are (its authors'); softmax: the"
        " softmax also of those sums, which are resized instead of the masks (mmsegmentation,"
        " InternImage)",
        "auto",
        "softmax",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Detect:
    """Detection, and with mask_rcnn and mask2former instance segmentation, on a pyramid of maps."""

    head: str = option(
        "mask_rcnn",
        "mask_rcnn: proposals from anchors, boxes and masks (ViTDet); dino: boxes from queries, by"
        " deformable attention; mask2former: masks from queries, and the boxes around them; or a"
        " registered head",
        DETECTION_HEADS,
    )
    strides: tuple[int, ...] = option(
        (4, 8, 16, 32, 64),
        "strides of the pyramid in pixels; each is twice the one before (dino with four levels: 8"
        " to 64; mask2former: 4 to 32)",
        NumberLimit(1, 4096, count=LEVELS),
    )
    anchor_sizes: tuple[int, ...] = option(
        (32, 64, 128, 256, 512),
        "side of the square anchor of each stride, in pixels",
        NumberLimit(1, 2**16, count=LEVELS),
    )
    anchor_ratios: tuple[float, ...] = option(
        (0.5, 1.0, 2.0),
        "height over width of the anchors",
        NumberLimit(0.01, 100, count=LEVELS),
    )
    width: int = option(256, "channels of pyramid and heads", WIDTH)
    rpn_convs: int = option(2, "3 x 3 convolutions of the region proposal network", DEPTH)
    rpn_samples: int = option(
        256, "anchors per image in the loss, at most half of them foreground", EVERY
    )
    proposals: tuple[int, ...] = option(
        (2000, 1000),
        "candidates per level, and proposals per image after suppression, in training",
        NumberLimit(1, 10**6, count=ListLimit(fewest=2, most=2)),
    )
    test_proposals: tuple[int, ...] = option(
        (1000, 1000),
        "candidates per level, and proposals per image after suppression, at evaluation",
        NumberLimit(1, 10**6, count=ListLimit(fewest=2, most=2)),
    )
    rpn_nms: float = option(
        0.7, "IoU above which a lower proposal of the same level is dropped", SHARE
    )
    rois: int = option(512, "proposals per image in the losses of the heads", EVERY)
    roi_foreground: float = option(0.25, "largest share of foreground among these proposals", SHARE)
    box_convs: int = option(4, "3 x 3 convolutions of the box head", NumberLimit(0, 1024))
    box_hidden: int = option(1024, "width of the box head's hidden layer", WIDTH)
    masks: bool = option(True, "predict masks; dino does not, mask2former always does")
    mask_convs: int = option(4, "3 x 3 convolutions of the mask head", NumberLimit(0, 1024))
    loss: str = option(
        "softmax",
        "classification; softmax over categories and background (COCO; dino: sigmoid focal loss),"
        " or a sigmoid loss of some categories per image, federated (LVIS)",
        "softmax",
        "federated",
    )
    federated_classes: int = option(
        50,
        "federated loss: categories kept per image, background included (detectron2 on LVIS: 50)",
        EVERY,
    )
    score_threshold: float = option(
        0.05, "lowest score of a detection (LVIS: 0.02; dino: 0)", SHARE
    )
    nms: float = option(
        0.5, "IoU above which a lower detection of the same category is dropped", SHARE
    )
    candidates: int = option(
        2048, "scored boxes per image that enter suppression (LVIS: 4096); cuts are counted", EVERY
    )
    detections: int = option(100, "detections per image (LVIS and dino: 300)", EVERY)
    canonical: tuple[int, ...] = option(
        (224, 16),
        "(side, stride) in pixels: a box of this side is read at this stride",
        NumberLimit(1, 2**16, count=ListLimit(fewest=2, most=2)),
    )
    dino: Dino = section(Dino)
    mask2former: Mask2Former = section(Mask2Former)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DensePrediction:
    """Segmentation and detection."""

    maps: Maps = section(Maps)
    geometry: Geometry = section(Geometry)
    segment: Segment = section(Segment)
    detect: Detect = section(Detect)

"""Settings of the data: sources, curation, and the cutting, masking and augmentation of views."""

import dataclasses
import re

from m3i_jax.errors import UserError
from m3i_jax.schema.limits import (
    LINE,
    PATH,
    SHARE,
    STD,
    ListLimit,
    NumberLimit,
    TextLimit,
    option,
    section,
)

VIEWS = NumberLimit(
    0,
    1,
    natural=True,
    count=ListLimit(
        fewest=2, most=3, names="input view, target view, and small views if they differ from it"
    ),
)
OPEN_VIEWS = dataclasses.replace(VIEWS, count=dataclasses.replace(VIEWS.count, open=True))
OPEN_SHARE = dataclasses.replace(SHARE, open=-1)
RGB = ListLimit(fewest=3, most=3, names="of R, G and B")
TWO = ListLimit(fewest=2, most=2, rising=True)

# Values of data.source; data/sources/registry.py adds those that other packages register.
SOURCES = [
    "shapes",
    "folder",
    "tars",
    "array_record",
    "tfds",
    "hugging_face",
    "mixture",
    "coco",
    "maps",
    "scenes",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """Photometric augmentation, applied on the device. Pairs are (input view, target view), as in
    SiameseIM."""

    jitter_p: float = option(
        0.8, "probability of colour jitter; -1: from the length (training/scaling.py)", OPEN_SHARE
    )
    brightness: float = option(0.4, "brightness factor range, 1 +- this", STD)
    contrast: float = option(0.4, "contrast factor range, 1 +- this", STD)
    saturation: float = option(0.2, "saturation factor range, 1 +- this", STD)
    hue: float = option(
        0.1,
        "hue shift range in turns, +- this, at most 0.5",
        NumberLimit(0, 0.5, natural=True, text="turns"),
    )
    grayscale_p: float = option(
        0.2, "probability of grayscale; -1: from the length (training/scaling.py)", OPEN_SHARE
    )
    blur_p: tuple[float, ...] = option(
        (1.0, 0.1),
        "probability of Gaussian blur: input view, target view, and small views where they differ"
        " from it; (): from the length",
        OPEN_VIEWS,
    )
    blur_sigma: tuple[float, ...] = option(
        (0.1, 2.0),
        "range of the blur's sigma in pixels; (): in proportion to image_size, 2 pixels at 224",
        NumberLimit(1e-3, 100, count=ListLimit(fewest=2, most=2, rising=True, open=True)),
    )
    solarize_p: tuple[float, ...] = option(
        (0.0, 0.2),
        "probability of solarization: input view, target view, and small views where they differ"
        " from it; (): from the length",
        OPEN_VIEWS,
    )
    erase_p: float = option(
        0.0,
        "probability that a box of the normalised input view is replaced by noise"
        " (fine-tuning: 0.25); -1: from the length of the run (training/scaling.py)",
        OPEN_SHARE,
    )
    mixup: float = option(
        0.0,
        "alpha of mixup's Beta distribution, form finetune only; 0: no mixup (fine-tuning: 0.8)",
        STD,
    )
    cutmix: float = option(
        0.0,
        "alpha of CutMix's Beta distribution, form finetune only; 0: no CutMix (fine-tuning: 1)",
        STD,
    )
    cutmix_switch: float = option(
        0.5, "probability of CutMix when mixup and CutMix are both on", SHARE
    )
    blend_p: float = option(
        1.0,
        "probability that mixup or CutMix is applied to a pair of images; -1: from the"
        " length of the run (training/scaling.py)",
        OPEN_SHARE,
    )
    mean: tuple[float, ...] = option(
        (0.485, 0.456, 0.406),
        "mean that is subtracted from RGB in 0..1",
        NumberLimit(-1e3, 1e3, count=RGB),
    )
    std: tuple[float, ...] = option(
        (0.229, 0.224, 0.225),
        "standard deviation that divides RGB in 0..1 after the mean is subtracted",
        NumberLimit(1e-3, 1e3, count=RGB),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandAugment:
    """RandAugment for fine-tuning, applied on the host; ops=2 gives rand-m9-mstd0.5-inc1."""

    ops: int = option(0, "operations per view; 0: off", NumberLimit(0, 100))
    p: float = option(
        0.5,
        "probability of each operation; -1: from the length of the run (training/scaling.py)",
        OPEN_SHARE,
    )
    magnitude: float = option(
        9.0, "mean magnitude of an operation, 0..10", NumberLimit(0, 10, natural=True)
    )
    deviation: float = option(0.5, "standard deviation of the magnitude", NumberLimit(0, 100))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Source of the records and how they become pairs of views."""

    source: str = option(
        "shapes",
        "kind of data source",
        SOURCES,
    )
    path: str = option(
        "",
        "directory (folder, array_record, hugging_face, coco, maps), glob of tar files (tars; gs://"
        " and similar URLs too) or name (tfds)",
        PATH,
    )
    directory: str = option(
        "", "tfds: directory of the prepared data sets; empty: the default of TFDS", PATH
    )
    mixture: tuple[str, ...] = option(
        (),
        "mixture: one KIND:PATH[@SPLIT[|HELD_OUT]][=WEIGHT] per source; without weights: in"
        " proportion to the number of images",
        PATH,
    )
    class_space: str = option(
        "shared",
        "classes of a mixture; shared: classes of equal WordNet id, or of equal name in a source"
        " without ids, are one class; separate: each source keeps its own classes",
        "shared",
        "separate",
    )
    class_names: str = option(
        "",
        "file of class names, for WordNet ids or numbers; empty: search beside an ImageNet folder",
        PATH,
    )
    index: str = option(
        "",
        "directory of the indices of tar files and other sources, which runs may share; empty:"
        " WORKDIR/index",
        PATH,
    )
    keep: tuple[str, ...] = option(
        (),
        "keep-list, a Parquet or Arrow file with the columns key and, optionally, weight, caption"
        " and label: only these records are read; of a mixture one per source, all for none",
        PATH,
    )
    split: str = option(
        "",
        "training split: sub-folder, glob below a directory of tars, or split name (tfds,"
        " hugging_face); empty: all records",
        PATH,
    )
    holdout_split: str = option(
        "",
        "held-out split for evaluators, written like data.split, or another path; empty:"
        " data.holdout applies",
        PATH,
    )
    annotations: str = option(
        "",
        "coco: JSON file of the training annotations, absolute or below data.path",
        PATH,
    )
    holdout_annotations: str = option(
        "",
        "coco: JSON file of the held-out annotations; empty: data.holdout applies",
        PATH,
    )
    map_unlabelled: int = option(
        0,
        "maps: number of pixels without a class; 0: classes are numbered from 1, and 255 is"
        " unlabelled too (ADE20K); 255: classes are numbered from 0 (VOC, Cityscapes' train ids)",
        0,
        255,
    )
    size: int = option(
        0,
        "images to render (shapes, scenes); of other sources a number to plan with, held-out images"
        " included where data.holdout applies, which --mode=show and compile take in the place of"
        " ImageNet's and a run counts; 0: counted",
        NumberLimit(0, 2**40),
    )
    image_size: int = option(224, "side of a view in pixels [P]", NumberLimit(1, 8192))
    classes: int = option(
        -1, "categories; -1: as many as the source has, 0: ignore labels", NumberLimit(-1, 2**24)
    )
    captions: str = option(
        "auto", "use captions; auto: if the source has them", "auto", "yes", "no"
    )
    regions: bool = option(
        False,
        "also make texts of annotated objects, box and name, for decoders of captions (LocCa); of a"
        " source with objects, such as coco",
    )
    holdout: float = option(
        0.1,
        "share of the images held out for evaluators, chosen by a hash of the record key",
        NumberLimit(0, 1, natural=True, below=True, text="(all images would be held out)"),
    )
    crop_scale: tuple[float, ...] = option(
        (0.08, 1.0),
        "area of a random resized crop as a share of the image; (): from length and"
        " image_size (training/scaling.py)",
        NumberLimit(0, 1, natural=True, above=True, count=dataclasses.replace(TWO, open=True)),
    )
    small_views: tuple[str, ...] = option(
        (),
        "groups of views beside the two of image_size and crop_scale, for objectives that read"
        " them, each COUNT x PIXELS at SHARE-SHARE of the image (DINOv2: 8 x 98 at 0.05-0.32)",
        TextLimit("line", most=60, count=ListLimit(most=8)),
    )
    crop_ratio: tuple[float, ...] = option(
        (0.75, 4 / 3), "aspect ratio of a crop, log-uniform", NumberLimit(0.01, 100, count=TWO)
    )
    flip_p: float = option(0.5, "probability of a horizontal flip, drawn per view", SHARE)
    mask_ratio: float = option(
        0.5, "share of the mask cells that show the partner image [P]", SHARE
    )
    mask: str = option(
        "blockwise",
        "distribution of the masks [P: blockwise]; multi_block: visible cells and target blocks of"
        " I-JEPA; inverse_block: one visible block (CAPI)",
        "blockwise",
        "uniform",
        "multi_block",
        "inverse_block",
    )
    mask_blocks: int = option(
        4, "multi_block: target blocks of an image (I-JEPA: 4)", NumberLimit(1, 16)
    )
    mask_block_share: float = option(
        0.175,
        "multi_block: area of a target block as a share of the view (I-JEPA: 0.15 to 0.2)",
        NumberLimit(0, 1, natural=True, above=True, below=True),
    )
    mask_cell: int = option(
        0,
        "side of a mask cell in pixels, a multiple of model.encoder.patch_size; 0: one"
        " patch [P: 16]",
        NumberLimit(0, 8192),
    )
    tokenizer: str = option(
        "train",
        "train: learn a BPE vocabulary from the source's captions; clip: CLIP's BPE",
        "train",
        "clip",
    )
    vocabulary: str = option(
        "",
        "clip: path of bpe_simple_vocab_16e6.txt.gz; empty: search the installed packages"
        " that ship it",
        PATH,
    )
    vocabulary_size: int = option(
        1024,
        "train: maximum size of the learned vocabulary",
        NumberLimit(259, 2**20, text="(all bytes, padding, start and end are 259)"),
    )
    caption_length: int = option(
        77,
        "length in tokens to which captions are padded or truncated, start and end tokens included",
        NumberLimit(4, 2**14, text="(start, end and two words are 4)"),
    )
    background: int = option(
        255,
        "gray level that replaces transparent pixels",
        NumberLimit(0, 255, natural=True, text="(a gray level)"),
    )
    resizer: str = option(
        "auto",
        "library that crops and resizes: pillow; fast (extra `fast`, almost equal pixels);"
        " auto: fast if installed",
        "auto",
        "pillow",
        "fast",
    )
    threads: int = option(
        2,
        "threads that prefetch batches when data.workers is 0; evaluation, figures and features"
        " decode with them in any case",
        NumberLimit(0, 1024),
    )
    workers: int = option(0, "worker processes that build batches", NumberLimit(0, 1024))
    patience: float = option(
        600.0,
        "seconds to wait for a batch before its threads or worker are restarted as hung",
        NumberLimit(0, 1e7, above=True),
    )
    missing: str = option(
        "stop",
        "when a file of the source can no longer be read: stop, or replace its records as"
        " bad records",
        "stop",
        "replace",
    )
    max_bad_share: float = option(
        0.05, "stop when more than this share of the last 10,000 records was bad", SHARE
    )
    augment: Augment = section(Augment)
    rand_augment: RandAugment = section(RandAugment)


_GROUP = re.compile(r"(\d{1,3}) ?x ?(\d{1,4}) at (\d?\.?\d{1,6}) ?- ?(\d?\.?\d{1,6})")
MOST = 64  # small views of an image


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewGroup:
    """Views of one size.

    Attributes:
      count: views of an image.
      size: side in pixels.
      scale: range of the area of their crops as a share of the image.
    """

    count: int
    size: int
    scale: tuple[float, float]

    def __str__(self) -> str:
        return f"{self.count} x {self.size} at {self.scale[0]:g}-{self.scale[1]:g}"


def parse_view_group(text: str, key: str = "config.data.small_views") -> ViewGroup:
    """Returns the group that an entry of `data.small_views` describes.

    Raises:
      UserError: it is no such entry, or its shares are none.

    >>> print(parse_view_group("8x98 at .05-.32"))
    8 x 98 at 0.05-0.32
    """
    found = _GROUP.fullmatch(text.strip())
    if not found:
        raise UserError(
            f"{key}: {text[:60]!r} is not a group of views; write COUNT x PIXELS at SHARE-SHARE,"
            " such as 8 x 98 at 0.05-0.32"
        )
    count, size = int(found[1]), int(found[2])
    try:
        low, high = float(found[3]), float(found[4])
    except ValueError:
        low = high = -1.0
    if not 0 < low <= high <= 1:
        raise UserError(
            f"{key}: {text[:60]!r} cuts crops from {found[3]} to {found[4]} of an image; give two"
            " shares above 0 and up to 1, the smaller first"
        )
    if not 1 <= count <= MOST or size < 1:
        raise UserError(
            f"{key}: {text[:60]!r} has {count} views of {size} pixels; 1 to {MOST} of at least one"
            " pixel work"
        )
    return ViewGroup(count=count, size=size, scale=(low, high))


_COUNT = NumberLimit(0, 2**31 - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curate:
    """Filters of `--mode=curate`, which writes a keep-list (`data.keep`). Images that cannot be
    decoded are always left out."""

    min_side: int = option(0, "smallest shorter side in pixels; 0: any", _COUNT)
    max_aspect: float = option(
        0.0,
        "largest longer side over the shorter one; 0: any",
        NumberLimit(0, 1e6, natural=True),
    )
    min_words: int = option(0, "fewest words of a caption; 0: a caption may be missing", _COUNT)
    max_words: int = option(0, "most words of a caption; 0: any", _COUNT)
    min_sharpness: float = option(
        0.0,
        "smallest standard deviation of the Laplacian of the gray values 0..255, at no more than"
        " 128 pixels of the shorter side; 0: any",
        NumberLimit(0, 1e4, natural=True),
    )
    min_entropy: float = option(
        0.0,
        "fewest bits of entropy of the histogram of gray values; 0: any",
        NumberLimit(0, 8, natural=True),
    )
    scores: str = option(
        "",
        "Parquet or Arrow file, or a directory of them, with the column key and numbers, such as"
        " the similarity of image and caption in the metadata of LAION",
        PATH,
    )
    least: tuple[str, ...] = option(
        (),
        "smallest scores that are kept, COLUMN=NUMBER; a record without a score is left out",
        LINE,
    )
    duplicates: str = option(
        "crops",
        "which copies of one another are left out: exact (equal files), near (after re-encoding or"
        " resizing) or crops (also after cropping)",
        "none",
        "exact",
        "near",
        "crops",
    )
    distance: int = option(
        12, "bits of 64 in which perceptual hashes of candidates differ at most", NumberLimit(0, 32)
    )
    difference: float = option(
        0.2,
        "largest squared difference of the thumbnails of copies, over their variance",
        NumberLimit(0, 2, natural=True),
    )
    detail: float = option(
        0.2,
        "largest such difference of the parts of a copy at 64 pixels; 0: copies are not compared at"
        " that size, which reads them again",
        NumberLimit(0, 1e3, natural=True),
    )
    against: tuple[str, ...] = option(
        (),
        "evaluation sets KIND:PATH[@SPLIT], of which no copy or crop is kept, whatever"
        " curate.duplicates is",
        PATH,
    )
    features: str = option(
        "",
        "npz of --mode=features of the same source: images with like features are left out too",
        PATH,
    )
    similarity: float = option(
        0.96, "cosine from which features are alike", NumberLimit(0, 1, natural=True, above=True)
    )
    neighbours: str = option(
        "auto",
        "how like features are found; approximate: by faiss, which misses some; auto: exactly up to"
        " 50,000 images",
        "auto",
        "exact",
        "approximate",
    )

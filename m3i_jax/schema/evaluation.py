"""Settings of evaluations, comparisons and reports."""

import dataclasses

from m3i_jax.schema.limits import (
    EVERY,
    INT32,
    LINE,
    MANY,
    NAME,
    RATE,
    TEMPERATURE,
    ListLimit,
    NumberLimit,
    TextLimit,
    option,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Evaluations of the features, at intervals during training and by --mode=eval."""

    knn: bool = option(True, "k-nearest-neighbour accuracy of frozen features, if there are labels")
    linear: bool = option(
        False,
        "accuracy of a linear classifier fitted to the same features by L-BFGS, if there"
        " are labels",
    )
    retrieval: bool = option(
        True,
        "recall of images by caption and of captions by image, with all captions of an image, if"
        " there are captions and a text term",
    )
    caption_lines: bool = option(
        False, "retrieval: each line of a text is a caption, as in CLIP_benchmark's tar files"
    )
    direct: bool = option(
        True,
        "accuracy of the pre-trained category head, if there is a category term",
    )
    zero_shot: bool = option(
        True,
        "accuracy of class names used as captions, if there are labels, captions and a text term",
    )
    few_shot: bool = option(
        False, "accuracy of least squares on a few images per class, if there are labels"
    )
    probe: bool = option(
        False,
        "accuracy of the linear probe of Table 9 (batch norm and LARS) on features of views"
        " without augmentation, if there are labels",
    )
    attentive: bool = option(
        False, "accuracy of an attentive probe of the frozen tokens, if there are labels"
    )
    embedding: bool = option(
        True,
        "figure in WORKDIR/pictures at the end of a run: nearest neighbours and a 2-D map"
        " of the held-out images",
    )
    attention: bool = option(
        True, "figure: attention maps and dense features of some held-out images"
    )
    confusion: bool = option(
        True, "figure: confusion matrix of `direct`, or of `knn` without a category head"
    )
    examples: bool = option(True, "figure: some images with their `zero_shot` predictions")
    detection: bool = option(True, "average precision of boxes and masks (task detect)")
    segmentation: bool = option(True, "mIoU of class maps (task segment)")
    detection_figures: bool = option(
        True, "figures of detection: curves, table and confusion of the classes, worst images"
    )
    segmentation_figures: bool = option(
        True, "figures of segmentation: table and confusion of the classes, worst images"
    )
    encoder: str = option(
        "online",
        "parameters to evaluate: the trained ones, or their EMA (the target)",
        "online",
        "ema",
    )
    features: str = option(
        "auto",
        "image feature; attention: M3I's pooling; mean: of the patch tokens; cls: the cls token;"
        " auto: attention if the objective trains it, cls if it compares images by cls alone (as in"
        " dino), else mean",
        "auto",
        "attention",
        "mean",
        "cls",
    )
    train_limit: int = option(50_000, "maximum number of training images in the index", EVERY)
    query_limit: int = option(10_000, "maximum number of held-out query images", EVERY)
    batch_size: int = option(256, "images per device step", MANY)
    crop: float = option(
        0.875,
        "share of the short side that the central crop keeps (224 of 256 pixels); 1 for"
        " CLIP's zero-shot protocol",
        NumberLimit(0, 1, natural=True, above=True, text="(a share of the short side)"),
    )
    interpolation: str = option(
        "bicubic",
        "how images are resized for the central crop: a filter of Pillow, antialiased but for"
        " nearest",
        "bicubic",
        "bilinear",
        "lanczos",
        "box",
        "hamming",
        "nearest",
    )
    squash: bool = option(
        False,
        "resize both sides to the length of the short side, so that images become squares, as for"
        " SigLIP",
    )
    k: int = option(20, "number of neighbours that vote", EVERY)
    temperature: float = option(
        0.07, "temperature of the votes, exp(similarity / temperature)", TEMPERATURE
    )
    templates: tuple[str, ...] = option(
        ("7",),
        "prompt sets for zero-shot: 7 or 80 (CLIP's), or files with one template a line",
        TextLimit("path", count=ListLimit(fewest=1, unique=True, names="7, 80 or a file")),
    )
    shots: tuple[int, ...] = option(
        (1, 5, 10, 25),
        "images per class of the few-shot evaluation",
        NumberLimit(1, INT32, count=ListLimit(fewest=1, most=100, unique=True)),
    )
    shot_seeds: int = option(
        3,
        "random draws of few-shot images, over which the accuracy is averaged",
        NumberLimit(1, 1000),
    )
    probe_lr: float = option(
        3.2,
        "peak learning rate of the linear probe at batch size 16,384, scaled linearly with"
        " smaller batches [P]",
        RATE,
    )
    probe_epochs: int = option(90, "epochs of the linear probe [P]", NumberLimit(1, 10**6))
    probe_warmup: int = option(
        10, "epochs of the linear probe's warm-up [P]", NumberLimit(0, 10**6)
    )
    probe_batch: int = option(
        16_384, "features per step of the linear probe, or all if there are fewer [P]", MANY
    )
    attentive_lr: float = option(1e-3, "peak learning rate of the attentive probe", RATE)
    attentive_epochs: int = option(20, "epochs of the attentive probe", NumberLimit(1, 10**6))
    attentive_limit: int = option(
        5_000,
        "maximum number of training images of the attentive probe, whose tokens are kept in memory",
        EVERY,
    )
    map: str = option(
        "pca",
        "method of the 2-D map: principal components, or t-SNE (extra: maps)",
        "pca",
        "tsne",
    )
    neighbours: int = option(8, "nearest neighbours shown per image", NumberLimit(1, 1000))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """--mode=compare: one run per objective, all other settings equal, under one budget."""

    forms: tuple[str, ...] = option(
        ("mim", "sim", "instance", "m3i"),
        "objectives to compare, each one or more names joined by +",
        TextLimit(
            "name",
            most=1000,
            count=ListLimit(fewest=1, unique=True, names="objectives, such as mim,mim+clip,m3i"),
        ),
    )
    budget: str = option(
        "images",
        "budget that all runs share: images seen; matrix FLOPs of the model; or time of steps,"
        " measured on these devices before the first run. The first objective has the length that"
        " the settings say",
        "images",
        "flops",
        "time",
    )
    seeds: int = option(
        1, "runs per objective, with the seeds seed, seed + 1, ...", NumberLimit(1, 1000)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    tensorboard: bool = option(False, "also write TensorBoard events (extra: tensorboard)")
    wandb: str = option("", "also log to this Weights & Biases project (extra: wandb)", NAME)
    private: bool = option(
        True,
        "files of the run are readable by their owner alone (0600, 0700); false: the umask decides",
    )
    panel_rows: int = option(4, "mixed inputs per panel", NumberLimit(1, 1024))
    mfu: float = option(
        0.45,
        "share of the accelerators' peak that --mode=show, compile and data assume",
        NumberLimit(0, 1, natural=True, above=True, text="(a share of the peak)"),
    )
    beside: tuple[str, ...] = option(
        (),
        "working directories whose curves are drawn beside this run's in report.html",
        TextLimit("path", count=ListLimit(unique=True)),
    )
    peak_tflops: float = option(
        0.0,
        "peak dense TFLOP/s of one chip, the reference of perf/mfu; 0: by the kind of chip",
        NumberLimit(0, 1e6),
    )
    profile_steps: int = option(
        5,
        "steps in a profiler trace (--mode=profile, or SIGUSR1 sent to a run)",
        NumberLimit(1, 10_000),
    )
    licence: str = option("", "licence of the weights, for the model card of --mode=export", LINE)
    survey: int = option(
        20_000,
        "records that --mode=data inspects: all of a source of up to this size, else this"
        " many, evenly spread",
        NumberLimit(1, 2**40),
    )

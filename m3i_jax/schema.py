"""Every setting of a run, as frozen keyword-only dataclasses. The tree here *is* the configuration:
`config.default_config()` turns it into a ConfigDict, `config.resolve()` turns a ConfigDict back
into it and checks it, `--help` prints it. Defaults are the paper's ViT-B/16 run (Table 7) unless
the comment says otherwise; `[P]` marks what the paper states, the README lists what it leaves
open."""

import dataclasses  # noqa: I001 - a line a name would be a page

from m3i_jax.schema_augment import Augment, RandAugment
from m3i_jax.setting_limits import BELOW_ONE, DEPTH, EPOCHS, EPS, EVERY, HEADS, INT32, LINE, MANY, NAME, PATH, RATE, RATIO, SECONDS, SHARE, STD, STEPS, TEMPERATURE, WEIGHT, WIDTH, ListLimit, TextLimit, NumberLimit, option, section  # fmt: skip

TWO = ListLimit(fewest=2, most=2, rising=True)
STAGES = ListLimit(fewest=4, most=4)
NAMES = TextLimit("name", most=1000, count=ListLimit(most=100, unique=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Where records come from and how they become view pairs."""

    source: str = option(
        "shapes",
        "kind of source",
        "shapes",
        "folder",
        "tars",
        "array_record",
        "tfds",
        "hugging_face",
        "mixture",
    )
    path: str = option(
        "",
        "directory (folder, array_record, hugging_face), glob of tar files (tars; gs:// and the"
        " like too), name (tfds)",
        PATH,
    )
    directory: str = option("", "tfds: where prepared data sets lie; empty: its default", PATH)
    mixture: tuple[str, ...] = option(
        (),
        "mixture: one KIND:PATH[@SPLIT[|HELD_OUT]][=WEIGHT] a source; no weights: by number of"
        " pictures",
        PATH,
    )
    class_space: str = option(
        "shared",
        "classes of a mixture: of the same name are one, or each source's apart",
        "shared",
        "separate",
    )
    class_names: str = option(
        "",
        "file with names of the classes, for WordNet ids or numbers; empty: look beside an ImageNet"
        " folder",
        PATH,
    )
    split: str = option(
        "",
        "part to train on: sub-folder, glob below a directory of tars, or name (tfds,"
        " hugging_face); empty: all",
        PATH,
    )
    holdout_split: str = option(
        "",
        "part held out for evaluators, named like data.split, or another path; empty: data.holdout",
        PATH,
    )
    size: int = option(
        0,
        "training images; shapes: how many to render, else 0: count the source",
        NumberLimit(0, 2**40),
    )
    image_size: int = option(224, "side of a view in pixels [P]", NumberLimit(1, 8192))
    classes: int = option(
        -1, "categories; -1: as many as the source has, 0: ignore labels", NumberLimit(-1, 2**24)
    )
    captions: str = option(
        "auto", "use captions; auto: if the source has them", "auto", "yes", "no"
    )
    holdout: float = option(
        0.1,
        "share of the images held out for evaluators, by hash of the key",
        NumberLimit(0, 1, natural=True, below=True, text="(nothing would be left to train on)"),
    )
    crop_scale: tuple[float, ...] = option(
        (0.08, 1.0),
        "area of a random resized crop as a share of the image; (): from length and image_size"
        " (training/scaling.py)",
        NumberLimit(0, 1, natural=True, above=True, count=dataclasses.replace(TWO, open=True)),
    )
    crop_ratio: tuple[float, ...] = option(
        (0.75, 4 / 3), "aspect ratio of a crop, log-uniform", NumberLimit(0.01, 100, count=TWO)
    )
    flip_p: float = option(0.5, "probability of a horizontal flip, each view by itself", SHARE)
    mask_ratio: float = option(0.5, "share of the cells that show the partner image [P]", SHARE)
    mask: str = option("blockwise", "how masks are drawn [P: blockwise]", "blockwise", "uniform")
    mask_cell: int = option(
        0,
        "side of a mask cell in pixels, a multiple of model.encoder.patch_size; 0: that of a patch"
        " [P: 16]",
        NumberLimit(0, 8192),
    )
    tokenizer: str = option(
        "train", "train: BPE learnt from the source's captions; clip: CLIP's BPE", "train", "clip"
    )
    vocabulary: str = option(
        "",
        "clip: path of bpe_simple_vocab_16e6.txt.gz; empty: an installed package that ships it",
        PATH,
    )
    vocabulary_size: int = option(
        1024,
        "train: most entries of the learnt vocabulary",
        NumberLimit(259, 2**20, text="(all bytes, padding, start and end are 259)"),
    )
    caption_length: int = option(
        77,
        "tokens a caption is padded or cut to, start and end included",
        NumberLimit(4, 2**14, text="(start, end and two words are 4)"),
    )
    background: int = option(
        255,
        "gray level under transparent pixels",
        NumberLimit(0, 255, natural=True, text="(a gray level)"),
    )
    resizer: str = option(
        "auto",
        "of the crops: pillow; fast (extra `fast`), hardly other pixels; auto: fast if installed",
        "auto",
        "pillow",
        "fast",
    )
    threads: int = option(
        2, "threads that make batches ahead, when there are no workers", NumberLimit(0, 1024)
    )
    workers: int = option(0, "worker processes that make batches", NumberLimit(0, 1024))
    patience: float = option(
        600.0,
        "seconds that a batch may take before its threads or worker count as hanging and are"
        " started again",
        NumberLimit(0, 1e7, above=True),
    )
    missing: str = option(
        "stop",
        "files that cannot be read any more: stop, or replace their records as bad ones",
        "stop",
        "replace",
    )
    max_bad_share: float = option(
        0.05, "stop when more than this share of the last 10,000 records was bad", SHARE
    )
    augment: Augment = section(Augment)
    rand_augment: RandAugment = section(RandAugment)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """The encoder whose features are the product. Patch size, width and drop path are those of any
    backbone, the others of the ViT."""

    patch_size: int = option(
        16, "side of a patch, the pixels of one dense feature [P]", NumberLimit(1, 4096)
    )
    width: int = option(768, "width of the dense features", WIDTH)
    depth: int = option(12, "ViT: blocks", DEPTH)
    heads: int = option(12, "ViT: attention heads; must divide width", HEADS)
    mlp_ratio: float = option(4.0, "ViT: hidden width of the MLP over width", RATIO)
    drop_path: float = option(0.1, "stochastic depth rate [P; InternImage-H: 0.2]", BELOW_ONE)
    drop_path_rule: str = option(
        "linear",
        "linear: from 0 to the rate; uniform: the rate everywhere [P: linear; InternImage-H:"
        " uniform]",
        "linear",
        "uniform",
    )
    cls_token: bool = option(True, "ViT: prepend a learned token")
    positions: str = option(
        "sincos",
        "ViT: fixed, row or column first (MAE); or learned",
        "sincos",
        "sincos_columns",
        "learned",
    )
    embedding_norm: bool = option(False, "ViT: LayerNorm before the first block (CLIP)")
    final_norm: bool = option(False, "ViT: LayerNorm after the last block")
    norm_eps: float = option(
        1e-6,
        "ViT: epsilon of the layer norms (timm, MAE: 1e-6; Hugging Face ViT: 1e-12; CLIP: 1e-5)",
        EPS,
    )
    activation: str = option(
        "gelu",
        "ViT: of the MLP: exact GELU, its tanh form (Google), CLIP's",
        "gelu",
        "gelu_tanh",
        "quick_gelu",
    )
    freeze: bool = option(False, "keep all of the encoder as it is: probes train the head alone")
    position_grid: int = option(
        0,
        "ViT: patches a side for which fixed positions are made and then resized to the grid of the"
        " views; 0: theirs",
        NumberLimit(0, 4096),
    )
    freeze_patch_embed: bool = option(True, "ViT: keep the patch embedding at its initial values")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InternImage:
    """The convolutional backbone of the paper's largest run; the defaults are InternImage-H. Its
    dense features are as wide as `model.encoder.width`, one for `model.encoder.patch_size` pixels:
    the stride of the last but one stage, where the last two are fused, or of the last, whose map
    they are then, with 8 * width channels."""

    width: int = option(
        320,
        "channels of the first of four stages; each next has twice as many",
        NumberLimit(2, 2**16, text="(the stem starts with half of it)"),
    )
    depths: tuple[int, ...] = option(
        (6, 6, 32, 6), "layers of the four stages", NumberLimit(1, 1024, count=STAGES)
    )
    groups: tuple[int, ...] = option(
        (10, 20, 40, 80),
        "DCNv3 groups of the four stages; must divide their channels",
        NumberLimit(1, 2**16, count=STAGES),
    )
    norm: str = option(
        "res_post",
        "pre: x + f(n(x)); post: x + n(f(x)); res_post: x + n'(f(n(x)))",
        "pre",
        "post",
        "res_post",
    )
    layer_scale: float = option(
        0.0, "first value of the learned factor of every branch; 0: there is none", STD
    )
    offset_scale: float = option(
        1.0, "factor of DCNv3's points and offsets", NumberLimit(0, 1e3, above=True)
    )
    kernel: int = option(
        5, "side of the depth-wise convolution before offsets and masks; odd", NumberLimit(1, 63)
    )
    center_scale: bool = option(True, "DCNv3 mixes in the undisplaced centre by a learned share")
    extra_norm: int = option(
        6, "stage 3 has a norm after every so many layers; 0: none", NumberLimit(0, 1024)
    )
    mlp_ratio: float = option(4.0, "hidden width of the MLP over width", RATIO)
    stem_strides: tuple[int, ...] = option(
        (2, 2),
        "strides of the stem's two convolutions",
        NumberLimit(1, 64, count=ListLimit(fewest=2, most=2)),
    )
    mlp_std: float = option(
        0.02,
        "deviation of the MLP's first matrices; 0: 1 / sqrt(inputs), for nets so narrow that 0.02"
        " is nothing",
        STD,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """Predicts dense targets from an image's own visible tokens and one query a target position."""

    width: int = option(768, "token width [P]", WIDTH)
    depth: int = option(4, "blocks [P]", DEPTH)
    heads: int = option(16, "attention heads [P]; must divide width", HEADS)
    mlp_ratio: float = option(4.0, "hidden width of the MLP over width [P: 3072]", RATIO)
    norm: str = option(
        "layer",
        "layer; batch: statistics of the batch's tokens, as in SiameseIM's code",
        "layer",
        "batch",
    )
    projector_depth: int = option(
        0,
        "blocks between embedding and decoder, which the target encoder has too; 0 [P];"
        " SiameseIM: 2",
        NumberLimit(0, 1024),
    )
    cls: str = option(
        "auto",
        "whether the decoder reads the cls token; auto: unless two images share it",
        "auto",
        "yes",
        "no",
    )
    positions: str = option(
        "relative",
        "of the queries; absolute: the plain table, MAE's, for same-view targets alone",
        "relative",
        "absolute",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
    """Pooling of an image's own tokens, before the category and the text projection."""

    kind: str = option(
        "attention",
        "attention [P]; mean of the patch tokens; the cls token",
        "attention",
        "mean",
        "cls",
    )
    query: str = option(
        "mean", "query of the attention: the mean token, or a learned one", "mean", "learned"
    )
    width: int = option(768, "output width [P]", WIDTH)
    heads: int = option(16, "attention heads [P]; must divide the encoder's width", HEADS)
    norm: str = option(
        "layer",
        "of mean and cls: layer norm; batch: by the batch's statistics, without scale and offset"
        " (linear probes)",
        "layer",
        "batch",
    )
    std: float = option(0.02, "deviation of its first matrices; 0: 1 / sqrt(inputs)", STD)
    projection: bool = option(
        True,
        "linear map to the output width; without it the pooled token itself is the output (MAE's"
        " fine-tuning)",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """Projector and predictor of global targets; how many layers they have is the method's."""

    hidden: int = option(4096, "width of the hidden layers (MoCo v3, BYOL: 4096)", WIDTH)
    width: int = option(256, "output width (MoCo v3, BYOL: 256)", WIDTH)
    prototypes: int = option(
        1024, "prototypes of a method that has them (MSN: 1024)", NumberLimit(1, 2**24)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """The text tower, BERT-Base in size [P], trained from scratch."""

    width: int = option(768, "token width [P]", WIDTH)
    depth: int = option(12, "blocks [P]", DEPTH)
    heads: int = option(12, "attention heads [P]; must divide width", HEADS)
    mlp_ratio: float = option(4.0, "hidden width of the MLP over width [P: 3072]", RATIO)
    embed: int = option(768, "width of the joint image-text space", WIDTH)
    pool: str = option("first", "token that stands for the caption", "first", "last", "mean")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    backbone: str = option(
        "vit",
        "kind of the encoder: vit, intern_image (made of model.intern_image), or a registered one",
        NAME,
    )
    encoder: Encoder = section(Encoder)
    intern_image: InternImage = section(InternImage)
    decoder: Decoder = section(Decoder)
    pool: Pool = section(Pool)
    head: Head = section(Head)
    text: Text = section(Text)
    dtype: str = option(
        "bfloat16",
        "precision of matrix products; parameters, norms, softmax and losses stay float32",
        "bfloat16",
        "float32",
    )
    scan: bool = option(
        False, "run the blocks in one lax.scan: compile time does not grow with depth"
    )
    remat: str = option(
        "none",
        "what the backward computes again: nothing; all but matrix products; all but a few named"
        " tensors a block, or two; blocks in full",
        "none",
        "dots",
        "names",
        "half",
        "full",
    )
    keep_gathered: bool = option(
        False,
        "on a mesh with an fsdp axis keep a block's gathered weights for the backward, or gather"
        " them again (remat=none keeps them)",
    )

    category_std: float = option(
        0.0,
        "deviation of the first category weights; 0: Xavier (fine-tuning: 2e-5, linear probe:"
        " 0.01)",
        STD,
    )

    @property
    def pooled(self) -> int:
        """Width of a pooled image."""
        return self.pool.width if self.pool.projection else self.encoder.width


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """Which terms of the mutual information are maximised, and how they are weighed."""

    forms: tuple[str, ...] = option(
        ("m3i",),
        "names or letters of objectives, see objective/registry; several train together",
        NAMES,
    )
    second_moment: float = option(
        0.02,
        "weight of the anti-collapse term p'Cp of the dense posterior; 0 is the paper's text alone",
        WEIGHT,
    )
    temperature: float = option(
        0.2,
        "of the Boltzmann posterior over the batch, where the method does not fix it (MoCo v3:"
        " 0.2)",
        TEMPERATURE,
    )
    intra_positions: str = option(
        "all", "target positions of the same view that count", "all", "hidden"
    )
    label_smoothing: float = option(0.1, "of the category posterior [P]", SHARE)
    soft_label: str = option(
        "separate",
        "of a mixed input: a category for each image from its own tokens; joint: both from all"
        " tokens",
        "separate",
        "joint",
    )
    isolate: bool = option(
        False, "the two images of a mixed input do not attend to each other (MixMAE)"
    )
    pairing: str = option(
        "flip",
        "flip: every image plays both roles, B mixed inputs; halves: one role each, B / 2",
        "flip",
        "halves",
    )
    symmetric: bool = option(False, "add every self-supervised term with its two views exchanged")
    target_encoder: str = option(
        "method",
        "of learned targets: as the method says, or for all of them",
        "method",
        "ema",
        "shared",
        "frozen",
    )
    target_checkpoint: str = option(
        "", "directory of a run whose encoder is the frozen target", PATH
    )
    annotation_input: str = option(
        "shared",
        "in a set, category and caption are predicted from: the self-supervised input, or a whole"
        " view of their own",
        "shared",
        "own",
    )
    equal_captions: str = option(
        "negatives",
        "captions of a batch that are the same text: negatives of each other, or not",
        "negatives",
        "ignored",
    )
    text_softmax: str = option(
        "batch", "negatives of the text posterior with microbatches", "batch", "microbatch"
    )
    text_chunk: int = option(
        0,
        "captions compared with all images at once, so that no B x B matrix is made; 0: all",
        STEPS,
    )
    second_group: tuple[str, ...] = option(
        ("category", "text"),
        "names of the terms that lambda scales; the others are the first group",
        NAMES,
    )
    weighting: str = option(
        "dynamic",
        "dynamic: lambda from the gradient norms (Eq. 13); fixed: lambda = gamma [P: dynamic]",
        "dynamic",
        "fixed",
    )
    gamma: float = option(1.0, "ratio of the second group's gradient to the first's [P]", RATE)
    balance_decay: float = option(0.99, "decay of the average of the gradient norms", BELOW_ONE)
    balance_range: tuple[float, ...] = option(
        (0.0, 1e4), "lambda is clipped to this range", NumberLimit(0, 1e12, count=TWO)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Init:
    """What is taken from `init_from`."""

    weights: str = option(
        "online",
        "the trained parameters there, or their momentum average, where there is one",
        "online",
        "ema",
    )
    only: tuple[str, ...] = option(
        (),
        "patterns of the paths here that are taken, such as ^encoder/; empty: all that are there",
        TextLimit("pattern", most=1000),
    )
    strict: bool = option(
        False, "refuse if anything that is wanted is missing there, or of another shape"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim:
    rule: str = option(
        "adamw", "of the updates: AdamW, or LARS of linear probes with momentum b1", "adamw", "lars"
    )
    lr: float = option(
        1e-3,
        "peak learning rate [P]; 0: from batch and length (training/scaling.py)",
        dataclasses.replace(RATE, open=0),
    )
    min_lr: float = option(0.0, "learning rate at the end of the cosine", WEIGHT)
    warmup_epochs: float = option(
        40.0,
        "epochs of linear warm-up, unless warmup_steps is set [P]; -1: a tenth of the run",
        dataclasses.replace(EPOCHS, open=-1),
    )
    warmup_steps: int = option(
        -1, "steps of linear warm-up; -1: from warmup_epochs", NumberLimit(-1, INT32)
    )
    weight_decay: float = option(
        0.1,
        "AdamW's decoupled decay [P]; not of biases, norms, tokens, position tables, logit scale",
        WEIGHT,
    )
    b1: float = option(0.9, "AdamW beta 1 [P]", BELOW_ONE)
    b2: float = option(0.95, "AdamW beta 2 [P]", BELOW_ONE)
    eps: float = option(1e-8, "AdamW epsilon", EPS)
    clip: float = option(1.0, "global gradient norm is clipped to this; 0: not clipped", WEIGHT)
    encoder_lr: float = option(
        1.0, "factor of the learning rate of the encoder; the heads keep the whole one", SHARE
    )
    layer_decay: float = option(
        1.0,
        "factor of the learning rate from a layer of the encoder to the one below it; 1: none; 0:"
        " from the length (training/scaling.py)",
        SHARE,
    )
    offset_lr: float = option(
        0.1, "factor of the learning rate of DCNv3's offsets (InternImage)", SHARE
    )
    center_lr: float = option(
        1.0,
        "factor of the learning rate of DCNv3's centre scale (InternImage fine-tunes with 0.1)",
        SHARE,
    )
    fan_in_lr: int = option(
        0,
        "a matrix of more inputs than this has the learning rate times this over its inputs (muP:"
        " steps of Adam add up); 0: all the same",
        STEPS,
    )
    skip_spikes: float = option(
        0.0,
        "skip a step whose loss or gradient norm is so many deviations above the median of the last"
        " 128; 0: none; 6 is rare",
        WEIGHT,
    )
    ema: float = option(
        0.995,
        "first momentum of the target encoder [P]; -1: from batch and length (training/scaling.py)",
        dataclasses.replace(SHARE, open=-1),
    )
    ema_of: str = option(
        "targets",
        "the EMA keeps what targets are made with, or all parameters (fine-tuning)",
        "targets",
        "all",
    )
    ema_schedule: str = option(
        "cosine", "of the momentum: cosine to 1 [P], or constant", "cosine", "constant"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    batch_size: int = option(
        4096, "images a step; each plays the role i and the role j once [P]", MANY
    )
    microbatches: int = option(
        1, "parts a step is computed in, with the same result", NumberLimit(1, 2**20)
    )
    round_batch: bool = option(
        False,
        "a batch_size that does not divide into pairs on the devices is rounded up and said, not"
        " refused",
    )
    epochs: float = option(
        1600.0, "passes over the training images, unless steps is set [P]", EPOCHS
    )
    steps: int = option(0, "optimizer steps; 0: from epochs", STEPS)
    log_every: int = option(50, "steps between lines of metrics", EVERY)
    save_every: int = option(1000, "steps between checkpoints", EVERY)
    keep: int = option(2, "checkpoints kept", EVERY)
    panel_every: int = option(5000, "steps between panels; 0: none", STEPS)
    eval_every: int = option(5000, "steps between evaluations; 0: only before and after", STEPS)
    watchdog: float = option(
        1800.0,
        "seconds without a sign of life after which the stacks of all threads are written; 0: not"
        " watched",
        SECONDS,
    )
    watchdog_first: float = option(
        7200.0, "the same until the first step of a process has ended, which compiles", SECONDS
    )
    watchdog_abort: int = option(
        0, "end the process after so many such reports in a row; 0: only report", STEPS
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """What is measured of the features: at intervals while training, and by --mode=eval."""

    knn: bool = option(
        True, "k-nearest-neighbour accuracy on frozen features, where there are labels"
    )
    linear: bool = option(
        False,
        "accuracy of a linear classifier on the same features, fitted by L-BFGS, where there are"
        " labels",
    )
    retrieval: bool = option(
        True,
        "recall of images by caption and of captions by image, where there are captions and a text"
        " term",
    )
    direct: bool = option(
        True,
        "accuracy of the category head itself, nothing trained on top, where there is a category"
        " term",
    )
    zero_shot: bool = option(
        True,
        "accuracy of class names as captions, where there are labels, captions and a text term",
    )
    few_shot: bool = option(
        False, "accuracy of least squares on a few images a class, where there are labels"
    )
    probe: bool = option(
        False,
        "linear probe of Table 9, batch norm and LARS, on features of clean views, where there are"
        " labels",
    )
    attentive: bool = option(
        False, "accuracy of an attentive probe of the frozen tokens, where there are labels"
    )
    embedding: bool = option(
        True,
        "drawn in WORKDIR/pictures when a run is done: nearest neighbours and a map of the held-out"
        " pictures",
    )
    attention: bool = option(
        True, "drawn too: attention, and dense features in colours, of some held-out pictures"
    )
    confusion: bool = option(
        True, "drawn too: which classes `direct`, or else `knn`, takes for which"
    )
    examples: bool = option(True, "drawn too: some images and what `zero_shot` sees in them")
    encoder: str = option(
        "online",
        "parameters that are evaluated: the trained ones, or their EMA, the target",
        "online",
        "ema",
    )
    features: str = option(
        "auto",
        "attention: M3I's pooling; mean: of the patch tokens; auto: attention where the objective"
        " trains it",
        "auto",
        "attention",
        "mean",
    )
    train_limit: int = option(50_000, "most training images in the index", EVERY)
    query_limit: int = option(10_000, "most held-out images asked", EVERY)
    batch_size: int = option(256, "pictures a device step", MANY)
    crop: float = option(
        0.875,
        "share of the short side that a view keeps (224 of 256 pixels); 1 for CLIP's zero-shot"
        " protocol",
        NumberLimit(0, 1, natural=True, above=True, text="(a share of the short side)"),
    )
    k: int = option(20, "neighbours that vote", EVERY)
    temperature: float = option(0.07, "of the votes, exp(similarity / temperature)", TEMPERATURE)
    templates: tuple[str, ...] = option(
        ("7",),
        "sets of prompts for zero-shot: 7 or 80 (CLIP's), or files with a template a line",
        TextLimit("path", count=ListLimit(fewest=1, unique=True, names="7, 80 or a file")),
    )
    shots: tuple[int, ...] = option(
        (1, 5, 10, 25),
        "pictures a class of the few-shot evaluation",
        NumberLimit(1, INT32, count=ListLimit(fewest=1, most=100, unique=True)),
    )
    shot_seeds: int = option(3, "draws of them that are averaged", NumberLimit(1, 1000))
    probe_lr: float = option(
        3.2,
        "peak learning rate of the linear probe for a batch of 16,384, else in proportion [P]",
        RATE,
    )
    probe_epochs: int = option(90, "of the linear probe [P]", NumberLimit(1, 10**6))
    probe_warmup: int = option(10, "epochs of its linear warm-up [P]", NumberLimit(0, 10**6))
    probe_batch: int = option(16_384, "its features a step, or all of fewer [P]", MANY)
    attentive_lr: float = option(1e-3, "peak learning rate of the attentive probe", RATE)
    attentive_epochs: int = option(20, "of the attentive probe", NumberLimit(1, 10**6))
    attentive_limit: int = option(
        5_000, "most training images of the attentive probe, whose tokens lie in memory", EVERY
    )
    map: str = option(
        "pca",
        "2-D map of the embedding report: principal components, or t-SNE (extra: maps)",
        "pca",
        "tsne",
    )
    neighbours: int = option(8, "nearest neighbours shown of an image", NumberLimit(1, 1000))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """--mode=compare: runs of several objectives, all else being equal."""

    forms: tuple[str, ...] = option(
        ("mim", "sim", "instance", "m3i"),
        "objectives to compare, each one or more names joined by +",
        TextLimit(
            "name",
            most=1000,
            count=ListLimit(fewest=1, unique=True, names="objectives, such as mim,mim+clip,m3i"),
        ),
    )
    seeds: int = option(1, "runs of each, with the seeds seed, seed + 1, ...", NumberLimit(1, 1000))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parallel:
    mesh: tuple[int, ...] = option(
        (-1, 1, 1),
        "devices along (replica, fsdp, tensor); one may be -1: the rest",
        NumberLimit(
            -1,
            2**20,
            count=ListLimit(fewest=3, most=3, names="the devices along (replica, fsdp, tensor)"),
        ),
    )
    heartbeat: float = option(
        60.0,
        "seconds without a sign of life after which a host is lost, and all others end; 0: not"
        " watched",
        SECONDS,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    tensorboard: bool = option(False, "also write TensorBoard events (extra: tensorboard)")
    wandb: str = option("", "also log to this Weights & Biases project (extra: wandb)", NAME)
    private: bool = option(
        True,
        "files of the run are readable by their owner alone (0600, 0700); False: as the umask says",
    )
    panel_rows: int = option(4, "mixed inputs a panel", NumberLimit(1, 1024))
    mfu: float = option(
        0.45,
        "share of the accelerators' peak that --mode=show, compile and data plan with",
        NumberLimit(0, 1, natural=True, above=True, text="(a share of the peak)"),
    )
    beside: tuple[str, ...] = option(
        (),
        "working directories whose curves stand beside this run's in report.html",
        TextLimit("path", count=ListLimit(unique=True)),
    )
    peak_tflops: float = option(
        0.0,
        "dense TFLOP/s of one chip, which perf/mfu is measured against; 0: by the kind of the chip",
        NumberLimit(0, 1e6),
    )
    profile_steps: int = option(
        5, "steps of a profiler trace (--mode=profile, or SIGUSR1 to a run)", NumberLimit(1, 10_000)
    )
    licence: str = option("", "licence of the weights, for the model card of --mode=export", LINE)
    survey: int = option(
        20_000,
        "--mode=data looks at all records of a source up to so many, else at so many evenly spread"
        " ones",
        NumberLimit(1, 2**40),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    seed: int = option(0, "of everything random", NumberLimit(0, 2**63 - 1))
    init_from: str = option(
        "",
        "first weights: workdir of a run, or file of timm, Hugging Face ViT or CLIP, MAE,"
        " SiameseIM, Google ViT",
        PATH,
    )
    init: Init = section(Init)
    data: Data = section(Data)
    model: Model = section(Model)
    objective: Objective = section(Objective)
    optim: Optim = section(Optim)
    train: Train = section(Train)
    evaluate: Evaluate = section(Evaluate)
    compare: Compare = section(Compare)
    parallel: Parallel = section(Parallel)
    report: Report = section(Report)

    @property
    def grid(self) -> int:
        """Dense features a side: the patches of the encoder."""
        return self.data.image_size // self.model.encoder.patch_size

    @property
    def tokens(self) -> int:
        """Patches of a view."""
        return self.grid**2

    @property
    def hidden(self) -> int:
        """Patches of a view that show the partner: a fixed number, so that shapes are static."""
        return round(self.data.mask_ratio * (self.grid // self.cell) ** 2) * self.cell**2

    @property
    def cell(self) -> int:
        """Patches a side of a mask cell."""
        return max(self.data.mask_cell // self.model.encoder.patch_size, 1)

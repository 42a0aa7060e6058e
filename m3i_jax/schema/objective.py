"""The terms of the objective and their weights."""

import dataclasses

from m3i_jax.schema.limits import (
    BELOW_ONE,
    PATH,
    RATE,
    SHARE,
    STEPS,
    TEMPERATURE,
    WEIGHT,
    ListLimit,
    NumberLimit,
    TextLimit,
    option,
)

NAMES = TextLimit("name", most=1000, count=ListLimit(most=100, unique=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """The terms of mutual information to maximise, and their weights."""

    forms: tuple[str, ...] = option(
        ("m3i",),
        "names or letters of objectives (objective/registry.py); several are trained together",
        NAMES,
    )
    second_moment: float = option(
        0.02,
        "weight of the anti-collapse term p'Cp of the dense posterior; 0: the paper's text alone",
        WEIGHT,
    )
    temperature: float = option(
        0.2,
        "temperature of the Boltzmann posterior over the batch, where the method does not"
        " fix it (MoCo v3: 0.2)",
        TEMPERATURE,
    )
    intra_positions: str = option(
        "all", "target positions that count when the target is the same view", "all", "hidden"
    )
    label_smoothing: float = option(0.1, "label smoothing of the category posterior [P]", SHARE)
    soft_label: str = option(
        "separate",
        "category prediction of a mixed input; separate: one per image from its own tokens;"
        " joint: both images from all tokens",
        "separate",
        "joint",
    )
    isolate: bool = option(False, "mask attention between the two images of a mixed input (MixMAE)")
    pairing: str = option(
        "flip",
        "flip: every image plays both roles, B mixed inputs; halves: one role each, B / 2"
        " mixed inputs",
        "flip",
        "halves",
    )
    symmetric: bool = option(
        False, "add every self-supervised term again with its two views exchanged"
    )
    target_encoder: str = option(
        "method",
        "encoder of learned targets: the method's choice, or one for all terms",
        "method",
        "ema",
        "shared",
        "frozen",
    )
    prototype_targets: str = option(
        "method",
        "what keeps assignments to prototypes from collapse: the method's choice, centering (DINO)"
        " or sinkhorn (DINOv2)",
        "method",
        "centering",
        "sinkhorn",
    )
    target_temperature: tuple[float, ...] = option(
        (),
        "temperature of the assignments to prototypes that are predicted, at the start of the run"
        " and after its rise; (): the method's",
        dataclasses.replace(TEMPERATURE, count=ListLimit(fewest=2, most=2, open=True)),
    )
    target_temperature_rise: float = option(
        0.3, "share of the run over which this temperature rises (DINOv2: 30 of 100 epochs)", SHARE
    )
    target_checkpoint: str = option(
        "", "directory of the run whose encoder is the frozen target, or the first snapshot", PATH
    )
    snapshot_at: tuple[float, ...] = option(
        (0.5, 0.75),
        "shares of the run at which a target that is a snapshot takes the EMA encoder's parameters;"
        " its terms count from the first on, or from the start with target_checkpoint or init_from"
        " (DINOv3's Gram anchoring)",
        NumberLimit(0, 1, above=True, below=True, count=ListLimit(most=64, unique=True)),
    )
    teachers: tuple[str, ...] = option(
        (),
        "frozen encoders of any architecture and size whose dense features are predicted too:"
        " workdirs, files of weights or Hugging Face directories; each has a linear map of its own",
        TextLimit("path", count=ListLimit(most=16, unique=True)),
    )
    teacher_weight: float = option(
        1.0, "weight of the term of each teacher beside those of the objective", WEIGHT
    )
    annotation_input: str = option(
        "shared",
        "input of category and caption prediction in a combined objective; shared: the"
        " self-supervised input; own: a separate unmasked view",
        "shared",
        "own",
    )
    equal_captions: str = option(
        "negatives",
        "identical captions within a batch: counted as negatives of each other, or ignored",
        "negatives",
        "ignored",
    )
    text_softmax: str = option(
        "batch",
        "negatives of the text posterior when microbatches are used: whole batch or microbatch",
        "batch",
        "microbatch",
    )
    entropy_rows: str = option(
        "batch",
        "rows that entropy terms compare when microbatches are used: whole batch, whose features"
        " are computed twice, or microbatch",
        "batch",
        "microbatch",
    )
    text_chunk: int = option(
        0,
        "captions compared with all images at a time, which avoids a B x B matrix; 0: all",
        STEPS,
    )
    parallel_captions: float = option(
        -1.0,
        "share of the images whose caption tokens are predicted at once, from mask tokens (CapPa:"
        " 0.75); -1: the method's",
        dataclasses.replace(SHARE, open=-1),
    )
    second_group: tuple[str, ...] = option(
        ("category", "text"),
        "names of the terms that lambda scales, text also for those that a decoder of captions"
        " predicts; all other terms form the first group",
        NAMES,
    )
    weighting: str = option(
        "dynamic",
        "dynamic: lambda from the gradient norms (Eq. 13); fixed: lambda = gamma [P: dynamic]",
        "dynamic",
        "fixed",
    )
    gamma: float = option(
        1.0, "target ratio of the second group's gradient norm to the first's [P]", RATE
    )
    balance_decay: float = option(
        0.99, "decay of the moving average of the gradient norms", BELOW_ONE
    )
    balance_range: tuple[float, ...] = option(
        (0.0, 1e4),
        "range to which lambda is clipped",
        NumberLimit(0, 1e12, count=ListLimit(fewest=2, most=2, rising=True)),
    )

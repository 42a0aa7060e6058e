"""Settings of initial weights, optimizer, training loop and mesh."""

import dataclasses

from m3i_jax.schema.limits import (
    BELOW_ONE,
    EPOCHS,
    EPS,
    EVERY,
    INT32,
    MANY,
    RATE,
    SECONDS,
    SHARE,
    STEPS,
    WEIGHT,
    ListLimit,
    NumberLimit,
    TextLimit,
    option,
)

_OFTEN = dataclasses.replace(STEPS, open=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Init:
    """Selection of the parameters that `init_from` initialises."""

    weights: str = option(
        "online",
        "parameters taken from a run: the trained ones, or their moving average if the run has one",
        "online",
        "ema",
    )
    only: tuple[str, ...] = option(
        (),
        "regular expressions of the parameter paths to initialise, such as ^encoder/;"
        " empty: all that init_from has",
        TextLimit("pattern", most=1000),
    )
    strict: bool = option(
        False, "refuse if a selected parameter is missing in init_from or has another shape"
    )


# Values of optim.rule; training/update_rules.py adds those that other packages register.
UPDATE_RULES = ["adamw", "muon", "schedule_free", "lars"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim:
    rule: str = option(
        "adamw",
        "optimizer: AdamW; Muon for the matrices of blocks and AdamW for all else; AdamW without a"
        " schedule, whose average is evaluated (schedule_free); LARS for linear probes, with"
        " momentum b1; or a registered rule",
        UPDATE_RULES,
    )
    muon_momentum: float = option(0.95, "momentum of Muon", BELOW_ONE)
    muon_rms: float = option(
        0.2,
        "root mean square of Muon's updates before the learning rate; 0.2 is about AdamW's, so that"
        " both take the same learning rate",
        NumberLimit(0, 1e3, above=True),
    )
    lr: float = option(
        1e-3,
        "peak learning rate [P]; 0: from batch and length (training/scaling.py)",
        dataclasses.replace(RATE, open=0),
    )
    min_lr: float = option(
        0.0, "learning rate at the end of the run, with schedule cosine or wsd", WEIGHT
    )
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
        "AdamW's decoupled weight decay [P]; biases, norms, LayerScale, tokens, registers, queries,"
        " prototypes, tables of positions and levels, and logit scale are exempt",
        WEIGHT,
    )
    decayed: str = option(
        "matrices",
        "which parameters decay; matrices: not those that weight_decay lists; but_norms: not the"
        " norms of the encoder and of the transformers of heads, its position table, and queries of"
        " masks (detectron2); ranks: those with more than one axis, tokens and tables too, but not"
        " offsets of deformable attention in heads (mmsegmentation, SLIP); kernels: matrices and"
        " convolutions alone, not the table of token embeddings either (big_vision); all: every"
        " parameter (MoCo v3, ViTDet-H)",
        "matrices",
        "but_norms",
        "ranks",
        "kernels",
        "all",
    )
    b1: float = option(0.9, "AdamW beta 1 [P]", BELOW_ONE)
    b2: float = option(0.95, "AdamW beta 2 [P]", BELOW_ONE)
    eps: float = option(1e-8, "AdamW epsilon", EPS)
    schedule: str = option(
        "cosine",
        "learning rate after the warm-up; cosine: to min_lr; wsd: constant, then linear to min_lr"
        " in the last `decay_share` of the run; constant; steps: a tenth from each of `milestones`"
        " on; poly: linear to 0",
        "cosine",
        "wsd",
        "constant",
        "steps",
        "poly",
    )
    decay_share: float = option(
        0.2,
        "schedule wsd: share of the run in which the learning rate falls",
        NumberLimit(0, 1, natural=True, above=True),
    )
    milestones: tuple[float, ...] = option(
        (),
        "schedule steps: shares of the run after which the rate is a tenth (ViTDet on COCO:"
        " 0.8889, 0.963)",
        NumberLimit(0, 1, natural=True, count=ListLimit(most=16, rising=True)),
    )
    warmup_start: float = option(
        0.0, "share of the peak rate at which the warm-up starts (ViTDet: 0.001)", SHARE
    )
    clip: float = option(
        1.0, "global gradient norm above which gradients are clipped; 0: no clipping", WEIGHT
    )
    encoder_lr: float = option(1.0, "learning rate multiplier of the encoder", SHARE)
    layer_decay: float = option(
        1.0,
        "layer-wise learning rate decay: multiplier from one encoder layer to the layer"
        " below; 1: no decay; 0: from the length of the run (training/scaling.py)",
        SHARE,
    )
    offset_lr: float = option(
        0.1, "learning rate multiplier of DCNv3's offsets (InternImage)", SHARE
    )
    head_offset_lr: float = option(
        1.0,
        "learning rate multiplier of the sampling offsets of deformable attention in heads of dense"
        " tasks (InternImage-H: 0.001)",
        SHARE,
    )
    center_lr: float = option(
        1.0,
        "learning rate multiplier of DCNv3's centre scale (0.1 where InternImage is fine-tuned with"
        " layer decay)",
        SHARE,
    )
    fan_in_lr: int = option(
        0,
        "matrices with more inputs than this have their learning rate multiplied by this /"
        " inputs (muP: steps of Adam add up); 0: off",
        STEPS,
    )
    freeze_prototypes: float = option(
        0.0,
        "share of the run in which prototypes stay at their first values while their moments go on"
        " (DINO: the first epoch of 100)",
        SHARE,
    )
    skip_spikes: float = option(
        0.0,
        "skip a step whose loss or gradient norm lies this many standard deviations above"
        " the median of the last 128 steps; 0: off; at 6, skips are rare",
        WEIGHT,
    )
    ema: float = option(
        0.995,
        "initial momentum of the target encoder [P]; -1: from batch and length"
        " (training/scaling.py)",
        dataclasses.replace(SHARE, open=-1),
    )
    ema_of: str = option(
        "targets",
        "parameters in the EMA: those that targets need, or all (fine-tuning)",
        "targets",
        "all",
    )
    ema_schedule: str = option(
        "cosine", "schedule of the EMA momentum: cosine to 1 [P], or constant", "cosine", "constant"
    )

    @property
    def averages(self) -> bool:
        """Whether the EMA moves: with a momentum of 1 it stays at the initial parameters."""
        return self.ema < 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    batch_size: int = option(
        4096, "images per step; each plays the role i and the role j once [P]", MANY
    )
    microbatches: int = option(
        1,
        "parts into which a step is divided to save memory; the result is the same, but for batch"
        " norms and the losses that compare the images of a batch (objective/README.md)",
        NumberLimit(1, 2**20),
    )
    round_batch: bool = option(
        False,
        "round up a batch_size that does not divide into pairs on the devices, with a log"
        " line, instead of refusing it",
    )
    epochs: float = option(
        1600.0, "passes over the training images, unless steps is set [P]", EPOCHS
    )
    steps: int = option(0, "optimizer steps; 0: from epochs", STEPS)
    log_every: int = option(50, "steps between lines of metrics", EVERY)
    save_every: int = option(1000, "steps between checkpoints", EVERY)
    keep: int = option(2, "number of checkpoints to keep", EVERY)
    panel_every: int = option(
        5000,
        "steps between panels; 0: no panels; -1: from the length (training/scaling.py)",
        _OFTEN,
    )
    eval_every: int = option(
        5000,
        "steps between evaluations; 0: only before and after; -1: from the length"
        " (training/scaling.py)",
        _OFTEN,
    )
    watchdog: float = option(
        1800.0,
        "seconds without progress after which the stacks of all threads are logged; 0: off",
        SECONDS,
    )
    watchdog_first: float = option(
        7200.0,
        "value of train.watchdog until a process has finished its first step, which compiles; 0:"
        " no watchdog at all",
        SECONDS,
    )
    watchdog_abort: int = option(
        0, "end the process after this many consecutive watchdog reports; 0: never", STEPS
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parallel:
    mesh: tuple[int, ...] = option(
        (-1, 1, 1),
        "devices along (replica, fsdp, tensor); one may be -1: the remaining devices",
        NumberLimit(
            -1,
            2**20,
            count=ListLimit(fewest=3, most=3, names="the devices along (replica, fsdp, tensor)"),
        ),
    )
    heartbeat: float = option(
        60.0,
        "seconds without a heartbeat after which a host counts as lost and all others end; 0: off",
        SECONDS,
    )

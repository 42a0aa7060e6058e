"""The rows of the small tables (`tests.bench.tables`): which objectives a run trains one after the
other, and with which settings."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training of a run.

    Attributes:
      form: names of objectives joined by +, as in `configs/toy.py`.
      share: of the steps of the run.
      continues: whether the initial weights are those of the stage before.
      taught: whether the targets are features of the stage before, frozen.
    """

    form: str
    share: float = 1.0
    continues: bool = False
    taught: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
      title: of the row, and of the directories of its runs.
      stages: trained one after the other.
      settings: changes from the settings of the image set.
      steps: of all stages together; 0: as the protocol says.
      method: the row of the search whose settings it takes; "": `title`.
    """

    title: str
    stages: tuple[Stage, ...]
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    steps: int = 0
    method: str = ""

    @property
    def searched(self) -> str:
        return self.method or self.title

    @property
    def unaltered(self) -> str:
        """The title without the changes of a command line."""
        return self.title.partition(" (")[0]


def _single(title: str, form: str, **more: object) -> Row:
    return Row(title, (Stage(form),), **more)  # type: ignore[arg-type]


def _by_title(*rows: Row) -> dict[str, Row]:
    return {row.title: row for row in rows}


UNTRAINED = "untrained"  # M3I's initial weights; a step at this rate moves nothing
_INITIAL = _single(UNTRAINED, "m3i", settings={"optim.lr": "1e-12"}, steps=1, method="M3I")

SINGLE_STAGE = _by_title(
    _single("M3I", "m3i"),
    _single("M3I without mix", "m3i_unmixed"),
    _single("supervised", "supervised"),
    _single("CLIP", "weakly_supervised"),
    _single("SiameseIM", "siamese_im"),
    _single("MAE", "mae"),
    _INITIAL,
)

# Three stages, each with a third of the steps: CLIP; masked images with CLIP's features as targets,
# from new weights; then the categories (the order of EVA's and BEiT-3's public recipes).
CHAIN = Row(
    "CLIP, then MIM, then supervised",
    (
        Stage("weakly_supervised", 1 / 3),
        Stage("mim", 1 / 3, taught=True),
        Stage("supervised", 1 / 3, continues=True),
    ),
)

# The annotations that M3I reads, without its self-supervised terms.
ANNOTATIONS = _single("supervised and CLIP", "supervised+weakly_supervised")

METHODS = _by_title(
    SINGLE_STAGE["M3I"],
    SINGLE_STAGE["supervised"],
    SINGLE_STAGE["CLIP"],
    ANNOTATIONS,
    SINGLE_STAGE["M3I without mix"],
    _single("sim", "sim"),
    _single("mim", "mim"),
    SINGLE_STAGE["MAE"],
    CHAIN,
    _INITIAL,
)

# The other rows of the paper's Table 3.
FORMS = _by_title(
    *(
        _single(form, form)
        for form in (
            "auto_encoder",
            "dense_distillation",
            "global_distillation",
            "mim_pixel",
            "mim_global",
            "novel_view",
            "dense_instance",
            "instance",
            "sim_pixel",
            "sim_global",
            "siamese_im",
        )
    )
)


def _variant(title: str, form: str = "m3i", **settings: str) -> Row:
    named = {key.replace("__", "."): value for key, value in settings.items()}
    return Row(f"M3I, {title}", (Stage(form),), named, method="M3I")


ABLATIONS = _by_title(
    SINGLE_STAGE["M3I"],
    SINGLE_STAGE["M3I without mix"],
    _variant("fixed weight", objective__weighting="fixed"),
    _variant("gamma 1", objective__gamma="1.0"),
    _variant("gamma 10", objective__gamma="10.0"),
    _variant("a quarter of the partner", data__mask_ratio="0.25"),
    _variant("mask cells of two patches", data__mask_cell="12"),
    _variant("symmetric", objective__symmetric="true"),
    _variant("no second moment", objective__second_moment="0.0"),
    _variant("half as many mixed inputs", objective__pairing="halves"),
    _variant("momentum 0.99", optim__ema="0.99"),
    _variant("momentum 0.95", optim__ema="0.95"),
)

# Crops for methods that compare views of one image; smaller than 0.1 they show little of a drawing.
_MULTI_CROP = {
    "data.crop_scale": "0.32,1.0",
    "data.small_views": "4 x 24 at 0.1-0.32",
}

# Methods of the years since, with M3I and its initial weights, and M3I on encoders of today.
RECENT = _by_title(
    SINGLE_STAGE["M3I"],
    *(
        _single(form, form)
        for form in (
            *("dinov2", "siglip", "siglip2", "lejepa", "dino", "ibot", "ijepa", "capi"),
            *("dinov2+dinov3_gram", "vicreg", "simdino", "tips", "cap", "cappa", "coca", "locca"),
        )
    ),
    *(
        _single(f"{form}, multi-crop", form, settings=_MULTI_CROP)
        for form in ("dinov2", "dino", "ibot", "lejepa", "simdino")
    ),
    _INITIAL,
)
_TODAY = {
    "registers": {"model.encoder.registers": "4"},
    "rotary positions": {"model.encoder.positions": "rope"},
    "SwiGLU": {"model.encoder.activation": "swiglu", "model.encoder.mlp_ratio": "2.6667"},
    "Muon": {"optim.rule": "muon"},
}
ENCODERS = _by_title(
    SINGLE_STAGE["M3I"],
    *(
        Row(f"M3I, {title}", (Stage("m3i"),), settings, method="M3I")
        for title, settings in _TODAY.items()
    ),
    Row(
        f"M3I, {', '.join(_TODAY)}",
        (Stage("m3i"),),
        {key: value for settings in _TODAY.values() for key, value in settings.items()},
        method="M3I",
    ),
)

# Learning rate and weight decay, the same trials for every method.
RATES = {
    "rate 5e-4": {"optim.lr": "5e-4"},
    "rate 1e-3": {"optim.lr": "1e-3"},
    "rate 2e-3": {"optim.lr": "2e-3"},
    "rate 4e-3": {"optim.lr": "4e-3"},
    "rate 2e-3, decay 0.2": {"optim.lr": "2e-3", "optim.weight_decay": "0.2"},
}


def altered_rows(
    rows: Mapping[str, Row], settings: Mapping[str, str], changes: str
) -> dict[str, Row]:
    """The rows with further settings, and `changes` in parentheses in their titles."""

    def altered(row: Row) -> Row:
        # untrained weights stay untrained at any rate
        first, last = (settings, row.settings)[:: 1 if row.title == UNTRAINED else -1]
        title = f"{row.title} ({changes})"
        return dataclasses.replace(
            row, title=title, settings={**first, **last}, method=row.searched
        )

    return _by_title(*map(altered, rows.values()))


def search_rows(rows: Mapping[str, Row], steps: int) -> dict[str, Row]:
    """Every method with every rate and decay, in runs of so many steps."""
    return _by_title(
        *(
            dataclasses.replace(
                row, title=f"{row.title}, {name}", settings=settings, steps=steps, method=row.title
            )
            for row in rows.values()
            if row.title != UNTRAINED
            for name, settings in RATES.items()
        )
    )


def width(encoder: int) -> dict[str, str]:
    """Settings of an encoder of another width, with heads of 32 channels."""
    return {
        "model.encoder.width": str(encoder),
        "model.encoder.heads": str(max(encoder // 32, 1)),
        "model.pool.width": str(encoder),
        "model.pool.heads": str(max(encoder // 32, 1)),
    }


def scaling_rows(methods: tuple[str, ...], budgets: tuple[int, ...]) -> dict[str, Row]:
    """Every method at three widths and so many steps of each."""
    return _by_title(
        *(
            dataclasses.replace(
                METHODS[name],
                title=f"{name}, width {encoder}, {steps} steps",
                settings=width(encoder),
                steps=steps,
                method=name,
            )
            for steps in budgets
            for encoder in (48, 96, 192)
            for name in methods
        )
    )


# Trials on the tuning part that led to the settings of configs/toy.py.
_WIDE = width(96) | {"model.decoder.width": "64", "model.decoder.heads": "2"}
_STRONG = {
    "data.crop_scale": "0.5,1.0",
    "data.augment.jitter_p": "0.8",
    "data.augment.brightness": "0.4",
    "data.augment.contrast": "0.4",
    "data.augment.saturation": "0.2",
    "data.augment.hue": "0.1",
    "data.augment.grayscale_p": "0.05",
}
_PLAIN = {
    "data.crop_scale": "0.8,1.0",
    "data.augment.jitter_p": "0.0",
    "data.augment.blur_p": "0.0,0.0",
}
_DECODER = {"model.decoder.width": "64", "model.decoder.heads": "2"}


def _trial(title: str, method: str, steps: int, settings: Mapping[str, str]) -> Row:
    return dataclasses.replace(
        SINGLE_STAGE[method], title=title, steps=steps, settings=settings, method=method
    )


TRIED = _by_title(
    _trial(
        "supervised, strong colour, pooling starts at 0.02",
        "supervised",
        400,
        _WIDE | _STRONG | {"model.pool.std": "0.02"},
    ),
    _trial("supervised, strong colour", "supervised", 400, _WIDE | _STRONG),
    _trial("supervised, no colour", "supervised", 400, _WIDE | _PLAIN | {"objective.gamma": "1.0"}),
    _trial("M3I, width 96", "M3I", 800, _WIDE),
    _trial("M3I, width 96, gamma 30", "M3I", 800, _WIDE | {"objective.gamma": "30.0"}),
    _trial("M3I, width 96, batch 64", "M3I", 400, _WIDE | {"train.batch_size": "64"}),
    _trial("M3I, width 96, batch 16", "M3I", 1600, _WIDE | {"train.batch_size": "16"}),
    _trial("M3I, width 96, lr 4e-3", "M3I", 800, _WIDE | {"optim.lr": "4e-3"}),
    _trial("M3I, width 96, images isolated", "M3I", 800, _WIDE | {"objective.isolate": "true"}),
    _trial(
        "M3I, width 96, half as many mixed inputs",
        "M3I",
        1600,
        _WIDE | {"objective.pairing": "halves"},
    ),
    _trial("without mix, width 96", "M3I without mix", 800, _WIDE),
    _trial(
        "without mix, width 96, a quarter hidden",
        "M3I without mix",
        800,
        _WIDE | {"data.mask_ratio": "0.25"},
    ),
    _trial("M3I, width 96, gamma 10, longer", "M3I", 1500, _WIDE | {"objective.gamma": "10.0"}),
    _trial("supervised, width 96, longer", "supervised", 3000, _WIDE | {"objective.gamma": "1.0"}),
    _trial("M3I, decoder 64", "M3I", 3000, _DECODER),
    _trial("supervised, long", "supervised", 6000, _DECODER | {"objective.gamma": "1.0"}),
    _trial("CLIP, long", "CLIP", 6990, _DECODER),
    _trial("M3I, decoder 64, as many steps as CLIP", "M3I", 6990, _DECODER),
    _trial(
        "M3I, decoder 64, mask cells of 16 pixels", "M3I", 3000, _DECODER | {"data.mask_cell": "16"}
    ),
    _trial(
        "M3I, decoder 64, a quarter of the partner",
        "M3I",
        3000,
        _DECODER | {"data.mask_ratio": "0.25"},
    ),
    _trial("M3I, decoder 64, gamma 10", "M3I", 3000, _DECODER | {"objective.gamma": "10.0"}),
)

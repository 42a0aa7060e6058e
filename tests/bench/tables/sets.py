"""The runs of the toy-scale tables (`tests.bench.tables`): the image sets, the methods, and the
configuration of each run."""

import dataclasses
import pathlib
from collections.abc import Mapping

from m3i_jax.reporting import compare_table as report
from tests.bench.tables import data as table_data

ROOT = pathlib.Path(__file__).parents[3]
METHODS = {
    "M3I": "m3i",
    "M3I without mix": "m3i_unmixed",
    "supervised": "supervised",
    "CLIP": "weakly_supervised",
    "SiameseIM": "siamese_im",
    "MAE": "mae",
}
SINGLE = ("supervised", "CLIP", "SiameseIM", "MAE")
UNTRAINED = "untrained"  # M3I's initial weights
STEPS = {"emoji": 3500, "digits": 800}  # of M3I; the other methods get as many FLOPs
STEPS_OF_A_STYLE, STEPS_OF_FINETUNING = 1600, 1000

COLUMNS = (
    report.CompareColumn("eval/knn/top1", "kNN", ".1f", True, 100),
    report.CompareColumn("eval/linear/top1", "linear", ".1f", True, 100),
    report.CompareColumn("finetune", "fine-tune", ".1f", True, 100),
    report.CompareColumn("eval/direct/top1", "without fine-tuning", ".1f", True, 100),
    report.CompareColumn("eval/zero_shot/names/top1", "zero-shot", ".1f", True, 100),
    report.CompareColumn("eval/retrieval/text_to_image/r5", "text to image R@5", ".1f", True, 100),
    report.CompareColumn("eval/retrieval/image_to_text/r5", "image to text R@5", ".1f", True, 100),
)
STYLE_COLUMNS = (
    *(dataclasses.replace(COLUMNS[i], title=f"{COLUMNS[i].title}, other style") for i in (0, 4)),
    *(
        report.CompareColumn(
            f"own/{COLUMNS[i].key}", f"{COLUMNS[i].title}, own style", ".1f", True, 100
        )
        for i in (0, 4)
    ),
)
RUN_COLUMNS = (
    report.CompareColumn("steps", "steps", ",.0f"),
    report.CompareColumn("flops", "TFLOP", ".2f", scale=1e-12),
    report.CompareColumn("seconds", "seconds of training", ".0f"),
)


@dataclasses.dataclass(frozen=True)
class Set:
    """Images, the runs on them and the columns of their table.

    Attributes:
      overrides: settings of every run.
      finetune: whether every run is followed by fine-tuning.
      own: the split of the same style, if the held-out split is of another style.
    """

    name: str
    source: str
    path: str
    overrides: Mapping[str, str]
    columns: tuple[report.CompareColumn, ...] = COLUMNS
    methods: tuple[str, ...] = tuple(METHODS)
    steps: int = 0
    finetune: bool = True
    own: str = ""


@dataclasses.dataclass(frozen=True)
class Run:
    image_set: Set
    method: str
    seed: int
    variant: Mapping[str, str] = dataclasses.field(default_factory=dict)
    title: str = ""
    steps: int = 0  # 0: as many as M3I's FLOPs allow

    @property
    def row(self) -> str:
        return self.title or self.method

    def path(self, out: pathlib.Path) -> pathlib.Path:
        return (
            out
            / "runs"
            / self.image_set.name
            / f"{self.row.replace(', ', '-').replace(' ', '_')}-{self.seed}"
        )


# Trials on the tuning part that led to the settings of configs/toy.py. {title: (method, steps,
# changes from those settings)}
_WIDE = {
    "model.encoder.width": "96",
    "model.encoder.heads": "3",
    "model.pool.width": "96",
    "model.pool.heads": "3",
    "model.decoder.width": "64",
    "model.decoder.heads": "2",
}
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
TRIED: dict[str, tuple[str, int, dict[str, str]]] = {
    "supervised, strong colour, pooling starts at 0.02": (
        "supervised",
        400,
        _WIDE | _STRONG | {"model.pool.std": "0.02"},
    ),
    "supervised, strong colour": ("supervised", 400, _WIDE | _STRONG),
    "supervised, no colour": ("supervised", 400, _WIDE | _PLAIN | {"objective.gamma": "1.0"}),
    "M3I, width 96": ("M3I", 800, _WIDE),
    "M3I, width 96, gamma 30": ("M3I", 800, _WIDE | {"objective.gamma": "30.0"}),
    "M3I, width 96, batch 64": ("M3I", 400, _WIDE | {"train.batch_size": "64"}),
    "M3I, width 96, batch 16": ("M3I", 1600, _WIDE | {"train.batch_size": "16"}),
    "M3I, width 96, lr 4e-3": ("M3I", 800, _WIDE | {"optim.lr": "4e-3"}),
    "M3I, width 96, images isolated": ("M3I", 800, _WIDE | {"objective.isolate": "true"}),
    "M3I, width 96, half as many mixed inputs": (
        "M3I",
        1600,
        _WIDE | {"objective.pairing": "halves"},
    ),
    "without mix, width 96": ("M3I without mix", 800, _WIDE),
    "without mix, width 96, a quarter hidden": (
        "M3I without mix",
        800,
        _WIDE | {"data.mask_ratio": "0.25"},
    ),
    "M3I, width 96, gamma 10, longer": ("M3I", 1500, _WIDE | {"objective.gamma": "10.0"}),
    "supervised, width 96, longer": ("supervised", 3000, _WIDE | {"objective.gamma": "1.0"}),
    "M3I, decoder 64": ("M3I", 3000, _DECODER),
    "supervised, long": ("supervised", 6000, _DECODER | {"objective.gamma": "1.0"}),
    "CLIP, long": ("CLIP", 6990, _DECODER),
    "M3I, decoder 64, as many steps as CLIP": ("M3I", 6990, _DECODER),
    "M3I, decoder 64, mask cells of 16 pixels": ("M3I", 3000, _DECODER | {"data.mask_cell": "16"}),
    "M3I, decoder 64, a quarter of the partner": (
        "M3I",
        3000,
        _DECODER | {"data.mask_ratio": "0.25"},
    ),
    "M3I, decoder 64, gamma 10": ("M3I", 3000, _DECODER | {"objective.gamma": "10.0"}),
}


def image_sets(data: pathlib.Path, out: pathlib.Path) -> dict[str, Set]:
    """Every image set by name, with its images written."""
    folder = out / "data"
    styles = table_data.tars(data, folder)
    shared = {
        "data.holdout": str(table_data.HOLDOUT),
        "evaluate.templates": str(folder / "names.txt"),
    }
    if (folder / "class_names.json").is_file():
        shared["data.class_names"] = str(folder / "class_names.json")
    sets_ = {"emoji": Set("emoji", "tars", str(data / "*.tar"), shared, steps=STEPS["emoji"])}
    for style in styles:
        others = [s for s in styles if s != style]
        if len(others) == 1:
            split = {
                "data.split": f"{style}-train.tar",
                "data.holdout_split": f"{others[0]}-held_out.tar",
            }
            sets_[style] = Set(
                style,
                "tars",
                str(folder / "styles"),
                shared | split,
                STYLE_COLUMNS,
                ("M3I", "supervised", "CLIP"),
                STEPS_OF_A_STYLE,
                False,
                f"{style}-held_out.tar",
            )
    if table_data.digits(folder / "digits"):
        flat = {"data.holdout": str(table_data.HOLDOUT), "data.flip_p": "0.0"}
        methods = tuple(m for m in METHODS if m != "CLIP")
        sets_["digits"] = Set(
            "digits", "folder", str(folder / "digits"), flat, COLUMNS[:4], methods, STEPS["digits"]
        )
    sets_["tuning"] = Set(
        "tuning", "tars", str(folder / "tuning" / "*.tar"), shared, finetune=False
    )
    return sets_


def config_spec(run: Run, steps: int) -> str:
    """The value of --config."""
    form = "m3i" if run.method == UNTRAINED else METHODS[run.method]
    images = run.image_set
    return (
        f"{ROOT / 'configs/toy.py'}:form={form},source={images.source},path={images.path}"
        f",steps={steps}"
    )


def overrides(run: Run) -> list[str]:
    frozen = {"optim.lr": "1e-12"} if run.method == UNTRAINED else {}  # it must be positive
    return [
        f"{key}={value}"
        for key, value in {
            "seed": str(run.seed),
            **run.image_set.overrides,
            **frozen,
            **run.variant,
        }.items()
    ]

"""Every setting of a run as a tree of frozen keyword-only dataclasses.

`config.default_config` turns the tree into a ConfigDict, `config.resolve` builds it from a
ConfigDict and checks it, `--help` prints it. The defaults are the paper's ViT-B/16 run (Table 7)
unless a help text says otherwise; `[P]` marks what the paper states, configs/README.md lists what
it leaves open.
"""

import dataclasses
import functools

from m3i_jax.schema.data import (
    SOURCES,
    Augment,
    Curate,
    Data,
    RandAugment,
    ViewGroup,
    parse_view_group,
)
from m3i_jax.schema.dense import (
    DETECTION_HEADS,
    SEGMENTATION_HEADS,
    DensePrediction,
    Detect,
    Dino,
    Geometry,
    Maps,
    Mask2Former,
    Segment,
)
from m3i_jax.schema.evaluation import Compare, Evaluate, Report
from m3i_jax.schema.limits import PATH, NumberLimit, option, section
from m3i_jax.schema.model import (
    Captioner,
    Decoder,
    Encoder,
    Head,
    InternImage,
    Model,
    Pool,
    Text,
)
from m3i_jax.schema.objective import Objective
from m3i_jax.schema.training import UPDATE_RULES, Init, Optim, Parallel, Train


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskTraits:
    """Requirements of a kind of task on its settings.

    Attributes:
      pairs: the images of a batch are mixed in pairs, so that a device takes an even number of
        them, and are masked by cells of patches.
      views: an image is read as square views of `data.image_size`; else batches hold annotated
        images.
    """

    pairs: bool = False
    views: bool = False


# Values of `task`; training/task.py adds those that other packages register.
TASKS = {
    "pretrain": TaskTraits(pairs=True, views=True),
    "segment": TaskTraits(),
    "detect": TaskTraits(),
}
BUILT_IN_TASKS = tuple(TASKS)


__all__ = [
    "BUILT_IN_TASKS",
    "DETECTION_HEADS",
    "SEGMENTATION_HEADS",
    "SOURCES",
    "TASKS",
    "UPDATE_RULES",
    "Augment",
    "Captioner",
    "Compare",
    "Config",
    "Curate",
    "Data",
    "Decoder",
    "DensePrediction",
    "Detect",
    "Dino",
    "Encoder",
    "Evaluate",
    "Geometry",
    "Head",
    "Init",
    "InternImage",
    "Maps",
    "Mask2Former",
    "Model",
    "Objective",
    "Optim",
    "Parallel",
    "Pool",
    "RandAugment",
    "Report",
    "Segment",
    "TaskTraits",
    "Text",
    "Train",
    "ViewGroup",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    seed: int = option(0, "seed of all randomness", NumberLimit(0, 2**63 - 1))
    init_from: str = option(
        "",
        "initial weights: workdir of a run, or weights of timm, Hugging Face ViT, CLIP or SigLIP,"
        " DINOv2 or DINOv3, MAE, SiameseIM, Google ViT, InternImage, or a detector or segmenter"
        " (configs/README.md)",
        PATH,
    )
    task: str = option(
        "pretrain", "what is trained: pretrain, segment, detect or a registered task", TASKS
    )
    init: Init = section(Init)
    data: Data = section(Data)
    model: Model = section(Model)
    objective: Objective = section(Objective)
    dense: DensePrediction = section(DensePrediction)
    optim: Optim = section(Optim)
    train: Train = section(Train)
    evaluate: Evaluate = section(Evaluate)
    compare: Compare = section(Compare)
    curate: Curate = section(Curate)
    parallel: Parallel = section(Parallel)
    report: Report = section(Report)

    @property
    def traits(self) -> TaskTraits:
        """The requirements of the task, for validation."""
        return TASKS[self.task]

    @property
    def grid(self) -> int:
        """Side of the patch grid of a view."""
        return self.data.image_size // self.model.encoder.patch_size

    @property
    def tokens(self) -> int:
        """Number of patches in a view."""
        return self.grid**2

    @functools.cached_property
    def small_views(self) -> tuple[ViewGroup, ...]:
        """The group of every small view, that of view 2 first."""
        groups = [parse_view_group(text) for text in self.data.small_views]
        return tuple(group for group in groups for _ in range(group.count))

    def view_size(self, view: int) -> int:
        """Returns the side of a view in pixels."""
        return self.data.image_size if view < 2 else self.small_views[view - 2].size

    @property
    def hidden(self) -> int:
        """Number of patches of a view that show the partner; fixed, so that shapes are static."""
        return round(self.data.mask_ratio * (self.grid // self.cell) ** 2) * self.cell**2

    @property
    def cell(self) -> int:
        """Side of a mask cell in patches."""
        return max(self.data.mask_cell // self.model.encoder.patch_size, 1)

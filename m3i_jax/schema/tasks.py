"""The names of the tasks, and what validation has to know of each before anything is opened."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskTraits:
    """What the settings of a kind of task must satisfy.

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

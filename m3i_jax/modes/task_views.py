"""The interface of a task for the modes, beside that for training (training/task.py): panels,
tables and words for people, as one value per task, and their registry.

Those of this package are in pretrain_views.py and dense_views.py, imported when they are first
needed."""

import dataclasses
from collections.abc import Callable
from typing import Any

from m3i_jax import schema
from m3i_jax.registries import Registry


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskViews:
    """Panels, tables and words of a task for the modes.

    Attributes:
      draw_panel: (setup, trainer, step, state, host batch) writes WORKDIR/panels/<step>.png.
      draw_preview: (setup, path, host batch, its records) writes the sheet of --mode=preview.
      tables: (trainer, batch shapes) -> tables for --mode=show.
      summary: a few words on the settings that decide a run, for its log.
      unpublished: a line if settings differ from the published ones of a named method, or "".
      unit: what --mode=show gives the cost of, by the settings.
    """

    draw_panel: Callable[..., None] = lambda *_: None
    draw_preview: Callable[..., None] = lambda *_: None
    tables: Callable[[Any, dict[str, Any]], list[str]] = lambda *_: []
    summary: Callable[[schema.Config], str] = lambda _: "no other schedule"
    unpublished: Callable[[schema.Config], str] = lambda _: ""
    unit: Callable[[schema.Config], str] = lambda _: "an image"


VIEWS: Registry[TaskViews] = Registry(
    "task",
    choices=list(schema.BUILT_IN_TASKS),
    home=lambda name: f"{__package__}.{'pretrain' if name == 'pretrain' else 'dense'}_views",
    replace=True,
    protect=False,
)


def register_task_views(name: str, views: TaskViews) -> TaskViews:
    """Registers what the modes show of a task. Registering the same name again replaces it."""
    return VIEWS.register(name, views)


def task_views(name: str) -> TaskViews:
    """Returns what the modes show of a task; nothing, if nothing was registered for it.

    >>> task_views("pretrain").unit(schema.Config())
    'a mixed view'
    """
    return VIEWS[name] if name in VIEWS else TaskViews()

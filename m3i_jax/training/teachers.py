"""Frozen teachers of any architecture and size: what `objective.teachers` names, as encoders of the
views of a run.

A teacher reads a view at its own patch size and with its own normalisation, at the side nearest to
the view's that its patch, or the stride of its last stage, divides. Its patch tokens are resized to
the grid of the run, bilinear; the feature of the image is its cls, or their mean.
Its positions are resized to its grid, from those that its weights have. It stays in the optimizer
state, sharded as the rest, without gradient or moments.

B images, S pixels a side, N cells of the run, D width of the teacher.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import schema
from m3i_jax.errors import UserError, path_exists
from m3i_jax.models import backbones, vit
from m3i_jax.objective.derived_terms import teacher_name
from m3i_jax.parallel.sharding import path_text
from m3i_jax.training import encoder_shapes, saved_arrays, weight_source

KEY = "config.objective.teachers"


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A teacher without its arrays.

    Attributes:
      model: settings of its encoder.
      image_size: side for which its positions were made.
      mean, std: of pixels.
      shapes: ((path below the encoder, shape), ...).
    """

    model: schema.Model
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]


def widths(paths: Sequence[str]) -> list[int]:
    """Returns the width of the features of each teacher.

    Raises:
      UserError: one does not exist, and no run is known that has it; or it is no encoder.

    >>> widths(())
    []
    """
    return [_layout(path).width for path in paths]


def without_teachers(config: schema.Config) -> schema.Config:
    """Returns the settings for weights that are not trained further: the files of the teachers need
    not be there. Terms that distil them predict a frozen encoder of the run's architecture instead,
    which has the same views and the same feature of an image, and whose weights only a training
    reads.

    >>> distilled = schema.Objective(forms=("distill",), teachers=("a", "b"))
    >>> found = without_teachers(schema.Config(objective=distilled)).objective
    >>> found.teachers, found.target_checkpoint
    ((), 'a')
    """
    o = config.objective
    if not o.teachers:
        return config
    target = o.target_checkpoint or o.teachers[0]
    return dataclasses.replace(
        config, objective=dataclasses.replace(o, teachers=(), target_checkpoint=target)
    )


class TeacherLayout(NamedTuple):
    """What the state of a run has to know of a teacher: the width of its features, and ((path below
    the encoder, shape), ...)."""

    width: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]


# by path: of the teachers of runs that are evaluated, whose files may be elsewhere
_IN_RUNS: dict[str, TeacherLayout] = {}


def find_in_run(workdir: str, paths: Sequence[str], key: str) -> None:
    """Takes widths and shapes of the teachers of a run from its newest checkpoint, so that their
    files are not needed where its whole state is restored to be evaluated.

    Args:
      workdir: of the run.
      paths: its `objective.teachers`.
      key: what names the run, for errors.

    Raises:
      UserError: the run has no readable checkpoint.

    >>> find_in_run("no_run", (), "load")
    """
    if not paths:
        return
    saved = saved_arrays.saved_shapes(workdir, key)
    for number, path in enumerate(paths):
        _IN_RUNS.pop(path, None)
        name = teacher_name(number)
        own = f"opt/teachers/params/{name}/"
        shapes = {p.removeprefix(own): shape for p, shape in saved.items() if p.startswith(own)}
        maps = (f"params/heads/{each}/kernel" for each in (name, f"{name}_image"))
        width = next((saved[p][-1] for p in maps if p in saved), 0)
        if shapes and width:
            _IN_RUNS[path] = TeacherLayout(width, tuple(sorted(shapes.items())))


def _layout(path: str) -> TeacherLayout:
    if path in _IN_RUNS:
        return _IN_RUNS[path]
    if not path_exists(path):
        raise UserError(
            f"{KEY}: there is no {path!r}; give the workdir of a run, a file of weights or a"
            " Hugging Face directory"
        )
    teacher = open_teacher(path)
    return TeacherLayout(teacher.model.encoder.width, teacher.shapes)


@functools.cache
def open_teacher(path: str) -> Teacher:
    """Returns the description of a teacher.

    Args:
      path: workdir of a run, file of weights or Hugging Face directory.

    Raises:
      UserError: no readable weights, or those of an encoder that this package cannot run.
    """
    source = weight_source.open_weights(path, weights="", key=KEY)
    source.require_own_encoder(f"{KEY}: {path}")
    stored = dict(source.settings)
    if "width" not in stored or "image_size" not in stored:
        raise UserError(
            f"{KEY}: {path}: is neither a supported vision transformer nor an InternImage"
            f" ({source.name}); give another encoder"
        )
    stored["heads"] = weight_source.encoder_heads(stored)
    names = {field.name for field in dataclasses.fields(schema.Encoder)}
    encoder = schema.Encoder(**{k: v for k, v in stored.items() if k in names})
    sections: dict[str, Any] = {
        name: type(getattr(schema.Model(), name))(**stored[name])
        for name in backbones.section_names()
        if isinstance(stored.get(name), Mapping)
    }
    kind = stored.get("backbone", schema.Model.backbone)
    model = schema.Model(backbone=kind, encoder=encoder, scan=True, **sections)
    fixed = encoder.positions in vit.FIXED and not encoder.position_grid
    if fixed and backbones.get_backbone(model).resizes_positions:
        grid = stored["image_size"] // encoder.patch_size
        model = dataclasses.replace(model, encoder=dataclasses.replace(encoder, position_grid=grid))
    of_pixels = schema.Augment()
    mean, std = (
        tuple(float(x) for x in stored.get(name, getattr(of_pixels, name)))
        for name in ("mean", "std")
    )
    grid = stored["image_size"] // encoder.patch_size
    shapes = encoder_shapes.encoder_shapes(model, grid)
    encoder_shapes.check_encoder(f"{KEY}: {path}", shapes, source.shapes)
    return Teacher(model, stored["image_size"], mean, std, tuple(shapes.items()))


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        functools.reduce(lambda node, part: node.setdefault(part, {}), parents, tree)[name] = value
    return tree


def teacher_shapes(paths: Sequence[str]) -> dict[str, Any]:
    """Returns {name of a teacher: its parameters as shapes}.

    >>> teacher_shapes(())
    {}
    """
    return {
        teacher_name(number): _nested(
            {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in _layout(path).shapes}
        )
        for number, path in enumerate(paths)
    }


def zero_params(paths: Sequence[str]) -> dict[str, Any]:
    """Returns {name of a teacher: its parameters}, zeros until `load_params`.

    >>> zero_params(())
    {}
    """
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), teacher_shapes(paths))


def load_params(path: str, shardings: Any) -> Any:
    """Returns the parameters of a teacher with these shardings; a run gives what it evaluates."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(shardings)
    names = {f"encoder/{path_text(key)}": sharding for key, sharding in leaves}
    arrays = weight_source.open_on_all_hosts(path, weights="", key=KEY).read(names)
    return jax.tree.unflatten(structure, [arrays[name] for name in names])


def encode_teacher(
    config: schema.Config, name: str, params: Any, patches_BxNxP: jax.Array
) -> jax.Array:
    """Features [B, 1 + N, D] of clean views, without gradient: that of the image, which is cls or
    the mean of the tokens of an encoder without it, and those at the cells of the run.

    Args:
      config: settings of the run.
      name: of a teacher, as of `derived_terms.teacher_name`.
      params: as of `load_params`.
      patches_BxNxP: normalised patches of the run.
    """
    teacher = open_teacher(config.objective.teachers[int(name.removeprefix("teacher"))])
    model = dataclasses.replace(teacher.model, dtype=config.model.dtype)
    grid, augment = round(patches_BxNxP.shape[1] ** 0.5), config.data.augment
    images_BxSxSx3 = images_of_patches(patches_BxNxP, config.model.encoder.patch_size)
    scale = np.asarray(augment.std, np.float32) / np.asarray(teacher.std, np.float32)
    shift = (np.asarray(augment.mean) - np.asarray(teacher.mean)) / np.asarray(teacher.std)
    images_BxSxSx3 = images_BxSxSx3 * scale + shift.astype(np.float32)
    unit = backbones.get_backbone(model).side_unit(model)
    own = teacher_side(images_BxSxSx3.shape[1], unit)
    images_BxSxSx3 = _resized(images_BxSxSx3, own, "bicubic")
    own_grid = own // model.encoder.patch_size
    z_BxTxD = backbones.get_backbone(model).apply(
        model, params, vit.patchify(images_BxSxSx3, model.encoder.patch_size), grid=own_grid
    )
    cells = own_grid * own_grid
    has_cls = z_BxTxD.shape[1] > cells and model.encoder.cls_token
    tokens_BxMxD = z_BxTxD[:, -cells:].astype(jnp.float32)
    image_BxD = z_BxTxD[:, 0].astype(jnp.float32) if has_cls else tokens_BxMxD.mean(1)
    b, _, width = tokens_BxMxD.shape
    map_BxNxD = _resized(tokens_BxMxD.reshape(b, own_grid, own_grid, width), grid, "bilinear")
    map_BxNxD = map_BxNxD.reshape(b, grid * grid, width)
    return jax.lax.stop_gradient(jnp.concatenate([image_BxD[:, None], map_BxNxD], 1))


def teacher_side(side: int, unit: int) -> int:
    """Returns the side at which a teacher reads a view: the nearest multiple of its patch, or of
    the stride of its last stage.

    >>> teacher_side(224, 14), teacher_side(224, 16), teacher_side(32, 14)
    (224, 224, 28)
    """
    return max(unit, round(side / unit) * unit)


def images_of_patches(patches_BxNxP: jax.Array, patch: int) -> jax.Array:
    """Inverts `vit.patchify` for square images, float32.

    >>> x = jnp.arange(48.0).reshape(1, 4, 4, 3)
    >>> bool((images_of_patches(vit.patchify(x, 2), 2) == x).all())
    True
    """
    b, count, _ = patches_BxNxP.shape
    grid = round(count**0.5)
    split = patches_BxNxP.astype(jnp.float32).reshape(b, grid, grid, patch, patch, 3)
    return split.swapaxes(2, 3).reshape(b, grid * patch, grid * patch, 3)


def _resized(x_BxHxWxC: jax.Array, side: int, method: str) -> jax.Array:
    """A square map of another side, antialiased where it shrinks."""
    if x_BxHxWxC.shape[1] == side:
        return x_BxHxWxC
    shape = (x_BxHxWxC.shape[0], side, side, x_BxHxWxC.shape[3])
    return jax.image.resize(x_BxHxWxC.astype(jnp.float32), shape, method)

"""Whether the arrays of a source are those of an encoder with its settings, before they are read as
one: for `m3i_jax.load` and teachers, which run an encoder without a task around it."""

import functools
from collections.abc import Mapping

import jax

from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.models import backbones
from m3i_jax.parallel.sharding import path_text

_ENCODER, _MASK_TOKEN = "encoder/", "mask_token"


def encoder_shapes(model: schema.Model, grid: int) -> dict[str, tuple[int, ...]]:
    """Returns {path below the encoder: shape} of its parameters, without a mask token.

    Args:
      model: settings.
      grid: patches a side.

    >>> model = schema.Model(encoder=schema.Encoder(width=8, depth=2, heads=2))
    >>> encoder_shapes(model, 2)["blocks/norm1/scale"]
    (2, 8)
    """
    make = functools.partial(backbones.get_backbone(model).init, model, mask_token=False, grid=grid)
    tree = jax.eval_shape(make, jax.random.key(0))
    return {path_text(key): leaf.shape for key, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def check_encoder(
    where: str, expected: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises UserError unless a source has the arrays of an encoder and no others below `encoder/`
    but a mask token: of another shape some would be broadcast, and without those that maps of dense
    tasks add, features would be others.

    Args:
      where: begins the message.
      expected: as of `encoder_shapes`.
      shapes: {path: shape} of the source.

    >>> check_encoder("file", {"norm/scale": (8,)}, {"encoder/norm/scale": (8,), "head/bias": (2,)})
    """
    found = {
        path.removeprefix(_ENCODER): tuple(shape)
        for path, shape in shapes.items()
        if path.startswith(_ENCODER)
    }
    for name, shape in expected.items():
        if found.get(name) != shape:
            raise UserError(
                f"{where}: the arrays are not those of a complete encoder ({name} is"
                f" {found.get(name, 'absent')}, expected {shape}); give another file"
            )
    if others := [name for name in found if name not in expected and name != _MASK_TOKEN]:
        raise UserError(
            f"{where}: its features are computed with {_ENCODER}{others[0]} ({len(others)} such"
            " arrays), which only detection and segmentation have; give another encoder, or start a"
            " run of these from it by config.init_from, with config.dense.maps as there"
        )

"""The position table of a run that starts from other weights: as it is, resized, the fixed table of
the source, or no table where both have fixed or rotary positions."""

import dataclasses

import numpy as np

from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.models.vit import FIXED, fixed_positions
from m3i_jax.objective import positions
from m3i_jax.training import silent_settings
from m3i_jax.training.weight_source import WeightSource

TABLE = "encoder/positions"
# tolerance for equal tables: float32 frequencies make errors of the size of the rounded index
_ATOL = 1e-3


@dataclasses.dataclass
class PositionTable:
    """The position table that is taken from a source.

    Attributes: value: [1, T, D], for a learned table of this run, or None. message: what was
      changed, for the log. cls: row of the class token, to be added to the token where the table of
      this run is fixed and has no such row.
    """

    value: np.ndarray | None
    message: str
    cls: np.ndarray | None = None


def initial_positions(config: schema.Config, source: WeightSource, own_grid: int) -> PositionTable:
    """Returns the table of a run that starts from a source.

    Args:
      config: settings of the run.
      source: its `init_from`.
      own_grid: patches a side for which the run has its positions.

    Raises:
      UserError: positions of another kind.
    """
    encoder, kind = config.model.encoder, source.settings.get("positions", "sincos")
    if (
        "encoder/patch_embed/kernel" not in source.shapes
        or source.settings.get("width", encoder.width) != encoder.width
    ):
        return PositionTable(None, "")  # no encoder, or another one, which `_check_match` refuses
    if "rope" in (kind, encoder.positions):  # there is no table
        return _require_kind(config, source, kind)
    if encoder.positions == "learned":
        if kind != "learned":
            grid = _source_grid(source, config)
            fixed = fixed_positions(
                dataclasses.replace(encoder, positions=kind, position_grid=grid), own_grid
            )
            return PositionTable(
                positions.resize_position_table(fixed[None], own_grid, cls=encoder.cls_token),
                f"{TABLE} starts as the source's fixed table of {grid} x {grid}",
            )
        if TABLE not in source.shapes:
            return PositionTable(None, "")
        table_1xTxD = source.read({TABLE: None})[TABLE]
        grid = positions.table_grid(table_1xTxD.shape[1])
        resized = (
            f"{TABLE} was resized from {grid} x {grid} to {own_grid} x {own_grid} by bicubic"
            " interpolation"
        )
        how = {"cls": encoder.cls_token, "antialias": source.settings.get("registers", 0) > 0}
        return PositionTable(
            positions.resize_position_table(table_1xTxD, own_grid, **how),
            resized if grid != own_grid else "",
        )
    if kind != "learned":
        found = _require_kind(config, source, kind)
        message = _of_another_grid(_source_grid(source, config), own_grid)
        return dataclasses.replace(found, message=message)
    if TABLE not in source.shapes:
        return PositionTable(None, "")
    table_1xTxD = source.read({TABLE: None})[TABLE]
    grid = positions.table_grid(table_1xTxD.shape[1])
    cls_rows = table_1xTxD.shape[1] - grid * grid
    for fixed_kind in FIXED:
        fixed = fixed_positions(
            dataclasses.replace(encoder, positions=fixed_kind, position_grid=0), grid
        )
        if np.abs(table_1xTxD[0, cls_rows:] - fixed).max() < _ATOL:
            message = (
                "the source's position table is the fixed one of"
                f" model.encoder.positions={encoder.positions}"
            )
            resized = _of_another_grid(grid, own_grid)
            return dataclasses.replace(
                _require_kind(config, source, fixed_kind),
                message=f"{message}; {resized}" if resized else message,
                cls=table_1xTxD[:, :1] if cls_rows else None,
            )
    return _require_kind(config, source, "learned")


def _source_grid(source: WeightSource, config: schema.Config) -> int:
    """Patches a side for which a run made its fixed positions."""
    patch = config.model.encoder.patch_size
    return (
        source.settings.get("position_grid")
        or source.settings.get("image_size", config.grid * patch) // patch
    )


def _require_kind(config: schema.Config, source: WeightSource, kind: str) -> PositionTable:
    own_kind = config.model.encoder.positions
    if kind != own_kind:
        how = silent_settings.how_to_fit(config, {**source.settings, "positions": kind})
        raise UserError(
            f"config.init_from: {source.name}: its blocks were trained with"
            f" model.encoder.positions={kind}, this run has {own_kind}; {how}, or leave the encoder"
            " out by config.init.only"
        )
    return PositionTable(None, "")


def _of_another_grid(grid: int, own_grid: int) -> str:
    """What is said of fixed positions of another grid; "" for the same."""
    if grid == own_grid:
        return ""
    return (
        f"positions were of a grid of {grid} in the source and are of {own_grid} in this run;"
        f" config.model.encoder.position_grid={grid} resizes them"
    )

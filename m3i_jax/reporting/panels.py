"""Panels: inputs, targets and predictions of a run side by side, one row for each input.

Features are shown by their first three principal components as red, green and blue. Basis and range
come from the targets of a term and are used for all its rows: equal features have equal colours,
and a collapsed prediction looks flat instead of being stretched to full contrast."""

import dataclasses
import os
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from m3i_jax.reporting import image_grid
from m3i_jax.reporting.image_grid import GAP, INK, MARGIN, MUTED, OWN, PARTNER

BETWEEN = 28  # pixels between groups of columns
HEAD, LINE, AFTER = 44, 17, 18  # pixels: titles, line height, space below a row
CHANNELS = 3


@dataclasses.dataclass(frozen=True)
class _Column:
    title: str
    tiles: Sequence[Image.Image | None]
    chip: image_grid.Color | None = None
    notes: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class _Group:
    title: str
    columns: list[_Column]


def feature_rgb(features: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns colours of features by principal components.

    The first array gives the basis (the three directions of largest variance, signed so that the
    largest coordinate is positive) and the range (2nd and 98th percentile of each component become
    0 and 1) for all arrays. A component without variance is 0.5, a feature that is not finite is
    black.

    Args:
      features: arrays [..., N, D] of one width D, the targets first.

    Returns:
      float32 arrays [..., N, 3] in 0..1.

    >>> target = np.array([[[0., 0.], [1., 0.], [2., 0.], [3., 0.]]])
    >>> same, flat = feature_rgb([target, np.full_like(target, 1.5)])
    >>> same[0, :, 0], flat[0, 0]
    (array([0.  , 0.32, 0.68, 1.  ], dtype=float32), array([0.5, 0.5, 0.5], dtype=float32))
    """
    width = features[0].shape[-1]
    basis_TxD = features[0].reshape(-1, width).astype(np.float64)
    basis_TxD = basis_TxD[np.isfinite(basis_TxD).all(-1)]
    if not len(basis_TxD):
        return [np.zeros((*x.shape[:-1], CHANNELS), np.float32) for x in features]
    mean_D = basis_TxD.mean(0)
    centred_TxD = basis_TxD - mean_D
    # the eigenvectors of the D x D covariance are cheaper than a decomposition of all T x D
    variance, vectors = np.linalg.eigh(centred_TxD.T @ centred_TxD)
    variance, directions = variance[::-1][:CHANNELS], vectors.T[::-1][:CHANNELS]
    present = int((variance > 1e-12 * max(variance[0], np.square(basis_TxD).max())).sum())
    axes_3xD = np.zeros((CHANNELS, width))
    axes_3xD[:present] = directions[:present]
    largest = np.take_along_axis(axes_3xD, np.abs(axes_3xD).argmax(1)[:, None], 1)
    axes_3xD *= np.where(largest < 0, -1.0, 1.0)
    low, high = np.percentile(centred_TxD @ axes_3xD.T, (2, 98), axis=0)
    flat = high <= low

    def colour(x: np.ndarray) -> np.ndarray:
        finite = np.isfinite(x).all(-1, keepdims=True)
        along = (np.where(finite, x, 0).astype(np.float64) - mean_D) @ axes_3xD.T
        scaled = np.where(flat, 0.5, (along - low) / np.where(flat, 1.0, high - low))
        return np.where(finite, np.clip(scaled, 0, 1), 0).astype(np.float32)

    return [colour(x) for x in features]


def similarity_map(prediction_RxNxD: np.ndarray, target_RxNxD: np.ndarray) -> np.ndarray:
    """Cosine similarity of prediction and target, mean over positions, float64 [R]; 0 with a zero
    vector.

    >>> similarity_map(np.array([[[1., 0.], [0., 2.]]]), np.array([[[3., 0.], [0., -1.]]]))
    array([0.])
    """
    p, t = prediction_RxNxD.astype(np.float64), target_RxNxD.astype(np.float64)
    norms = np.linalg.norm(p, axis=-1) * np.linalg.norm(t, axis=-1)
    return np.divide((p * t).sum(-1), norms, out=np.zeros_like(norms), where=norms != 0).mean(-1)


def _partners(rows: int) -> list[int | None]:
    return [row ^ 1 if row ^ 1 < rows else None for row in range(rows)]


def _terms(features: Mapping[str, np.ndarray], images: Mapping[str, np.ndarray]) -> list[str]:
    """Dense terms, own image first: a compiled step returns its dict in alphabetical order."""
    names = [name.removesuffix("/prediction") for name in features if name.endswith("/prediction")]
    names += [name.removesuffix("/pixels") for name in images if name.endswith("/pixels")]
    known = ("pixel", "intra", "inter")
    return [t for t in known if t in names] + sorted(t for t in names if t not in known)


def _input(
    images: Mapping[str, np.ndarray],
    mask_RxN: np.ndarray,
    side: int,
    reads: str,
    partners: Sequence[int | None],
) -> _Group:
    views, shown = images["input_view"], images["input"]
    own = [image_grid.image_tile(view, side) for view in views]
    if reads == "mixed":
        columns = [
            _Column("image i", own, OWN),
            _Column("mask", [image_grid.mask_tile(mask, side) for mask in mask_RxN]),
            _Column("mixed input", [image_grid.image_tile(x, side) for x in shown]),
        ]
        if any(other is not None for other in partners):
            columns.insert(
                1,
                _Column(
                    "image j",
                    [own[other] if other is not None else None for other in partners],
                    PARTNER,
                ),
            )
    elif reads == "masked":  # the encoder reads only the cells of the own image
        masks = [image_grid.mask_tile(mask, side, OWN, image_grid.HIDDEN) for mask in mask_RxN]
        masked = [_masked(tile, mask) for tile, mask in zip(own, mask_RxN, strict=True)]
        columns = [
            _Column("image i", own, OWN),
            _Column("mask", masks),
            _Column("masked input", masked),
        ]
    else:
        columns = [_Column("image i", own, OWN)]
    return _Group("input", columns)


def _masked(tile: Image.Image, mask_N: np.ndarray) -> Image.Image:
    hidden = ~image_grid.upsample_cells(mask_N.astype(bool), tile.width)
    pixels = np.array(tile)
    pixels[hidden] = image_grid.HIDDEN
    return Image.fromarray(pixels)


def _dense(
    term: str,
    features: Mapping[str, np.ndarray],
    images: Mapping[str, np.ndarray],
    side: int,
    mixed: bool,
) -> _Group:
    image, chip = ("j", PARTNER) if mixed and term == "inter" else ("i", OWN)
    if f"{term}/pixels" in images:
        what = "pixels"
        columns = [
            _Column(
                f"predicted {image}",
                [image_grid.image_tile(x, side) for x in images[f"{term}/pixels"]],
            )
        ]
        if f"{term}/completed" in images:
            columns.append(
                _Column(
                    "completed input",
                    [image_grid.image_tile(x, side) for x in images[f"{term}/completed"]],
                )
            )
    else:
        what = "features"
        target, prediction = features[f"{term}/target"], features[f"{term}/prediction"]
        target_rgb, prediction_rgb = feature_rgb([target, prediction])
        columns = [
            _Column(f"target {image}", [image_grid.color_tile(x, side) for x in target_rgb]),
            _Column(
                f"predicted {image}",
                [image_grid.color_tile(x, side) for x in prediction_rgb],
                notes=[f"cos {value:.3f}" for value in similarity_map(prediction, target)],
            ),
        ]
    if f"{term}/view" in images:
        columns.insert(
            0,
            _Column(
                f"target view {image}",
                [image_grid.image_tile(x, side) for x in images[f"{term}/view"]],
                chip,
            ),
        )
    return _Group(f"{term}: {what} of image {image}", columns)


def write_panel(
    path: str | os.PathLike[str],
    *,
    features: Mapping[str, np.ndarray],
    images: Mapping[str, np.ndarray],
    batch: Mapping[str, np.ndarray],
    captions: Sequence[str],
    labels: Sequence[str],
    reads: str = "mixed",
    paired: bool = True,
) -> None:
    """Write a panel as PNG. Each row shows one input: its images, mask and mixed or masked input,
    then view, target and prediction of every dense term.

    Args:
      path: the file; its directory must exist.
      features: float [R, N, D] "<term>/prediction" and "<term>/target" of every dense term; other
        keys are ignored.
      images: uint8 [R, S, S, 3] "input" (what the encoder reads), "input_view" (the own view) and
        "<term>/view". A term that predicts pixels has "<term>/pixels" instead of features and,
        where the input hides cells, may have "<term>/completed": the input with the predicted
        pixels in them.
      batch: bool [R, N] "mask", True where a cell shows the own image; other keys are ignored.
      captions, labels: R strings, empty where absent.
      reads: what the encoder reads: "mixed" inputs, "masked" ones (own cells only) or "whole"
        views.
      paired: of mixed inputs, whether the partner of row r is row r ^ 1; else it is not shown.

    Raises:
      UserError: the file cannot be written.

    >>> import tempfile
    >>> view = np.zeros((2, 32, 32, 3), np.uint8)
    >>> path = tempfile.mkdtemp() + "/panel.png"
    >>> text = {"captions": ["", ""], "labels": ["", ""], "reads": "whole"}
    >>> data = {"features": {}, "images": {"input": view, "input_view": view}}
    >>> write_panel(path, batch={"mask": np.ones((2, 4), bool)}, **data, **text)
    >>> os.path.exists(path)
    True
    """
    mask_RxN = np.asarray(batch["mask"], bool)
    rows, size = images["input"].shape[:2]
    side = image_grid.side_of_tile(size, image_grid.square_side(mask_RxN.shape[1]))
    mixed, terms = reads == "mixed", _terms(features, images)
    partners = _partners(rows) if mixed and paired else [None] * rows
    groups = [_input(images, mask_RxN, side, reads, partners)]
    groups += [_dense(term, features, images, side, mixed) for term in terms]

    count = sum(len(group.columns) for group in groups)
    tiles = count * side + (count - len(groups)) * GAP + (len(groups) - 1) * BETWEEN
    width = 2 * MARGIN + max(tiles, 3 * side + 2 * GAP)  # room for captions
    annotated = any([*captions, *labels])
    noted = any(column.notes for group in groups for column in group.columns)
    lines = (
        2 if annotated and any(other is not None for other in partners) else int(annotated or noted)
    )
    pitch = side + lines * LINE + AFTER
    page = image_grid.ImageGrid(width, MARGIN + HEAD + rows * pitch - AFTER + MARGIN)
    words_end = _draw(page, groups, side, pitch)
    for row, other in enumerate(partners):
        y = MARGIN + HEAD + row * pitch + side
        shown = [(row, OWN)] + ([(other, PARTNER)] if other is not None else [])
        for line, (index, colour) in enumerate(shown if annotated else []):
            _describe(
                page, y + (line + 1) * LINE, words_end, colour, labels[index], captions[index]
            )
    page.save(path)


def _draw(page: image_grid.ImageGrid, groups: list[_Group], side: int, pitch: int) -> int:
    """Draw titles and tiles; returns the right limit of the text below a row, before the first
    note."""
    x, words_end = MARGIN, page.image.width - MARGIN
    for group in groups:
        right = x + len(group.columns) * (side + GAP) - GAP
        page.words(x, MARGIN + 9, group.title, size=12, ink=MUTED, width=right - x)
        page.rule(x, right - 1, MARGIN + 16)
        for column in group.columns:
            indent = 0
            if column.chip:
                page.chip(x, MARGIN + HEAD - 8, column.chip)
                indent = 13
            page.words(x + indent, MARGIN + HEAD - 8, column.title, width=side - indent)
            for row, tile in enumerate(column.tiles):
                y = MARGIN + HEAD + row * pitch
                if tile is not None:
                    page.tile(x, y, tile)
                if column.notes:
                    page.words(
                        x + side,
                        y + side + LINE - 2,
                        column.notes[row],
                        size=11,
                        ink=MUTED,
                        anchor="rs",
                    )
            if column.notes:
                words_end = min(words_end, x - GAP)
            x += side + GAP
        x += BETWEEN - GAP
    return words_end


def _describe(
    page: image_grid.ImageGrid,
    y: int,
    right: int,
    colour: image_grid.Color,
    label: str,
    caption: str,
) -> None:
    page.chip(MARGIN, y - 2, colour)
    x: float = MARGIN + 13
    if label:
        x += page.words(x, y - 2, label, ink=INK, width=right - x) + 8
    if caption or not label:
        page.words(x, y - 2, caption or "no label, no caption", ink=MUTED, width=right - x)

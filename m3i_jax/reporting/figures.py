"""Figures of the evaluators: rows of images with captions, and lines of text with bars.

`write_figure` writes a `Figure` to two files of WORKDIR/pictures: NAME.png, which can be viewed by
itself, and NAME.json, its text and the box of each image in the PNG. `figure_html` reads both and
lays the figure out for a page with real text, which is readable on a phone, in any script and in
dark mode."""

import dataclasses
import io
import logging
import math
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from PIL import Image

from m3i_jax import run_files
from m3i_jax.errors import UserError
from m3i_jax.reporting import html_page, image_grid
from m3i_jax.reporting.image_grid import GAP, INK, MARGIN, MUTED, Color
from m3i_jax.run_files import write_json_atomic

# pixels of a figure: line height, title, column of lines, their bars, least width
LINE, HEAD, BESIDE, BAR, LEAST = 17, 32, 260, 60, 480
RIGHT, WRONG = (64, 145, 92), (196, 70, 66)
# a row with more tiles, or with larger ones (pixels), takes the full width of a page
_MANY, _LARGE = 5, 200
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class FigureTile:
    """An image with a caption and a note below it.

    Attributes:
      image: pixels.
      words: the caption.
      note: below the caption.
      right: whether the caption is a correct prediction; None: it is no prediction.
    """

    image: Image.Image
    words: str = ""
    note: str = ""
    right: bool | None = None


@dataclasses.dataclass(frozen=True)
class FigureLine:
    """A line of text, with a bar for a share in 0..1, or with a square of a colour."""

    words: str
    share: float | None = None
    right: bool | None = None
    chip: Color | None = None


@dataclasses.dataclass(frozen=True)
class FigureRow:
    """Images side by side, and lines of text beside them."""

    tiles: Sequence[FigureTile]
    lines: Sequence[FigureLine] = ()


@dataclasses.dataclass(frozen=True)
class Figure:
    """Rows under a title; `note` describes the content and how to read it."""

    title: str
    note: str
    rows: Sequence[FigureRow]


def write_figure(directory: str | os.PathLike[str], name: str, figure: Figure) -> None:
    """Write DIRECTORY/NAME.png and then DIRECTORY/NAME.json, each atomically.

    Raises:
      UserError: a file cannot be written.

    >>> import tempfile
    >>> directory = tempfile.mkdtemp()
    >>> tile = FigureTile(Image.new("RGB", (8, 8)), "a cat")
    >>> one = Figure("a title", "a note", [FigureRow([tile], [FigureLine("cat", 0.75)])])
    >>> write_figure(directory, "000001-example", one)
    >>> (file,) = newest_figures(directory)
    >>> file.name, "a cat" in figure_html(file)
    ('000001-example.json', True)
    """
    directory = pathlib.Path(directory)
    directory.mkdir(exist_ok=True)
    paper, boxes = draw_figure(figure)
    paper.save(directory / f"{name}.png")
    rows = [
        {
            "tiles": [
                {"box": box, "words": t.words, "note": t.note, "right": t.right}
                for box, t in zip(at, row.tiles, strict=True)
            ],
            "lines": [dataclasses.asdict(line) for line in row.lines],
        }
        for at, row in zip(boxes, figure.rows, strict=True)
    ]
    content = {"title": figure.title, "note": figure.note, "made": time.time(), "rows": rows}
    write_json_atomic(directory / f"{name}.json", content, indent=None, noted=True)


def newest_figures(directory: str | os.PathLike[str]) -> list[pathlib.Path]:
    """Returns the newest figure of every kind, STEP-KIND.json, in the order of the kinds. A file
    that is no figure is left out with a warning."""
    made = []
    for file in pathlib.Path(directory).glob("*-*.json"):
        try:
            made.append((_read(file)["made"], file.name, file))
        except UserError as error:
            _log.warning("warning: %s: it is left out", error)
    kinds = {file.stem.partition("-")[2]: file for _, _, file in sorted(made)}
    return [kinds[kind] for kind in sorted(kinds)]


def figure_html(file: pathlib.Path) -> str:
    """Returns a figure as a section of a page.

    Raises:
      UserError: the file is not a figure, or its PNG is missing.
    """
    saved = _read(file)
    try:
        with Image.open(io.BytesIO(run_files.read_bytes(file.with_suffix(".png")))) as opened:
            paper = opened.convert("RGB")
        rows = "".join(_html_row(row, paper) for row in saved["rows"])
        return (
            f"<h2>{html_page.escape_html(saved['title'])}</h2><p"
            f" class=muted>{html_page.escape_html(saved['note'])}</p><div"
            f" class=figure>{rows}</div>"
        )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        SyntaxError,
        UserError,
    ) as error:
        raise _broken(file, error) from error


def _read(file: pathlib.Path) -> dict[str, Any]:
    try:
        saved = run_files.read_run_json(file, "delete it, and --mode=eval draws it again")
        return saved | {"made": float(saved["made"])}
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        raise _broken(file, error) from error


def _broken(file: pathlib.Path, error: Exception) -> UserError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:150]
    return UserError(
        f"{file}: is not a figure of an evaluator ({reason}); delete it, and --mode=eval draws it"
        " again"
    )


def _html_row(row: dict[str, Any], paper: Image.Image) -> str:
    sides = [tile["box"][2] for tile in row["tiles"]]
    many, large = len(sides) > _MANY, max(sides, default=0) > _LARGE
    columns = (
        "repeat(auto-fill,minmax(4.8rem,1fr))"
        if many
        else f"repeat({len(sides)},minmax(0,{max(sides, default=0)}px))"
    )
    tiles = "".join(_html_tile(tile, paper) for tile in row["tiles"])
    lines = "".join(_html_line(line) for line in row["lines"])
    short = " chips" if all(line["chip"] for line in row["lines"]) else ""
    return (
        f'<div class="row{" wide" if many or large else ""}"><div class=tiles'
        f' style="grid-template-columns:{columns}">{tiles}</div>'
        + (f'<div class="lines{short}">{lines}</div>' if lines else "")
        + "</div>"
    )


def _html_tile(tile: dict[str, Any], paper: Image.Image) -> str:
    left, top, width, height = (int(n) for n in tile["box"])
    content = io.BytesIO()
    paper.crop((left, top, left + width, top + height)).save(content, format="PNG")
    words = (
        f'<b class="{_tone(tile["right"])}">{html_page.escape_html(tile["words"])}</b>'
        if tile["words"]
        else ""
    )
    note = f"<span class=key>{html_page.escape_html(tile['note'])}</span>" if tile["note"] else ""
    caption = f"<figcaption>{words}{note}</figcaption>" if words or note else ""
    alt = " ".join(filter(None, (tile["words"], tile["note"]))) or "image"
    return f"<figure>{html_page.embed_image(content.getvalue(), alt)}{caption}</figure>"


def _html_line(line: dict[str, Any]) -> str:
    chip = (
        f'<i class=chip style="background:rgb({",".join(str(int(c)) for c in line["chip"])})"></i>'
        if line["chip"]
        else ""
    )
    words = (
        f'<span class="{_tone(line["right"])}">{chip}{html_page.escape_html(line["words"])}</span>'
    )
    if line["share"] is None:
        return f'<div class="line">{words}</div>'
    share = float(line["share"])
    return (
        f'<div class="line">{words}<i class=track><i'
        f' style="width:{100 * _bar(share):.1f}%"></i></i><b>{format_percent(share)}</b></div>'
    )


def _bar(share: float) -> float:
    """The length of a bar, 0..1: 0 of a share that is not a number, as of features with NaN."""
    return 0.0 if math.isnan(share) else min(max(share, 0.0), 1.0)


def _tone(right: bool | None) -> str:
    return "" if right is None else "right" if right else "wrong"


def format_percent(share: float) -> str:
    """Returns a share in per cent, in few characters.

    >>> format_percent(0.123), format_percent(0.004), format_percent(0.0)
    ('12 %', '0.4 %', '0 %')
    """
    return f"{100 * share:.1f} %" if 0 < share < 0.01 else f"{100 * share:.0f} %"


def draw_figure(
    figure: Figure,
) -> tuple[image_grid.ImageGrid, list[list[tuple[int, int, int, int]]]]:
    """Returns the figure as an image, and the boxes (left, top, width, height) of the images of
    every row.

    >>> draw_figure(Figure("", "", [FigureRow([FigureTile(Image.new("RGB", (8, 9)))])]))[1]
    [[(24, 56, 8, 9)]]
    """
    worded = [2 * LINE if any(t.words or t.note for t in row.tiles) else 0 for row in figure.rows]
    heights = [
        max([t.image.height + below for t in row.tiles] + [len(row.lines) * LINE])
        for row, below in zip(figure.rows, worded, strict=True)
    ]
    tiles = [sum(t.image.width + GAP for t in row.tiles) for row in figure.rows]
    beside = BESIDE if any(row.lines for row in figure.rows) else 0
    room = max([*tiles, LEAST - beside]) + beside
    notes = image_grid.wrap_text(figure.note, room, image_grid.font(12))
    head = HEAD + len(notes) * LINE
    paper = image_grid.ImageGrid(
        2 * MARGIN + room, 2 * MARGIN + head + sum(height + 2 * GAP for height in heights)
    )
    paper.words(MARGIN, MARGIN + 14, figure.title, size=14, width=room)
    for number, words in enumerate(notes):
        paper.words(MARGIN, MARGIN + 34 + number * LINE, words, ink=MUTED)
    y, boxes = MARGIN + head, []
    for row, height in zip(figure.rows, heights, strict=True):
        x, at = MARGIN, []
        for tile in row.tiles:
            paper.tile(x, y, tile.image)
            at.append((x, y, tile.image.width, tile.image.height))
            below = y + tile.image.height + LINE - 3
            paper.words(x, below, tile.words, width=tile.image.width, ink=_ink(tile.right))
            paper.words(x, below + LINE - 2, tile.note, size=11, ink=MUTED, width=tile.image.width)
            x += tile.image.width + GAP
        for number, line in enumerate(row.lines):
            _draw_line(paper, x + GAP, y + number * LINE + 12, line)
        boxes.append(at)
        y += height + 2 * GAP
    return paper, boxes


def _draw_line(paper: image_grid.ImageGrid, x: int, y: int, line: FigureLine) -> None:
    if line.chip:
        paper.chip(x, y, line.chip)
        x += 14
    width = BESIDE - 2 * GAP - (BAR + 44 if line.share is not None else 14)
    paper.words(x, y, line.words, width=width, ink=_ink(line.right))
    if line.share is not None:
        left = x + width + GAP
        paper.draw.rectangle(
            (left, y - 8, left + max(1, round(_bar(line.share) * BAR)), y - 1),
            fill=image_grid.PARTNER,
        )
        paper.words(left + BAR + 6, y, format_percent(line.share), size=11, ink=MUTED)


def _ink(right: bool | None) -> Color:
    return INK if right is None else RIGHT if right else WRONG


STYLE = """
.figure { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr));
  gap: 1.2rem 2rem; }
.row { display: flex; flex-wrap: wrap; gap: .6rem 1rem; align-items: flex-start; min-width: 0; }
.row.wide { grid-column: 1 / -1; }
.tiles { display: grid; gap: .5rem; flex: 0 1 auto; min-width: 0; } .wide .tiles { flex: 1 1 auto; }
.tiles img { height: auto; border-radius: 4px; }
.tiles figcaption b { display: block; font-weight: 500; }
.lines { flex: 1 1 11rem; min-width: 0; font-size: .85rem; }
.line { display: flex; gap: .5rem; align-items: center; padding: .1rem 0; }
.line > span { flex: 1 1 auto; min-width: 0; }
.line b { flex: 0 0 2.8rem; text-align: right; font-weight: 400; color: var(--muted); }
.chips { display: grid; grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)); gap: 0 .8rem; }
.track { flex: 0 0 4.5rem; height: .7rem; background: var(--rule); border-radius: 2px;
  overflow: hidden; }
.track i { display: block; height: 100%; background: var(--bar); }
.chip { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px;
  margin-right: .45rem; }
.right { color: #3f9160; } .wrong { color: var(--bad); }
"""

"""The image sets of the small tables (`tests.bench.tables`): their images, the settings of every
run on them, their rows and columns."""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence

from m3i_jax.errors import UserError
from m3i_jax.reporting import compare_table as report
from tests.bench.tables import data as table_data
from tests.bench.tables import rows as table_rows

ROOT = pathlib.Path(__file__).parents[3]
STEPS_OF_A_STYLE, STEPS_OF_FINETUNING = 1600, 1000
# Of the sets with 8 x 8 patches: methods, trials, and the many rows of further questions.
STEPS, STEPS_OF_A_TRIAL, STEPS_OF_A_ROW = 3000, 1000, 1500
LABELLED, CAPTIONED = (1.0, 0.3, 0.1), (1.0, 0.3)  # shares of the images with an annotation

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
TRANSFER_COLUMNS = tuple(
    report.CompareColumn(
        f"own/{COLUMNS[i].key}", f"{COLUMNS[i].title}, other set", ".1f", True, 100
    )
    for i in (0, 1)
)
# Categories of a mixture of tar files have no names, which zero-shot classification needs.
MIXED_COLUMNS = tuple(column for column in COLUMNS if "zero_shot" not in column.key)
# With what each row gains over its initial weights, since encoders differ.
RECENT_COLUMNS = (
    *(
        report.CompareColumn(
            f"gained/{COLUMNS[i].key}", f"{COLUMNS[i].title}, gained", ".1f", True, 100
        )
        for i in (0, 1)
    ),
    *MIXED_COLUMNS,
)
RUN_COLUMNS = (
    report.CompareColumn("steps", "steps", ",.0f"),
    report.CompareColumn("flops", "TFLOP", ".2f", scale=1e-12),
    report.CompareColumn("seconds", "seconds of training", ".0f"),
)

# 48 pixels in 8 x 8 patches, a wider and deeper encoder than that of configs/toy.py.
GRID_8 = table_rows.width(96) | {
    "data.image_size": "48",
    "model.encoder.patch_size": "6",
    "model.encoder.depth": "4",
    "model.decoder.width": "64",
    "model.decoder.heads": "2",
}
GRID_4 = GRID_8 | {"model.encoder.patch_size": "12"}


@dataclasses.dataclass(frozen=True)
class Set:
    """Images, the runs on them and the columns of their table.

    Attributes:
      source, path: `data.source` and `data.path`.
      overrides: settings of every run.
      rows: of the table.
      steps: of a run; the budget of the protocol is this many steps of M3I.
      finetune: whether every run is followed by fine-tuning.
      other: arguments of a further evaluation; (): none.
      seeds: at most so many of every row.
      searched: the set whose trials choose rate and decay; "": the settings are fixed.
      protocol: of every run of a set whose rows have steps of their own; "": the one that is asked.
      fitted: two methods whose accuracy is fitted to widths and steps (`crossing.py`); (): none.
    """

    name: str
    source: str
    path: str
    overrides: Mapping[str, str]
    columns: tuple[report.CompareColumn, ...] = COLUMNS
    rows: Mapping[str, table_rows.Row] = dataclasses.field(
        default_factory=lambda: table_rows.SINGLE_STAGE
    )
    steps: int = 0
    finetune: bool = True
    other: tuple[str, ...] = ()
    seeds: int = 99
    searched: str = ""
    protocol: str = ""
    fitted: tuple[str, ...] = ()


def image_sets(
    data: pathlib.Path,
    out: pathlib.Path,
    clipart: pathlib.Path | None = None,
    fashion: pathlib.Path = table_data.FASHION,
) -> dict[str, Set]:
    """Every image set by name, with its images written, in the order of the tables.

    Args:
      data: directory of the emoji.
      out: directory of the runs.
      clipart: directory of the clip art; None: the sets that need it are left out.
      fashion: directory of Fashion-MNIST's files; left out if they are not there.
    """
    folder = out / "data"
    emoji = table_data.tars(data, folder)
    shared = _annotations(folder, "emoji")
    every = Set("emoji", "tars", str(data / "*-*.tar"), shared, steps=3500)
    found = [every]
    for style in emoji:
        others = [s for s in emoji if s != style]
        if len(others) == 1:
            split = {
                "data.split": f"{style}-train.tar",
                "data.holdout_split": f"{others[0]}-held_out.tar",
            }
            found.append(
                Set(
                    style,
                    "tars",
                    str(folder / "styles"),
                    shared | split,
                    STYLE_COLUMNS,
                    {name: table_rows.METHODS[name] for name in ("M3I", "supervised", "CLIP")},
                    STEPS_OF_A_STYLE,
                    False,
                    (f"--config.data.holdout_split={style}-held_out.tar",),
                )
            )
    if table_data.digits(folder / "digits"):
        found.append(_without_captions("digits", folder / "digits", table_rows.SINGLE_STAGE, 800))
    found.append(
        Set(
            "tuning",
            "tars",
            str(folder / "tuning" / "*.tar"),
            shared,
            rows=table_rows.TRIED,
            finetune=False,
            seeds=1,
            protocol="flops",
        )
    )
    return {
        one.name: one
        for one in [*found, *_sets_of_64_patches(data, folder, every, clipart, fashion)]
    }


def _annotations(folder: pathlib.Path, name: str) -> dict[str, str]:
    out = {
        "data.holdout": str(table_data.HOLDOUT),
        "evaluate.templates": str(folder / "names.txt"),
    }
    if (classes := folder / f"{name}_names.json").is_file():
        out["data.class_names"] = str(classes)
    return out


def _without_captions(
    name: str, path: pathlib.Path, of: Mapping[str, table_rows.Row], steps: int, **more: object
) -> Set:
    kept = {
        title: row
        for title, row in of.items()
        if not any("weakly_supervised" in stage.form for stage in row.stages)
    }
    flat = {"data.holdout": str(table_data.HOLDOUT), "data.flip_p": "0.0"}
    return Set(name, "folder", str(path), flat, COLUMNS[:4], kept, steps, **more)  # type: ignore[arg-type]


def _sets_of_64_patches(
    data: pathlib.Path,
    folder: pathlib.Path,
    emoji: Set,
    clipart: pathlib.Path | None,
    fashion: pathlib.Path,
) -> list[Set]:
    """The sets of the comparison at 8 x 8 patches, in the order of their importance."""
    drawings = f"{clipart}/*.tar"
    search = dataclasses.replace(
        emoji,
        name="search",
        path=str(folder / "tuning" / "*.tar"),
        overrides=emoji.overrides | GRID_8,
        rows=table_rows.search_rows(table_rows.METHODS, STEPS_OF_A_TRIAL),
        finetune=False,
        seeds=1,
        protocol="epochs",
    )
    grid = dataclasses.replace(
        emoji,
        name="emoji-8x8",
        overrides=emoji.overrides | GRID_8,
        rows=table_rows.METHODS,
        columns=COLUMNS + (TRANSFER_COLUMNS if clipart else ()),
        steps=STEPS,
        searched=search.name,
        other=("--data", f"tars:{drawings}") if clipart else (),
    )
    out = [search, grid]
    if clipart:
        table_data.write_names(clipart / "categories.json", folder / "clipart_names.json")
        out.append(
            dataclasses.replace(
                grid,
                name="clipart-8x8",
                path=drawings,
                overrides=_annotations(folder, "clipart") | GRID_8,
                columns=COLUMNS + TRANSFER_COLUMNS,
                other=("--data", f"tars:{emoji.path}"),
            )
        )
        mixed = [
            _mixed(grid, table_data.annotation_shares([data, clipart], folder, *shares), shares)
            for shares in itertools.product(LABELLED, CAPTIONED)
        ]
        out += mixed
        one = _mixed(
            grid,
            table_data.annotation_shares([data, clipart], folder, 1.0, 1.0, one_tar=True),
            (1.0, 1.0),
        )
        settings = {"steps": STEPS_OF_A_ROW, "searched": "", "columns": RECENT_COLUMNS}
        out += [
            dataclasses.replace(one, name="recent", rows=table_rows.RECENT, **settings),
            dataclasses.replace(one, name="encoders", rows=table_rows.ENCODERS, **settings),
        ]
    if table_data.fashion(fashion, folder / "fashion"):
        of_fashion = _without_captions("fashion-8x8", folder / "fashion", table_rows.METHODS, STEPS)
        out.append(
            dataclasses.replace(
                of_fashion, overrides=of_fashion.overrides | GRID_8, searched=search.name
            )
        )
    chosen = {name: table_rows.METHODS[name] for name in ("M3I", "supervised", "sim")}
    more = dataclasses.replace(grid, finetune=False, columns=COLUMNS, other=())
    compared = ("M3I", "supervised")
    out += [
        dataclasses.replace(
            more, name="emoji-4x4", rows=chosen, overrides=emoji.overrides | GRID_4
        ),
        dataclasses.replace(
            more, name="ablations", rows=table_rows.ABLATIONS, steps=STEPS_OF_A_ROW
        ),
        dataclasses.replace(more, name="forms", rows=table_rows.FORMS),
        dataclasses.replace(
            more,
            name="scaling",
            rows=table_rows.scaling_rows(compared, (750, 1500, 3000)),
            fitted=compared,
            columns=(*COLUMNS[:2], report.CompareColumn("loss", "loss", ".3f")),
            protocol="epochs",
        ),
    ]
    return out


def _mixed(grid: Set, tars: Sequence[str], shares: tuple[float, float]) -> Set:
    """Both sets as a mixture, of which a share of the images has a label, and another a caption."""
    labelled, captioned = (f"{100 * share:.0f}" for share in shares)
    settings = {
        "data.holdout": str(table_data.HOLDOUT),
        "data.mixture": repr(tuple(f"tars:{tar}" for tar in tars)),
        "data.class_space": "separate",
        "evaluate.templates": grid.overrides["evaluate.templates"],
    }
    names = ("M3I", "supervised", "CLIP", "supervised and CLIP", "M3I without mix")
    kept = {name: table_rows.METHODS[name] for name in names}
    return dataclasses.replace(
        grid,
        name=f"mixed-8x8-labels{labelled}-captions{captioned}",
        source="mixture",
        path="",
        overrides=settings | GRID_8,
        columns=MIXED_COLUMNS,
        rows=kept,
        other=(),
        finetune=False,
        steps=STEPS_OF_A_ROW,
    )


def overrides(
    image_set: Set, row: table_rows.Row, seed: int, chosen: Mapping[str, str]
) -> list[str]:
    """Settings of every stage of a run, as KEY=VALUE; `chosen` are those that the search found."""
    settings = {"seed": str(seed), **image_set.overrides, **chosen, **row.settings}
    return [f"{key}={value}" for key, value in settings.items()]


def named(sets: Mapping[str, Set], names: str) -> list[str]:
    """The sets that a comma-separated list names; "styles" and "8x8" are several.

    Raises:
      UserError: there is no such set.
    """
    groups = {
        "styles": [n for n, one in sets.items() if one.columns == STYLE_COLUMNS],
        "8x8": [n for n in sets if n == "search" or "-8x8" in n],
    }
    out = [n for name in names.split(",") for n in groups.get(name, [name])]
    if wrong := [name for name in out if name not in sets]:
        raise UserError(
            f"--sets {wrong[0]}: there is no such set; choose among {', '.join([*groups, *sets])}"
        )
    return out

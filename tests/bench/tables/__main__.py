"""The paper's Tables 3 to 5 in small, on real images: M3I against other methods.

    python -m tests.bench.tables --data EMOJI --clipart CLIPART --out OUT      # resumes
    python -m tests.bench.tables ... --protocol flops --sets emoji,digits      # a selection
    python -m tests.bench.tables ... --only-print                              # finished runs

Protocols: epochs (every method sees as many images, as in the paper), flops, or time (both as much
as M3I's). EMOJI holds images as tar files STYLE-NUMBER.tar in img2dataset's format, where equal
keys of two styles show the same thing, and subcategories.json with the names of the labels; CLIPART
other tars and categories.json; Fashion-MNIST is found where Debian's package puts it. A fifth of
the keys is held out by a hash.

Every run is an ordinary command line (configs/toy.py for each stage, --mode=eval,
configs/transfer/finetune.py) in OUT/runs/PROTOCOL/SET/ROW-SEED, one process at a time; a run with a
result, in its directory or in --results, is not repeated, and an interrupted one is continued.
OUT/tables.md, OUT/report.html and the file of results are rewritten after every run. Runs with
--steps, --finetune-steps or --override are further rows, whose titles name these.

The sets (`sets.py`):

    search        rate and decay of every method, the same trials for all, on a part of the emoji
                  on which the other tables train; no table holds out any of them
    emoji-8x8, clipart-8x8, mixed-8x8-labelsL-captionsC, fashion-8x8
                  48 pixels in 8 x 8 patches, with rate and decay of the search; evaluated on each
                  other; mixed: of both sets, L % of the images with labels, C % with captions
    recent        methods since the paper, on both sets with labels and captions, one drawing of an
                  emoji, at the settings of configs/toy.py
    encoders      M3I with registers, rotary positions, SwiGLU and Muon, each alone and all together
    emoji-4x4     the same in 4 x 4 patches
    ablations, forms, scaling
                  variants of M3I; the other rows of Table 3; widths and budgets
    emoji, STYLE, digits, tuning
                  32 pixels in 4 x 4 patches: the tables of the first release

FLOPs are those of the train step, counted on the traced program. Every column is measured at the
end of the run; none is the best over a run.
"""

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence

from m3i_jax.errors import UserError
from m3i_jax.run_files import write_text_atomic
from tests.bench.tables.data import FASHION
from tests.bench.tables.page import tables_page
from tests.bench.tables.results import TITLES, read_results, write_tables
from tests.bench.tables.rows import altered_rows
from tests.bench.tables.runs import PROTOCOLS, result_key, run_once, run_queue
from tests.bench.tables.sets import STEPS_OF_FINETUNING, Set, image_sets, named


def main(arguments: Sequence[str] | None = None) -> int:
    flags = argparse.ArgumentParser(description="Small tables of M3I against other methods.")
    flags.add_argument("--data", required=True, metavar="DIR", help="directory of STYLE-NUMBER.tar")
    flags.add_argument("--clipart", default="", metavar="DIR", help="directory of other tars")
    flags.add_argument("--fashion", default=str(FASHION), metavar="DIR", help="Fashion-MNIST")
    flags.add_argument("--out", required=True, metavar="DIR", help="runs and tables")
    flags.add_argument(
        "--results", default="", metavar="FILE", help="all results; default: OUT/results.json"
    )
    flags.add_argument("--protocol", default="epochs", choices=PROTOCOLS)
    flags.add_argument(
        "--sets",
        default="8x8,recent,encoders,emoji-4x4,ablations,forms,scaling",
        help="comma-separated; 8x8 and styles are several",
    )
    flags.add_argument("--methods", default="", help="rows, separated by semicolons; default: all")
    flags.add_argument("--seeds", type=int, default=3)
    flags.add_argument("--steps", type=int, default=0, help="steps of M3I; 0: those of each set")
    flags.add_argument("--finetune-steps", type=int, default=STEPS_OF_FINETUNING)
    flags.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="setting of every run, which is part of its row's title",
    )
    flags.add_argument(
        "--only-print", action="store_true", help="print the tables of the finished runs"
    )
    args = flags.parse_args(arguments)
    data, out = pathlib.Path(args.data).resolve(), pathlib.Path(args.out).resolve()
    clipart = pathlib.Path(args.clipart).resolve() if args.clipart else None
    kept = pathlib.Path(args.results).resolve() if args.results else out / "results.json"
    try:
        sets = image_sets(data, out, clipart, pathlib.Path(args.fashion))
        names = named(sets, args.sets)
    except UserError as error:
        print(f"tables: {error}", file=sys.stderr)
        return 2
    changes = _changes(args)
    if changes and "search" in names:
        print(
            f"tables: --sets search: {changes[0]} would change trials that choose the settings of"
            " other sets; leave it out",
            file=sys.stderr,
        )
        return 2
    sets = {name: _altered(one, args) for name, one in sets.items()}
    private = {str(data): "DIR", str(out): "OUT"} | ({str(clipart): "CLIPART"} if clipart else {})
    wanted = [title for title in args.methods.split(";") if title]
    failed: set[tuple[str, str, str, int]] = set()
    while True:
        results = read_results(kept, out, sets)
        text = write_tables(out, kept, sets, results)
        write_text_atomic(out / "report.html", tables_page(sets, results, TITLES))
        finished = {result_key(result) for result in results}
        remaining = [
            run
            for run in run_queue(sets, names, args.protocol, args.seeds, results)
            if run.key not in finished | failed and (not wanted or run.row.unaltered in wanted)
        ]
        if args.only_print or not remaining:
            break
        run = remaining[0]
        now = time.strftime("%H:%M:%S")
        print(f"{', '.join(map(str, run.key))}: {len(remaining)} remaining, {now}", flush=True)
        if run_once(run, out, args.finetune_steps, private, results) is None:
            failed.add(run.key)
    print(text)
    return 1 if failed else 0


def _changes(args: argparse.Namespace) -> list[str]:
    """The steps and settings of the command line, as in the titles of altered rows."""
    found = [f"steps={args.steps}"] if args.steps else []
    if args.finetune_steps != STEPS_OF_FINETUNING:
        found.append(f"finetune-steps={args.finetune_steps}")
    return found + list(args.override)


def _altered(image_set: Set, args: argparse.Namespace) -> Set:
    """The set with the steps and settings of the command line, which are part of the titles of its
    rows: altered runs are other rows, and replace no result."""
    changes = _changes(args)
    if not changes or image_set.name == "search":
        return image_set
    settings = dict(change.split("=", 1) for change in args.override)
    rows = altered_rows(image_set.rows, settings, ", ".join(changes))
    return dataclasses.replace(image_set, rows=rows, steps=args.steps or image_set.steps)


if __name__ == "__main__":
    sys.exit(main())

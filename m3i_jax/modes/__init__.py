"""One file a mode, each with `run(config, *, workdir, ...) -> exit code`: here the rooms meet, and
nowhere else."""

from typing import NamedTuple


class Mode(NamedTuple):
    """What the command line knows of a mode before it imports it.

    flags: its own, which are handed to `run`. of_run: takes the settings of the run in WORKDIR, and
    needs no --config. settings: whether it
    may be given any. together: all hosts of a run enter it; the others need one. timed: its `run`
    takes `began`, when the process did.
    compiles: what it compiles is kept for the next start.
    """

    text: str
    flags: tuple[str, ...] = ()
    of_run: bool = False
    settings: bool = True
    together: bool = False
    timed: bool = False
    compiles: bool = False


MODES = {
    "train": Mode(
        "pre-train, or go on with the run in the working directory",
        flags=("allow_changes",),
        together=True,
        timed=True,
        compiles=True,
    ),
    "show": Mode(
        "print the resolved configuration, parameters, FLOPs a step and memory of the state; reads"
        " no data"
    ),
    "preview": Mode("write a contact sheet of what the model will see to WORKDIR/preview.png"),
    "compare": Mode(
        "run a list of objectives, one after the other, and write one table: WORKDIR/compare.md,"
        " .json and .png",
        flags=("allow_changes",),
        together=True,
        compiles=True,
    ),
    "report": Mode(
        "write what the run in the working directory has logged to WORKDIR/report.html, beside"
        " those of report.beside; no --config",
        of_run=True,
    ),
    "eval": Mode(
        "evaluate the newest checkpoint of the run in the working directory: a table and"
        " WORKDIR/eval.json; needs no --config",
        flags=("checkpoint",),
        of_run=True,
        together=True,
        compiles=True,
    ),
    "export": Mode(
        "write the encoder of the run in the working directory for other tools (--format), with a"
        " model card, to WORKDIR/export",
        flags=("format",),
        of_run=True,
    ),
    "features": Mode(
        "write the features of all images of the source to a file (--out), by the run in the"
        " working directory or init_from",
        flags=("out",),
        of_run=True,
        compiles=True,
    ),
    "data": Mode(
        "report on the source before training: text, WORKDIR/data.json and the page"
        " WORKDIR/data.html"
    ),
    "profile": Mode(
        "run a few steps and trace them: WORKDIR/profile and a table of the costliest operations;"
        " SIGUSR1 traces a run under way",
        together=True,
        timed=True,
        compiles=True,
    ),
    "compile": Mode(
        "compile the train step for accelerators that are not here: does it fit, what does it cost;"
        " reads no data",
        flags=("topology", "memory", "code", "largest_batch", "suggest"),
    ),
    "replay": Mode(
        "take the step again that ended the run in the working directory, and say what is not"
        " finite; no --config",
        of_run=True,
        settings=False,
    ),
    "convert": Mode(
        "write all records of the source as ArrayRecord shards to WORKDIR; the same command"
        " resumes it"
    ),
}

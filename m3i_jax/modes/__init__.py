"""Modes of the command line, one file each, with `run(config, *, workdir, ...) -> exit code`. Only
modes import all other folders of the package."""

import operator
import pathlib
from collections.abc import Iterable
from typing import NamedTuple

from m3i_jax import schema
from m3i_jax.errors import UserError, path_exists


class Mode(NamedTuple):
    """Description of a mode, which the command line reads before it imports the mode.

    Attributes:
      text: a line for --help.
      flags: those of `FLAGS` that it has.
      of_run: uses the settings of the run in WORKDIR and needs no --config, which is run for what
        it registers; its settings are of other weights, or of a WORKDIR without a run.
      settings: accepts settings; else it has those that the run saved.
      together: runs on all hosts; the others run on one.
      shares: several processes may run it, each its share, without communication; its `run` takes
        `hosts`, the flags --coordinator, --processes and --process-id.
      preemptible: SIGTERM ends it with exit code 42, in all of its phases.
      timed: its `run` takes `began`, the start time of the process.
      takes_given: its `run` takes `given`, the keys of the settings that the command sets
        (`given_settings`): those of a run may be of other weights than the command names.
      takes_file: its `run` takes `file`, the text of --config, which another process of it runs for
        what the file registers.
      compiles: keeps compiled programs for the next start.
      reads: prefixes of the settings that it reads; (): all.
    """

    text: str
    flags: tuple[str, ...] = ()
    of_run: bool = False
    settings: bool = True
    together: bool = False
    shares: bool = False
    preemptible: bool = False
    timed: bool = False
    takes_given: bool = False
    takes_file: bool = False
    compiles: bool = False
    reads: tuple[str, ...] = ()


class Flag(NamedTuple):
    """A flag of some modes, which pass it to their `run`.

    Attributes:
      metavar: its value in --help; "": it has none, and `run` gets a bool.
      text: a line for --help, after the names of the modes.
    """

    metavar: str
    text: str


FLAGS = {
    "allow_changes": Flag("", "resume although the configuration or the data changed"),
    "checkpoint": Flag(
        "PLACE", "another run, one of its checkpoints, or a file that init_from accepts"
    ),
    "data": Flag(
        "SOURCE",
        "other data: a directory, a pattern of tar files, an entry of the mixture by name,"
        " KIND:PATH, or built-in images (shapes, scenes)",
    ),
    "untrained": Flag("", "also evaluate the initial weights of the same network"),
    "topology": Flag("NAME", "target devices, such as v5e:4x4, v5p:4x4x4, h100:8, cpu:8"),
    "memory": Flag("GIB", "memory per device; default: that of its kind"),
    "code": Flag("", "for a TPU, generate code too, which takes ten times as long"),
    "largest_batch": Flag("", "search for the largest batch that fits"),
    "suggest": Flag("", "search for mesh, remat and microbatches that fit"),
    "kernels": Flag("", "time and check every kernel of the train step, without data"),
    "format": Flag(
        "NAME", "timm, hf, stablehlo, npz or orbax; of convert array_record (default) or tar"
    ),
    "out": Flag("FILE", "the npz file to write"),
    "shard": Flag(
        "I/N", "write share I of N, from 0; /N: the I of a Slurm array or an indexed Job"
    ),
    "size": Flag("PIXELS", "scale larger images down to this shorter side"),
    "quality": Flag(
        "Q",
        "encode every image again, as a JPEG of this quality (with --size alone: 90, and images"
        " that are small enough keep their bytes)",
    ),
    "engine": Flag("NAME", "local (processes of this machine) or ray (a cluster)"),
}
_DATA = tuple(
    f"data.{name}"
    for name in (
        "source", "path", "directory", "mixture", "class_space", "class_names", "annotations",
        "index", "keep", "split", "holdout_split", "map_unlabelled", "size", "holdout",
        "background", "threads", "missing",
    )
)  # fmt: skip
_EVALUATION = ("image_size", "classes", "captions", "caption_length", "augment.mean", "augment.std")
_RESIZING = tuple(f"evaluate.{name}" for name in ("crop", "interpolation", "squash"))
MODES = {
    "train": Mode(
        "train, or resume the run in the working directory",
        flags=("allow_changes",),
        together=True,
        preemptible=True,
        timed=True,
        compiles=True,
    ),
    "show": Mode(
        "print the resolved settings, parameters, FLOPs a step, memory of the state and days, here"
        " and on accelerators; reads no images"
    ),
    "preview": Mode("write a contact sheet of what the model will see to WORKDIR/preview.png"),
    "compare": Mode(
        "run a list of objectives, one after the other, and write one table: WORKDIR/compare.md,"
        " .json and .png",
        flags=("allow_changes",),
        together=True,
        preemptible=True,
        compiles=True,
    ),
    "report": Mode(
        "write the page WORKDIR/report.html with metrics and figures of the run in the working"
        " directory, next to the runs of report.beside; needs no --config",
        of_run=True,
        reads=("report.beside", "report.private"),
    ),
    "eval": Mode(
        "evaluate the newest checkpoint of the run in the working directory, on its data or others"
        " (--data): a table and WORKDIR/eval.json; needs no --config",
        flags=("checkpoint", "data", "untrained"),
        of_run=True,
        together=True,
        preemptible=True,
        takes_given=True,
        compiles=True,
        reads=(
            "seed",
            *_DATA,
            *(f"data.{name}" for name in _EVALUATION),
            *(
                "evaluate.",
                "model.",
                "dense.maps.",
                "dense.detect.",
                "dense.segment.",
                # how an evaluation resizes images
                *(f"dense.geometry.{name}" for name in ("rule", "long", "short", "test_short")),
                "objective.forms",
                "objective.target_checkpoint",
                "init.weights",
                "init.strict",
                "optim.ema_of",
            ),
            *(
                "parallel.",
                "report.private",
                "report.beside",
                "train.batch_size",
                "train.microbatches",
                "train.round_batch",
            ),
        ),
    ),
    "export": Mode(
        "write the encoder, detector or segmenter of the run in the working directory for other"
        " tools (--format), with a model card, to WORKDIR/export",
        flags=("format",),
        of_run=True,
        reads=("evaluate.encoder", *_RESIZING, "report.licence", "report.private"),
    ),
    "features": Mode(
        "write the features of all images of the source to a file (--out), by the run in the"
        " working directory or init_from",
        flags=("out",),
        of_run=True,
        preemptible=True,
        takes_given=True,
        compiles=True,
        reads=(
            *_DATA,
            *(f"evaluate.{name}" for name in ("features", "encoder", "batch_size")),
            *_RESIZING,
            *("init_from", "init.weights", "report.private"),
        ),
    ),
    "data": Mode(
        "report on the source before training: text, WORKDIR/data.json and the page"
        " WORKDIR/data.html"
    ),
    "profile": Mode(
        "run a few steps and trace them: WORKDIR/profile and a table of the costliest operations;"
        " SIGUSR1 traces a running training; --kernels: a table of the kernels of the step alone",
        flags=("kernels",),
        together=True,
        timed=True,
        compiles=True,
    ),
    "compile": Mode(
        "compile the train step for accelerators that need not be present: memory, FLOPs, time;"
        " reads no data",
        flags=("topology", "memory", "code", "largest_batch", "suggest"),
        takes_file=True,
    ),
    "replay": Mode(
        "repeat the step that ended the run in the working directory, and print what is not finite;"
        " needs no --config",
        of_run=True,
        settings=False,
    ),
    "index": Mode(
        "read the headers of the tar files of the source once, into data.index or WORKDIR/index;"
        " the same command resumes it; on several hosts each reads its share (--shard)",
        flags=("shard",),
        shares=True,
        preemptible=True,
        reads=("data.", "report.private"),
    ),
    "convert": Mode(
        "write all records of the source as shards to WORKDIR, array_record or tar (--format); the"
        " same command resumes it; on several hosts each writes its share (--shard)",
        flags=("shard", "size", "quality", "format"),
        shares=True,
        preemptible=True,
    ),
    "curate": Mode(
        "write a keep-list without bad records, copies, crops and images of evaluation sets:"
        " WORKDIR/keep.parquet, and the page WORKDIR/curate.html of what is left out and why",
        flags=("engine",),
        preemptible=True,
        reads=("data.", "curate.", "report.private"),
    ),
}


# Sections that one mode alone reads.
_OF_ONE_MODE = {"compare.": "compare", "curate.": "curate"}


def refuse_unread(mode: str, overrides: Iterable[str], config: schema.Config) -> None:
    """Refuse settings without effect: assignments of the command line that the mode, the source or
    the task does not read, and files that the source does not read, whoever named them.

    Args:
      mode: its name.
      overrides: assignments `a.b=v`.
      config: the settings with them.

    Raises:
      UserError: names the setting and the reason.

    >>> mixed = schema.Data(source="mixture", mixture=("folder:/a",), path="/b")
    >>> refuse_unread("eval", ["data.path=/b"], schema.Config(data=mixed))
    Traceback (most recent call last):
    m3i_jax.errors.UserError: config.data.path: '/b' has no effect, because ...
    >>> refuse_unread("export", ["optim.lr=1"], schema.Config())
    Traceback (most recent call last):
    m3i_jax.errors.UserError: config.optim.lr: has no effect, because --mode=export does ...
    """
    from m3i_jax import validation
    from m3i_jax.data.sources import mixture

    reads, keys = MODES[mode].reads, [text.partition("=")[0] for text in overrides]
    if unread := [key for key in keys if reads and not key.startswith(reads)]:
        raise UserError(
            f"config.{unread[0]}: has no effect, because --mode={mode} does not read it; leave it"
            " out"
        )
    for key in keys:
        reader = next((of for part, of in _OF_ONE_MODE.items() if key.startswith(part)), mode)
        if reader != mode:
            raise UserError(
                f"config.{key}: has no effect, because --mode={reader} alone reads it; leave it out"
            )
    reasons = mixture.unread(config.data, counted=bool(reads))
    for key in dict.fromkeys([*keys, "data.class_names", "data.directory"]):
        value = getattr(config.data, key.removeprefix("data."), None)
        if key in reasons and value != getattr(schema.Data, key.removeprefix("data.")):
            raise UserError(f"config.{key}: {value!r} has no effect, because {reasons[key]}")
    for name, reason in validation.unread_by_task(config).items():
        for key in keys:
            if key == name or (name.endswith(".") and key.startswith(name)):
                value = operator.attrgetter(key)(config)
                if value != operator.attrgetter(key)(schema.Config()):
                    raise UserError(f"config.{key}: {value!r} has no effect, because {reason}")


def given_settings(
    overrides: Iterable[str], config: schema.Config, *, file: bool
) -> frozenset[str]:
    """Returns the keys of the settings that a command sets: those that it assigns and, of a file of
    settings, how weights are read. The other settings of a file are not said of certain weights:
    recipes set them for all.

    Args:
      overrides: assignments `a.b=v`.
      config: the settings with them.
      file: whether they are of a --config, not those that a run saved.

    >>> averaged = schema.Config(init=schema.Init(weights="ema"))
    >>> [sorted(given_settings(["seed=1"], averaged, file=file)) for file in (False, True)]
    [['seed'], ['init.weights', 'seed']]
    """
    assigned = {text.partition("=")[0] for text in overrides}
    read = {
        f"init.{name}"
        for name in ("weights", "strict")
        if file and getattr(config.init, name) != getattr(schema.Init, name)
    }
    return frozenset(assigned | read)


def has_saved_step(workdir: str) -> bool:
    """Returns whether the run in a directory has saved a step, from which it goes on."""
    saved = (pathlib.Path(workdir) / "checkpoints").glob("*")
    return any(step.name.isdecimal() for step in saved)


def refuse_missing(mode: str, config: schema.Config, workdir: str) -> None:
    """Refuse weights that do not exist, before the trainer is imported: initial ones, which a run
    that has a checkpoint does not need, teachers, and an average that the run does not keep.

    Raises:
      UserError: `init_from`, `objective.target_checkpoint` or `objective.teachers` names a path
        that does not exist, or `evaluate.encoder` weights that the run will not have.
    """
    run = pathlib.Path(workdir)
    saved = has_saved_step(workdir)
    begun = {
        "train": saved,
        "compare": (run / "compare").is_dir(),
        "profile": False,
        "features": saved,
    }
    planned = ("train", "compare", "profile", "show", "compile", "preview")
    for teacher in config.objective.teachers if mode in planned else ():
        if not path_exists(teacher):
            raise UserError(
                f"config.objective.teachers: there is no {teacher!r}; give the workdir of a run, a"
                " file of weights or a Hugging Face directory"
            )
    if config.evaluate.encoder == "ema" and mode in ("train", "compare", "eval"):
        if not config.traits.views and config.optim.ema_of != "all":  # dense tasks, own ones too
            raise UserError(
                f"config.evaluate.encoder: 'ema' needs optim.ema_of=all: config.task={config.task}"
                f" has no targets, and with optim.ema_of={config.optim.ema_of} it keeps no average;"
                " set it, or use online"
            )
        # an evaluation asks the run of its checkpoint (`eval_source`)
        if mode != "eval" and not config.optim.averages:
            raise UserError(
                "config.evaluate.encoder: 'ema' needs optim.ema below 1: with"
                f" optim.ema={config.optim.ema:g} the run has no momentum average, only its initial"
                " weights; use online, or train with a smaller optim.ema"
            )
    if begun.get(mode, True):
        return
    paths = {
        "init_from": config.init_from,
        "objective.target_checkpoint": config.objective.target_checkpoint,
    }
    for key, weights in paths.items():
        if weights and not path_exists(weights):
            raise UserError(
                f"config.{key}: there is no {weights!r}; give the workdir of a run, or a file of"
                " weights"
            )

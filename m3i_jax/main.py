"""The command line.

    python -m m3i_jax.main --config FILE[:name=value,...] --workdir DIR [--config.a.b=v] [--mode=M]
    python -m m3i_jax.main init DIR [--config configs/NAME.py] [--launch]

`python -m m3i_jax` and the console command `m3i-jax` are the same.

Exit codes: 0 done, 2 refused, 3 does not fit, 42 stopped (the same command continues), 130
interrupted, 1 any other error. Only the module of the requested mode is imported.
"""

from m3i_jax import installation, interrupts

if __name__ == "__main__":  # before the other imports
    interrupts.install_handler()
    installation.exit_without_program()

import argparse
import contextlib
import importlib
import io
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import ml_collections

from m3i_jax import config as configuration
from m3i_jax import library_errors, privacy, schema
from m3i_jax.errors import (
    MissingWeights,
    RunStopped,
    UserError,
    one_line,
    path_exists,
    refuse_system_errors,
)
from m3i_jax.modes import (
    FLAGS,
    MODES,
    given_settings,
    has_saved_step,
    refuse_missing,
    refuse_unread,
)
from m3i_jax.training import malloc
from m3i_jax.version import __version__

MAX_ERROR_LENGTH = 4_000  # characters of an error line
_PATIENCE = 20.0  # seconds for the threads of a preempted run to end; Slurm kills after 30


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors, and which refuses a repeated flag."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = [argument.partition("=")[0] for argument in args or ()]
        for flag in given:
            if flag.startswith("--") and given.count(flag) > 1:
                raise UserError(f"{flag}: is given twice; remove one of them")
        return super().parse_known_args(args, namespace)


def parser() -> Parser:
    modes = "\n".join(f"  {name:<8} {mode.text}" for name, mode in MODES.items())
    parser = Parser(
        prog="python -m m3i_jax.main",
        description="M3I Pre-training in JAX.",
        epilog=(
            f"modes:\n{modes}\n\ninit DIR [--config configs/NAME.py] [--launch]: copy a recipe that"
            f" ships to DIR, to edit it (default: {configuration.DEFAULT_RECIPE}), and the launch"
            " scripts\n\nevery key of the configuration, with its default:\n"
            f"{configuration.help_table()}"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="FILE[:name=value,...]",
        help="configuration file and its arguments, such as configs/folder.py:path=DIR;"
        " configs/NAME.py that is not here is the one that ships",
    )
    parser.add_argument(
        "--config.KEY=VALUE",
        action="store_true",
        dest="_",
        help="set one key of the configuration, as --config.optim.lr=1e-4",
    )
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        help="directory of checkpoints, metrics and images; the same command resumes the run",
    )
    parser.add_argument(
        "--mode",
        default="train",
        metavar="MODE",
        help=f"one of {', '.join(MODES)} (default: train)",
    )
    parser.add_argument(
        "--coordinator",
        default="",
        metavar="HOST:PORT",
        help="several hosts: address of the first host (not needed on TPU and Slurm)",
    )
    parser.add_argument(
        "--processes", default="", metavar="N", help="several hosts: number of hosts"
    )
    parser.add_argument(
        "--process-id", default="", metavar="I", help="several hosts: index of this host, from 0"
    )
    for name, flag in FLAGS.items():
        readers = ", ".join(reader for reader, mode in MODES.items() if name in mode.flags)
        kind: dict[str, Any] = (
            {"default": "", "metavar": flag.metavar} if flag.metavar else {"action": "store_true"}
        )
        parser.add_argument(_option(name), help=f"{readers}: {flag.text}", **kind)
    parser.add_argument("--version", action="version", version=f"m3i_jax {__version__}")
    return parser


def _init(arguments: Sequence[str]) -> int:
    """`init DIR`: copy a recipe and print the command that runs the copy."""
    parser = Parser(prog="m3i-jax init", allow_abbrev=False)
    parser.description = "Copy a recipe that ships with m3i_jax to a directory, to edit it."
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument(
        "--config",
        default=configuration.DEFAULT_RECIPE,
        metavar="configs/NAME.py",
        help=f"one of {', '.join(configuration.shipped_recipes())} (default: %(default)s)",
    )
    parser.add_argument(
        "--launch",
        action="store_true",
        help="copy the scripts for clusters and clouds as well, to DIR/launch",
    )
    flags = parser.parse_args(arguments)
    if flags.launch:
        print(f"copied the launch scripts to {configuration.copy_launchers(flags.directory)}")
    command = configuration.copy_recipe(flags.directory, flags.config)
    print(f"copied {flags.config}; edit the copy, then run it:\n  {command}")
    return 0


def _process_start() -> float:
    """Start of this process on the clock of `time.monotonic()`; now, if the system does not
    know."""
    try:
        ticks = float(pathlib.Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        return (
            time.monotonic()
            - time.clock_gettime(time.CLOCK_BOOTTIME)
            + ticks / os.sysconf("SC_CLK_TCK")
        )
    except (OSError, ValueError, IndexError, AttributeError):
        return time.monotonic()


def _option(name: str) -> str:
    """`--largest-batch` for `largest_batch`."""
    return f"--{name.replace('_', '-')}"


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(flags, assignments of --config.KEY=VALUE). Raises UserError for a flag that is unknown,
    missing, or not of the mode, and for a working directory that cannot be one."""
    overrides = [a[len("--config.") :] for a in arguments if a.startswith("--config.")]
    flags, unknown = parser().parse_known_args(
        [a for a in arguments if not a.startswith("--config.")]
    )
    if unknown:
        bare = [key for key in overrides if "=" not in key]
        hint = (
            f"write a value after its key and '=': --config.{bare[0]}={unknown[0]}"
            if bare
            else "--help lists them"
        )
        raise UserError(f"{unknown[0]}: there is no such flag; {hint}")
    if flags.mode not in MODES:
        raise configuration.unknown_key_error(flags.mode, MODES, "--mode=", "mode")
    mode = MODES[flags.mode]
    if not flags.config and not mode.of_run:
        raise UserError("--config: is missing; name a file, such as --config configs/quickstart.py")
    if not flags.workdir and flags.mode != "show":
        raise UserError(
            "--workdir: is missing; name a directory for the run, such as --workdir runs/first"
        )
    if "://" in (flags.workdir or ""):
        raise UserError(
            f"--workdir {flags.workdir}: a URL is not a directory; give a local directory, such as"
            " a mounted bucket"
        )
    for name in ("workdir", "out", "checkpoint"):  # shells leave `~` in --workdir=~/runs
        value = os.path.expanduser(getattr(flags, name) or "")
        if value.startswith("~"):
            raise UserError(
                f"{_option(name)} {value}: begins with the home directory of an unknown user; write"
                " an absolute path, or ./ before it"
            )
        setattr(flags, name, value)
    workdir = pathlib.Path(flags.workdir or ".")
    # not by the methods of pathlib: some Pythons take a disk that does not answer for no directory
    existing = next(p for p in (workdir, *workdir.parents) if path_exists(p, follow=False))
    if not path_exists(existing) or not existing.is_dir():
        raise UserError(
            f"--workdir {flags.workdir}: {str(existing)!r} is not a directory; name one for the"
            " run, such as --workdir runs/first"
        )
    of_hosts = [] if mode.together or mode.shares else ["coordinator", "processes", "process_id"]
    for name in sorted(FLAGS.keys() - set(mode.flags)) + of_hosts:
        if getattr(flags, name):
            raise UserError(f"{_option(name)}: does not belong to --mode={flags.mode}")
    if not mode.settings and overrides:
        raise UserError(
            f"--config.{overrides[0].partition('=')[0]}: does not belong to --mode={flags.mode},"
            " which uses the saved settings; remove it"
        )
    return flags, overrides


def _configured(flags: argparse.Namespace, overrides: list[str]) -> ml_collections.ConfigDict:
    """The settings of --config. Where its recipe starts from weights that are gone, and a run in
    the working directory started from them and has a checkpoint, those that the run saved."""
    try:
        return configuration.load_config(flags.config, overrides)
    except MissingWeights as error:
        if flags.mode != "train" or not has_saved_step(flags.workdir):
            raise
        saved = configuration.load_from_workdir(flags.workdir, "--workdir")
        unused = importlib.import_module("m3i_jax.training.unused_model_settings")
        unused.reset_unused_model_settings(saved)
        if saved.init_from != os.path.expanduser(error.path):
            raise
        if flags.process_id in ("", "0"):
            print(
                f"{error.path!r} does not exist any more: the run, which started from it, continues"
                f" with its own settings, {pathlib.Path(flags.workdir) / 'config.txt'}; arguments"
                f" of --config {flags.config} are not read",
                flush=True,
            )
        return saved


def _reads_run(flags: argparse.Namespace) -> bool:
    """Whether a command has the settings that the run in its working directory saved. Other weights
    (--checkpoint), and a directory without a run, have those of the file."""
    mode = MODES[flags.mode]
    if not flags.config or not mode.settings:
        return True
    saved = (pathlib.Path(flags.workdir) / "config.txt").is_file() and has_saved_step(flags.workdir)
    return mode.of_run and saved and not flags.checkpoint


def _is_weight_file(path: str) -> bool:
    """Whether a path is a file of weights, or a Hugging Face directory."""
    return os.path.isfile(path) or os.path.isfile(os.path.join(path, "config.json"))


def _settings(flags: argparse.Namespace, overrides: list[str]) -> schema.Config:
    """The settings of a command, of its file or of the run in its working directory."""
    if flags.config:
        file = configuration.find_config_file(flags.config)
        found, file = configuration.describe_config_file(file), file.absolute()
    if not _reads_run(flags):
        config = _configured(flags, overrides)
    else:
        if flags.config:
            found += f", run for what it registers: the settings are those of {flags.workdir}"
            with contextlib.suppress(MissingWeights):
                configuration.load_config(flags.config, overrides)
        config = configuration.load_from_workdir(flags.workdir, "--workdir")
    if flags.data:
        eval_data = importlib.import_module("m3i_jax.modes.eval_data")
        eval_data.use_data(config, flags.data, overrides)
    if _is_weight_file(flags.checkpoint) and not config.init_from:
        config.init_from = flags.checkpoint  # init.weights and init.strict say how it is read
    configuration.apply_overrides(config, overrides)
    settings = configuration.resolve(config)
    refuse_missing(flags.mode, settings, flags.workdir or "")
    refuse_unread(flags.mode, overrides, settings)
    if flags.config:
        configuration.reject_config_in_data(str(file), settings.data)
        if flags.process_id in ("", "0"):
            print(found, flush=True)
    return settings


@contextlib.contextmanager
def _hosts(flags: argparse.Namespace, settings: schema.Config) -> Iterator[None]:
    """Connect the hosts of a run for the block. An error here, before the block too, ends all of
    them; at its end they wait for each other."""
    from m3i_jax.parallel import barriers, heartbeat

    with heartbeat.refuse_on_error(), refuse_system_errors():
        _start_hosts(flags, settings)
        yield
        # the first host writes reports when the others are done; jax.distributed would wait for it
        # for a minute only, and then end them with an error
        barriers.barrier("end", limit=1800.0)


def _start_hosts(flags: argparse.Namespace, settings: schema.Config) -> None:
    from m3i_jax.parallel import distributed, heartbeat

    processes = distributed.detect_processes(
        flags.coordinator,
        flags.processes,
        flags.process_id,
        environ=os.environ,
        tpu=distributed.on_tpu(os.environ),
    )
    distributed.start_distributed(
        processes,
        configuration.config_to_text(settings),
        settings.parallel.mesh,
        beat=settings.parallel.heartbeat,
    )
    interrupts.notify_hosts(heartbeat.end_hosts)


def _run(arguments: Sequence[str], began: float, process: bool) -> int:
    if arguments[:1] == ["init"]:
        return _init(arguments[1:])
    flags, overrides = _parse(arguments)
    mode = MODES[flags.mode]
    if process and mode.preemptible:
        interrupts.exit_on_sigterm()
    if process and mode.together:
        interrupts.note_trace_requests()
    settings = _settings(flags, overrides)
    options = {name: getattr(flags, name) for name in mode.flags}
    if mode.timed:
        options["began"] = began
    if mode.takes_given:
        options["given"] = given_settings(overrides, settings, file=not _reads_run(flags))
    if mode.takes_file:
        options["file"] = flags.config
    if mode.shares:
        options["hosts"] = (flags.coordinator, flags.processes, flags.process_id)
    hosts = _hosts(flags, settings) if mode.together else contextlib.nullcontext()
    with privacy.private_umask(settings.report.private), hosts, refuse_system_errors():
        if mode.compiles:
            monitoring = importlib.import_module("m3i_jax.modes.monitoring")
            monitoring.enable_compilation_cache(pathlib.Path(flags.workdir))
        module = importlib.import_module(f"m3i_jax.modes.{flags.mode}")
        return module.run(settings, workdir=flags.workdir, **options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Without arguments, the command is that of this process, whose late messages are silenced after
    an error.
    """
    began, process = time.monotonic(), arguments is None
    if process:
        began = _process_start()
        interrupts.install_handler()
        malloc.limit_arenas()  # before any thread starts
        interrupts.watch_long_calls()
        for stream in (sys.stdout, sys.stderr):  # names that are no UTF-8 become printable
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
    with privacy.redact_logs(forever=process):
        if process:
            library_errors.install_hooks()
        try:
            with refuse_system_errors():
                code = _run(sys.argv[1:] if arguments is None else arguments, began, process)
                if sys.stdout is not None:
                    # a full disk is reported here, not at interpreter exit
                    sys.stdout.flush()
        except (UserError, RunStopped) as error:
            stopped = isinstance(error, RunStopped)
            print(
                f"m3i_jax: {'stopped: ' if stopped else ''}{one_line(error, MAX_ERROR_LENGTH)}",
                file=sys.stderr,
                flush=True,
            )
            if process and stopped:
                # Python would wait for a thread that waits for a hung disk.
                os._exit(1)
            code = getattr(error, "status", 1)
        except KeyboardInterrupt:
            if not process:
                raise
            interrupts.exit_interrupted()
        except Exception as error:
            if not process:
                raise
            traceback.print_exc()
            print(
                f"m3i_jax: a bug in m3i_jax ({one_line(error) or type(error).__name__}); please"
                " report the lines above",
                file=sys.stderr,
            )
            code = 1
        if process and code:
            library_errors.silence_process()
        if process and code == interrupts.PREEMPTED:
            interrupts.end_within(_PATIENCE, code)
        return code


if __name__ == "__main__":
    sys.exit(main())

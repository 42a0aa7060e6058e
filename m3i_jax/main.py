"""The command line: `python -m m3i_jax.main --config FILE[:name=value,...] --workdir DIR
[--config.a.b=v] [--mode=...]`.

Exit codes: 0 done, 2 refused, 3 does not fit, 42 preempted and saved, 1 anything else. Only the
mode that runs is imported."""

import argparse
import contextlib
import importlib
import io
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from m3i_jax import config as configuration
from m3i_jax import library_errors, privacy
from m3i_jax.errors import RunStopped, UserError, one_line, refuse_system_errors
from m3i_jax.modes import MODES
from m3i_jax.training import malloc
from m3i_jax.version import __version__

LONGEST = 4_000  # characters of the line that says what went wrong


class Parser(argparse.ArgumentParser):
    """Refuses on one line, as everything else does; and a flag that is given twice."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = [argument.partition("=")[0] for argument in args or ()]
        for flag in given:
            if flag.startswith("--") and given.count(flag) > 1:
                raise UserError(f"{flag}: is given twice; leave one of them out")
        return super().parse_known_args(args, namespace)


def parser() -> Parser:
    modes = "\n".join(f"  {name:<8} {mode.text}" for name, mode in MODES.items())
    out = Parser(
        prog="python -m m3i_jax.main",
        description="M3I Pre-training in JAX.",
        epilog=(
            f"modes:\n{modes}\n\nevery key of the configuration, with its"
            f" default:\n{configuration.help_table()}"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    out.add_argument(
        "--config",
        metavar="FILE[:name=value,...]",
        help="configuration file and its arguments, such as configs/folder.py:path=DIR",
    )
    out.add_argument(
        "--config.KEY=VALUE",
        action="store_true",
        dest="_",
        help="set one key of the configuration, as --config.optim.lr=1e-4",
    )
    out.add_argument(
        "--workdir",
        metavar="DIR",
        help="where the run keeps checkpoints, metrics and images; the same command resumes it",
    )
    out.add_argument(
        "--mode",
        default="train",
        metavar="MODE",
        help=f"one of {', '.join(MODES)} (default: train)",
    )
    out.add_argument(
        "--coordinator",
        default="",
        metavar="HOST:PORT",
        help="of several hosts: address of the first (not on TPU, Slurm)",
    )
    out.add_argument("--processes", default="", metavar="N", help="of several hosts: how many")
    out.add_argument(
        "--process-id", default="", metavar="I", help="of several hosts: which this is, from 0"
    )
    out.add_argument(
        "--allow-changes",
        action="store_true",
        help="train, compare: resume although the configuration or the data changed",
    )
    out.add_argument(
        "--checkpoint",
        default="",
        metavar="PLACE",
        help="eval: another run, one checkpoint of it, or what init_from takes",
    )
    out.add_argument(
        "--topology",
        default="",
        metavar="NAME",
        help="compile: for what, such as v5e:4x4, v5p:4x4x4, h100:8, cpu:8",
    )
    out.add_argument(
        "--memory",
        default="",
        metavar="GIB",
        help="compile: memory of a device, if not what its kind has",
    )
    out.add_argument(
        "--code",
        action="store_true",
        help="compile: for a TPU make code too, which takes ten times as long",
    )
    out.add_argument(
        "--largest-batch", action="store_true", help="compile: search the largest batch that fits"
    )
    out.add_argument(
        "--suggest",
        action="store_true",
        help="compile: search mesh, remat and microbatches that fit",
    )
    out.add_argument(
        "--format", default="", metavar="NAME", help="export: timm, hf, stablehlo, npz or orbax"
    )
    out.add_argument("--out", default="", metavar="FILE", help="features: the npz file to write")
    out.add_argument("--version", action="version", version=f"m3i_jax {__version__}")
    return out


def _process_began() -> float:
    """When this process began, of `time.monotonic()`; now, where the system does not say."""
    try:
        ticks = float(pathlib.Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        return (
            time.monotonic()
            - time.clock_gettime(time.CLOCK_BOOTTIME)
            + ticks / os.sysconf("SC_CLK_TCK")
        )
    except (OSError, ValueError, IndexError, AttributeError):
        return time.monotonic()


def _run(arguments: Sequence[str], began: float) -> int:
    overrides = [a[len("--config.") :] for a in arguments if a.startswith("--config.")]
    flags, unknown = parser().parse_known_args(
        [a for a in arguments if not a.startswith("--config.")]
    )
    if unknown:
        bare = [key for key in overrides if "=" not in key]
        hint = (
            f"a value follows its key after '=': --config.{bare[0]}={unknown[0]}"
            if bare
            else "--help lists them"
        )
        raise UserError(f"{unknown[0]}: there is no such flag; {hint}")
    if flags.mode not in MODES:
        raise configuration.unknown_key_error(flags.mode, MODES, "--mode=", "mode")
    if not flags.config and not MODES[flags.mode].of_run:
        raise UserError("--config: is missing; name a file, such as --config configs/quickstart.py")
    if not flags.workdir and flags.mode != "show":
        raise UserError(
            "--workdir: is missing; name a directory for the run, such as --workdir runs/first"
        )
    if "://" in (flags.workdir or ""):
        raise UserError(
            f"--workdir {flags.workdir}: an address is no directory; name one of this machine, such"
            " as a mounted bucket"
        )
    asked = pathlib.Path(flags.workdir or ".")
    there = next(place for place in (asked, *asked.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise UserError(
            f"--workdir {flags.workdir}: {str(there)!r} is no directory; name one for the run, such"
            " as --workdir runs/first"
        )
    mode = MODES[flags.mode]
    foreign = {name for other in MODES.values() for name in other.flags} - set(mode.flags)
    for name in sorted(foreign) + (
        [] if mode.together else ["coordinator", "processes", "process_id"]
    ):
        if getattr(flags, name):
            raise UserError(f"--{name.replace('_', '-')}: does not belong to --mode={flags.mode}")
    if not mode.settings and (flags.config or overrides):
        raise UserError(
            f"--config: does not belong to --mode={flags.mode}, which takes the settings that were"
            " saved; leave it out"
        )
    if flags.config:
        config = configuration.load_config(flags.config, overrides)
    else:
        config = configuration.load_from_workdir(flags.workdir, "--workdir")
    configuration.apply_overrides(config, overrides)
    settings = configuration.resolve(config)
    mode.refuse(flags.mode, overrides, settings, flags.workdir or "")
    if flags.config:
        configuration.reject_config_in_data(flags.config.partition(":")[0], settings.data)
    more = {name: getattr(flags, name) for name in mode.flags} | (
        {"began": began} if mode.timed else {}
    )
    alone: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if mode.together:
        from m3i_jax.parallel import distributed, heartbeat

        place = distributed.detect_processes(
            flags.coordinator,
            flags.processes,
            flags.process_id,
            environ=os.environ,
            tpu=distributed.on_tpu(os.environ),
        )
        distributed.start_distributed(
            place,
            configuration.config_to_text(settings),
            settings.parallel.mesh,
            beat=settings.parallel.heartbeat,
        )
        alone = heartbeat.refuse_on_error()
    if mode.compiles:
        watch = importlib.import_module("m3i_jax.modes.monitoring")
        watch.enable_compilation_cache(pathlib.Path(flags.workdir))
    room = importlib.import_module(f"m3i_jax.modes.{flags.mode}")
    with privacy.private_umask(settings.report.private), alone, refuse_system_errors():
        return room.run(settings, workdir=flags.workdir, **more)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of a command; of this process, which it then may silence, if no arguments are
    given."""
    began, process = time.monotonic(), arguments is None
    if process:
        began = _process_began()
        malloc.limit_arenas()  # before there are threads
        for stream in (sys.stdout, sys.stderr):  # a name that is no UTF-8 can be printed, too
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
    with privacy.redact_logs(forever=process):
        if process:
            library_errors.install_hooks()
        try:
            with refuse_system_errors():
                code = _run(sys.argv[1:] if arguments is None else arguments, began)
                if sys.stdout is not None:
                    # a disk or a pipe that refuses it does so here, not after the last word
                    sys.stdout.flush()
        except (UserError, RunStopped) as error:
            stopped = isinstance(error, RunStopped)
            print(
                f"m3i_jax: {'stopped: ' if stopped else ''}{one_line(error, LONGEST)}",
                file=sys.stderr,
                flush=True,
            )
            if process and stopped:
                # a thread may wait for a disk that never answers, and Python would wait for the
                # thread
                os._exit(1)
            code = getattr(error, "status", 1)
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
        return code


if __name__ == "__main__":
    sys.exit(main())

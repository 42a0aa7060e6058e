"""Program and memory of a TPU compilation before code generation.

Code generation takes nine tenths of a compilation by libtpu; operations and memory are settled
before it, and libtpu can dump both at that point. So a subprocess compiles, reads the dump, sends
it, and ends."""

import multiprocessing
import pathlib
import re
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax

from m3i_jax.errors import UserError

POLL = 0.5  # seconds
# in the order of writing: the program, its memory, and a file that is written after both
_TEXT, _MEMORY, _AFTER = (
    "*.after_optimizations.txt",
    "*.after_optimizations-memory-usage-report.txt",
    "*.after_optimizations_after_buffer_assignment.txt",
)
_MAIN = re.compile(r"Memory Space: default \(color=0\)\s+Total bytes: (\d+)")


class EarlyProgram(NamedTuple):
    """The part of a `jax.stages.Compiled` that needs no code: its text, and its peak, which the
    compiler compares with a chip's memory."""

    text: str
    peak: int

    def as_text(self) -> str:
        return self.text

    def memory_analysis(self) -> Any:
        other = dict.fromkeys(
            (f"{part}_size_in_bytes" for part in ("argument", "output", "alias", "temp")), 0
        )
        return SimpleNamespace(peak_memory_in_bytes=self.peak, **other)


def read_libtpu_dump(folder: pathlib.Path) -> EarlyProgram | None:
    """The program in a directory that libtpu dumps to; None if it is not complete."""
    if not any(folder.glob(_AFTER)):
        return None
    texts, reports = sorted(folder.glob(_TEXT)), sorted(folder.glob(_MEMORY))
    match = _MAIN.search(reports[-1].read_text()) if texts and reports else None
    return EarlyProgram(texts[-1].read_text(), int(match[1])) if match else None


def compile_until_scheduled(
    lowered: jax.stages.Lowered, options: dict[str, Any], folder: pathlib.Path
) -> EarlyProgram | jax.stages.Compiled:
    """The program that libtpu makes of a lowered one, as soon as memory and operations are settled;
    the compiled program if the dump is not as expected. The compiler continues in a thread, so the
    process should end soon: `run_in_subprocess`.

    Args:
      lowered: for a TPU.
      options: compiler options.
      folder: empty directory.

    Raises:
      the errors of the compiler.
    """
    done: list[Any] = []

    def work() -> None:
        try:
            done.append(
                lowered.compile(
                    compiler_options=options
                    | {
                        "xla_dump_to": str(folder),
                        "xla_dump_hlo_as_text": True,
                    }
                )
            )
        except Exception as error:
            done.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL)
        if not done and (program := read_libtpu_dump(folder)):
            return program
    if isinstance(done[0], Exception):
        raise done[0]
    return done[0]


def run_in_subprocess(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(folder, *arguments)` in a subprocess that ends with the result, even if threads are
    still running. `folder` is an empty directory. All arguments must be picklable.

    Raises:
      UserError: that of the function.
      RuntimeError: the function raised another error, which is printed to stderr, or the process
        was killed.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="m3i_jax_") as folder:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_work, args=(sender, function, pathlib.Path(folder), *arguments), daemon=True
        )
        process.start()
        sender.close()
        try:
            out, error, trace = receiver.recv()
        except EOFError:
            process.join()
            reason = (
                "it was killed; is there enough memory?"
                if process.exitcode == -9
                else "its output is above"
            )
            raise RuntimeError(
                f"the process that compiles ended with {process.exitcode}: {reason}"
            ) from None
        finally:
            process.kill()
            process.join()
            receiver.close()
    if trace:
        print(trace, file=sys.stderr)  # by this process, whose output is redacted
    if error:
        raise error
    return out


def _work(
    sender: Connection, function: Callable[..., Any], folder: pathlib.Path, *arguments: Any
) -> None:
    try:
        sender.send((function(folder, *arguments), None, ""))
    except UserError as error:
        sender.send((None, error, ""))
    except Exception as error:
        sender.send(
            (None, RuntimeError(f"{type(error).__name__}, printed above"), traceback.format_exc())
        )

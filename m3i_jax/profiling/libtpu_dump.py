"""What a TPU's compiler has decided, before it makes code of it.

libtpu takes nine tenths of a compilation to make code, when which operations run and where
everything lies in memory is settled already. It writes both down at that point, if asked to. So a
process of its own compiles, reads what was written, tells it, and ends."""

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
# Where the compiler has them in this order: the program, what it needs, and a file that comes after
# both.
_TEXT, _MEMORY, _AFTER = (
    "*.after_optimizations.txt",
    "*.after_optimizations-memory-usage-report.txt",
    "*.after_optimizations_after_buffer_assignment.txt",
)
_MAIN = re.compile(r"Memory Space: default \(color=0\)\s+Total bytes: (\d+)")


class EarlyProgram(NamedTuple):
    """Of a `jax.stages.Compiled` what needs no code: its text, and its peak, as the compiler holds
    it against a chip's memory."""

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
    """The program in a directory that libtpu dumps to; None as long as, or if, it is not there."""
    if not any(folder.glob(_AFTER)):
        return None
    texts, reports = sorted(folder.glob(_TEXT)), sorted(folder.glob(_MEMORY))
    found = _MAIN.search(reports[-1].read_text()) if texts and reports else None
    return EarlyProgram(texts[-1].read_text(), int(found[1])) if found else None


def compile_until_scheduled(
    lowered: jax.stages.Lowered, options: dict[str, Any], folder: pathlib.Path
) -> EarlyProgram | jax.stages.Compiled:
    """What libtpu makes of a lowered program, as soon as memory and operations are settled; all of
    it, if it does not write them down as expected. The compiler goes on behind, so the process
    should end soon: `run_in_subprocess`.

    Args:
      lowered: for a TPU.
      options: of the compiler.
      folder: empty directory.

    Raises:
      Whatever the compiler raises.
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
        if not done and (found := read_libtpu_dump(folder)):
            return found
    if isinstance(done[0], Exception):
        raise done[0]
    return done[0]


def run_in_subprocess(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(folder, *arguments)` in a process of its own, which ends when it has a result,
    whatever else still runs in it. `folder` is an empty directory for it. All must be picklable.

    Raises:
      UserError: what the function raised.
      RuntimeError: it raised something else, which is on stderr, or its process was ended.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="m3i_jax_") as folder:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_work, args=(theirs, function, pathlib.Path(folder), *arguments), daemon=True
        )
        process.start()
        theirs.close()
        try:
            out, error, trace = ours.recv()
        except EOFError:
            process.join()
            reason = (
                "it was killed; is there enough memory?"
                if process.exitcode == -9
                else "its reason is above, if it told one"
            )
            raise RuntimeError(
                f"the process that compiles ended with {process.exitcode}: {reason}"
            ) from None
        finally:
            process.kill()
            process.join()
            ours.close()
    if trace:
        print(trace, file=sys.stderr)  # by this process, whose output shows no secrets
    if error:
        raise error
    return out


def _work(
    line: Connection, function: Callable[..., Any], folder: pathlib.Path, *arguments: Any
) -> None:
    try:
        line.send((function(folder, *arguments), None, ""))
    except UserError as error:
        line.send((None, error, ""))
    except Exception as error:
        line.send(
            (None, RuntimeError(f"{type(error).__name__}, told above"), traceback.format_exc())
        )

"""The files of an export of any model: their directory, which is replaced as a whole, and a program
of StableHLO."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from m3i_jax.errors import UserError
from m3i_jax.interop import tensor_files
from m3i_jax.modes import setup
from m3i_jax.parallel import kernel_calls

EXPORTS = "export"  # below WORKDIR
_LARGEST = 2**31 - 2**24  # bytes of one program


def export_directory(workdir: str, format: str) -> pathlib.Path:
    """Returns where a format is written. Raises UserError if nothing can be written there."""
    exports = setup.check_writable(
        pathlib.Path(workdir) / EXPORTS,
        f"--workdir {workdir}",
        "exports are written to WORKDIR/export; copy config.txt and checkpoints to another"
        " directory and export from there",
    )
    return exports / format


@contextlib.contextmanager
def replaced_directory(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields an empty directory beside `directory`, whose place it takes at the end of the block.
    After an error `directory` is as before. Leftovers of a killed process are removed.

    >>> import tempfile
    >>> target = pathlib.Path(tempfile.mkdtemp()) / "hf"
    >>> with replaced_directory(target) as temporary:
    ...     _ = (temporary / "a.txt").write_text("content")
    >>> [path.name for path in (*target.iterdir(), *target.parent.iterdir())]
    ['a.txt', 'hf']
    """
    new, old = (directory.with_name(f".{directory.name}.{kind}") for kind in ("new", "old"))
    _keep_one(directory, old)  # killed between the two renames
    _remove(new)
    new.mkdir()
    try:
        yield new
        if directory.exists():
            os.replace(directory, old)
        os.replace(new, directory)
    finally:
        _remove(new)
        _keep_one(directory, old)


def _keep_one(directory: pathlib.Path, old: pathlib.Path) -> None:
    """Remove the old version of a directory, or move it back where the new one is missing."""
    if old.exists() and not directory.exists():
        os.replace(old, directory)
    _remove(old)


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def random_images(count: int, size: int) -> np.ndarray:
    """Returns random images [count, size, size, 3] uint8, for comparisons.

    >>> random_images(2, 8).shape
    (2, 8, 8, 3)
    """
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def write_program(
    file: pathlib.Path,
    function: Callable[..., Any],
    *,
    shapes: tuple[Any, ...],
    arguments: tuple[np.ndarray, ...],
    parameters: Any,
    platforms: tuple[str, ...],
) -> tuple[jax.export.Exported, Any, Any]:
    """Write a function as a program of StableHLO without kernels.

    Args:
      file: to write.
      function: of arrays; it contains its parameters.
      shapes: of its arguments, with a symbol for a size that is free.
      arguments: for a comparison.
      parameters: those that it contains.
      platforms: that the program runs on.

    Returns:
      the program as it is read from the file, the value of the function for the arguments, and that
      of the program.

    Raises:
      UserError: the parameters do not go into one program.
    """
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(parameters))
    if total > _LARGEST:
        raise UserError(
            f"--format=stablehlo: {total / 2**30:.1f} GiB of weights do not go into one program of"
            " 2 GiB; use orbax and jax.export"
        )
    compiled = jax.jit(function)
    with kernel_calls.without_kernels():
        exported = jax.export.export(compiled, platforms=platforms)(*shapes)
        expected = compiled(*arguments)  # kernels round otherwise
    with tensor_files.atomic_replace(file) as out:
        out.write(exported.serialize())
    program = jax.export.deserialize(bytearray(file.read_bytes()))
    return program, expected, program.call(*arguments)

"""Reads numbers of records, such as quality scores, from Parquet or Arrow files with a column
`key`, as img2dataset and other programs write them beside their tar files."""

import glob
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from m3i_jax.data.sources import base, keep_list
from m3i_jax.data.sources.base import DataSource
from m3i_jax.errors import UserError, one_line, shorten


def read_scores(source: DataSource, path: str, names: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Returns the columns of numbers of a table by record of a source: float32 [n], NaN where the
    table has no row of a key, or no number. Of a key that is there twice, the last row counts.

    Args:
        source: of the records; keys are matched by their 64-bit hashes.
        path: a file, or a directory of .parquet, .arrow and .feather files.
        names: of columns; () for all of floating-point numbers.

    Raises:
        UserError: the files cannot be read, lack a column, or have no key of the source; or pyarrow
            is missing.
    """
    keep_list.arrow_library()
    hashes = base.source_key_hashes(source)
    order = np.argsort(hashes, kind="stable")
    ordered, found = hashes[order], 0
    table: dict[str, np.ndarray] = {}
    for file in _files(path):
        for keys, columns in _batches(file, path, names):
            asked = np.fromiter(map(base.key_hash, keys), np.uint64, len(keys))
            begin, end = (np.searchsorted(ordered, asked, side) for side in ("left", "right"))
            count = end - begin
            found += int(count.sum())
            # several records may share a key
            place = np.repeat(begin - count.cumsum() + count, count) + np.arange(count.sum())
            for name, values in columns.items():
                column = table.setdefault(name, np.full(len(hashes), np.nan, np.float32))
                column[order[place]] = np.repeat(values, count)
    if not found:
        raise UserError(
            f"curate.scores={path!r}: none of its keys is in {source.name}, whose keys are such as"
            f" {shorten(base.source_key(source, 0))}"
        )
    return table


def _files(path: str) -> list[str]:
    expanded = os.path.expanduser(path)
    if os.path.isfile(expanded):
        return [expanded]
    names = sorted(glob.glob(os.path.join(glob.escape(expanded), "*")))
    if files := [name for name in names if name.lower().endswith(keep_list.ENDINGS)]:
        return files
    raise UserError(
        f"curate.scores={path!r}: there is no such file, nor files of"
        f" {', '.join(keep_list.ENDINGS)} in a directory of that name"
    )


def _batches(
    file: str, path: str, names: Sequence[str]
) -> Iterator[tuple[list[str], dict[str, np.ndarray]]]:
    arrow = keep_list.arrow_library()
    try:
        with open(file, "rb") as opened:
            if opened.read(4) == b"PAR1":
                parquet = arrow.parquet.ParquetFile(opened)
                wanted = _columns(parquet.schema_arrow, path, names)
                batches = parquet.iter_batches(1 << 18, columns=["key", *wanted])
                yield from (_arrays(batch, wanted) for batch in batches)
                return
            opened.seek(0)
            reader = arrow.ipc.open_file(opened)
            wanted = _columns(reader.schema, path, names)
            for i in range(reader.num_record_batches):
                yield _arrays(reader.get_batch(i), wanted)
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{file!r} cannot be read ({one_line(error, 200)})") from error


def _columns(schema: Any, path: str, names: Sequence[str]) -> list[str]:
    types = keep_list.arrow_library().types
    numbers = [f.name for f in schema if types.is_floating(f.type) or types.is_integer(f.type)]
    floats = [f.name for f in schema if types.is_floating(f.type)]
    if missing := [name for name in names if name not in numbers]:
        raise UserError(
            f"curate.scores={path!r} has no column {missing[0]!r} of numbers, its columns of"
            f" numbers are {shorten(', '.join(numbers))}"
        )
    if "key" not in schema.names:
        raise UserError(
            f"curate.scores={path!r} has no column `key`, its columns are"
            f" {shorten(', '.join(schema.names))}"
        )
    return list(names) or [name for name in floats if name not in ("key", "weight")]


def _arrays(batch: Any, names: Sequence[str]) -> tuple[list[str], dict[str, np.ndarray]]:
    keys = [
        key.decode("utf-8", "surrogateescape") if isinstance(key, bytes) else str(key)
        for key in batch.column("key").to_pylist()
    ]
    return keys, {
        name: batch.column(name).to_numpy(zero_copy_only=False).astype(np.float32) for name in names
    }

"""What a data source is made of, by one import: the interface, and what its implementations share.
One idea a file; sources of other projects import from here."""

from m3i_jax.data.sources.array_files import load_arrays, save_arrays, zip_member_count
from m3i_jax.data.sources.captions import source_caption, source_captions
from m3i_jax.data.sources.digests import key_hash, stable_digest
from m3i_jax.data.sources.foreign_fields import column, parse_label
from m3i_jax.data.sources.interface import (
    DataSource,
    Record,
    current_identity,
    inner_sources,
    map_classes,
    object_table,
    read_items,
    source_identity,
    source_key,
    source_key_hashes,
)
from m3i_jax.data.sources.local_files import (
    EXTENSIONS,
    FILE_LIMIT,
    HandleCache,
    check_presence,
    format_counts,
    format_links,
    is_file,
    missing_path_error,
    open_nonblocking,
    read_byte_range,
    read_byte_ranges,
    read_joined,
    split_path,
    whole_files,
    write_atomic,
)
from m3i_jax.data.sources.subset import SubsetSource, split_by_hash

__all__ = [
    "EXTENSIONS",
    "FILE_LIMIT",
    "DataSource",
    "HandleCache",
    "Record",
    "SubsetSource",
    "column",
    "current_identity",
    "format_counts",
    "format_links",
    "inner_sources",
    "is_file",
    "key_hash",
    "load_arrays",
    "map_classes",
    "missing_path_error",
    "object_table",
    "open_nonblocking",
    "parse_label",
    "check_presence",
    "read_byte_range",
    "read_byte_ranges",
    "read_joined",
    "read_items",
    "save_arrays",
    "source_caption",
    "source_captions",
    "source_identity",
    "source_key",
    "source_key_hashes",
    "split_by_hash",
    "split_path",
    "stable_digest",
    "whole_files",
    "write_atomic",
    "zip_member_count",
]

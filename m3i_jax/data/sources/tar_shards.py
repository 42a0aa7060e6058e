"""Writes tar files of records as WebDataset and `TarSource` read them: KEY.jpg (or .png, ...) with
the original bytes, KEY.txt with the caption or KEY.json with several, KEY.cls with the label. The
bytes are a function of the records alone: members have no time and no owner.

`TarSource` ends a key at the last dot of a file name, WebDataset at the first, so only the former
gives back keys with a dot, such as those of a folder (`key_with_dot`).

A converted data set is a directory of NAME-00000-of-00008.tar, each with a small .npz file beside
it (number of records, size and digest of the tar file), and `dataset.json`, written last."""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from m3i_jax import privacy
from m3i_jax.data.sources import base, shared_files
from m3i_jax.data.sources.base import FILE_LIMIT, DataSource, Record
from m3i_jax.data.sources.captions import encoded_captions
from m3i_jax.data.sources.tar_index import JSON_LIMIT
from m3i_jax.errors import UserError, shorten

ENDING = ".tar"
INDEX = "dataset.json"
CLASS_NAMES = "class_names.txt"
VERSION = 1
_KEYS_READ = 100  # by `key_with_dot`
_FORMATS = (
    (b"\xff\xd8", "jpg"),
    (b"\x89PNG", "png"),
    (b"RIFF", "webp"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
)


def write_shard(path: str, records: Iterable[Record], *, writer_name: str = "") -> int:
    """Writes one tar file of records, and the small file beside it, both atomically.

    Args:
        path: of the new file; ends in ".tar". Its directory is created.
        records: in their final order.
        writer_name: of the process, part of the name of its temporary files; "" for its id.

    Returns:
        The number of records written.

    Raises:
        UserError: a tar file cannot hold a key, or two records have the same one.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     count = write_shard(f"{folder}/x.tar", [Record("7", b"...", 1, "a cat")])
    ...     print(count, tarfile.open(f"{folder}/x.tar").getnames())
    1 ['7.jpg', '7.txt', '7.cls']
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    part = f"{path}.{writer_name or os.getpid()}.part"
    keys: set[str] = set()
    try:
        with open(part, "wb") as file:
            hashed = _HashedFile(file)
            stream: Any = hashed
            with tarfile.open(
                fileobj=stream,
                mode="w|",
                format=tarfile.GNU_FORMAT,
                encoding="utf-8",
                errors="surrogateescape",
            ) as tar:
                for record in records:
                    _check_key(record.key, keys)
                    for ending, content in _members(record):
                        member = tarfile.TarInfo(f"{record.key}.{ending}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        base.save_arrays(
            f"{part}.npz",
            count=np.array(len(keys)),
            size=np.array(os.path.getsize(part)),
            digest=np.array(hashed.digest.hexdigest()),
        )
        os.replace(f"{part}.npz", f"{path}.npz")
        os.replace(part, path)
    finally:
        for left in (part, f"{part}.npz"):
            if os.path.exists(left):
                os.unlink(left)
    return len(keys)


class _HashedFile:
    """What a stream is written to: hashes all bytes."""

    def __init__(self, file: Any) -> None:
        self.file, self.digest = file, hashlib.blake2b(digest_size=8)

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return int(self.file.write(content))


def _members(record: Record) -> Iterable[tuple[str, bytes]]:
    image, captions = record.image, encoded_captions(record)
    if not isinstance(image, bytes):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG", compress_level=1)
        image = buffer.getvalue()
    # a file of an unknown format is a bad record, also of a tar file
    yield next((ending for start, ending in _FORMATS if image.startswith(start)), "jpg"), image
    several = json.dumps({"captions": [text.decode("utf-8", "replace") for text in captions]})
    if len(captions) > 1 and len(several) < JSON_LIMIT:
        yield "json", several.encode()
    elif captions and captions[0] and len(captions[0]) < FILE_LIMIT:
        yield "txt", captions[0]
    if record.label >= 0:
        yield "cls", b"%d" % record.label


def _check_key(key: str, keys: set[str]) -> None:
    """Refuses a key that reading the tar file would not give back, and adds it to those written."""
    parts = key.split("/")
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    if key in keys:
        raise UserError(
            f"--format=tar: two records of a shard have the key {shorten(key)}, of which a tar file"
            " holds one: use --format=array_record"
        )
    if not parts[-1] or not parts[0] or hidden or "\0" in key:
        raise UserError(
            f"--format=tar: no member of a tar file can be named by the key {shorten(key)!r}: use"
            " --format=array_record"
        )
    keys.add(key)


def key_with_dot(source: DataSource) -> str:
    """Returns a key that WebDataset would end early, of the first of a source; "" if they have
    none.

    >>> key_with_dot([Record("a", b"")])
    ''
    """
    keys = (base.source_key(source, i) for i in range(min(len(source), _KEYS_READ)))
    return next((key for key in keys if "." in key.rpartition("/")[2]), "")


def shard_length(path: str) -> int | None:
    """Returns the number of records of a complete shard, or None if it is missing. Its small file
    is renamed first, and alone is no shard.

    >>> shard_length("/no/such.tar") is None
    True
    """
    facts = base.load_arrays(f"{path}.npz") if os.path.isfile(path) else None
    return None if facts is None or "count" not in facts else int(facts["count"])


def check_shard(path: str, count: int) -> bool:
    """Returns whether a shard is complete: its small file has `count` records, and the tar file the
    size and digest that are noted there.

    >>> check_shard("/no/such.tar", 3)
    False
    """
    if shard_length(path) != count:
        return False
    facts, digest = base.load_arrays(f"{path}.npz") or {}, hashlib.blake2b(digest_size=8)
    if os.path.getsize(path) != int(facts["size"]):
        return False
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest() == str(facts["digest"])


def write_shard_index(directory: str, *, classes: Sequence[str] = (), name: str = "") -> int:
    """Writes `dataset.json` for the shards of a directory, which marks the data set as complete,
    and the names of the classes as a file for `data.class_names`.

    Returns:
        The number of records.
    """
    names = sorted(name for name in os.listdir(directory) if name.endswith(ENDING))
    shards: list[dict[str, Any]] = []
    for file in names:
        facts = base.load_arrays(os.path.join(directory, f"{file}.npz")) or {}
        shards.append({"file": file, "count": int(facts["count"]), "digest": str(facts["digest"])})
    count = sum(shard["count"] for shard in shards)
    if classes:
        lines = "".join(f"{' '.join(text.split())}\n" for text in classes)
        path = os.path.join(directory, CLASS_NAMES)
        shared_files.write_shared(path, lines.encode("utf-8", "replace"))
    about = {"version": VERSION, "name": privacy.redact(name), "count": count}
    text = json.dumps({**about, "classes": list(classes), "shards": shards}, indent=1)
    shared_files.write_shared(os.path.join(directory, INDEX), text.encode("utf-8", "replace"))
    return count

"""ArrayRecord files: records survive a round trip, files of other programs are read, and damage
affects only its record."""

import errno
import json
import os
import pathlib
import resource
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.data import decode, splits
from m3i_jax.data.sources import array_record as array_record_source
from m3i_jax.data.sources import base, packed_records, tf_example
from m3i_jax.data.sources.array_record import ArrayRecordSource
from m3i_jax.errors import UnreachableError, UnreadableError, UserError

array_record = pytest.importorskip("array_record.python.array_record_module")
RECORDS = [
    base.Record("a/0.jpg", b"zero" * 999, 1, b"caf\xe9 \xff"),
    base.Record("caf\udce9", b"one", -1, None),
    base.Record("2", b"", 0, "a cat"),
    base.Record("3", b"three", 2, b""),
    base.Record("4", b"four", 2, None),
]


def write(folder: pathlib.Path, count: int = 2) -> list[base.Record]:
    for shard in range(count):
        path = str(folder / f"x-{shard:05d}-of-{count:05d}.array_record")
        assert array_record_source.shard_length(path) is None
        assert (
            array_record_source.write_shard(path, RECORDS[shard::count])
            == len(RECORDS[shard::count])
            == array_record_source.shard_length(path)
        )
    assert (
        array_record_source.write_shard_index(str(folder), classes=("x", "y", "z"), name="five")
        == 5
    )
    return [r for shard in range(count) for r in RECORDS[shard::count]]


def bare(record: base.Record) -> base.Record:
    caption = record.caption.encode() if isinstance(record.caption, str) else record.caption
    return base.Record(record.key, record.image, record.label, caption)


def test_round_trip(tmp_path):
    written = [bare(r) for r in write(tmp_path)]
    source = splits.open_source(schema.Data(source="array_record", path=str(tmp_path)))
    assert (
        isinstance(source, base.DataSource)
        and len(source) == 5
        and source.classes == ("x", "y", "z")
        and source.captions
    )
    assert [source[i] for i in range(5)] == written
    assert base.read_items(source, [4, 0, 3, 0]) == [written[i] for i in (4, 0, 3, 0)]
    assert [source.key(i) for i in range(5)] == [r.key for r in written]
    assert base.source_key_hashes(source).tolist() == [base.key_hash(r.key) for r in written]
    assert (
        source.description()
        == f"5 images in 2 files of array_record {str(tmp_path)!r}, 3 classes, captions for 60%"
    )
    assert [source[i] for i in range(5)] == [
        ForkingPickler.loads(ForkingPickler.dumps(source))[i] for i in range(5)
    ]
    for wrong in (5, -1):
        with pytest.raises(IndexError):
            source[wrong]
    assert not list(tmp_path.glob("*.part"))


def test_an_index_grows_with_its_shards(tmp_path, monkeypatch):
    """One of 107,911 shards has more bytes than an index without them may have."""
    written = [bare(r) for r in write(tmp_path, 5)]
    index = tmp_path / "dataset.json"
    monkeypatch.setattr(array_record_source, "INDEX_LIMIT", 100)
    assert len(index.read_bytes()) > 500
    source = ArrayRecordSource(str(tmp_path))
    assert [source[i] for i in range(5)] == written
    # those of earlier versions have one value a line
    index.write_text(json.dumps(json.loads(index.read_text()), indent=1))
    assert ArrayRecordSource(str(tmp_path)).fingerprint() == source.fingerprint()
    index.write_text(index.read_text() + " " * 10_000 + "x")
    assert len(ArrayRecordSource(str(tmp_path))) == 5  # what lies behind the limit is not read


def test_pixels_are_kept_without_loss(make):
    pixels = make.smooth(20, 30)
    assert (
        decode.decode_image(
            packed_records.unpack_record(packed_records.pack_record(base.Record("a", pixels))).image
        )
        == pixels
    ).all()


def test_a_split_is_that_of_the_source_it_was_made_from(tmp_path):
    many = [base.Record(f"key {i}", b"x") for i in range(300)]
    array_record_source.write_shard(str(tmp_path / "x-00000-of-00001.array_record"), many)
    array_record_source.write_shard_index(str(tmp_path))
    held = base.split_by_hash(ArrayRecordSource(str(tmp_path)), 0.2, "held_out")
    assert [held[i].key for i in range(len(held))] == [
        r.key for r in many if base.key_hash(r.key) / 2**64 < 0.2
    ]
    assert 30 < len(held) < 90


def test_the_same_content_has_the_same_fingerprint(tmp_path):
    fingerprints = []
    for name, change in (("a", None), ("b", None), ("c", base.Record("3", b"other", 2))):
        (tmp_path / name).mkdir()
        array_record_source.write_shard(
            str(tmp_path / name / "x.array_record"), [*RECORDS[:4], change or RECORDS[4]]
        )
        array_record_source.write_shard_index(str(tmp_path / name), classes=("x", "y", "z"))
        fingerprints.append(ArrayRecordSource(str(tmp_path / name)).fingerprint())
    assert fingerprints[0] == fingerprints[1] != fingerprints[2] and len(fingerprints[0]) == 16


def test_files_of_other_programs(tmp_path):
    data, cache = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    writer = array_record.ArrayRecordWriter(
        str(data / "train.array_record-00000-of-00001"), "group_size:1"
    )
    writer.write(
        tf_example.encode_example(
            {"image/encoded": b"one", "label": 4, "text": b"first", "image/filename": b"1.jpg"}
        )
    )
    writer.write(tf_example.encode_example({"image": b"two", "other": 3}))
    writer.write(b"\xff\xff no message")
    writer.close()
    source = ArrayRecordSource(str(data), cache=str(cache))
    first, second, third = (source[i] for i in range(3))
    assert (
        first == base.Record("1.jpg", b"one", 4, b"first")
        and source.classes == ("0", "1", "2", "3", "4")
        and source.captions
    )
    assert second == base.Record("train.array_record-00000-of-00001#1", b"two", -1, None)
    with pytest.raises(decode.BadRecord, match="undecodable"):
        decode.open_image(third.image)
    (cached,) = cache.iterdir()
    stamp = cached.stat().st_mtime_ns
    again = ArrayRecordSource(str(data), cache=str(cache))
    assert (
        cached.stat().st_mtime_ns == stamp
        and again.fingerprint() == source.fingerprint()
        and again.classes == source.classes
    )
    cached.write_bytes(b"damaged")
    assert ArrayRecordSource(str(data), cache=str(cache)).fingerprint() == source.fingerprint()


@pytest.mark.parametrize("converted", [True, False])
def test_no_column_is_sent_to_a_worker(tmp_path, monkeypatch, converted):
    path = tmp_path / "data" / "x.array_record"
    array_record_source.write_shard(str(path), [base.Record(str(i), b"x") for i in range(3000)])
    if converted:
        array_record_source.write_shard_index(str(path.parent))
    source = ArrayRecordSource(str(path.parent), cache=str(tmp_path / "cache"))
    sent = bytes(ForkingPickler.dumps(source))
    assert len(sent) < 2000
    copy = ForkingPickler.loads(sent)
    monkeypatch.setattr(copy, "_read_all", None)  # what is asked for is not scanned again
    assert copy[2999] == source[2999] and copy.fingerprint() == source.fingerprint()
    assert (copy.key_hashes() == source.key_hashes()).all()


@pytest.mark.parametrize(
    ("limit", "records", "most"),
    [(1024, 9, 256), (16384, 9, 1024), (1 << 20, 9, 4096), (-1, 9, 4096)]
    + [(1 << 20, 1e5, 335), (1 << 20, 1e9, 256)],
)
def test_files_that_are_open_at_a_time(monkeypatch, limit, records, most):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limit, limit))
    assert array_record_source._most_open(records) == most


def test_a_start_opens_one_file_of_columns(tmp_path, monkeypatch, caplog):
    records = write(tmp_path)
    hashes = [base.key_hash(record.key) for record in records]
    read: list[str] = []
    load = array_record_source._load
    monkeypatch.setattr(
        array_record_source, "_load", lambda path: read.append(os.path.basename(path)) or load(path)
    )
    source = ArrayRecordSource(str(tmp_path))
    assert read == ["dataset.npz"] and source.key_hashes().tolist() == hashes
    # damaged or of other shards, or missing as in a set of an earlier version
    joined = tmp_path / "dataset.npz"
    whole = joined.read_bytes()
    (tmp_path / "other").mkdir()
    array_record_source.write_shard(str(tmp_path / "other" / "x.array_record"), RECORDS[::-1])
    array_record_source.write_shard_index(str(tmp_path / "other"))
    for content in (b"", whole[:-50], (tmp_path / "other" / "dataset.npz").read_bytes()):
        joined.write_bytes(content)
        again = ArrayRecordSource(str(tmp_path))
        assert again.key_hashes().tolist() == hashes
        assert again.fingerprint() == source.fingerprint()
        assert again.description() == source.description()
    assert len(caplog.messages) == 3
    joined.unlink()
    assert ArrayRecordSource(str(tmp_path)).key_hashes().tolist() == hashes
    assert len(caplog.messages) == 3


def test_damage_affects_one_record(tmp_path):
    path = tmp_path / "x.array_record"
    rng = np.random.default_rng(0)
    contents = [rng.bytes(3000) for _ in range(20)]
    array_record_source.write_shard(
        str(path), [base.Record(str(i), c) for i, c in enumerate(contents)]
    )
    array_record_source.write_shard_index(str(tmp_path))
    raw = bytearray(path.read_bytes())
    raw[raw.index(contents[7][:20]) + 1000] ^= 0xFF
    path.write_bytes(raw)
    records = base.read_items(ArrayRecordSource(str(tmp_path)), list(range(20)))
    assert [i for i, record in enumerate(records) if record.image != contents[i]] == [7]
    with pytest.raises(decode.BadRecord, match="undecodable"):
        decode.open_image(records[7].image)


def test_refusals(tmp_path):
    def refusal(place: pathlib.Path) -> str:
        with pytest.raises(UserError) as caught:
            ArrayRecordSource(str(place))
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    assert "holds no .array_record file" in refusal(
        tmp_path / "empty"
    ) and "holds no .array_record file" in refusal(tmp_path / "none")
    with pytest.raises(UserError, match="holds no .array_record file to index"):
        array_record_source.write_shard_index(str(tmp_path / "empty"))
    data = tmp_path / "data"
    data.mkdir()
    write(data)
    shard, index = data / "x-00001-of-00002.array_record", data / "dataset.json"
    content, metadata = shard.read_bytes(), index.read_text()
    index.write_text(metadata.replace('"version": 1', '"version": 9'))
    assert "has version 9, this program reads 1" in refusal(data)
    index.write_text(metadata[:40])
    assert "dataset.json' is damaged" in refusal(data)
    # A name in the index cannot lead out of the directory.
    index.write_text(
        json.dumps(
            {
                **json.loads(metadata),
                "shards": [{"file": "../../etc/passwd", "count": 1, "digest": "0"}],
            }
        )
    )
    assert f"{str(data / 'passwd')!r} is missing" in refusal(data)
    index.write_text(metadata)
    shard.unlink()
    assert "is missing, and" in refusal(data)
    shard.write_bytes(content[:100])
    (data / "dataset.json").unlink()
    assert "is not a complete ArrayRecord file" in refusal(data)
    (data / "x-00001-of-00002.array_record.npz").unlink()
    with pytest.raises(UserError, match="has no .npz file beside it, so it is incomplete"):
        array_record_source.write_shard_index(str(data))


def test_a_disk_that_is_away_is_no_mistake(tmp_path, monkeypatch):
    write(tmp_path)
    source = ArrayRecordSource(str(tmp_path))
    said = [""]

    class Away:
        def read(self, rows):
            raise RuntimeError(f"{said[0]}, reading {source.files[0]}")

    monkeypatch.setattr(source, "_reader", lambda shard: Away())
    for words, status in (
        ("Transport endpoint is not connected", 1),
        ("Input/output error", 1),
        ("No such file or directory", 2),
    ):
        said[0] = words
        with pytest.raises(UnreadableError, match=words) as refusal:
            source[0]
        assert refusal.value.status == status
    stat = os.stat

    def stale(path, **options):
        if str(path) == source.files[0]:
            raise OSError(errno.ESTALE, "Stale file handle", path)
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", stale)
    with pytest.raises(UnreachableError, match="although it could when the run began"):
        source[0]
    monkeypatch.setattr(os, "stat", stat)
    os.unlink(source.files[0])
    with pytest.raises(UnreadableError, match="restore it") as refusal:
        source[0]
    assert refusal.value.status == 2


def test_a_failed_write_leaves_nothing(tmp_path):
    def broken():
        yield RECORDS[0]
        raise RuntimeError("the source fails")

    with pytest.raises(RuntimeError, match="the source fails"):
        array_record_source.write_shard(str(tmp_path / "x.array_record"), broken())
    assert list(tmp_path.iterdir()) == []

"""The stream of a mixture of every kind of source is the same from any number of worker processes
and hosts, and after a restart."""

import hashlib
import pathlib

import pytest

from m3i_jax.data import pipeline, splits
from m3i_jax.data.sources import array_record, base
from tests import rows


@pytest.fixture
def data(fill, make, tmp_path) -> dict:
    """A folder with bad files, a tar file, ArrayRecord files and shapes: 3 : 2 : 2 : 1."""
    images = [make.encode(make.smooth(30 + i, 40), "JPEG", quality=90) for i in range(24)]
    bad = {
        f"b/{name}": content
        for name, (content, _) in make.bad_files().items()
        if name.startswith(("cut", "page", "empty"))
    }
    folder = fill(
        {f"a/{i}.jpg": p for i, p in enumerate(images)} | {"a/3.txt": b"number three"} | bad
    )
    members = [
        member
        for i, p in enumerate(images)
        for member in ((f"t{i}.jpg", p), (f"t{i}.cls", b"%d" % (i % 3)))
    ]
    (tmp_path / "0.tar").write_bytes(make.tar_bytes(members))
    records = [base.Record(f"r{i}", p, i % 2, f"number {i}") for i, p in enumerate(images)]
    pathlib.Path(tmp_path / "records").mkdir()
    array_record.write_shard(str(tmp_path / "records" / "x-00000-of-00001.array_record"), records)
    array_record.write_shard_index(str(tmp_path / "records"), classes=("even", "odd"))
    entries = (
        f"folder:{folder}=3",
        f"tars:{tmp_path}/*.tar=2",
        f"array_record:{tmp_path}/records=2",
        "shapes:64=1",
    )
    return {"source": "mixture", "mixture": entries, "cache": str(tmp_path / "cache")}


def hashes(
    data: dict,
    make,
    bpe,
    count: int,
    *,
    start: int = 0,
    batch: int = 16,
    host: int = 0,
    hosts: int = 1,
    **more: int,
) -> list[str]:
    """Hashes every row of one host's share of the global batches."""
    cache = str(data["cache"])
    config = make.settings(batch=batch, **{k: v for k, v in data.items() if k != "cache"}, **more)
    train, _ = splits.open_splits(config.data, cache=cache)
    batches = pipeline.iterate_batches(config, train, bpe, start=start, host=host, hosts=hosts)
    try:
        arrays = [next(batches) for _ in range(count)]
    finally:
        batches.close()
    rows = [
        b"".join(b[name][row].tobytes() for name in sorted(b))
        for b in arrays
        for row in range(len(b["label"]))
    ]
    return [hashlib.sha256(row).hexdigest() for row in rows]


@pytest.mark.row("A10")
def test_hosts_and_restarts(data, make, bpe):
    stream = hashes(data, make, bpe, 6)
    assert len(set(stream)) == 96
    assert hashes(data, make, bpe, 2, start=64, host=1, hosts=2) == stream[72:80] + stream[88:96]
    assert hashes(data, make, bpe, 3, start=34, batch=4, threads=2) == stream[34:46]


def test_processes_that_share_nothing(fill, make):
    """Two processes build the same bytes as one, although their sets iterate in other orders."""
    folder = str(
        fill(
            {
                f"{i % 3}/{i}.jpg": make.encode(make.smooth(30 + i, 40), "JPEG", quality=90)
                for i in range(24)
            }
        )
    )
    stream = rows.hashes(folder, 3, 8, 0, 1, 16)
    assert len(set(stream)) == 48
    assert rows.by_processes(folder, 2, batches=3, start=8, batch=16) == stream


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4, 8])
@pytest.mark.row("A10")
def test_workers(data, make, bpe, workers):
    """After a restart, as the second of two hosts."""
    stream = hashes(data, make, bpe, 9)
    share = hashes(data, make, bpe, 8, start=16, host=1, hosts=2, workers=workers)
    assert share == [row for k in range(1, 9) for row in stream[16 * k + 8 : 16 * k + 16]]

"""Tar files in a bucket: the same records as from a disk, read by ranges, through a network that
fails now and then."""

import importlib
import uuid
from multiprocessing.reduction import ForkingPickler

import pytest

from m3i_jax import schema
from m3i_jax.data import decode, splits
from m3i_jax.data.sources import base, outages, remote
from m3i_jax.data.sources.tars import TarSource
from m3i_jax.errors import UserError

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def bucket(make, tmp_path):
    """The same tar files in fsspec's memory and on disk: (URL, path)."""
    files = fsspec.filesystem("memory")
    bucket_name = f"bucket-{uuid.uuid4().hex}"
    for shard in range(2):
        members = [
            (f"{shard}{i}.{kind}", b"%d" % i * 99) for i in range(20) for kind in ("jpg", "txt")
        ]
        members += [(f"{shard}{i}.json", b'{"label": %d, "caption": "c"}' % i) for i in range(9)]
        content = make.tar_bytes(members)
        files.pipe(f"/{bucket_name}/deep/{shard}.tar", content)
        (tmp_path / f"{shard}.tar").write_bytes(content)
    yield f"memory://{bucket_name}/deep", str(tmp_path)
    files.rm(f"/{bucket_name}", recursive=True)


@pytest.mark.parametrize("glob", ["/*.tar", "", "/[01].tar"])
def test_the_same_records_as_on_disk(bucket, glob):
    url, path = bucket
    source, local = TarSource(url + glob), TarSource(path)
    assert source.files == [f"{url}/0.tar", f"{url}/1.tar"] and len(source) == 40
    indices = [33, 2, 39, 2, 0]
    assert (
        base.read_items(source, indices) == base.read_items(local, indices)
        and source[7] == local[7]
    )
    assert [source.caption(i) for i in range(40)] == [local.caption(i) for i in range(40)]
    assert source.fingerprint() == local.fingerprint() and source.classes == local.classes
    assert ForkingPickler.loads(ForkingPickler.dumps(source))[5] == local[5]


def test_a_split_takes_the_place_of_a_pattern(bucket):
    url, _ = bucket
    some = splits.open_source(schema.Data(source="tars", path=f"{url}/*.tar", split="1*.tar"))
    assert some.files == [f"{url}/1.tar"] and len(some) == 20


def test_only_ranges_are_read(bucket, monkeypatch):
    source = TarSource(bucket[0])
    read = []
    files = remote.file_system(bucket[0])
    original = files.cat_file
    monkeypatch.setattr(
        type(files), "cat_file", lambda self, *a, **k: read.append(a) or original(*a, **k)
    )
    records = base.read_items(source, [1, 33, 2])
    assert [record.key for record in records] == ["01", "113", "02"]
    # an image and its caption, and images that are neighbours, are one request
    assert sorted(path[-5:] for path, *_ in read) == ["0.tar", "1.tar"]
    assert all(end - start < 4 * 2048 for _, start, end in read)
    read.clear()
    monkeypatch.setattr(remote, "JOIN", -1)
    assert base.read_items(source, [1, 33, 2]) == records and len(read) == 6


def test_states_come_with_the_listing(bucket, monkeypatch):
    listed = remote.glob_urls(bucket[0])
    asked = []
    monkeypatch.setattr(remote, "file_state", lambda path: asked.append(path) or (1, "x"))
    assert remote.file_states(listed, listed) == list(listed.values()) and not asked
    states = remote.file_states(listed, dict.fromkeys(listed))
    assert states == [(1, "x")] * 2 and sorted(asked) == list(listed)


def test_the_index_is_cached_and_rebuilt(bucket, tmp_path, monkeypatch, make):
    def opened() -> TarSource:
        return splits.open_source(
            schema.Data(source="tars", path=bucket[0]), cache=str(tmp_path / "cache")
        )

    first = opened()
    with monkeypatch.context() as patch:
        patch.setattr(remote, "open_file", lambda path: pytest.fail("read again"))
        assert opened().fingerprint() == first.fingerprint()
    remote.file_system(bucket[0]).pipe(
        bucket[0].removeprefix("memory:/") + "/0.tar", make.tar_bytes([("x.jpg", b"x")])
    )
    assert len(opened()) == 21


def test_a_network_that_fails(bucket, monkeypatch):
    source, files = TarSource(bucket[0]), remote.file_system(bucket[0])
    local = TarSource(bucket[1])
    slept: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", slept.append)
    monkeypatch.setattr(remote, "OUTAGES", outages.Outages())
    fails = []
    original = files.cat_file

    def flaky(self, *arguments, **options):
        if fails:
            raise fails.pop()
        return original(*arguments, **options)

    monkeypatch.setattr(type(files), "cat_file", flaky)
    fails += [OSError("reset by peer"), TimeoutError("slow")]
    assert base.read_items(source, [3, 4]) == base.read_items(local, [3, 4]) and not fails
    fails += [OSError("reset by peer")] * 99
    slept.clear()
    with pytest.raises(
        UserError, match=r"0.tar' cannot be read \(OSError: reset by peer\)"
    ) as refusal:
        source[3]
    assert 60 < sum(slept) < 180 and refusal.value.status == 1  # a scheduler starts it again
    fails.clear()
    slept.clear()
    assert source[4] == local[4]
    fails += [OSError("reset by peer")] * 99
    with pytest.raises(UserError, match="reset by peer"):  # other records can be read
        source[3]
    assert sum(slept) < 5
    fails.clear()
    # access is refreshed while a run reads: that may fail for a moment, and is no refusal
    fails += [OSError("Unable to locate credentials")]
    assert source[3] == local[3] and not fails
    slept.clear()
    fails += [OSError("Forbidden: no access")] * 3
    with pytest.raises(UserError, match="Forbidden") as refusal:
        source[3]
    assert not slept and refusal.value.status == 2
    fails.clear()
    files.pipe(bucket[0].removeprefix("memory:/") + "/0.tar", b"short")
    with pytest.raises(UserError, match="became shorter"):
        source[3]
    files.rm(bucket[0].removeprefix("memory:/") + "/0.tar")
    with pytest.raises(UserError, match=r"0.tar' cannot be read \(FileNotFoundError"):
        source[3]


def test_a_wrong_address_is_refused_at_once(monkeypatch):
    """Where a store is away, a scheduler starts the run again; a wrong name stays wrong."""
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: pytest.fail("waits"))
    with pytest.raises(UserError, match=r"none.txt' cannot be read \(FileNotFoundError") as wrong:
        remote.open_file("memory://no-such-bucket/none.txt")
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)

    def away():
        raise ConnectionResetError("reset by peer")

    with pytest.raises(UserError, match="reset by peer") as fails:
        remote.retry_network("gs://bucket/x", away)
    assert (wrong.value.status, fails.value.status) == (2, 1)


def test_an_empty_image_is_a_bad_record_and_no_request(make, monkeypatch):
    files, name = fsspec.filesystem("memory"), f"bucket-{uuid.uuid4().hex}"
    members = [("0.jpg", b""), ("far.bin", b"x" * (remote.JOIN + 1)), ("1.jpg", b"..")]
    files.pipe(f"/{name}/0.tar", make.tar_bytes(members))
    source = TarSource(f"memory://{name}/0.tar")
    original = files.cat_file

    def ranged(self, path, start, end):
        # HTTP: a range whose last byte is before its first is no range, and is ignored
        return original(path, start, end) if end > start else original(path)

    monkeypatch.setattr(type(files), "cat_file", ranged)
    assert [record.image for record in base.read_items(source, [0, 1])] == [b"", b".."]
    assert source[0].image == b""
    files.rm(f"/{name}", recursive=True)


@pytest.mark.parametrize("node", ["node:8020", ""])
def test_files_of_hdfs_keep_their_name_node(node, monkeypatch):
    memory = type(fsspec.filesystem("memory"))
    opened = []

    class Hdfs(memory):
        """Addresses as fsspec's HadoopFileSystem has them."""

        protocol, cachable, store, pseudo_dirs = "hdfs", False, {}, [""]

        def __init__(self, host="", **options):
            super().__init__()
            opened.append(host)

        @classmethod
        def _strip_protocol(cls, path):
            return fsspec.utils.infer_storage_options(path)["path"].rstrip("/")

        @staticmethod
        def _get_kwargs_from_urls(path):
            return {"host": fsspec.utils.infer_storage_options(path).get("host", "")}

    known = importlib.import_module("fsspec.registry")._registry
    monkeypatch.setitem(known, "hdfs", Hdfs)
    Hdfs().pipe("/data/deep/0.tar", b"0123")
    opened.clear()
    (url,) = remote.glob_urls(f"hdfs://{node}/data/deep/*.tar")
    assert url == f"hdfs://{node}/data/deep/0.tar"
    assert remote.read_ranges([(url, 1, 2)]) == [b"12"]
    assert set(opened) == {node.partition(":")[0]}


def test_a_slow_bucket_with_errors(tmp_path, monkeypatch):
    from tests.bench import streaming

    monkeypatch.setattr(remote, "BLOCK", 1 << 16)
    (tmp_path / "x.tar").write_bytes(streaming.tar_content(40))
    local = TarSource(str(tmp_path))
    setup = {"latency": 0.002, "errors": 0.05, "stalls": 0.0}
    with streaming.bucket(2, 40, **setup) as bucket:
        source = TarSource("gs://b/data", cache=str(tmp_path / "cache"))
        assert len(source) == 80 and bucket.counts["errors"] > 0
        bucket.counts.clear()
        source = TarSource("gs://b/data", cache=str(tmp_path / "cache"))
        # the next start asks for a listing, and for no file
        assert bucket.counts["listings"] == 1 and not bucket.counts["ranges"]
        monkeypatch.setattr(remote, "JOIN", 1 << 10)
        indices = [3, 79, 0, 41, 22, *range(50, 70, 3), 3]
        for _ in range(4):
            records = base.read_items(source, indices)
            assert records == base.read_items(local, [i % 40 for i in indices])
        # an image and its caption are one request; those of a batch are made at the same time, how
        # many of them depends on the machine
        counts = bucket.counts
        assert 1 < counts["most at once"] <= 12 and counts["errors"] > 0
        assert counts["ranges"] == 4 * 12 + counts["errors"]
        counts.clear()
        captions = list(decode.sample_captions(source))
        assert captions == 2 * [local.caption(i) for i in range(40)]
        assert counts["most at once"] > 1


def test_refusals():
    with pytest.raises(
        UserError, match=r"^no tar file matches data.path='memory://none-[^ ]*': give a glob"
    ):
        TarSource(f"memory://none-{uuid.uuid4().hex}/*.tar")
    with pytest.raises(UserError, match="nosuch"):
        TarSource("nosuch://bucket/*.tar")

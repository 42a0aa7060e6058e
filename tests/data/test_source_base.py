"""Image folders and splits by hash: images, classes, captions, and the error messages."""

import collections
import concurrent.futures
import errno
import functools
import os
import pathlib
import shutil
import threading
import time
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.data import decode, sampler, splits
from m3i_jax.data.sources import base, local_files, outages
from m3i_jax.data.sources.folder import FolderSource
from m3i_jax.errors import TransientError, UserError, refuse_system_errors

KINDS = "jpg, jpeg, png, webp, gif, bmp, tif, tiff"


def refusal(path: str | pathlib.Path, source: str = "folder") -> str:
    with pytest.raises(UserError) as caught:
        splits.open_source(schema.Data(source=source, path=str(path)))
    return str(caught.value)


def test_classes_captions_and_order(fill):
    files = {
        "zebra/2.JPG": b"z2",
        "zebra/deep/er/1.webp": b"z1",
        "ant/x.png": b"x",
        "ant/x.txt": b"an ant",
        "loose.gif": b"l",
        "notes/readme.txt": b"n",
    }
    source = FolderSource(str(fill(files)))
    assert source.classes == ("ant", "zebra") and source.captions and len(source) == 4
    records = [source[i] for i in range(len(source))]
    assert [(r.key, r.image, r.label, r.caption) for r in records] == [
        ("ant/x.png", b"x", 0, b"an ant"),
        ("loose.gif", b"l", -1, None),
        ("zebra/2.JPG", b"z2", 1, None),
        ("zebra/deep/er/1.webp", b"z1", 1, None),
    ]
    assert [source.key(i) for i in range(4)] == [r.key for r in records]
    assert source.description().startswith(
        f"4 images in folder {source.path!r}, 2 classes, captions for 25%"
    )


def test_every_extension_in_any_case(fill):
    names = [f"{i}{e}" for i, e in enumerate(base.EXTENSIONS)] + [
        f"{i}{e.upper()}" for i, e in enumerate(base.EXTENSIONS)
    ]
    source = FolderSource(str(fill(dict.fromkeys([*names, "a.heic", "b.jpg.bak", "jpg"], b"x"))))
    assert sorted(source.key(i) for i in range(len(source))) == sorted(names)
    assert source.ignored["other files"] == 3


def test_one_sub_folder_is_not_a_class(fill):
    for folder, other in (("one", "images/b.jpg"), ("other", "texts/a.txt")):
        path = fill({"images/a.jpg": b"", other: b""}, folder)
        data = schema.Data(source="folder", path=str(path), holdout=0.0)
        for source in (splits.open_source(data), splits.open_splits(data)[0]):
            assert source.classes == () and source[0].label == -1


def test_files_that_are_ignored(fill, tmp_path):
    outside = fill({"secret.jpg": b"secret", "deep/secret.jpg": b"secret"}, "outside")
    folder = fill(
        {
            "a/1.jpg": b"1",
            "b/2.jpg": b"2",
            ".hidden.jpg": b"h",
            ".git/3.jpg": b"h",
            "__MACOSX/4.jpg": b"h",
        }
    )
    (folder / "a/link.jpg").symlink_to(outside / "secret.jpg")
    (folder / "c").symlink_to(outside / "deep")
    (folder / "a/up").symlink_to(folder)
    (folder / "a/broken.jpg").symlink_to(folder / "gone.jpg")
    (folder / "a/inside.jpg").symlink_to(folder / "b/2.jpg")
    (folder / "a/twin").symlink_to(folder / "b")
    os.mkfifo(folder / "a/pipe.jpg")
    with open(folder / "a/huge.jpg", "wb") as huge:
        huge.truncate(base.FILE_LIMIT + 1)
    source = FolderSource(str(folder))
    assert {source.key(i): source[i].image for i in range(len(source))} == {
        "a/1.jpg": b"1",
        "a/inside.jpg": b"2",
        "a/twin/2.jpg": b"2",
        "b/2.jpg": b"2",
    }
    assert {kind: n for kind, n in source.ignored.items() if n} == {
        "hidden": 3,
        "links out of the folder": 2,
        "links to a folder above": 1,
        "broken links": 1,
        "special files": 1,
        "files over 256 MiB": 1,
    }
    assert (
        "; 2 records are links to others; ignored: 1 broken links, 1 files over 256 MiB, 3 hidden,"
        " 2 links out" in source.description()
    )


def test_files_that_may_not_be_read_are_told_from_a_failing_disk(fill, monkeypatch):
    """Only the first are left out: a new run would have other data where a disk fails for once."""
    folder = fill(dict.fromkeys(("a/1.jpg", "a/2.jpg", "b/3.jpg"), b"x"))
    (folder / "a/2.jpg").chmod(0o600)
    asked: list[str] = []
    raised = [errno.EACCES]
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append(path) or False)
    monkeypatch.setattr(os, "open", lambda path, *_: fail(path))

    def fail(path: str) -> int:
        raise OSError(raised[0], os.strerror(raised[0]), path)

    source = FolderSource(str(folder))
    assert len(source) == 2 and source.ignored["unreadable"] == 1
    assert asked == [str(folder / "a/2.jpg")]  # what all may read is read
    for raised[0] in (errno.ESTALE, errno.EIO, errno.EMFILE):
        with pytest.raises(OSError, match=r"a/2\.jpg"):
            FolderSource(str(folder))


@pytest.mark.parametrize("call", ["stat", "scandir"])
def test_a_disk_that_fails_while_a_folder_is_listed(fill, monkeypatch, call):
    folder = fill({"train/a/1.jpg": b"1", "train/b/1.jpg": b"1", "val/a/2.jpg": b"2"})
    (folder / "train/a/link.jpg").symlink_to(folder / "train/a/1.jpg")
    if call == "scandir":  # once, while splits are searched for
        scandir, left = os.scandir, [0]
        monkeypatch.setattr(
            os, "scandir", lambda *a: scandir(*a) if not left else stale(left.pop())
        )
    else:  # what a link leads to
        stat = os.stat
        monkeypatch.setattr(
            os, "stat", lambda p, **k: stale() if str(p).endswith("/1.jpg") else stat(p, **k)
        )

    def stale(*_: int) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with pytest.raises(TransientError), refuse_system_errors():
        splits.open_splits(schema.Data(source="folder", path=str(folder)))


def test_a_folder_that_is_a_link_itself(fill, tmp_path):
    folder = fill({"1.jpg": b"1"})
    (tmp_path / "link").symlink_to(folder)
    assert FolderSource(str(tmp_path / "link"))[0].image == b"1"


def test_names_that_are_not_utf8(tmp_path):
    name = b"caf\xe9.jpg"
    with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
        file.write(b"x")
    source = FolderSource(str(tmp_path))
    assert source[0].image == b"x" and os.fsencode(source.key(0)) == name
    assert len(source.fingerprint()) == 16 and len(base.split_by_hash(source, 0.0, "train")) == 1


def test_data_of_a_stale_mount_are_no_mistake(tmp_path, monkeypatch):
    """Of a folder and of a pattern of files: 1, after which a scheduler starts the run again."""
    plain, mount = os.stat, str(tmp_path / "mount")

    def stat(path, *more, **options):
        if not isinstance(path, int) and os.fsdecode(path).startswith(mount):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
        return plain(path, *more, **options)

    monkeypatch.setattr(os, "stat", stat)
    for kind, path in (("folder", f"{mount}/photos"), ("tars", f"{mount}/*.tar")):
        data = schema.Data(source=kind, path=path)
        with pytest.raises(TransientError, match="Stale file handle"), refuse_system_errors():
            splits.open_source(data)


def test_refusals_of_a_folder(fill, tmp_path):
    fill({"photos/a.jpg": b""}, "data")
    assert (
        refusal("")
        == "data.path is empty, and data.source='folder' needs it: give the directory that holds"
        " the images"
    )
    assert (
        refusal("", "tars")
        == "data.path is empty, and data.source='tars' needs it: give the tar files, such as"
        " 'DIR/*.tar'"
    )
    missing = tmp_path / "data/phtoos"
    assert (
        refusal(missing) == f"data.path={str(missing)!r} does not exist: there is no 'phtoos' in"
        f" {str(tmp_path / 'data')!r}, did you mean {str(tmp_path / 'data/photos')!r}?; give"
        " the directory that holds the images"
    )
    deep = tmp_path / "dta/photos/x"
    assert (
        f"there is no 'dta' in {str(tmp_path)!r}, did you mean {str(tmp_path / 'data')!r}?"
        in refusal(deep)
    )
    (tmp_path / "empty").mkdir()
    assert (
        refusal(tmp_path / "empty")
        == f"data.path={str(tmp_path / 'empty')!r} is an empty folder: put images there ({KINDS})"
    )
    other = fill({"a.heic": b"", "b.heic": b"", "c.pdf": b"", "c.txt": b""}, "other")
    assert (
        refusal(other)
        == f"data.path={str(other)!r} holds 4 files but no image ({KINDS}), most of them .heic"
    )
    tars = fill({"0.tar": b""}, "tars")
    assert refusal(tars).endswith("most of them .tar; tar files are read by data.source='tars'")
    assert (
        refusal(tars / "0.tar")
        == f"data.path={str(tars / '0.tar')!r} is a file: data.source='folder' needs the directory"
        " that holds the images; tar files are read by data.source='tars'"
    )
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "class").symlink_to(tmp_path / "data/photos")
    assert (
        refusal(linked)
        == f"data.path={str(linked)!r} holds no image ({KINDS}); ignored: 1 links out of the folder"
    )
    kinds = "'shapes', 'folder', 'tars', 'array_record', 'tfds', 'hugging_face', 'coco', 'maps', "
    kinds += "'scenes' or 'mixture'"
    assert refusal(tmp_path, "folders") == f"data.source='folders' is not a source: use {kinds}"


def test_fingerprint_depends_on_content_not_on_the_path(fill, tmp_path):
    folder = fill({"a/1.jpg": b"one", "b/2.jpg": b"two"})
    before = FolderSource(str(folder)).fingerprint()
    shutil.copytree(folder, tmp_path / "copy")
    assert FolderSource(str(tmp_path / "copy")).fingerprint() == before
    fingerprints = {before}
    for change in ({"a/1.jpg": b"longer"}, {"a/3.jpg": b"three"}, {"b/2.txt": b"two"}):
        fingerprints.add(FolderSource(str(fill(change))).fingerprint())
    assert len(fingerprints) == 4 and all(len(f) == 16 for f in fingerprints)


class Numbers:
    """A source with only the required methods."""

    name, captions, classes = "numbers", True, ("even", "odd")

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> base.Record:
        return base.Record(f"n{index}", b"", index % 2, f"number {index}" if index % 3 else None)

    def fingerprint(self) -> str:
        return base.stable_digest(self.count)

    def description(self) -> str:
        return f"{self.count} numbers"


def test_a_source_is_known_by_its_methods():
    assert isinstance(Numbers(1), base.DataSource) and isinstance(
        base.split_by_hash(Numbers(1), 0, "train"), base.DataSource
    )
    assert isinstance(FolderSource, type) and not isinstance(object(), base.DataSource)


def test_split_is_a_stable_partition():
    full = Numbers(20_000)
    train, held = (base.split_by_hash(full, 0.1, part) for part in ("train", "held_out"))
    assert sorted([*train.indices, *held.indices]) == list(range(20_000))
    assert abs(len(held) / 20_000 - 0.1) < 0.01
    assert train[7] == full[int(train.indices[7])] and train.__getitems__([3, 1]) == [
        train[3],
        train[1],
    ]
    assert train.classes == full.classes and train.captions
    assert train.description() == f"{len(train):,} of 20000 numbers (train)"
    # More records move none of the old ones; a larger share only adds records.
    assert set(held.indices) == {
        i for i in base.split_by_hash(Numbers(30_000), 0.1, "held_out").indices if i < 20_000
    }
    assert set(held.indices) < set(base.split_by_hash(full, 0.2, "held_out").indices)
    assert (
        len(
            {
                train.fingerprint(),
                held.fingerprint(),
                full.fingerprint(),
                base.split_by_hash(full, 0.2, "train").fingerprint(),
            }
        )
        == 4
    )
    assert (
        len(base.split_by_hash(full, 0.0, "train")) == 20_000
        and len(base.split_by_hash(full, 0.0, "held_out")) == 0
    )
    with pytest.raises(ValueError, match="'test'"):
        base.split_by_hash(full, 0.1, "test")


def test_captions_of_a_source():
    assert list(decode.sample_captions(Numbers(5))) == ["number 1", "number 2", "number 4"]
    some = list(decode.sample_captions(Numbers(1000), 100))
    assert (
        50 < len(some) <= 100
        and some == list(decode.sample_captions(Numbers(1000), 100))
        and some[-1] > "number 9"
    )


def test_reading_fails_with_one_line(fill, monkeypatch):
    path = str(fill({"a.jpg": b"0123456789"}) / "a.jpg")
    assert (
        base.read_byte_range(path, 2, 3) == b"234"
        and base.read_byte_range(path, 8) == b"89"
        and base.read_byte_range(path, 10) == b""
    )
    with pytest.raises(
        UserError,
        match=r"ends before byte 12: it became shorter while the run was reading it; start again$",
    ):
        base.read_byte_range(path, 8, 4)
    with pytest.raises(
        UserError,
        match=(
            r"gone' cannot be read \(No such file or directory\) although it could when the run"
            r" began; restore it$"
        ),
    ):
        base.read_byte_range(path + "gone")
    # A disk that fails twice and then answers is no error; one that goes on failing is.
    fails = collections.deque([OSError(5, "Input/output error")] * 2)
    real = os.pread

    def pread(*arguments):
        if fails:
            raise fails.popleft()
        return real(*arguments)

    monkeypatch.setattr(os, "pread", pread)
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    assert base.read_byte_range(path, 0, 3) == b"012" and not fails
    monkeypatch.setattr(local_files, "OUTAGES", outages.Outages())  # nothing was read lately
    fails.extend([OSError(5, "Input/output error")] * 99)
    slept.clear()
    with pytest.raises(UserError, match="Input/output error") as refusal:
        base.read_byte_range(path, 0, 3)
    # a file server starts within two minutes; where it does not, a scheduler starts the run again
    assert 60 < sum(slept) < 180 and slept == sorted(slept) and refusal.value.status == 1
    # while nothing can be read, every read waits: no other record could take its place
    slept.clear()
    with pytest.raises(UserError, match="Input/output error"):
        base.read_byte_range(path, 0, 3)
    assert 60 < sum(slept) < 180
    fails.clear()
    slept.clear()
    assert base.read_byte_range(path, 0, 3) == b"012"
    fails.extend([OSError(5, "Input/output error")] * 99)
    with pytest.raises(UserError, match="Input/output error"):
        base.read_byte_range(path, 0, 3)
    assert sum(slept) < 5  # of many records that are replaced, one waits
    fails.clear()
    fails.extend([OSError(24, "Too many open files")] * 99)
    slept.clear()
    with pytest.raises(UserError, match="Too many open files"):
        base.read_byte_range(path, 0, 3)
    assert sum(slept) <= 1


@pytest.mark.row("C13")
def test_handles_are_opened_beside_each_other():
    """A slow opening keeps no other file waiting, and happens once for all who ask for the file."""
    cache, begun, go_on = base.HandleCache(2), threading.Barrier(3), threading.Event()
    opened: list[str] = []

    def slow(key: str) -> str:
        opened.append(key)
        begun.wait(10)
        go_on.wait(10)
        return key.upper()

    assert cache("c", lambda: "C") == "C"
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(cache, key, functools.partial(slow, key)) for key in "abab"]
        begun.wait(10)  # both are being opened, and a third is there
        assert cache("c", lambda: "again") == "C" and sorted(opened) == ["a", "b"]
        go_on.set()
        assert [call.result() for call in calls] == ["A", "B", "A", "B"]
    assert sorted(opened) == ["a", "b"] and len(cache) == 2


def test_what_a_worker_never_reads_is_not_sent():
    class Many:
        name, classes, captions = "many", (), False
        record_weights = np.linspace(1, 3, 10_000)

        def __len__(self) -> int:
            return 10_000

    part = base.SubsetSource(Many(), np.arange(0, 10_000, 2, dtype=np.uint32), "part", "part")
    part.source = []
    plain = len(ForkingPickler.dumps(part.indices))
    drawn = sampler.records_at(part, 3, np.arange(99))
    sent = bytes(ForkingPickler.dumps(part))
    assert len(sent) < plain + part.cumulative_weights.nbytes + 1000
    received = ForkingPickler.loads(sent)
    assert sampler.records_at(received, 3, np.arange(99)).tolist() == drawn.tolist()
    assert part.record_weights is not None


def test_a_pipe_in_place_of_a_file_is_refused_at_once(fill):
    folder = fill({"a/1.jpg": b"1", "b/2.jpg": b"2", "b/2.txt": b"two"})
    source = FolderSource(str(folder))
    for name in ("a/1.jpg", "b/2.txt"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(
            UserError,
            match=(
                rf"{name}' is no longer a regular file, as it was when the run began; restore it$"
            ),
        ):
            source[0 if name == "a/1.jpg" else 1]
    with pytest.raises(UserError, match="is no longer a regular file"):
        base.read_byte_range("/dev/zero", 0, 3)
    os.mkfifo(folder / "a/0.jpg")
    # there from the start: passed over and counted
    assert FolderSource(str(folder)).ignored["special files"] == 3


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (0, 0),
        (7, 7),
        (1_000_000, 1_000_000),
        (1_000_001, None),
        (-1, None),
        (1.0, None),
        ("1", None),
        (True, None),
        (None, None),
        ([1], None),
        (10**30, None),
    ],
)
def test_labels(value, label):
    assert base.parse_label(value) == label


def test_digest_keeps_parts_apart():
    assert (
        len(
            {
                base.stable_digest("ab", "c"),
                base.stable_digest("a", "bc"),
                base.stable_digest("abc"),
                base.stable_digest("abc", ""),
            }
        )
        == 4
    )
    assert base.stable_digest(b"x", 1, 0.5) == base.stable_digest(b"x", 1, 0.5)
    assert np.unique([base.stable_digest(i) for i in range(1000)]).size == 1000

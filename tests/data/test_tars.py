"""Tar files read in place: the members are those of Python's tarfile, no path leads outside, and
damage affects only its own member."""

import collections
import errno
import gzip
import io
import json
import logging
import os
import pathlib
import tarfile
import tracemalloc
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.data import splits
from m3i_jax.data.sources import base, local_files, tar_index, tars
from m3i_jax.data.sources.tars import TarSource
from m3i_jax.errors import UserError


def all_records(source: TarSource) -> list[tuple]:
    return [(r.key, r.image, r.label, r.caption) for r in (source[i] for i in range(len(source)))]


def test_nothing_leads_outside(tmp_path, make):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for i in range(50):
            for name in (
                f"../../{i}.jpg",
                f"/etc/{i}.jpg",
                f"a/../../{i}.jpg",
                "..",
                "x" * 200 + f"/../../{i}.jpg",
            ):
                member = tarfile.TarInfo(name)
                member.size = 1
                tar.addfile(member, io.BytesIO(b"x"))
        for kind in (
            tarfile.SYMTYPE,
            tarfile.LNKTYPE,
            tarfile.CHRTYPE,
            tarfile.BLKTYPE,
            tarfile.FIFOTYPE,
            tarfile.DIRTYPE,
        ):
            member = tarfile.TarInfo(f"link{kind.decode()}.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        member = tarfile.TarInfo("good.jpg")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"good"))
        for name in (
            "bad.pkl",
            "bad.pickle",
            "bad.pyd",
            ".hidden.jpg",
            "._good.jpg",
            "__MACOSX/good.jpg",
        ):
            tar.addfile(tarfile.TarInfo(name))
    (tmp_path / "0.tar").write_bytes(buffer.getvalue())
    source = TarSource(str(tmp_path / "*.tar"))
    assert all_records(source) == [("good", b"good", -1, None)]
    assert {kind: n for kind, n in source.ignored.items() if n} == {
        "names that lead outside": 250,
        "links": 2,
        "special members": 3,
        "other members": 3,
        "hidden": 3,
    }
    assert os.listdir(tmp_path) == ["0.tar"]


def test_grouping_captions_and_labels(tmp_path, make):
    def meta(**values) -> bytes:
        return json.dumps(values).encode()

    members = [
        # before its image; the text has priority
        ("1.json", meta(caption="from json", label=3)),
        ("1.jpg", b"one"),
        ("1.txt", b"from text"),
        ("2.png", b"two"),
        ("2.json", meta(caption="only json", label="3")),
        ("3.webp", b"three"),
        ("3.json", b"{broken"),
        ("4.JPG", b"four"),
        ("4.txt", b""),
        ("4.json", meta(caption="the text is empty", label=None)),
        ("5.jpg", b"five"),
        ("5.json", meta(caption=7, label=True)),
        ("5.png", b"a second image of the key"),
        ("6.jpg", b"six"),
        ("6.cls", b"5\n"),
        ("7.jpg", b"seven"),
        ("7.json", b"[" * 100_000),
        ("8.txt", b"not an image"),
        ("9.json", b" " * (tars.JSON_LIMIT + 1)),
        ("a.b.jpg", b"dots"),
        ("a.b.txt", b"in the name"),
        ("10.jpg", b"ten"),
        ("10.cls", b"9" * 5000),
        ("10.json", meta(label=10**12)),
        # a blank text says nothing, in any order of members
        ("11.jpg", b"eleven"),
        ("11.txt", b" \r\n"),
        ("11.json", meta(caption="the text is blank")),
        ("12.json", meta(caption="the text is blank")),
        ("12.txt", b"\n"),
        ("12.jpg", b"twelve"),
        ("13.jpg", b"thirteen"),
        ("13.json", b'{"caption": "caf\xe9", "label": 1}'),
        ("14.jpg", b"fourteen"),
        ("14.json", b"[]"),
    ]
    (tmp_path / "0.tar").write_bytes(make.tar_bytes(members))
    source = TarSource(str(tmp_path))  # a directory means its tar files
    assert all_records(source) == [
        ("1", b"one", 3, b"from text"),
        ("2", b"two", -1, "only json"),
        ("3", b"three", -1, None),
        ("4", b"four", -1, "the text is empty"),
        ("5", b"five", -1, None),
        ("6", b"six", 5, None),
        ("7", b"seven", -1, None),
        ("a.b", b"dots", -1, b"in the name"),
        ("10", b"ten", -1, None),
        ("11", b"eleven", -1, "the text is blank"),
        ("12", b"twelve", -1, "the text is blank"),
        ("13", b"thirteen", -1, None),
        ("14", b"fourteen", -1, None),
    ]
    assert source.classes == ("0", "1", "2", "3", "4", "5") and source.captions
    assert {kind: n for kind, n in source.ignored.items() if n} == {
        "labels that are not a category": 4,
        "images with the key of an earlier one": 1,
        "captions or labels without an image": 1,
        "JSON over 1 MiB": 1,
        "JSON that cannot be read": 4,
    }
    assert source.__getitems__([5, 0, 5]) == [source[5], source[0], source[5]]
    assert source.description().startswith("13 images in 1 tar file of tars ")


def test_a_key_twice_keeps_the_first_sample(tmp_path, make):
    """The second begins where a name comes again; what only it has is not the first one's."""

    def meta(caption: str, label: int) -> bytes:
        return json.dumps({"caption": caption, "label": label}).encode()

    members = [
        ("1.jpg", b"one"),
        ("1.txt", b"first"),
        ("1.cls", b"1"),
        ("1.jpg", b"two"),
        ("1.txt", b"second"),
        ("1.cls", b"2"),
        ("2.json", meta("first", 1)),
        ("2.jpg", b"one"),
        ("2.json", meta("second", 2)),
        ("2.jpg", b"two"),
        ("2.txt", b"of the second"),
        ("3.jpg", b"one"),
        ("3.jpg", b"two"),
        ("3.json", meta("second", 2)),
        # all texts before all images
        ("4.txt", b"first"),
        ("4.txt", b"second"),
        ("4.jpg", b"one"),
        ("4.jpg", b"two"),
        # a second format of one image
        ("5.jpg", b"one"),
        ("5.png", b"one, too"),
        ("5.txt", b"first"),
    ]
    (tmp_path / "0.tar").write_bytes(make.tar_bytes(members))
    source = TarSource(str(tmp_path))
    assert all_records(source) == [
        ("1", b"one", 1, b"first"),
        ("2", b"one", 1, "first"),
        ("3", b"one", -1, None),
        ("4", b"one", -1, b"first"),
        ("5", b"one", -1, b"first"),
    ]
    assert {kind: n for kind, n in source.ignored.items() if n} == {
        "images with the key of an earlier one": 5,
        "captions or labels with the key of an earlier one": 6,
    }


def test_files_in_the_order_of_their_names(tmp_path, make):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.tar").write_bytes(make.tar_bytes([("1.jpg", name.encode())]))
    (tmp_path / "a_stats.json").write_bytes(b"{}")  # img2dataset writes such files beside the tars
    source = TarSource(str(tmp_path / "*"))
    assert [r[1] for r in all_records(source)] == [b"a", b"b", b"c"]
    # Equal keys of two files are in the same part of a split.
    assert {len(base.split_by_hash(source, 0.5, part)) for part in ("train", "held_out")} == {0, 3}


def test_links_to_tars_are_counted(tmp_path, make):
    for name in ("0", "1"):
        (tmp_path / f"{name}.tar").write_bytes(make.tar_bytes([("1.jpg", b"x"), ("2.jpg", b"y")]))
        os.utime(tmp_path / f"{name}.tar", ns=(1, 1))  # as alike as a link, and none
    assert "links to" not in TarSource(str(tmp_path)).description()
    (tmp_path / "latest.tar").symlink_to(tmp_path / "1.tar")
    source = TarSource(str(tmp_path))
    assert len(source) == 6 and "; 2 records are links to others" in source.description()
    assert len(TarSource(str(tmp_path / "latest.tar"))) == 2
    assert "links to" not in TarSource(str(tmp_path / "latest.tar")).description()


def test_a_tar_whose_disk_fails_is_not_left_out(tmp_path, make, monkeypatch):
    for name in ("0", "1"):
        (tmp_path / f"{name}.tar").write_bytes(make.tar_bytes([("1.jpg", b"x")]))
    real = os.stat

    def stale_once(path, **options):
        if str(path).endswith("1.tar"):
            monkeypatch.setattr(os, "stat", real)
            raise OSError(errno.ESTALE, "Stale file handle", path)
        return real(path, **options)

    monkeypatch.setattr(os, "stat", stale_once)
    with pytest.raises(OSError, match="Stale"):
        TarSource(str(tmp_path / "*.tar"))
    assert len(TarSource(str(tmp_path / "*.tar"))) == 2


def test_damage_is_logged_with_the_name_of_the_file(tmp_path, make, caplog):
    content = make.tar_bytes([("1.jpg", b"x" * 600), ("2.jpg", b"y" * 600)])
    (tmp_path / "0.tar").write_bytes(content[:2600])
    with caplog.at_level(logging.WARNING):
        source = TarSource(str(tmp_path))
    assert len(source) == 1 and "1 truncated ends" in source.description()
    assert (
        f"{str(tmp_path / '0.tar')!r}: 1 truncated ends; the valid members are used" in caplog.text
    )


def test_the_index_is_cached_and_rebuilt(tmp_path, make, monkeypatch):
    data, cache = tmp_path / "data", str(tmp_path / "cache")
    data.mkdir()
    (data / "0.tar").write_bytes(
        make.tar_bytes([("1.jpg", b"one"), ("1.txt", b"caption"), ("2.jpg", b"two")])
    )
    built = []
    real = tar_index.IndexBuilder.build
    monkeypatch.setattr(tar_index.IndexBuilder, "build", lambda self: built.append(1) or real(self))

    def opened() -> TarSource:
        return splits.open_source(schema.Data(source="tars", path=str(data / "*.tar")), cache=cache)

    first = opened()
    assert all_records(opened()) == all_records(first) and len(built) == 1
    assert opened().fingerprint() == first.fingerprint() and opened().ignored == first.ignored
    (before,) = pathlib.Path(cache).iterdir()
    os.utime(data / "0.tar", ns=(1, 1))  # another time
    assert all_records(opened()) == all_records(first) and len(built) == 2
    for path in pathlib.Path(cache).iterdir():
        path.unlink()
    (data / "0.tar").write_bytes(make.tar_bytes([("1.jpg", b"changed")]))  # another size or content
    assert all_records(opened()) == [("1", b"changed", -1, None)] and len(built) == 3
    (cached,) = pathlib.Path(cache).iterdir()
    assert cached != before
    for damage in (
        b"",
        b"PK\x03\x04 nothing",
        cached.read_bytes()[:200],
        cached.read_bytes()[:-50],
    ):
        cached.write_bytes(damage)
        before = len(built)
        assert len(opened()) == 1 and len(built) == before + 1
    assert len(opened()) == 1 and len(built) == 7
    assert list(pathlib.Path(cache).iterdir()) == [cached]  # no partial file is left


def test_hosts_with_their_own_files_share_a_directory(tmp_path, make, monkeypatch):
    """Copies of the tars on the disk of each host have other times, and so other indices."""
    monkeypatch.setattr(tar_index, "PART", 2)
    data, cache = tmp_path / "data", str(tmp_path / "cache")
    data.mkdir()

    def on_host(number: int) -> None:
        for shard in range(5):
            (data / f"{shard}.tar").write_bytes(make.tar_bytes([(f"{shard}.jpg", b"x")]))
            os.utime(data / f"{shard}.tar", ns=(number, number))

    on_host(1)
    first = TarSource(str(data), cache=cache)
    sent = bytes(ForkingPickler.dumps(first))
    on_host(2)
    TarSource(str(data), cache=cache)
    monkeypatch.setattr(tar_index.IndexBuilder, "build", None)  # neither host scans again
    assert all_records(ForkingPickler.loads(sent)) == all_records(first)
    assert all_records(TarSource(str(data), cache=cache)) == all_records(first)
    on_host(1)
    assert all_records(TarSource(str(data), cache=cache)) == all_records(first)


def test_an_index_that_vanishes_while_it_is_made(tmp_path, make, monkeypatch):
    """Its parts are still there to be joined in memory."""
    monkeypatch.setattr(tar_index, "PART", 1)
    for shard in range(2):
        (tmp_path / f"{shard}.tar").write_bytes(make.tar_bytes([(f"{shard}.jpg", b"x")]))
    monkeypatch.setattr(tar_index.IndexBuilder, "load", lambda self, verify=True: None)
    source = TarSource(str(tmp_path), cache=str(tmp_path / "cache"))
    assert [record[0] for record in all_records(source)] == ["0", "1"]


def test_an_index_that_cannot_be_saved_is_no_error(tmp_path, make, caplog):
    (tmp_path / "0.tar").write_bytes(make.tar_bytes([("1.jpg", b"one")]))
    (tmp_path / "file").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert len(TarSource(str(tmp_path), cache=str(tmp_path / "file" / "cache"))) == 1
    assert "cannot be saved" in caplog.text


@pytest.mark.parametrize("cached", [False, True])
def test_worker_processes_get_paths_not_files(tmp_path, make, cached):
    (tmp_path / "0.tar").write_bytes(make.tar_bytes([(f"{i}.jpg", b"%d" % i) for i in range(2000)]))
    source = TarSource(str(tmp_path), cache=str(tmp_path / "cache") if cached else "")
    sent = bytes(ForkingPickler.dumps(source))
    assert all_records(ForkingPickler.loads(sent)) == all_records(source)
    assert len(sent) < (2000 if cached else 200_000)


def test_memory_of_the_index(tmp_path, make):
    members = [
        m
        for i in range(3000)
        for m in (
            (f"{i:09d}.jpg", b"j"),
            (f"{i:09d}.txt", b"t"),
            (f"{i:09d}.json", b'{"label": 1}'),
        )
    ]
    (tmp_path / "0.tar").write_bytes(make.tar_bytes(members))
    source = TarSource(str(tmp_path))
    size = sum(array.nbytes for array in source._index.values())
    assert size / len(source) < 65  # bytes per image; 200 are acceptable


@pytest.mark.slow
def test_memory_while_the_index_is_made(monkeypatch):
    """The peak and the final memory are proportional to the number of images."""
    group = {"size": 10_000, "caption_kind": 1, "caption_offset": 7, "caption_size": 50}

    def members(path):
        return {
            f"{path}{i:04d}": {"offset": 12_000 * i, **group} for i in range(10_000)
        }, collections.Counter()

    monkeypatch.setattr(tar_index, "_members", members)
    monkeypatch.setattr(tar_index, "_THREADS", 1)
    builder = tar_index.IndexBuilder([f"{i:05d}" for i in range(20)], np.zeros((20, 2), np.int64))
    tracemalloc.start()
    index = builder.build()
    final, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(index["shard"]) == 200_000
    assert final / 2e5 < 65 and peak / 2e5 < 200


def test_an_index_is_built_in_parts(tmp_path, make, monkeypatch):
    monkeypatch.setattr(tar_index, "PART", 2)
    data = tmp_path / "data"
    data.mkdir()
    for shard in range(5):
        members = [(f"{shard}{i}.{kind}", b"%d" % i) for i in range(4) for kind in ("jpg", "txt")]
        (data / f"{shard}.tar").write_bytes(make.tar_bytes([*members, (".hidden.jpg", b"x")]))
    alone = TarSource(str(data), cache=str(tmp_path / "alone"))
    assert (
        alone.fingerprint() == TarSource(str(data)).fingerprint() and alone.ignored["hidden"] == 5
    )
    builder = tars.index_builder(str(data), cache=str(tmp_path / "shared"))
    assert builder.missing() == [0, 1, 2] and not builder.finish()
    assert [builder(part) for part in (2, 0)] == [4, 8]  # by two hosts
    assert builder.missing() == [1] and not builder.finish() and builder.load() is None
    with pytest.raises(UserError, match="00002.npz' is damaged"):
        builder(1)
        part = pathlib.Path(builder._part_path(2))
        raw = bytearray(whole := part.read_bytes())
        raw[raw.index(b"4041") + 1] ^= 1  # in a key
        part.write_bytes(raw)
        builder.finish()
    part.write_bytes(whole)
    # a training takes what is there and scans the rest
    os.unlink(builder._part_path(0))
    scanned = []
    real = tar_index._scan
    monkeypatch.setattr(tar_index, "_scan", lambda *a: scanned.append(a[0]) or real(*a))
    together = TarSource(str(data), cache=str(tmp_path / "shared"))
    assert sorted(scanned) == [0, 1] and all_records(together) == all_records(alone)
    files = [next((tmp_path / name).iterdir()) for name in ("alone", "shared")]
    assert files[0].read_bytes() == files[1].read_bytes()  # and the parts are gone
    assert builder.finish() and ForkingPickler.loads(ForkingPickler.dumps(together))[3].key == "03"


def test_a_file_is_opened_once_for_the_records_of_a_batch(tmp_path, make, monkeypatch):
    members = [(f"{i}.{kind}", b"%d" % i * 300) for i in range(20) for kind in ("jpg", "txt")]
    for name in ("0", "1"):
        (tmp_path / f"{name}.tar").write_bytes(make.tar_bytes(members))
    source = TarSource(str(tmp_path))
    opened, read = [], []
    openers = (local_files.open_nonblocking, os.pread)
    monkeypatch.setattr(
        local_files,
        "open_nonblocking",
        lambda path, *a: opened.append(path) or openers[0](path, *a),
    )
    monkeypatch.setattr(os, "pread", lambda *a: read.append(a) or openers[1](*a))
    records = source.__getitems__([25, 3, 17, 3])
    assert [(r.key, r.image, r.caption) for r in records] == [
        (str(i), b"%d" % i * 300, b"%d" % i * 300) for i in (5, 3, 17, 3)
    ]
    assert sorted(opened) == source.files and len(read) == 3


def test_a_file_that_changes_during_the_run(tmp_path, make):
    path = tmp_path / "0.tar"
    path.write_bytes(make.tar_bytes([("1.jpg", b"one"), ("2.jpg", b"two")]))
    source = TarSource(str(tmp_path))
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(UserError, match=r"0.tar' ends before byte \d+: it became shorter"):
        source[1]
    path.unlink()
    with pytest.raises(UserError, match="0.tar' cannot be read"):
        source[0]


def test_refusals_of_tars(tmp_path, make):
    def refusal(path: pathlib.Path | str) -> str:
        with pytest.raises(UserError) as caught:
            TarSource(str(path))
        return str(caught.value)

    data = tmp_path / "data"
    data.mkdir()
    assert (
        refusal(data / "*.tar")
        == f"no tar file matches data.path={str(data / '*.tar')!r}: {str(data)!r} holds no .tar"
        " file"
    )
    assert (
        refusal(tmp_path / "dat/*.tar")
        == f"no tar file matches data.path={str(tmp_path / 'dat/*.tar')!r}: there is no 'dat' in"
        f" {str(tmp_path)!r}, did you mean {str(data)!r}?"
    )
    pattern = str(tmp_path / "*/x-*.tar")
    assert (
        refusal(pattern)
        == f"no tar file matches data.path={pattern!r}: give a glob such as 'DIR/*.tar'"
    )
    (data / "0.tar.gz").write_bytes(b"")
    assert refusal(data / "*.tar").endswith(
        f"{str(data)!r} holds 1 compressed tar file, and these cannot be read in place: decompress"
        " them first"
    )
    (data / "00.tar").write_bytes(make.tar_bytes([("a.heic", b""), ("a.txt", b"text")]))
    assert (
        refusal(data / "00*.tra")
        == f"no tar file matches data.path={str(data / '00*.tra')!r}: {str(data)!r} holds 1 .tar"
        f" file, the first is '00.tar': did you mean {str(data / '*.tar')!r}?"
    )
    assert (
        refusal(data / "*.tar")
        == f"the tar file that matches data.path={str(data / '*.tar')!r} holds no image (jpg, jpeg,"
        " png, webp, gif, bmp, tif, tiff); ignored: 1 captions or labels without an image, 1"
        " other members"
    )
    (data / "9.tar").write_bytes(gzip.compress(b"text"))
    assert refusal(data / "9.tar").endswith(
        "; ignored: 1 files compressed by gzip; decompress them first"
    )
    (data / "9.tar").unlink()
    (data / "01.tar").write_bytes(b"")
    assert refusal(data / "*.tar").startswith("the 2 tar files that match ")


def test_the_fingerprint_is_that_of_earlier_versions(tmp_path, make):
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_bytes(make.tar_bytes([("1.jpg", b"x"), ("1.txt", b"text")]))
    source = TarSource(str(tmp_path), cache=str(tmp_path / "cache"))
    hashed = ("shard", "offset", "size", "label", "caption_offset", "caption_size", "keys")
    columns = [source._index[name].tobytes() for name in hashed]
    assert source.fingerprint() == base.stable_digest("a.tar", "b.tar", *columns)
    assert not source._index["keys"].flags.owndata  # mapped, not read

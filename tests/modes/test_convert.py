"""--mode=convert: the same records in the same order, for any number of processes and after an
interruption."""

import dataclasses
import io
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from m3i_jax import schema
from m3i_jax.data import conversion, decode, reencode, splits
from m3i_jax.data.sources import array_record, base, tar_shards
from m3i_jax.data.sources.base import Record
from m3i_jax.data.sources.class_names import class_names_from_file
from m3i_jax.data.sources.folder import FolderSource
from m3i_jax.data.sources.maps import MapsSource
from m3i_jax.data.sources.mixture import Mixture
from m3i_jax.data.sources.scenes import ScenesSource
from m3i_jax.data.sources.shapes import ShapesSource
from m3i_jax.data.sources.tars import TarSource
from m3i_jax.errors import UserError
from m3i_jax.modes import convert as mode
from m3i_jax.modes import host_share
from tests import broken

pytest.importorskip("array_record")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("pictures")
    broken.fill(folder, good=600, kinds=20)
    return folder


def config(images: pathlib.Path, workers: int) -> schema.Config:
    return schema.Config(data=schema.Data(source="folder", path=str(images), workers=workers))


def same(directory: pathlib.Path, images: pathlib.Path) -> None:
    before, after = FolderSource(str(images)), array_record.ArrayRecordSource(str(directory))
    assert len(before) == len(after) == 620 and before.classes == after.classes and after.captions
    for i in range(len(before)):
        a, b = before[i], after[i]
        # broken files too, byte for byte
        assert (a.key, a.image, a.label) == (b.key, b.image, b.label)
        assert (
            a.caption if isinstance(a.caption, bytes | None) else a.caption.encode()
        ) == b.caption


def test_records_are_kept_byte_for_byte_and_a_second_run_writes_nothing(images, tmp_path, capsys):
    assert mode.run(config(images, 1), workdir=str(tmp_path)) == 0
    same(tmp_path, images)
    out, err = capsys.readouterr()
    assert "620 records in 3 shards" in out and "3 of 3 shards, 620 of 620 records" in err
    shards = sorted(tmp_path.glob("*.array_record"))
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in shards]
    shards[1].unlink()
    (tmp_path / "pictures-00001-of-00003.array_record.123.part").write_bytes(b"left over")
    assert mode.run(config(images, 1), workdir=str(tmp_path)) == 0
    assert "2 of 3 shards are already complete" in capsys.readouterr().out
    after = [(path.read_bytes(), path.stat().st_mtime_ns) for path in shards]
    assert after[0] == before[0] and after[2] == before[2] and after[1][1] > before[1][1]
    assert not list(tmp_path.glob("*.part"))
    same(tmp_path, images)


def test_another_source_is_refused(images, tmp_path):
    conversion.check_plan(FolderSource(str(images)), str(tmp_path))
    with pytest.raises(
        UserError, match="another source, or another state of it, is converted there"
    ):
        conversion.check_plan(FolderSource(str(images / "a")), str(tmp_path))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.array_record").write_bytes(b"")
    with pytest.raises(UserError, match="'x.array_record' is not from this conversion"):
        conversion.check_plan(FolderSource(str(images)), str(tmp_path / "other"))


def test_a_mixture_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="needs data.mixture, which is empty"):
        mode.run(schema.Config(data=schema.Data(source="mixture")), workdir=str(tmp_path))


def test_the_shards_partition_all_rows():
    for records in (1, 255, 620, 5000, 100_000):
        shards = conversion.shard_count(records)
        assert [
            i for s in range(shards) for i in conversion.shard_rows(records, s, shards)
        ] == list(range(records))


@pytest.mark.parametrize("shards", [8, 99_999, 100_001, 1_000_000])
def test_sorted_by_name_the_shards_are_in_their_order(shards):
    """A program that reads them all sorts their names."""
    numbers = sorted({0, 1, *(n for n in (9_999, 10_000, 99_999, 100_000) if n < shards)})
    paths = [conversion.shard_path("out", number, shards) for number in numbers]
    assert paths == sorted(paths)


def test_shards_of_another_number_of_digits_are_refused(tmp_path, monkeypatch):
    """Earlier versions wrote five digits for any number of shards: both in one directory would be
    indexed as the records of one set."""
    monkeypatch.setattr(conversion, "shard_count", lambda records: 100_001)
    source = ShapesSource(3)
    assert conversion.check_plan(source, str(tmp_path)) == 100_001
    (tmp_path / "pictures-000007-of-100001.array_record").write_bytes(b"")
    assert conversion.check_plan(source, str(tmp_path)) == 100_001
    (tmp_path / "pictures-00008-of-100001.array_record").write_bytes(b"")
    with pytest.raises(UserError, match="'pictures-00008-.*a number of 5 digits, .* need 6"):
        conversion.check_plan(source, str(tmp_path))


@pytest.mark.parametrize("held", [0.0, 0.3])
def test_a_mixture_with_annotations_is_refused(tmp_path, held):
    """Of sources of which only some annotate objects, or have class maps."""
    for folder, name in (("images", "1.jpg"), ("annotations", "1.png")):
        (tmp_path / "maps" / folder).mkdir(parents=True)
        Image.new("L", (8, 8), 1).save(tmp_path / "maps" / folder / name)
    for annotated in (ScenesSource(4, side=48), MapsSource(str(tmp_path / "maps"))):
        mixed = Mixture([ShapesSource(5), annotated], [None, None])
        part = base.split_by_hash(mixed, held, "train")
        with pytest.raises(UserError, match="has objects or class maps, which shards would lose"):
            conversion.check_plan(part, str(tmp_path))
    assert conversion.check_plan(Mixture([ShapesSource(5)] * 2, [None, None]), str(tmp_path)) == 1


def written(directory: pathlib.Path) -> dict[str, bytes]:
    """The files of a conversion that are read later."""
    names = [
        *directory.glob("pictures-*"),
        *directory.glob("dataset.*"),
        directory / "convert.json",
    ]
    return {path.name: path.read_bytes() for path in names if not path.name.endswith(".part")}


def test_shares_write_what_one_process_writes(images, tmp_path, capsys):
    one, shared = tmp_path / "one", tmp_path / "shared"
    assert mode.run(config(images, 1), workdir=str(one), size="24") == 0
    shared.mkdir()
    shutil.copy(one / "convert.json", shared)
    stem = "pictures-00001-of-00003.array_record.host-0000"
    own, other = (shared / f"{stem}{i}-of-00002.7.part" for i in (1, 0))
    own.write_bytes(b"left over"), other.write_bytes(b"in use")
    assert mode.run(config(images, 1), workdir=str(shared), size="24", shard="1/2") == 0
    assert "share 1/2 is complete; 2 of 3 shards are still" in capsys.readouterr().out
    assert not (shared / "dataset.json").exists() and not own.exists() and other.exists()
    # flags of a training name the share as well; the last one writes the index
    assert mode.run(config(images, 1), workdir=str(shared), size="24", hosts=("", "2", "0")) == 0
    assert "620 records in 3 shards" in capsys.readouterr().out and not other.exists()
    assert written(shared) == written(one)
    source = array_record.ArrayRecordSource(str(one))
    before = FolderSource(str(images))
    good = [i for i in range(620) if before[i].key.startswith("a/0")][:30]
    sizes = [min(decode.decode_image(source[i].image).shape[:2]) for i in good]
    assert max(sizes) <= 24 and source.captions
    unchanged = [i for i in range(620) if source[i].image == before[i].image]
    assert unchanged  # small ones, and files that no decoder reads
    with pytest.raises(UserError, match="images there are encoded with .*, here with their own"):
        mode.run(config(images, 1), workdir=str(shared), shard="0/2")
    # an incomplete file is not indexed
    shards = sorted(shared.glob("*.array_record"))
    shards[0].write_bytes(shards[0].read_bytes()[:-100])
    with pytest.raises(UserError, match="does not hold the records of its .npz file: remove it"):
        mode.run(config(images, 1), workdir=str(shared), size="24", shard="1/2")


def test_a_share_that_sees_the_others_late_writes_the_index(images, tmp_path, monkeypatch, capsys):
    """Both end at the same moment, and a network disk shows neither what the other wrote: without
    another look both would leave the index to a second start."""
    assert mode.run(config(images, 1), workdir=str(tmp_path), size="24", shard="1/2") == 0
    see, late = conversion.missing_shards, [[], [1], [1]]
    monkeypatch.setattr(conversion, "missing_shards", lambda *a: (late and late.pop(0)) or see(*a))
    monkeypatch.setattr(host_share, "_is_local", lambda directory: False)
    monkeypatch.setattr(host_share.barriers, "VIEW_AGE", 1.0)
    assert mode.run(config(images, 1), workdir=str(tmp_path), size="24", shard="0/2") == 0
    assert "620 records in 3 shards" in capsys.readouterr().out and not late
    assert (tmp_path / "dataset.json").exists() and not list(tmp_path.glob(".look-*"))


def test_disks_without_a_block_device(tmp_path, monkeypatch):
    """Containers are on overlay, and btrfs and ZFS have no block device: a share there need not
    wait for what others wrote. A network disk below them is still one."""
    monkeypatch.setattr(host_share.os, "major", lambda device: 0)
    mounts = tmp_path / "mountinfo"
    lines = [
        "21 1 0:35 / / rw,relatime shared:1 - overlay overlay rw",
        "22 21 0:52 / /mnt/data rw - btrfs /dev/sda2 rw",
        "23 22 0:53 / /mnt/data/of\\040all rw shared:2 master:1 - nfs4 server:/all rw",
        "24 21 0:54 / /mnt/bucket rw - fuse.gcsfuse bucket rw",
        "25 21 0:55 / /mnt/pool rw - zfs pool rw",
        "26 21 0:56 / /mnt/pool rw - nfs server:/over rw",  # over it
    ]
    mounts.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(host_share.os, "stat", lambda path: os.stat_result([0] * 10))
    for directory, local in {
        "/home/me": True,
        "/mnt/data/images": True,
        "/mnt/data2": True,
        "/mnt/data/of all/images": False,
        "/mnt/bucket": False,
        "/mnt/pool/x": False,
    }.items():
        assert host_share._is_local(directory, str(mounts)) is local, directory
    assert not host_share._is_local("/home/me", str(tmp_path / "absent"))


def test_a_share_does_not_wait_for_one_that_has_not_begun(monkeypatch):
    monkeypatch.setattr(host_share, "_is_local", lambda directory: False)
    looks = iter([[1, 2]])
    assert host_share.settle_missing(lambda: next(looks), ".", begun=lambda i: i == 1) == [1, 2]


def test_the_first_of_two_plans_counts(images, tmp_path, monkeypatch):
    """A host that does not see the plan of the other yet does not replace it."""
    conversion.check_plan(FolderSource(str(images)), str(tmp_path))
    plan = (tmp_path / conversion.PLAN).read_bytes()
    monkeypatch.setattr(conversion.os, "listdir", lambda directory: [])
    monkeypatch.setattr(conversion.os.path, "exists", lambda path: False)
    assert conversion.check_plan(FolderSource(str(images)), str(tmp_path)) == 3
    with pytest.raises(UserError, match="another source, or another state of it"):
        conversion.check_plan(FolderSource(str(images / "a")), str(tmp_path))
    monkeypatch.undo()
    assert (tmp_path / conversion.PLAN).read_bytes() == plan
    assert os.listdir(tmp_path) == [conversion.PLAN]


@pytest.mark.parametrize(
    ("shard", "environ", "expected"),
    [
        ("3/16", {"SLURM_ARRAY_TASK_ID": "9"}, (3, 16)),
        ("/16", {"SLURM_ARRAY_TASK_ID": "9"}, (9, 16)),
        ("/4", {"JOB_COMPLETION_INDEX": "2"}, (2, 4)),
        ("", {}, (0, 1)),
        (
            "",
            {"JAX_COORDINATOR_ADDRESS": "a", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "1"},
            (1, 3),
        ),
        ("3", {}, "is not i/n"),
        ("4/4", {}, "must be less than the second"),
        ("/4", {}, "neither SLURM_ARRAY_TASK_ID nor JOB_COMPLETION_INDEX"),
        ("", {"JOB_COMPLETION_INDEX": "2"}, "give --shard=/n"),
        ("", {"SLURM_ARRAY_TASK_ID": "9"}, "not evenly spaced, or not known"),
    ],
)
def test_the_share_of_a_host(shard, environ, expected):
    environ = {"JAX_PLATFORMS": "cpu", **environ}
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            host_share.detect_share(shard, "", "", "", environ=environ)
    else:
        share = host_share.detect_share(shard, "", "", "", environ=environ)
        assert (share.number, share.count) == expected


def test_tar_files_of_two_shares_are_those_of_one(images, tmp_path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    assert mode.run(config(images, 1), workdir=str(one), format="tar") == 0
    out = capsys.readouterr().out
    assert "--config.data.source=tars" in out
    assert f"keys such as {FolderSource(str(images)).key(0)!r} have a dot" in out
    for number in (1, 0):
        assert mode.run(config(images, 1), workdir=str(two), shard=f"{number}/2", format="tar") == 0
    names = sorted(path.name for path in one.iterdir() if path.suffix in (".tar", ".json", ".npz"))
    assert len(names) == 3 + 3 + 2
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    before, after = FolderSource(str(images)), TarSource(str(one))
    assert len(before) == len(after) == 620 and not after.ignored.total()
    for i in range(len(before)):
        a, b = before[i], after[i]
        text = a.caption.encode() if isinstance(a.caption, str) else a.caption
        assert (a.key, a.image, a.label, text) == (b.key, b.image, b.label, b.caption)
    named = class_names_from_file(str(one / "class_names.txt"), after.classes)
    assert named[: len(before.classes)] == before.classes
    # a damaged shard is refused, a missing one written again
    shard = two / names[-2]
    assert shard.suffix == ".tar"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:600] + b"?" + raw[601:])
    with pytest.raises(UserError, match="does not hold the records"):
        mode.run(config(images, 1), workdir=str(two), format="tar")
    shard.unlink()
    assert mode.run(config(images, 1), workdir=str(two), format="tar") == 0
    assert shard.read_bytes() == raw
    with pytest.raises(UserError, match=r"shards of another --format \(tar\)"):
        mode.run(config(images, 1), workdir=str(two))
    with pytest.raises(UserError, match="--format=zip: is not one of array_record, tar"):
        mode.run(config(images, 1), workdir=str(two), format="zip")


@pytest.mark.parametrize("keys", [("a", "a"), ("../a",), ("/a",), (".a",), ("a/",), ("",)])
def test_keys_that_a_tar_file_cannot_hold(tmp_path, keys):
    with pytest.raises(UserError, match="use --format=array_record"):
        tar_shards.write_shard(str(tmp_path / "x.tar"), (Record(key, b"x") for key in keys))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_share_is_resumed(images, tmp_path):
    """Two processes, of which one is killed while it writes and started again."""
    start = [sys.executable, "-m", "m3i_jax.main", "--config", f"configs/folder.py:path={images}"]
    start += ["--mode=convert", "--quality=80", "--config.data.workers=1"]
    assert subprocess.run([*start, "--workdir", str(tmp_path / "one")], check=False).returncode == 0
    shared = tmp_path / "shared"
    commands = [[*start, "--workdir", str(shared), f"--shard={i}/2"] for i in range(2)]
    first, second = (subprocess.Popen(command) for command in commands)
    while first.poll() is None and not list(shared.glob("*.host-00000-of-00002.*.part")):
        time.sleep(0.002)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert second.wait() == 0 and not (shared / "dataset.json").exists()
    assert list(shared.glob("*.host-00000-of-00002.*.part"))
    assert subprocess.run(commands[0], check=False).returncode == 0
    assert written(shared) == written(tmp_path / "one") and not list(shared.glob("*.part"))


@pytest.mark.slow
def test_a_killed_conversion_is_resumed(images, tmp_path):
    """Killed while its two processes write: an incomplete shard is not used, no process is left,
    and the result is the same."""
    command = [
        sys.executable,
        "-m",
        "m3i_jax.main",
        "--config",
        f"configs/folder.py:path={images}",
        "--mode=convert",
    ]
    command += ["--workdir", str(tmp_path), "--config.data.workers=2"]
    for turn in range(3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while (
            time.monotonic() < deadline
            and len(list(tmp_path.glob("*.npz"))) <= turn
            and process.poll() is None
        ):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    same(tmp_path, images)
    assert os.listdir(tmp_path) and not list(tmp_path.glob("*.part"))


def test_weights_that_shards_do_not_hold_are_named(tmp_path, capsys):
    settings = schema.Data(source="mixture", mixture=("shapes:9=3", "shapes:6=1"), workers=1)
    small = dataclasses.replace(settings, mixture=("shapes:3=3", "shapes:3=1"))
    assert mode.run(schema.Config(data=small), workdir=str(tmp_path / "run")) == 0
    out = capsys.readouterr().out
    assert "shards hold every record of data.mixture once and not its shares 3 : 1: to" in out
    by_size = dataclasses.replace(settings, mixture=("shapes:9", "shapes:6"))
    assert mode.lost_weights(splits.open_source(by_size)) == []
    kept = base.SubsetSource(ShapesSource(9), np.arange(4), "part", "part")
    kept.record_weights = np.ones(4)
    inner = base.SubsetSource(Mixture([kept, ShapesSource(6)], [None, None]), np.arange(9), "", "")
    (line,) = mode.lost_weights(inner)
    assert line == "shards hold no weights of records: train on them with the same data.keep"


def test_a_panorama_that_no_jpeg_can_hold_keeps_its_bytes(tmp_path, caplog, monkeypatch):
    """libjpeg writes at most 65,500 pixels a side: others stopped the conversion for ever."""
    for name, width in (("long", 66_000), ("short", 65_500)):
        (tmp_path / "in" / "a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (width, 32), (9, 99, 9)).save(tmp_path / "in" / "a" / f"{name}.png")
    run = tmp_path / "run"
    assert mode.run(config(tmp_path / "in", 1), workdir=str(run), quality="90") == 0
    before, after = FolderSource(str(tmp_path / "in")), array_record.ArrayRecordSource(str(run))
    assert [record.key for record in after] == ["a/long.png", "a/short.png"]
    assert after[0].image == before[0].image
    assert Image.open(io.BytesIO(after[1].image)).format == "JPEG"
    assert caplog.messages == [
        "warning: 'a/long.png', 66000 x 32 pixels, is not encoded again: a JPEG has at most 65,500"
        " pixels a side"
    ]
    small = reencode.Reencoding(size=16)(before[0])
    assert Image.open(io.BytesIO(small.image)).size == (33_000, 16)
    # any other refusal of the encoder
    monkeypatch.setattr(reencode, "JPEG_SIDE", 10**6)
    record = reencode.Reencoding(quality=90)(before[0])
    assert record is not None and record.image == before[0].image

"""Rows C8 to C12, and C1 for unusual but valid images: faults of files and workers during
training."""

import copy
import dataclasses
import multiprocessing
import os
import pathlib
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest

from m3i_jax import main as command
from m3i_jax.data import pipeline, shared_buffers, workers
from m3i_jax.data.sources import array_record, base
from m3i_jax.data.sources.folder import FolderSource
from m3i_jax.data.sources.tars import TarSource
from m3i_jax.errors import RunStopped, UserError
from m3i_jax.modes import data as data_mode
from m3i_jax.objective import masks
from tests import broken, toy
from tests.data.conftest import ColorImages, expected_stream, good_files, settings
from tests.faults.hostile import tar


def coloured(count: int) -> list[bytes]:
    return [broken.encode(np.full((20, 20, 3), i, np.uint8), "PNG") for i in range(count)]


def rows(
    source: Any, count: int, *, start: int = 0, **data: Any
) -> tuple[list[int], dict[str, int]]:
    """(red of every row's image, bad records by reason) of `count` batches of 10."""
    batches = pipeline.iterate_batches(settings(batch=10, **data), source, None, start=start)
    try:
        seen = [next(batches)["views"][:, 0, 0, 0, 0] for _ in range(count)]
    finally:
        batches.close()
    return np.concatenate(seen).tolist(), batches.skipped


def a_folder(place: pathlib.Path) -> tuple[Any, list[pathlib.Path], set[int]]:
    for i, content in enumerate(coloured(40)):
        (place / f"{i:02}.png").write_bytes(content)
    return FolderSource(str(place)), [place / f"{i:02}.png" for i in range(5)], set(range(5))


def tar_shards(place: pathlib.Path) -> tuple[Any, list[pathlib.Path], set[int]]:
    images = coloured(40)
    for shard in range(4):
        tar(
            place / f"{shard}.tar",
            [(f"{i:02}.png", images[i]) for i in range(10 * shard, 10 * shard + 10)],
        )
    return TarSource(str(place)), [place / "2.tar"], set(range(20, 30))


def record_shards(place: pathlib.Path) -> tuple[Any, list[pathlib.Path], set[int]]:
    pytest.importorskip("array_record.python.array_record_module")
    for shard in range(4):
        records = [base.Record(str(i), content) for i, content in enumerate(coloured(40))][
            10 * shard : 10 * shard + 10
        ]
        array_record.write_shard(str(place / f"x-{shard:05}-of-00004.array_record"), records)
    array_record.write_shard_index(str(place))
    return (
        array_record.ArrayRecordSource(str(place)),
        [place / "x-00002-of-00004.array_record"],
        set(range(20, 30)),
    )


MADE = {"folder": a_folder, "tars": tar_shards, "array_record": record_shards}


def removed(path: pathlib.Path) -> None:
    path.unlink()


def emptied(path: pathlib.Path) -> None:
    os.truncate(path, 0)


def closed(path: pathlib.Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nowhere" / path.name)


@pytest.mark.fast
@pytest.mark.row("C9")
@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("lose", [removed, emptied, closed])
def test_a_file_that_vanishes(kind: str, lose: Any, trials, tmp_path: pathlib.Path) -> None:
    """`stop` names the file; `replace` draws other records by the rule of bad ones, also after a
    restart in the middle."""
    source, lost, colours = MADE[kind](tmp_path)
    rows(source, 2)
    for path in lost:
        lose(path)
    # as a worker gets it, with nothing open: what is open may still be read
    source = copy.deepcopy(source)
    if kind == "folder" and lose is emptied:  # an image of no bytes is a bad image
        assert rows(source, 8)[1]["empty"] > 0
        return
    with pytest.raises(UserError) as stop:
        rows(source, 8)
    assert trials.add(any(path.name in str(stop.value) for path in lost)), stop.value
    replaced, skipped = rows(source, 8, missing="replace")
    assert trials.add(
        (replaced, skipped) == expected_stream(source, dict.fromkeys(colours, "unreadable"), 80)
    ), skipped
    assert skipped["unreadable"] > 5
    assert trials.add(rows(source, 4, start=40, missing="replace")[0] == replaced[40:])
    if kind == "array_record" and lose is not emptied:  # a converted data set knows what it had
        with pytest.raises(UserError, match="is missing"):
            array_record.ArrayRecordSource(str(tmp_path))
        again = array_record.ArrayRecordSource(str(tmp_path), lenient=True)
        assert trials.add(
            again.fingerprint() == source.fingerprint()
            and rows(again, 8, missing="replace")[0] == replaced
        )


@pytest.mark.fast
@pytest.mark.row("C9")
def test_too_many_lost_files_end_the_run(tmp_path: pathlib.Path) -> None:
    source, lost, _ = tar_shards(tmp_path)
    lost[0].unlink()
    with pytest.raises(UserError, match=r"unreadable \(such as '2\d'"):
        rows(source, 300, missing="replace", max_bad_share=0.001)


class Workers:
    """Stands for a Grain iterator over workers: batch k is {"k": k}, and `fails` gives what happens
    before it."""

    def __init__(self, first: int, fails: dict[int, list[Any]]) -> None:
        self.k, self.fails = first, fails

    def __next__(self) -> dict[str, int]:
        if self.fails.get(self.k):
            act = self.fails[self.k].pop(0)
            act()
        self.k += 1
        return {"k": self.k - 1}

    def close(self) -> None:
        pass


def died() -> None:
    raise RuntimeError(
        "Worker process was terminated unexpectedly with exit code -9. Search the logs above"
    )


def watched(fails: dict[int, list[Any]], limit: float = 0.3) -> workers.RestartingIterator:
    return workers.RestartingIterator(
        lambda first: (Workers(first, fails), None), workers=2, limit=limit
    )


@pytest.mark.fast
@pytest.mark.row("C10")
def test_lost_workers_are_replaced_in_the_same_order(trials, caplog) -> None:
    forever = threading.Event()
    try:
        batches = watched({2: [died], 5: [forever.wait, died], 7: [died, died]})
        assert trials.add(
            [next(batches)["k"] for _ in range(10)] == list(range(10)) and batches.restarts == 5
        )
        messages = "\n".join(caplog.messages)
        assert (
            "worker 0 of 2 of the data (for batch 2 since the start) ended with exit code -9,"
            " killed, as the kernel does" in messages
        )
        assert (
            "worker 1 of 2 of the data (for batch 5 since the start) made no batch in 0.3 seconds"
            " (config.data.patience)" in messages
        )
        batches.close()
        for fails in ({3: [died] * 3}, {3: [forever.wait] * 3}):
            batches = watched(fails)
            assert [next(batches)["k"] for _ in range(3)] == [0, 1, 2]
            with pytest.raises(
                RunStopped,
                match=(
                    r"^worker \d of 2 of the data \(for batch 3 .*, 3 times in a row: check the"
                    r" memory"
                ),
            ):
                next(batches)
            trials.add(True)
            batches.close()
    finally:
        forever.set()


@pytest.mark.fast
@pytest.mark.row("C10")
def test_an_error_of_a_worker_is_no_lost_worker() -> None:
    def wrong() -> None:
        raise RuntimeError("the data are wrong")

    batches = watched({1: [wrong]})
    assert next(batches) == {"k": 0}
    with pytest.raises(RuntimeError, match="the data are wrong"):
        next(batches)
    assert batches.restarts == 0
    batches.close()


class Slow(ColorImages):
    """Reads hang while a file exists."""

    def __init__(self, count: int, gate: pathlib.Path) -> None:
        super().__init__(count)
        self.gate = gate

    def __getitem__(self, index: int) -> base.Record:
        while self.gate.exists():
            time.sleep(0.02)
        return super().__getitem__(index)


@pytest.mark.fast
@pytest.mark.row("C9", "C10")
def test_a_disk_that_does_not_answer_ends_the_run(trials, tmp_path: pathlib.Path) -> None:
    """In threads of this process: logged, retried, ended; and if the disk answers in time, nothing
    is lost."""
    gate = tmp_path / "gate"
    for threads in (0, 2):
        gate.touch()
        batches = pipeline.iterate_batches(
            settings(batch=4, threads=threads, patience=0.3), Slow(20, gate), None, start=0
        )
        with pytest.raises(
            RunStopped,
            match=(
                r"^the threads that read the data \(for batch 0 since the start\) made no batch in"
                r" 0.3 seconds"
            ),
        ):
            next(batches)
        gate.unlink()
        batches.close()
        trials.add(True)
        gate.touch()
        batches = pipeline.iterate_batches(
            settings(batch=4, threads=threads, patience=1.0), Slow(20, gate), None, start=0
        )
        threading.Timer(1.3, gate.unlink).start()
        first = next(batches)["views"]
        batches.close()
        fresh = pipeline.iterate_batches(settings(batch=4), ColorImages(20), None, start=0)
        assert trials.add((first == next(fresh)["views"]).all())


def children() -> list[Any]:
    return [child for child in multiprocessing.active_children() if child.name.startswith("grain-")]


@pytest.mark.slow
@pytest.mark.row("C10")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_real_workers_that_are_killed_or_stopped(number: int, trials, caplog) -> None:
    """Each of two worker processes, once: every batch equals that of a run without workers, and
    their buffers are returned."""
    wanted = pipeline.iterate_batches(settings(batch=6), ColorImages(50), None, start=0)
    batches = pipeline.iterate_batches(
        settings(batch=6, workers=2, patience=12.0), ColorImages(50), None, start=0
    )
    waits = []
    try:
        for k in range(36):
            if k in (3, 18):
                os.kill(sorted(child.pid for child in children())[k % 2], number)
            before = time.monotonic()
            got = next(batches)
            waits.append(time.monotonic() - before)
            expected = next(wanted)
            assert trials.add(all((got[name] == expected[name]).all() for name in expected)), k
    finally:
        wanted.close()
        batches.close()
    assert batches._batches.restarts == 2 == len(caplog.messages)
    deadline = time.monotonic() + 60
    while children() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not children(), "a worker is still there"
    assert not [
        p
        for p in pathlib.Path("/dev/shm").glob(f"{shared_buffers._PREFIX}*")
        if p.stat().st_mtime > time.time() - 300 and is_own_buffer(p)
    ]
    trials.figure = (
        f"{signal.Signals(number).name}: {batches._batches.restarts} restarts, longest wait"
        f" {max(waits):.1f} s, patience 12 s"
    )


def is_own_buffer(place: pathlib.Path) -> bool:
    """Whether this process maps a file of the directory."""
    return str(place) in pathlib.Path("/proc/self/maps").read_text()


@pytest.mark.fast
@pytest.mark.row("C11")
def test_few_images_and_odd_numbers(trials) -> None:
    """Fewer images than a batch, and odd numbers: complete epochs, and no image is its own partner;
    one image, or a batch that cannot be split, is refused."""
    for count in (2, 3, 5, 7):
        batches = pipeline.iterate_batches(settings(batch=12), ColorImages(count), None, start=0)
        got = [(next(batches), batches.record)[1] for _ in range(4)]
        batches.close()
        pairs = np.concatenate(got).reshape(-1, 2)
        assert trials.add(
            (pairs[:, 0] != pairs[:, 1]).all() and set(pairs.ravel().tolist()) == set(range(count))
        )
    with pytest.raises(UserError, match="has 1 images to train on, mixing needs 2"):
        pipeline.iterate_batches(settings(batch=4), ColorImages(1), None, start=0)
    for change in (
        "train__batch_size=5",
        "train__steps=0 train__epochs=0",
        "train__microbatches=0",
    ):
        with pytest.raises(UserError, match="config.train"):
            toy.settings(**dict(pair.split("=") for pair in change.split()))
    with pytest.raises(ValueError, match="partners are 2k and 2k"):
        pipeline.iterate_batches(settings(batch=6), ColorImages(9), None, start=0, host=0, hosts=2)
    trials.figure = "sources of 2, 3, 5 and 7 images in batches of 12"


def check_masks(count: int) -> int:
    config = settings(batch=2, image_size=112)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, mask_ratio=0.5))
    assert (config.grid, config.hidden) == (14, 98)
    wrong = 0
    for at in range(0, count, 2000):
        drawn_masks = masks.blockwise(0, at, 2000, grid=14, hidden=98)
        wrong += int(((~drawn_masks).sum(1) != 98).sum())
    return wrong


@pytest.mark.fast
@pytest.mark.row("C12")
def test_masks_hide_exactly_what_they_say(trials) -> None:
    assert trials.add(check_masks(4000) == 0)


@pytest.mark.slow
@pytest.mark.row("C12")
def test_a_hundred_thousand_masks_and_pairs(trials) -> None:
    wrong = check_masks(100_000)
    batches = pipeline.iterate_batches(
        settings(batch=1000, image_size=8, crop_scale=(0.9, 1.0), mask="uniform"),
        ColorImages(501),
        None,
        start=0,
    )
    same = 0
    for _ in range(20):
        next(batches)
        same += int((batches.record[::2] == batches.record[1::2]).sum())
    batches.close()
    assert trials.add(wrong == 0) and trials.add(same == 0)
    trials.figure = f"{wrong} of 100,000 masks wrong, {same} of 10,000 partners equal"


@pytest.mark.fast
@pytest.mark.row("C10")
def test_stopped_is_one_line_and_exit_1(monkeypatch, capsys, tmp_path: pathlib.Path) -> None:
    def run(*_: Any, **__: Any) -> int:
        raise RunStopped("worker 1 of 2 made no batch")

    monkeypatch.setattr(data_mode, "run", run)
    monkeypatch.chdir(pathlib.Path(__file__).parent.parent.parent)
    assert (
        command.main(
            ["--config", "configs/quickstart.py", "--workdir", str(tmp_path), "--mode=data"]
        )
        == 1
    )
    out, err = capsys.readouterr()
    assert err == "m3i_jax: stopped: worker 1 of 2 made no batch\n"
    assert out.startswith("configuration: ") and out.count("\n") == 1


@pytest.mark.fast
@pytest.mark.row("C4", "C1")
def test_unusual_but_complete_images_are_no_bad_records(tmp_path: pathlib.Path) -> None:
    for name, content in good_files().items():
        (tmp_path / name).write_bytes(content)
    batches = pipeline.iterate_batches(
        settings(batch=34), FolderSource(str(tmp_path)), None, start=0
    )
    next(batches)
    batches.close()
    assert (
        not any(batches.skipped.values())
        and len(set(batches.record.tolist())) == len(good_files()) == 17
    )


@pytest.mark.fast
@pytest.mark.row("C8")
def test_no_flip_of_an_array_record_is_silent(trials, tmp_path: pathlib.Path) -> None:
    """200 flipped bits of shard, columns and indices: refused at the start, counted as a damaged
    record, or without effect."""
    pytest.importorskip("array_record.python.array_record_module")
    rng = np.random.default_rng(0)
    written = [
        base.Record(f"key {i}", rng.bytes(20_000), i % 3, f"caption {i}".encode())
        for i in range(12)
    ]
    shard = tmp_path / "x-00000-of-00001.array_record"
    array_record.write_shard(str(shard), written)
    array_record.write_shard_index(str(tmp_path), classes=("a", "b", "c"))
    before = array_record.ArrayRecordSource(str(tmp_path))
    silent, refused, replaced = [], 0, 0
    files = [(path, path.read_bytes()) for path in sorted(tmp_path.iterdir())]
    for path, content in files:
        share = 140 if path == shard else 20
        for at in rng.integers(0, len(content), share).tolist():
            damaged = bytearray(content)
            damaged[at] ^= 1 << int(rng.integers(0, 8))
            path.write_bytes(damaged)
            try:
                source = array_record.ArrayRecordSource(str(tmp_path))
                got = [source[i] for i in range(len(source))]
            except UserError:
                refused += 1
            else:
                bad = [r for r in got if r.image == array_record.DAMAGED]
                same = [r for r in got if r in written]
                named = (
                    len(bad) + len(same) == 12 == len(got)
                    or source.fingerprint() != before.fingerprint()
                )
                hashes = (
                    base.source_key_hashes(source) == base.source_key_hashes(before)
                ).all() or source.fingerprint() != before.fingerprint()
                replaced += len(bad)
                if not (named and hashes):
                    silent.append((path.name, at))
            trials.add(not silent)
        path.write_bytes(content)
    trials.figure = (
        f"{len(silent)} of {trials.trials} flips silent; {refused} refused at the start, {replaced}"
        " records replaced"
    )
    assert not silent and trials.trials == 200, silent
    whole = shard.read_bytes()
    for at in rng.integers(1, len(whole), 20).tolist():
        shard.write_bytes(whole[:at])
        with pytest.raises(UserError):
            source = array_record.ArrayRecordSource(str(tmp_path))
            assert any(source[i].image == array_record.DAMAGED for i in range(12)), at
            raise UserError("damaged records")

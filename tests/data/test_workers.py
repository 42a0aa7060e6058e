"""Worker processes end with their trainer, and what ends them is named."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from m3i_jax.data import batch_builder, pipeline, record_batches, sampler, shared_buffers, workers
from m3i_jax.data.sources import base
from m3i_jax.errors import RunStopped

ROOT = pathlib.Path(__file__).parent.parent.parent
ONE_PROCESS = """
import multiprocessing, sys, time
from m3i_jax.data import workers

def work(pipe):
    workers.begin_worker(0, 1)
    pipe.send("here")
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe()
    child = context.Process(target=work, args=(sender,))
    child.start()
    receiver.recv()
    print(child.pid, flush=True)
    time.sleep(600)
"""
PIPELINE = """
import multiprocessing, time
from m3i_jax import schema
from m3i_jax.data import pipeline, splits

if __name__ == "__main__":
    data = schema.Data(size=100, image_size=32, workers=1, captions="no")
    config = schema.Config(data=data, train=schema.Train(batch_size=4))
    batches = pipeline.iterate_batches(config, splits.open_source(data), None, start=0)
    next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    time.sleep(600)
"""


class Poisoned:
    """Record 5 ends the process that decodes it."""

    name, classes, captions = "poisoned", (), False

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> base.Record:
        return base.Record(f"images/{index}.jpg", np.full((40, 40, 3), index, np.uint8))

    def key(self, index: int) -> str:
        return f"images/{index}.jpg"


class Ending(batch_builder.BatchBuilder):
    def fill_row(self, record, row, u, batch) -> None:
        if record.key == "images/5.jpg":
            os.kill(os.getpid(), signal.SIGSEGV)
        super().fill_row(record, row, u, batch)


@pytest.mark.row("C10")
def test_the_record_that_ends_workers_is_named(make, monkeypatch) -> None:
    monkeypatch.setattr(pipeline, "BatchBuilder", Ending)
    monkeypatch.setattr(workers, "TRIES", 1)
    config = make.settings(batch=4, workers=1)
    place = sampler.records_at(Poisoned(), config.seed, np.arange(12)).tolist().index(5)
    batches = pipeline.iterate_batches(config, Poisoned(), None, start=0)
    try:
        with pytest.raises(RunStopped) as stopped:
            for _ in range(3):
                next(batches)
    finally:
        batches.close()
    # the batch that is due, or one before, if the worker was ahead
    assert re.search(
        r"ended with exit code -11, by SIGSEGV \(positions \d to \d+ of the stream, while"
        rf" 'images/5.jpg' \(position {place}\) was being decoded\), 1 times in a row: check",
        str(stopped.value),
    )


def test_what_a_worker_decodes_is_noted() -> None:
    pool = shared_buffers.SharedBufferPool()
    writers = [pool.writer() for _ in range(2)]
    builder = types.SimpleNamespace(source=Poisoned(), first=2, batch=8, rows=4)
    try:
        writers[0].note(12, 3)
        writers[1].note(-1, -1)  # reads, and decodes nothing
        open(os.path.join(pool.directory, f"{shared_buffers._NOTE}x"), "wb").close()  # was killed
        assert pool.current_records() == [(os.getpid(), 12, 3)]
    finally:
        pool.close()
    assert [record_batches.describe_batch(builder, 1, ended) for ended in ([], [(12, 3)])] == [
        "positions 10 to 13 of the stream",
        "positions 10 to 13 of the stream, while 'images/3.jpg' (position 12) was being decoded",
    ]


def is_alive(pid: int) -> bool:
    try:
        return (
            pathlib.Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
        )
    except OSError:
        return False


def blocks_interrupts(pid: int) -> bool:
    lines = pathlib.Path("/proc", str(pid), "status").read_text().splitlines()
    blocked = next(line.split()[1] for line in lines if line.startswith("SigBlk:"))
    return bool(int(blocked, 16) >> (signal.SIGINT - 1) & 1)


@pytest.mark.skipif(
    not os.path.isdir("/proc/self"), reason="reads the state of processes from /proc"
)
@pytest.mark.parametrize(
    "script",
    [
        pytest.param(ONE_PROCESS, id="process"),
        pytest.param(PIPELINE, id="pipeline", marks=pytest.mark.slow),
    ],
)
@pytest.mark.row("A1")
def test_workers_end_with_a_trainer_that_is_killed(tmp_path, script) -> None:
    path = tmp_path / "trainer.py"  # a worker imports the script of its trainer
    path.write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    trainer = subprocess.Popen(
        [sys.executable, str(path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert trainer.stdout is not None
        children = [int(pid) for pid in trainer.stdout.readline().split()]
        assert children
        assert all(map(is_alive, children))
        # of the pipeline: a terminal sends SIGINT to workers too
        assert script is ONE_PROCESS or all(map(blocks_interrupts, children))
    finally:
        os.kill(trainer.pid, signal.SIGKILL)
        trainer.wait()
    limit = time.monotonic() + 30
    while any(map(is_alive, children)) and time.monotonic() < limit:
        time.sleep(0.05)
    left = [pid for pid in children if is_alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left

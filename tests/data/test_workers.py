"""Worker processes end with their trainer."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

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
        workers = [int(pid) for pid in trainer.stdout.readline().split()]
        assert workers
        assert all(map(is_alive, workers))
        # of the pipeline: a terminal sends SIGINT to workers too
        assert script is ONE_PROCESS or all(map(blocks_interrupts, workers))
    finally:
        os.kill(trainer.pid, signal.SIGKILL)
        trainer.wait()
    limit = time.monotonic() + 30
    while any(map(is_alive, workers)) and time.monotonic() < limit:
        time.sleep(0.05)
    left = [pid for pid in workers if is_alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left

"""A dense run that is preempted, killed, and continued with other threads and workers: the same
metrics and the same bits as of one that was left alone."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from m3i_jax import main as command
from m3i_jax.training import checksums, loop, trainer
from tests.dense_toy import DETECT, DINO, INSTANCES, MASK2FORMER, SEGMENT, SHARED, flags

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 6
HEADS = {
    "mask_rcnn": DETECT,
    "dino": DINO,
    "instances": INSTANCES,
    "mask2former": SEGMENT | {k.replace("__", "."): v for k, v in MASK2FORMER.items()},
    "upernet": SEGMENT | {"dense.segment.head": "upernet", "dense.segment.divide_by": "all"},
}
SEGMENTERS = ("mask2former", "upernet")
OF_MASKS = tuple(f"{of}{kind}" for of in ("", "auxiliary_") for kind in ("class", "mask", "dice"))
LOSSES = {
    "mask_rcnn": ("rpn_cls", "rpn_loc", "cls", "box_reg", "mask"),
    "dino": tuple(f"{of}{kind}" for of in ("", "aux_", "enc_", "dn_") for kind in ("cls", "l1")),
    "instances": OF_MASKS,
    "mask2former": OF_MASKS,
    "upernet": ("pixels", "auxiliary"),
}
PARTS = {
    "mask_rcnn": "params/head/mask/",
    "dino": "params/head/decoder/layers/reading/",
    "instances": "params/head/decoder/queries",
    "mask2former": "params/head/decoder/queries",
    "upernet": "params/head/fuse/",
}
VALUES = SHARED | {
    "data.size": 40,
    "data.holdout": 0.0,
    "data.image_size": 32,
    "dense.geometry.scale": (0.5, 1.5),
    "model.encoder.patch_size": 8,
    "model.encoder.depth": 2,
    "model.encoder.heads": 2,
    "model.pool.heads": 2,
    "model.decoder.heads": 2,
    "model.text.heads": 2,
    "model.dtype": "float32",
    "train.steps": STEPS,
    "train.save_every": 3,
    "train.log_every": 1,
    "train.panel_every": 0,
    "train.keep": 3,
    "optim.warmup_steps": 1,
    "evaluate.batch_size": 8,
}


def arguments(run: pathlib.Path, head: str, **changes: object) -> list[str]:
    values = (
        VALUES | HEADS[head] | {key.replace("__", "."): value for key, value in changes.items()}
    )
    values.pop("data.classes")
    name = "mask2former" if head == "instances" else head
    recipe = f"configs/transfer/detect.py:head={name},masks={str(head != 'dino').lower()}"
    if head in SEGMENTERS:
        recipe = f"configs/transfer/segment.py:head={head}"
    task = "segment" if head in SEGMENTERS else "detect"
    return ["--config", recipe, "--workdir", str(run), *flags(task, values, name)]


def logged(run: pathlib.Path) -> list[dict]:
    """What was logged of the steps, without times."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]
    return [row for row in rows if "loss" in row]


def saved_arrays(run: pathlib.Path) -> dict[str, str]:
    """Checksums of all arrays of the last checkpoint: parameters, moments, running statistics."""
    found = checksums.read_checksums(run / "checkpoints" / str(STEPS))
    assert found
    return found["arrays"]


def same(run: pathlib.Path, other: pathlib.Path) -> bool:
    assert logged(run) == logged(other)
    return saved_arrays(run) == saved_arrays(other)


@pytest.fixture(scope="module")
def head(request: pytest.FixtureRequest) -> str:
    return request.param


def of_heads(*first: str) -> pytest.MarkDecorator:
    """A test with a run of every head; slow but for the first. Segmentation by Mask2Former takes
    the way of instances, and its data that of test_dense_modes.py, whose run is UperNet's."""
    some = [pytest.param(h, marks=() if h in first else pytest.mark.slow) for h in HEADS]
    return pytest.mark.parametrize("head", some, indirect=True, scope="module")


@pytest.fixture(scope="module", autouse=True)
def traced_once() -> Iterator[None]:
    """Trainers of equal settings share one step: what a run goes on with is its state and its
    data, and another process, which compiles again, is a slow test here and in test_main.py."""
    steps, plain = {}, trainer.Trainer.__init__

    def shared(self, config, mesh, *arguments, **more):
        plain(self, config, mesh, *arguments, **more)
        free = dataclasses.replace(self.config.data, threads=1, workers=0)
        key = dataclasses.replace(self.config, data=free), mesh, self.vocabulary
        self._step = steps.setdefault(str(key), self._step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "__init__", shared)
        yield


@pytest.fixture(scope="module")
def unbroken(head: str, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    run = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert command.main(arguments(run, head, data__threads=1)) == loop.DONE
    return run


@of_heads("mask_rcnn")
def test_a_detection_run_logs_its_losses(head: str, unbroken: pathlib.Path) -> None:
    rows = logged(unbroken)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    names = {f"loss/{name}" for name in LOSSES[head]}
    assert names | {"lr", "samples_seen"} <= set(rows[-1])
    assert any(name.startswith(("detect/", "segment/")) for name in rows[-1])
    assert rows[-1]["samples_seen"] == 8 * STEPS and rows[0]["loss"] != rows[-1]["loss"]
    paths = saved_arrays(unbroken)
    assert any(path.startswith(PARTS[head]) for path in paths), list(paths)[:5]


@of_heads("mask_rcnn")
@pytest.mark.row("D8")
def test_a_finished_run_is_reported(
    head: str,
    unbroken: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    before = logged(unbroken)
    assert command.main(arguments(unbroken, head, data__threads=1)) == loop.DONE
    assert "done" in capsys.readouterr().out and logged(unbroken) == before


# Instances have the data of Mask R-CNN, and no randomness that DINO has not: by position.
@of_heads("mask_rcnn")
@pytest.mark.row("A2", "A10")
def test_a_preempted_dense_run_goes_on_with_other_workers(
    head: str, unbroken: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    calls, whole = [], trainer.Trainer.step

    def counted(self, state, batch):
        calls.append(len(calls))
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return whole(self, state, batch)

    monkeypatch.setattr(trainer.Trainer, "step", counted)
    assert command.main(arguments(tmp_path, head, data__threads=1)) == loop.PREEMPTED
    assert len(calls) == 2 and [row["step"] for row in logged(tmp_path)] == [1, 2]
    workers = 0 if head == "dino" else 1  # its data are Mask R-CNN's, without masks
    again = arguments(tmp_path, head, data__threads=3, data__workers=workers)
    assert command.main(again) == loop.DONE
    assert len(calls) == STEPS and same(tmp_path, unbroken)


@of_heads()
@pytest.mark.row("A1")
def test_a_killed_dense_run_goes_on_from_its_last_save(
    head: str, unbroken: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process, with as many devices, is killed after the save of step 3."""
    process = subprocess.Popen(
        [sys.executable, "-m", "m3i_jax.main", *arguments(tmp_path, head)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "checkpoints" / "3").is_dir() and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait(timeout=60)
    monkeypatch.chdir(ROOT)
    assert command.main(arguments(tmp_path, head)) == loop.DONE
    assert same(tmp_path, unbroken)

"""The benchmarks at toy size: they run, compare equal computations, and mark missed targets and
figures that were not measured."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.bench import checkpoint, heap, race, report
from tests.bench.figures import Figure

ROOT = pathlib.Path(__file__).parent.parent


def test_benchmarks_are_listed_without_imports() -> None:
    rows = report.benchmarks()
    assert {
        "accelerator",
        "checkpoint",
        "collectives",
        "compiled",
        "dcnv3",
        "dense_peer",
        "flops",
        "input",
        "intern_image_peer",
        "torch_peer",
    } <= set(rows) and "figures" not in rows
    helpers = {"report", "heap", "m3i_torch", "contestants", "race", "intern_image_torch"}
    helpers |= {"dense_step_torch", "dense_heads_torch", "dense_torch", "upernet_torch"}
    helpers |= {"dense_queries", "dense_query_torch"}
    assert not helpers & set(rows)


def test_table_marks_met_missed_and_not_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {
        "flops": ([Figure("a", 1.0, 1.1), Figure("b", 1.0, 1.1, most=False)], False),
        "input": ([Figure("c", None, 0.5, note="needs x: the extra bench")], False),
    }
    monkeypatch.setattr(report, "run", lambda name, quick, seconds: figures[name])
    monkeypatch.setattr(sys, "argv", ["report", "flops", "input"])
    assert report.main() == 0
    out = capsys.readouterr().out
    assert "1 met, 1 missed, 1 not measured" in out and "at least 1.1" in out and "needs x" in out


def test_broken_benchmark_is_reported_and_a_missing_package_is_no_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ended(stderr: str) -> None:
        done = subprocess.CompletedProcess([], 1, "", stderr)
        monkeypatch.setattr(report.subprocess, "run", lambda *_, **__: done)

    ended("Traceback\nModuleNotFoundError: No module named 'timm'\n")
    figures, broken = report.run("torch_peer", True, 1)
    assert not broken and figures[0].verdict == "not measured" and "timm" in figures[0].note
    ended("Traceback\nValueError: no\n")
    figures, broken = report.run("torch_peer", True, 1)
    assert broken and figures[0].note == "ValueError: no"


def test_measured_process_has_the_heap_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    assert (
        heap.kept().items()
        >= {
            "MALLOC_ARENA_MAX": str(2 * (os.cpu_count() or 1)),
            "MALLOC_MMAP_MAX_": "0",
        }.items()
    )
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    assert heap.kept()["MALLOC_ARENA_MAX"] == "1"


@pytest.mark.parametrize("name", ["torch_peer", "intern_image_peer", "dense_peer"])
def test_race_without_the_peer_is_not_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The missing package is the reason, found before anything is compiled."""
    contest = importlib.import_module(f"tests.bench.{name}")
    monkeypatch.setattr(contest, "NEEDS", ("no_such_package",))
    monkeypatch.setattr(race, "Running", None)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        contest.figures(True)


def test_checkpoint_is_measured_with_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.os, "sync", lambda: None)  # of all that others wrote
    measured = checkpoint.measure(24, 1, None)
    assert measured["bytes"] > 24e6 and all(value > 0 for value in measured.values())
    assert measured["blocked"] <= measured["total"]


@pytest.mark.slow
def test_bench_sh_prints_one_table(tmp_path: pathlib.Path) -> None:
    environment = os.environ | {"M3I_VENV": sys.prefix, "M3I_INSTALL": "0"}
    names = ["flops", "checkpoint", "dcnv3", "input"]
    done = subprocess.run(
        ["bash", "launch/bench.sh", "--quick", *names],
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    for expected in ("over the formula", "loop blocked", "DCNv3", "augmenting", "toy sizes"):
        assert expected in done.stdout


@pytest.mark.slow
def test_the_accelerator_benchmark_runs_at_toy_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """With or without torch, which the row then names as missing."""
    from tests.bench import accelerator

    monkeypatch.setenv("M3I_PEAK_TFLOPS", "0.5")
    rows = {figure.what.split(",")[0]: figure for figure in accelerator.figures(True, batches=(4,))}
    assert 0 < rows["MFU of the step"].value < 1  # type: ignore[operator]
    assert (
        rows["peak of memory"].verdict == "not measured"
        and "does not count" in rows["peak of memory"].note
    )
    speed = next(figure for name, figure in rows.items() if name.startswith("speed over PyTorch"))
    assert speed.value or "extra bench" in speed.note


@pytest.mark.slow
def test_peer_computes_the_same_losses(tmp_path: pathlib.Path) -> None:
    """Losses of ten steps, which depend on gradients, optimizer, EMA and weighting."""
    pytest.importorskip("torch", reason="the extra bench")
    pytest.importorskip("timm", reason="the extra bench")
    from tests.bench import torch_peer

    ours = torch_peer.ours(tmp_path, "toy")
    theirs = torch_peer.theirs(tmp_path)
    pairs = np.asarray([(ours(), theirs()) for _ in range(10)])
    np.testing.assert_allclose(pairs[:, 0], pairs[:, 1], rtol=1e-4)
    assert abs(pairs[0] - pairs[-1]).min() > 0.05  # the loss has changed by training
    assert json.loads((tmp_path / "shape.json").read_text())["width"] == 48


@pytest.mark.slow
def test_internimage_peer_computes_the_same_loss(tmp_path: pathlib.Path) -> None:
    """The loss; the peer itself compares the gradients of all weights before it returns its
    step."""
    pytest.importorskip("torch", reason="the extra bench")
    from tests.bench import intern_image_peer

    ours = intern_image_peer.ours(tmp_path, "toy")
    theirs = intern_image_peer.theirs(tmp_path, "toy")
    assert ours() == pytest.approx(theirs(), rel=intern_image_peer.AGREE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["detect_toy", "segment_toy", "dino_toy", "mask2former_toy"])
def test_dense_peer_computes_the_same_losses(name: str, tmp_path: pathlib.Path) -> None:
    """Losses of two steps; the peer itself compares the gradients of all parameters. Of heads of
    queries it is the first, after which one may choose another point or token."""
    pytest.importorskip("torch", reason="the extra bench")
    pytest.importorskip("torchvision", reason="the extra bench")
    from tests.bench import dense_peer, dense_queries

    of_queries = name.startswith(dense_queries.HEADS)
    if of_queries:
        pytest.importorskip("transformers", reason="the extra bench")
    ours, theirs = dense_peer.ours(tmp_path, name), dense_peer.theirs(tmp_path, name)
    for _ in range(1 if of_queries else 2):
        assert ours() == pytest.approx(theirs(), rel=dense_peer.AGREE)


@pytest.mark.parametrize("name", ["upernet_32", "pyramid_32", "roi_32"])
def test_peer_of_dense_heads_computes_the_same_losses(name: str, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("torchvision", reason="the extra bench")
    from tests.bench import dense_heads_peer

    ours = dense_heads_peer.ours(tmp_path, name)
    np.testing.assert_allclose(ours(), dense_heads_peer.theirs(tmp_path, name)(), rtol=1e-5)


@pytest.mark.parametrize("name", ["sampling_64", "encoder_64"])
def test_peer_of_deformable_attention_computes_the_same_losses(
    name: str, tmp_path: pathlib.Path
) -> None:
    pytest.importorskip("transformers", reason="the extra bench")
    from tests.bench import deformable_peer

    ours = deformable_peer.ours(tmp_path, name)()
    assert ours == pytest.approx(deformable_peer.theirs(tmp_path, name)(), rel=1e-5)

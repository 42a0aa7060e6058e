"""The benchmarks at toy size: that they run, compare like with like, and tell what is missed and
what is not measured."""

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


def test_every_benchmark_is_found_without_importing_it() -> None:
    found = report.benchmarks()
    assert {
        "accelerator",
        "checkpoint",
        "collectives",
        "compiled",
        "dcnv3",
        "flops",
        "input",
        "intern_image_peer",
        "torch_peer",
    } <= set(found) and "figures" not in found
    assert not {"report", "heap", "m3i_torch", "contestants", "race", "intern_image_torch"} & set(
        found
    )


def test_the_table_tells_met_missed_and_not_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {
        "flops": ([Figure("a", 1.0, 1.1), Figure("b", 1.0, 1.1, most=False)], False),
        "input": ([Figure("c", None, 0.5, note="needs x: the extra bench")], False),
    }
    monkeypatch.setattr(report, "run", lambda name, quick, seconds: made[name])
    monkeypatch.setattr(sys, "argv", ["report", "flops", "input"])
    assert report.main() == 0
    out = capsys.readouterr().out
    assert "1 met, 1 missed, 1 not measured" in out and "at least 1.1" in out and "needs x" in out


def test_a_benchmark_that_breaks_is_told_and_one_that_lacks_a_package_is_no_failure(
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


def test_what_is_measured_has_the_heap_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("name", ["torch_peer", "intern_image_peer"])
def test_a_race_without_the_other_side_is_not_measured(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told by the package, and before ours has compiled anything."""
    contest = importlib.import_module(f"tests.bench.{name}")
    monkeypatch.setattr(contest, "NEEDS", ("no_such_package",))
    monkeypatch.setattr(race, "Running", None)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        contest.figures(True)


def test_a_checkpoint_is_measured_beside_its_parts() -> None:
    seen = checkpoint.measure(24, 1, None)
    assert seen["bytes"] > 24e6 and all(value > 0 for value in seen.values())
    assert seen["blocked"] <= seen["total"]


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
    for wanted in ("over the formula", "loop blocked", "DCNv3", "augmenting", "toy sizes"):
        assert wanted in done.stdout


@pytest.mark.slow
def test_the_accelerator_benchmark_runs_at_toy_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch or without: then its row says so."""
    from tests.bench import accelerator

    monkeypatch.setenv("M3I_PEAK_TFLOPS", "0.5")
    found = {
        figure.what.split(",")[0]: figure for figure in accelerator.figures(True, batches=(4,))
    }
    assert 0 < found["MFU of the step"].value < 1  # type: ignore[operator]
    assert (
        found["peak of memory"].verdict == "not measured"
        and "does not count" in found["peak of memory"].note
    )
    speed = next(figure for name, figure in found.items() if name.startswith("speed over PyTorch"))
    assert speed.value or "extra bench" in speed.note


@pytest.mark.slow
def test_the_peer_computes_the_same_thing(tmp_path: pathlib.Path) -> None:
    """Losses of ten steps, so that gradients, optimizer, average and weighting are in it, and their
    norms."""
    pytest.importorskip("torch", reason="the extra bench")
    pytest.importorskip("timm", reason="the extra bench")
    from tests.bench import torch_peer

    ours = torch_peer.ours(tmp_path, "toy")
    theirs = torch_peer.theirs(tmp_path)
    pairs = np.asarray([(ours(), theirs()) for _ in range(10)])
    np.testing.assert_allclose(pairs[:, 0], pairs[:, 1], rtol=1e-4)
    assert abs(pairs[0] - pairs[-1]).min() > 0.05  # it has learned something meanwhile
    assert json.loads((tmp_path / "shape.json").read_text())["width"] == 48


@pytest.mark.slow
def test_the_internimage_peer_computes_the_same_thing(tmp_path: pathlib.Path) -> None:
    """The loss here; the gradients of all weights are compared before their step is handed out."""
    pytest.importorskip("torch", reason="the extra bench")
    from tests.bench import intern_image_peer

    ours = intern_image_peer.ours(tmp_path, "toy")
    theirs = intern_image_peer.theirs(tmp_path, "toy")
    assert ours() == pytest.approx(theirs(), rel=intern_image_peer.AGREE)

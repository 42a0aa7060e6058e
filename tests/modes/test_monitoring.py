"""Monitoring of a run, and --mode=profile, at toy size."""

import dataclasses
import json
import os
import pathlib
import signal
import types
from typing import Any

import jax
import numpy as np
import pytest

from m3i_jax import interrupts, parallel, schema
from m3i_jax.config import config_to_text
from m3i_jax.modes import compile as compile_mode
from m3i_jax.modes import monitoring, profile, show, train
from m3i_jax.parallel.sharding import path_text
from m3i_jax.profiling import flops, traffic_model
from m3i_jax.training import goodput, loop, trainer
from m3i_jax.training.muon import is_matrix
from tests import toy
from tests.dense_toy import dense_settings


def made(**changes: Any) -> trainer.Trainer:
    config = toy.settings(**{"objective__forms": "supervised"} | changes)
    return trainer.Trainer(config, parallel.make_mesh((1, 1, 1), jax.devices()[:1]), toy.VOCABULARY)


def test_model_flops_are_those_of_the_plain_step() -> None:
    plain = made(model__encoder__depth=1)
    wanted = flops.count_flops(
        plain.trace, plain.template, trainer.abstract_batch(plain.config)
    ).total
    assert monitoring.model_flops(plain) == wanted
    again = made(model__encoder__depth=1, model__remat="full", train__microbatches=2)
    counted = flops.count_flops(
        again.trace, again.template, trainer.abstract_batch(again.config)
    ).total
    # rematerialisation adds no FLOPs of the model
    assert monitoring.model_flops(again) == wanted < counted


def test_the_update_of_muon_is_counted_by_itself() -> None:
    """Five steps for each matrix of a by b, a <= b: x x', its square, and their product with x."""
    muon, adamw = made(optim__rule="muon"), made()
    expected = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(muon.template.params):
        name = path_text(path)
        if is_matrix(name, leaf.shape):
            layers, rows, columns = leaf.shape
            parts = 3 if name.endswith("qkv/kernel") else 1
            small, large = sorted((rows, columns // parts))
            expected += layers * parts * 5 * (4 * small**2 * large + 2 * small**3)
    assert monitoring.update_flops(muon) == expected > 0
    assert monitoring.update_flops(adamw) == 0
    assert monitoring.model_flops(muon) - monitoring.model_flops(adamw) == expected


def test_traffic_and_times_are_of_the_mean_canvas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Canvases of 64 x 64 and 64 x 192 pixels: two thirds of the largest."""
    rule = schema.Geometry(rule="buckets", buckets=(64, 64, 64, 192))
    config = schema.Config(dense=schema.DensePrediction(geometry=rule))
    length = trainer.RunLength(steps_per_epoch=1, steps=86_400, warmup=0)
    run = types.SimpleNamespace(config=config, length=length)
    target = types.SimpleNamespace(chip="v5e", topology=types.SimpleNamespace(chips=1))
    times = {"compute_seconds": 2.0, "memory_seconds": 3.0, "network_seconds": 1.0}
    days = compile_mode._run_days(run, target, 197e12, times)  # type: ignore[arg-type]
    assert days["days"] == pytest.approx(2.0)
    assert days["days_at_mfu"] == pytest.approx(1 / config.report.mfu)
    slow = compile_mode._run_days(run, target, 1.0, times | {"network_seconds": 2.5})  # type: ignore[arg-type]
    assert slow["days"] == 2.5
    moved = traffic_model.StepTraffic(3.0, 5.0, 7.0)
    monkeypatch.setattr(traffic_model, "step_traffic", lambda *_, **__: moved)
    one = made()
    one.config = dataclasses.replace(one.config, dense=config.dense)
    assert show.estimated_traffic(one, 1.0)["tpu"] == pytest.approx((2.0, 5.0, 7.0))


@pytest.mark.slow
def test_the_mean_step_is_that_of_the_mean_canvas() -> None:
    """Of three canvases: FLOPs of convolutions are proportional to the pixels; those of heads of
    proposals, which do not depend on them, are the same in all."""
    changes = {
        "dense__geometry__rule": "buckets",
        "dense__geometry__buckets": (64, 64, 64, 128, 128, 128),
    }
    config = dense_settings("detect", **toy.INTERN, **changes)
    one = trainer.Trainer(config, parallel.make_mesh((1, 1, 1), jax.devices()[:1]), 0)
    counts = [monitoring.model_flops(one, side) for side in ((64, 64), (64, 128), (128, 128))]
    assert counts[2] == monitoring.model_flops(one) > counts[1] > counts[0]
    assert monitoring.mean_flops(one) == pytest.approx(np.mean(counts), rel=2e-3)


def test_mfu_needs_a_known_peak() -> None:
    lines: list[str] = []
    clock = monitoring.make_clock(made(), lines.append)
    assert clock.peak == 0 and not lines  # a CPU
    known = monitoring.make_clock(made(report__peak_tflops=2.0), lines.append)
    assert known.peak == 2e12 and known.flops == monitoring.model_flops(made()) and len(lines) == 1


def test_an_unknown_chip_needs_a_peak() -> None:
    lines: list[str] = []
    chip = types.SimpleNamespace(device_kind="new chip", platform="tpu")
    mesh = types.SimpleNamespace(devices=np.array([chip], object))
    trained = types.SimpleNamespace(config=toy.settings(), mesh=mesh)
    assert monitoring.make_clock(trained, lines.append).peak == 0
    assert len(lines) == 1 and "'new chip'" in lines[0] and "report.peak_tflops" in lines[0]


def test_compilations_are_reported_to_the_clock() -> None:
    clock = goodput.GoodputClock()
    with monitoring.count_compilations(clock), clock.phase("step"):
        jax.jit(lambda x: x * 3 + len(str(clock)))(1.0).block_until_ready()
    before = clock.total()["compile"]
    assert before > 0
    jax.jit(lambda x: x * 5 + len(str(clock)))(1.0).block_until_ready()
    assert clock.total()["compile"] == before


def test_a_signal_requests_a_trace_and_the_handler_is_restored(tmp_path: pathlib.Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    lines: list[str] = []
    with monitoring.monitored(
        toy.settings(report__profile_steps=2), tmp_path, goodput.GoodputClock(), lines.append
    ) as tracer:
        os.kill(os.getpid(), signal.SIGUSR1)
        for step in range(1, 5):
            tracer(step, None)
    assert lines[0] == "tracing steps 2 to 3" and signal.getsignal(signal.SIGUSR1) == before
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_trace_that_is_requested_before_the_loop_is_of_its_first_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    lines: list[str] = []
    try:
        interrupts.note_trace_requests()
        os.kill(os.getpid(), signal.SIGUSR1)
        settings, clock = toy.settings(report__profile_steps=2), goodput.GoodputClock()
        with monitoring.monitored(settings, tmp_path, clock, lines.append) as tracer:
            monkeypatch.setattr(tracer, "_begin", lambda step: lines.append(f"begins at {step}"))
            tracer(1, None)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert lines == ["begins at 1"] and not interrupts.take_trace_request()


def test_hosts_do_not_mix_their_traces(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """In one folder, jax refuses the second, and their operations would add up."""
    monkeypatch.setattr(monitoring.parallel, "host_names", lambda: 2)
    config, lines = toy.settings(report__profile_steps=1), list[str]()
    for host in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        clock = goodput.GoodputClock()
        with monitoring.monitored(config, tmp_path, clock, lines.append) as tracer:
            tracer.ask()
            for step in (1, 2):
                tracer(step, None)
    found = sorted((tmp_path / "profile").rglob("*.xplane.pb"))
    places = [path.relative_to(tmp_path).parts[:2] for path in found]
    assert places == [("profile", "host-0"), ("profile", "host-1")], lines


def test_the_compilation_cache_respects_the_settings_of_jax(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    set_ = jax.config.jax_compilation_cache_dir
    assert monitoring.enable_compilation_cache(tmp_path) == (set_ or "")  # as the tests are run
    changed: dict[str, str] = {}
    settings = type(
        "Settings", (), {"jax_compilation_cache_dir": None, "jax_enable_compilation_cache": True}
    )()
    settings.update = changed.__setitem__
    monkeypatch.setattr(monitoring.jax, "config", settings)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = monitoring.enable_compilation_cache(tmp_path)
    assert (
        pathlib.Path(directory).parent == tmp_path / "cache" / "m3i_jax"
        and pathlib.Path(directory).is_dir()
    )
    assert changed == {"jax_compilation_cache_dir": directory}
    # several hosts share one directory
    monkeypatch.setattr(monitoring.parallel, "host_names", lambda: 2)
    assert monitoring.enable_compilation_cache(tmp_path) == str(tmp_path / "compiled")
    settings.jax_enable_compilation_cache = False
    assert monitoring.enable_compilation_cache(tmp_path) == ""


TINY = {
    "objective__forms": "supervised", "data__size": 64, "data__captions": "no",
    "data__classes": -1, "data__holdout": 0.25,
    "model__encoder__depth": 1, "evaluate__knn": False, "train__panel_every": 0,
}  # fmt: skip


def test_profile_writes_only_a_trace(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = toy.settings(**TINY, report__profile_steps=2, report__peak_tflops=0.1)
    assert profile.run(config, workdir=str(tmp_path)) == 0
    out = capfd.readouterr().out
    assert (
        "tracing steps 4 to 5" in out
        and "ms a step" in out
        and "goodput" in out
        and "x cpu of 0.1 TFLOP/s" in out
    )
    assert [path.name for path in (tmp_path / "profile").rglob("operations.txt")] == [
        "operations.txt"
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"profile", "run.lock"}


@pytest.mark.slow
def test_a_run_and_its_restart_account_for_all_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Preempted after step 3 and resumed: the phases of both processes sum up to all time."""
    config = toy.settings(**TINY, train__steps=5, train__save_every=2, train__log_every=1)
    preempt = lambda step: signal.raise_signal(signal.SIGTERM) if step == 3 else None
    monkeypatch.setattr(
        monitoring.trace.Tracer, "__call__", lambda self, step, metrics: preempt(step)
    )
    assert train.run(config, workdir=str(tmp_path), allow_changes=False) == loop.PREEMPTED
    out = capfd.readouterr().out
    assert "mfu" not in out.lower() and out.count("goodput") == 1
    assert out.count("compiling the train step ...") == 1
    log = tmp_path / "metrics.jsonl"
    last = json.loads(log.read_text().splitlines()[-1])
    assert last["step"] == 3 and sum(
        v for k, v in last.items() if k.startswith("perf/seconds/")
    ) == pytest.approx(last["perf/wall_seconds"])
    assert (
        last["perf/seconds/compile"] > 0 and "perf/mfu" not in last and "perf/restarts" not in last
    )
    monkeypatch.undo()
    assert train.run(config, workdir=str(tmp_path), allow_changes=False) == loop.DONE
    assert "started 2 times" in capfd.readouterr().out
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]
    after = lines[-1]
    assert after["perf/restarts"] == 1 and after["perf/seconds/restore"] > 0
    # the time of the loop after the save
    assert after.get("perf/seconds/lost", 0.0) < 0.1 * last["perf/seconds/step"]
    assert (
        after["perf/seconds/step"] > last["perf/seconds/step"]
        and after["perf/wall_seconds"] > last["perf/wall_seconds"]
    )


def test_heads_compute_nothing_again_either() -> None:
    """Mask2Former is a head of both tasks, with settings of each."""
    masked = schema.Mask2Former(remat=True)
    dense = schema.DensePrediction(
        detect=schema.Detect(dino=schema.Dino(remat=True), mask2former=masked),
        segment=schema.Segment(mask2former=masked),
    )
    plain = monitoring.without_remat(schema.Config(dense=dense))
    assert not [
        line
        for line in config_to_text(plain).splitlines()
        if ".remat " in line and not line.endswith(("False", "'none'"))
    ]

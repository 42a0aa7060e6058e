"""Wall time, lost steps and starts of a run that is interrupted again and again."""

import json
import pathlib
import signal

import pytest

from m3i_jax.modes import earlier_log, monitoring, train
from m3i_jax.modes.earlier_log import EarlierLog
from m3i_jax.reporting import run_log, writers
from m3i_jax.training import goodput, loop
from tests import toy


def logged(log: pathlib.Path) -> EarlierLog:
    return EarlierLog.of(run_log.read_log_lines(log))


def test_seconds_are_read_from_the_last_line_with_them(tmp_path: pathlib.Path) -> None:
    log = tmp_path / "metrics.jsonl"
    assert logged(log) == EarlierLog()
    lines = [
        {"step": 1, "perf/seconds/step": 3.0, "perf/restarts": 2},
        {"step": 2, "perf/seconds/step": 5.0, "perf/goodput": 1.0},
        {"step": 2, "eval/x": 1},
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "perf/sec')
    assert logged(log) == EarlierLog({"step": 5.0}, 2, frozenset({2}))


def test_three_starts_from_one_checkpoint_lose_no_second(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """Killed at step 15 and, before its first line, again: both from the checkpoint of step 10."""
    now, log = [0.0], tmp_path / "metrics.jsonl"
    monkeypatch.setattr(goodput.time, "monotonic", lambda: now[0])
    position: dict = {}

    def start(seconds_of_start: float, steps: int, restored: bool = True) -> goodput.GoodputClock:
        """A start of the run, in the order of `train`; a step takes two seconds."""
        earlier = logged(log)
        begin = 10 if position else 0
        writers.truncate_log(log, begin)
        lines = writers.JsonLines(log)
        resumed = earlier.resumed(position) if position else {}
        clock = goodput.GoodputClock(**resumed)
        if position:
            lines.write(begin, earlier_log.kept_metrics(**resumed))
            now[0] += seconds_of_start
            if not restored:
                lines.close()
                return clock
            lines.write(begin, clock.started())
        else:
            now[0] += seconds_of_start
        clock.turn("step")
        for step in range(begin + 1, begin + steps + 1):
            now[0] += 2.0
            lines.write(step, {"loss": 1.0, **clock.started()})
            if step == 10:
                position.update(seconds=clock.total(), restarts=clock.restarts)
        lines.close()
        return clock

    start(seconds_of_start=1.0, steps=15)
    start(seconds_of_start=0.0, steps=0)
    start(seconds_of_start=0.0, steps=0, restored=False)  # no start: its state was not there yet
    clock = start(seconds_of_start=4.0, steps=5)
    values, line = clock.summary()
    assert {name: s for name, s in clock.total().items() if s} == {
        "start": 1.0 + 4.0,
        "step": 15 * 2.0,
        "lost": 5 * 2.0,
    }
    assert values["perf/wall_seconds"] == now[0] == 45.0
    assert values["perf/goodput"] == 30.0 / 45.0
    assert values["perf/restarts"] == 2 and line.endswith("; started 3 times")
    steps = [line["step"] for line in run_log.read_log_lines(log)]
    assert steps == [*range(1, 11), *[10] * 5, *range(11, 16)]


def test_a_long_log_has_no_report_at_a_preemption(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    log = tmp_path / "metrics.jsonl"
    assert not earlier_log.is_long(log)
    log.write_text("12345")
    assert not earlier_log.is_long(log)
    monkeypatch.setattr(earlier_log, "LONG", 4)
    assert earlier_log.is_long(log)


@pytest.mark.slow
def test_a_real_run_counts_its_starts_between_two_checkpoints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """Stopped by an error of the step after the save, twice."""
    config = toy.settings(
        objective__forms="supervised", data__size=64, data__captions="no", data__classes=-1,
        data__holdout=0.25, model__encoder__depth=1, evaluate__knn=False, train__panel_every=0,
        train__steps=6, train__save_every=2, train__log_every=1,
    )  # fmt: skip

    def stop(self, step, metrics) -> None:
        if step == 4:
            raise SystemExit(signal.SIGKILL)

    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(monitoring.trace.Tracer, "__call__", stop)
            train.run(config, workdir=str(tmp_path), allow_changes=False)
    assert train.run(config, workdir=str(tmp_path), allow_changes=False) == loop.DONE
    lines = run_log.read_log_lines(tmp_path / train.LOG)
    assert lines[-1]["perf/restarts"] == 2
    walls = [sum(v for k, v in line.items() if k.startswith(goodput.PREFIX)) for line in lines]
    seconds = [wall for wall in walls if wall]
    assert seconds == sorted(seconds) and lines[-1]["perf/wall_seconds"] == seconds[-1]

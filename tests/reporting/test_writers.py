"""Every writer writes all values; none of them can stop a run; a resumed log has no line twice."""

import dataclasses
import io
import json
import math
import os
import stat
import sys
import threading
import types

import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.reporting import writers

VALUES = {
    "loss": 1.25,
    "loss/ssp": 0.75,
    "loss/sp": 0.5,
    "balance/lambda": 1.0,
    "perf/images_per_sec": 200.0,
    "perf/step_seconds": 0.5,
    "perf/input_wait": 0.031,
    "samples_seen": 10_000,
}


def settings(**report) -> schema.Config:
    config = schema.Config(report=schema.Report(**report))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=100))


def open_writers(tmp_path, *, resume_at=0, main=True, **report) -> writers.Writers:
    return writers.open_writers(
        settings(**report), tmp_path, resume_at=resume_at, total=1000, main=main
    )


def lines(path) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_a_json_line_and_a_console_line_a_step(tmp_path, capsys):
    writer = open_writers(tmp_path)
    writer.write(100, VALUES)
    # before it is closed: flushed at once
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 100, **VALUES}]
    shown = capsys.readouterr().out
    for words in (
        "100/1000",
        "10%",
        "loss 1.2500",
        "ssp 0.7500",
        "sp 0.5000",
        "lambda 1",
        "img/s 200.0",
        "wait 3%",
        "left 7m30s",
    ):
        assert words in shown
    assert shown.count("\n") == 1
    writer.write(100, VALUES | {"loss": 4.0, "balance/lambda": 6.5, "loss/equal_weights": 1.25})
    shown = capsys.readouterr().out
    assert "loss at lambda 1: 1.2500  ssp 0.7500" in shown and "lambda 6.5" in shown
    writer.write(100, {"eval/knn/top1": 0.75})
    assert "evaluation  knn/top1 0.7500" in capsys.readouterr().out
    writer.write(101, {"perf/goodput": 0.5})
    assert capsys.readouterr().out == ""  # neither losses nor an evaluation: nothing for a person
    writer.close()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [100, 100, 100, 101]


def test_numbers_of_every_library_are_valid_json(tmp_path):
    values = {
        "a": np.float32(0.5),
        "b": np.int64(3),
        "c": math.nan,
        "d": -np.float32(np.inf),
        "e": np.array(2.0),
        "f": 2**60,
    }
    writer = open_writers(tmp_path)
    writer.write(np.int32(1), values)
    assert writer.dropped["metrics.jsonl"] == 0
    line = lines(tmp_path / "metrics.jsonl")[0]
    assert line == {"step": 1, "a": 0.5, "b": 3.0, "c": "nan", "d": "-inf", "e": 2.0, "f": 2**60}
    assert math.isnan(float(line["c"])) and float(line["d"]) == -math.inf


class Broken:
    def __init__(self, works_at=()):
        self.works_at, self.got = works_at, {}

    def write(self, step, values):
        if step not in self.works_at:
            raise OSError("no space left")
        self.got[step] = values

    def close(self):
        raise RuntimeError("already gone")


def test_a_failing_sink_is_counted_and_logged_and_stops_nothing():
    logged: list[str] = []
    good, bad = Broken(works_at=range(100)), Broken(works_at=[3])
    writer = writers.Writers({"bad": bad, "good": good}, logged.append)
    for step in range(1, 6):
        writer.write(step, {"loss": 1.0})
    assert writer.dropped == {"bad": 4, "good": 0}
    assert good.got[1] == {"loss": 1.0}
    assert bad.got[3] == good.got[3] == {"loss": 1.0, "report/dropped/bad": 2}
    assert good.got[5]["report/dropped/bad"] == 3
    assert logged == ["warning: bad lost 1 line(s): OSError: no space left"]  # not at every step
    writer.close()
    assert len(logged) == 3


def test_a_mark_brings_all_lines_to_a_bucket(tmp_path, monkeypatch):
    """A mounted bucket gets what is written to a file when it is synced and closed. A machine that
    is taken away would else lose all lines since the start."""
    writer, done = writers.JsonLines(tmp_path / "metrics.jsonl"), []
    for name in ("fsync", "close"):
        before = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda file, name=name, before=before: (done.append(name), before(file))
        )
    writer.write(1, VALUES)
    marks = [writer.mark()]
    assert done[:2] == ["fsync", "close"]
    writer.write(2, VALUES)
    marks.append(writer.mark())
    assert marks[1][0] == (tmp_path / "metrics.jsonl").stat().st_size == 2 * marks[0][0]
    monkeypatch.setattr(os, "fsync", lambda file: os.pread(-1, 1, 0))  # an OSError
    writer.write(3, VALUES)
    writer.close()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_full_disk_is_survived(tmp_path, capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    writer = writers.Writers({"metrics.jsonl": writers.JsonLines("/dev/full")}, writers.log_line)
    writer.write(1, VALUES)
    writer.close()
    assert writer.dropped == {"metrics.jsonl": 1}
    assert "lost 1 line(s): OSError" in capsys.readouterr().out


def test_a_closed_console_is_survived(monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    writers.log_line("into the void")
    writers.log_line("again")


def test_resume_cuts_later_and_torn_lines_and_keeps_the_rest_byte_by_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 0, "eval/knn/top1": 0.1}\n{"loss": NaN, "step": 10}\n{"step":20}\n'
    path.write_bytes(whole + b'{"step": 30}\nnonsense\n{"no": "step"}\n[]\n{"step": 20, "loss"')
    path.chmod(0o640)
    assert writers.truncate_log(path, 20) == 5
    assert path.read_bytes() == whole
    before = path.stat()
    assert writers.truncate_log(path, 20) == 0  # nothing to cut: the file is left alone
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_ino == before.st_ino
    assert writers.truncate_log(path, 5) == 2 and lines(path) == [{"step": 0, "eval/knn/top1": 0.1}]
    assert writers.truncate_log(path, -1) == 1 and path.read_bytes() == b""
    assert writers.truncate_log(tmp_path / "absent", 3) == 0 and not (tmp_path / "absent").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resume_leaves_the_log_as_readable_as_a_new_file(tmp_path):
    path, new = tmp_path / "metrics.jsonl", tmp_path / "new"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    new.touch()
    writers.truncate_log(path, 1)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(new.stat().st_mode)


def test_resume_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writers.os, "fsync", fail)
    with pytest.raises(UserError, match="No space left on device"):
        writers.truncate_log(path, 1)
    assert len(lines(path)) == 2 and [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_goes_on_has_no_line_twice(tmp_path, capsys):
    writer = open_writers(tmp_path)
    for step in (10, 20, 30):
        writer.write(step, VALUES)
    writer.close()
    writer = open_writers(tmp_path, resume_at=20)
    assert "removed 1 lines after step 20" in capsys.readouterr().out
    writer.write(30, VALUES)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [10, 20, 30]


def test_other_processes_write_nothing(tmp_path, capsys):
    writer = open_writers(tmp_path, main=False, tensorboard=True, wandb="project")
    writer.write(1, VALUES)
    writer.log("not here")
    writer.close()
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "key, value, module", [("tensorboard", True, "tensorboardX"), ("wandb", "project", "wandb")]
)
def test_a_missing_package_names_its_extra(tmp_path, monkeypatch, key, value, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        UserError, match=rf"config\.report\.{key}.*{module}.*pip install 'm3i-jax\[{key}\]'"
    ):
        open_writers(tmp_path, **{key: value})


def test_wandb_goes_on_in_the_run_of_the_directory(tmp_path, monkeypatch):
    started: list[dict] = []
    logged: list[tuple[int, dict]] = []

    def init(**arguments):
        started.append(arguments)
        return types.SimpleNamespace(
            log=lambda values, step: logged.append((step, values)),
            finish=lambda: logged.append((-1, {})),
        )

    fake = types.ModuleType("wandb")
    fake.init = init  # type: ignore[attr-defined]
    fake.Settings = dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for place in ("a/run", "a/run", "b/run", "lr:0.1%?"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        writer = open_writers(tmp_path / place, wandb="project")
        writer.write(5, {"loss": 1.0})
        writer.close()
    first, again, elsewhere, odd = started
    assert (
        first["project"] == "project"
        and first["resume"] == "allow"
        and first["config"]["train"]["batch_size"] == 100
    )
    assert first["id"] == again["id"] != elsewhere["id"] and first["id"].startswith("run-")
    assert not set(odd["id"]) & set("/\\#?%:")  # which W&B refuses in an id
    assert logged[:2] == [(5, {"loss": 1.0}), (-1, {})]
    # the metadata would have the command line, and so the credentials in paths
    assert first["settings"] == {"x_disable_meta": True}
    (tmp_path / "a/run/wandb.id").write_text("")  # of a version that was killed while it wrote it
    open_writers(tmp_path / "a/run", wandb="project").close()
    assert started[-1]["id"].startswith("run-") and started[-1]["id"] != first["id"]
    assert (tmp_path / "a/run/wandb.id").read_text().strip() == started[-1]["id"]


def test_wandb_that_does_not_start_or_end_stops_no_run(tmp_path, monkeypatch, capsys):
    class UsageError(Exception):
        pass

    class CommError(Exception):
        pass

    class Service(types.ModuleType):
        Settings = dict

        def init(self, **_):
            raise self.failure

    service = Service("wandb")
    monkeypatch.setitem(sys.modules, "wandb", service)
    service.failure = UsageError("No API key configured.\nUse `wandb login`")
    with pytest.raises(UserError, match=r"config\.report\.wandb: .*No API key configured. Use"):
        open_writers(tmp_path, wandb="project")
    service.failure = CommError("cannot reach https://me:hunter2hunter2@api")
    writer = open_writers(tmp_path, wandb="project")
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert "warning: W&B does not start (CommError: cannot reach" in capsys.readouterr().out
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]
    # at the end
    monkeypatch.setattr(writers, "FINISH", -0.9)
    released = threading.Event()
    service.init = lambda **_: types.SimpleNamespace(finish=released.wait)  # type: ignore
    open_writers(tmp_path, wandb="project").close()
    assert "_Wandb did not close: its uploads took longer" in capsys.readouterr().out
    released.set()


def test_a_file_that_cannot_be_drawn_loses_only_itself(capsys):
    writer = writers.Writers({}, writers.log_line)
    writer.attempt("pictures", lambda: round(math.nan))
    assert writer.dropped == {"pictures": 1}
    assert (
        "pictures lost 1 file(s): ValueError: cannot convert float NaN" in capsys.readouterr().out
    )


def test_tensorboard_gets_scalars_and_a_purge_on_resume(tmp_path, monkeypatch):
    made: list[tuple] = []

    class SummaryWriter:
        def __init__(self, directory, purge_step, max_queue):
            assert max_queue > 1000  # the values of a line do not wait
            made.append((directory, purge_step))

        def add_scalar(self, name, value, step):
            made.append((name, value, step))

        def flush(self):
            made.append(("flush",))

        def close(self):
            made.append(("close",))

    fake = types.ModuleType("tensorboardX")
    fake.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    writer = open_writers(tmp_path, resume_at=40, tensorboard=True)
    writer.write(50, {"loss": 1.0})
    writer.close()
    assert made == [(str(tmp_path), 41), ("loss", 1.0, 50), ("flush",), ("close",)]


def test_a_full_disk_does_not_block_tensorboard(tmp_path, monkeypatch, capsys):
    """The thread of tensorboardX ends on a full disk, and nothing empties its queue any more."""
    tensorboard = pytest.importorskip("tensorboardX")
    fails = [False]
    events = tensorboard.event_file_writer.EventsWriter
    original = events.write_event

    def write_event(self, event):
        if fails[0]:
            raise OSError(28, "No space left on device")
        return original(self, event)

    monkeypatch.setattr(events, "write_event", write_event)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    monkeypatch.setattr(writers, "QUEUE", 5)
    writer = open_writers(tmp_path, tensorboard=True)
    sink = writer._sinks["tensorboard"]
    fails[0] = True
    writer.write(1, {"loss": 1.0})
    sink._thread().join(10)
    for step in range(2, 12):  # more values than the queue has places
        writer.write(step, {"loss": 1.0})
    lost = writer.dropped["tensorboard"]  # the thread may end before the first line is flushed
    assert lost in (10, 11) and set(writer.dropped.values()) == {0, lost}
    assert "tensorboard lost 1 line(s): OSError: the thread of" in capsys.readouterr().out
    fails[0] = False  # there is room again
    monkeypatch.setattr(writers, "REOPEN", 0.0)
    writer.write(12, {"loss/again": 1.0})
    assert writer.dropped["tensorboard"] == lost
    writer.close()
    assert any(b"loss/again" in path.read_bytes() for path in tmp_path.glob("events.*"))
    assert "did not close" not in capsys.readouterr().out


def test_tensorboard_for_real(tmp_path):
    pytest.importorskip("tensorboardX")
    writer = open_writers(tmp_path, tensorboard=True)
    writer.write(1, VALUES | {"loss": math.nan})
    writer.close()
    assert writer.dropped["tensorboard"] == 0
    (events,) = tmp_path.glob("events.*")
    assert b"balance/lambda" in events.read_bytes()


@pytest.mark.parametrize(
    "seconds, text", [(0, "0s"), (59.4, "59s"), (60, "1m00s"), (3599.6, "1h00m"), (86400, "1d00h")]
)
def test_duration(seconds, text):
    assert writers.format_duration(seconds) == text

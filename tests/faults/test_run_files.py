"""Row B12: every file of a run, damaged in every way, before every mode that reads it. The result
equals that of the undamaged run, or the mode prints one line and exits with 2, or logs a warning
that names the file; never a traceback, and never another result without a message.

The short version opens a run up to the point where it would train (data, tokenizer, checkpoint,
position, settings, log) and writes its report; the long one trains, evaluates and exports."""

import contextlib
import fnmatch
import io
import json
import logging
import os
import pathlib
import shutil
import signal
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from m3i_jax import config as configuration
from m3i_jax import main as command
from m3i_jax import run_files
from m3i_jax.errors import UserError
from m3i_jax.modes import report, train
from m3i_jax.modes import setup as jobs
from m3i_jax.reporting import writers
from m3i_jax.run_files import FILES, RunFile, write_text_atomic
from m3i_jax.training import checkpoint_dir
from m3i_jax.training.checkpoint import Checkpoints
from tests import toy
from tests.faults.hostile import ROOT
from tests.faults.test_checkpoints import flip
from tests.test_main import TINY

SMALL = {
    "data__size": 40,
    "data__classes": -1,
    "data__captions": "auto",
    "data__holdout": 0.3,
    "train__batch_size": 16,
}
FORMS = ("sim", "weakly_supervised")


def cut(path: pathlib.Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_in_the_middle(path: pathlib.Path) -> None:
    flip(path, 8 * (path.stat().st_size // 2))


def replace_by_directory(path: pathlib.Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_link(path: pathlib.Path) -> None:
    """A link to a file outside of the run, with one byte changed."""
    elsewhere = path.with_name(f"{path.name}.elsewhere")
    path.rename(elsewhere)
    flip_in_the_middle(elsewhere)
    path.symlink_to(elsewhere)


def replace_by_fifo(path: pathlib.Path) -> None:
    path.unlink()
    os.mkfifo(path)


def nest(path: pathlib.Path) -> None:
    """Nested too deep for a parser, with a valid checksum where a file ends in one."""
    line = b"[" * 100_000 + b"]" * 100_000
    content = f"{line.decode()}\n{run_files.zlib.crc32(line):08x}\n".encode()
    path.write_bytes(
        content if path.name == "digests.json" or path.parent.name == "digests" else line
    )


def of_wrong_structure(path: pathlib.Path) -> None:
    path.write_bytes(run_files.seal_note([{"files": 3, "digest": ["x"]}, None]))


def no_text(path: pathlib.Path) -> None:
    path.write_bytes(b"\xff\xfe" + path.read_bytes())


FAULTS: dict[str, Callable[[pathlib.Path], None]] = {
    "flipped": flip_in_the_middle,
    "cut": cut,
    "deleted": pathlib.Path.unlink,
    "a directory": replace_by_directory,
    "a link": replace_by_link,
    "a pipe": replace_by_fifo,
    "nested": nest,
    "wrong structure": of_wrong_structure,
    "no text": no_text,
}


class Reached(Exception):
    """Raised where a run would start to train, with its inputs."""


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise instead of waiting forever for the other end of a pipe."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"still there after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def values(step: int) -> dict[str, float]:
    return {"loss": 1.0 / step, "phase/step": float(step)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The files of a run of 8 steps that saved at 4 and 8, written by its own code without the
    training."""
    place = tmp_path_factory.mktemp("whole") / "run"
    job = jobs.open_setup(toy.settings(**SMALL), str(place), trains=[FORMS])
    with jobs.lock_workdir(place):
        train.write_settings(job)
    writer = writers.open_writers(job.config, place, resume_at=0, total=8)
    checkpoints = Checkpoints(place / "checkpoints", 2)
    for step in range(1, 9):
        writer.write(step, values(step))
        if step % 4 == 0:
            position = {
                "samples_seen": 16 * step,
                "fingerprint": job.fingerprint,
                "files": {**writer.mark(), **train.tokenizer_of(place)},
            }
            state = {
                "step": jnp.int32(step),
                "w": jnp.asarray(np.random.default_rng(step).normal(size=64), jnp.float32),
            }
            checkpoints.save(step, state, position)
            checkpoints.wait()
    checkpoints.close()
    writer.close()
    about = {"checkpoint": "8", "encoder": "online", "results": {"knn": {"eval/knn/top1": 0.5}}}
    write_text_atomic(place / "eval.json", json.dumps(about), noted=True)
    (place / "panels").mkdir()
    Image.new("RGB", (20, 20)).save(place / "panels" / "00000008.png")
    return place


@pytest.mark.fast
@pytest.mark.row("E3")
@pytest.mark.parametrize(
    ("steps", "fits", "words"),
    [
        (9, False, r"checkpoint 8: does not fit this configuration"),
        (8, True, r"^restored$"),
        (10, True, r"^evaluate\.features$"),
        (
            7,
            True,
            r"config\.train\.steps=7: the run has done 8 steps already, more than 7; set more, or",
        ),
    ],
)
def test_a_refused_change_leaves_the_settings_of_the_run(
    run: pathlib.Path, monkeypatch: pytest.MonkeyPatch, steps: int, fits: bool, words: str
) -> None:
    """What --allow-changes writes would be read with the old weights, if the state does not fit, an
    evaluator refuses its settings or no step is trained."""

    def stop(*_: object) -> None:
        raise UserError("restored")

    def refused(*_: object) -> None:
        raise UserError("evaluate.features")

    changes = {"data__augment__mean": "(0.5,0.5,0.5)", "train__steps": steps}
    job = jobs.open_setup(toy.settings(**SMALL | changes), str(run), trains=[FORMS])
    clock = types.SimpleNamespace(phase=lambda name: contextlib.nullcontext(), compiled=print)
    length = types.SimpleNamespace(steps=steps, warmup=0)
    other = types.SimpleNamespace(
        check_state_fits=lambda: None, length=length, template={}, shardings={}
    )
    monkeypatch.setattr(jobs, "Trainer", lambda *_: other)
    if fits:
        monkeypatch.setattr(Checkpoints, "restore", lambda *_: {})
    data = types.SimpleNamespace(go_on=lambda counts: None)
    monkeypatch.setattr(jobs.Setup, "batches", lambda *_: data)
    monkeypatch.setattr(train.loop, "CollapseAlarm", stop)  # first after settings are written
    monkeypatch.setattr(train.evaluators, "make_evaluators", refused if steps == 10 else print)
    monkeypatch.setattr(train, "_log_start", lambda *_: None)
    monkeypatch.setattr(train.monitoring, "make_clock", lambda *_, **__: clock)
    monkeypatch.setattr(train.monitoring, "monitored", lambda *_: contextlib.nullcontext())
    with put_back(run), jobs.lock_workdir(run):
        before = (run / "config.txt").read_bytes(), (run / "data.txt").read_bytes()
        with pytest.raises(UserError, match=words):
            train.pretrain(job, True)
        assert before == ((run / "config.txt").read_bytes(), (run / "data.txt").read_bytes())


def opened(place: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The inputs of a resumed run: settings, position, ids of a caption, steps of its log."""
    job = jobs.open_setup(toy.settings(**SMALL), str(place), trains=[FORMS])
    stand_in = types.SimpleNamespace(
        check_state_fits=lambda: None,
        length=types.SimpleNamespace(steps=8, warmup=0),
        template=types.SimpleNamespace(params={}),
    )

    def stop(*_: object, **more: Any) -> None:
        raise Reached

    with monkeypatch.context() as patch, jobs.lock_workdir(place):
        patch.setattr(train, "Trainer", lambda *_: stand_in)
        patch.setattr(train.m3i, "parameter_table", lambda params: [])
        patch.setattr(train.monitoring, "make_clock", stop)
        with contextlib.suppress(Reached):
            train.pretrain(job, False)
    assert job.tokenizer is not None
    position = Checkpoints(place / "checkpoints", 2)
    try:
        newest = position.latest()
        assert newest is not None
        read = position.position(newest)
    finally:
        position.close()
    lines = run_files.read_log(place / "metrics.jsonl", [])[0]
    return (
        job.text,
        read["samples_seen"],
        job.tokenizer.ids("a large red square"),
        [line["step"] for line in lines],
    )


def reported(place: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return report.write_report(
        configuration.resolve(configuration.load_from_workdir(str(place), "--workdir")), place
    ).read_text()


MODES: dict[str, Callable[[pathlib.Path, pytest.MonkeyPatch], Any]] = {
    "train": opened,
    "report": reported,
}


def at(place: pathlib.Path, file: RunFile) -> list[pathlib.Path]:
    """The files of a kind in a run; of checkpoints those of the newest."""
    newest = file.name.replace(
        "checkpoints/*", f"checkpoints/{max(checkpoint_dir.complete_steps(place / 'checkpoints'))}"
    )
    return sorted(
        path
        for path in place.rglob("*")
        if fnmatch.fnmatch(path.relative_to(place).as_posix(), newest)
        and path.is_file()
        and path.stat().st_size
    )


def trial(
    whole: pathlib.Path,
    victim: pathlib.Path,
    fault: str,
    mode: Callable[[], Any],
    wanted: Any,
    logged_text: Callable[[], str],
) -> str:
    """Damage one file of a run and call a mode; "" if it behaves as promised, else the problem."""
    with put_back(whole):
        FAULTS[fault](victim)
        logged_text()
        try:
            with limited(120):
                got = mode()
            return (
                ""
                if got == wanted or "warning: " in logged_text()
                else "another result, without a word"
            )
        except UserError as error:
            return "" if len(f"{error}".splitlines()) == 1 else f"refused with {error!r}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def put_back(whole: pathlib.Path) -> Iterator[None]:
    """Restore the run after a trial."""
    kept = whole.with_name("kept")
    shutil.copytree(whole, kept, symlinks=True)
    try:
        yield
    finally:
        shutil.rmtree(whole)
        kept.rename(whole)


def untouched(whole: pathlib.Path, mode: Callable[[], Any]) -> Any:
    with put_back(whole):
        return mode()


def tried(
    run: pathlib.Path,
    modes: dict[str, Callable[[], Any]],
    logged_text: Callable[[], str],
    trials: Any,
    part: Callable[[int], bool],
) -> None:
    wanted, wrong, number = {name: untouched(run, mode) for name, mode in modes.items()}, [], 0
    for file in FILES:
        for victim in at(run, file):
            for fault in FAULTS:
                number += 1
                if not part(number):
                    continue
                if fault == "deleted" and file.verified == "shown":
                    continue  # a missing image counts as one that was not written
                for name, mode in modes.items():
                    if name == "report" and victim.relative_to(run).as_posix().startswith(
                        "checkpoints/"
                    ):
                        continue
                    output = trial(run, victim, fault, mode, wanted[name], logged_text)
                    if not trials.add(not output):
                        wrong.append(f"{victim.relative_to(run)} {fault}, {name}: {output}")
    trials.figure = (
        f"{trials.passed} of {trials.trials} files and faults: the same, refused or a warning"
    )
    assert not wrong, "\n".join(wrong)


def listener(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> Callable[[], str]:
    def logged_text() -> str:
        out, err = capsys.readouterr()
        output = out + err + caplog.text
        caplog.clear()
        return output

    return logged_text


@pytest.mark.fast
@pytest.mark.row("B12")
def test_a_file_of_a_run_in_one_fault_of_each_kind(
    run: pathlib.Path, monkeypatch, capsys, caplog, trials
) -> None:
    """Every eleventh case: a few of each file and of each fault."""
    modes = {name: lambda mode=mode: mode(run, monkeypatch) for name, mode in MODES.items()}
    with caplog.at_level(logging.WARNING):
        tried(run, modes, listener(capsys, caplog), trials, lambda number: number % 11 == 0)
    assert trials.trials > 15


@pytest.mark.slow
@pytest.mark.row("B12")
def test_every_file_of_a_run_in_every_fault(
    run: pathlib.Path, monkeypatch, capsys, caplog, trials
) -> None:
    modes = {name: lambda mode=mode: mode(run, monkeypatch) for name, mode in MODES.items()}
    with caplog.at_level(logging.WARNING):
        tried(run, modes, listener(capsys, caplog), trials, lambda number: True)
    assert trials.trials > 250


def command_line(*arguments: str) -> None:
    """A command that must succeed; its refusal is raised, as one line."""
    output = io.StringIO()
    with contextlib.redirect_stderr(output):
        code = command.main(list(arguments))
    if code == 2:
        raise UserError(output.getvalue().strip())
    assert code == 0, (code, output.getvalue())
    print(output.getvalue())  # with its warnings


@pytest.mark.slow
@pytest.mark.row("B12")
def test_a_run_that_trains_evaluates_and_exports(
    tmp_path: pathlib.Path, monkeypatch, capsys, caplog, trials
) -> None:
    """A real run that resumes from its first checkpoint: its training bit by bit, its evaluation,
    its export."""
    monkeypatch.chdir(ROOT)
    place = tmp_path / "run"
    quick = [
        "--config",
        "configs/quickstart.py",
        *TINY,
        "--config.train.batch_size=16",
        "--config.train.steps=8",
    ]
    quick += ["--config.train.save_every=4", "--config.train.eval_every=0", "--workdir", str(place)]
    command_line(*quick)
    arrays = json.loads(
        (place / "checkpoints" / "8" / "digests.json").read_bytes().splitlines()[0]
    )["arrays"]
    command_line("--mode=eval", "--workdir", str(place))
    result = (place / "eval.json").read_bytes()
    shutil.rmtree(place / "checkpoints" / "8")
    (place / "checkpoints" / "4").rename(tmp_path / "4")
    shutil.copytree(tmp_path / "4", place / "checkpoints" / "4")

    def resumed() -> Any:
        command_line(*quick)
        return json.loads(
            (place / "checkpoints" / "8" / "digests.json").read_bytes().splitlines()[0]
        )["arrays"]

    def evaluated() -> Any:
        command_line("--mode=eval", "--workdir", str(place))
        return json.loads((place / "eval.json").read_bytes())["results"]

    def exported() -> Any:
        command_line("--mode=export", "--format=npz", "--workdir", str(place))
        return {
            name: array.tobytes()
            for name, array in np.load(place / "export" / "npz" / "vit.npz").items()
        }

    assert result and untouched(place, resumed) == arrays
    with caplog.at_level(logging.WARNING):
        modes = {"train": resumed, "eval": evaluated, "export": exported}
        tried(place, modes, listener(capsys, caplog), trials, lambda number: number % 29 == 0)

"""Every mode refuses a working directory that cannot be written on one line, before it opens data
or compiles."""

import builtins
import errno
import io
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from m3i_jax import main as command
from m3i_jax.modes import MODES, evaluators, setup
from m3i_jax.modes import compile as compile_mode
from m3i_jax.modes import data as data_mode
from tests import saved, toy
from tests.quick_show import leave_out_estimates
from tests.test_main import TINY

ROOT = pathlib.Path(__file__).parent.parent.parent
STARTS = {  # arguments of the modes that need a configuration
    "train": (),
    "compare": ("--config.compare.forms=mim,clip",),
    "profile": (),
    "compile": ("--topology=cpu:1",),
    "preview": (),
    "data": (),
    "convert": (),
    "curate": (),
    "index": (),
}
OF_RUN = {
    "report": (),
    "eval": (),
    "export": ("--format=npz",),
    "features": ("--out=features.npz",),
    "replay": (),
}
LONG, DEEP = "/tmp/" + "a" * 300, "/tmp/" + "a/" * 3000


def test_the_table_has_all_modes() -> None:
    assert {*STARTS, *OF_RUN, "show"} == set(MODES)


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> Callable[[pathlib.Path], None]:
    """Makes a directory read-only, also for root, as a file system that is mounted so; or its
    writes fail otherwise."""

    def refuse(folder: pathlib.Path, number: int = errno.EROFS) -> None:
        def check(path: Any) -> None:
            if isinstance(path, str | bytes | os.PathLike):
                real = pathlib.Path(os.path.realpath(os.fsdecode(path)))
                if real.is_relative_to(folder) and real != folder:
                    raise OSError(number, os.strerror(number), str(path))

        def patch(module: Any, name: str, writes: Callable[..., bool]) -> None:
            plain = getattr(module, name)

            def call(path: Any, *arguments: Any, **options: Any) -> Any:
                if writes(path, *arguments, **options):
                    check(path)
                return plain(path, *arguments, **options)

            monkeypatch.setattr(module, name, call)

        def opens(path: Any, mode: str = "r", *_: Any, **__: Any) -> bool:
            return bool(set(mode) & set("wax+"))

        flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT
        patch(os, "open", lambda path, flag, *_, **__: bool(flag & flags))
        patch(builtins, "open", opens)
        patch(io, "open", opens)
        patch(os, "mkdir", lambda path, *_, **__: not os.path.isdir(path))
        patch(os, "unlink", lambda *_, **__: True)
        plain_open = os.open

        def open_unnamed(path: Any, flag: int, *arguments: Any, **options: Any) -> int:
            if flag & os.O_TMPFILE == os.O_TMPFILE:  # the path is that of the directory
                check(os.path.join(os.fsdecode(path), "x"))
            return plain_open(path, flag, *arguments, **options)

        monkeypatch.setattr(os, "open", open_unnamed)

    return refuse


@pytest.fixture
def nothing_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data are not opened, and nothing is compiled."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the directory was not checked first")

    monkeypatch.setattr(setup.splits, "open_splits", fail)
    monkeypatch.setattr(setup.splits, "open_source", fail)
    monkeypatch.setattr(data_mode.splits, "open_splits", fail)
    monkeypatch.setattr(compile_mode, "report_program", fail)
    monkeypatch.setattr(evaluators, "make_evaluators", fail)


def refused(capsys: pytest.CaptureFixture[str], mode: str, workdir: object, *more: str) -> str:
    """The line of a refusal."""
    code = command.main([f"--mode={mode}", "--workdir", str(workdir), *more])
    line = capsys.readouterr().err
    assert code == 2 and line.startswith("m3i_jax: ") and line.count("\n") == 1, (code, line)
    return line


def start(mode: str) -> tuple[str, ...]:
    """The arguments of a mode, without settings that it refuses since it does not read them."""
    reads = tuple(f"--config.{name}" for name in MODES[mode].reads) or ("--config.",)
    settings = (s for s in (*TINY, "--config.train.round_batch=true") if s.startswith(reads))
    return ("--config", str(ROOT / "configs/quickstart.py"), *settings, *STARTS[mode])


@pytest.mark.row("A11")
@pytest.mark.usefixtures("nothing_begins")
@pytest.mark.parametrize("mode", STARTS)
def test_a_new_run(
    mode: str, tmp_path: pathlib.Path, read_only: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    for place, reason in (
        ("/proc/none/x", "No such file or directory"),
        ("/proc/self", "No such file or directory"),
        ("/dev/null/x", "is not a directory"),
        (LONG, "File name too long"),
        (DEEP, "File name too long"),
    ):
        assert reason in refused(capsys, mode, place, *start(mode))
    (tmp_path / "there").mkdir()
    read_only(tmp_path)
    for name in ("there", "new", "new/x"):
        line = refused(capsys, mode, tmp_path / name, *start(mode))
        assert f"--workdir {tmp_path / name}: cannot be " in line or "cannot write to" in line
        assert "Read-only file system" in line
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


@pytest.mark.row("A11")
@pytest.mark.usefixtures("nothing_begins")
def test_a_disk_that_does_not_answer_is_no_mistake(
    tmp_path: pathlib.Path,
    read_only: Callable,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1, after which a scheduler starts the command again: where writes fail, and where nothing of
    a stale mount is known, also for a Python whose pathlib takes it for absent."""

    def ended(*words: str) -> None:
        command_line = ["--mode=train", "--workdir", str(tmp_path / "run"), *start("train")]
        code = command.main(command_line)
        line = capsys.readouterr().err
        assert code == 1 and line.count("\n") == 1 and all(word in line for word in words), line

    read_only(tmp_path, errno.EIO)
    ended("--workdir", "cannot be created", "Input/output error")
    for name in ("stat", "lstat"):
        plain = getattr(os, name)

        def stale(path: Any, *more: Any, plain: Any = plain, **options: Any) -> Any:
            if not isinstance(path, int) and os.fsdecode(path) == str(tmp_path / "run"):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
            return plain(path, *more, **options)

        monkeypatch.setattr(os, name, stale)
    monkeypatch.setattr(pathlib.Path, "is_dir", lambda path: os.path.isdir(path))
    ended(f"{tmp_path / 'run'}: Stale file handle; mount the file system again")


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    run = tmp_path_factory.mktemp("run")
    saved.run(run, toy.settings())
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    return run


@pytest.mark.row("A11")
@pytest.mark.usefixtures("nothing_begins")
@pytest.mark.parametrize("mode", OF_RUN)
def test_a_run_that_is_there(
    mode: str,
    there: pathlib.Path,
    tmp_path: pathlib.Path,
    read_only: Callable,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for place in ("/proc/none/x", "/proc/self", LONG, DEEP):
        line = refused(capsys, mode, place, *OF_RUN[mode])
        assert "has no config.txt" in line or "File name too long" in line
    run = tmp_path / "run"
    shutil.copytree(there, run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    read_only(tmp_path)
    more = ("--out", str(run / "features.npz")) if mode == "features" else OF_RUN[mode]
    line = refused(capsys, mode, run, *more)
    # a replay reads only
    assert ("has no dumps" if mode == "replay" else "Read-only file system") in line
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_show_writes_nothing(
    tmp_path: pathlib.Path,
    read_only: Callable,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read_only(tmp_path)
    arguments = ["--config", str(ROOT / "configs/quickstart.py"), *TINY, "--mode=show"]
    leave_out_estimates(monkeypatch)
    assert command.main([*arguments, "--workdir", str(tmp_path / "x")]) == 0
    assert command.main([*arguments, "--workdir", "/proc/none/x"]) == 0
    assert command.main([*arguments, "--workdir", LONG]) == 2

"""Errors of the system on one line, with path and exit code, and the output of other threads."""

import errno
import json
import logging
import os
import pathlib
import subprocess
import sys
import threading

import jax
import pytest

from m3i_jax import errors, library_errors
from m3i_jax import main as command
from m3i_jax.errors import DoesNotFit, RunStopped, UserError
from tests.test_main import TINY

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize("number", sorted(errors.HINTS))
def test_system_error_has_path_reason_and_hint(number: int) -> None:
    refusal = errors.as_refusal(OSError(number, os.strerror(number), "/data/x"))
    assert isinstance(refusal, UserError)
    assert refusal.status == (1 if number in errors.TRANSIENT else 2)  # 1: a scheduler restarts it
    assert str(refusal) == f"/data/x: {os.strerror(number)}; {errors.HINTS[number]}"


@pytest.mark.parametrize("number", sorted(errors.TRANSIENT))
def test_failure_of_a_server_is_no_mistake(number: int, monkeypatch, capsys) -> None:
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number), "/data/x")

    monkeypatch.setattr(command, "_run", fails)
    assert command.main([]) == 1
    assert capsys.readouterr().err.startswith(f"m3i_jax: /data/x: {os.strerror(number)}; ")


def test_a_refusal_of_what_may_pass_is_no_mistake() -> None:
    """Whatever the message names: the code of a scheduler's restart is that of the system's error
    from which it was raised."""

    def refused(number: int, kind: type[UserError] = UserError) -> UserError:
        with pytest.raises(UserError) as refusal, errors.refuse_system_errors():
            try:
                raise OSError(number, os.strerror(number))
            except OSError as error:
                raise kind("--workdir run: cannot be created; choose another") from error
        assert str(refusal.value) == "--workdir run: cannot be created; choose another"
        return refusal.value

    for number in (errno.EIO, errno.ESTALE, errno.ENOTCONN):
        assert refused(number).status == 1
        assert type(refused(number, DoesNotFit)) is DoesNotFit
    for number in (errno.EACCES, errno.EROFS, errno.ENOSPC):
        assert refused(number).status == 2
    # as tensorstore says it
    wrapped = UserError("--checkpoint run: cannot be read; give another")
    wrapped.__cause__ = ValueError("reading /a/b [OS error 116: ESTALE Stale file handle]")
    assert errors.as_refusal(wrapped).status == 1


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EACCES])
def test_what_a_disk_does_not_say_is_not_absent(number: int, monkeypatch) -> None:
    def fails(path: str, **_: object) -> None:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "stat", fails)
    if number == errno.EACCES:
        assert not errors.path_exists("/mnt/run")
        return
    with pytest.raises(OSError, match="Stale file handle"):
        errors.path_exists("/mnt/run")


def test_both_paths_of_a_rename_are_named() -> None:
    assert str(
        errors.as_refusal(OSError(errno.EXDEV, "Invalid cross-device link", "/a", None, "/b"))
    ).startswith("/a -> /b: Invalid")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError("Unable to allocate 7 PiB"), DoesNotFit),
        (OSError(errno.ENOMEM, "Cannot allocate memory", "x"), DoesNotFit),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes"),
            DoesNotFit,
        ),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: the device was lost"), RunStopped),
        (RuntimeError("Unable to initialize backend 'foo': it is not in the list"), UserError),
        (RuntimeError("can't start new thread"), UserError),
        (ValueError("writing /a/b [OS error 28: ENOSPC No space left on device]"), UserError),
        (
            IndexError("write() failed: No space left on device; writing /full/x; at byte 57344"),
            UserError,
        ),
        (RunStopped("the disk does not answer"), RunStopped),
        (jax.errors.JaxRuntimeError("INTERNAL: a bug of a compiler"), None),
        (ValueError("shapes do not match"), None),
        (KeyError("x"), None),
        (RecursionError("maximum recursion depth exceeded"), None),
    ],
)
def test_kind_of_refusal_by_error(error: Exception, kind: type | None) -> None:
    assert type(errors.as_refusal(error)) is (kind or type(None))


def test_cause_decides_the_refusal() -> None:
    try:
        try:
            pathlib.Path("/no/such/file").read_text()
        except OSError as first:
            raise RuntimeError("a worker failed") from first
    except RuntimeError as error:
        assert "/no/such/file: No such file" in str(errors.as_refusal(error))


def test_file_is_named_if_the_error_lacks_it(tmp_path: pathlib.Path) -> None:
    (latin := tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (deep := tmp_path / "deep.json").write_text("[" * 100_000)
    for path, read in (
        (latin, pathlib.Path.read_text),
        (deep, lambda path: json.loads(path.read_text())),
    ):
        with (
            pytest.raises(UserError, match=f"^{path}: .*; restore the file") as refused,
            errors.refuse_system_errors(),
        ):
            read(path)
        assert isinstance(refused.value.__cause__, UnicodeError | RecursionError)
    with (
        pytest.raises(UserError, match=f"^{latin}: .*UTF-8"),
        errors.refuse_system_errors(),
        open(latin, encoding="utf-8") as file,
    ):
        file.read()


def test_bug_is_no_refusal() -> None:
    with pytest.raises(ZeroDivisionError), errors.refuse_system_errors():
        1 / 0  # noqa: B018


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--mode"], "argument --mode: expected one argument"),
        (["--mode=show", "--mode=data"], "--mode: is given twice"),
        (["--config", "configs/toy.py", "--mode=show"], "--config: is given twice"),
        (["--workdir", "a", "--workdir", "b"], "--workdir: is given twice"),
        (
            ["--mode=preview", "--workdir", "/proc/none/x"],
            "--workdir /proc/none/x: cannot be created (No such file or directory)",
        ),
        (["--mode=preview", "--workdir", "/tmp/" + "a" * 300], "File name too long"),
    ],
)
def test_refusals_of_argparse_and_system(
    arguments: list[str], expected: str, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(ROOT)
    code = command.main(["--config", "configs/quickstart.py", *arguments])
    err = capsys.readouterr().err
    assert code == 2 and expected in err and err.count("\n") == 1 and err.startswith("m3i_jax: ")


def process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_process_prints_a_traceback_only_for_a_bug_and_nothing_after_the_error() -> None:
    """Output of a running thread and of Python's shutdown would follow the error line."""
    start = (
        "import sys, atexit\nsys.argv = ['m3i_jax', '--mode=show', '--config',"
        " 'configs/quickstart.py']\nfrom m3i_jax import main as command\nfrom m3i_jax import"
        " config\ndef fail(*_):\n    raise ERROR\nconfig.load_config ="
        " fail\natexit.register(lambda: print('late', file=sys.stderr))\nsys.exit(command.main())\n"
    )
    bug = process(start.replace("ERROR", "KeyError('that')"))
    assert (
        bug.returncode == 1
        and "Traceback" in bug.stderr
        and "please report" in bug.stderr.splitlines()[-1]
    )
    full = process(start.replace("ERROR", "OSError(28, 'No space left on device', '/data/x')"))
    assert (
        full.returncode == 2
        and full.stderr.startswith("m3i_jax: /data/x: No space left on device; make room")
        and full.stderr.count("\n") == 1
    )


def test_unknown_devices_are_refused_on_one_line() -> None:
    code = (
        "from m3i_jax import main\nraise SystemExit(main.main(['--mode=show', '--config',"
        " 'configs/quickstart.py']))"
    )
    done = process(code, JAX_PLATFORMS="foo")
    assert (
        done.returncode == 2
        and "'foo'" in done.stderr
        and "JAX_PLATFORMS" in done.stderr
        and done.stderr.count("\n") == 1
    )


@pytest.mark.parametrize("module", ["m3i_jax", "m3i_jax.main"])
def test_environment_that_jax_cannot_read_is_refused_on_one_line(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=ROOT,
        env=os.environ | {"JAX_ENABLE_X64": "perhaps"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (
        done.returncode == 2
        and "'perhaps'" in done.stderr
        and "JAX_ENABLE_X64" in done.stderr
        and done.stderr.count("\n") == 1
    )


def test_full_output_is_refused() -> None:
    show = f"--config configs/quickstart.py --mode=show {' '.join(TINY)}"
    command_line = f"{sys.executable} -m m3i_jax.main {show} > /dev/full"
    done = subprocess.run(
        ["sh", "-c", command_line], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (
        done.returncode == 2
        and "<stdout>: No space left on device" in done.stderr
        and done.stderr.count("\n") == 1
    )


def test_a_reader_that_ends_ends_no_command(monkeypatch, capfd) -> None:
    """As `head`: also what is buffered is discarded, and one line says so."""
    reader, writer = os.pipe()
    os.close(reader)
    ran = []

    def run(*_: object) -> int:
        print("a table", flush=True)
        print("and what is buffered")
        ran.append("to its end")
        return 0

    monkeypatch.setattr(command, "_run", run)
    with open(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert command.main([]) == 0 and ran
        monkeypatch.undo()
    (line,) = capfd.readouterr().err.splitlines()
    assert "the program that reads it has ended; nothing more is printed" in line


def fail_elsewhere() -> None:
    """Raise as a thread of another library: no frame of this package is in the traceback."""
    json.loads("[" * 3)


def test_other_threads_get_one_line_each_once(monkeypatch, capsys) -> None:
    others = library_errors.LibraryErrorHooks()
    monkeypatch.setattr(threading, "excepthook", others.threading_hook)
    for _ in range(3):
        thread = threading.Thread(target=fail_elsewhere, name="commit")
        thread.start()
        thread.join()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "m3i_jax: warning: in a thread of another library (commit): JSONDecodeError: Expecting"
        " value"
    )


def test_log_records_of_other_libraries_have_no_traceback(monkeypatch) -> None:
    factory = library_errors.LibraryErrorHooks().record(logging.LogRecord)

    def record(text: str) -> logging.LogRecord:
        return factory("absl", logging.ERROR, __file__, 1, text, (), sys.exc_info())

    try:
        fail_elsewhere()
    except ValueError:
        message = record("the save failed")
        assert message.exc_info is None and message.getMessage().startswith(
            "the save failed (JSONDecodeError: Expecting value"
        )
    try:
        errors.system_error(None)  # type: ignore[arg-type]
    except AttributeError:  # an error of this package keeps its traceback
        assert record("a bug").exc_info

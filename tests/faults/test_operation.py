"""Rows E: invalid configurations, runs resumed with other settings, and machines without packages,
network or space."""

import errno
import json
import os
import pathlib
import resource
import subprocess
import sys
import types
from typing import Any

import pytest

from m3i_jax import config as configuration
from m3i_jax import main as command
from m3i_jax import schema
from m3i_jax.data import crops
from m3i_jax.data.sources import array_record, hugging_face, remote, tfds
from m3i_jax.errors import UserError
from m3i_jax.modes import batch_search, train
from m3i_jax.reporting import writers
from tests.faults.hostile import ROOT
from tests.modes import test_batch_search
from tests.test_config import BAD
from tests.test_main import TINY, environment

QUICK = ["--config", "configs/quickstart.py"]
# Mistakes of the command line and of files, beside those of single settings in BAD: what must be in
# the message.
LINES: dict[str, tuple[list[str], str]] = {
    "unknown model": (["--config", "configs/folder.py:model=vit_b17,path=x"], "vit_b16"),
    "unknown argument": (["--config", "configs/quickstart.py:stepz=3"], "did you mean steps=?"),
    "no such file": (["--config", "configs/quickstrat.py"], "did you mean configs/quickstart.py?"),
    "no configuration": ([], "--config: is missing"),
    "unknown flag": ([*QUICK, "--workdirr=x"], "--workdirr"),
    "unknown mode": ([*QUICK, "--mode=trian"], "--mode=train"),
    "three devices, 2 x 2": (
        [*QUICK, "--config.parallel.mesh=(2,2,1)", "--config.train.batch_size=6"],
        "config.parallel.mesh: (2, 2, 1)",
    ),
    "more devices than there are": (
        [*QUICK, "--config.parallel.mesh=(3,1,1)"],
        "config.parallel.mesh",
    ),
    "a batch that does not divide": (
        [*QUICK, "--config.train.batch_size=10"],
        "config.train.batch_size: 10",
    ),
    "no such folder": (["--config", "configs/folder.py:path=tests/dta"], "did you mean"),
    "no path": (["--config", "configs/folder.py"], "data.path is empty"),
    "an unknown objective": ([*QUICK, "--config.objective.forms=mim3"], "did you mean mim?"),
    "no patience": (
        [*QUICK, "--config.data.patience=0"],
        "config.data.patience: 0.0 must be positive",
    ),
    "what is missing": ([*QUICK, "--config.data.missing=skip"], "stop, replace"),
}


def all_lines(folder: pathlib.Path) -> dict[str, tuple[list[str], str]]:
    """The single settings of BAD are invalid with the defaults; --mode=show refuses them like any
    other mode, and would train nothing."""
    (folder / "defaults.py").write_text(
        "from m3i_jax.config import default_config\n\n\n"
        "def get_config():\n    return default_config()\n"
    )
    show = ["--config", f"{folder}/defaults.py", "--mode=show"]
    return {a: ([*show, f"--config.{a}"], wanted) for a, wanted in BAD.items()} | LINES


@pytest.mark.fast
@pytest.mark.row("E1")
def test_bad_configurations_are_refused(
    trials, monkeypatch, capsys, tmp_path: pathlib.Path
) -> None:
    """On the command line: exit 2, one line with the key (or flag) and what to do; and no workdir
    is created."""
    monkeypatch.chdir(ROOT)
    for name, (arguments, wanted) in all_lines(tmp_path).items():
        code = command.main([*arguments, "--workdir", str(tmp_path / "run")])
        out, err = capsys.readouterr()
        good = (
            code == 2
            and wanted in err
            and err.startswith("m3i_jax: ")
            and err.count("\n") == 1
            and "Traceback" not in out + err
        )
        assert trials.add(good and not list(tmp_path.glob("run/checkpoints*"))), (name, code, err)
    trials.figure = f"{trials.passed} of {trials.trials} refused"
    assert trials.trials >= 60


@pytest.mark.slow
@pytest.mark.row("E1")
def test_each_is_refused_in_five_seconds_of_a_processor(trials, tmp_path: pathlib.Path) -> None:
    """In its own process, from the start of Python. Processor time, since a busy machine does not
    lengthen it."""
    most = 0.0
    for name, (arguments, wanted) in all_lines(tmp_path).items():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "m3i_jax.main", *arguments, "--workdir", str(tmp_path / "run")],
            cwd=ROOT,
            env={**environment(), "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
            capture_output=True,
            text=True,
            check=False,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        most = max(most, seconds)
        assert trials.add(done.returncode == 2 and wanted in done.stderr and seconds < 5), (
            name,
            seconds,
            done.stderr,
        )
    trials.figure = (
        f"{trials.passed} of {trials.trials} with exit 2, at most {most:.1f} s of a core"
    )


@pytest.mark.fast
@pytest.mark.row("E2")
def test_the_largest_batch_that_fits_is_printed(trials) -> None:
    """Ten sizes of memory, with a formula in place of the compiler; tests/modes/test_compile.py
    uses a real compiler."""
    for largest in (0, 1, 2, 3, 5, 8, 11, 13, 15, 16):
        attempt, _ = test_batch_search.machine(10.0 + largest + 0.5, silent=bool(largest % 2))
        assert trials.add(batch_search.largest_batch(attempt, 6) == largest), largest
    trials.figure = (
        f"{trials.passed} of {trials.trials} right, against a formula; no chip was here to run out"
        " of memory"
    )


def job(workdir: pathlib.Path, fingerprint: str = "f", **changes: Any) -> Any:
    made = configuration.default_config()
    configuration.apply_overrides(
        made, [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    )
    identity = (
        f"order of the stream = version 1, seed 0\nsource 1 = images, fingerprint {fingerprint}\n"
    )
    config = configuration.resolve(made)
    return types.SimpleNamespace(
        workdir=workdir,
        config=config,
        text=configuration.config_to_text(config),
        fingerprint=fingerprint,
        earlier_fingerprints=(),
        identity=identity,
        classes=(),
    )


DIFFERENT = {
    "seed=1": "seed: 0 -> 1",
    "optim__lr=0.01": "optim.lr: 0.001 -> 0.01",
    "train__batch_size=512": "train.batch_size: 4096 -> 512",
    "model__encoder__depth=3": "model.encoder.depth: 12 -> 3",
    "data__mask_ratio=0.25": "data.mask_ratio: 0.5 -> 0.25",
    "data__crop_scale=(0.2,1.0)": "data.crop_scale: (0.08, 1.0) -> (0.2, 1.0)",
    "data__augment__hue=0.2": "data.augment.hue: 0.1 -> 0.2",
    "objective__forms=mim": "objective.forms: ('m3i',) -> ('mim',)",
    "data__max_bad_share=0.3": "data.max_bad_share: 0.05 -> 0.3",
    "optim__ema_schedule=constant": "optim.ema_schedule: 'cosine' -> 'constant'",
}
SAME = [
    "train__log_every=7",
    "train__save_every=9",
    "train__keep=5",
    "data__threads=9",
    "data__workers=2",
    "data__patience=5",
    "data__missing=replace",
    "report__panel_rows=2",
    "report__private=False",
    "evaluate__k=3",
    "parallel__mesh=(1,1,1)",
]


@pytest.mark.fast
@pytest.mark.row("E3")
def test_a_changed_configuration_is_shown_and_asks_for_a_flag(
    trials, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    position = {"samples_seen": 8, "fingerprint": "f"}

    def start(**changes: str) -> None:
        train.write_settings(job(tmp_path))
        train.check_same_run(job(tmp_path, **changes), position, False)

    for change, wanted in DIFFERENT.items():
        with pytest.raises(UserError) as refusal:
            start(**dict([change.split("=", 1)]))
        message = str(refusal.value)
        assert trials.add(
            f"another configuration ({wanted}); choose another directory, or add --allow-changes"
            in message
        ), message
        changed, before = job(tmp_path, **dict([change.split("=", 1)])), job(tmp_path).text
        train.check_same_run(changed, position, True)
        assert trials.add(f"--allow-changes: {wanted}" in capsys.readouterr().out)
        assert (tmp_path / "config.txt").read_text() == before  # until the state is restored
        train.write_settings(changed)
        assert trials.add(wanted.split(" -> ")[1] in (tmp_path / "config.txt").read_text())
    for change in SAME:
        start(**dict([change.split("=", 1)]))
        trials.add(True)
    train.write_settings(job(tmp_path))
    with pytest.raises(
        UserError, match=r"\(data, source 1: images, fingerprint f -> images, fingerprint g\)"
    ):
        train.check_same_run(job(tmp_path, fingerprint="g"), position, False)
    with pytest.raises(
        UserError,
        match=r"\(seed: 0 -> 1; optim.lr: 0.001 -> 0.01; data, source 1: images, fingerprint f -> ",
    ):
        train.check_same_run(
            job(tmp_path, fingerprint="g", seed="1", optim__lr="0.01"), position, False
        )
    trials.figure = (
        f"{len(DIFFERENT)} changes named exactly, {len(SAME)} that change no result allowed"
    )


def absent(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.fast
@pytest.mark.row("E4")
@pytest.mark.parametrize(
    ("packages", "extra", "act"),
    [
        (
            ["tensorboardX"],
            "tensorboard",
            lambda place: writers.require_package(
                "tensorboardX", "report.tensorboard", "tensorboard"
            ),
        ),
        (
            ["wandb"],
            "wandb",
            lambda place: writers.require_package("wandb", "report.wandb", "wandb"),
        ),
        (["tensorflow_datasets"], "tfds", lambda place: tfds.TfdsSource("food101", "train")),
        (
            ["array_record", "array_record.python"],
            "tfds",
            lambda place: array_record.ArrayRecordSource(place),
        ),
        (["datasets"], "huggingface", lambda place: hugging_face.HuggingFaceSource(place, "")),
        (["fsspec"], "gcs", lambda place: remote.glob_urls("gs://bucket/*.tar")),
    ],
)
def test_a_missing_package_names_its_extra(
    packages: list[str], extra: str, act: Any, monkeypatch, tmp_path: pathlib.Path
) -> None:
    absent(monkeypatch, *packages)
    with pytest.raises(UserError) as refusal:
        act(str(tmp_path))
    assert f"pip install 'm3i-jax[{extra}]'" in str(refusal.value) and "\n" not in str(
        refusal.value
    )


@pytest.mark.fast
@pytest.mark.row("E4")
def test_the_fast_resizer_names_its_extra(monkeypatch) -> None:
    monkeypatch.setattr(crops.decode_fast, "is_installed", lambda package: False)
    crops.choose_resizer.cache_clear()
    try:
        with pytest.raises(UserError, match=r"pip install 'm3i-jax\[fast\]'"):
            crops.choose_resizer("fast")
        assert crops.choose_resizer("auto") == "pillow"
    finally:
        crops.choose_resizer.cache_clear()


BARE = """
import socket, sys
for package in ("tensorflow", "tensorflow_datasets", "cv2", "wandb", "tensorboardX", "fsspec",
                "gcsfs", "datasets", "torch",
                "cykooz_resizer", "simplejpeg", "pandas", "matplotlib", "google.cloud"):
    sys.modules[package] = None
reached = []
connect = socket.socket.connect
def refuse(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        reached.append(address)
        raise OSError(101, "Network is unreachable")
    return connect(self, address)
socket.socket.connect = refuse
socket.getaddrinfo = lambda *a, **k: (_ for _ in ()).throw(socket.gaierror(-3, "no name server"))
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: (
    None if name in sys.modules and sys.modules[name] is None else find(name, *rest)
)
from m3i_jax import main
code = main.main(sys.argv[1:])
assert not reached, reached
sys.exit(code)
"""


def bare(
    place: pathlib.Path, *arguments: str, before: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, sys.executable, "-c", BARE, *QUICK, *TINY, "--workdir", str(place), *arguments],
        cwd=ROOT,
        env=environment() | {"HTTPS_PROXY": "http://127.0.0.1:1", "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.fast
@pytest.mark.row("E4", "E6")
def test_the_core_needs_neither_extras_nor_network(tmp_path: pathlib.Path) -> None:
    done = bare(tmp_path, "--mode=preview", "--config.train.batch_size=16")
    assert done.returncode == 0 and (tmp_path / "preview.png").is_file(), done.stderr


@pytest.mark.slow
@pytest.mark.row("E4", "E6")
def test_a_run_without_extras_and_network(tmp_path: pathlib.Path) -> None:
    """In a network namespace without interfaces where the system allows one; else Python's sockets
    refuse."""
    try:
        alone = (
            subprocess.run(["unshare", "-rn", "true"], check=False, capture_output=True).returncode
            == 0
        )
    except OSError:
        alone = False
    done = bare(tmp_path, "--config.train.steps=4", before=("unshare", "-rn") if alone else ())
    assert done.returncode == 0 and "done: 4 steps" in done.stdout, done.stderr


class Disk:
    """os.write on a disk with space for a number of bytes."""

    def __init__(self, room: int) -> None:
        self.room, self.write = room, os.write

    def __call__(self, file: int, content: bytes) -> int:
        taken = min(len(content), self.room)
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= taken
        return self.write(file, content[:taken])


def steps(path: pathlib.Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.fast
@pytest.mark.row("E5")
def test_a_full_disk_costs_whole_lines_which_are_counted(
    trials, monkeypatch, tmp_path: pathlib.Path, capsys
) -> None:
    """Whatever byte of a line fills the disk; with space again, the log continues and has the
    number of lost lines."""
    for room in range(1, 60, 3):
        path = tmp_path / f"{room}.jsonl"
        writer = writers.Writers({"metrics.jsonl": writers.JsonLines(path)}, writers.log_line)
        disk = Disk(room)
        with monkeypatch.context() as patch:
            patch.setattr(writers.os, "write", disk)
            for step in range(1, 6):
                writer.write(step, {"loss": 1.5})
        lost = 5 - len(steps(path))
        writer.write(6, {"loss": 1.5})
        writer.close()
        assert trials.add(
            writer.dropped["metrics.jsonl"] == lost
            and steps(path) == [*range(1, 6 - lost), 6]
            and lost >= 3
        )
        assert json.loads(path.read_text().splitlines()[-1])["report/dropped/metrics.jsonl"] == lost
    assert "No space left on device" in capsys.readouterr().out


class Full:
    """A console whose disk is full for a while."""

    def __init__(self) -> None:
        self.full, self.text = True, ""

    def write(self, text: str) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


@pytest.mark.fast
@pytest.mark.row("E5")
def test_a_console_on_a_full_disk_comes_back(monkeypatch, tmp_path: pathlib.Path) -> None:
    console = Full()
    monkeypatch.setattr(sys, "stdout", console)
    writer = writers.open_writers(schema.Config(), tmp_path, resume_at=0, total=10)
    for step in range(1, 4):
        writer.write(step, {"loss": 1.5})
    console.full = False
    writer.write(4, {"loss": 1.5})
    writer.close()
    monkeypatch.undo()
    assert (
        writer.dropped == {"metrics.jsonl": 0, "console": 3}
        and "4/10" in console.text
        and "3/10" not in console.text
    )
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last == {"step": 4, "loss": 1.5, "report/dropped/console": 3}


@pytest.mark.fast
@pytest.mark.row("E5")
def test_a_figure_that_cannot_be_written_ends_nothing(tmp_path: pathlib.Path, capsys) -> None:
    from m3i_jax.reporting.image_grid import ImageGrid

    writer = writers.open_writers(schema.Config(), tmp_path, resume_at=0, total=10)
    (tmp_path / "panels").write_text("a file where the folder should be")
    for _ in range(2):
        writer.attempt("panels", lambda: ImageGrid(20, 20).save(tmp_path / "panels" / "1.png"))
    # an error of the program would end the run at its last step, at every start
    writer.attempt("panels", lambda: 1 / 0)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["report/dropped/panels"] == 3
    assert "warning: panels lost 1 file(s): UserError: cannot write" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.row("E5")
def test_a_run_whose_log_lies_on_a_full_disk(trials, tmp_path: pathlib.Path) -> None:
    """/dev/full takes no byte: console and exit code are those of a run that trained."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "m3i_jax.main",
            *QUICK,
            *TINY,
            "--workdir",
            str(tmp_path),
            "--config.train.steps=4",
            "--config.train.eval_every=0",
        ],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert trials.add(
        done.returncode == 0
        and "metrics.jsonl lost 1 line(s)" in done.stdout
        and "done: 4 steps" in done.stdout
    ), done.stderr
    assert list((tmp_path / "checkpoints").glob("4*"))

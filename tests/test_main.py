"""The command line: exit codes, one line per mistake, and a run that is killed, preempted and
resumed."""

import functools
import hashlib
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from m3i_jax import main as command
from tests import xla_flags
from tests.quick_show import leave_out_traffic

ROOT = pathlib.Path(__file__).parent.parent
TINY = [
    "--config.data.size=120",
    "--config.data.image_size=32",
    "--config.train.batch_size=8",
    "--config.optim.warmup_steps=2",
    "--config.model.encoder.width=32",
    "--config.model.encoder.depth=1",
    "--config.model.encoder.heads=2",
    "--config.model.decoder.width=32",
    "--config.model.decoder.depth=1",
    "--config.model.decoder.heads=2",
    "--config.model.pool.heads=2",
    "--config.model.text.width=32",
    "--config.model.text.heads=2",
    "--config.model.text.depth=1",
    "--config.data.vocabulary_size=300",
    "--config.train.log_every=1",
    "--config.train.eval_every=4",
    "--config.train.panel_every=0",
    "--config.evaluate.batch_size=32",
    *(
        f"--config.evaluate.{figure}=false"
        for figure in ("embedding", "attention", "confusion", "examples")
    ),
]
KNN = [f"--config.evaluate.{other}=false" for other in ("direct", "zero_shot", "retrieval")]
QUICK = ["--config", "configs/quickstart.py", *TINY, *KNN]


def environment() -> dict[str, str]:
    """One device, and the fastest compilation."""
    return {**os.environ, "XLA_FLAGS": xla_flags.FASTEST, "PYTHONPATH": str(ROOT)}


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "m3i_jax.main", *arguments],
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(*arguments: str) -> tuple[int, str, str]:
    process = start(*arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def test_a_tilde_is_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave it in --workdir=~/x: the run would lie in a directory that is named ~."""
    monkeypatch.setenv("HOME", "/home/a")
    for words in (["--workdir=~/x"], ["--workdir", "~/x"]):
        assert command._parse(["--mode=report", *words])[0].workdir == "/home/a/x"
    flags, _ = command._parse(["--mode=features", "--workdir=W", "--out=~/features.npz"])
    assert (flags.out, flags.workdir) == ("/home/a/features.npz", "W")


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/stat").exists() or not shutil.which("ps"),
    reason="needs /proc and ps to compare with",
)
def test_run_time_starts_with_the_process() -> None:
    """Imports and the rendezvous of hosts belong to the wall time. `ps` prints whole seconds."""
    age = float(
        subprocess.run(
            ["ps", "-o", "etimes=", "-p", str(os.getpid())],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    assert age - 1 <= time.monotonic() - command._process_start() <= age + 2


def quickstart(*overrides: str) -> list[str]:
    return ["--config", "configs/quickstart.py", "--workdir", "W", *overrides]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--config", "configs/quickstart.py", "--workdir", "W", "--config.optimm.lr=1"],
            "config.optim.lr",
        ),
        (
            ["--config", "configs/quickstart.py", "--workdir", "W", "--config.optim.lr=fast"],
            "config.optim.lr: 'fast' is not a number",
        ),
        (["--config", "configs/quickstart.py", "--workdir", "W", "--mode=trian"], "--mode=train"),
        (["--config", "configs/quickstart.py", "--workdirr", "W"], "--workdirr"),
        (
            ["--config", "configs/quickstart.py", "--workdir", "W", "--mode=xyz"],
            "there is no such mode; --help lists every mode",
        ),
        (
            ["--config", "configs/quickstart.py", "--workdir", "W", "--config.train.steps", "3"],
            "--config.train.steps=3",
        ),
        (
            ["--config", "configs/quickstart.py", "--workdir", "README.md/x"],
            "'README.md' is not a directory",
        ),
        (
            ["--config", "configs/quickstart.py", "--workdir", "gs://b/x"],
            "a URL is not a directory",
        ),
        (
            ["--config", "configs/quickstart.py", "--workdir=~nosuchuser/x"],
            "--workdir ~nosuchuser/x: begins with the home directory of an unknown user",
        ),
        (["--config", "configs/quickstart.py"], "--workdir: is missing"),
        (["--workdir", "W"], "--config: is missing"),
        (["--config", "configs/folder.py:path=no/such/folder", "--workdir", "W"], "no/such/folder"),
        (["--config", "configs/folder.py", "--workdir", "W"], "data.path is empty"),
        (
            ["--config", "configs/tars.py:path=no/*.tar", "--workdir", "W", "--mode=preview"],
            "no/*.tar",
        ),
        (
            ["--config", "configs/quickstart.py", "--workdir", "W", "--config.train.batch_size=6"],
            "data shards",
        ),
        (
            [
                "--config",
                "configs/quickstart.py",
                "--workdir",
                "W",
                "--config.parallel.mesh=(3,1,1)",
            ],
            "config.parallel.mesh",
        ),
        (
            ["--config", "configs/quickstart.py", "--workdir", "W", "--config.report.beside=/nope"],
            "'/nope' is not a directory",
        ),
        (
            [
                "--config",
                "configs/quickstart.py",
                "--workdir",
                "W",
                "--config.objective.forms=k,sim",
            ],
            "k and sim are the same",
        ),
        (
            [
                "--config",
                "configs/quickstart.py",
                "--workdir",
                "W",
                "--coordinator",
                "h:99999",
                "--processes=2",
                "--process-id=0",
            ],
            "99999",
        ),
        (
            [
                "--config",
                "configs/quickstart.py",
                "--workdir",
                "W",
                "--config.objective.forms=mim3",
            ],
            "did you mean mim?",
        ),
        (quickstart("--config.objective.forms=koleo"), "koleo has entropy terms alone"),
        (quickstart("--config.objective.teachers=('no/such',)"), "teachers: there is no 'no/such'"),
        (
            quickstart(
                "--config.objective.forms=dino", "--config.data.small_views='2 x 4 at 0.1-0.3'"
            ),
            "config.data.small_views: ",
        ),
        (
            quickstart(
                "--config.objective.forms=dino",
                "--config.model.head.prototypes=4",
                "--config.parallel.mesh=(1,8,1)",
            ),
            "config.model.head.prototypes: 4 is fewer than the 8 devices of the axis fsdp",
        ),
        (
            ["--config", "configs/quickstart.py", "--mode=show", "--allow-changes"],
            "--allow-changes: does not belong to --mode=show",
        ),
        (
            ["--mode=replay", "--workdir", "W", "--config.optim.lr=1"],
            "--config.optim.lr: does not belong to --mode=replay",
        ),
        (
            ["--config", "configs/quickstart.py", "--mode=data", "--workdir", "W", "--processes=2"],
            "--processes: does not belong to",
        ),
    ],
)
def test_mistake_is_one_line_and_exit_2(arguments, expected, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.chdir(ROOT)
    code = command.main([a if a != "W" else str(tmp_path / "run") for a in arguments])
    out, err = capsys.readouterr()
    assert code == 2 and expected in err and err.count("\n") == 1 and "Traceback" not in err + out


@pytest.mark.smoke
def test_mistake_takes_less_than_five_seconds_of_processor_time() -> None:
    """The limit is on processor time, which does not depend on the load of the machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = start(
        "--config", "configs/quickstart.py", "--workdir", "unused", "--config.optimm.lr=1"
    )
    _, err = process.communicate(timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    assert (
        process.returncode == 2
        and "did you mean config.optim.lr?" in err
        and "Traceback" not in err
    )


def test_help_and_version(capsys) -> None:
    for flag, expected in (
        ("--help", "--config.optim.b2"),
        ("--help", "--config.KEY=VALUE"),
        ("--version", "m3i_jax 0."),
    ):
        with pytest.raises(SystemExit) as stop:
            command.main([flag])
        assert stop.value.code == 0 and expected in capsys.readouterr().out


@pytest.mark.smoke
def test_show_reads_no_data(monkeypatch, capsys) -> None:
    leave_out_traffic(monkeypatch)
    monkeypatch.chdir(ROOT)
    assert (
        command.main(
            [
                "--config",
                "configs/folder.py:path=no/such/folder,model=vit_b16,batch_size=4096",
                "--mode=show",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    match = re.search(r"([\d.]+) GFLOP a mixed view", out)
    # 279.3 is the analytic floor with a frozen patch embedding
    assert match and 279.3 <= float(match[1]) <= 279.5
    assert "encoder   85,645,824" in out and "loss/inter" in out
    assert "encoder/patch_embed/kernel" in out and "Total: " in out


def lines(run: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_clock(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


@functools.cache
def parameters(run: pathlib.Path) -> str:
    """Digest of every array of the newest checkpoint of a run of another process."""
    manager = ocp.CheckpointManager(
        run.absolute() / "checkpoints", item_names=("state", "position")
    )
    step = manager.latest_step()
    arguments = ocp.args.Composite(state=ocp.args.StandardRestore())
    state = manager.restore(step, args=arguments)["state"]
    manager.close()
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(state)
    for path, array in sorted((jax.tree_util.keystr(p), np.asarray(a)) for p, a in leaves):
        digest.update(path.encode() + array.tobytes())
    return f"{step} {digest.hexdigest()}"


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory) -> pathlib.Path:
    """A run of twelve steps without interruption."""
    run = tmp_path_factory.mktemp("unbroken")
    code, _, err = finish(
        *QUICK, "--workdir", str(run), "--config.train.steps=12", "--config.train.save_every=4"
    )
    assert code == 0, err
    return run


@pytest.mark.smoke
def test_run_writes_its_files_and_metrics(unbroken: pathlib.Path) -> None:
    rows = lines(unbroken)
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == list(range(1, 13))
    names = (
        "loss/ssp loss/sp loss/intra loss/inter loss/category loss/text balance/lambda"
        " balance/ssp_norm balance/sp_norm lr ema grad_norm"
    )
    expected = {
        *names.split(),
        "collapse/target_std",
        "collapse/effective_rank",
        "samples_seen",
        "perf/images_per_sec",
    }
    assert expected <= set(trained[-1]) and trained[-1]["samples_seen"] == 12 * 8
    assert [row["step"] for row in rows if "eval/knn/top1" in row] == [0, 4, 8, 12]
    assert (unbroken / "config.txt").read_text().startswith("seed = 0\n") and (
        unbroken / "tokenizer.json"
    ).is_file()


@pytest.mark.slow  # a run that is killed gives the same bits, too
@pytest.mark.row("D5")
def test_the_same_seed_gives_the_same_bits(unbroken: pathlib.Path, tmp_path: pathlib.Path) -> None:
    code, _, err = finish(
        *QUICK,
        "--workdir",
        str(tmp_path),
        "--config.train.steps=12",
        "--config.train.save_every=12",
    )
    assert code == 0, err
    assert parameters(tmp_path) == parameters(unbroken)


def killed(run: pathlib.Path, after: int, number: int) -> int:
    """Start the run, send it a signal after a step was logged, and wait for its end."""
    process = start(
        *QUICK, "--workdir", str(run), "--config.train.steps=12", "--config.train.save_every=4"
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        log = run / "metrics.jsonl"
        if log.is_file() and any(
            json.loads(r).get("step", 0) >= after
            for r in log.read_text().splitlines()
            if r.endswith("}")
        ):
            break
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=120)
    return process.returncode


@pytest.mark.row("A1", "A2", "D5")
@pytest.mark.parametrize(
    "signals",
    [
        [(9, signal.SIGKILL)],  # the save of step 8 has waited for that of step 4
        # training/test_dense_resume.py preempts a dense run
        pytest.param([(2, signal.SIGTERM), (6, signal.SIGKILL)], marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_preempted_and_killed_equals_an_uninterrupted_one(
    signals: list[tuple[int, signal.Signals]], unbroken: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """By SIGTERM, which saves and exits with 42, and by SIGKILL, after its last save."""
    for after, number in signals:
        code = 42 if number == signal.SIGTERM else -number
        assert killed(tmp_path, after, number) == code
    code, out, err = finish(
        *QUICK, "--workdir", str(tmp_path), "--config.train.steps=12", "--config.train.save_every=4"
    )
    assert code == 0 and "resuming at step" in out, err
    assert parameters(tmp_path) == parameters(unbroken)
    # goodput is logged more than once
    logged, expected = (
        [row for row in without_clock(lines(run)) if len(row) > 1] for run in (tmp_path, unbroken)
    )
    assert logged == expected


@pytest.mark.slow  # the line is that of faults/test_operation.py
def test_changed_configuration_does_not_resume(unbroken: pathlib.Path) -> None:
    code, _, err = finish(
        *QUICK, "--workdir", str(unbroken), "--config.train.steps=12", "--config.seed=7"
    )
    assert code == 2 and "seed: 0 -> 7" in err and "--allow-changes" in err and err.count("\n") == 1


@pytest.mark.slow  # as a dense run, in training/test_dense_resume.py
@pytest.mark.row("D8")
def test_finished_run_is_reported(unbroken: pathlib.Path) -> None:
    before = lines(unbroken)
    code, out, err = finish(
        *QUICK, "--workdir", str(unbroken), "--config.train.steps=12", "--config.train.save_every=4"
    )
    assert code == 0 and "done" in out, err
    assert lines(unbroken) == before


def test_preview_writes_an_image(tmp_path: pathlib.Path, monkeypatch, capsys) -> None:
    from PIL import Image

    monkeypatch.chdir(ROOT)
    assert (
        command.main(
            [*QUICK, "--workdir", str(tmp_path), "--mode=preview", "--config.train.batch_size=16"]
        )
        == 0
    )
    with Image.open(tmp_path / "preview.png") as sheet:
        assert min(sheet.size) > 200
    assert str(tmp_path / "preview.png") in capsys.readouterr().out

"""Launch scripts again: what a user or a network does to them."""

import os
import pathlib
import shutil
import signal
import subprocess

import pytest

from tests.launch_stage import LAUNCH, ROOT, RUN, Stage, stage  # noqa: F401

SLICE = [
    *("--name", "m3i", "--project", "p", "--zone", "z", "--type", "t", "--runtime", "r"),
    *("--mount", ":"),
]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], "--config configs/quickstart.py --workdir runs/quickstart"),
        (["--config.seed=3"], "--config configs/quickstart.py --workdir runs/quickstart"),
        (["--workdir", "a b"], "--config configs/quickstart.py"),
        (["--workdir=a b", "--config=c.py"], ""),
    ],
)
def test_the_quickstart_gives_no_flag_twice(
    stage: Stage,  # noqa: F811
    given: list[str],
    wanted: str,
) -> None:
    stage.python("exit 0")
    stage.stand_in("nvidia-smi", "exit 1")
    status, _, err = stage.run("launch/quickstart.sh", *given, M3I_EXTRA="")
    assert status == 0, err
    program, summary = stage.calls
    assert program == " ".join(filter(None, ("python -m m3i_jax.main", wanted, *given)))
    assert summary == ("python - a b" if "a b" in program else "python - runs/quickstart")


def test_a_moment_without_network_does_not_end_the_wait_for_a_tpu(
    stage: Stage,  # noqa: F811
) -> None:
    stage.stand_in("sleep", "exit 0")
    does = """case "$*" in
*describe*) [[ -e "$HOME/asked" ]] || { touch "$HOME/asked"; exit 1; }; echo ACTIVE ;;
*create*) echo "it exists" >&2; exit 1 ;;
*python.sh*) [[ -e "$HOME/served" ]] || { touch "$HOME/served"; exit 2; } ;;
esac"""
    stage.stand_in("gcloud", does)
    run = ["launch/tpu_vm.sh", "run", *SLICE, "--workdir", "/w", "--", *RUN]
    status, _, err = stage.run(*run)
    assert status == 0, err
    # a request that is refused each time ends it
    stage.stand_in("gcloud", "exit 1")
    status, _, err = stage.run(*run)
    assert status == 2 and "m3i could not be requested" in err


def test_a_copy_of_the_scripts_installs_the_version_that_made_it(
    stage: Stage,  # noqa: F811
    tmp_path: pathlib.Path,
) -> None:
    """`m3i-jax init DIR --launch` writes DIR/launch/VERSION; without it there is no project."""
    stage.stand_in("python", """case "$*" in
-V) echo Python 3.99 ;;
"-m venv"*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
esac""")  # fmt: skip
    shutil.copytree(LAUNCH, tmp_path / "mine/launch")
    settings = {"M3I_PYTHON": str(stage.place / "python"), "M3I_EXTRA": ""}
    script = str(tmp_path / "mine/launch/host.sh")
    status, _, err = stage.run(script, *RUN, **settings)
    assert (
        status == 2
        and "m3i-jax init DIR --launch" in err
        and not any("pip" in call for call in stage.calls)
    )
    (tmp_path / "mine/launch/VERSION").write_text("1.2.3\n")
    assert stage.run(script, *RUN, **settings)[0] == 0
    (install,) = [call for call in stage.calls if "-m pip" in call]
    assert install.endswith(" m3i-jax[train]==1.2.3")
    assert stage.run(script, *RUN, **settings | {"M3I_EXTRA": "cuda"})[0] == 0
    assert [call for call in stage.calls if "-m pip" in call][1].endswith("m3i-jax[cuda]==1.2.3")


def test_a_copy_of_the_scripts_reaches_the_workers_with_its_recipes(
    stage: Stage,  # noqa: F811
    tmp_path: pathlib.Path,
) -> None:
    shutil.copytree(LAUNCH, tmp_path / "mine/launch")
    (tmp_path / "mine/launch/VERSION").write_text("1.2.3\n")
    (tmp_path / "mine/folder.py").write_text("")
    does = 'case "$*" in *describe*) echo ACTIVE ;; *scp*) tar -tzf "$5" >"$HOME/there" ;; esac'
    stage.stand_in("gcloud", does)
    script = str(tmp_path / "mine/launch/tpu_vm.sh")
    status, _, err = stage.run(script, "run", *SLICE, "--workdir", "/w", "--", *RUN)
    assert status == 0, err
    there = (stage.place / "there").read_text().splitlines()
    assert {"folder.py", "launch/VERSION", "launch/host.sh", "launch/python.sh"} <= set(there)


def test_minutes_and_names_are_read_as_they_are_meant(
    stage: Stage,  # noqa: F811
) -> None:
    run = ["launch/tpu_vm.sh", "run", *SLICE, "--workdir", "/w", "--dry-run", "--wait", "090"]
    status, out, err = stage.run(*run, "--", *RUN)
    assert status == 0 and "((SECONDS > 90 * 60))" in out, err
    for hosts in ("n1, n2", "n1,,n2"):  # ssh would fail at one, while the others wait for it
        status, _, err = stage.run("launch/ssh.sh", "--hosts", hosts, "--workdir", "/w", "--", *RUN)
        assert status == 2 and f"--hosts {hosts}: give names joined by commas" in err
    assert not stage.calls


def test_variables_reach_also_what_mounts_the_data_on_a_worker(
    stage: Stage,  # noqa: F811
) -> None:
    stage.stand_in("tar", "exit 0")
    does = """case "$*" in
*describe*) echo ACTIVE ;;
*python.sh*)
    cd "$HOME" && mkdir -p m3i/launch && touch m3i/launch/python.sh
    bash -c "${@: -1}"
    ;;
esac"""
    stage.stand_in("gcloud", does)
    flags = "--cache-dir=/tmp/c --file-cache-max-size-mb=-1"
    run = ["launch/tpu_vm.sh", "run", *SLICE, "--workdir", "/w", "--env", f"M3I_GCSFUSE={flags}"]
    status, _, err = stage.run(*run, "--mount", 'echo "$M3I_GCSFUSE" >seen', "--", *RUN)
    assert status == 0, err
    assert (stage.place / "seen").read_text() == f"{flags}\n"


def test_a_machine_with_an_old_python_gets_a_new_one(
    stage: Stage,  # noqa: F811
) -> None:
    """By uv, which pip installs where it is missing, once."""
    for name in ("python3", *(f"python3.{minor}" for minor in range(11, 15))):
        stage.stand_in(name, '[[ "$*" == "-m pip"* ]] && cp "$HOME/new" "$HOME/.local/bin/uv"')
    (stage.place / ".local/bin").mkdir(parents=True)
    stage.stand_in("new", 'cp "$HOME/python" "$HOME/.local/bin/python3.13"')
    stage.stand_in("python", "exit 0")
    path = {"PATH": f"{stage.place}:/usr/bin:/bin"}
    assert stage.run("launch/python.sh", **path) == (0, "", "")
    assert [call for call in stage.calls if " install" in call] == [
        "python3 -m pip install --quiet --disable-pip-version-check --no-input --user uv",
        "new python install --no-progress 3.13",
    ]
    stage.log.unlink()
    assert stage.run("launch/python.sh", **path) == (0, "", "")
    assert not any("install" in call for call in stage.calls)
    # an interpreter whose path has a blank
    (stage.place / "a b").mkdir()
    stage.stand_in("a b/python", "exit 0")
    stage.log.unlink()
    with_blank = {"M3I_PYTHON": str(stage.place / "a b/python")}
    assert stage.run("launch/python.sh", **path, **with_blank) == (0, "", "")
    assert stage.calls and all(call.startswith("python -c") for call in stage.calls if "-c" in call)


@pytest.mark.parametrize(("limit", "again"), [("0", False), ("9999999999", False), ("1", True)])
def test_a_job_that_slurm_ends_is_queued_again_only_at_its_time_limit(
    limit: str,
    again: bool,
    stage: Stage,  # noqa: F811
) -> None:
    """scancel signals the shell of the job as well; requeued then, no job could be cancelled."""
    stage.stand_in(
        "srun",
        'for i in {1..300}; do [[ ! -e "$HOME/go" ]] || break; /bin/sleep 0.1; done; exit 42',
    )
    stage.stand_in("scontrol", "exit 0")
    job = {"SLURM_JOB_ID": "5", "SLURM_JOB_NUM_NODES": "2", "SLURM_SUBMIT_DIR": str(ROOT)}
    process = stage.start(
        "launch/slurm.sh", *RUN, "--workdir", "w", **job, SLURM_JOB_END_TIME=limit
    )
    stage.until("srun")
    process.send_signal(signal.SIGTERM)
    (stage.place / "go").touch()
    process.communicate(timeout=60)
    assert process.returncode == 42
    assert [call.split()[0] for call in stage.calls] == ["srun", "scontrol"][: 1 + again]


def test_an_interrupt_of_ssh_reaches_the_hosts_alone(
    stage: Stage,  # noqa: F811
    tmp_path: pathlib.Path,
) -> None:
    """A process that has the number of a host that ended is left alone."""
    (tmp_path / "there/launch").mkdir(parents=True)
    (tmp_path / "there/launch/host.sh").write_text(
        """trap 'exit 42' TERM; echo "up $*" >>"$LOG"; for i in {1..300}; do /bin/sleep 0.1; done"""
    )
    stage.stand_in("ssh", 'bash -c "$3"')
    where = ["--hosts", "n1", "--directory", str(tmp_path / "there"), "--workdir", "w"]
    port = str(20_000 + os.getpid() % 40_000)
    file = pathlib.Path(f"/tmp/m3i-{os.getuid()}-{port}.pid")
    try:
        process = stage.start("launch/ssh.sh", *where, "--port", port, "--", *RUN)
        stage.until("up ")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 42
        stop = next(call for call in stage.calls if "kill" in call).partition("n1 ")[2]
        with subprocess.Popen(["/bin/sleep", "60"]) as other:
            file.write_text(f"{other.pid}\n")
            assert stage.run("-c", stop)[0] == 1 and other.poll() is None
            other.kill()
    finally:
        file.unlink(missing_ok=True)


def test_a_second_start_on_a_worker_waits_for_the_first(
    stage: Stage,  # noqa: F811
    tmp_path: pathlib.Path,
) -> None:
    """gcloud starts the command again where the connection broke, while the first still runs."""
    stage.python(
        'for i in {1..300}; do [[ ! -e "$HOME/go" ]] || break; /bin/sleep 0.1; done; exit 7'
    )
    one = {"M3I_ONCE": str(tmp_path / "once"), "M3I_AGAIN": "0"}
    first = stage.start("launch/host.sh", *RUN, **one)
    stage.until("python")
    again = stage.start("launch/host.sh", *RUN, **one)
    assert again.stderr is not None and "waiting for its end" in again.stderr.readline()
    (stage.place / "go").touch()
    for process in (first, again):
        process.communicate(timeout=60)
        assert process.returncode == 7
    assert len(stage.calls) == 1
    # a start after its end runs, also of the same command
    assert stage.run("launch/host.sh", *RUN, **one)[0] == 7 and len(stage.calls) == 2
    # unless it is the same start: the connection of one worker broke after the run had ended
    for name, calls in (("a", 3), ("a", 3), ("b", 4), ("b", 4), ("a", 5)):
        assert stage.run("launch/host.sh", *RUN, **one, M3I_START=name)[0] == 7
        assert len(stage.calls) == calls


def test_the_quickstart_prints_a_loss_that_is_no_number(
    stage: Stage,  # noqa: F811
    tmp_path: pathlib.Path,
) -> None:
    stage.python('[[ "$1" == - ]] || exit 0; exec python3 "$@"')
    stage.stand_in("nvidia-smi", "exit 1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.5}\n{"step": 9, "loss": "nan"}\n'
    )
    status, out, err = stage.run(
        "launch/quickstart.sh", "--workdir", str(tmp_path / "run"), M3I_EXTRA=""
    )
    assert status == 0 and "loss: 2.500 at step 1, nan at step 9" in out, err

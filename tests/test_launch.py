"""The launch scripts: what a dry run prints, and what they do when a run ends. Fake commands stand
for everything that would leave this machine."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.launch_stage import LAUNCH, ROOT, RUN, Stage, stage  # noqa: F401

TPU = [
    "--name",
    "m3i",
    "--project",
    "p",
    "--zone",
    "z",
    "--type",
    "v5litepod-16",
    "--runtime",
    "r",
    "--spot",
    "--mount",
    "mount /w",
]


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    scripts = sorted(str(p.relative_to(ROOT)) for p in LAUNCH.glob("*.sh"))
    done = subprocess.run(
        ["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert len(scripts) >= 9 and done.returncode == 0, done.stdout


DRY = {
    "host": ["launch/host.sh", "--dry-run", *RUN, "--workdir", "/w/a b"],
    "ssh": [
        *("launch/ssh.sh", "--hosts", "me@n1,n2", "--workdir", "/w/a b", "--env", "A=b c"),
        *("--dry-run", "--", *RUN),
    ],
    "slurm": ["launch/slurm.sh", "--dry-run", *RUN, "--workdir", "/w/a b"],
    "tpu_vm": [
        *("launch/tpu_vm.sh", "run", *TPU, "--workdir", "/w/a b", "--env", "A=b c", "--dry-run"),
        *("--", *RUN),
    ],
    "gcsfuse": ["launch/gcsfuse.sh", "gs://images/a b", "/w/a b", "--dry-run"],
}


@pytest.mark.parametrize("name", DRY)
def test_a_dry_run_prints_and_does_nothing(name: str, stage: Stage) -> None:
    status, out, err = stage.run(*DRY[name])
    assert status == 0 and not err and not stage.calls
    assert "/w/a b" in out.replace("\\", "")
    if name != "gcsfuse":
        assert "configs/m3i.py:path=/d/imagenet" in out and "--workdir" in out
        assert "42" in out or name == "ssh"  # there each host goes on by itself
    if name not in ("gcsfuse", "host"):
        # everything else of a host is there, and the same for all
        assert "bash launch/host.sh" in out.replace("\\", "")


@pytest.mark.parametrize("name", DRY)
def test_what_a_dry_run_prints_can_be_pasted(name: str, stage: Stage) -> None:
    """Pasted into a shell, it calls the commands of the run itself, with the same arguments."""
    stage.python('(($(grep -c m3i_jax.main "$LOG") < 3)) && exit 42; exit 0')
    for command in ("gcsfuse", "scontrol", "ssh", "sudo", "sleep", "tar"):
        stage.stand_in(command, "exit 0")
    stage.stand_in("srun", "exit 42")
    stage.stand_in("mountpoint", '[[ -e "$HOME/seen" ]] || { touch "$HOME/seen"; exit 1; }')
    # absent until it is created, and then not yet active for a moment
    stage.stand_in(
        "gcloud",
        """cd "$HOME"
case "$*" in
*create*) echo PROVISIONING >state ;;
*describe*) [[ -e state ]] || exit 1; cat state; echo ACTIVE >state ;;
esac""",
    )
    job = {"SLURM_JOB_ID": "5", "SLURM_JOB_NUM_NODES": "2", "SLURM_SUBMIT_DIR": str(ROOT)}
    printed = stage.run(*DRY[name], **job)[1]
    results = []
    for command in (["-c", printed], [word for word in DRY[name] if word != "--dry-run"]):
        status, _, err = stage.run(*command, **job)
        assert status == (42 if name == "slurm" and command[0] != "-c" else 0), err
        calls = [re.sub(r"\S*m3i\S*\.tar\.gz|/tmp/tmp\S+gz", "ARCHIVE", c) for c in stage.calls]
        calls = [re.sub(r" M3I_START=\S+", "", call) for call in calls]  # another at every start
        dropped = ("describe", "sleep", "mountpoint")  # how often it looks
        results.append([call for call in calls if not any(word in call for word in dropped)])
        stage.log.unlink()
        (stage.place / "state").unlink(missing_ok=True)
    pasted, run = (sorted(calls) if name == "ssh" else calls for calls in results)
    assert pasted == run and len(run) >= 2, (pasted, run)


def test_outside_a_job_the_dry_run_of_slurm_submits_one(stage: Stage) -> None:
    stage.stand_in("sbatch", "exit 0")
    assert stage.run("-c", stage.run(*DRY["slurm"])[1])[0] == 0
    flags = f"{' '.join(RUN)} --workdir /w/a b"
    assert stage.calls == [f"sbatch --nodes=2 launch/slurm.sh {flags}"]


@pytest.mark.parametrize("name", sorted(path.name for path in LAUNCH.glob("*.sh")))
def test_help_is_the_head_of_the_script_and_nothing_else_happens(
    name: str, stage: Stage, tmp_path: pathlib.Path
) -> None:
    for tool in ("python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        stage.stand_in(tool, "exit 1")
    before = sorted(tmp_path.iterdir())
    for arguments in (["--help"], ["run", "-h"]):
        status, out, err = stage.run(f"launch/{name}", *arguments, M3I_VENV=str(tmp_path / "made"))
        assert status == 0 and not err and not stage.calls and sorted(tmp_path.iterdir()) == before
        first = (LAUNCH / name).read_text().splitlines()[1].removeprefix("# ")
        assert (
            name == "signals.sh"
            or out.startswith(first + "\n")
            and "shellcheck" not in out
            and "SBATCH" not in out
        )
    if name != "signals.sh" and name != "environment.sh":
        assert f"launch/{name}" in out  # how it is called


def test_dry_runs_say_who_is_who(stage: Stage) -> None:
    ssh = stage.run(*DRY["ssh"])[1].replace("\\", "").splitlines()
    assert [line.split()[1:3] for line in ssh[:2]] == [
        ["-oServerAliveInterval=60", host] for host in ("me@n1", "n2")
    ]
    assert all(
        "--coordinator n1:8476 --processes 2" in line and f"--process-id {i}" in line
        for i, line in enumerate(ssh[:2])
    )
    assert ssh[2:] == ["wait"] and all("exec env A=b c bash " in line for line in ssh[:2])
    job = {"SLURM_JOB_ID": "70001", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "n[1-3]"}
    stage.stand_in("scontrol", "printf 'n1\\nn2\\nn3\\n'")
    slurm = stage.run(*DRY["slurm"], **job)[1]
    assert (
        f"--coordinator n1:{61440 + 70001 % 4096} --processes 3" in slurm
        and "SLURM_PROCID" in slurm
        and "requeue 70001" in slurm
    )
    tpu = stage.run(*DRY["tpu_vm"])[1]
    assert "--coordinator" not in tpu  # the slice knows
    # a worker that runs again by itself would wait for those that do not
    assert "cd m3i && env M3I_AGAIN=0 M3I_ONCE=.once A=b c bash launch/host.sh" in tpu.replace(
        "\\", ""
    )
    order = [
        "queued-resources create m3i",
        "queued-resources describe m3i",
        "== ACTIVE",
        " scp ",
        "mount /w",
        "launch/host.sh",
    ]
    assert [tpu.find(step) for step in order] == sorted(
        tpu.index(step) for step in order
    ) and "--spot" in tpu


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        (["launch/ssh.sh", "--workdir", "w", "--", *RUN], "--hosts is missing"),
        (["launch/ssh.sh", "--hosts", "a", "--", *RUN], "--workdir is missing"),
        (["launch/ssh.sh", "--host", "a"], "--host: unknown flag"),
        (["launch/slurm.sh", "--workdir", "w", *RUN], "not in a Slurm job"),
        (["launch/slurm.sh", "--dry-run", *RUN], "--workdir is missing"),
        (["launch/ssh.sh", "--env", "A"], "--env needs NAME=VALUE"),
        (["launch/tpu_vm.sh", "run", "--env", "1=2"], "--env needs NAME=VALUE"),
        (["launch/tpu_vm.sh", "start"], "the first argument must be create, run or delete"),
        (["launch/tpu_vm.sh", "run", *TPU, "--", *RUN], "--workdir is missing"),
        (
            ["launch/tpu_vm.sh", "run", *TPU[:-2], "--workdir", "w", "--", *RUN],
            "--mount or --data gs://BUCKET is missing",
        ),
        (
            ["launch/tpu_vm.sh", "run", *TPU[:-2], "--workdir", "/w", "--data", "gs://images"],
            "--workdir /w: is not in the bucket, which is mounted at /mnt/m3i",
        ),
        (
            ["launch/tpu_vm.sh", "run", *TPU, "--workdir", "/w", "--data", "images"],
            "--data images: give gs://BUCKET",
        ),
        (
            ["launch/tpu_vm.sh", "run", *TPU, "--workdir", "/w", "--data", "gs://UPPER"],
            "gs://UPPER: give a bucket",
        ),
        (
            ["launch/tpu_vm.sh", "run", *TPU, "--workdir", "/w", "--wait", "soon"],
            "--wait soon: give a whole number of minutes",
        ),
        (["launch/gcsfuse.sh"], "nothing: give a bucket or a folder of one"),
        (["launch/gcsfuse.sh", "gs://images", "data"], "data: give the whole path of a directory"),
        (["launch/tpu_vm.sh", "delete", "--name", "a", "--zone", "z"], "--project is missing"),
        (["launch/apply.sh", "launch/none.yaml"], "give a file"),
        (["launch/apply.sh", "launch/gke.yaml", "--dry-run"], "M3I_ACCELERATOR"),
        (["launch/gcluster.sh", "--dry-run"], "M3I_NAME M3I_IMAGE"),
        (["launch/gcluster.sh", "--queue", "q"], "--queue: unknown flag"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_started(
    command: list[str], wanted: str, stage: Stage
) -> None:
    status, out, err = stage.run(*command)
    assert status == 2 and wanted in err and err.count("\n") == 1 and not out and not stage.calls


def test_a_host_runs_again_after_42_and_only_then(stage: Stage) -> None:
    stage.python('(($(wc -l <"$LOG") < 3)) && exit 42; exit "${LAST:-0}"')
    assert stage.run("launch/host.sh", *RUN, "--workdir", "w")[0] == 0
    assert stage.calls == [f"python -m m3i_jax.main {' '.join(RUN)} --workdir w"] * 3
    stage.log.unlink()
    assert stage.run("launch/host.sh", *RUN, LAST="2")[0] == 2 and len(stage.calls) == 3
    stage.log.unlink()
    assert stage.run("launch/host.sh", *RUN, M3I_AGAIN="0")[0] == 42 and len(stage.calls) == 1


def test_a_host_keeps_its_heap_on_a_cpu_and_only_there(stage: Stage) -> None:
    stage.python(
        'echo "heap ${MALLOC_ARENA_MAX:-none} ${MALLOC_TOP_PAD_:-none} ${GLIBC_TUNABLES:-none}"'
        ' >>"$LOG"'
    )
    heaps, rest = 2 * (os.cpu_count() or 1), "268435456 glibc.malloc.hugetlb=1"
    cases = (
        ("", {}, f"{heaps} {rest}"),
        ("cuda", {}, "none none none"),
        ("", {"MALLOC_ARENA_MAX": "1"}, f"1 {rest}"),
    )
    for extra, more, wanted in cases:
        assert stage.run("launch/host.sh", *RUN, M3I_EXTRA=extra, **more)[0] == 0
        assert stage.calls[-1] == f"heap {wanted}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_host_that_is_stopped_lets_the_run_save_first(number: int, stage: Stage) -> None:
    stage.python(
        "trap '/bin/sleep 0.3; echo saved >>\"$LOG\"; exit 42' TERM\nfor i in {1..300}; do"
        " /bin/sleep 0.1; done"
    )
    process = stage.start("launch/host.sh", *RUN)
    stage.until("python")
    time.sleep(0.2)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 42 and [
        call for call in stage.calls if not call.startswith("python")
    ] == ["saved"]
    assert len(stage.calls) == 2


def test_hosts_that_share_an_environment_make_it_once(stage: Stage) -> None:
    """The second host starts while the first installs: it logs that it waits, finds the environment
    complete, and runs."""
    stage.stand_in("python", f"""case "$*" in
-V) echo Python 3.99 ;;
"-m venv"*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip"*) for i in {{1..300}}; do [[ ! -e "$HOME/go" ]] || break; /bin/sleep 0.1; done ;;
"-m m3i"*) ;;
*) exec {sys.executable} "$@" ;;
esac""")  # fmt: skip
    settings = {
        "M3I_PYTHON": str(stage.place / "python"),
        "M3I_VENV": str(stage.place / "shared/venv/"),
        "M3I_EXTRA": "",
    }
    first = stage.start("launch/host.sh", "--workdir", "w", **settings)
    try:
        stage.until("-m pip")
        second = stage.start("launch/host.sh", "--workdir", "w", **settings)
        assert second.stdout and "another process is creating" in second.stdout.readline()
    finally:
        (stage.place / "go").touch()
    ends = [process.communicate(timeout=60) for process in (first, second)]
    assert first.returncode == second.returncode == 0, ends
    assert ends[1] == ("", "") and "waiting" not in ends[0][0]
    assert [
        sum(f"-m {what}" in call for call in stage.calls)
        for what in ("venv", "pip", "m3i_jax.main")
    ] == [1, 1, 2]


def test_slurm_queues_a_preempted_job_again(stage: Stage) -> None:
    job = {"SLURM_JOB_ID": "5", "SLURM_JOB_NUM_NODES": "2", "SLURM_SUBMIT_DIR": str(ROOT)}
    stage.stand_in("scontrol", "exit 0")
    for code in (42, 143):  # SIGTERM in training; before it
        stage.stand_in("srun", f"exit {code}")
        assert stage.run("launch/slurm.sh", *RUN, "--workdir", "w", **job)[0] == code
        assert [call.split()[0] for call in stage.calls] == ["srun", "scontrol"]
        assert stage.calls[1] == "scontrol requeue 5"
        stage.log.unlink()
    stage.stand_in("srun", "exit 2")
    assert stage.run("launch/slurm.sh", *RUN, "--workdir", "w", **job)[0] == 2
    assert [call.split()[0] for call in stage.calls] == ["srun"]


def test_slurm_gives_every_node_its_number(stage: Stage, tmp_path: pathlib.Path) -> None:
    """The command of srun, run as node 1 of 2, with a host.sh that prints its arguments."""
    (tmp_path / "job/launch").mkdir(parents=True)
    (tmp_path / "job/launch/host.sh").write_text('echo "host $M3I_AGAIN $*"\n')
    stage.stand_in("srun", 'while [[ "$1" == --* ]]; do shift; done; SLURM_PROCID=1 "$@"')
    (tmp_path / "away").mkdir()
    away = {"SLURM_JOB_ID": "5", "SLURM_SUBMIT_DIR": str(tmp_path / "away")}
    status, _, err = stage.run(str(LAUNCH / "slurm.sh"), *RUN, "--workdir", "w", **away)
    assert status == 2 and "submit the job from the project" in err and not stage.calls
    job = {
        "SLURM_JOB_ID": "5",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_SUBMIT_DIR": str(tmp_path / "job"),
    }
    status, out, err = stage.run(str(LAUNCH / "slurm.sh"), *RUN, "--workdir", "a b", **job)
    assert status == 0, err
    assert (
        out == f"host 0 {' '.join(RUN)} --workdir a b --coordinator FIRST-NODE:61445 --processes 2"
        " --process-id 1\n"
    )
    (call,) = stage.calls  # all cores of a node, one process on each
    assert call.startswith("srun --kill-on-bad-exit=0 --ntasks=2 --ntasks-per-node=1 --cpu-bind=n")


def test_ssh_starts_all_and_ends_with_the_first_failure(
    stage: Stage, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "there/launch").mkdir(parents=True)
    (tmp_path / "there/launch/host.sh").write_text(
        'echo "$*"; [[ "$*" == *"--process-id 1"* ]] && exit 7; exit 0\n'
    )
    stage.stand_in("ssh", 'bash -c "$3"')
    where = [
        "--hosts",
        "n1,n2",
        "--directory",
        str(tmp_path / "there"),
        "--port",
        "8999",
        "--workdir",
        "a b",
    ]
    status, out, err = stage.run("launch/ssh.sh", *where, "--", *RUN)
    assert status == 7 and not err
    flags = f"{' '.join(RUN)} --workdir a b --coordinator n1:8999 --processes 2 --process-id"
    assert sorted(out.splitlines()) == [f"n1: {flags} 0", f"n2: {flags} 1"]


def test_a_tpu_that_is_taken_away_is_ordered_again(stage: Stage) -> None:
    """Absent, active, the run fails, active for two more checks, being suspended (and not deleted
    while it is), suspended, deleted, absent, active, the run is done."""
    stage.stand_in("sleep", '[[ "$1" == 0.5 ]]')
    states = [
        "",
        "PROVISIONING",
        "ACTIVE",
        "ACTIVE",
        "ACTIVE",
        "SUSPENDING",
        "SUSPENDING",
        "SUSPENDED",
        "",
        "ACTIVE",
    ]
    (stage.place / "states").write_text("\n".join(states) + "\n")
    stage.stand_in(
        "gcloud",
        f"""cd {stage.place}
case "$*" in
*describe*) state=$(head -n 1 states); sed -i 1d states
    [[ -n "$state" ]] || exit 1; echo "$state" ;;
*host.sh*) if [[ ! -e ran ]]; then touch ran; exit 255; fi ;;
esac
exit 0""",
    )
    status, _, err = stage.run(
        "launch/tpu_vm.sh", "run", *TPU, "--workdir", "/w", "--", *RUN, M3I_PAUSE="0.5"
    )
    assert status == 0, err
    verbs = ["create", "delete", "scp", "host.sh"]
    did = [
        next(v for v in verbs if v in call) for call in stage.calls if any(v in call for v in verbs)
    ]
    assert did == ["create", "scp", "host.sh", "delete", "create", "scp", "host.sh"]
    names = [found[1] for call in stage.calls if (found := re.search(r"M3I_START=(\S+)", call))]
    assert len(set(names)) == 2  # the second run is another start
    assert not (stage.place / "states").read_text()


def test_the_wait_for_a_tpu_has_a_limit_and_a_reason(stage: Stage) -> None:
    stage.stand_in("sleep", "exit 0")
    run = ["launch/tpu_vm.sh", "run", *TPU, "--workdir", "/w", "--wait", "0", "--", *RUN]
    stage.stand_in("gcloud", 'case "$*" in *describe*) echo WAITING_FOR_RESOURCES ;; esac')
    status, _, err = stage.run(*run)
    last = err.splitlines()[-1]
    assert status == 2 and "m3i is still WAITING_FOR_RESOURCES after 0 minutes" in last
    assert "the same command waits on" in last and len(stage.calls) == 1
    # a request that fails is repeated, but not for ever
    stage.log.unlink()
    stage.stand_in(
        "gcloud", """case "$*" in *failedData*) echo No quota. ;; *describe*) echo FAILED ;; esac"""
    )
    status, _, err = stage.run(*[word if word != "0" else "60" for word in run])
    assert status == 2
    assert err.splitlines()[-1].endswith("the request for m3i failed three times: No quota.")
    assert sum("delete" in call for call in stage.calls) == 2


def test_a_bucket_is_mounted_on_every_worker_before_the_run(stage: Stage) -> None:
    stage.stand_in("gcloud", 'case "$*" in *describe*) echo ACTIVE ;; esac')
    run = ["launch/tpu_vm.sh", "run", *TPU[:-2], "--workdir", "/mnt/m3i/runs/1"]
    assert stage.run(*run, "--data", "gs://images/a b", "--", *RUN)[0] == 0
    prepare, start = [call for call in stage.calls if " ssh " in call]
    assert "--worker all" in prepare and start.endswith("--workdir /mnt/m3i/runs/1")
    assert prepare.endswith("/python.sh && bash m3i/launch/gcsfuse.sh gs://images/a\\ b /mnt/m3i")
    # the part of it that a worker without such a directory runs
    stage.log.unlink()
    run = ["launch/tpu_vm.sh", "run", *TPU, "--workdir", "/w", "--data", "/no/such", "--", *RUN]
    assert stage.run(*run)[0] == 0
    prepare = next(call for call in stage.calls if "tar.gz &&" in call)
    status, _, err = stage.run("-c", prepare.partition("{ mount /w; } && ")[2])
    assert status == 2 and err.startswith("--data /no/such: no such directory on ")


def test_a_bucket_is_mounted_once_and_gcsfuse_installed_if_it_is_missing(stage: Stage) -> None:
    mount = ["launch/gcsfuse.sh", "gs://images/train", "/w/m"]
    mounted = '[[ -e "$HOME/mounted" ]]'
    stage.stand_in("mountpoint", mounted)
    stage.stand_in("findmnt", "echo images")
    stage.stand_in("ps", "exit 0")
    stage.stand_in("sudo", "exit 0")
    stage.stand_in("gcsfuse", 'touch "$HOME/mounted"')
    flags = {"M3I_GCSFUSE": "--cache-dir=/tmp/c --file-cache-max-size-mb=-1"}
    assert stage.run(*mount, **flags) == (0, "", "")
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    assert [c for c in stage.calls if "mountpoint" not in c and c[:3] != "ps "] == [
        f"sudo install -d -o {user} /w/m",
        # saves rename directories; hosts see what others have replaced
        "gcsfuse --implicit-dirs --rename-dir-limit=200000 --metadata-cache-ttl-secs=60"
        f" --only-dir train {flags['M3I_GCSFUSE']} images /w/m",
    ]
    stage.log.unlink()
    assert stage.run(*mount)[0] == 0 and not any("gcsfuse" in call for call in stage.calls)
    for process, wanted in (
        ("--only-dir val images /w/m", 2),
        ("images /w/m", 2),
        ("--only-dir train images /w/m", 0),
        ("--only-dir val images /w/m2", 0),  # of another directory
    ):
        stage.stand_in("ps", f"echo gcsfuse --foreground --implicit-dirs {process}")
        status, _, err = stage.run(*mount)
        assert status == wanted and ("another folder of gs://images" in err) == bool(wanted)
    stage.stand_in("findmnt", "echo others")
    status, _, err = stage.run(*mount)
    assert status == 2 and "/w/m: others is mounted there" in err
    # without a mount after all, and without gcsfuse, which then is installed
    (stage.place / "mounted").unlink()
    stage.stand_in("gcsfuse", "exit 0")
    assert "gs://images/train is not mounted at /w/m" in stage.run(*mount)[2]
    (stage.place / "gcsfuse").unlink()
    stage.log.unlink()
    stage.stand_in("curl", "exit 0")
    made = 'case "$*" in tee*) cat >/dev/null ;; *gcsfuse) cp "$HOME/ready" "$HOME/gcsfuse" ;; esac'
    stage.stand_in("ready", 'touch "$HOME/mounted"')
    stage.stand_in("sudo", made)
    assert stage.run(*mount) == (0, "", "")
    steps = [" ".join(call.split()[:2]) for call in stage.calls if "mountpoint" not in call]
    assert set(steps[:2]) == {"curl -fsS", "sudo tee"} and steps.count("sudo apt-get") == 2
    stage.stand_in("sudo", "exit 1")
    for name in ("gcsfuse", "mounted"):
        (stage.place / name).unlink()
    status, _, err = stage.run(*mount)
    assert (
        status == 2
        and err == "gcsfuse.sh: gcsfuse could not be installed; see the messages above\n"
    )


@pytest.mark.parametrize(
    ("ended", "looks"), [("2", 0), ("3", 0), ("1", 10)]
)  # refused, does not fit; failed, or ssh did
def test_a_run_that_fails_on_a_tpu_that_is_there_is_not_repeated(
    ended: str, looks: int, stage: Stage
) -> None:
    stage.stand_in("sleep", "exit 0")
    stage.stand_in(
        "gcloud", f'case "$*" in *describe*) echo ACTIVE ;; *host.sh*) exit {ended} ;; esac; exit 0'
    )
    status, _, err = stage.run("launch/tpu_vm.sh", "run", *TPU, "--workdir", "/w", "--", *RUN)
    assert status == 2 and f"exited with {ended} on a slice that still exists" in err
    assert sum("describe" in call for call in stage.calls) == 1 + looks and sum(
        "sleep" in call for call in stage.calls
    ) == max(0, looks - 1)
    assert sum("host.sh" in call for call in stage.calls) == 1 and not any(
        "delete" in call for call in stage.calls
    )

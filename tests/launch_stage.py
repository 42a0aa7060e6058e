"""Fake commands for the tests of the launch scripts."""

import os
import pathlib
import subprocess
import time

import pytest

from tests.interruptible import interruptible

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
RUN = ["--config", "configs/m3i.py:path=/d/imagenet"]


class Stage:
    """A directory of fake commands that is first on the PATH. Each call of one is a line of
    `calls`."""

    def __init__(self, place: pathlib.Path):
        self.place, self.log = place, place / "calls"
        self.environment = {
            "PATH": f"{place}:{os.environ['PATH']}",
            "HOME": str(place),
            "LOG": str(self.log),
        }
        for name in (
            *("gcloud", "gcluster", "gcsfuse", "kubectl", "mountpoint", "sbatch", "scontrol"),
            *("sleep", "srun", "ssh", "sudo"),
        ):
            self.stand_in(name, "exit 1")

    def stand_in(self, name: str, does: str) -> None:
        path = self.place / name
        path.write_text(f'#!/usr/bin/env bash\necho "{path.name} $*" >>"$LOG"\n{does}\n')
        path.chmod(0o755)

    def python(self, does: str) -> None:
        """The fake Python of the virtual environment, for host.sh."""
        (self.place / "venv/bin").mkdir(parents=True)
        self.stand_in("venv/bin/python", does)
        self.environment |= {"M3I_VENV": str(self.place / "venv"), "M3I_INSTALL": "0"}

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        # A shell cannot trap what was ignored when it began, as SIGINT is where these tests run in
        # the background of another shell.
        with interruptible():
            return subprocess.Popen(
                ["bash", *command],
                cwd=ROOT,
                env=self.environment | environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )

    def run(self, *command: str, **environment: str) -> tuple[int, str, str]:
        process = self.start(*command, **environment)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def until(self, call: str) -> None:
        """Wait until this command was called."""
        deadline = time.monotonic() + 30
        while not any(call in line for line in self.calls) and time.monotonic() < deadline:
            time.sleep(0.02)

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def stage(tmp_path: pathlib.Path) -> Stage:
    return Stage(tmp_path)

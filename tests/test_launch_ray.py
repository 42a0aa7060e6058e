"""launch/ray_train.py: what it asks of Ray's JaxTrainer, and what becomes of the exit codes of the
program. Stand-ins take the place of Ray; a slow test has the real one, if it is installed."""

import os
import pathlib
import runpy
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

from tests.launch_stage import LAUNCH

SCRIPT = str(LAUNCH / "ray_train.py")
RUN = ["--config", "c.py", "--workdir", "w"]


class TrainingFailedError(Exception):
    pass


class FakeRay:
    """Modules that stand in for Ray's. `answers` are the exit codes of the program, one a call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: dict[str, Any] = {}
        self.commands: list[list[str]] = []
        self.answers: list[int] = [0]
        context = types.SimpleNamespace(get_world_rank=lambda: 1, get_world_size=lambda: 3)
        train = types.SimpleNamespace(
            ScalingConfig=lambda **values: values,
            FailureConfig=lambda failures: failures,
            RunConfig=lambda **values: values,
            TrainingFailedError=TrainingFailedError,
            get_context=lambda: context,
        )
        modules = {
            "ray": types.SimpleNamespace(
                train=train, util=types.SimpleNamespace(get_node_ip_address=lambda: "10.0.0.2")
            ),
            "ray.train": train,
            "ray.train.collective": types.SimpleNamespace(
                broadcast_from_rank_zero=lambda mine: "10.0.0.1:5000"
            ),
            "ray.train.v2.jax": types.SimpleNamespace(JaxConfig=lambda: "no", JaxTrainer=self),
        }
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(subprocess, "run", self.run)

    def __call__(self, host: Callable[[dict[str, Any]], int], **asked: Any) -> "FakeRay":
        self.asked, self.host = asked, host
        return self

    def fit(self) -> Any:
        return types.SimpleNamespace(return_value=self.host(self.asked["train_loop_config"]))

    def run(self, command: list[str], **_: Any) -> Any:
        self.commands.append(command)
        return types.SimpleNamespace(returncode=self.answers.pop(0))

    def script(self, *arguments: str) -> Any:
        """The exit of the script: a code, or a text for one line and code 1."""
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(sys, "argv", ["ray_train.py", *arguments])
            runpy.run_path(SCRIPT, run_name="__main__")
        return ended.value.code


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    return FakeRay(monkeypatch)


def test_a_preempted_host_runs_again_and_ray_initializes_nothing(ray: FakeRay) -> None:
    ray.answers = [42, 42, 0]
    assert ray.script("--workers", "3", "--gpus", "8", "--restarts", "4", "--", *RUN) == 0
    hosts = ["--coordinator", "10.0.0.1:5000", "--processes", "3", "--process-id", "1"]
    assert ray.commands == [[sys.executable, "-m", "m3i_jax.main", *RUN, *hosts]] * 3
    assert ray.asked["jax_config"] == "no" and ray.asked["run_config"] == {"failure_config": 4}
    assert ray.asked["scaling_config"] == {
        "num_workers": 3,
        "use_gpu": True,
        "resources_per_worker": {"GPU": 8},
    }


def test_a_tpu_slice_knows_its_hosts(ray: FakeRay) -> None:
    topology = ["--topology", "4x4", "--accelerator", "TPU-V6E"]
    assert ray.script("--workers", "4", *topology, "--", *RUN) == 0
    assert ray.commands == [[sys.executable, "-m", "m3i_jax.main", *RUN]]
    assert ray.asked["scaling_config"] == {
        "num_workers": 4,
        "use_tpu": True,
        "topology": "4x4",
        "accelerator_type": "TPU-V6E",
    }


def test_refusals_end_the_script_and_failures_are_rays(ray: FakeRay) -> None:
    for code in (2, 3):
        ray.answers = [code]
        assert ray.script("--", *RUN) == code
    ray.answers = [1]
    with pytest.raises(RuntimeError, match="a host ended with 1; its output says why"):
        ray.script("--", *RUN)

    def fails() -> None:
        raise TrainingFailedError("worker 1\n  a host ended with 1")

    ray.fit = fails  # type: ignore[method-assign]
    assert ray.script("--", *RUN) == "ray_train.py: worker 1 a host ended with 1"
    assert ray.script("--workers", "2") == 2  # no arguments of the run


@pytest.mark.slow
def test_with_ray_a_refusal_is_not_repeated_and_a_failure_is(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("ray", minversion="2.60", reason="Ray is not installed")
    (tmp_path / "m3i_jax").mkdir()
    (tmp_path / "m3i_jax/__init__.py").write_text("")
    (tmp_path / "m3i_jax/main.py").write_text(
        "import pathlib, sys\n"
        "log = pathlib.Path(sys.argv[2])\n"
        "log.open('a').write(' '.join(sys.argv[3:]) + chr(10))\n"
        "sys.exit(int(sys.argv[2 + len(log.read_text().splitlines())].split('=')[0][2:]))\n"
    )
    log = tmp_path / "log"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--restarts=1", "--", "--log", str(log), "--1=", "--42=", "--2="],
        env=environment,
        capture_output=True,
        check=False,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2, done.stderr
    assert len(log.read_text().splitlines()) == 3

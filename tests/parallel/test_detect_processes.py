"""The processes of a run from flags, TPU variables, Slurm and the environment."""

from typing import Any

import pytest

from m3i_jax.errors import UserError
from m3i_jax.parallel import distributed
from m3i_jax.parallel.distributed import ProcessInfo, detect_processes

SLURM = {
    "SLURM_JOB_ID": "4099",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
JAX = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:99", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


def test_flags_then_tpu_then_slurm_then_environment() -> None:
    everything = SLURM | JAX
    assert detect_processes("a:1", "8", "7", environ=everything, tpu=True) == ProcessInfo(
        source="flags", coordinator="a:1", processes=8, process=7
    )
    assert detect_processes("", "", "", environ=everything, tpu=True) == ProcessInfo(
        source="TPU metadata", processes=0
    )
    slurm = detect_processes("", "", "", environ=everything, tpu=False)
    assert slurm == ProcessInfo(
        source="Slurm", coordinator="gpu07:61443", processes=4, process=3, devices=(1,)
    )
    assert detect_processes("", "", "", environ=JAX, tpu=False) == ProcessInfo(
        source="environment", coordinator="10.0.0.1:99", processes=2, process=1
    )
    assert detect_processes("", "", "", environ={}, tpu=False) == ProcessInfo(source="alone")


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, ProcessInfo(source="TPU variables", coordinator="t0:8482", processes=3, process=2)),
        ({"TPU_WORKER_HOSTNAMES": "t0:8471, t1:8471"}, None),  # numbers from 0
        (
            {"TPU_WORKER_HOSTNAMES": "t0:8471, t1:8471", "TPU_WORKER_ID": "1"},
            ProcessInfo(source="TPU variables", coordinator="t0:8482", processes=2, process=1),
        ),
        (
            {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
            ProcessInfo(source="TPU variables", coordinator="localhost:8482"),
        ),
        ({"TPU_WORKER_HOSTNAMES": ""}, None),
        ({"TPU_WORKER_HOSTNAMES": "t0,,t2"}, None),
        ({"TPU_WORKER_ID": ""}, None),
        ({"MEGASCALE_NUM_SLICES": "2"}, None),
        ({"TPU_PROCESS_ADDRESSES": "t0:8476,t0:8477"}, None),
        ({"TPU_PROCESS_ADDRESSES": ""}, None),
        ({"TPU_PROCESS_ADDRESSES": "local"}, ProcessInfo(source="TPU variables")),  # a notebook
        ({"TPU_PROCESS_ADDRESSES": "t0:8476", "MEGASCALE_NUM_SLICES": "2"}, None),
    ],
)
def test_a_tpu_whose_variables_name_all_hosts_meets_them_by_name(
    variables: dict[str, str], wanted: ProcessInfo | None
) -> None:
    environ = {"TPU_WORKER_HOSTNAMES": "t0,t1,t2", "TPU_WORKER_ID": "2"} | JAX | variables
    assert detect_processes("", "", "", environ=environ, tpu=True) == (
        wanted or ProcessInfo(source="TPU metadata", processes=0)
    )
    assert detect_processes("", "", "", environ=environ, tpu=False).source == "environment"


def test_an_empty_list_of_platforms_allows_a_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for jax; hosts of a pod would not know of each other."""
    monkeypatch.setattr(distributed.glob, "glob", lambda pattern: ["/dev/accel0"])
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: name)
    wanted = {"": True, "tpu,cpu": True, "cpu": False}
    assert {text: distributed.on_tpu({"JAX_PLATFORMS": text}) for text in wanted} == wanted
    assert distributed.on_tpu({})


def test_a_tpu_whose_hosts_jax_does_not_find_is_refused_on_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def initialize(**options: Any) -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(distributed.jax.distributed, "initialize", initialize)
    metadata = detect_processes("", "", "", environ={}, tpu=True)
    with pytest.raises(UserError, match="TPU_WORKER_HOSTNAMES=localhost"):
        distributed.initialize(metadata)


def test_slurm_one_process_a_node_has_all_devices_of_it() -> None:
    node = SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    assert detect_processes("", "", "", environ=node, tpu=False).devices is None
    # In a batch script, outside srun, this process is alone whatever the job has.
    assert (
        detect_processes(
            "", "", "", environ=node | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, tpu=False
        ).source
        == "alone"
    )


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, (1,)),  # --gpus-per-node=2: both see both
        ({"CUDA_VISIBLE_DEVICES": "0"}, None),  # --gpu-bind=single:1
        ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_PER_TASK": "1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "a100:2"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "1"}, (1,)),  # --gpu-bind=none
        ({"CUDA_VISIBLE_DEVICES": ""}, (1,)),
    ],
)
def test_slurm_may_show_each_process_its_own_devices(
    variables: dict[str, str], wanted: tuple[int, ...] | None
) -> None:
    """Then the second process of a node has no device 1, or one that is not the only one."""
    environ = SLURM | variables
    assert detect_processes("", "", "", environ=environ, tpu=False).devices == wanted


@pytest.mark.parametrize(
    ("flags", "environ", "wanted"),
    [
        (("a", "2", ""), {}, "--process-id: missing"),
        (("", "2", "0"), {}, "--coordinator: missing"),
        (
            ("a:99999", "2", "0"),
            {},
            "--coordinator: the port of 'a:99999' is not between 1 and 65535",
        ),
        (("a:0", "2", "0"), {}, "not between 1 and 65535"),
        (("a:" + "9" * 5000, "2", "0"), {}, "not between 1 and 65535"),
        (("a", "two", "0"), {}, "--processes: 'two' is not a whole number"),
        (("a", "2", "-1"), {}, "--process-id: '-1' is not a whole number"),
        (("a", "2", "2"), {}, "--process-id: 2 must be less than the 2 processes"),
        (("a", "0", "0"), {}, "--processes: 0 must be at least 1"),
        (
            ("", "", ""),
            {"JAX_COORDINATOR_ADDRESS": "a:1"},
            "JAX_NUM_PROCESSES, JAX_PROCESS_ID: missing",
        ),
    ],
)
def test_what_is_missing_or_wrong_is_named(
    flags: tuple[str, str, str], environ: dict[str, str], wanted: str
) -> None:
    with pytest.raises(UserError) as error:
        detect_processes(*flags, environ=environ, tpu=False)
    assert wanted in str(error.value)


def test_a_tpu_needs_chips_libtpu_and_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        distributed.glob, "glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern else []
    )
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: object())
    assert (
        distributed.on_tpu({})
        and distributed.on_tpu({"JAX_PLATFORMS": "tpu,cpu"})
        and not distributed.on_tpu({"JAX_PLATFORMS": "cpu"})
    )
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    assert not distributed.on_tpu({})

"""Detecting the processes of a run, initializing jax.distributed, and checking that all hosts run
the same program with the same settings.

The processes come from the first of these: the flags --coordinator, --processes, --process-id; the
TPU's variables; Slurm; the environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES,
JAX_PROCESS_ID. Without any of them the run has one process."""

import dataclasses
import glob
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import signal
import socket
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

from m3i_jax import version
from m3i_jax.errors import UserError
from m3i_jax.parallel import barriers, heartbeat, programs, rendezvous
from m3i_jax.parallel.kernel_calls import KERNELS, kernel_setting

PORT = 8476
TPU_PORT = 8482  # jax's choice: the TPU runtime may listen at 8476


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessInfo:
    """This process among those of the run.

    Attributes:
      source: where the other fields come from, for messages.
      coordinator: HOST:PORT of process 0.
      processes: their number; 0: jax reads it from the TPU's metadata.
      process: index of this one.
      devices: local device ids of this process; None: all.
    """

    source: str
    coordinator: str = ""
    processes: int = 1
    process: int = 0
    devices: tuple[int, ...] | None = None


def on_tpu(environ: Mapping[str, str]) -> bool:
    """Whether this machine has a TPU that jax may use; initializes no device.

    >>> on_tpu({"JAX_PLATFORMS": "cpu"})
    False
    """
    allowed = "tpu" in (environ.get("JAX_PLATFORMS") or "tpu")  # empty: any, as for jax
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(allowed and chips and importlib.util.find_spec("libtpu"))


def _integer(name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text.strip()):
        raise UserError(f"{name}: {text[:60]!r} is not a whole number")
    return int(text)


def _from_values(
    source: str, names: tuple[str, str, str], values: tuple[str, str, str]
) -> ProcessInfo:
    """Process info from an address, a count and an index that a user or a launcher gave."""
    absent = [name for name, value in zip(names, values, strict=True) if value == ""]
    if absent:
        raise UserError(
            f"{', '.join(absent)}: missing; {', '.join(names[:2])} and {names[2]} must be given"
            " together"
        )
    address, count, number = values[0], _integer(names[1], values[1]), _integer(names[2], values[2])
    if count < 1:
        raise UserError(f"{names[1]}: {count} must be at least 1")
    if number >= count:
        raise UserError(
            f"{names[2]}: {number} must be less than the {count} processes; they are numbered"
            " from 0"
        )
    if not re.fullmatch(r".+:\d+", address):
        address += f":{PORT}"
    port = address.rpartition(":")[2]
    if len(port) > 5 or not 0 < int(port) < 2**16:
        raise UserError(
            f"{names[0]}: the port of {values[0][:60]!r} is not between 1 and 65535; leave it out"
            f" for {PORT}"
        )
    return ProcessInfo(source=source, coordinator=address, processes=count, process=number)


def first_node(nodes: str) -> str:
    """The first host of a Slurm node list.

    >>> first_node("gpu[003-006,009],login"), first_node("a1,a2"), first_node("n[7]-ib")
    ('gpu003', 'a1', 'n7-ib')
    """
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    if not match:
        raise UserError(
            f"SLURM_STEP_NODELIST: {nodes!r} names no host; give --coordinator, --processes and"
            " --process-id"
        )
    return "".join(part or "" for part in match.groups())


def _slurm(environ: Mapping[str, str]) -> ProcessInfo | None:
    # of the job step: outside srun it is 1, whatever the job has
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS") or 1)
    if "SLURM_JOB_ID" not in environ or "SLURM_PROCID" not in environ or tasks == 1:
        return None
    nodes = int(environ.get("SLURM_STEP_NUM_NODES") or 1)
    # one port for each job, since jobs may share a node
    port = 65_536 - 2**12 + int(environ["SLURM_JOB_ID"]) % 2**12
    return ProcessInfo(
        source="Slurm",
        coordinator=f"{first_node(environ.get('SLURM_STEP_NODELIST', ''))}:{port}",
        processes=tasks,
        process=int(environ["SLURM_PROCID"]),
        # one process for each device, or one for each node
        devices=_slurm_devices(environ, -(-tasks // nodes)) if tasks > nodes else None,
    )


def _slurm_devices(environ: Mapping[str, str], processes: int) -> tuple[int, ...] | None:
    """Device of a process among those of its node, which all its `processes` see; None where Slurm
    shows each process only its own (--gpus-per-task), whose numbers begin at 0 in each."""
    if visible := environ.get("CUDA_VISIBLE_DEVICES"):
        count = visible.count(",") + 1
        asked = environ.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2]
        if count < processes or str(count) == asked:
            return None
    return (int(environ.get("SLURM_LOCALID") or 0),)


def _tpu(environ: Mapping[str, str]) -> ProcessInfo:
    """Process info from Cloud TPU's variables TPU_WORKER_HOSTNAMES (comma-separated, in order) and
    TPU_WORKER_ID; one process where TPU_PROCESS_ADDRESSES names one, as in notebooks. For several
    slices, several processes a host, or without variables, jax reads the machine's metadata
    instead."""
    several_slices = any(name.startswith("MEGASCALE_") for name in environ)
    processes = environ.get("TPU_PROCESS_ADDRESSES", "").strip()
    if processes and "," not in processes and not several_slices:
        return ProcessInfo(source="TPU variables")
    names = [
        name.strip().partition(":")[0]
        for name in environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    ]
    number = environ.get("TPU_WORKER_ID", "").strip()
    incomplete = "TPU_PROCESS_ADDRESSES" in environ or several_slices
    if (
        incomplete
        or not all(names)
        or not re.fullmatch(r"\d+", number)
        or int(number) >= len(names)
    ):
        return ProcessInfo(source="TPU metadata", processes=0)
    return ProcessInfo(
        source="TPU variables",
        coordinator=f"{names[0]}:{TPU_PORT}",
        processes=len(names),
        process=int(number),
    )


def detect_processes(
    coordinator: str, processes: str, process: str, *, environ: Mapping[str, str], tpu: bool
) -> ProcessInfo:
    """Process info from flags ("" = not given), TPU, Slurm or environment, in this order. Pure.

    Raises:
      UserError: a value is missing, not a number, or out of range.

    >>> detect_processes("10.0.0.1", "4", "2", environ={}, tpu=False)
    ProcessInfo(source='flags', coordinator='10.0.0.1:8476', processes=4, process=2, devices=None)
    >>> detect_processes("", "", "", environ={}, tpu=False).source
    'alone'
    >>> tpu = {"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2", "TPU_WORKER_ID": "1"}
    >>> detect_processes("", "", "", environ=tpu, tpu=True)
    ProcessInfo(source='TPU variables', coordinator='10.0.0.1:8482', processes=2, process=1,
    devices=None)
    """
    if coordinator or processes or process:
        return _from_values(
            "flags",
            ("--coordinator", "--processes", "--process-id"),
            (coordinator, processes, process),
        )
    if tpu:
        return _tpu(environ)
    if info := _slurm(environ):
        return info
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    values = tuple(environ.get(name, "") for name in names)
    if any(values):
        return _from_values("environment", names, values)  # type: ignore[arg-type]
    return ProcessInfo(source="alone")


def initialize(
    info: ProcessInfo,
    *,
    limit: float = barriers.LIMIT,
    beat: float = heartbeat.LIMIT,
    log: Callable[[str], None] = rendezvous.now,
) -> None:
    """Initialize jax.distributed and log one line about it. Must be called before a device is used;
    with one process it does nothing. Where another program, such as Ray's JaxTrainer, initialized
    jax.distributed in this process, its processes are those of the run.

    Args:
      info: of `detect_processes`; without flags or variables, what is initialized.
      limit: seconds to wait for the last process.
      beat: seconds without a heartbeat after which a host is lost; 0: only jax.distributed checks,
        after 100.
      log: logs a line.

    Raises:
      HostMissing: names the processes that did not come.
      UserError: two processes have the same index, or different counts, or not those of an
        initialized jax.distributed.
    """
    if jax.distributed.is_initialized():
        _use_initialized(info, beat, log)
        return
    if info.processes == 1:
        return
    if info.processes:
        given = info.source in ("flags", "environment")
        rendezvous.wait_for_processes(
            info.coordinator,
            info.processes,
            info.process,
            limit=limit,
            patient=not given,
            log=log,
        )
    if info.processes and "cpu" in os.environ.get("JAX_PLATFORMS", ""):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        programs.share_cache_keys()
    explicit: dict[str, Any] = {}
    if info.processes:
        explicit = {
            "coordinator_address": info.coordinator,
            "num_processes": info.processes,
            "process_id": info.process,
            "local_device_ids": info.devices,
            "cluster_detection_method": "deactivate",
        }
    before = signal.getsignal(signal.SIGTERM)
    try:
        jax.distributed.initialize(
            **explicit,
            initialization_timeout=int(limit),
            # m3i_jax's own heartbeat comes first and names the host
            heartbeat_timeout_seconds=int(beat) + 30 if beat else 100,
            # a process that ends waits so long for the others, which may hang in a collective
            shutdown_timeout_seconds=60,
        )
    except ValueError as error:
        if explicit:
            raise
        raise UserError(
            f"start: jax does not find the hosts of this TPU ({error}); on one host set"
            " TPU_WORKER_ID=0 and TPU_WORKER_HOSTNAMES=localhost, on several give --coordinator,"
            " --processes and --process-id"
        ) from None
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise barriers.HostMissing(
            f"start: {socket.gethostname()} did not meet the others in {limit:.0f} seconds"
            f" ({reason})"
        ) from None
    # jax's preemption notifier would swallow a SIGTERM that comes before the training loop
    signal.signal(signal.SIGTERM, before)
    _begin(info, beat, log)


def _use_initialized(info: ProcessInfo, beat: float, log: Callable[[str], None]) -> None:
    """Go on with the jax.distributed of this process, if the processes that were asked for are its
    own."""
    own = barriers.host_names(), barriers.host_name()
    if info.source != "alone" and info.processes and (info.processes, info.process) != own:
        raise UserError(
            f"start: this is process {info.process} of {info.processes} (from {info.source}), but"
            f" jax.distributed was initialized before as process {own[1]} of {own[0]}; leave out"
            " --coordinator, --processes and --process-id"
        )
    if "cpu" in os.environ.get("JAX_PLATFORMS", ""):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        programs.share_cache_keys()
    _begin(
        ProcessInfo(
            source="jax.distributed, initialized before", coordinator=barriers.coordinator()
        ),
        beat,
        log,
    )


def _begin(info: ProcessInfo, beat: float, log: Callable[[str], None]) -> None:
    """What follows the initialization: this host's name, heartbeats, and one line."""
    barriers.announce_host(socket.gethostname())
    heartbeat.start_heartbeat(beat, log)
    if barriers.host_names() > 1:
        coordinator = f"; coordinator {info.coordinator}" if info.coordinator else ""
        log(
            f"host {barriers.host_name()} of {barriers.host_names()}, {socket.gethostname()}"
            f"{coordinator} (from {info.source})"
        )


def broadcast_from_host0(tree: Any) -> Any:
    """Host 0's arrays on every host; a collective. The other hosts pass arrays of the same shapes
    and dtypes, whose values are ignored.

    >>> broadcast_from_host0({"x": 3})
    {'x': 3}
    """
    if barriers.host_names() == 1:
        return tree
    # the collective has no time limit, so it starts when all hosts are here
    barriers.barrier("from_first")
    return multihost_utils.broadcast_one_to_all(tree)


def code_digest() -> str:
    """The version of this package and a digest of its source files.

    >>> code_digest().startswith(version.__version__)
    True
    """
    root, digest = pathlib.Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(
            path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0"
        )
    return f"{version.__version__} {digest.hexdigest()[:16]}"


def assert_same_on_all_hosts(
    name: str, items: Mapping[str, str], *, limit: float = barriers.LIMIT
) -> None:
    """Check that all hosts have the items of host 0.

    Args:
      name: of the barrier.
      items: {key: text}, such as every line of the configuration, the version of the code, the
        shape of the mesh.
      limit: seconds to wait for the last host.

    Raises:
      UserError: on every host; names the hosts that differ, the keys and both texts.
      HostMissing: not all hosts came.

    >>> assert_same_on_all_hosts("docs", {"code": code_digest()})
    """
    if barriers.host_names() == 1:
        return
    digest = hashlib.sha256(json.dumps(sorted(items.items())).encode()).hexdigest()
    if len(set(barriers.exchange_values(f"{name}, digests", digest, limit=limit))) == 1:
        return
    # they differ: send all items of host 0, and the differences of the others
    reference = json.loads(
        barriers.exchange_values(
            f"{name}, host 0",
            json.dumps(dict(items)) if barriers.host_name() == 0 else "",
            limit=limit,
        )[0]
    )
    own = [
        f"{key} is {items.get(key, 'absent')}, {reference.get(key, 'absent')} on host 0"
        for key in {**reference, **items}
        if items.get(key) != reference.get(key)
    ]
    summary = "; ".join(own[:3]) + (f"; and {len(own) - 3} more" if len(own) > 3 else "")
    texts = barriers.exchange_values(f"{name}, differences", summary, limit=limit)
    different = [
        f"{barriers.host_label(number)}: {text}" for number, text in enumerate(texts) if text
    ]
    more = f", and {len(different) - 3} more hosts" if len(different) > 3 else ""
    raise UserError(
        f"{name}: hosts differ, {' | '.join(different[:3])}{more}; start all of them with the same"
        " command, code and machines"
    )


def start_distributed(
    info: ProcessInfo,
    settings: str,
    mesh: tuple[int, ...],
    *,
    beat: float = heartbeat.LIMIT,
    log: Callable[[str], None] = rendezvous.now,
) -> None:
    """Initialize jax.distributed and check that all hosts have the same configuration, code and
    devices.

    Args:
      info: of `detect_processes`.
      settings: `key = value` lines, of `config.config_to_text`.
      mesh: shape of the configured mesh.
      beat: seconds without a heartbeat after which a host is lost.
      log: logs a line.
    """
    initialize(info, beat=beat, log=log)
    if barriers.host_names() == 1:
        return
    lines = dict(line.split(" = ", 1) for line in settings.splitlines() if " = " in line)
    kinds = sorted({d.device_kind for d in jax.local_devices()})
    devices = f"{jax.local_device_count()} of {jax.device_count()} {' and '.join(kinds)}"
    kernels = kernel_setting()
    assert_same_on_all_hosts(
        "start",
        {
            **lines,
            "code": code_digest(),
            "jax": jax.__version__,
            "devices": devices,
            "mesh": str(mesh),
            KERNELS: kernels,
        },
    )

"""Runs m3i_jax on a Ray cluster, by the JaxTrainer of Ray 2.60 (pip install 'ray[train]'):

    python launch/ray_train.py --workers 4 --topology 4x4 --accelerator TPU-V6E -- --config ...
    python launch/ray_train.py --workers 2 --gpus 8 -- --config ... --workdir /shared/runs/m3i

The worker of a host runs the program in a process, which initializes jax.distributed itself. Exit
42 (preempted and saved) runs it again; exits 2 and 3 (refused, does not fit) end this script; other
failures make Ray start all workers again, --restarts times.
"""

import argparse
import ctypes
import socket
import subprocess
import sys

from ray import train, util
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.jax import JaxConfig, JaxTrainer


def run_host(config: dict) -> int:
    """Runs the program on the host of this worker, and returns 0, 2 or 3, its exit code."""
    context, libc, status = train.get_context(), ctypes.CDLL(None), 42
    command = [sys.executable, "-m", "m3i_jax.main", *config["run"]]
    if not config["tpu"]:  # the variables of a TPU slice name its hosts, in its order
        with socket.create_server(("", 0)) as free:
            address = f"{util.get_node_ip_address()}:{free.getsockname()[1]}"
        command += ["--coordinator", broadcast_from_rank_zero(address), "--processes"]
        command += [str(context.get_world_size()), "--process-id", str(context.get_world_rank())]
    end = (lambda: libc.prctl(1, 15)) if sys.platform == "linux" else None
    while status == 42:  # the program gets SIGTERM (15) when this worker ends (PR_SET_PDEATHSIG, 1)
        status = subprocess.run(command, preexec_fn=end, check=False).returncode
    if status not in (0, 2, 3):
        raise RuntimeError(f"a host ended with {status}; its output says why")
    return status


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    defaults = {"workers": 1, "gpus": 0, "restarts": 10, "topology": "", "accelerator": ""}
    for flag, value in defaults.items():
        parser.add_argument(f"--{flag}", type=type(value), default=value)
    parser.add_argument("run", nargs="+", metavar="-- ARGUMENTS")
    flags = parser.parse_args()
    chosen = dict(use_gpu=True, resources_per_worker={"GPU": flags.gpus}) if flags.gpus else {}
    if flags.topology:
        chosen = dict(use_tpu=True, topology=flags.topology, accelerator_type=flags.accelerator)
    trainer = JaxTrainer(
        run_host,
        train_loop_config={"tpu": bool(flags.topology), "run": flags.run},
        jax_config=JaxConfig(),  # neither of TPUs nor of GPUs: Ray initializes nothing
        scaling_config=train.ScalingConfig(num_workers=flags.workers, **chosen),
        run_config=train.RunConfig(failure_config=train.FailureConfig(flags.restarts)),
    )
    try:
        sys.exit(trainer.fit().return_value)
    except train.TrainingFailedError as error:
        sys.exit(f"ray_train.py: {' '.join(str(error).split())[:500]}")

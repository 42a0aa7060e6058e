"""The manifests for Kubernetes and SkyPilot: fields of the public references, hosts that find each
other, and restarts after exit code 42."""

from collections.abc import Iterator
from typing import Any

import pytest

from m3i_jax.parallel import distributed
from tests.launch_stage import LAUNCH, Stage, stage  # noqa: F401

GKE = {
    "NAME": "first",
    "IMAGE": "registry/m3i:1",
    "ACCELERATOR": "tpu-v5-lite-podslice",
    "TOPOLOGY": "4x4",
    "HOSTS": "4",
    "CHIPS": "4",
    "BUCKET": "pictures",
    "ACCOUNT": "trainer",
    "WORKDIR": "/mnt/m3i/runs/first",
    "ARGUMENTS": "--config configs/m3i.py:path=/mnt/m3i/imagenet",
}


# Fields that an object may have, of the public references of JobSet v1alpha2, Kubernetes (batch/v1
# Job, core/v1 Pod) and SkyPilot's task: NAME!: it must; NAME:KIND: such an object or a list of
# them; NAME:names: names of the user's own. Others hold plain values.
FIELDS = {
    "JobSet": "apiVersion! kind! metadata!:Metadata spec!:JobSetSpec",
    "Metadata": "name namespace labels:names annotations:names",
    "JobSetSpec": (
        "replicatedJobs!:ReplicatedJob network:Network failurePolicy:FailurePolicy suspend"
        " managedBy ttlSecondsAfterFinished"
    ),
    "Network": "enableDNSHostnames subdomain publishNotReadyAddresses",
    "FailurePolicy": "maxRestarts restartStrategy rules:FailureRule",
    "FailureRule": "name! action! onJobFailureReasons targetReplicatedJobs",
    "ReplicatedJob": "name! replicas groupName template!:Job",
    "Job": "metadata:Metadata spec!:JobSpec",
    "JobSpec": (
        "completionMode completions parallelism backoffLimit activeDeadlineSeconds"
        " podFailurePolicy:PodFailurePolicy template!:Pod"
    ),
    "PodFailurePolicy": "rules!:PodRule",
    "PodRule": "action! onExitCodes:ExitCodes onPodConditions:PodCondition",
    "ExitCodes": "containerName operator! values!",
    "PodCondition": "type! status!",
    "Pod": "metadata:Metadata spec!:PodSpec",
    "PodSpec": (
        "containers!:Container volumes:Volume restartPolicy terminationGracePeriodSeconds"
        " serviceAccountName nodeSelector:names hostNetwork dnsPolicy"
    ),
    "Container": (
        "name! image command args workingDir env:Variable ports:Port resources:Resources"
        " volumeMounts:Mount"
    ),
    "Variable": "name! value",
    "Port": "containerPort! name protocol",
    "Resources": "limits:names requests:names",
    "Mount": "name! mountPath! subPath readOnly",
    "Volume": "name! csi:Csi",
    "Csi": "driver! readOnly volumeAttributes:names",
    "Task": (
        "name workdir num_nodes envs:names secrets:names resources:Machine file_mounts:Storage*"
        " setup run"
    ),
    "Machine": (
        "accelerators cpus memory infra instance_type image_id disk_size disk_tier network_tier"
        " use_spot job_recovery:Recovery"
    ),
    "Recovery": "strategy max_restarts_on_errors recover_on_exit_codes",
    "Storage": "source! name store persistent mode",
}


def misspelt(value: Any, kind: str, at: str = "") -> list[str]:
    """Problems of an object of a kind: unknown fields, missing fields, or an object in place of a
    plain value or the reverse."""
    if isinstance(value, list):
        return [complaint for item in value for complaint in misspelt(item, kind, at)]
    if (kind == "") == isinstance(value, dict):
        return [f"{at}: {value} is no {kind or 'plain value'}"]
    if kind == "":
        return []
    if kind == "names" or kind.endswith("*"):
        return [
            complaint
            for name, item in value.items()
            for complaint in misspelt(item, kind.removesuffix("*").replace("names", ""), at)
        ]
    known = {
        name.rstrip("!"): (name.endswith("!"), of)
        for name, _, of in (field.partition(":") for field in FIELDS[kind].split())
    }
    found = [f"{at}.{name}: {kind} has no such field" for name in value if name not in known]
    found += [
        f"{at}.{name}: missing" for name, (must, _) in known.items() if must and name not in value
    ]
    return found + [
        c
        for name, item in value.items()
        if name in known
        for c in misspelt(item, known[name][1], f"{at}.{name}")
    ]


def misspellings(value: Any) -> Iterator[Any]:
    """Copies of an object with a letter added to one key, for every key."""
    items = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value))
        if isinstance(value, list)
        else []
    )
    for key, item in items:
        if isinstance(value, dict):
            yield {(f"{k}x" if k == key else k): v for k, v in items}
        for other in misspellings(item):
            yield (
                {**value, key: other}
                if isinstance(value, dict)
                else [*value[:key], other, *value[key + 1 :]]
            )


# Keys of the user's own, which may be spelt in any way: annotations 2, selectors 2, attributes 1,
# limits 1; variables 3, a mount.
@pytest.mark.parametrize(
    ("name", "kind", "free"), [("gke.yaml", "JobSet", 6), ("sky.yaml", "Task", 4)]
)
def test_a_misspelt_field_is_found(name: str, kind: str, free: int, stage: Stage) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    values = {f"M3I_{name}": value for name, value in GKE.items()}
    text = (
        stage.run("launch/apply.sh", "launch/gke.yaml", "--dry-run", **values)[1]
        if kind == "JobSet"
        else (LAUNCH / name).read_text()
    )
    whole = yaml.safe_load(text)
    assert not misspelt(whole, kind), misspelt(whole, kind)
    wrong = list(misspellings(whole))
    assert len(wrong) > 3 * free and sum(not misspelt(other, kind) for other in wrong) == free


def test_gke_is_a_jobset_that_restarts_after_42(stage: Stage) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    values = {f"M3I_{name}": value for name, value in GKE.items()}
    status, out, err = stage.run("launch/apply.sh", "launch/gke.yaml", "--dry-run", **values)
    assert status == 0 and not stage.calls and "${" not in out, err
    jobset = yaml.safe_load(out)
    assert (
        jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
        and jobset["kind"] == "JobSet"
        and jobset["metadata"]["name"] == "first"
    )
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (
        job["completions"] == job["parallelism"] == 4
        and job["completionMode"] == "Indexed"
        and replicated["replicas"] == 1
    )
    rules = job["podFailurePolicy"]["rules"]
    assert {
        tuple(r["onExitCodes"]["values"]): r["action"] for r in rules if "onExitCodes" in r
    } == {(2,): "FailJob", (42,): "Ignore"}
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # a pod failure policy allows no other
    (container,) = pod["containers"]
    assert all(
        r["onExitCodes"]["containerName"] == container["name"] for r in rules if "onExitCodes" in r
    )
    assert container["args"] == [
        f"exec bash launch/host.sh {GKE['ARGUMENTS']} --workdir {GKE['WORKDIR']}"
    ]
    assert container["resources"]["limits"]["google.com/tpu"] == 4
    # who the hosts are GKE tells a pod of a TPU slice
    assert container["env"] == [{"name": "M3I_AGAIN", "value": "0"}]
    assert container["ports"] == [{"containerPort": distributed.TPU_PORT}]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_apply_refuses_what_would_break_the_file_and_passes_the_rest_on(stage: Stage) -> None:
    values = {f"M3I_{name}": value for name, value in GKE.items()}
    status, _, err = stage.run("launch/apply.sh", "launch/gke.yaml", **values | {"M3I_NAME": 'a"b'})
    assert status == 2 and "M3I_NAME: must not contain quotes" in err and not stage.calls
    stage.stand_in("kubectl", 'cat >"$HOME/applied"')
    assert stage.run("launch/apply.sh", "launch/gke.yaml", **values)[0] == 0
    assert (
        stage.calls == ["kubectl apply -f -"]
        and "kind: JobSet" in (stage.place / "applied").read_text()
    )


def test_sky_gives_every_node_its_number_and_recovers_from_42(stage: Stage) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert (
        task["resources"]["job_recovery"]["recover_on_exit_codes"] == [42]
        and task["resources"]["use_spot"] is True
    )
    assert task["envs"]["M3I_BUCKET"] is None  # SkyPilot asks for it
    assert task["file_mounts"] == {"/mnt/m3i": {"source": "${M3I_BUCKET}", "mode": "MOUNT"}}
    (stage.place / "launch").mkdir()
    (stage.place / "launch/host.sh").write_text('printf "%s|" "$@"\n')
    node = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
    }
    settings = {"M3I_ARGUMENTS": "--config c.py", "M3I_WORKDIR": "/w/a b"}
    status, out, err = stage.run("-c", f"cd {stage.place}\n{task['run']}", **node, **settings)
    assert status == 0, err
    flags = [
        "--config",
        "c.py",
        "--workdir",
        "/w/a b",
        "--coordinator",
        "10.0.0.1:8476",
        "--processes",
        "2",
        "--process-id",
        "1",
    ]
    assert out == "".join(f"{flag}|" for flag in flags)

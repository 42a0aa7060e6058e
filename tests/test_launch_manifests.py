"""The manifests for Kubernetes and SkyPilot: fields of the public references, hosts that find each
other, and what happens after each exit code."""

import json
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest

from m3i_jax.parallel import distributed
from tests.launch_stage import LAUNCH, ROOT, Stage, stage  # noqa: F401

SCHEMA = ROOT / "tests/data/kubernetes/jobset.json"
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


# Fields that an object of SkyPilot's task may have, from its public reference: NAME!: it must;
# NAME:KIND: such an object or a list of them; NAME:names: names of the user's own. Others hold
# plain values.
FIELDS = {
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


def manifest(stage: Stage, **more: str) -> dict[str, Any]:
    """What apply.sh would apply; a key may not be given twice, as for Kubernetes."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined, misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep) for key, _ in node.value]
            assert len(keys) == len(set(keys)), keys
            return super().construct_mapping(node, deep)

    values = {f"M3I_{name}": value for name, value in (GKE | more).items()}
    status, out, err = stage.run("launch/apply.sh", "launch/gke.yaml", "--dry-run", **values)
    assert status == 0 and not stage.calls and "${" not in out, err
    return yaml.load(out, Loader)  # type: ignore[no-any-return]


def test_a_misspelt_field_of_a_task_is_found() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    whole = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert not misspelt(whole, "Task"), misspelt(whole, "Task")
    wrong = list(misspellings(whole))
    # names of the user's own, which may be spelt in any way: variables 3, a mount
    assert len(wrong) > 12 and sum(not misspelt(other, "Task") for other in wrong) == 4


def test_a_jobset_is_what_its_published_schema_allows(stage: Stage) -> None:
    validator = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    check = validator.Draft202012Validator(json.loads(SCHEMA.read_text()))
    queued = manifest(stage, QUEUE="team.a", PRIORITY="high", RESTARTS="3")
    for whole in (manifest(stage), queued):
        assert not [error.message for error in check.iter_errors(whole)]
    # a letter more in any key is refused, but for the user's own: labels, annotations, selectors,
    # requests and limits, volume attributes
    wrong = [other for other in misspellings(queued) if check.is_valid(other)]
    assert len(wrong) == 3 + 1 + 4 + 2 + 2 + 2
    for at, value in (
        (("metadata", "labels", "kueue.x-k8s.io/queue-name"), "-team"),
        (("metadata", "name"), "Team"),
        (("spec", "failurePolicy", "rules", 0, "action"), "Fail"),
        (("spec", "failurePolicy", "rules", 0, "onJobFailureReasons"), ["PodFailure"]),
        (("spec", "failurePolicy", "maxRestarts"), "3"),
        (("spec", "successPolicy", "operator"), "One"),
        (("spec", "replicatedJobs", 0, "template", "spec", "completions"), "four"),
        (("spec", "replicatedJobs", 0, "template", "spec", "completionMode"), "indexed"),
    ):
        other = json.loads(json.dumps(queued))
        place = other
        for key in at[:-1]:
            place = place[key]
        place[at[-1]] = value
        assert not check.is_valid(other), at


def test_gke_is_a_jobset_with_a_pod_for_each_host(stage: Stage) -> None:
    jobset = manifest(stage)
    assert jobset["kind"] == "JobSet" and jobset["metadata"]["name"] == "first"
    assert jobset["metadata"]["labels"] == {"app.kubernetes.io/name": "m3i"}
    queued = manifest(stage, QUEUE="team", PRIORITY="high", RESTARTS="3")
    assert queued["metadata"]["labels"] == {
        "app.kubernetes.io/name": "m3i",
        "kueue.x-k8s.io/queue-name": "team",
        "kueue.x-k8s.io/priority-class": "high",
    }
    restarts = [j["spec"]["failurePolicy"]["maxRestarts"] for j in (jobset, queued)]
    assert restarts == [10, 3] and "suspend" not in queued["spec"]  # Kueue suspends it
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert jobset["spec"]["successPolicy"]["targetReplicatedJobs"] == [replicated["name"]]
    job = replicated["template"]["spec"]
    assert (
        job["completions"] == job["parallelism"] == 4
        and job["completionMode"] == "Indexed"
        and replicated["replicas"] == 1
    )
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # a pod failure policy allows no other
    (container,) = pod["containers"]
    for rule in job["podFailurePolicy"]["rules"]:
        if codes := rule.get("onExitCodes"):
            assert codes["containerName"] == container["name"]  # not the sidecar that mounts
            assert codes["values"] == sorted(set(codes["values"])) and 0 not in codes["values"]
    assert container["args"] == [
        f"exec bash launch/host.sh {GKE['ARGUMENTS']} --workdir '{GKE['WORKDIR']}'"
    ]
    resources = container["resources"]
    assert resources["limits"] == resources["requests"] == {"google.com/tpu": 4}
    # who the hosts are GKE tells a pod of a TPU slice
    assert container["env"] == [{"name": "M3I_AGAIN", "value": "0"}]
    assert container["ports"] == [{"containerPort": distributed.TPU_PORT}]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    # the workers of data share batches there; without a volume a container has 64 MiB of it
    (memory,) = (m["name"] for m in container["volumeMounts"] if m["mountPath"] == "/dev/shm")
    assert {"name": memory, "emptyDir": {"medium": "Memory"}} in pod["volumes"]


def job_failure(job: dict[str, Any], pods: list[tuple[int, bool]]) -> tuple[str, str] | None:
    """Reason and message of a failed Job, None if it goes on, by Kubernetes' documentation of the
    pod failure policy: the first rule that matches a pod acts. A pod is an exit code and whether it
    was evicted."""
    counted = 0
    for number, (code, evicted) in enumerate(pods):
        for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
            codes = rule.get("onExitCodes")
            if codes and code and (code in codes["values"]) == (codes["operator"] == "In"):
                what = f"Container m3i for pod default/m3i-{number} failed with exit code {code}"
            elif evicted and "onPodConditions" in rule:
                what = f"Pod default/m3i-{number} has condition DisruptionTarget"
            else:
                continue
            assert rule["action"] == "FailJob"
            return "PodFailurePolicy", f"{what} matching FailJob rule at index {index}"
        counted += code != 0
    if counted > job["backoffLimit"]:
        return "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    return None


def jobset_action(policy: dict[str, Any], reason: str, message: str) -> str:
    """What a JobSet does after a failed Job, by its documentation: the first rule whose reasons and
    message patterns both match acts, and without one all Jobs are restarted, counted."""
    for rule in policy["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
            return str(rule["action"])
    return "RestartJobSet"


REFUSED, AGAIN, COUNTED = "FailJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJobSet"


def test_each_exit_code_has_its_consequence(stage: Stage) -> None:
    spec = manifest(stage)["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    for pods, wanted in (
        ([(0, False)] * 4, None),
        ([(0, False), (42, False)], AGAIN),
        ([(42, True), (42, False)], AGAIN),
        ([(1, False), (42, False)], AGAIN),
        ([(137, True)], AGAIN),  # its node is gone
        ([(143, True), (1, False)], AGAIN),
        ([(2, False)], REFUSED),
        ([(1, False), (2, False), (1, False)], REFUSED),  # the others lost that host
        ([(3, False)], REFUSED),
        ([(2, True)], REFUSED),
        ([(1, False)], COUNTED),
        ([(23, False)], COUNTED),
        ([(137, False), (1, False)], COUNTED),
        ([(130, False)], COUNTED),
    ):
        failure = job_failure(job, pods)
        action = jobset_action(spec["failurePolicy"], *failure) if failure else None
        assert action == wanted, pods


def test_gcluster_gets_the_same_variables(stage: Stage) -> None:
    values = {f"M3I_{name}": value for name, value in GKE.items()}
    stage.stand_in("gcluster", 'printf "%s|" "$@" >"$HOME/given"')
    status, printed, err = stage.run("launch/gcluster.sh", "--dry-run", **values)
    assert status == 0 and not err and not stage.calls
    assert stage.run("-c", printed)[0] == 0  # what it prints can be pasted
    given = (stage.place / "given").read_text()
    assert stage.run("launch/gcluster.sh", **values)[0] == 0
    assert (stage.place / "given").read_text() == given
    words = given.split("|")
    pairs = list(zip(words[2::2], words[3::2], strict=False))
    pairs.remove(("--mount", "/dev/shm:/dev/shm:rw"))  # for the workers of data, as in gke.yaml
    flags = dict(pairs)
    assert words[:2] == ["job", "submit"] and flags == {
        "--name": "first",
        "--image": "registry/m3i:1",
        "--compute-type": "tpu-v5-lite-podslice",
        "--topology": "4x4",
        "--mount": "gs://pictures:/mnt/m3i:rw",
        "--service-account": "trainer",
        "--grace-period": "120s",
        "--restarts": "100",
        "--restart-on-exit-codes": "1,42,134,137,143",
        "--command": f"cd /m3i && M3I_AGAIN=0 exec bash launch/host.sh {GKE['ARGUMENTS']}"
        f" --workdir {GKE['WORKDIR']}",
    }
    more = values | {"M3I_QUEUE": "team", "M3I_RESTARTS": "3"}
    printed = stage.run("launch/gcluster.sh", "--dry-run", "--", "--priority", "high", **more)[1]
    assert "--queue team " in printed and "--restarts 3 " in printed
    assert printed.endswith(" --priority high\n")


def test_apply_refuses_what_would_break_the_file_and_passes_the_rest_on(stage: Stage) -> None:
    values = {f"M3I_{name}": value for name, value in GKE.items()}
    status, _, err = stage.run("launch/apply.sh", "launch/gke.yaml", **values | {"M3I_NAME": 'a"b'})
    assert status == 2 and "M3I_NAME: must not contain quotes" in err and not stage.calls
    stage.stand_in("kubectl", 'cat >"$HOME/applied"')
    values["M3I_WORKDIR"] = "/mnt/m3i/R&D"
    assert stage.run("launch/apply.sh", "launch/gke.yaml", **values)[0] == 0
    assert "--workdir '/mnt/m3i/R&D'" in (stage.place / "applied").read_text()
    assert (
        stage.calls == ["kubectl apply -f -"]
        and "kind: JobSet" in (stage.place / "applied").read_text()
    )


def test_a_shell_reads_the_arguments_of_all_in_the_same_way(stage: Stage) -> None:
    """Quotes keep words together, and a working directory may have any name."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    mesh, place = "--config.parallel.mesh=(1,-1,1)", "/mnt/m3i/R&D a"
    values = {"ARGUMENTS": f"--config 'c.py:path=/a b/{{00..99}}.tar' '{mesh}'", "WORKDIR": place}
    (job,) = manifest(stage, **values)["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    given = {f"M3I_{name}": value for name, value in (GKE | values).items()}
    stage.stand_in("gcluster", 'printf "%s" "${@: -1}" >"$HOME/given"')
    assert stage.run("launch/gcluster.sh", **given)[0] == 0
    toolkit = (stage.place / "given").read_text().removeprefix("cd /m3i && ")
    (stage.place / "launch").mkdir()
    (stage.place / "launch/host.sh").write_text('printf "%s|" "${@:1:5}"\n')
    sky = yaml.safe_load((LAUNCH / "sky.yaml").read_text())["run"]
    for command in (container["args"][0], toolkit, sky):
        status, out, err = stage.run("-c", f"cd {stage.place}\n{command}", **given)
        assert (status, out.split("|")[:-1]) == (
            0,
            ["--config", "c.py:path=/a b/{00..99}.tar", mesh, "--workdir", place],
        ), (command, err)
    # without quotes, it is refused before anything is started, and by SkyPilot's task at once
    given["M3I_ARGUMENTS"] = f"--config c.py {mesh}"
    stage.log.unlink()
    for script in (["launch/apply.sh", "launch/gke.yaml"], ["launch/gcluster.sh"]):
        status, _, err = stage.run(*script, **given)
        assert status == 2 and "M3I_ARGUMENTS: a shell cannot read" in err and not stage.calls
    assert stage.run("-c", f"cd {stage.place}\n{sky}", **given)[:2] == (2, "")


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


def test_the_table_of_the_guide_has_commands_that_start() -> None:
    """A script that is typed without bash is executable; variables without a value are named."""
    rows = [line for line in (LAUNCH / "README.md").read_text().splitlines() if "launch/" in line]
    table = "\n".join(line for line in rows if line.startswith("| "))
    scripts = set(re.findall(r"`launch/(\w+\.sh)", table))
    assert scripts >= {"ssh.sh", "tpu_vm.sh", "apply.sh", "gcluster.sh"}
    for name in scripts:
        assert os.access(LAUNCH / name, os.X_OK), name
        assert (LAUNCH / name).read_text().startswith("#!"), name
    sky = next(line for line in table.splitlines() if "sky.yaml" in line)
    needed = re.findall(r"^  (\w+): null", (LAUNCH / "sky.yaml").read_text(), re.MULTILINE)
    assert needed and all(f"--env {name}=" in sky for name in needed)

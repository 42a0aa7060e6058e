"""Writes tests/data/kubernetes/jobset.json, the JSON schema that the manifests of launch/ are
checked against: the objects that they use of JobSet v1alpha2 and Kubernetes (batch/v1 Job, core/v1
Pod). Its fields come from the OpenAPI models of the published package kubeflow-trainer-api
(Apache-2.0), which has those of both projects; Kubernetes' generator leaves out which texts a field
allows, so `ALLOWED` adds those of the API references. An unknown field is refused, as by the strict
decoding of `kubectl apply`; a field of an object that is not used here (`OTHER`) has any value.

    pip install kubeflow-trainer-api==2.3.0 && python -m tests.data.make_kubernetes_schemas
"""

import importlib
import importlib.metadata
import json
import pathlib
from typing import Any

TO = pathlib.Path(__file__).parent / "kubernetes" / "jobset.json"
JOBSET, BATCH, CORE = "JobsetV1alpha2", "IoK8sApiBatchV1", "IoK8sApiCoreV1"
META, QUANTITY = "IoK8sApimachineryPkgApisMetaV1ObjectMeta", "IoK8sApimachineryPkgApiResource"
USED = {
    JOBSET: "JobSet JobSetSpec Network SuccessPolicy FailurePolicy FailurePolicyRule ReplicatedJob",
    BATCH: (
        "JobTemplateSpec JobSpec PodFailurePolicy PodFailurePolicyRule"
        " PodFailurePolicyOnExitCodesRequirement PodFailurePolicyOnPodConditionsPattern"
    ),
    CORE: (
        "PodTemplateSpec PodSpec Container EnvVar ContainerPort ResourceRequirements VolumeMount"
        " Volume CSIVolumeSource EmptyDirVolumeSource Toleration"
    ),
}
OTHER: dict[str, Any] = {}
_NAME = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_LABEL = {"pattern": "^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"}
ALLOWED: dict[str, dict[str, Any]] = {
    f"{JOBSET}JobSet.apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
    f"{JOBSET}JobSet.kind": {"const": "JobSet"},
    f"{JOBSET}ReplicatedJob.name": {"pattern": f"^{_NAME}$"},
    f"{JOBSET}SuccessPolicy.operator": {"enum": ["All", "Any"]},
    f"{JOBSET}FailurePolicy.restartStrategy": {
        "enum": ["Recreate", "BlockingRecreate", "InPlaceRestart"]
    },
    f"{JOBSET}FailurePolicyRule.name": {"pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    f"{JOBSET}FailurePolicyRule.action": {
        "enum": [
            "FailJobSet",
            "RestartJobSet",
            "RestartJobSetAndIgnoreMaxRestarts",
            "RestartJob",
            "RestartJobAndIgnoreMaxRestarts",
        ]
    },
    f"{JOBSET}FailurePolicyRule.onJobFailureReasons": {
        "items": {
            "enum": [
                "BackoffLimitExceeded",
                "DeadlineExceeded",
                "FailedIndexes",
                "MaxFailedIndexesExceeded",
                "PodFailurePolicy",
            ]
        }
    },
    f"{BATCH}JobSpec.completionMode": {"enum": ["Indexed", "NonIndexed"]},
    f"{BATCH}PodFailurePolicyRule.action": {"enum": ["FailJob", "FailIndex", "Ignore", "Count"]},
    f"{BATCH}PodFailurePolicyOnExitCodesRequirement.operator": {"enum": ["In", "NotIn"]},
    f"{BATCH}PodFailurePolicyOnExitCodesRequirement.values": {"uniqueItems": True},
    f"{CORE}PodSpec.restartPolicy": {"enum": ["Always", "OnFailure", "Never"]},
    f"{CORE}Container.name": {"pattern": f"^{_NAME}$"},
    f"{META}.name": {"pattern": rf"^{_NAME}(\.{_NAME})*$", "maxLength": 253},
    f"{META}.labels": {"additionalProperties": {"type": "string", **_LABEL}},
}


def kept(schema: Any, names: set[str]) -> Any:
    """A schema without texts, defaults and the alternative null, whose references to objects
    outside `names` allow anything."""
    if isinstance(schema, list):
        return [kept(item, names) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return {"$ref": schema["$ref"]} if schema["$ref"].split("/")[-1] in names else OTHER
    if "anyOf" in schema:
        choices = [kept(c, names) for c in schema["anyOf"] if c != {"type": "null"}]
        return choices[0] if len(choices) == 1 else {"anyOf": choices}
    return {
        key: (
            {name: kept(item, names) for name, item in value.items()}
            if key == "properties"
            else kept(value, names)
        )
        for key, value in schema.items()
        if key not in ("title", "description", "default", "$defs")
    }


def main() -> None:
    models = importlib.import_module("kubeflow_trainer_api.models")
    whole = models.JobsetV1alpha2JobSet.model_json_schema(by_alias=True)
    objects = whole["$defs"] | {f"{JOBSET}JobSet": whole}
    names = {prefix + name for prefix, texts in USED.items() for name in texts.split()}
    names |= {META}
    result = {}
    for name in sorted(names):
        result[name] = kept(objects[name], names) | {"additionalProperties": False}
        for field, rule in result[name]["properties"].items():
            rule |= ALLOWED.get(f"{name}.{field}", {})
    result[f"{JOBSET}JobSet"]["required"] = ["apiVersion", "kind", "metadata", "spec"]
    package = f"kubeflow-trainer-api {importlib.metadata.version('kubeflow-trainer-api')}"
    document = {
        "$comment": f"Made from {package} (Apache-2.0, the Kubeflow and Kubernetes authors) by"
        " tests/data/make_kubernetes_schemas.py.",
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$ref": f"#/$defs/{JOBSET}JobSet",
        "$defs": result,
    }
    TO.parent.mkdir(exist_ok=True)
    TO.write_text(json.dumps(document, indent=1) + "\n")
    print(TO, TO.stat().st_size)


if __name__ == "__main__":
    main()

"""Manifests of KubeRay and of ``ray up``: their schemas, the commands they call, and what all nodes share."""

import copy
import shlex
from importlib import metadata

import jsonschema
import kubernetes_validate
import pytest
import yaml
from images import DOCKER, SECRET, compose, example, manifests, pods
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

VERSION = kubernetes_validate.latest_version().rpartition(".")[0]  # of Kubernetes
CLAIM, CLUSTER = manifests("raycluster.yaml")
(JOB,) = manifests("rayjob.yaml")
SPECS = {"raycluster.yaml": CLUSTER["spec"], "rayjob.yaml": JOB["spec"]["rayClusterSpec"]}
UP = yaml.safe_load((DOCKER / "ray_up.yaml").read_text())

# What ray.io/v1 asks of the fields used here, read in KubeRay's Go types. Other fields are mistakes of spelling.
POD = {"type": "object", "required": ["spec"]}  # checked by Kubernetes' own schema
START = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}
RAY_CLUSTER = {
    "type": "object",
    "additionalProperties": False,
    "required": ["headGroupSpec"],
    "properties": {
        "rayVersion": {"type": "string"},
        "authOptions": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"mode": {"enum": ["token", "disabled"]}},
        },
        "headGroupSpec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["template", "rayStartParams"],
            "properties": {"rayStartParams": START, "template": POD},
        },
        "workerGroupSpecs": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"],
                "properties": {
                    "groupName": {"type": "string"},
                    "replicas": COUNT,
                    "minReplicas": COUNT,
                    "maxReplicas": COUNT,
                    "rayStartParams": START,
                    "template": POD,
                },
            },
        },
    },
}
RAY_JOB = {
    "type": "object",
    "additionalProperties": False,
    "required": ["entrypoint", "rayClusterSpec"],
    "properties": {
        "entrypoint": {"type": "string"},
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
        "shutdownAfterJobFinishes": {"type": "boolean"},
        "ttlSecondsAfterFinished": COUNT,
        "backoffLimit": COUNT,
        "rayClusterSpec": RAY_CLUSTER,
    },
}
EACH_POD = [
    pytest.param(spec, group, template, parameters, id=f"{file}-{group}")
    for file, spec in SPECS.items()
    for group, template, parameters in pods(spec)
]


def test_the_resources_are_those_of_kuberay():
    for document, kind, schema in ((CLUSTER, "RayCluster", RAY_CLUSTER), (JOB, "RayJob", RAY_JOB)):
        assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", kind)
        jsonschema.validate(document["spec"], schema)


def test_a_mistake_of_spelling_is_noticed():
    wrong = copy.deepcopy(CLUSTER["spec"])
    wrong["workerGroupSpecs"][0]["minReplica"] = wrong["workerGroupSpecs"][0].pop("minReplicas")
    with pytest.raises(jsonschema.ValidationError, match="minReplica"):
        jsonschema.validate(wrong, RAY_CLUSTER)


def test_the_job_s_cluster_is_the_standing_one():
    assert JOB["spec"]["rayClusterSpec"] == CLUSTER["spec"]


def test_the_claim_is_valid_and_is_what_the_pods_mount():
    kubernetes_validate.validate(CLAIM, VERSION, strict=True)
    assert CLAIM["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize(("spec", "group", "template", "parameters"), EACH_POD)
class TestPods:
    def test_kubernetes_accepts_it(self, spec, group, template, parameters):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": group}, **template}
        kubernetes_validate.validate(pod, VERSION, strict=True)
        pod["spec"] = pod["spec"] | {"containers": [pod["spec"]["containers"][0] | {"images": "misspelt"}]}
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(pod, VERSION, strict=True)

    def test_ray_knows_what_it_is_started_with(self, spec, group, template, parameters):
        address = ["--head"] if group == "head" else ["--address=head:6379"]
        start.make_context("start", [*address, *(f"--{name}={value}" for name, value in parameters.items())])

    def test_it_is_not_root(self, spec, group, template, parameters):
        context = template["spec"]["securityContext"]
        assert context["runAsNonRoot"] and context["runAsUser"] == 1000
        assert template["spec"]["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}

    def test_it_is_told_what_a_node_of_compose_is_told(self, spec, group, template, parameters):
        by_operator = {"RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}
        told = {variable["name"]: variable for variable in template["spec"]["containers"][0]["env"]}
        node = compose()["services"]["ray-head"]["environment"]
        assert told.keys() == node.keys() - by_operator
        assert spec["authOptions"] == {"mode": "token"}, "so the operator sets the rest"
        for name, variable in told.items():
            if SECRET.search(name):
                secret = variable["valueFrom"]["secretKeyRef"]
                assert secret["key"] in example() and "value" not in variable
                assert secret["name"] != CLUSTER["metadata"]["name"], "the operator keeps its token under that name"
            elif name != "ORCHESTRATOR_STORAGE":
                assert variable["value"] == node[name]

    def test_it_mounts_what_all_share_and_has_shared_memory(self, spec, group, template, parameters):
        container, volumes = template["spec"]["containers"][0], {v["name"]: v for v in template["spec"]["volumes"]}
        mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        storage = next(v["value"] for v in container["env"] if v["name"] == "ORCHESTRATOR_STORAGE")
        assert mounted[storage]["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
        assert mounted["/dev/shm"]["emptyDir"]["medium"] == "Memory"

    def test_what_it_asks_for_is_its_limit(self, spec, group, template, parameters):
        resources = template["spec"]["containers"][0]["resources"]
        assert resources["requests"] == resources["limits"]

    def test_no_service_s_name_becomes_a_setting_of_mlflow(self, spec, group, template, parameters):
        assert template["spec"]["enableServiceLinks"] is False


def test_no_trial_runs_beside_the_head():
    for spec in SPECS.values():
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_versions_of_ray_agree():
    locked = dict(line.split("==") for line in (DOCKER / "lock.txt").read_text().splitlines() if "==" in line)
    assert {spec["rayVersion"] for spec in SPECS.values()} == {locked["ray"]}
    assert metadata.version("ray") == locked["ray"]


def test_ray_up_accepts_it():
    prepared = prepare_config(copy.deepcopy(UP))
    validate_config(prepared)
    nodes = prepared["available_node_types"][prepared["head_node_type"]]
    assert nodes["min_workers"] == nodes["max_workers"] == len(UP["provider"]["worker_ips"])
    with pytest.raises(jsonschema.ValidationError, match="dockr"):
        validate_config(prepared | {"dockr": {}})


@pytest.mark.parametrize("command", UP["head_start_ray_commands"] + UP["worker_start_ray_commands"])
def test_ray_knows_what_ray_up_starts(command):
    program, verb, *arguments = shlex.split(command)
    assert program == "ray" and verb in ("stop", "start")
    if verb == "start":
        given = start.make_context("start", arguments).params
        assert not given["head"] or (given["num_cpus"] == 0 and given["dashboard_host"] == "127.0.0.1")


def test_ray_up_keeps_secrets_on_the_hosts():
    text = (DOCKER / "ray_up.yaml").read_text()
    assert any(option.startswith("--env-file=/etc/") for option in UP["docker"]["run_options"])
    assert not any(option.startswith(("--env=", "-e")) for option in UP["docker"]["run_options"])
    assert not any(f"{name}=" in text for name in example() if SECRET.search(name))


def test_nodes_of_ray_up_share_the_storage_of_the_others():
    assert "--volume=/mnt/orchestrator:/storage" in UP["docker"]["run_options"]

"""The manifests of `cluster/`: valid against the operator's own schemas, guarded, and without secrets.

A rule is a function from what it judges to a list of problems; one test holds the manifests to all rules, one breaks
each rule.
"""

import copy
import functools
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from pipelines.config.sections import BaseModelConfig
from pipelines.errors import ConfigError
from pipelines.preflight.portability import _open_secrets
from pipelines.serve.target import TOKEN
from pipelines.workers.ray_cluster import CLUSTER_MAX, grown
from tests.conftest import make_tokenizer
from tests.unit.serving import write_base, write_run

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
MANIFESTS = sorted((CLUSTER / "kuberay").glob("*.yaml"))


@functools.cache
def _read(path: Path) -> list[dict]:
    return list(yaml.safe_load_all(path.read_text()))


def documents(path: Path) -> list[dict]:
    return copy.deepcopy(_read(path))


def all_of_kind(kind: str) -> list[dict]:
    return [found for path in MANIFESTS for found in documents(path) if found["kind"] == kind]


def of_kind(kind: str) -> dict:
    return all_of_kind(kind)[0]


def schema(shared: Path, kind: str, version: str) -> dict:
    """The schema of a custom resource, without room for unknown keys: Kubernetes drops those without a word."""
    file = shared / "schemas" / "kuberay" / f"ray.io_{kind}.yaml"
    if not file.is_file():
        pytest.skip(f"needs ../shared/schemas/kuberay/{file.name}")
    text = file.read_text()
    definition = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # a megabyte of YAML
    found = next(v for v in definition["spec"]["versions"] if v["name"] == version)
    return closed(found["schema"]["openAPIV3Schema"])


def closed(node):
    if isinstance(node, list):
        return [closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    found = {key: closed(value) for key, value in node.items()}
    if isinstance(found.get("properties"), dict) and not found.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    return found


def problems(schema: dict, manifest: dict) -> list[str]:
    if "metadata" in schema["properties"]:
        schema["properties"]["metadata"] = {"type": "object"}  # left to Kubernetes itself
    found = jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    return [f"{list(error.absolute_path)}: {error.message}" for error in found]


@pytest.fixture(scope="module")
def cluster_schema(shared) -> dict:
    return schema(shared, "rayclusters", "v1")


@pytest.mark.parametrize(("kind", "plural"), [("RayJob", "rayjobs"), ("RayService", "rayservices")])
def test_custom_resources_are_valid(shared, kind, plural):
    manifest = of_kind(kind)
    group, version = manifest["apiVersion"].split("/")
    assert group == "ray.io"
    assert not problems(schema(shared, plural, version), manifest)


def test_every_cluster_and_the_pod_of_the_tick_are_valid(cluster_schema):
    assert not problems(cluster_schema, of_kind("RayCluster"))
    spec = cluster_schema["properties"]["spec"]
    for found in ray_specs():
        assert not problems(spec, found)
    assert not problems(spec["properties"]["headGroupSpec"]["properties"]["template"], tick_template())


def test_the_schema_check_finds_a_misspelt_key(cluster_schema):
    manifest = of_kind("RayCluster")
    manifest["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imag"] = "x"
    assert any("imag" in problem for problem in problems(cluster_schema, manifest))


# -- what is judged
def ray_specs() -> list[dict]:
    job, service = of_kind("RayJob")["spec"], of_kind("RayService")["spec"]
    return [of_kind("RayCluster")["spec"], job["rayClusterSpec"], service["rayClusterConfig"]]


def tick_template() -> dict:
    return of_kind("CronJob")["spec"]["jobTemplate"]["spec"]["template"]


def pods() -> list[dict]:
    """All pods, that of the autoscaled cluster's head with the container which the operator adds."""
    found = []
    for spec in ray_specs():
        head = copy.deepcopy(spec["headGroupSpec"]["template"]["spec"])
        if options := spec.get("autoscalerOptions"):
            image = head["containers"][0]["image"]
            added = {key: options[key] for key in ("resources", "securityContext", "env", "volumeMounts")}
            head["containers"].append({"name": "autoscaler", "image": image} | copy.deepcopy(added))
        found += [head, *(copy.deepcopy(group["template"]["spec"]) for group in spec["workerGroupSpecs"])]
    submitter = of_kind("RayJob")["spec"]["submitterPodTemplate"]["spec"]
    return [*found, copy.deepcopy(submitter), copy.deepcopy(tick_template()["spec"])]


# -- rules
def user_problems(pod: dict) -> Iterator[str]:
    context = pod.get("securityContext", {})
    if not (context.get("runAsNonRoot") is True and context.get("runAsUser", 0) > 0):
        yield "may run as root"
    if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "seccomp is not RuntimeDefault"
    if {"hostNetwork", "hostPID", "hostIPC"} & pod.keys():
        yield "shares namespaces of the node"


def container_problems(pod: dict) -> Iterator[str]:
    for container in pod["containers"]:
        context, name = container.get("securityContext", {}), container["name"]
        expected = {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        if context != expected:
            yield f"{name}: security context {context}"
        if not re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+(-\w+)?(@sha256:[0-9a-f]{64})?", container["image"]):
            yield f"{name}: {container['image']} is not pinned"
        if any(kind.get("name", "").endswith("TOKEN") and "value" in kind for kind in container.get("env", [])):
            yield f"{name}: a token in the open"


def resource_problems(pod: dict) -> Iterator[str]:
    for container in pod["containers"]:
        requests, limits = (container.get("resources", {}).get(kind, {}) for kind in ("requests", "limits"))
        if not {"cpu", "memory"} <= requests.keys() & limits.keys():
            yield f"{container['name']}: requests {requests}, limits {limits}"
        if requests.get("nvidia.com/gpu") != limits.get("nvidia.com/gpu"):
            yield f"{container['name']}: Kubernetes wants as many GPUs requested as allowed"


def probe_problems(pod: dict) -> Iterator[str]:
    if pod.get("restartPolicy") == "Never":  # ends by itself, and a deadline ends it otherwise
        return
    for container in pod["containers"]:
        if container["name"] != "autoscaler" and not {"livenessProbe", "readinessProbe"} <= container.keys():
            yield f"{container['name']}: no probes"


def volume_problems(pod: dict) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
    if mounted != volumes.keys():
        yield f"volumes {sorted(volumes)}, mounted {sorted(mounted)}"
    for name, volume in volumes.items():
        if not {"persistentVolumeClaim", "emptyDir", "projected"} & volume.keys():
            yield f"{name}: {sorted(volume)}"
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
            yield f"{name}: may fill the node"
    for container in pod["containers"]:
        paths = {mount["mountPath"] for mount in container["volumeMounts"]}
        if not {"/tmp"} <= paths or (
            "/home/ray" not in paths and {"name": "HOME", "value": "/tmp"} not in container["env"]
        ):
            yield f"{container['name']}: cannot write to /tmp and to its home"


def token_problems(pod: dict) -> Iterator[str]:
    """Of the Kubernetes API: only the autoscaler has one."""
    if pod.get("automountServiceAccountToken") is not False:
        yield "a token of the Kubernetes API in every container"
    tokens = {volume["name"] for volume in pod["volumes"] if "projected" in volume}
    holders = {c["name"] for c in pod["containers"] for mount in c["volumeMounts"] if mount["name"] in tokens}
    if not holders <= {"autoscaler"}:
        yield f"a token of the Kubernetes API in {sorted(holders)}"


RULES = (user_problems, container_problems, resource_problems, probe_problems, volume_problems, token_problems)


@pytest.mark.parametrize("rule", RULES)
def test_every_pod_keeps_the_rules(rule):
    assert len(pods()) == 8
    assert [problem for pod in pods() for problem in rule(pod)] == []


def _context(pod: dict) -> dict:
    return pod["containers"][-1]["securityContext"]


BREAKS: dict[str, tuple[Callable, Callable]] = {
    "root": (user_problems, lambda pod: pod["securityContext"].update(runAsUser=0)),
    "root by the image": (user_problems, lambda pod: pod["securityContext"].pop("runAsNonRoot")),
    "any system call": (user_problems, lambda pod: pod["securityContext"].pop("seccompProfile")),
    "network of the node": (user_problems, lambda pod: pod.update(hostNetwork=True)),
    "no context": (container_problems, lambda pod: pod["containers"][-1].pop("securityContext")),
    "writable": (container_problems, lambda pod: _context(pod).update(readOnlyRootFilesystem=False)),
    "a capability": (container_problems, lambda pod: _context(pod).update(capabilities={"add": ["SYS_PTRACE"]})),
    "latest": (container_problems, lambda pod: pod["containers"][-1].update(image="registry.example/curlora:gpu")),
    "no limit": (resource_problems, lambda pod: pod["containers"][-1]["resources"]["limits"].pop("memory")),
    "no probe": (probe_problems, lambda pod: pod["containers"][0].pop("livenessProbe")),
    "folder of the node": (
        volume_problems,
        lambda pod: pod["volumes"].__setitem__(0, {"name": "shared", "hostPath": {"path": "/"}}),
    ),
    "endless scratch": (volume_problems, lambda pod: pod["volumes"][2].update(emptyDir={})),
    "no /tmp": (volume_problems, lambda pod: pod["containers"][0]["volumeMounts"].pop(3)),
    "token for all": (token_problems, lambda pod: pod.pop("automountServiceAccountToken")),
    "token for chains": (
        token_problems,
        lambda pod: pod["containers"][0]["volumeMounts"].append({"name": "kube-api", "mountPath": "/token"}),
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_rule_is_seen(name):
    rule, damage = BREAKS[name]
    pod = pods()[0]
    damage(pod)
    assert list(rule(pod))


def test_pods_of_the_namespace_are_restricted_and_end_by_themselves():
    labels = of_kind("Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert of_kind("CronJob")["spec"]["jobTemplate"]["spec"]["activeDeadlineSeconds"] > 0
    assert of_kind("RayJob")["spec"]["activeDeadlineSeconds"] > 0
    for path in MANIFESTS:
        for found in documents(path):
            assert found["kind"] == "Namespace" or found["metadata"]["namespace"] == "curlora"


def test_roles_name_what_they_change_and_nobody_else_has_one():
    assert not any(found["kind"].startswith("ClusterRole") for path in MANIFESTS for found in documents(path))
    (role,) = all_of_kind("Role")
    for rule in role["rules"]:
        assert set(rule["verbs"]) <= {"get", "list", "patch"}
        assert set(rule["resources"]) <= {"pods", "rayclusters"}
        assert "patch" not in rule["verbs"] or rule["resourceNames"] == [of_kind("RayCluster")["metadata"]["name"]]
    (binding,) = all_of_kind("RoleBinding")
    head = of_kind("RayCluster")["spec"]["headGroupSpec"]["template"]["spec"]
    assert [subject["name"] for subject in binding["subjects"]] == [head["serviceAccountName"]]
    assert of_kind("ServiceAccount")["metadata"]["name"] == head["serviceAccountName"]
    others = [pod for pod in pods() if "serviceAccountName" in pod]
    assert len(others) == 1


# -- network
def test_nothing_is_reached_and_reaches_unless_a_policy_says_so():
    policies = {found["metadata"]["name"]: found["spec"] for found in all_of_kind("NetworkPolicy")}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    ray = [{"podSelector": {"matchLabels": {"ray.io/is-ray-node": "yes"}}}]
    opened = {"curlora-ray": {8265, 8080}, "curlora-serve": {8000}}
    for name, spec in policies.items():
        for rule in spec.get("ingress", []):
            assert not any("ipBlock" in peer or peer == {} for peer in rule["from"])
            assert rule["from"] == ray or {port["port"] for port in rule["ports"]} <= opened[name]
        for rule in spec.get("egress", []):
            assert rule["to"] == ray or rule["ports"], "another pod's or world's every port"
            for peer in rule["to"]:
                assert "ipBlock" not in peer or "169.254.0.0/16" in peer["ipBlock"]["except"]


def test_the_policies_select_the_pods_of_the_manifests():
    def labels(template):
        return template["metadata"]["labels"]

    selected = [found["spec"]["podSelector"] for found in all_of_kind("NetworkPolicy")]
    service = of_kind("RayService")["spec"]["rayClusterConfig"]
    for template in (service["headGroupSpec"]["template"], service["workerGroupSpecs"][0]["template"]):
        assert {"matchLabels": labels(template)} in selected
    ray = next(found["spec"] for found in all_of_kind("NetworkPolicy") if found["metadata"]["name"] == "curlora-ray")
    peers = [peer for rule in ray["ingress"] for peer in rule["from"]]
    assert {"podSelector": {"matchLabels": labels(tick_template())}} in peers


# -- what they are for
def test_every_cluster_asks_for_the_token_and_serves_inside_only():
    for spec in ray_specs():
        assert spec["authOptions"] == {"mode": "token", "secretName": "curlora-ray-token"}
        assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    launcher = yaml.safe_load((CLUSTER / "ray-cluster.yaml").read_text())
    for command in [*launcher["head_start_ray_commands"], *launcher["worker_start_ray_commands"]]:
        assert "ray start" not in command or "RAY_AUTH_MODE=token" in command
    assert "--dashboard-host=127.0.0.1" in launcher["head_start_ray_commands"][-1]
    assert "RAY_AUTH_MODE=token" in (CLUSTER / "Dockerfile").read_text()
    tick = tick_template()["spec"]["containers"][0]
    assert {"name": "RAY_AUTH_MODE", "value": "token"} in tick["env"]


def test_every_pod_that_works_shares_the_storage_and_takes_secrets_by_reference():
    for pod in pods():
        worker = pod["containers"][0]
        if worker["name"] != "ray-job-submitter":
            assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "curlora-shared"}
            assert "secretRef" in worker["envFrom"][0]
    assert of_kind("PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteMany"]


def test_no_gpu_idles_between_domains():
    spec = of_kind("RayCluster")["spec"]
    assert spec["enableInTreeAutoscaling"] and 0 < spec["autoscalerOptions"]["idleTimeoutSeconds"] <= 300
    most = {"CPU": 0.0, "GPU": 0.0}
    for group in spec["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        most["CPU"] += group["maxReplicas"] * int(limits["cpu"])
        most["GPU"] += group["maxReplicas"] * int(limits["nvidia.com/gpu"])
    head = spec["headGroupSpec"]["template"]["spec"]["containers"][0]
    said = next(variable["value"] for variable in head["env"] if variable["name"] == CLUSTER_MAX)
    assert grown({}, said) == most, "a driver counts with what the autoscaler may add"


def test_the_service_starts_the_server_behind_its_token():
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary  # slow
    from ray.serve.schema import ServeDeploySchema

    service = of_kind("RayService")["spec"]
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["serveConfigV2"]))
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    build = getattr(importlib.import_module(module), name)
    with pytest.raises(ConfigError, match="no run"):
        call_user_app_builder_with_args_if_necessary(build, application.args | {"source": "ghost"})
    for wrong in ({"sourec": "x"}, {"gpus": 2}, {"gpus": float("nan")}, {"canary": -1}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            build(application.args | wrong)
    (worker,) = service["rayClusterConfig"]["workerGroupSpecs"]
    container = worker["template"]["spec"]["containers"][0]
    assert int(container["resources"]["limits"]["nvidia.com/gpu"]) == application.args["gpus"]
    assert container["readinessProbe"]["httpGet"]["port"] == config.http_options.port == 8000
    token = next(variable for variable in container["env"] if variable["name"] == TOKEN)
    assert "secretKeyRef" in token["valueFrom"]


def test_a_server_of_a_configuration_file_needs_a_token(tmp_path, monkeypatch):
    from pipelines.serve.deployment import build  # slow

    monkeypatch.delenv(TOKEN, raising=False)
    run = write_run(tmp_path, write_base(tmp_path / "base", make_tokenizer()), "one", 1)
    with pytest.raises(ConfigError, match=rf"0\.0\.0\.0 can be reached by others; set {TOKEN}"):
        build({"source": run.uri})
    monkeypatch.setenv(TOKEN, "t" * 32)
    assert build({"source": run.uri, "gpus": 0.5})._bound_deployment.ray_actor_options["num_gpus"] == 0.5


def test_a_job_is_retried_cleaned_up_and_can_be_held_back():
    job, cron = of_kind("RayJob")["spec"], of_kind("CronJob")["spec"]
    assert job["backoffLimit"] > 0
    assert job["shutdownAfterJobFinishes"]
    assert job["ttlSecondsAfterFinished"] > 0
    assert {"suspend"} <= job.keys() & cron.keys()
    assert cron["concurrencyPolicy"] == "Forbid"


def test_no_manifest_holds_a_secret_and_every_one_says_what_to_change():
    for path in [*MANIFESTS, CLUSTER / "ray-cluster.yaml"]:
        assert "# change" in path.read_text().lower() or path.name == "rbac.yaml", path
        for document in documents(path):
            assert not list(_open_secrets(document))
            assert document.get("kind") != "Secret"


def test_a_token_in_a_configuration_is_seen():
    raw = BaseModelConfig(path="s3://key:password@bucket/model").model_dump() | {"note": "hf_" + "a" * 34}
    assert [problem.field for problem in _open_secrets(raw)] == ["path", "note"]

"""The manifests of `cluster/`: valid against the operator's own schemas, guarded, and without secrets."""

from pathlib import Path

import jsonschema
import pytest
import yaml

from pipelines.config.sections import BaseModelConfig
from pipelines.preflight.portability import _open_secrets

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
MANIFESTS = sorted((CLUSTER / "kuberay").glob("*.yaml"))


def documents(path: Path) -> list[dict]:
    return list(yaml.safe_load_all(path.read_text()))


def of_kind(kind: str) -> dict:
    return next(found for path in MANIFESTS for found in documents(path) if found["kind"] == kind)


def schema(shared: Path, kind: str, version: str) -> dict:
    """The schema of a custom resource, without room for unknown keys: Kubernetes drops those without a word."""
    text = (shared / "schemas" / "kuberay" / f"ray.io_{kind}.yaml").read_text()
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
    schema["properties"]["metadata"] = {"type": "object"}  # left to Kubernetes itself
    found = jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    return [f"{list(error.absolute_path)}: {error.message}" for error in found]


@pytest.mark.parametrize(("kind", "plural"), [("RayCluster", "rayclusters"), ("RayJob", "rayjobs")])
def test_custom_resources_are_valid(shared, kind, plural):
    manifest = of_kind(kind)
    group, version = manifest["apiVersion"].split("/")
    assert group == "ray.io"
    assert not problems(schema(shared, plural, version), manifest)


def test_the_schema_check_finds_a_misspelt_key(shared):
    manifest = of_kind("RayCluster")
    manifest["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imag"] = "x"
    assert any("imag" in problem for problem in problems(schema(shared, "rayclusters", "v1"), manifest))


def ray_specs() -> list[dict]:
    return [of_kind("RayCluster")["spec"], of_kind("RayJob")["spec"]["rayClusterSpec"]]


def pods() -> list[dict]:
    groups = [group for spec in ray_specs() for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    tick = of_kind("CronJob")["spec"]["jobTemplate"]["spec"]["template"]
    return [template["spec"] for template in [*(group["template"] for group in groups), tick]]


def test_every_cluster_asks_for_the_token_and_serves_inside_only():
    for spec in ray_specs():
        assert spec["authOptions"] == {"mode": "token", "secretName": "curlora-ray-token"}
        assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    launcher = yaml.safe_load((CLUSTER / "ray-cluster.yaml").read_text())
    for command in [*launcher["head_start_ray_commands"], *launcher["worker_start_ray_commands"]]:
        assert "ray start" not in command or "RAY_AUTH_MODE=token" in command
    assert "--dashboard-host=127.0.0.1" in launcher["head_start_ray_commands"][-1]
    assert "RAY_AUTH_MODE=token" in (CLUSTER / "Dockerfile").read_text()
    tick = of_kind("CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    assert {"name": "RAY_AUTH_MODE", "value": "token"} in tick["env"]


def test_every_pod_shares_the_storage_and_has_no_more_rights_than_it_needs():
    for pod in pods():
        assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "curlora-shared"}
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert "secretRef" in container["envFrom"][0]
    assert of_kind("PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteMany"]


def test_a_job_is_retried_cleaned_up_and_can_be_held_back():
    job, cron = of_kind("RayJob")["spec"], of_kind("CronJob")["spec"]
    assert job["backoffLimit"] > 0
    assert job["shutdownAfterJobFinishes"]
    assert job["ttlSecondsAfterFinished"] > 0
    assert {"suspend"} <= job.keys() & cron.keys()
    assert cron["concurrencyPolicy"] == "Forbid"


def test_the_network_policy_opens_the_dashboard_and_nothing_else_to_others():
    spec = of_kind("NetworkPolicy")["spec"]
    ray = {"podSelector": {"matchLabels": {"ray.io/is-ray-node": "yes"}}}
    for rule in spec["ingress"]:
        assert rule["from"] == [ray] or [port["port"] for port in rule["ports"]] == [8265]


def test_no_manifest_holds_a_secret_and_every_one_says_what_to_change():
    for path in [*MANIFESTS, CLUSTER / "ray-cluster.yaml"]:
        assert "# change" in path.read_text().lower() or path.name == "networkpolicy.yaml", path
        for document in documents(path):
            assert not list(_open_secrets(document))
            assert document.get("kind") != "Secret"


def test_a_token_in_a_configuration_is_seen():
    raw = BaseModelConfig(path="s3://key:password@bucket/model").model_dump() | {"note": "hf_" + "a" * 34}
    assert [problem.field for problem in _open_secrets(raw)] == ["path", "note"]

"""`curlora doctor`: checks of machine, environment and cluster. Imports on demand, so that it runs in a broken one."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

TESTED = {
    "ray": "2.60",
    "torch": "2.13",
    "deepspeed": "0.19",
    "mlflow": "3.17",
    "transformers": "5.23",
    "datasets": "5.2",
    "peft": "0.21",
    "accelerate": "1.15",
}

MIN_FREE_GIB = 5
MIN_MEMORY_GIB = 4


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    subject: str
    level: str  # ok | warning | error
    text: str


def examine(config: str | None = None) -> list[Finding]:
    """Run all checks, cheapest first. They change nothing.

    Args:
        config: a configuration whose paths are checked as well.
    """
    machine = [_python(), *_packages(), _processors(), _memory(), _disk(), _accelerator()]
    cluster = [_ray(), _jobs_api(os.environ.get("RAY_API_SERVER_ADDRESS"))]
    return [*machine, *cluster, _registration(), *(_unshared_paths(config) if config else [])]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 10)
    return Finding("python", "ok" if good else "error", version if good else f"{version}; 3.10 or newer is needed")


def _packages() -> list[Finding]:
    findings = []
    for name, tested in TESTED.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(name, "error", "not installed; make setup"))
            continue
        same = version.startswith(f"{tested}.")
        findings.append(
            Finding(name, "ok" if same else "warning", version if same else f"{version}; tested: {tested}")
        )
    return findings


def _processors() -> Finding:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{count} usable" if count >= 2 else f"{count} usable; set resources.workers: 1"
    return Finding("processors", "ok" if count >= 2 else "warning", text)


def _memory() -> Finding:
    import psutil  # slow

    free = psutil.virtual_memory().available / 2**30
    level = "ok" if free >= MIN_MEMORY_GIB else "warning"
    return Finding(
        "memory", level, f"{free:.1f} GiB free" + ("" if level == "ok" else "; a worker takes about 1.5 GiB")
    )


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    level = "ok" if free >= MIN_FREE_GIB else "warning"
    return Finding("disk", level, f"{free:.0f} GiB free here")


def _accelerator() -> Finding:
    import torch  # slow

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(count))
    return Finding("GPU", "ok", names or "none; training runs on the CPU over gloo")


def _ray() -> Finding:
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return Finding("ray cluster", "ok", "RAY_ADDRESS is not set; each run starts a local cluster")
    import ray  # slow

    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        resources = ray.cluster_resources()
        ray.shutdown()
    except (ConnectionError, RuntimeError, ValueError) as error:
        return Finding(
            "ray cluster", "error", f"{address} cannot be reached ({error}); unset RAY_ADDRESS or correct it"
        )
    there = ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
    level = "ok" if os.environ.get("RAY_AUTH_MODE") == "token" else "warning"
    return Finding(
        "ray cluster", level, f"{address}: {there}" + ("" if level == "ok" else "; RAY_AUTH_MODE=token is off")
    )


def _jobs_api(address: str | None) -> Finding:
    """Whether the cluster's dashboard, which runs any code it is sent, demands a token."""
    subject = "jobs API"
    if not address:
        return Finding(subject, "ok", "RAY_API_SERVER_ADDRESS is not set; no jobs are submitted from here")
    import requests  # comes with ray

    try:
        answer = requests.get(f"{address.rstrip('/')}/api/version", timeout=4)
    except requests.RequestException:
        return Finding(subject, "error", f"{address} does not answer; start the cluster or unset the variable")
    if answer.status_code in (401, 403):
        return Finding(subject, "ok", f"{address} demands a token")
    danger = "answers without a token: anyone who can reach it can run any code on the cluster"
    return Finding(subject, "warning", f"{address} {danger}; start it with RAY_AUTH_MODE=token (cluster/README.md)")


def _unshared_paths(path: str) -> list[Finding]:
    """Paths of a configuration that the nodes of a cluster would not see."""
    from pipelines.config.loading import parse_config, read_config
    from pipelines.config.pipeline import PipelineConfig
    from pipelines.preflight.portability import unshared

    raw = read_config(path)
    parse_config(raw)
    local = not (os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_API_SERVER_ADDRESS"))
    problems = unshared(PipelineConfig.model_validate(raw), one_machine=False)
    alone = "; this is fine as long as each run starts a local cluster" if local else ""
    found = [Finding(problem.field, "ok" if local else "warning", f"{problem.message}{alone}") for problem in problems]
    return found or [Finding("storage", "ok", f"all paths in {path} are shared")]


def _registration() -> Finding:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    import curlora  # noqa: F401

    known = "CURLORA" in PEFT_TYPE_TO_TUNER_MAPPING
    return Finding("CURLoRA in PEFT", "ok" if known else "error", "registered" if known else "not registered")

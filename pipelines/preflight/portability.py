"""Checks that every node of a cluster sees the paths of a configuration, and that it contains no secrets.

A job's working directory is deleted with the job, and nodes do not see each other's local disks. Without these checks,
both mistakes would show late, as a run that trains everything again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from pipelines.config.benchmarks import Benchmark
from pipelines.config.paths import is_hub_adapter, is_uri, looks_local
from pipelines.config.pipeline import PipelineConfig
from pipelines.errors import Problem

NETWORK = ("nfs", "cifs", "smb", "ceph", "lustre", "gpfs", "glusterfs", "beegfs", "fuse.", "9p", "virtiofs", "wekafs")
SQLITE = "sqlite:///"
TOKEN = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|ghp_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,})\b")


def named_paths(config: PipelineConfig) -> Iterator[tuple[str, str]]:
    """(field, value) of every path and URI that a configuration reads or writes; hub ids are neither."""
    yield "storage", config.storage
    start = config.start_from
    if start and not start.startswith("models:/") and not is_hub_adapter(start):
        yield "start_from", config.start_from
    if config.domains:
        yield "domains.inbox", config.domains.inbox
        if config.domains.drift:
            yield "domains.drift.sample", config.domains.drift.sample
    if config.tracking and config.tracking.uri.startswith(SQLITE):
        yield "tracking.uri", config.tracking.uri
    sources = [("base_model.path", config.base_model.path)]
    for section in ("tasks", "retention"):
        for number, source in enumerate(getattr(config, section)):
            if isinstance(source, Benchmark):
                yield from ((f"{section}.{number}.tasks", file) for file in source.files)
            else:
                sources.append((f"{section}.{number}.data", source.data))
    yield from ((field, value) for field, value in sources if is_uri(value) or looks_local(value))


def unshared(config: PipelineConfig, one_machine: bool) -> list[Problem]:
    """Paths that a job on the cluster would not find.

    Args:
        config: as written, before relative paths are made absolute.
        one_machine: the cluster is this machine, or all nodes are known to mount the same paths.
    """
    problems = []
    for field, value in named_paths(config):
        path = os.path.expandvars(_path(value))
        remedy = "a bucket such as s3://…, or a folder that every node mounts at the same path"
        if field == "tracking.uri":
            remedy = "an MLflow server such as http://mlflow:5000"
        if value.startswith("memory:"):
            problems.append(Problem(field, f"'{value}' is lost when the process ends; use {remedy}"))
        elif is_uri(value) and not value.startswith(("file:", "sqlite:")):
            continue
        elif not path.startswith(("/", "~")):
            where = "a job's working directory, which is deleted with the job"
            problems.append(Problem(field, f"'{value}' is relative and would be in {where}; use {remedy}"))
        elif not one_machine and (file_system := local_disk(path)):
            what = f"is on a local disk of this machine ({file_system}), which the cluster's nodes do not see"
            trust = "; if every node mounts it there, add --shared-paths"
            problems.append(Problem(field, f"'{value}' {what}; use {remedy}{trust}"))
    return problems


def _path(value: str) -> str:
    return value.removeprefix(SQLITE).removeprefix("file://")


def local_disk(path: str) -> str | None:
    """Type of the file system of a path if it is local to this machine; None if it is shared."""
    import psutil  # comes with ray

    path = os.path.realpath(os.path.expanduser(path))
    mounts = {mount.mountpoint.rstrip("/"): mount.fstype for mount in psutil.disk_partitions(all=True)}
    while path not in mounts and path:
        path = os.path.dirname(path).rstrip("/")
    file_system = mounts.get(path, "")
    return None if file_system.startswith(NETWORK) else file_system or "unknown"


def open_secrets(config: PipelineConfig) -> list[Problem]:
    """Passwords and tokens in a configuration, which is stored and shown in many places."""
    return list(_open_secrets(config.model_dump()))


def _open_secrets(value, field: str = "") -> Iterator[Problem]:
    if isinstance(value, dict | list):
        for key, nested in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _open_secrets(nested, f"{field}.{key}" if field else str(key))
    elif isinstance(value, str) and (TOKEN.search(value) or (is_uri(value) and urlsplit(value).password)):
        names = "HF_TOKEN, AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        message = f"contains a password or token; remove it and set it in the environment of the nodes ({names})"
        yield Problem(field, message)

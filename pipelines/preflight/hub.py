"""Checks once whether the model hub can be reached; without a network, its client would retry for minutes."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

from pipelines.config.benchmarks import Benchmark
from pipelines.config.paths import is_hub_adapter, is_uri, looks_local
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.tasks import RetentionCorpus

TIMEOUT_SECONDS = 3.0


def uses_hub(config: PipelineConfig) -> bool:
    """Whether the base model, the adapter to start from or any data is on the hub."""
    if config.start_from and is_hub_adapter(config.start_from):
        return True
    if any(on_hub(benchmark) for benchmark in config.benchmarks):
        return True
    names = [config.base_model.path, *(source.data for source in [*config.tasks, *config.corpora])]
    return any(is_hub_id(name) for name in names)


def on_hub(source: Benchmark | RetentionCorpus) -> bool:
    """Whether an entry of `retention` reads from the hub; the suite's own tasks do."""
    return len(source.files) < len(source.tasks) if isinstance(source, Benchmark) else is_hub_id(source.data)


def is_hub_id(name: str) -> bool:
    return not is_uri(name) and not looks_local(name)


def hub_available(config: PipelineConfig) -> bool:
    """True if the configuration needs no hub or the hub answers; else switch its client to offline (cache only).

    Call it before `huggingface_hub` is imported, which reads the switch only once.
    """
    if not uses_hub(config):
        return True
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return False
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") or _answers():
        return True
    os.environ["HF_HUB_OFFLINE"] = "1"
    return False


def _answers() -> bool:
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((endpoint.hostname, endpoint.port or 443), timeout=TIMEOUT_SECONDS).close()
    except OSError:
        return False
    return True


def split_unreachable(config, problems: list) -> tuple[list, list[str]]:
    """Split problems of data into real ones and, as text, those that only say that the hub cannot be reached."""
    fields = {f"tasks.{i}.data": task.data for i, task in enumerate(config.tasks)}
    remote = {field for field, data in fields.items() if is_hub_id(data)}
    for i, source in enumerate(config.retention):
        is_benchmark = isinstance(source, Benchmark)
        field = f"retention.{i}.{'tasks' if is_benchmark else 'data'}"
        fields[field] = ", ".join(source.tasks) if is_benchmark else source.data
        remote |= {field} if on_hub(source) else set()
    unasked = sorted({f"{p.field} ({fields[p.field]})" for p in problems if p.field in remote})
    return [p for p in problems if p.field not in remote], [f"{field}: the hub cannot be reached" for field in unasked]

"""Whether the model hub can be asked. Without a network its client retries for minutes; we ask once and say so."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

from pipelines.config import PipelineConfig, is_uri, looks_local

TIMEOUT_SECONDS = 3.0


def uses_hub(config: PipelineConfig) -> bool:
    """Whether the base model or any data is named by a hub id."""
    names = [config.base_model.path, *(source.data for source in [*config.tasks, *config.retention])]
    return any(is_hub_id(name) for name in names)


def is_hub_id(name: str) -> bool:
    return not is_uri(name) and not looks_local(name)


def hub_available(config: PipelineConfig) -> bool:
    """True if the configuration needs no hub or the hub answers; else switches its client to offline (cache only).

    Must run before `huggingface_hub` is imported: the client reads the switch once.
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

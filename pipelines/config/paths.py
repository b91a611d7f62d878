"""Distinguishes URIs, local paths and hub ids in a configuration, and makes paths absolute."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"
"""Folder of the configurations that come with the package."""


HUB_ADAPTER = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def is_uri(value: str) -> bool:
    return "://" in value


def is_gguf(value: str) -> bool:
    """Whether `value` names a GGUF file."""
    return not is_uri(value) and value.lower().endswith(".gguf")


def looks_local(value: str) -> bool:
    """Whether `value` is a path on this machine rather than a hub id: it looks like a path, or exists."""
    return not is_uri(value) and (value.startswith((".", "/", "~", "$")) or is_gguf(value) or Path(value).exists())


def absolute_path(value: str) -> str:
    value = os.path.expandvars(value)
    return os.path.abspath(os.path.expanduser(value)) if looks_local(value) else value


def is_hub_adapter(value: str) -> bool:
    """Whether `start_from` is a hub id, `owner/name` or `owner/name@revision`, and no path on this machine."""
    return bool(HUB_ADAPTER.fullmatch(value)) and not Path(value.partition("/")[0]).exists()


def public_name(path: str) -> tuple[str, bool]:
    """How others can name a base: its hub id, or else the name of its folder or file; whether it is a hub id.

    A local copy has a hub id if its config.json says so.
    """
    if not looks_local(path) and not is_uri(path):
        return path, True
    folder = Path(path)
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_name_or_path") or ""
    except (OSError, ValueError, AttributeError):
        found = ""
    if HUB_ADAPTER.fullmatch(found) and not looks_local(found):
        return found, True
    return path.rstrip("/").rpartition("/")[2], False


def absolute_sqlite(uri: str) -> str:
    prefix = "sqlite:///"
    if uri.startswith(prefix) and not uri.startswith(prefix + "/"):
        return prefix + os.path.abspath(uri[len(prefix) :])
    return uri

"""Loads a YAML file and `--set` overrides into a `PipelineConfig`, and reports all problems at once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipelines.config.benchmarks import is_file
from pipelines.config.explaining import false_numbers, problem_of
from pipelines.config.paths import CONFIGS, absolute_path, absolute_sqlite, is_hub_adapter, is_uri
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.search_space import check_space
from pipelines.config.type_defaults import with_type_defaults
from pipelines.config.yaml_text import YamlError, read_text
from pipelines.errors import ConfigError, Problem

VARIABLE = re.compile(r"\$\{?(\w+)\}?")


def resolve(config: PipelineConfig) -> PipelineConfig:
    """Make relative paths absolute, once, so that all processes agree on them."""
    raw = config.model_dump()
    raw["base_model"]["path"] = absolute_path(raw["base_model"]["path"])
    if not is_uri(raw["storage"]):
        raw["storage"] = os.path.abspath(os.path.expanduser(os.path.expandvars(raw["storage"])))
    start = raw["start_from"]
    if start and not is_uri(start) and not start.startswith("models:/") and not is_hub_adapter(start):
        raw["start_from"] = os.path.abspath(os.path.expanduser(os.path.expandvars(raw["start_from"])))
    for source in [*raw["tasks"], *raw["retention"]]:
        if "suite" in source:
            source["tasks"] = [
                os.path.abspath(os.path.expanduser(os.path.expandvars(task))) if is_file(task) else task
                for task in source["tasks"]
            ]
        else:
            source["data"] = absolute_path(source["data"])
    for section, field in (("domains", "inbox"), ("drift", "sample")):
        found = raw["domains"] if section == "domains" else (raw["domains"] or {}).get(section)
        if found and not is_uri(found[field]):
            found[field] = os.path.abspath(os.path.expanduser(os.path.expandvars(found[field])))
    if isinstance(raw["deepspeed"], str) and raw["deepspeed"].endswith(".json"):
        raw["deepspeed"] = os.path.abspath(os.path.expanduser(raw["deepspeed"]))
    if raw["tracking"]:
        raw["tracking"]["uri"] = absolute_sqlite(raw["tracking"]["uri"])
        raw["tracking"]["experiment"] = raw["tracking"]["experiment"] or raw["name"]
    return PipelineConfig.model_validate(raw)


def load_config(path: str | os.PathLike, overrides: Iterable[str] = ()) -> PipelineConfig:
    """Read, override and validate a configuration file, and make its paths absolute.

    Args:
        path: YAML file.
        overrides: `section.field=value` strings, values in YAML syntax; `tasks.0.data=…` reaches into lists.

    Raises:
        ConfigError: with every problem found.
    """
    return parse_config(read_config(path, overrides))


def read_config(path: str | os.PathLike, overrides: Iterable[str] = ()) -> dict:
    """A configuration file with its overrides as a mapping, not yet validated.

    Raises:
        ConfigError: the file cannot be read, or an override names no field.
    """
    raw = read_yaml(path)
    problems = [problem for item in overrides if (problem := _override(raw, item))]
    if problems:
        raise ConfigError(problems)
    return raw


def parse_config(raw: dict) -> PipelineConfig:
    """Validate a mapping, fill in the defaults of its type of adapter, and make its paths absolute.

    Raises:
        ConfigError: with every problem.
    """
    unset = {name for text in _strings(raw) for name in VARIABLE.findall(text) if name not in os.environ}
    if unset:
        raise ConfigError(Problem(f"${{{name}}}", "this environment variable is not set") for name in sorted(unset))
    if problems := list(false_numbers(raw, PipelineConfig)):
        raise ConfigError(problems)
    try:
        config = PipelineConfig.model_validate(with_type_defaults(raw))
        if config.search:
            check_space(config)  # no validator of SearchConfig: it builds whole configurations
        return resolve(config)
    except ValidationError as error:
        raise ConfigError([problem_of(item, PipelineConfig) for item in error.errors()]) from error


def _strings(value: Any) -> Iterable[str]:
    """The path fields of a configuration, which may contain environment variables."""
    if isinstance(value, dict):
        for key, nested in value.items():
            if key in ("path", "data", "storage", "inbox", "sample") and isinstance(nested, str):
                yield nested
            yield from _strings(nested)
    elif isinstance(value, list):
        for nested in value:
            yield from _strings(nested)


def _read_text(path: str) -> str:
    if not is_uri(path):
        return Path(path).read_text(encoding="utf-8")
    import fsspec  # only for jobs, whose configuration is in the run's storage

    try:
        return fsspec.open(path, "rb").open().read().decode("utf-8")
    except (OSError, ValueError):
        raise
    except Exception as error:  # each storage's driver has errors of its own, and may not be installed
        raise OSError(str(error) or type(error).__name__) from error


def read_yaml(path: str | os.PathLike) -> dict:
    """The top-level mapping of a YAML file.

    Raises:
        ConfigError: it cannot be read, is not YAML or not a mapping.
    """
    try:
        text = _read_text(str(path))
    except (OSError, ValueError) as error:
        remedy = f"check the path; shipped configurations are in {CONFIGS}"
        reason = getattr(error, "strerror", None) or error
        raise ConfigError([Problem(str(path), f"cannot be read ({reason}); {remedy}")]) from error
    try:
        raw = read_text(text)
    except YamlError as error:
        raise ConfigError([Problem(str(path), str(error))]) from error
    if not isinstance(raw, dict):
        raise ConfigError([Problem(str(path), f"expected a mapping at the top level, found {type(raw).__name__}")])
    return raw


def _override(raw: dict, item: str) -> Problem | None:
    key, separator, text = item.partition("=")
    if not separator or not key:
        return Problem("--set", f"'{item}' is not of the form field=value, e.g. training.learning_rate=5e-3")
    *parents, last = key.split(".")
    node: Any = raw
    for part in parents:
        node = _descend(node, part)
        if not isinstance(node, dict | list):
            return Problem("--set", f"'{key}': '{part}' is not a section")
    try:
        value = read_text(text)
    except YamlError as error:
        return Problem("--set", f"'{key}': {error}")
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            return Problem("--set", f"'{key}': the list has {len(node)} entries, counted from 0")
        node[int(last)] = value
    else:
        node[last] = value
    return None


def _descend(node: Any, part: str) -> Any:
    if isinstance(node, list):
        return node[int(part)] if part.isdigit() and int(part) < len(node) else None
    if not isinstance(node, dict):
        return None
    if not isinstance(node.get(part), dict | list):
        node[part] = {}
    return node[part]

"""The configuration as JSON Schema, for editors: every field with its sentence, its values and its limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.config.names import SELECTION_RULES
from pipelines.config.pipeline import PipelineConfig

DIALECT = "http://json-schema.org/draft-07/schema#"  # what YAML language servers understand best
BY_TYPE = {"AdapterConfig": ("r", "alpha"), "TrainingConfig": ("learning_rate",)}  # defaults of the type of adapter
COMMON_ADAPTERS = ["curlora", "lora", "none", "adalora", "ia3", "loha", "lokr", "vera"]


def schema(strategies: Mapping[str, Sequence[Any]]) -> dict:
    """The JSON Schema of a configuration file.

    Args:
        strategies: name → its options (`curlora.continual.options.Option`).
    """
    found = PipelineConfig.model_json_schema()
    parts = found["$defs"]
    for name, fields in BY_TYPE.items():
        for field in fields:
            del parts[name]["properties"][field]["default"]
    for field in found["properties"].values():
        if isinstance(field.get("default"), Mapping):
            del field["default"]  # a section's own fields have theirs
    adapter = parts["AdapterConfig"]["properties"]
    adapter["selection"]["enum"] = list(SELECTION_RULES)
    adapter["type"]["examples"] = COMMON_ADAPTERS
    _describe_strategies(parts["StrategyConfig"], strategies)
    return {"$schema": DIALECT, **found, "title": "Configuration of curlora"}


def _describe_strategies(section: dict, strategies: Mapping[str, Sequence[Any]]) -> None:
    """List the options of all strategies, and for each strategy allow its own only."""
    section["properties"]["name"]["enum"] = list(strategies)
    meanings: dict[str, dict[str, list[str]]] = {}
    for name, options in strategies.items():
        for option in options:
            limits = f" ({option.range})" if option.range else ""
            meanings.setdefault(option.name, {}).setdefault(f"{option.description}{limits}", []).append(name)
            section["properties"].setdefault(option.name, {"type": [_json_type(option.type), "null"]})
    for field, texts in meanings.items():
        lines = [f"{', '.join(names)}: {text}" for text, names in texts.items()]
        section["properties"][field]["description"] = "\n".join(lines)
    section["allOf"] = [
        {
            "if": {"properties": {"name": {"const": name}}, "required": ["name"]},
            "then": {"propertyNames": {"enum": ["name", *(option.name for option in options)]}},
        }
        for name, options in strategies.items()
    ]


def _json_type(kind: type) -> str:
    return {bool: "boolean", int: "integer", float: "number", str: "string"}[kind]

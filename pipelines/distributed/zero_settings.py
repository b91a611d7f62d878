"""Resolves the field `deepspeed:` (a shipped name, a JSON file or a mapping) and completes it for a run."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from pipelines.config.pipeline import PipelineConfig
from pipelines.errors import ConfigError, Problem, did_you_mean

SHIPPED = ("zero1", "zero2", "zero3", "zero3-offload")


def deepspeed_settings(value: str | dict) -> dict:
    """The field `deepspeed:` as a mapping.

    Raises:
        ConfigError: unknown name, unreadable file, invalid stage, or a block that `training:` replaces.
    """
    settings = value if isinstance(value, dict) else _read_settings(value)
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError([Problem("deepspeed", f"zero_optimization.stage is {stage!r}; use 0, 1, 2 or 3")])
    if "optimizer" in settings or "scheduler" in settings:
        raise ConfigError([Problem("deepspeed", "remove its optimizer and scheduler blocks; set them in training:")])
    return settings


def _read_settings(value: str) -> dict:
    if value in SHIPPED:
        return json.loads(resources.files("cluster").joinpath(f"deepspeed/{value}.json").read_text())
    if not value.endswith(".json"):
        raise ConfigError([Problem("deepspeed", f"unknown setting '{value}', {did_you_mean(value, SHIPPED)}")])
    try:
        return json.loads(Path(value).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError([Problem("deepspeed", f"'{value}' cannot be read as JSON ({error})")]) from error


def stage_of(settings: dict) -> int:
    """The ZeRO stage of DeepSpeed settings, 0 by default."""
    return settings.get("zero_optimization", {}).get("stage", 0)


def complete_settings(config: PipelineConfig, world_size: int) -> dict:
    """The settings with all values that DeepSpeed needs filled in; `zero.Init` does not understand "auto"."""
    training = config.training
    micro = -(-training.batch_size // training.gradient_accumulation // world_size)
    return deepspeed_settings(config.deepspeed) | {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "train_batch_size": micro * training.gradient_accumulation * world_size,
        "gradient_clipping": training.max_grad_norm,
        "bf16": {"enabled": config.base_model.dtype == "bfloat16"},
        "fp16": {"enabled": config.base_model.dtype == "float16"},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }

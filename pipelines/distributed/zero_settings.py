"""Resolves the field `deepspeed:` (a shipped name, a JSON file or a mapping) and completes it for a run.

A user's file is taken as it is written for Transformers, axolotl or LLaMA-Factory: values that say "auto" are filled
in as Transformers fills them, and blocks that a chain decides on itself (`training:`, `base_model.dtype`) are left
out; `ignored` names them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pipelines.config.pipeline import PipelineConfig
from pipelines.errors import ConfigError, Problem, did_you_mean

SHIPPED = ("zero1", "zero2", "zero3", "zero3-offload")
AUTO = "auto"
BY_TRAINING = (  # what `training:` decides
    "optimizer",
    "scheduler",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)
BY_DTYPE = ("bf16", "fp16", "amp", "fp8")  # what `base_model.dtype` decides
UNSUPPORTED = (  # they would change the batches, the model or the passes
    "autotuning",
    "compile",
    "compression_training",
    "curriculum_learning",
    "data_efficiency",
    "elasticity",
    "hybrid_engine",
    "pipeline",
    "progressive_layer_drop",
    "sequence_parallel_size",
    "sparse_attention",
    "tensor_parallel",
)
QUIET = {"steps_per_print": 2**31, "wall_clock_breakdown": False}  # output of DeepSpeed itself
OWN_OPTIMIZER = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}  # has two learning rates


def deepspeed_settings(value: str | dict, hidden: int | None = None) -> dict:
    """The field `deepspeed:` as a mapping, without what a chain decides on itself.

    Args:
        hidden: hidden size of the base, on which "auto" depends; None: DeepSpeed's own defaults.

    Raises:
        ConfigError: unknown name, unreadable file, or invalid stage.
    """
    given = _given(value)
    replaced = {*BY_TRAINING, *BY_DTYPE, *UNSUPPORTED, *QUIET, *OWN_OPTIMIZER}
    kept = {key: part for key, part in given.items() if key not in replaced}
    if isinstance(zero := kept.get("zero_optimization"), Mapping):
        kept["zero_optimization"] = {**zero, **(_sizes(zero, hidden) if hidden else {})}
    return _without_auto(kept) | OWN_OPTIMIZER


def ignored(config: PipelineConfig) -> str | None:
    """A sentence that names what is written in `deepspeed:` and not used; None if all of it is.

    Raises:
        ConfigError: as `deepspeed_settings`.
    """
    given, dtype = _given(config.deepspeed), config.base_model.dtype
    agreed = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype)
    where = {
        "training: decides": [key for key in BY_TRAINING if given.get(key, AUTO) != AUTO],
        f"base_model.dtype {dtype} decides": [k for k in BY_DTYPE if k != agreed and _is_demand(given.get(k))],
        "a chain does not support it": [key for key in UNSUPPORTED if _is_demand(given.get(key))],
    }
    parts = [f"{', '.join(keys)} ({why})" for why, keys in where.items() if keys]
    source = config.deepspeed if isinstance(config.deepspeed, str) else "its settings"
    return f"deepspeed: not used of {source}: {'; '.join(parts)}" if parts else None


def asks_for_sizes(value: str | dict) -> bool:
    """Whether settings depend on the base's hidden size."""
    return bool(_sizes(_given(value).get("zero_optimization", {}), 1))


def _is_demand(block: Any) -> bool:
    """Whether a block asks for something: neither absent nor switched off nor left to the caller."""
    if isinstance(block, Mapping):
        enabled = block.get("enabled", not block.get("disable", False))
        return enabled not in (False, AUTO)
    return block not in (None, False, AUTO, 0, 1)


def _given(value: str | dict) -> dict:
    """The settings as written, with a valid stage."""
    settings = value if isinstance(value, dict) else _read_settings(value)
    zero = settings.get("zero_optimization", {}) if isinstance(settings, dict) else None
    if not isinstance(zero, Mapping):
        raise ConfigError([Problem("deepspeed", "expected a mapping with zero_optimization: {stage: 0, 1, 2 or 3}")])
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError([Problem("deepspeed", f"zero_optimization.stage is {stage!r}; use 0, 1, 2 or 3")])
    return settings


def _sizes(zero: Mapping, hidden: int) -> dict[str, int]:
    """The sizes that are "auto", by the same rules as in Transformers."""
    rules = {
        "reduce_bucket_size": hidden * hidden,
        "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
        "stage3_param_persistence_threshold": 10 * hidden,
    }
    return {key: size for key, size in rules.items() if zero.get(key) == AUTO}


def _without_auto(value: Any) -> Any:
    """Without entries that are "auto": `zero.Init` does not understand them, so DeepSpeed's defaults apply."""
    if isinstance(value, Mapping):
        return {key: _without_auto(part) for key, part in value.items() if part != AUTO}
    return value


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


def complete_settings(config: PipelineConfig, world_size: int, hidden: int | None = None) -> dict:
    """The settings with all values that DeepSpeed needs filled in (see `deepspeed_settings`)."""
    training, half = config.training, config.base_model.dtype == "float16"
    loss_scaling = _without_auto(_given(config.deepspeed).get("fp16", {})) if half else {}
    micro = -(-training.batch_size // training.gradient_accumulation // world_size)
    return deepspeed_settings(config.deepspeed, hidden) | {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "train_batch_size": micro * training.gradient_accumulation * world_size,
        "gradient_clipping": training.max_grad_norm,
        "bf16": {"enabled": config.base_model.dtype == "bfloat16"},
        "fp16": loss_scaling | {"enabled": half},
        **QUIET,
    }

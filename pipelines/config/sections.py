"""The sections of a configuration that stand alone: base model, adapter, strategy, training, resources and others."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipelines.config.names import SELECTION_RULES, STRATEGIES
from pipelines.errors import did_you_mean

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class BaseModelConfig(Section):
    """The frozen base model."""

    path: str = Field(description="local folder or hub id of a causal language model")
    revision: str | None = Field(None, description="hub revision")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of the frozen weights")
    quantization: Literal["8bit", "4bit"] | None = Field(
        None, description="8bit (LLM.int8) | 4bit (NF4) by bitsandbytes, frozen; dtype is what it computes in"
    )
    trust_remote_code: bool = Field(False, description="run model code that comes with the weights")
    architecture: dict[str, Any] | None = Field(
        None, description="the base's config.json, inline: lets --dry-run work where the hub is out of reach"
    )


class AdapterConfig(Section):
    """What trains. `curlora` has fields of its own; `options` goes to any other PEFT type unchanged."""

    type: str = Field("curlora", description="curlora | none (heads only) | lora | any PEFT type installed")
    r: int = Field(23, gt=0, description="rank")
    alpha: float = Field(1.0, gt=0, description="scale of the update (lora: lora_alpha)")
    target_modules: str | list[str] = Field("all-linear", description="module name suffixes, or all-linear")
    selection: str = Field("inverse", description="rule that samples rows and columns")
    whiten: bool = Field(True, description="train U between orthonormal factors")
    scale: Literal["adam", "rsqrt", "none"] = Field("adam", description="scale of whitened factors")
    carry: Literal["continue", "stack", "fresh"] = Field(
        "continue",
        description="continue: the same adapter through all tasks; stack: a new block a task beside the frozen old "
        "ones (curlora, lora); fresh: a new adapter for every task",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="further fields of the PEFT config")

    @field_validator("selection")
    @classmethod
    def _known_selection(cls, value: str) -> str:
        if value not in SELECTION_RULES:
            raise ValueError(f"unknown selection rule '{value}', {did_you_mean(value, SELECTION_RULES)}")
        return value


class StrategyConfig(Section):
    """How training protects earlier tasks. Options other than the name belong to the strategy."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = "sequential"

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in STRATEGIES:
            raise ValueError(f"unknown strategy '{value}', {did_you_mean(value, STRATEGIES)}")
        return value

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


class TrainingConfig(Section):
    learning_rate: float = Field(3.0e-3, gt=0)
    head_learning_rate: float = Field(1.0e-2, gt=0)
    epochs: float = Field(3, gt=0)
    max_steps: int | None = Field(None, gt=0, description="optimizer steps a task; overrides epochs")
    batch_size: int = Field(16, gt=0, description="examples an optimizer step, over all workers")
    gradient_accumulation: int = Field(1, gt=0, description="micro-batches an optimizer step")
    max_length: int = Field(128, ge=8, description="tokens a sequence")
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0, description="gradient clipping; 0 turns it off")
    seed: int = Field(0, ge=0)
    gradient_checkpointing: bool = False
    max_train_examples: int | None = Field(None, gt=0, description="seeded subset of each task's training split")

    @model_validator(mode="after")
    def _micro_batches(self):
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of gradient_accumulation "
                f"{self.gradient_accumulation}; choose a multiple"
            )
        return self


class EvaluationConfig(Section):
    max_examples: int | None = Field(None, gt=0, description="seeded subset of each test split")
    max_retention_tokens: int | None = Field(None, gt=0, description="the beginning of each retention corpus")
    seed: int = Field(0, ge=0, description="of the subset; the same rows under every training seed")
    batch_tokens: int = Field(8192, gt=0, description="padded tokens a forward pass")
    earlier_every: int = Field(
        1, gt=0, description="earlier tasks are scored after every so many steps, and at the end"
    )


class ResourcesConfig(Section):
    workers: int = Field(2, gt=0)
    gpus_per_worker: float | Literal["auto"] = Field("auto", description="auto: 1 where the cluster has GPUs")
    cpus_per_worker: float = Field(1, gt=0)

    @field_validator("gpus_per_worker")
    @classmethod
    def _not_negative(cls, value):
        if value != "auto" and value < 0:
            raise ValueError(f"{value} is negative; use auto, 0 or a positive number")
        return value


class DurabilityConfig(Section):
    """What a run does against loss. Recorded, but no part of a step's identity: it changes no result."""

    checkpoint_seconds: float = Field(30.0, ge=0, description="between two checkpoints in the middle of a step")
    hang_timeout: float = Field(
        600.0, gt=0, description="seconds without a forward pass after which a worker ends itself and is restarted"
    )
    start_timeout: float = Field(
        600.0, gt=0, description="seconds without a sign of life from the workers after which the run fails"
    )
    max_failures: int = Field(3, ge=0, description="restarts without any progress between them")


class TrackingConfig(Section):
    uri: str = "sqlite:///mlflow.db"
    experiment: str | None = Field(None, description="default: the run's name")
    register_as: str | None = Field(None, description="model of the registry that finished chains become versions of")

    @field_validator("register_as")
    @classmethod
    def _safe(cls, value: str | None) -> str | None:
        return None if value is None else check_name(value)


class GateConfig(Section):
    """Limits that a finished chain is held against; the verdict stands in results.json.

    Against a champion (tracking.register_as) they are what each task and each corpus may lose; see pipelines/gate.py.
    """

    max_forgetting: float | None = Field(0.02, ge=0)
    max_nll_increase: float | None = Field(0.05, ge=0)
    max_perplexity_ratio: float | None = Field(1.05, gt=0)
    min_learning_accuracy: float | None = Field(None, ge=0, le=1)
    promote: bool = Field(True, description="a candidate that passes becomes the champion; false: by curlora promote")
    on_promotion: list[str] | None = Field(
        None, min_length=1, description="command and arguments run after a promotion, without a shell"
    )
    hook_timeout: float = Field(600.0, gt=0, description="seconds that the command may take")


def check_name(value: str) -> str:
    """Names become folder names and tags: a safe alphabet only."""
    if not SAFE_NAME.fullmatch(value):
        raise ValueError(f"'{value}' is not a safe name; use letters, digits, _ and - (at most 64)")
    return value


def micro_batch(training: TrainingConfig, world_size: int) -> int:
    """Examples a rank and pass, rounded up."""
    return math.ceil(training.batch_size / training.gradient_accumulation / world_size)

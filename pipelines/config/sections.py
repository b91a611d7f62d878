"""Sections of a configuration that depend on no other: model, adapter, strategy, training, resources and so on."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipelines.config.names import SELECTION_RULES, STRATEGIES
from pipelines.errors import did_you_mean

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


MOST_GPUS = 1024  # per worker


class Section(BaseModel):
    """A part of the configuration: immutable, strict about unknown keys, and with finite numbers only."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class BaseModelConfig(Section):
    """The base model. Its weights stay frozen throughout the chain."""

    path: str = Field(description="Local folder, .gguf file or hub id of a causal language model.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub; null: the default branch.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Data type in which the frozen weights are kept and computed with; auto: bfloat16 where the "
        "workers' device computes in it, else float32. A run keeps what it was begun with.",
    )
    quantization: Literal["8bit", "4bit"] | None = Field(
        None,
        description="Quantise the linear layers with bitsandbytes: 8bit is LLM.int8, 4bit is NF4, both computing in "
        "dtype; null: no quantisation.",
    )
    trust_remote_code: bool = Field(False, description="Run the model code that is published with the weights.")
    architecture: dict[str, Any] | None = Field(
        None,
        description="Content of the model's config.json, for --dry-run without access to the hub; null: read it from "
        "path.",
    )


class AdapterConfig(Section):
    """The trained adapter: the fields of CURLoRA, and `options` for any other PEFT type."""

    type: str = Field("curlora", description="curlora, none (train heads only), lora, or any other PEFT type.")
    r: int = Field(
        23,
        gt=0,
        le=65_536,
        description="Rank: columns and rows sampled per layer (curlora), or the rank of LoRA. Default: 23 for "
        "curlora, 8 for lora, PEFT's own for other types.",
    )
    alpha: float = Field(
        1.0,
        gt=0,
        le=1.0e6,
        description="Scale of the weight update; for lora, lora_alpha. Default: 1 for curlora, twice the rank for "
        "lora.",
    )
    target_modules: str | list[str] = Field(
        "all-linear", description="Names of the adapted modules, matched from the end, or all-linear."
    )
    selection: str = Field("inverse", description="Rule by which curlora selects columns and rows of a weight.")
    whiten: bool = Field(True, description="Train U between orthonormalised C and R (curlora).")
    scale: Literal["adam", "rsqrt", "none"] = Field(
        "adam",
        description="Factor of the update when whiten is on: adam keeps the step length of LoRA, rsqrt is alpha/√r, "
        "none is alpha.",
    )
    carry: Literal["continue", "stack", "fresh", "bank"] = Field(
        "continue",
        description="What the next task starts from: continue trains the same adapter, stack freezes it below a new "
        "block (curlora, lora), fresh starts a new adapter for every task, bank too, and keeps those of all tasks: "
        "each text goes to the one that it looks like.",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Further fields of the adapter's PEFT config.")

    @model_validator(mode="after")
    def _bank_of_something(self) -> AdapterConfig:
        if self.carry == "bank" and self.type == "none":
            raise ValueError("carry: bank keeps an adapter per task, but type is none; choose a type, e.g. curlora")
        return self

    @field_validator("selection")
    @classmethod
    def _known_selection(cls, value: str) -> str:
        if value not in SELECTION_RULES:
            raise ValueError(f"unknown selection rule '{value}', {did_you_mean(value, SELECTION_RULES)}")
        return value


class StrategyConfig(Section):
    """The continual-learning strategy. All keys other than `name` are options of the strategy itself."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field("sequential", description="Strategy that protects earlier tasks; sequential protects nothing.")

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
    """Optimisation of one task; every task of the sequence is trained with the same settings."""

    learning_rate: float = Field(
        3.0e-3,
        gt=0,
        le=100.0,
        description="Peak learning rate of the adapter. Default: 3e-3 for curlora, 2e-4 for lora.",
    )
    head_learning_rate: float = Field(
        1.0e-2, gt=0, le=100.0, description="Peak learning rate of the classifier heads."
    )
    epochs: float = Field(3, gt=0, le=10_000, description="Passes over the training split of each task.")
    max_steps: int | None = Field(
        None, gt=0, le=10**9, description="Optimizer steps per task, in place of epochs; null: epochs decides."
    )
    batch_size: int = Field(16, gt=0, le=2**20, description="Examples per optimizer step, over all workers.")
    gradient_accumulation: int = Field(1, gt=0, le=2**20, description="Micro-batches per optimizer step.")
    max_length: int = Field(
        1024, ge=8, le=2**21, description="Longest training sequence, in tokens, at most the context of the base."
    )
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="Share of the optimizer steps that warm up.")
    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine", description="Learning-rate schedule within a task."
    )
    weight_decay: float = Field(
        0.0, ge=0, le=100.0, description="Decoupled weight decay of the adapter; heads have none."
    )
    max_grad_norm: float = Field(
        1.0, ge=0, le=1.0e9, description="Gradients are clipped to this norm; 0 turns clipping off."
    )
    seed: int = Field(
        0, ge=0, le=2**32 - 1, description="Seed of initialisation, data order, dropout and subsampling."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, more time."
    )
    packing: Literal["auto"] | bool = Field(
        "auto",
        description="Lay the examples of a batch end to end in place of padding them, none seeing another; auto: "
        "where the base keeps them apart. It changes losses by rounding alone and enters no fingerprint.",
    )
    group_by_length: bool = Field(
        False,
        description="Make batches of examples of similar length, for bases whose examples cannot be packed: less "
        "padding, other batches.",
    )
    max_train_examples: int | None = Field(
        None, gt=0, le=10**12, description="Examples per task, a seeded subset of its training split; null: all."
    )
    validate_every: int | None = Field(
        None,
        gt=0,
        le=10**9,
        description="Optimizer steps between two measurements of the loss on the validation split (without one, on a "
        "tenth of train that is left out of training); a task keeps the state with the lowest. null: none.",
    )
    patience: int | None = Field(
        None,
        gt=0,
        le=10**6,
        description="A task stops after so many measurements in a row without a lower validation loss; null: never.",
    )

    @model_validator(mode="after")
    def _micro_batches(self):
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of gradient_accumulation "
                f"{self.gradient_accumulation}; choose a multiple"
            )
        return self

    @model_validator(mode="after")
    def _patience_has_measurements(self):
        if self.patience and not self.validate_every:
            raise ValueError(
                f"patience {self.patience} counts validations, but validate_every is null; set it to a number of "
                "optimizer steps, e.g. validate_every: 50"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """The fields that determine a training: not how a batch is laid out, and what is off only since it exists."""
        off = {name for name in ("group_by_length", "validate_every", "patience") if not getattr(self, name)}
        return self.model_dump(exclude={"packing"} | off)


class SamplesConfig(Section):
    """Prompts that the base and every step answer by greedy decoding, to be read side by side.

    They change no score, enter no fingerprint, and are answered for finished steps if they are added later.
    """

    prompts: list[str] = Field(
        default_factory=list,
        description="General prompts, each a user's message where the tokenizer has a chat template, else plain text.",
    )
    per_task: int = Field(
        1, ge=0, le=10_000, description="Rows of each task's test split that are answered, drawn by evaluation.seed."
    )
    max_new_tokens: int = Field(
        48,
        gt=0,
        le=10**6,
        description="Longest answer in tokens; a generation task's own max_new_tokens holds for its rows.",
    )

    @field_validator("prompts")
    @classmethod
    def _say_something(cls, value: list[str]) -> list[str]:
        for number, prompt in enumerate(value):
            if not prompt.strip():
                raise ValueError(f"prompt {number} is empty; write it or remove it")
            if prompt in value[:number]:
                raise ValueError(f"prompt {number} repeats prompt {value.index(prompt)}; remove one of them")
        return value

    @model_validator(mode="after")
    def _ask_something(self):
        if not self.prompts and not self.per_task:
            raise ValueError("prompts is empty and per_task is 0; give a prompt, or set samples: null")
        return self


class EvaluationConfig(Section):
    """What is scored after each step, and how much of it."""

    max_examples: int | None = Field(
        None, gt=0, le=10**12, description="Examples per test split, a seeded subset; null: all."
    )
    max_retention_tokens: int | None = Field(
        None, gt=0, le=10**12, description="Tokens from the beginning of each retention corpus; null: all."
    )
    seed: int = Field(
        0, ge=0, le=2**32 - 1, description="Seed of the subset; the same rows whatever training.seed is."
    )
    batch_tokens: int = Field(8192, gt=0, le=2**31, description="Tokens per forward pass, padding included.")
    earlier_every: int = Field(
        1, gt=0, le=10**6, description="Score earlier tasks after every n-th step, and after the last one."
    )
    samples: SamplesConfig | None = Field(
        None, description="Prompts answered by the base and after every step, for reading; null: none."
    )


class ResourcesConfig(Section):
    """Workers of the chain and what Ray reserves for each."""

    workers: int = Field(2, gt=0, le=100_000, description="Worker processes that train together.")
    gpus_per_worker: float | Literal["auto"] = Field(
        "auto", description="GPUs per worker; auto: 1 if the cluster has GPUs, else 0."
    )
    cpus_per_worker: float = Field(1, gt=0, le=10_000, description="CPU cores that Ray reserves per worker.")

    @field_validator("gpus_per_worker")
    @classmethod
    def _not_negative(cls, value):
        if value != "auto" and not 0 <= value <= MOST_GPUS:
            raise ValueError(f"is {value:g}; use auto, or a number from 0 to {MOST_GPUS}")
        return value


class DurabilityConfig(Section):
    """How a run protects itself against failures. It changes no result and enters no fingerprint."""

    checkpoint_seconds: float = Field(30.0, ge=0, le=1.0e7, description="Seconds between checkpoints within a step.")
    hang_timeout: float = Field(
        600.0,
        gt=0,
        le=1.0e7,
        description="Seconds without a forward pass after which a worker exits and is restarted.",
    )
    start_timeout: float = Field(
        600.0,
        gt=0,
        le=1.0e7,
        description="Seconds without any sign of life from the workers after which the run fails.",
    )
    max_failures: int = Field(
        3, ge=0, le=10**6, description="Restarts of the workers without progress in between before the run fails."
    )


class TrackingConfig(Section):
    """MLflow: where the chain is recorded."""

    uri: str = Field("sqlite:///mlflow.db", description="MLflow tracking URI.")
    experiment: str | None = Field(None, description="MLflow experiment; null: the run's name.")
    register_as: str | None = Field(
        None, description="Registered model that finished chains become versions of; null: none are registered."
    )
    report_to: list[Literal["tensorboard", "wandb"]] = Field(
        default_factory=list,
        description="Where the curves of every step go besides MLflow: tensorboard (files in tensorboard/ of the "
        "run), wandb (its WANDB_* variables apply; project: experiment).",
    )

    @field_validator("register_as")
    @classmethod
    def _safe(cls, value: str | None) -> str | None:
        return None if value is None else check_name(value)


class GateConfig(Section):
    """Limits that a finished chain must keep; the verdict is written to results.json.

    Without a champion (see tracking.register_as) they apply to the aggregates of the chain; against a champion, to the
    loss on each single task and corpus (pipelines/promotion/gate.py).
    """

    max_forgetting: float | None = Field(
        0.02,
        ge=0,
        le=1,
        description="Largest loss of a score (a task, a benchmark) such as accuracy, from 0 to 1; null: no limit.",
    )
    max_nll_increase: float | None = Field(
        0.05,
        ge=0,
        le=1.0e3,
        description="Largest increase of a language-modelling task's loss, nats per token; null: no limit.",
    )
    max_perplexity_ratio: float | None = Field(
        1.05, gt=0, le=1.0e9, description="Largest perplexity on retained text relative to before; null: no limit."
    )
    min_learning_accuracy: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Smallest mean score of tasks right after their training; null: no limit.",
    )
    promote: bool = Field(
        True, description="Make a candidate that passes the champion at once; false: only by curlora promote."
    )
    on_promotion: list[str] | None = Field(
        None, min_length=1, description="Command and arguments to run after a promotion, without a shell; null: none."
    )
    hook_timeout: float = Field(600.0, gt=0, le=1.0e7, description="Seconds that the on_promotion command may take.")


def check_name(value: str) -> str:
    """Return a name that is safe in folder names and tags.

    Raises:
        ValueError: it has other characters than letters, digits, _ and -, or more than 64.
    """
    if not SAFE_NAME.fullmatch(value):
        raise ValueError(f"'{value}' is not a safe name; use letters, digits, _ and - (at most 64)")
    return value


def micro_batch(training: TrainingConfig, world_size: int) -> int:
    """Examples per rank and forward pass, rounded up."""
    return math.ceil(training.batch_size / training.gradient_accumulation / world_size)

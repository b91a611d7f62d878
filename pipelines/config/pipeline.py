"""The whole configuration of a run, and the rules between its sections.

`config/loading.py` makes one from a YAML file. Nothing here touches data, models or a cluster.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from pipelines.config.benchmarks import Benchmark, Retained
from pipelines.config.domains import DomainsConfig
from pipelines.config.notify import NotifyConfig
from pipelines.config.search import SearchConfig
from pipelines.config.sections import (
    AdapterConfig,
    BaseModelConfig,
    DurabilityConfig,
    EvaluationConfig,
    GateConfig,
    ResourcesConfig,
    Section,
    StrategyConfig,
    TrackingConfig,
    TrainingConfig,
    check_name,
)
from pipelines.config.serve import ServeConfig
from pipelines.config.tasks import RetentionCorpus, Task


class PipelineConfig(Section):
    """Configuration of a run: one chain of fine-tunes, its evaluation and its records."""

    name: str = Field(description="Name of the run: its folder below storage and its MLflow run.")
    base_model: BaseModelConfig = Field(description="The frozen base model.")
    storage: str = Field("./runs", description="Folder or URI, visible to all nodes, in which runs are kept.")
    start_from: str | None = Field(
        None,
        description="Adapter to continue from: <run path or URI>/<step>, models:/<name>@<alias>, or a PEFT adapter "
        "(folder, URI or hub id); null: start at the base.",
    )
    adapter: AdapterConfig = Field(AdapterConfig(), description="The adapter that is trained.")
    strategy: StrategyConfig = Field(StrategyConfig(), description="How earlier tasks are protected.")
    training: TrainingConfig = Field(TrainingConfig(), description="Optimisation of each task.")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="Scoring after each step.")
    resources: ResourcesConfig = Field(ResourcesConfig(), description="Number of workers and what each needs.")
    durability: DurabilityConfig = Field(DurabilityConfig(), description="Checkpoints, timeouts and restarts.")
    deepspeed: str | dict[str, Any] = Field(
        "zero2",
        description="DeepSpeed settings: zero1, zero2, zero3, zero3-offload, path of a JSON file, or a map. What "
        "training and base_model decide is not taken from it.",
    )
    tasks: list[Task] = Field(
        default_factory=list, description="Tasks in the order of training; may be empty if domains is set."
    )
    retention: list[Retained] = Field(
        default_factory=list,
        description="Text whose perplexity is measured after each step, and benchmarks; never trained on.",
    )
    search: SearchConfig | None = Field(None, description="Hyperparameter search; null: none.")
    tracking: TrackingConfig | None = Field(TrackingConfig(), description="MLflow; null: record nothing there.")
    gate: GateConfig | None = Field(None, description="Limits that a finished chain must keep; null: no gate.")
    domains: DomainsConfig | None = Field(
        None, description="Inbox of new domains for curlora tick and schedule; null: none."
    )
    notify: NotifyConfig | None = Field(
        None, description="Who is told of failures, refusals, promotions and drift; null: nobody."
    )
    serve: ServeConfig = Field(ServeConfig(), description="The server of curlora serve.")

    @field_validator("name")
    @classmethod
    def _safe(cls, value: str) -> str:
        return check_name(value)

    @model_validator(mode="after")
    def _has_tasks(self):
        if not self.tasks and self.domains is None:
            raise ValueError("tasks: is empty; name at least one")
        return self

    @model_validator(mode="after")
    def _names_are_unique(self):
        names = [source.name for source in [*self.tasks, *self.retention]]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"tasks and retention share the name(s) {', '.join(twice)}; give each its own name")
        if "base" in names:
            raise ValueError("the name 'base' is taken by row 0 of the score matrix; rename the task")
        return self

    @model_validator(mode="after")
    def _search_begins_at_the_base(self):
        if self.search and (self.start_from or self.domains):
            found = "start_from" if self.start_from else "domains"
            raise ValueError(
                f"search and {found} are both set, but a search begins at the base; set search: null and write the "
                "setting that a search (curlora tune) has found into adapter and training"
            )
        return self

    @model_validator(mode="after")
    def _batch_feeds_every_worker(self):
        micro = self.training.batch_size // self.training.gradient_accumulation
        if micro < self.resources.workers:
            raise ValueError(
                f"training.batch_size {self.training.batch_size} / gradient_accumulation "
                f"{self.training.gradient_accumulation} = {micro} examples for resources.workers "
                f"{self.resources.workers}; raise batch_size or lower workers"
            )
        return self

    @property
    def run_uri(self) -> str:
        return f"{self.storage.rstrip('/')}/{self.name}"

    @property
    def is_joint(self) -> bool:
        return self.strategy.name == "joint"

    @property
    def corpora(self) -> list[RetentionCorpus]:
        """The entries of `retention` that are text."""
        return [source for source in self.retention if isinstance(source, RetentionCorpus)]

    @property
    def benchmarks(self) -> list[Benchmark]:
        """The entries of `retention` that are benchmarks."""
        return [source for source in self.retention if isinstance(source, Benchmark)]

    def task(self, name: str):
        return next(task for task in self.tasks if task.name == name)

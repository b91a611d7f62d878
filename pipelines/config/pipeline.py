"""The YAML configuration of a run as pydantic models, with every rule about it.

`load_config` turns a file and `--set` overrides into a `PipelineConfig` or raises one `ConfigError` that lists *all*
problems, each with the field, the value found and the remedy. Nothing here touches data, models or a cluster.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from pipelines.config.domains import DomainsConfig
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
from pipelines.config.tasks import RetentionCorpus, Task


class PipelineConfig(Section):
    name: str
    base_model: BaseModelConfig
    storage: str = "./runs"
    start_from: str | None = Field(
        None, description="what the chain grows from: <run URI or path>/<step> or models:/name@alias; null: the base"
    )
    adapter: AdapterConfig = AdapterConfig()
    strategy: StrategyConfig = StrategyConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    resources: ResourcesConfig = ResourcesConfig()
    durability: DurabilityConfig = DurabilityConfig()
    deepspeed: str | dict[str, Any] = Field("zero2", description="zero1 | zero2 | zero3 | zero3-offload | path | map")
    tasks: list[Task] = Field(default_factory=list, description="may be empty where domains bring them")
    retention: list[RetentionCorpus] = Field(default_factory=list)
    search: SearchConfig | None = Field(None, description="null: every field as it stands")
    tracking: TrackingConfig | None = Field(TrackingConfig(), description="null: no MLflow")
    gate: GateConfig | None = None
    domains: DomainsConfig | None = None

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

    def task(self, name: str):
        return next(task for task in self.tasks if task.name == name)

"""Benchmarks of a configuration: tasks of an evaluation suite, scored after every step and never trained on."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from pipelines.config.sections import Section, check_name
from pipelines.config.tasks import RetentionCorpus


class Benchmark(Section):
    """Tasks of EleutherAI's lm-evaluation-harness as one entry of `retention`."""

    name: str = Field(description="Name in results, folders and MLflow: letters, digits, _ and -.")
    suite: Literal["lm-eval"] = Field(description="The suite: lm-eval, installed by pip install 'curlora[lm-eval]'.")
    tasks: list[str] = Field(
        min_length=1,
        description="Names of tasks, groups or tags of the suite, or paths of YAML files that define a task.",
    )
    metric: str | None = Field(
        None,
        description="Metric of each example, e.g. acc_norm, or with a filter: exact_match,strict-match; null: the "
        "first of each task that is a mean over examples and better when higher.",
    )
    limit: int | None = Field(None, gt=0, le=10**9, description="Examples per task, from its beginning; null: all.")
    num_fewshot: int | None = Field(None, ge=0, le=1000, description="Solved examples before each; null: the task's.")
    chat_template: bool = Field(False, description="Write prompts as chats, by the tokenizer's chat template.")

    @field_validator("name")
    @classmethod
    def _safe(cls, value: str) -> str:
        return check_name(value)

    @field_validator("tasks")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        twice = sorted({name for name in value if value.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is given twice; name each task once")
        return value

    @property
    def files(self) -> list[str]:
        """The tasks that are YAML files."""
        return [task for task in self.tasks if is_file(task)]


def is_file(task: str) -> bool:
    """Whether a task of a benchmark is given by its file."""
    return PurePath(task).suffix in (".yaml", ".yml")


def _tag(value: Any) -> str:
    suite = "suite" in value if isinstance(value, dict) else isinstance(value, Benchmark)
    return "Benchmark" if suite else "RetentionCorpus"


Retained = Annotated[
    Annotated[RetentionCorpus, Tag("RetentionCorpus")] | Annotated[Benchmark, Tag("Benchmark")], Discriminator(_tag)
]
RETAINED: dict[str, type[Section]] = {"RetentionCorpus": RetentionCorpus, "Benchmark": Benchmark}

"""The section `search:`: space, objective, number of trials, scheduler."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from pipelines.config.sections import Section


class Range(Section):
    """Numbers between two ends, both included. Whole ends mean whole numbers; write 1.0 for fractions."""

    low: int | float
    high: int | float
    log: bool = Field(False, description="equal chances for equal ratios: for learning rates")

    @model_validator(mode="after")
    def _is_a_range(self):
        if not self.low < self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs positive numbers, low is {self.low:g}")
        return self

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)


Choices = Annotated[
    Annotated[Range, Tag("range")] | Annotated[list[Any], Tag("list[Any]")],
    Discriminator(lambda value: "list[Any]" if isinstance(value, list) else "range"),
]


class Objective(Section):
    """What a trial is judged by, on validation data alone: learning − retention_weight × retention loss.

    Learning is the new task's score (minus its NLL for text); retention loss is the mean, over earlier tasks and
    retained text, of what each has lost since before the trial (score, or nats a token).
    """

    retention_weight: float = Field(1.0, ge=0)
    max_examples: int | None = Field(None, gt=0, description="seeded subset of each validation part")
    max_retention_tokens: int | None = Field(20_000, gt=0, description="the beginning of each retained text")


SEARCHED = ("adapter", "strategy", "training")

CARRIED = ("adapter", "strategy.name")  # what an adapter that goes from task to task cannot change on its way


class SearchConfig(Section):
    """Settings found by trials on validation data: `run` searches before its first task or before every one."""

    when: Literal["first", "every"] | None = Field(
        "first", description="first: on the first task, kept for all; every: before each task; null: curlora tune only"
    )
    space: dict[str, Choices] = Field(
        min_length=1, description="field path → a list of values, or a range {low, high, log}"
    )
    start_with: list[dict[str, Any]] = Field(
        default_factory=list, description="settings tried first, of any fields: field path → value"
    )
    trials: int | None = Field(None, gt=0, description="with start_with; default: 16, or all of a grid")
    algorithm: Literal["random", "optuna", "grid"] = "random"
    scheduler: Literal["asha", "none"] = Field("asha", description="asha: trials that lag behind at a rung end there")
    reduction: int = Field(3, ge=2, description="asha: one in so many goes on from a rung")
    rungs: int = Field(2, ge=1, le=6, description="asha: rungs before the end, each at 1/reduction of the next")
    objective: Objective = Objective()
    trial_training: dict[str, Any] = Field(
        default_factory=dict,
        description="training fields of trials alone, e.g. {max_train_examples: 2000}; the winner then trains anew",
    )
    max_concurrent: int | None = Field(None, gt=0, description="default: as many trials as the cluster holds")
    time_budget: float | None = Field(None, gt=0, description="seconds for one search; trials end there")
    seed: int = Field(0, ge=0)

    @field_validator("space")
    @classmethod
    def _has_choices(cls, value: dict) -> dict:
        for path, choices in value.items():
            if isinstance(choices, list) and len({str(c) for c in choices}) < len(choices):
                raise ValueError(f"{path} names a value twice")
            if isinstance(choices, list) and len(choices) < 2:
                raise ValueError(f"{path} has no choice; give two values or more, or set the field itself")
        return value

    @model_validator(mode="after")
    def _algorithm_fits(self):
        ranges = [path for path, choices in self.space.items() if isinstance(choices, Range)]
        if self.algorithm == "grid" and ranges:
            raise ValueError(f"algorithm 'grid' needs a list of values for {', '.join(ranges)}; or use random")
        if self.trials is not None and self.trials < len(self.start_with):
            raise ValueError(f"trials {self.trials} is fewer than the {len(self.start_with)} settings of start_with")
        return self

    @property
    def paths(self) -> list[str]:
        return list(dict.fromkeys([*self.space, *(path for point in self.start_with for path in point)]))

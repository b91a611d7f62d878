"""The section `search:`: search space, objective, number of trials and scheduler of a hyperparameter search."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from pipelines.config.sections import Section


class Range(Section):
    """Numbers from `low` to `high`, both included: integers if both are integers (write 1.0 for real numbers)."""

    low: int | float = Field(description="Smallest value.")
    high: int | float = Field(description="Largest value.")
    log: bool = Field(False, description="Draw uniformly on a logarithmic scale, e.g. for learning rates.")

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
    """What a search maximises, on validation data alone: learning − retention_weight × retention loss.

    Learning is the score of the new task (for language modelling, its negative NLL). Retention loss is the mean, over
    earlier tasks and retention corpora, of what each has lost during the trial (score, or nats per token).
    """

    retention_weight: float = Field(
        1.0, ge=0, le=1.0e6, description="Weight of the retention loss; 0: learning alone."
    )
    max_examples: int | None = Field(
        None, gt=0, le=10**12, description="Examples per validation split, a seeded subset; null: all."
    )
    max_retention_tokens: int | None = Field(
        20_000, gt=0, le=10**12, description="Tokens from the beginning of each retention corpus; null: all."
    )


SEARCHED = ("adapter", "strategy", "training")  # sections whose fields can be searched
CARRIED = ("adapter", "strategy.name")  # cannot change between tasks that share one adapter


class SearchConfig(Section):
    """Hyperparameter search on validation data, before the first task of a run or before every task."""

    when: Literal["first", "every"] | None = Field(
        "first",
        description="first: search on the first task and keep the setting; every: search before each task; "
        "null: only by curlora tune.",
    )
    space: dict[str, Choices] = Field(
        min_length=1, description="Field path → list of values, or range {low, high, log}."
    )
    start_with: list[dict[str, Any]] = Field(
        default_factory=list, description="Settings to try first, each a map from field path to value."
    )
    trials: int | None = Field(
        None, gt=0, le=10**6, description="Trials, start_with included; null: 16 or the whole grid, and start_with."
    )
    algorithm: Literal["random", "optuna", "grid"] = Field(
        "random", description="How settings are chosen: at random, by Optuna's TPE, or all combinations of lists."
    )
    scheduler: Literal["asha", "none"] = Field(
        "asha", description="asha stops trials that lag behind; none trains all to the end."
    )
    reduction: int = Field(3, ge=2, le=10**3, description="ASHA: one in this many trials continues after a rung.")
    rungs: int = Field(2, ge=1, le=6, description="ASHA: rungs before the end, each at 1/reduction of the next.")
    objective: Objective = Field(Objective(), description="What the search maximises.")
    trial_training: dict[str, Any] = Field(
        default_factory=dict,
        description="Training fields of trials only, e.g. {max_train_examples: 2000}; the winner is trained anew.",
    )
    max_concurrent: int | None = Field(
        None, gt=0, le=10**6, description="Trials at the same time; null: as many as fit."
    )
    time_budget: float | None = Field(
        None, gt=0, le=1.0e9, description="Seconds after which a search stops its trials; null: no limit."
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of the random settings.")

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

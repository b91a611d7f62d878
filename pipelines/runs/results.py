"""`results.json`: the results of a whole run, with the score matrix and everything computed from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipelines.runs.record import OPTIONAL, Record
from pipelines.runs.step_record import Seconds

Series = list[float | None]  # one value per row of the score matrix


@dataclass(frozen=True)
class StepSummary(Record):
    """A step of the chain in `results.json`; `seconds` is empty until the step is done."""

    task: str
    fingerprint: str
    directory: str
    mlflow_run_id: str | None = None
    seconds: Seconds = field(default_factory=Seconds)
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None

    @property
    def is_done(self) -> bool:
        return self.seconds != Seconds()


@dataclass(frozen=True)
class SearchSummary(Record):
    """Outcome of the search before a step.

    Attributes:
        pareto: numbers of the trials on the Pareto front of learning and retention.
        steps: optimizer steps `spent`, and the `whole` that running every trial to its end would take.
        values: the chosen settings.
        directory: the search's folder.
        trials: number of trials.
        adopted: whether the adapter of the winning trial became the step's adapter.
        until: position of the last step trained with these settings.
    """

    task: str
    position: int
    why: str
    rule: str
    pareto: list[int]
    steps: dict[str, int]
    values: dict[str, Any]
    directory: str
    trials: int
    adopted: bool
    until: int


@dataclass(frozen=True)
class BenchmarkScores(Record):
    """A benchmark in `results.json`.

    Attributes:
        scores, extras: its score and other metrics in every row.
        p: p-value of a one-sided paired test that the last row is no worse than row 0; None where one is missing.
    """

    metric: str
    examples: int
    scores: Series
    extras: list[dict[str, float] | None]
    p: float | None = None

    @property
    def loss(self) -> float | None:
        """Score lost since row 0; None where one of them is missing."""
        before, after = self.scores[0], self.scores[-1]
        return None if before is None or after is None else before - after


@dataclass(frozen=True)
class Results(Record):
    """Results of a run; a trial of a search has no score matrix. `metrics/score_matrix.py` defines the metrics.

    Attributes:
        status: running, finished, failed or stopped.
        adapter: `type` and `r`.
        start_from: `run` and `step` that the chain continues from.
        learned_at: task → first row of the matrix after its training.
        metric: task → its metric.
        scores: `scores[t][i]` is the score on task i after step t; row 0 is before training.
        perplexity, nll: retention corpus → its value in every row.
        majority: task → score of always answering the most frequent class.
        extras: task → its other metrics in every row.
        benchmarks: name → its scores; None without benchmarks.
        gate: the verdict, `{"passed", "reasons", …}`.
        registry: the registered version, `{"name", "version", "uri", "promoted", …}`, or `failure`: why there is none.
        samples: keys of the questions of `evaluation.samples`, in order; the steps' `metrics.json` holds the answers.
        ran: whether the call that returned this had anything to do. Not in the file.
    """

    run: str
    status: str
    base_model: str
    base_fingerprint: str | None = None
    adapter: dict[str, Any] = field(default_factory=dict)
    strategy: str | None = None
    start_from: dict[str, str] | None = None
    tasks: tuple[str, ...] = ()
    learned_at: dict[str, int] = field(default_factory=dict)
    metric: dict[str, str] = field(default_factory=dict)
    trainable_parameters: int | None = None
    head_parameters: int | None = None
    adapter_bytes: int | None = None
    scores: list[Series] = field(default_factory=list)
    perplexity: dict[str, Series] = field(default_factory=dict)
    nll: dict[str, Series] = field(default_factory=dict)
    majority: dict[str, float | None] = field(default_factory=dict)
    extras: dict[str, list[dict[str, float] | None]] = field(default_factory=dict)
    average_accuracy: float | None = None
    learning_accuracy: float | None = None
    backward_transfer: float | None = None
    forward_transfer: float | None = None
    forgetting: float | None = None
    perplexity_ratio: float | None = None
    nll_average: float | None = None
    nll_learning: float | None = None
    nll_backward_transfer: float | None = None
    gate: dict[str, Any] | None = None
    registry: dict[str, Any] | None = None
    seconds: Seconds = field(default_factory=Seconds)
    steps: tuple[StepSummary, ...] = ()
    searches: tuple[SearchSummary, ...] | None = field(default=None, metadata=OPTIONAL)
    benchmarks: dict[str, BenchmarkScores] | None = field(default=None, metadata=OPTIONAL)
    samples: tuple[str, ...] | None = field(default=None, metadata=OPTIONAL)
    ran: bool | None = field(default=None, metadata=OPTIONAL)

    @property
    def is_finished(self) -> bool:
        return self.status == "finished"

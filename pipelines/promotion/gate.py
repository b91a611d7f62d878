"""Decides whether a finished chain may be used: by comparison with the champion, or by the limits of `gate:` alone.

Pure functions of score cells and per-example outcomes. A candidate is refused for a loss against the champion only if
the loss exceeds its limit *and* is significant in a one-sided paired test on the same test examples (p < 0.05): exact
McNemar where an example is right or wrong, a sign-flip permutation test where it has a score or a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from pipelines.config.sections import GateConfig
from pipelines.metrics.paired import paired_p_value
from pipelines.metrics.score_matrix import higher_is_better, perplexity
from pipelines.reporting.formatting import compact, number, percent, probability
from pipelines.runs.results import BenchmarkScores, Results
from pipelines.runs.step_record import Cell

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Side:
    """One of the two compared adapters: champion or candidate.

    Attributes:
        cells: name → score cell of its last row.
        outcomes: name → outcomes on the test examples, in their order; reads them on demand.
        tasks: those that it and its ancestors were trained on.
    """

    cells: Mapping[str, Cell]
    outcomes: Callable[[str], list[dict]]
    tasks: Sequence[str] = ()


@dataclass(frozen=True)
class Comparison:
    """One task or corpus: champion against candidate.

    Attributes:
        loss: how much worse the candidate is: in units of the metric (nats per token for text); on retained text the
            ratio of perplexities − 1.
        limit: largest loss allowed; None: no limit.
        p: p-value of the paired test; None where the loss is within its limit.
    """

    name: str
    role: str
    metric: str
    champion: float
    candidate: float
    loss: float
    limit: float | None
    p: float | None
    test: str | None
    examples: int

    @property
    def exceeds(self) -> bool:
        return self.limit is not None and self.loss > self.limit

    @property
    def refused(self) -> bool:
        return self.exceeds and self.p is not None and self.p < SIGNIFICANT

    @property
    def sentence(self) -> str:
        return f"{self._change} ({self.test}, {self.examples} examples, p = {probability(self.p)})"

    @property
    def note(self) -> str:
        """For a loss that exceeds its limit but is not significant."""
        return f"{self._change}, but not significant (p = {probability(self.p)})"

    @property
    def _change(self) -> str:
        change = f"{self.name}: {self.metric} {number(self.champion, 4)} → {number(self.candidate, 4)}"
        if self.role == "retention":
            return f"{change}, a rise by {percent(self.loss)} over the limit {percent(self.limit)}"
        return f"{change}, a loss of {number(self.loss, 4)} over the limit {compact(self.limit)}"


# -- without a champion
def judge(results: Results, gate: GateConfig) -> dict:
    """`{"passed": bool, "reasons": [...]}`; an aggregate that is None (forgetting of one task) exceeds no limit.

    A benchmark may lose `max_forgetting` since row 0; a larger loss that is not significant is among the `notes`.
    """
    transfer = results.nll_backward_transfer
    limits = [
        ("forgetting", results.forgetting, gate.max_forgetting, False),
        ("nll increase", None if transfer is None else -transfer, gate.max_nll_increase, False),
        ("perplexity ratio", results.perplexity_ratio, gate.max_perplexity_ratio, False),
        _floor(results, gate),
    ]
    reasons = list(filter(None, (_broken(*limit) for limit in limits)))
    lost = [_lost(name, found, gate.max_forgetting) for name, found in (results.benchmarks or {}).items()]
    reasons += [text for text, significant in filter(None, lost) if significant]
    notes = [text for text, significant in filter(None, lost) if not significant]
    return {"passed": not reasons, "reasons": reasons} | ({"notes": notes} if notes else {})


def _lost(name: str, found: BenchmarkScores, limit: float | None) -> tuple[str, bool] | None:
    """(what a benchmark has lost beyond its limit, whether that is significant)."""
    if limit is None or found.loss is None or found.p is None or found.loss <= limit:
        return None
    change = f"{name}: {found.metric} {number(found.scores[0], 4)} → {number(found.scores[-1], 4)}"
    significant = found.p < SIGNIFICANT
    text = f"{change}, a loss of {number(found.loss, 4)} over the limit {compact(limit)}"
    tested = f"paired test, {found.examples} examples, p = {probability(found.p)}"
    return f"{text} ({tested})" if significant else f"{text}, but not significant ({tested})", significant


def _floor(results: Results, gate: GateConfig) -> tuple[str, float | None, float | None, bool]:
    return "learning accuracy", results.learning_accuracy, gate.min_learning_accuracy, True


def _broken(name: str, value: float | None, limit: float | None, at_least: bool) -> str | None:
    if value is None or limit is None or not ((value < limit) if at_least else (value > limit)):
        return None
    return f"{name} {number(value, 4)} is {'below' if at_least else 'above'} the limit {compact(limit)}"


# -- against a champion
def judge_against(champion: Side, candidate: Side, results: Results, gate: GateConfig) -> dict:
    """`{"passed", "reasons", "notes", "comparisons"}` for a candidate that would replace the champion.

    The candidate must have been scored on every task that the champion has learned: a task that is not scored may be
    forgotten. `min_learning_accuracy` applies as well if it is set.
    """
    comparisons, unmeasured, notes = [], [], []
    for name, cell in champion.cells.items():
        mine = candidate.cells.get(name)
        if mine is None:
            if name in champion.tasks:
                unmeasured.append(f"{name}: the champion has learned it, the candidate was not scored on it")
        elif mine.key != cell.key:
            notes.append(f"{name} is not compared: its test data or the way it is scored has changed")
        else:
            comparisons.append(_compare(name, cell, mine, champion, candidate, gate))
    notes += [c.note for c in comparisons if c.exceeds and not c.refused]
    floor = _broken(*_floor(results, gate))
    reasons = [c.sentence for c in comparisons if c.refused] + unmeasured + ([floor] if floor else [])
    return {
        "passed": not reasons,
        "reasons": reasons,
        "notes": notes,
        "comparisons": [asdict(comparison) | {"refused": comparison.refused} for comparison in comparisons],
    }


def _compare(name: str, before: Cell, after: Cell, champion: Side, candidate: Side, gate: GateConfig) -> Comparison:
    loss, limit = _loss(before, after, gate)
    p, test = None, None
    if limit is not None and loss > limit:
        p, test = paired_p_value(champion.outcomes(name), candidate.outcomes(name))
    retained = before.role == "retention"
    return Comparison(
        name=name,
        role=before.role,
        metric="perplexity" if retained else before.metric,
        champion=before.perplexity if retained else before.value,
        candidate=after.perplexity if retained else after.value,
        loss=loss,
        limit=limit,
        p=p,
        test=test,
        examples=before.count,
    )


def _loss(before: Cell, after: Cell, gate: GateConfig) -> tuple[float, float | None]:
    """(loss of the candidate against the champion, largest loss allowed)."""
    if before.role == "retention":
        ratio = gate.max_perplexity_ratio
        return perplexity(after.nll - before.nll) - 1, None if ratio is None else ratio - 1
    if higher_is_better(before.metric):
        return before.value - after.value, gate.max_forgetting
    return after.value - before.value, gate.max_nll_increase

"""The objective of trials and the choice of the winner: pure functions of validation scores.

**The rule.** Among the finished trials, the one with the highest objective wins; ties go to the trial with fewer
trainable parameters, then to the earlier one. Objective = learning − weight × retention loss, on validation data:

    learning        mean score over the new tasks (for text: negative NLL, in nats per token)
    retention loss  mean loss increase over earlier tasks and retained texts since before the trial
                    (in units of the score, or nats per token; negative = improved)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.config.search_space import describe
from pipelines.runs.step_record import Cell

RULE = (
    "highest objective = learning − {weight:g} × retention loss among the trials trained to their end; "
    "of equal ones the one with fewer trainable parameters, then the earlier"
)


@dataclass(frozen=True)
class Assessment:
    """The assessment of a trial; `retention_loss` is None where nothing was learned before.

    `signal` ranks unfinished trials at rungs: the objective with a loss in place of the score, because a score may
    stay at chance for half of the training while the loss already falls. The loss is the mean training loss over the
    second half of the steps so far: at a high learning rate, a single evaluation varies more over steps than between
    trials. Without a training loss it is the cross-entropy of the right class on validation data.
    """

    objective: float
    learning: float
    retention_loss: float | None
    signal: float

    def to_json(self) -> dict:
        return dict(self.__dict__)


def loss_of(value: float, metric: str) -> float:
    """A score as a loss (lower is better): NLL for text, 1 − score otherwise."""
    return value if metric == "nll" else 1 - value


def assess(
    cells: Sequence[Cell],
    new: Sequence[str],
    reference: Mapping[str, float],
    weight: float,
    train_loss: float | None = None,
) -> Assessment | None:
    """The assessment of a trial by its score cells; None if a score is not finite.

    Args:
        new: names of the tasks that it learned.
        reference: name → loss before the trial, for everything else.
        train_loss: mean over the second half of the steps so far; None where trials' training losses are not
            comparable.
    """
    losses = {cell.name: loss_of(cell.value, cell.metric) for cell in cells}
    if not all(math.isfinite(value) for value in losses.values()):
        return None
    metrics = {cell.name: cell.metric for cell in cells}
    learned = [-losses[name] if metrics[name] == "nll" else 1 - losses[name] for name in new]
    learning = math.fsum(learned) / len(learned)
    lost = [losses[name] - before for name, before in reference.items()]
    retention_loss = math.fsum(lost) / len(lost) if lost else None
    known = {cell.name: cell.loss for cell in cells}
    early = [-known[name] if known[name] is not None else value for name, value in zip(new, learned, strict=True)]
    cost = weight * (retention_loss or 0.0)
    signal = (math.fsum(early) / len(early) if train_loss is None else -train_loss) - cost
    return Assessment(learning - cost, learning, retention_loss, signal if math.isfinite(signal) else -math.inf)


# -- choice among trials (records as in `trial.json`)
def finished(records: Sequence[dict]) -> list[dict]:
    return [record for record in records if record["status"] == "finished"]


def choose(records: Sequence[dict]) -> dict | None:
    """The winner by the rule above; None if no trial finished."""
    candidates = finished(records)
    if not candidates:
        return None
    return min(candidates, key=lambda r: (-r["objective"], r["trainable_parameters"], r["number"]))


def pareto(records: Sequence[dict]) -> list[dict]:
    """The Pareto set of the finished trials in learning and retention, by decreasing learning."""
    candidates = finished(records)
    best = [r for r in candidates if not any(_dominates(other, r) for other in candidates)]
    return sorted(best, key=lambda r: -r["learning"])


def _dominates(a: dict, b: dict) -> bool:
    ours, theirs = ((r["learning"], -(r["retention_loss"] or 0.0)) for r in (a, b))
    return ours != theirs and all(x >= y for x, y in zip(ours, theirs, strict=True))


def steps_spent(records: Sequence[dict]) -> tuple[int, int]:
    """(optimizer steps that all trials took, steps that they would have taken without pruning)."""
    known = [r for r in records if r.get("total_steps")]
    return sum(r["steps"] for r in known), sum(r["total_steps"] for r in known)


def explanation(record: dict, records: Sequence[dict], weight: float) -> str:
    """One sentence for the reader: the chosen setting, its objective, and the number of trials."""
    setting = describe(record["values"])
    counts = [f"{sum(r['status'] == s for r in records)} {s}" for s in ("finished", "pruned", "failed")]
    lost = record["retention_loss"]
    kept = "nothing to retain" if lost is None else f"retention loss {lost:+.4f}, weight {weight:g}"
    return (
        f"{setting}: highest objective {record['objective']:.4f} (learning {record['learning']:.4f}, {kept}) on "
        f"validation, of {len(records)} trials ({', '.join(counts)})"
    )

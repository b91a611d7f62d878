"""The value of a trial and the choice of the winner: pure functions of the trials' scores.

**The rule.** Among the trials that trained to their end, the one with the highest objective wins; ties go to fewer
trainable parameters, then to the earlier trial. Objective = learning − weight × retention loss, on validation data:

    learning        mean over the new tasks of the score (for text: minus the NLL in nats per token)
    retention loss  mean over earlier tasks and retained texts of what each has lost since before the trial
                    (score, or nats per token; negative = gained)
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
    """A trial's worth; `retention_loss` is None where nothing was there to be lost.

    `signal` is what trials are compared by on their way: the objective with a loss in place of the score, which may
    stand at chance for half of the training while losses fall already. The loss is the mean training loss of the
    second half of the way so far; scored at one moment of a high learning rate, a trial swings more than trials
    differ. Without a training loss it is the cross-entropy of the right class on validation data.
    """

    objective: float
    learning: float
    retention_loss: float | None
    signal: float

    def to_json(self) -> dict:
        return dict(self.__dict__)


def loss_of(value: float, metric: str) -> float:
    """What is wrong with a score, lower is better: NLL of text, 1 − score of the rest."""
    return value if metric == "nll" else 1 - value


def assess(
    cells: Sequence[Cell],
    new: Sequence[str],
    reference: Mapping[str, float],
    weight: float,
    train_loss: float | None = None,
) -> Assessment | None:
    """The worth of a trial by its cells; None if a score is not a number.

    Args:
        new: names of the tasks that it learned.
        reference: name → loss before the trial, of everything else.
        train_loss: of the second half of its way so far; None where trials' training losses cannot be compared.
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


# -- among trials (records as `trial.json` holds them)
def finished(records: Sequence[dict]) -> list[dict]:
    return [record for record in records if record["status"] == "finished"]


def choose(records: Sequence[dict]) -> dict | None:
    """The winner by the rule above; None if no trial trained to its end."""
    candidates = finished(records)
    if not candidates:
        return None
    return min(candidates, key=lambda r: (-r["objective"], r["trainable_parameters"], r["number"]))


def pareto(records: Sequence[dict]) -> list[dict]:
    """The finished trials that none beats in learning and retention together, by learning."""
    candidates = finished(records)
    best = [r for r in candidates if not any(_dominates(other, r) for other in candidates)]
    return sorted(best, key=lambda r: -r["learning"])


def _dominates(a: dict, b: dict) -> bool:
    ours, theirs = ((r["learning"], -(r["retention_loss"] or 0.0)) for r in (a, b))
    return ours != theirs and all(x >= y for x, y in zip(ours, theirs, strict=True))


def steps_spent(records: Sequence[dict]) -> tuple[int, int]:
    """(optimizer steps of all trials, steps that all would have taken to their ends)."""
    known = [r for r in records if r.get("total_steps")]
    return sum(r["steps"] for r in known), sum(r["total_steps"] for r in known)


def why(record: dict, records: Sequence[dict], weight: float) -> str:
    """One sentence for people: what was chosen, by what, out of how many."""
    setting = describe(record["values"])
    counts = [f"{sum(r['status'] == s for r in records)} {s}" for s in ("finished", "pruned", "failed")]
    lost = record["retention_loss"]
    kept = "nothing to retain" if lost is None else f"retention loss {lost:+.4f}, weight {weight:g}"
    return (
        f"{setting}: highest objective {record['objective']:.4f} (learning {record['learning']:.4f}, {kept}) on "
        f"validation, of {len(records)} trials ({', '.join(counts)})"
    )

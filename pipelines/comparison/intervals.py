"""Paired differences between two methods, with bootstrap intervals over test examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipelines.metrics.paired import bootstrap
from pipelines.runs.directory import RunDirectory


def paired_intervals(runs: Mapping[int, RunDirectory], reference: Mapping[int, RunDirectory]) -> dict | None:
    """95 % bootstrap intervals of the difference to the reference method on the same test examples.

    `learning` is the score right after a task's training, `forgetting` the drop from there to the end; both are means
    over tasks, in units of the score (text: negative NLL, in nats per token). Examples are resampled within each task;
    the outcome of an example is its mean over the seeds that both methods have. None without a common seed.

    Args:
        runs, reference: seed → finished run of the method and of the reference.
    """
    pairs = [(run, reference[seed]) for seed, run in runs.items() if seed in reference]
    if not pairs:
        return None
    tasks = pairs[0][0].results().tasks
    learning, forgetting = [], []
    for position, task in enumerate(tasks):
        ours = [example_outcomes(run, position, task) for run, _ in pairs]
        theirs = [example_outcomes(run, position, task) for _, run in pairs]
        if any(o is None for o in ours + theirs):
            continue
        weight = ours[0].weight
        gain = np.mean([a.after - b.after for a, b in zip(ours, theirs, strict=True)], axis=0)
        learning.append((gain, weight))
        if position < len(tasks) - 1:
            loss = np.mean([(a.after - a.end) - (b.after - b.end) for a, b in zip(ours, theirs, strict=True)], axis=0)
            forgetting.append((loss, weight))
    return {"learning": bootstrap(learning), "forgetting": bootstrap(forgetting)}


@dataclass(frozen=True)
class Outcomes:
    """(examples,) each: score right after the task's training, score at the end (higher is better), and weight."""

    after: np.ndarray
    end: np.ndarray
    weight: np.ndarray


def example_outcomes(run: RunDirectory, position: int, task: str) -> Outcomes | None:
    """Outcomes of a task in a run; None if the run has no step of its own for the task (joint training)."""
    steps = run.results().steps
    if len(steps) <= position or steps[position].task != task:
        return None
    after, weight = _scores(run.read_jsonl(f"{steps[position].directory}/predictions/{task}.jsonl"))
    end, _ = _scores(run.read_jsonl(f"{steps[-1].directory}/predictions/{task}.jsonl"))
    return Outcomes(after, end, weight)


def _scores(outcomes: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """(scores, weights) of the examples; text is weighted by its number of tokens."""
    if "nll" in outcomes[0] and "tokens" in outcomes[0] and "correct" not in outcomes[0]:
        tokens = np.array([o["tokens"] for o in outcomes], dtype=float)
        return -np.array([o["nll"] for o in outcomes]) / np.maximum(tokens, 1), tokens
    scores = np.array([float(o.get("score", o["correct"])) for o in outcomes])
    return scores, np.ones(len(scores))

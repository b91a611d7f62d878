"""Prepares the values of the report page; the templates only lay them out and format numbers."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.errors import RunDirectoryError
from pipelines.lineage.ancestry import from_run, rows_in_words, training_data
from pipelines.lineage.mlflow_records import flatten
from pipelines.reporting.ancestry_figure import draw_ancestry
from pipelines.reporting.drawing import colors, render
from pipelines.reporting.figures import draw_matrix, draw_perplexity, draw_tasks, draw_training, shading
from pipelines.reporting.formatting import number, whole
from pipelines.reporting.summary import MANY, direction, headlines, histories, row_labels, story, trained_row
from pipelines.runs.directory import RunDirectory
from pipelines.runs.records import Answers, answers_of, current_steps
from pipelines.runs.results import Results
from pipelines.runs.step_record import Seconds, Setting, StepRecord, Validated
from pipelines.runs.verdict import Verdict

HEADLINE_GROUPS = {"learned": "What was learned", "forgotten": "What was forgotten", "cost": "What it cost"}


@dataclass(frozen=True)
class Image:
    """An inline image; `source` is a data URI, so that the page loads nothing."""

    source: str
    alt: str


def page_values(
    run: RunDirectory, results: Results, steps: Sequence[StepRecord], configuration: str
) -> dict[str, Any]:
    """Every value of report.html by name."""
    gate, registered = results.gate, results.registry
    return {
        "run": results.run,
        "uri": run.uri,
        "status": results.status,
        "base_model": results.base_model,
        "adapter": {"type": results.adapter.get("type"), "r": results.adapter.get("r")},
        "strategy": results.strategy,
        "finished": steps[-1].finished if steps else None,
        "tasks": results.tasks,
        "story": story(results),
        "headlines": _grouped_headlines(results),
        "row_labels": row_labels(results),
        "histories": histories(results),
        "extras": _extras(results),
        "benchmarks": results.benchmarks or {},
        "gate": gate and {"against": None, "notes": [], "comparisons": []} | gate | {"verdict": Verdict.of(gate)},
        "registered": registered and {"hook_failure": None, "failure": None} | registered,
        "configuration": configuration,
        **_matrix(results),
        **_curves(results, steps),
        **_costs(results, steps),
        **_samples(results, steps),
        **_ancestry(run, results, steps),
    }


def _grouped_headlines(results: Results) -> list[tuple[str, list]]:
    items = headlines(results)
    groups = [(title, [item for item in items if item.group == group]) for group, title in HEADLINE_GROUPS.items()]
    return [(title, members) for title, members in groups if members]


def _image(figure: Any, alt: str) -> Image:
    data = base64.b64encode(render(figure, "svg")).decode()
    return Image(f"data:image/svg+xml;base64,{data}", alt)


# -- score matrix


@dataclass(frozen=True)
class MatrixCell:
    """A score with its colours; `own` marks the score right after the task's own training."""

    value: float | None
    own: bool
    background: str | None = None
    ink: str | None = None


def _matrix(results: Results) -> dict[str, Any]:
    """The matrix as a table, or as a heat map if it has too many columns to read."""
    tasks, metric = results.tasks, results.metric
    if len(tasks) > 4 * MANY:
        alt = f"Heat map of {len(results.scores)} rows by {len(tasks)} tasks; all numbers are in results.json."
        return {"matrix_image": _image(draw_matrix(results, []), alt)}
    shades = shading(results)
    return {
        "matrix_image": None,
        "matrix_columns": [
            {"task": task, "metric": metric[task], "direction": direction(metric[task])} for task in tasks
        ],
        "matrix_rows": [
            {"label": label, "cells": _matrix_cells(results, row, shades[row])}
            for row, label in enumerate(row_labels(results))
        ],
    }


def _matrix_cells(results: Results, row: int, shades: Sequence[float | None]) -> list[MatrixCell]:
    cells = []
    for column, (value, shade) in enumerate(zip(results.scores[row], shades, strict=True)):
        background, ink = (None, None) if value is None else colors([shade])[0]
        cells.append(MatrixCell(value, trained_row(results, column) == row, background, ink))
    return cells


def _extras(results: Results) -> list[dict[str, Any]]:
    """Scores of generated answers after each step, one entry per task and metric."""
    return [
        {
            "task": task,
            "metric": metric,
            "chosen": metric == results.metric[task],
            "scores": [found.get(metric) if found else None for found in series],
        }
        for task, series in results.extras.items()
        for metric in next(filter(None, series))
    ]


# -- curves


def _curves(results: Results, steps: Sequence[StepRecord]) -> dict[str, Any]:
    perplexity, training = draw_perplexity(results, steps), draw_training(results, steps)
    return {
        "tasks_image": _image(draw_tasks(results, steps), _tasks_alt(results)),
        "perplexity_image": perplexity and _image(perplexity, _perplexity_alt(results)),
        "retention": [
            {"corpus": corpus, "perplexity": values, "nll": results.nll.get(corpus, [])}
            for corpus, values in results.perplexity.items()
        ],
        "training_image": training and _image(training, _training_alt(steps)),
        "training_steps": sum(bool(step.position) for step in steps),
        "drawn_steps": MANY,
    }


def _tasks_alt(results: Results) -> str:
    changes = [f"{item.name} from {number(item.learned)} to {number(item.final)}" for item in histories(results)]
    return "Lines of each task's score after every step. From right after training to the end: " + "; ".join(changes)


def _perplexity_alt(results: Results) -> str:
    ends = [
        f"{name} from {number(values[0], 2)} to {number(values[-1], 2)}" for name, values in results.perplexity.items()
    ]
    return "Perplexity after every step: " + "; ".join(ends)


def _training_alt(steps: Sequence[StepRecord]) -> str:
    ends = [f"{', '.join(step.tasks)} ends at {number(step.training.final_loss)}" for step in steps if step.training]
    return "Training loss of every step: " + "; ".join(ends)


# -- sample answers


@dataclass(frozen=True)
class AnswerCell:
    """An answer; `own`: of the step that trained its task, `same`: as the step before, `right`: as the reference."""

    answer: str | None
    generated: str | None = None
    own: bool = False
    same: bool = False
    right: bool = False


def _samples(results: Results, steps: Sequence[StepRecord]) -> dict[str, Any]:
    """Prompts with the answers of every step, side by side."""
    rows = [
        {
            "task": row.question.task,
            "prompt": row.question.prompt,
            "reference": row.question.reference,
            "cells": [_answer_cell(row, steps, number) for number in range(len(steps))],
        }
        for row in answers_of(steps, results.samples)
    ]
    return {"samples": rows, "sample_columns": [_title(step, row_labels(results)[0]) for step in steps]}


def _answer_cell(row: Answers, steps: Sequence[StepRecord], number: int) -> AnswerCell:
    found, before = row.by_step[number], row.by_step[number - 1] if number else None
    if found is None:
        return AnswerCell(None)
    return AnswerCell(
        answer=found.answer,
        generated=found.generated,
        own=found.task in steps[number].tasks,
        same=before is not None and (before.answer, before.generated) == (found.answer, found.generated),
        right=found.reference is not None and found.answer.strip() == found.reference.strip(),
    )


# -- cost


@dataclass(frozen=True)
class StepCost:
    label: str
    seconds: Seconds
    tokens_per_second: float | None
    peak_memory_bytes: float | None
    adapter_bytes: float | None
    trainable_parameters: int | None
    head_parameters: int | None


def _costs(results: Results, steps: Sequence[StepRecord]) -> dict[str, Any]:
    costs = [
        StepCost(
            label=_title(step, "base"),
            seconds=step.seconds,
            tokens_per_second=step.training.tokens_per_second if step.training else None,
            peak_memory_bytes=step.peak_memory_bytes,
            adapter_bytes=step.adapter_bytes,
            trainable_parameters=step.trainable_parameters,
            head_parameters=step.head_parameters,
        )
        for step in steps
    ]
    return {"costs": costs, "seconds": results.seconds, "has_heads": any(cost.head_parameters for cost in costs)}


def _title(step: StepRecord, first: str) -> str:
    return f"{step.position} {step.label}" if step.position else first


# -- ancestry


@dataclass(frozen=True)
class Recipe:
    """Settings and origin of a step; `data` holds (task, rows in words, digest)."""

    position: int
    label: str
    fingerprint: str
    parent: str | None
    data: list[tuple[str, str, str]]
    setting: list[str]
    environment: list[str]
    finished: float


def _ancestry(run: RunDirectory, results: Results, steps: Sequence[StepRecord]) -> dict[str, Any]:
    """Ancestry of the last finished step; no figure before the first step, or if an earlier run was deleted."""
    values = {
        "ancestry_image": None,
        "ancestry_missing": None,
        "recipes": [_recipe(step, row_labels(results)[0]) for step in steps],
    }
    trained = [metrics for _, metrics in current_steps(run) if metrics.position]
    if not trained:
        return values
    try:
        ancestry = from_run(run, run.find_step(trained[-1].fingerprint))
    except RunDirectoryError as error:
        return values | {"ancestry_missing": str(error)}
    alt = "Ancestry: " + " → ".join(link.title for link in ancestry.links)
    return values | {"ancestry_image": _image(draw_ancestry(ancestry), alt)}


def _validation(found: Validated | None) -> list[str]:
    """What validation decided of a step, in words."""
    if found is None:
        return []
    early = ", stopped early" if found.stopped_early else ""
    return [f"kept the state after step {found.best_step}: lowest validation loss, {number(found.best_loss)}{early}"]


def _recipe(step: StepRecord, first: str) -> Recipe:
    setting = step.setting or Setting({}, {}, {})
    adapter, training = setting.adapter, setting.training
    return Recipe(
        position=step.position,
        label=_title(step, first),
        fingerprint=step.fingerprint,
        parent=step.parent,
        data=[(task, rows_in_words(data), data["digest"]) for task, data in training_data(step).items()],
        setting=[
            f"adapter {adapter.get('type')}, rank {adapter.get('r')}, selection {adapter.get('selection')}",
            f"strategy {setting.strategy.get('name')}",
            f"learning rate {training.get('learning_rate')}, batch {training.get('batch_size')}",
            f"seed {training.get('seed')}",
            f"{whole(step.training.steps if step.training else None)} optimizer steps",
            *_validation(step.training.validation if step.training else None),
        ],
        environment=[f"{key} {value}" for key, value in flatten(step.environment).items()],
        finished=step.finished,
    )

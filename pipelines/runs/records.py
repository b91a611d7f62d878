"""Reads what finished steps recorded: rows of scores, curves, costs, the steps of a lineage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipelines.errors import ConfigError, Problem
from pipelines.runs.directory import RunDirectory
from pipelines.runs.samples import Question, Sample
from pipelines.runs.step_record import Cell, Series, StepRecord, Training, base_directory


def choose_step(run: RunDirectory, step: str | None) -> str:
    """Directory of a finished step by task name, position or fingerprint prefix; None: the last one.

    Raises:
        ConfigError: there is no such step, or it is not finished.
    """
    results = run.results()
    steps = results.steps if results else ()
    finished = [entry for entry in steps if run.metrics(entry.directory) is not None]
    if step is None and finished:
        return finished[-1].directory
    for entry in finished:
        position = entry.directory.split("/")[-1].split("-")[0]
        if step in (entry.task, position) or (len(step or "") >= 6 and entry.fingerprint.startswith(step)):
            return entry.directory
    known = ", ".join(entry.task for entry in finished) or "none"
    raise ConfigError([Problem(run.name, f"has no finished step '{step or 'at all'}'; finished: {known}")])


Steps = Sequence[tuple[str, StepRecord]]  # (directory, metrics.json) by position, row 0 first


def current_steps(run: RunDirectory, chain: Sequence[str] | None = None) -> Steps:
    """(directory, metrics.json) of row 0 and of every finished step of a chain, by position.

    Row 0 is made up where the base was scored on nothing; a chain that started from another run's adapter and scored
    nothing on it has none.
    """
    found = {}
    for entry in run.list("steps"):
        directory = f"steps/{entry}"
        metrics = run.metrics(directory)
        if metrics is not None:
            found[metrics.fingerprint] = (directory, metrics)
    results = run.results()
    if chain is None and results is not None:
        chain = [step.fingerprint for step in results.steps]
    if chain:
        members = [found[name] for name in chain if name in found]
    else:
        members = sorted(found.values(), key=lambda item: item[1].finished)[-1:]
    if members:
        members = _ancestors(found, members[0][1]) + members
        first = min((metrics for _, metrics in members), key=lambda metrics: metrics.position)
        if first.grew_from_base:
            members.append((base_directory(first.parent), first.unmeasured_parent()))
    if all(metrics.position for _, metrics in members):  # the chain started from another run's adapter
        bases = [item for item in found.values() if item[1].position == 0]
        members += sorted(bases, key=lambda item: item[1].finished)[-1:]
    return sorted(members, key=lambda item: item[1].position)


def _ancestors(found: Mapping[str, tuple[str, StepRecord]], metrics: StepRecord) -> list[tuple[str, StepRecord]]:
    ancestors = []
    while metrics.parent in found:
        ancestors.append(found[metrics.parent])
        metrics = ancestors[-1][1]
    return ancestors


def started_at(run: RunDirectory, steps: Steps) -> float:
    for _, event in run.events():
        if event.kind == "started":
            return event.time
    return min((metrics.started for _, metrics in steps), default=0.0)


def ended_at(run: RunDirectory, steps: Steps) -> float:
    """Unix time of the last `finished` or `failed` event; if there is none, of the latest measurement."""
    for name in reversed(run.list("events")):
        event = run.read_event(f"events/{name}")
        if event and event.kind in ("finished", "failed"):
            return event.time
    return latest_moment(steps)


def latest_moment(steps: Steps) -> float:
    """Unix time of the latest measurement."""
    moments = [metrics.finished for _, metrics in steps]
    moments += [cell.time for _, metrics in steps for cell in metrics.cells]
    return max(moments, default=0.0)


Point = tuple[str, float | None, float, int]  # of a metric: (key, value, Unix time, step)


def score_points(metrics: StepRecord) -> list[Point]:
    """One row of the score matrix; the step of its points is the position in the sequence."""
    points: list[Point] = []
    for cell in newest_cells(metrics):
        name, moment, position = cell.name, cell.time, metrics.position
        if cell.role != "retention":
            points.append((f"score/{name}", cell.value, moment, position))
            for metric, value in cell.extras.items():
                points.append((f"{metric}/{name}", value, moment, position))
        else:
            points.append((f"nll/{name}", cell.nll, moment, position))
            points.append((f"perplexity/{name}", cell.perplexity, moment, position))
    return points


def newest_cells(metrics: StepRecord) -> list[Cell]:
    """The newest cell per name: after a change of the test split there is an older one, too."""
    return list({cell.name: cell for cell in sorted(metrics.cells, key=lambda cell: cell.time)}.values())


@dataclass(frozen=True)
class Answers:
    """One prompt of `evaluation.samples` with the answers of some steps; None where a step was not asked."""

    question: Question
    by_step: tuple[Sample | None, ...]


def answers_of(steps: Sequence[StepRecord], keys: Sequence[str] | None) -> list[Answers]:
    """The answers of steps to the questions `keys` (`Results.samples`), in this order; those of no step are left
    out."""
    given = [{sample.key: sample for sample in step.samples or ()} for step in steps]
    rows = [tuple(found.get(key) for found in given) for key in keys or ()]
    return [Answers(next(filter(None, row)), row) for row in rows if any(row)]


def cost_points(metrics: StepRecord) -> list[Point]:
    training = metrics.training
    validation = training.validation if training else None
    values = {
        "trainable_parameters": metrics.trainable_parameters,
        "head_parameters": metrics.head_parameters,
        "adapter_bytes": metrics.adapter_bytes,
        "peak_memory_bytes": metrics.peak_memory_bytes,
        "tokens_per_second": training.tokens_per_second if training else None,
        "train/final_loss": training.final_loss if training else None,
        "validation/best_loss": validation.best_loss if validation else None,
        "validation/best_step": validation.best_step if validation else None,
        **{f"seconds/{name}": value for name, value in metrics.seconds.to_json().items()},
    }
    return [(name, value, metrics.finished, metrics.position) for name, value in values.items()]


def curve_points(curve: Sequence[Sequence[float]]) -> list[Point]:
    """Points of `Training.curve`."""
    points: list[Point] = []
    for step, loss, learning_rate, moment in curve:
        points.append(("train/loss", loss, moment, step))
        points.append(("train/learning_rate", learning_rate, moment, step))
    return points


def validation_points(curve: Sequence[Sequence[float]]) -> list[Point]:
    """Points of `Validated.curve`."""
    return [("validation/loss", loss, moment, int(step)) for step, loss, moment in curve]


def series_points(series: Series | None) -> list[Point]:
    """Points of `Training.series`."""
    return [(name, value, moment, step) for name, rows in (series or {}).items() for step, value, moment in rows]


def training_points(training: Training | None) -> list[Point]:
    """All points by optimizer step: loss and learning rate, validation loss, speed and load."""
    if training is None:
        return []
    validated = validation_points(training.validation.curve) if training.validation else []
    return [*curve_points(training.curve), *validated, *series_points(training.series)]


def lineage(run: RunDirectory, directory: str) -> Iterator[StepRecord]:
    """`metrics.json` of a step and of all its ancestors, newest first, across runs."""
    trained, metrics = _trained(run), run.metrics(directory)
    while metrics is not None:
        yield metrics
        if metrics.parent_run:
            run = RunDirectory(metrics.parent_run)
            trained = _trained(run)
        metrics = trained.get(metrics.parent)


def _trained(run: RunDirectory) -> dict[str, StepRecord]:
    """Fingerprint → `metrics.json` of every finished step except row 0, which was not trained in this run."""
    rows = [run.metrics(f"steps/{entry}") for entry in run.list("steps")]
    return {row.fingerprint: row for row in rows if row and row.position > 0}


def trained_on(metrics: StepRecord) -> dict[str, str]:
    """Task → digest of its training data in this step."""
    return {task: data.train.digest for task, data in metrics.data.items()}

"""A realistic run directory without training: plan, identities and results are real, only scores are made up.

Rows of `metrics.json` are written as a worker writes them. Their numbers come from a small deterministic model of
learning and forgetting, so that a test needs milliseconds. Tasks are chosen by name: those in `TEXT` are language
modelling, those in `HEADS` have a classifier head, those in `WRITTEN` are generation, all others are classification
through a verbalizer.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

from pipelines.chain.plan import Plan, make_plan
from pipelines.chain.results import build_results
from pipelines.config.loading import parse_config
from pipelines.config.pipeline import PipelineConfig
from pipelines.data.held_out import validation_part
from pipelines.data.sources import digest_of
from pipelines.runs.directory import RunDirectory
from pipelines.runs.event import Event
from pipelines.runs.identity import StepPlan, fingerprint
from pipelines.runs.samples import Sample
from pipelines.runs.start import record_start
from pipelines.runs.step_record import (
    Cell,
    PublishedFile,
    Seconds,
    Setting,
    Split,
    StepRecord,
    TaskData,
    Training,
)

TEXT = ("biomed", "code", "finance")
HEADS = ("tickets", "topics")  # nothing of them can be scored on the base
WRITTEN = ("chat", "answers")
START = 1_760_000_000.0
STEP_SECONDS = 100.0
EXAMPLES = 200
ROWS = 4  # training rows of a task


def make_config(
    folder: Path, name: str = "sample", tasks=("mrpc", "sst2", "biomed"), retention=("wikitext2",), **changes
) -> PipelineConfig:
    """A valid configuration with its base and data; `changes` replace whole sections."""
    raw = {
        "name": name,
        "base_model": {"path": str(folder / "tiny-llama"), "dtype": "float32"},
        "storage": str(folder / "runs"),
        "adapter": {"type": "curlora", "r": 8, "target_modules": ["q_proj", "k_proj", "v_proj"]},
        "training": {"learning_rate": 3e-3, "epochs": 2},
        "tasks": [_task(folder, task) for task in tasks],
        "retention": [{"name": corpus, "data": str(folder / corpus)} for corpus in retention],
        "gate": {"max_forgetting": 0.02},
        **changes,
    }
    config = parse_config(raw)
    _write_base(Path(config.base_model.path))
    for source in (*config.tasks, *config.retention):
        _write_data(Path(source.data))
    return config


def _task(folder: Path, name: str) -> dict:
    if name in TEXT:
        return {"name": name, "kind": "language-modeling", "data": str(folder / name)}
    if name in HEADS:
        return {"name": name, "kind": "classification", "text": "text", "data": str(folder / name)}
    if name in WRITTEN:
        columns = {"messages": "messages"} if name == "chat" else {"prompt": "{text}", "completion": "{label}"}
        return {"name": name, "kind": "generation", "data": str(folder / name), **columns}
    return {
        "name": name,
        "kind": "classification",
        "head": "verbalizer",
        "prompt": "Review: {text}\nSentiment:",
        "labels": ["bad", "good"],
        "data": str(folder / name),
    }


def _write_base(folder: Path) -> None:
    """As much of a base model as its identity needs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")


def _write_data(folder: Path) -> None:
    """Rows that differ from task to task; the same name has the same rows everywhere."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        rows = [{"text": f"{folder.name} {split} {row}", "label": row % 2} for row in range(ROWS)]
        if folder.name == "chat":
            rows = [{"messages": _chat(row["text"])} for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _chat(text: str) -> list[dict]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]


def make_run(
    folder: Path, finished: int | None = None, status: str = "finished", drop: float = 0.0, **options
) -> RunDirectory:
    """Write a run.

    Args:
        finished: number of trained steps that are done; default: all of them.
        status: what `results.json` says; None leaves the file out, as before the first result.
        drop: how much lower every score of a trained task is than usual; such a run has a seed of its own.
        options: see `make_config`.
    """
    if drop:
        options["training"] = {"learning_rate": 3e-3, "epochs": 2, "seed": round(1000 * abs(drop))}
    config = make_config(folder, **options)
    run = RunDirectory(config.run_uri)
    plan = make_plan(config, run)
    run.open_for_writing(config)
    _event(run, START, "started", name=config.name)
    row = write_base_row(run, config, plan, drop)
    for step in plan.steps[:finished]:
        row = write_step(run, config, plan, step, drop)
    if status is not None:
        run.write_json("results.json", build_results(config, plan, run, status))
        _event(run, row.finished + 1, status)
    return run


def make_grown_run(folder: Path, origin: RunDirectory, task: str, **options) -> RunDirectory:
    """A run whose only step grew from the last one of another run (`start_from`), which lists the tasks of both."""
    earlier = origin.results()
    start_from = f"{origin.uri}/{earlier.steps[-1].fingerprint}"
    config = make_config(folder, tasks=(*earlier.tasks, task), start_from=start_from, **options)
    run = RunDirectory(config.run_uri)
    plan = make_plan(config, run)
    run.open_for_writing(config)
    record_start(run, plan.start)
    _event(run, START, "started", name=config.name)
    write_base_row(run, config, plan)
    write_step(run, config, plan, plan.steps[0])
    run.write_json("results.json", build_results(config, plan, run, "finished"))
    return run


def _event(run: RunDirectory, moment: float, kind: str, **fields) -> None:
    name = f"{int(moment * 1e6):017d}-{fingerprint([moment, kind])[:8]}"
    run.write_json(f"events/{name}.json", Event.from_json({"kind": kind, "time": moment, **fields}))


def score(config: PipelineConfig, task: str, position: int) -> float | None:
    """The pretended score: learned when trained, then a little worse after every later task."""
    index = [item.name for item in config.tasks].index(task)
    trained_at = 1 if config.is_joint else index + 1
    if task in TEXT:
        return 4.9 - 0.013 * index - (0.8 - 0.11 * (position - trained_at) if position >= trained_at else 0.0)
    if position < trained_at:
        return 0.5 + 0.011 * index
    return 0.83 - 0.03 * index - 0.045 * (position - trained_at)


def retention_nll(index: int, position: int) -> float:
    return 4.42 + 0.2 * index + 0.012 * position


def write_base_row(run: RunDirectory, config: PipelineConfig, plan: Plan, drop: float = 0.0) -> StepRecord:
    """Row 0: the base, or the step of another run that this one grows from; no file if nothing is scored on it."""
    start = plan.start
    row = StepRecord(
        fingerprint=start.fingerprint if start else plan.base_fingerprint,
        position=0,
        tasks=(),
        parent=None,
        parent_run=start.run_uri if start else None,
        **_measured(run, config, plan, plan.base_directory, 0, start.depth if start else 0, drop),
    )
    if plan.needed[plan.base_directory]:
        run.write_json(f"{plan.base_directory}/metrics.json", row)
    return row


def write_step(run: RunDirectory, config: PipelineConfig, plan: Plan, step: StepPlan, drop: float = 0.0) -> StepRecord:
    """One step's folder, `metrics.json` last."""
    row = StepRecord(
        fingerprint=step.fingerprint,
        position=step.position,
        tasks=step.tasks,
        parent=step.parent,
        parent_run=plan.start.run_uri if plan.start and step.parent == plan.start.fingerprint else None,
        depth=step.depth,
        setting=Setting.of(config),
        data={name: _data(config, name) for name in step.tasks},
        classes={name: ["bad", "good"] for name in step.tasks if name not in TEXT + WRITTEN},
        trainable_parameters=2304,
        head_parameters=0,
        adapter_bytes=9216 + 128 * step.position,
        files=_publish(run, step.directory),
        training=_training(START + 10 + STEP_SECONDS * step.position),
        **_measured(run, config, plan, step.directory, step.position, step.depth, drop),
    )
    run.write_json(f"{step.directory}/metrics.json", row)
    return row


def _data(config: PipelineConfig, name: str) -> TaskData:
    task = validation_part(config.task(name))
    held = Split(digest_of(task, "validation"), ROWS) if config.training.validate_every else None
    return TaskData(Split(digest_of(task, "train"), ROWS), held)


def _measured(
    run: RunDirectory, config: PipelineConfig, plan: Plan, directory: str, position: int, depth: int, drop: float
) -> dict:
    """The fields that every row has, with its predictions."""
    started = START + 10 + STEP_SECONDS * position
    cells = _cells(config, plan, plan.needed[directory], depth, started + 80, drop)
    for cell in cells:
        rows = "".join(json.dumps(outcome) + "\n" for outcome in outcomes(cell))
        run.write_bytes(f"{directory}/predictions/{cell.name}.jsonl", rows.encode())
    return {
        "cells": cells,
        "samples": _samples(plan, directory, position),
        "started": started,
        "finished": started + 95,
        "peak_memory_bytes": 1_400_000_000,
        "environment": {
            "torch": "2.13.0",
            "ray": "2.60.0",
            "world_size": 2,
            "deepspeed_stage": 2,
            "device": "cpu",
        },
        "seconds": Seconds(train=70.0 if position else 0.0, evaluate=15.0, overhead=10.0, total=95.0),
    }


def _publish(run: RunDirectory, directory: str) -> dict[str, PublishedFile]:
    """Adapter and heads, and what metrics.json says of the files."""
    contents = {
        "adapter/adapter_config.json": b'{"peft_type": "CURLORA", "r": 8}',
        "adapter/adapter_model.safetensors": bytes(range(256)) * 24,
        "heads.safetensors": bytes(1024),
    }
    for name, content in contents.items():
        run.write_bytes(f"{directory}/{name}", content)
    return {name: PublishedFile(len(c), hashlib.sha256(c).hexdigest()) for name, c in contents.items()}


def outcomes(cell: Cell) -> list[dict]:
    """Per-example outcomes that add up to a cell's value: the first so many examples are right, or equal losses."""
    if cell.metric == "nll":
        return [{"id": i, "nll": 40 * cell.value, "tokens": 40} for i in range(EXAMPLES)]
    right = round(EXAMPLES * cell.value)
    return [{"id": i, "label": 1, "prediction": int(i < right), "correct": i < right} for i in range(EXAMPLES)]


def _training(started: float) -> Training:
    points = [
        [s, 0.4 + 2.2 * math.exp(-s / 9) + 0.06 * math.sin(s * 1.7), 3e-3 * (1 - s / 41), started + 5 + 1.5 * s]
        for s in range(1, 41)
    ]
    measured = points[4::5]
    series = {
        "train/tokens_per_second": [[step, 3500.0 + step, moment] for step, _, _, moment in measured],
        "system/cpu_utilization_percentage": [[step, 90.0 + step / 10, moment] for step, _, _, moment in measured],
    }
    return Training(40, 245_760, 3510.9, points[-1][1], points, series=series)


def _cells(config: PipelineConfig, plan: Plan, names, depth: int, moment: float, drop: float) -> tuple[Cell, ...]:
    """The cells that the plan needs of a row, `depth` steps after the base."""
    cells = []
    for index, task in enumerate(config.tasks):
        value = score(config, task.name, depth) - drop
        majority = None if task.name in TEXT else 0.51
        cells.append(_cell(plan, task, "task", "test", task.metric, value, moment + index, majority))
    for index, corpus in enumerate(config.retention):
        value = retention_nll(index, depth)
        cells.append(_cell(plan, corpus, "retention", corpus.split, "nll", value, moment + 10 + index, None))
    return tuple(cell for cell in cells if cell.name in names)


def _samples(plan: Plan, directory: str, position: int) -> tuple[Sample, ...] | None:
    """Answers that tell the step, to the questions of `evaluation.samples`; the first one is always right."""
    asked = [question for question in plan.questions if question.key in plan.asked[directory]]
    answers = [
        Sample.of(q, q.reference if q.reference and q == asked[0] else f"answer {number} after {position}", "")
        for number, q in enumerate(asked)
    ]
    return tuple(answers) or None


def _cell(plan: Plan, source, role: str, split: str, metric: str, value: float, moment: float, majority) -> Cell:
    nll = value if metric == "nll" else None
    return Cell(
        name=source.name,
        role=role,
        metric=metric,
        value=value,
        nll=nll,
        perplexity=None if nll is None else math.exp(nll),
        count=EXAMPLES,
        tokens=40 * EXAMPLES if nll else None,
        majority=majority,
        digest=digest_of(source, split),
        key=plan.cell_keys[source.name],
        seconds=3.2,
        time=moment,
        higher_is_better=nll is None,
    )

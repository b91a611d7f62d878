"""A realistic run directory, written through `RunDirectory` exactly as a driver and its workers write one.

The numbers come from a small deterministic model of learning and forgetting, not from training, so that a test needs
milliseconds. Tasks are chosen by name: those in `TEXT` are language modelling, all others classification.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from pipelines.config.loading import parse_config
from pipelines.config.pipeline import PipelineConfig
from pipelines.metrics.score_matrix import aggregates
from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import fingerprint

TEXT = ("biomed", "code", "finance")
START = 1_760_000_000.0
STEP_SECONDS = 100.0
EXAMPLES = 200


def make_config(
    folder: Path, name: str = "sample", tasks=("mrpc", "sst2", "biomed"), retention=("wikitext2",), **changes
) -> PipelineConfig:
    """A valid configuration; `changes` replace whole sections."""
    raw = {
        "name": name,
        "base_model": {"path": str(folder / "tiny-llama")},
        "storage": str(folder / "runs"),
        "adapter": {"type": "curlora", "r": 8, "target_modules": ["q_proj", "k_proj", "v_proj"]},
        "training": {"learning_rate": 3e-3, "epochs": 2},
        "tasks": [_task(folder, task) for task in tasks],
        "retention": [{"name": corpus, "data": str(folder / corpus)} for corpus in retention],
        "gate": {"max_forgetting": 0.02},
        **changes,
    }
    return parse_config(raw)


def _task(folder: Path, name: str) -> dict:
    if name in TEXT:
        return {"name": name, "kind": "language-modeling", "data": str(folder / name)}
    return {
        "name": name,
        "kind": "classification",
        "head": "verbalizer",
        "prompt": "Review: {text}\nSentiment:",
        "data": str(folder / name),
    }


def make_run(
    folder: Path, finished: int | None = None, status: str = "finished", drop: float = 0.0, **options
) -> RunDirectory:
    """Write a run.

    Args:
        finished: number of trained steps that are done; default: all of them.
        status: what `results.json` says; None leaves the file out, as before the first result.
        drop: how much lower every score of a trained task is than usual.
        options: see `make_config`.
    """
    config = make_config(folder, **options)
    run = RunDirectory(config.run_uri)
    run.open_for_writing(config)
    _event(run, START, "started", name=config.name)
    groups = [[task.name for task in config.tasks]] if config.is_joint else [[task.name] for task in config.tasks]
    steps = [write_step(run, config, 0, [], None)]
    for position, names in enumerate(groups[:finished], start=1):
        steps.append(write_step(run, config, position, names, steps[-1]["fingerprint"], drop=drop))
    if status is not None:
        write_results(run, config, steps, status)
        _event(run, steps[-1]["finished"] + 1, status)
    return run


def make_grown_run(folder: Path, origin: RunDirectory, task: str, **options) -> RunDirectory:
    """A run whose only step grew from the last one of another run (`start_from`), which lists the tasks of both."""
    tasks = origin.results().tasks
    config = make_config(folder, tasks=(*tasks, task), **options)
    run = RunDirectory(config.run_uri)
    run.open_for_writing(config)
    _event(run, START, "started", name=config.name)
    last = origin.results().steps[-1]
    start = origin.metrics(last.directory).to_json()
    row = start | {"position": 0, "tasks": [], "parent": None, "parent_run": origin.uri, "data": {}}
    run.write_json(f"steps/0-start-{last.fingerprint[:8]}/metrics.json", row)
    step = write_step(run, config, 1, [task], last.fingerprint, depth=len(tasks) + 1)
    directory = run.find_step(step["fingerprint"])
    step |= {"parent_run": origin.uri}
    run.write_json(f"{directory}/metrics.json", step)
    write_results(run, config, [row, step], "finished")
    return run


def _event(run: RunDirectory, moment: float, kind: str, **fields) -> None:
    name = f"{int(moment * 1e6):017d}-{fingerprint([moment, kind])[:8]}"
    run.write_json(f"events/{name}.json", {"kind": kind, "time": moment, **fields})


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


def write_step(
    run: RunDirectory,
    config: PipelineConfig,
    position: int,
    names: list[str],
    parent: str | None,
    depth: int = 0,
    drop: float = 0.0,
) -> dict:
    """One step's folder, `metrics.json` last; `depth`: its position where an earlier run came before."""
    training = config.training.model_dump()
    identity = [config.base_model.path, parent, names, config.adapter.model_dump(), training, drop]
    step_fingerprint = fingerprint(identity)
    label = "base" if position == 0 else names[0] if len(names) == 1 else "joint"
    directory = f"steps/{position}-{label}-{step_fingerprint[:8]}"
    started = START + 10 + STEP_SECONDS * position
    data = {name: {"train": {"digest": fingerprint(["train", name]), "rows": 3668}} for name in names}
    metrics = {
        "fingerprint": step_fingerprint,
        "position": position,
        "tasks": names,
        "parent": parent,
        "cells": _cells(config, depth or position, started + 80, drop),
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
        "seconds": {"train": 70.0 if position else 0.0, "evaluate": 15.0, "overhead": 10.0, "total": 95.0},
    }
    if position:
        metrics.update(_trained(config, position, started), data=data)
        run.write_bytes(f"{directory}/adapter/adapter_config.json", b'{"peft_type": "CURLORA", "r": 8}')
        run.write_bytes(f"{directory}/adapter/adapter_model.safetensors", bytes(range(256)) * 24)
        run.write_bytes(f"{directory}/heads.safetensors", bytes(1024))
        names = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "heads.safetensors")
        metrics["files"] = {name: {"bytes": run.fs.size(run.path(f"{directory}/{name}"))} for name in names}
    for cell in metrics["cells"]:
        rows = "".join(json.dumps(outcome) + "\n" for outcome in outcomes(cell))
        run.write_bytes(f"{directory}/predictions/{cell['name']}.jsonl", rows.encode())
    run.write_json(f"{directory}/metrics.json", metrics)
    return metrics


def outcomes(cell: dict) -> list[dict]:
    """Per-example outcomes that add up to a cell's value: the first so many examples are right, or equal losses."""
    if cell["metric"] == "nll":
        return [{"id": i, "nll": 40 * cell["value"], "tokens": 40} for i in range(EXAMPLES)]
    right = round(EXAMPLES * cell["value"])
    return [{"id": i, "label": 1, "prediction": int(i < right), "correct": i < right} for i in range(EXAMPLES)]


def _trained(config: PipelineConfig, position: int, started: float) -> dict:
    """The part of `metrics.json` that only a trained step has."""
    points = [
        [s, 0.4 + 2.2 * math.exp(-s / 9) + 0.06 * math.sin(s * 1.7), 3e-3 * (1 - s / 41), started + 5 + 1.5 * s]
        for s in range(1, 41)
    ]
    return {
        "setting": {
            "adapter": config.adapter.model_dump(),
            "strategy": config.strategy.model_dump(),
            "training": config.training.model_dump(),
        },
        "trainable_parameters": 2304,
        "head_parameters": 0,
        "adapter_bytes": 9216 + 128 * position,
        "training": {
            "steps": 40,
            "tokens": 245_760,
            "tokens_per_second": 3510.9,
            "final_loss": points[-1][1],
            "curve": points,
        },
    }


def _cells(config: PipelineConfig, position: int, moment: float, drop: float) -> list[dict]:
    cells = []
    for index, task in enumerate(config.tasks):
        if not _needed(config, index, position):
            continue
        value = score(config, task.name, position) - drop
        text = task.name in TEXT
        majority = None if text else 0.51
        cells.append(_cell(task.name, "task", task.metric, value, moment + index, majority))
    for index, corpus in enumerate(config.retention):
        value = retention_nll(index, position)
        cells.append(_cell(corpus.name, "retention", "nll", value, moment + 10 + index, None))
    return cells


def _needed(config: PipelineConfig, index: int, position: int) -> bool:
    """Of the scores before training only the base's and the one right before a task's turn are measured."""
    return position == 0 or config.is_joint or position >= index


def _cell(name: str, role: str, metric: str, value: float, moment: float, majority) -> dict:
    nll = value if metric == "nll" else None
    digest = fingerprint(["test", name])
    return {
        "name": name,
        "role": role,
        "metric": metric,
        "value": value,
        "nll": nll,
        "perplexity": None if nll is None else math.exp(nll),
        "count": EXAMPLES,
        "tokens": 40 * EXAMPLES if nll else None,
        "majority": majority,
        "digest": digest,
        "key": fingerprint([digest, metric]),
        "seconds": 3.2,
        "time": moment,
    }


def write_results(run: RunDirectory, config: PipelineConfig, steps: list[dict], status: str) -> None:
    """`results.json` as the driver writes it, aggregates from the matrix."""
    tasks = [task.name for task in config.tasks]
    corpora = [corpus.name for corpus in config.retention]
    cells = [{cell["name"]: cell for cell in step["cells"]} for step in steps]
    scores = [[row[name]["value"] if name in row else None for name in tasks] for row in cells]
    nll = {name: [row[name]["nll"] for row in cells] for name in corpora}
    metric = {task.name: task.metric for task in config.tasks}
    last = steps[-1]
    results = {
        "run": config.name,
        "status": status,
        "base_model": config.base_model.path,
        "adapter": {"type": config.adapter.type, "r": config.adapter.r},
        "strategy": config.strategy.name,
        "tasks": tasks,
        "metric": metric,
        "trainable_parameters": last.get("trainable_parameters"),
        "head_parameters": last.get("head_parameters"),
        "adapter_bytes": last.get("adapter_bytes"),
        "scores": scores,
        "retention_names": corpora,
        "perplexity": {name: [math.exp(value) for value in series] for name, series in nll.items()},
        "nll": nll,
        "majority": {name: None if name in TEXT else 0.51 for name in tasks},
        **aggregates(scores, list(metric.values()), nll),
        "gate": None,
        "registry": None,
        "seconds": {"total": 101.0 * len(steps), "train": 70.0 * (len(steps) - 1), "evaluate": 15.0, "overhead": 16.0},
        "steps": [_result_step(step) for step in steps[1:]],
    }
    run.write_json("results.json", results)


def _result_step(step: dict) -> dict:
    label = step["tasks"][0] if len(step["tasks"]) == 1 else "joint"
    return {
        "task": label,
        "fingerprint": step["fingerprint"],
        "directory": f"steps/{step['position']}-{label}-{step['fingerprint'][:8]}",
        "mlflow_run_id": None,
        "seconds": step["seconds"],
        "tokens_per_second": step["training"]["tokens_per_second"],
        "peak_memory_bytes": step["peak_memory_bytes"],
    }

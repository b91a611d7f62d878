"""Searches in MLflow: one run per search below the chain's run, one run per trial below the search's.

tags (`curlora.` + …)   kind (search | trial), task, position on both; search (its folder) on both;
                        why, rule, chosen on a search; trial, status, error, chosen on a trial;
                        search, setting, why on the step that was trained under what was found
metrics of a trial      objective, learning, retention_loss at its rungs and its end, step = optimizer step;
                        score/<name>; train/loss, train/learning_rate
parameters              of a trial its adapter, strategy and training; of a search the section `search:`
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.config.search_space import describe
from pipelines.lineage import mlflow_records
from pipelines.lineage.mlflow_records import PREFIX, TAG_LENGTH
from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import fingerprint
from pipelines.runs.records import Point, curve_points
from pipelines.runs.results import SearchSummary, StepSummary

JUDGED = ("objective", "learning", "retention_loss")


def project_searches(to: mlflow_records.Target, parent_id: str, steps: Mapping[str, str]) -> None:
    """Bring MLflow up to date with the run's `search/`.

    Args:
        steps: step fingerprint → its MLflow run.
    """
    folders = [name for name in to.run.list("search") if name != "train"]
    for folder in folders:
        records = _records(to.run, f"search/{folder}")
        if records:
            _send_search(to, parent_id, f"search/{folder}", records)
    results = to.run.results()
    for entry in (results.searches or ()) if results else ():
        _tag_steps(to, steps, results.steps[entry.position - 1 : entry.until], entry)


def _records(run: RunDirectory, folder: str) -> dict[str, dict]:
    """Trial → its record, of those that have ended."""
    names = run.list(f"{folder}/trials")
    found = {name: run.read_json(f"{folder}/trials/{name}/trial.json") for name in names}
    return {name: record for name, record in found.items() if record}


def _send_search(to: mlflow_records.Target, parent_id: str, folder: str, records: dict[str, dict]) -> None:
    results = to.run.read_json(f"{folder}/results.json")
    position, task = folder.split("/")[1].split("-", 1)[0], folder.split("-", 1)[1].rsplit("-", 1)[0]
    tags = {"kind": "search", "search": folder, "task": task, "position": position}
    begun = min(record["finished"] - ((record["seconds"] or {}).get("total") or 0) for record in records.values())
    entry = _run(to, parent_id, tags, f"search {position}-{task}", begun)
    chosen = results["chosen"]["fingerprint"] if results else None
    for name, record in records.items():
        _send_trial(to, entry.info.run_id, tags, f"{folder}/trials/{name}", record, record["fingerprint"] == chosen)
    sent = fingerprint(results)
    if results is None or entry.data.tags.get(PREFIX + "sent") == sent:
        return
    mlflow_records.send_params(to, entry, mlflow_records.flatten(results["search"]))
    told = {"why": results["why"], "rule": results["rule"], "chosen": describe(results["chosen"]["values"])}
    mlflow_records.set_tags(to, entry, {PREFIX + key: text[:TAG_LENGTH] for key, text in told.items()})
    ended = max(record["finished"] for record in results["trials"])
    points = [(key, results["chosen"][key], ended, 0) for key in JUDGED]
    points += [(f"steps/{key}", value, ended, 0) for key, value in results["steps"].items()]
    mlflow_records.send_metrics(to, entry.info.run_id, points)
    files = {f"{folder}/{file}": file for file in ("results.json", "table.md")}
    picture = f"figures/search-{position}-{task}.png"
    mlflow_records.upload_files(
        to, entry.info.run_id, files | ({picture: "search.png"} if to.run.exists(picture) else {})
    )
    to.client.set_terminated(entry.info.run_id, "FINISHED", mlflow_records.milliseconds(ended))
    to.client.set_tag(entry.info.run_id, PREFIX + "sent", sent)


def _send_trial(
    to: mlflow_records.Target, search_id: str, tags: Mapping[str, str], directory: str, record: dict, chosen: bool
) -> None:
    name = directory.rsplit("/", 1)[1]
    own = {**tags, "kind": "trial", "trial": name}
    entry = _run(to, search_id, own, f"{record['number']}-{name}", record["started"] or record["finished"])
    sent = fingerprint([record, chosen])
    if entry.data.tags.get(PREFIX + "sent") == sent:
        return
    mlflow_records.send_params(to, entry, mlflow_records.flatten(record["setting"]))
    told = {
        "status": record["status"],
        "setting": describe(record["values"]),
        "chosen": json.dumps(chosen),
        "step_fingerprint": record["fingerprint"],
        **({"error": record["error"]} if record["error"] else {}),
    }
    mlflow_records.set_tags(to, entry, {PREFIX + key: text[:TAG_LENGTH] for key, text in told.items()})
    mlflow_records.send_metrics(to, entry.info.run_id, [*_judgements(record), *_curve(to.run, directory, record)])
    status = "FAILED" if record["status"] == "failed" else "FINISHED"
    to.client.set_terminated(entry.info.run_id, status, mlflow_records.milliseconds(record["finished"]))
    to.client.set_tag(entry.info.run_id, PREFIX + "sent", sent)


def _judgements(record: dict) -> list[Point]:
    points = [(key, rung[key], rung["time"], rung["step"]) for rung in record["rungs"] for key in JUDGED]
    if record["status"] == "finished":
        points += [(key, record[key], record["finished"], record["steps"]) for key in JUDGED]
    points += [
        (f"score/{name}", value, record["finished"], record["steps"]) for name, value in record["scores"].items()
    ]
    points += [(f"seconds/{name}", value, record["finished"], 0) for name, value in (record["seconds"] or {}).items()]
    return points


def _curve(run: RunDirectory, directory: str, record: dict) -> list[Point]:
    """The losses of a trial: those of the finished step, or up to its last checkpoint."""
    metrics = run.metrics(f"{directory}/{record['directory']}")
    if metrics is not None:
        return curve_points(metrics.curve)
    folder = f"{directory}/train/{record['fingerprint'][:8]}"
    names = [name for name in run.list(folder) if name.endswith(".json")]
    return curve_points(run.read_json(f"{folder}/{names[-1]}")["curve"] if names else ())


def _run(to: mlflow_records.Target, parent_id: str, tags: Mapping[str, str], name: str, begun: float) -> Any:
    """The run with those tags below `parent_id`, made if it is missing."""
    wanted = {"mlflow.parentRunId": parent_id} | {PREFIX + key: value for key, value in tags.items()}
    found = mlflow_records.search_runs(to.client, [to.experiment_id], wanted)
    if found:
        return found[0]
    where = {PREFIX + "run": to.run.name, PREFIX + "run_uri": mlflow_records.identity(to.run)}
    every = {**wanted, **where, **mlflow_records.common_tags(to.config)}
    return to.client.create_run(to.experiment_id, mlflow_records.milliseconds(begun), every, name)


def _tag_steps(
    to: mlflow_records.Target, run_ids: Mapping[str, str], steps: Sequence[StepSummary], entry: SearchSummary
) -> None:
    """What steps were trained under, and why: on the steps themselves, with the way to the search."""
    told = {"search": entry.directory, "setting": describe(entry.values), "why": entry.why}
    for step in steps:
        for key, text in told.items() if step.fingerprint in run_ids else ():
            to.client.set_tag(run_ids[step.fingerprint], PREFIX + key, text[:TAG_LENGTH])

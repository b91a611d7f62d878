"""Searches in MLflow: one child run of the chain per search, and one child run of the search per trial.

tags (`curlora.` + …)   kind (search | trial), task, position on both; search (its folder) on both;
                        why, rule, chosen on a search; trial, status, error, chosen on a trial;
                        search, setting, why on a step that was trained with the setting found
metrics of a trial      objective, learning, retention_loss at its rungs and its end, step = optimizer step;
                        score/<name>; train/loss, train/learning_rate
parameters              of a trial: adapter, strategy and training; of a search: the section `search:`
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

OBJECTIVES = ("objective", "learning", "retention_loss")


def project_searches(to: mlflow_records.Target, parent_id: str, steps: Mapping[str, str]) -> None:
    """Bring MLflow up to date with the run's `search/`.

    Args:
        steps: step fingerprint → MLflow run id.
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
    """Trial → its record, for the trials that have ended."""
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
    texts = {"why": results["why"], "rule": results["rule"], "chosen": describe(results["chosen"]["values"])}
    mlflow_records.set_tags(to, entry, {PREFIX + key: text[:TAG_LENGTH] for key, text in texts.items()})
    ended = max(record["finished"] for record in results["trials"])
    points = [(key, results["chosen"][key], ended, 0) for key in OBJECTIVES]
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
    texts = {
        "status": record["status"],
        "setting": describe(record["values"]),
        "chosen": json.dumps(chosen),
        "step_fingerprint": record["fingerprint"],
        **({"error": record["error"]} if record["error"] else {}),
    }
    mlflow_records.set_tags(to, entry, {PREFIX + key: text[:TAG_LENGTH] for key, text in texts.items()})
    mlflow_records.send_metrics(to, entry.info.run_id, [*_trial_points(record), *_curve(to.run, directory, record)])
    status = "FAILED" if record["status"] == "failed" else "FINISHED"
    to.client.set_terminated(entry.info.run_id, status, mlflow_records.milliseconds(record["finished"]))
    to.client.set_tag(entry.info.run_id, PREFIX + "sent", sent)


def _trial_points(record: dict) -> list[Point]:
    """Metrics of a trial: objective and its parts at the rungs and the end, scores, seconds."""
    points = [(key, rung[key], rung["time"], rung["step"]) for rung in record["rungs"] for key in OBJECTIVES]
    if record["status"] == "finished":
        points += [(key, record[key], record["finished"], record["steps"]) for key in OBJECTIVES]
    points += [
        (f"score/{name}", value, record["finished"], record["steps"]) for name, value in record["scores"].items()
    ]
    points += [(f"seconds/{name}", value, record["finished"], 0) for name, value in (record["seconds"] or {}).items()]
    return points


def _curve(run: RunDirectory, directory: str, record: dict) -> list[Point]:
    """The training losses of a trial: of the finished step, or up to its last checkpoint."""
    metrics = run.metrics(f"{directory}/{record['directory']}")
    if metrics is not None:
        return curve_points(metrics.curve)
    folder = f"{directory}/train/{record['fingerprint'][:8]}"
    names = [name for name in run.list(folder) if name.endswith(".json")]
    return curve_points(run.read_json(f"{folder}/{names[-1]}")["curve"] if names else ())


def _run(to: mlflow_records.Target, parent_id: str, tags: Mapping[str, str], name: str, begun: float) -> Any:
    """The child run of `parent_id` with these tags; created if missing."""
    wanted = {"mlflow.parentRunId": parent_id} | {PREFIX + key: value for key, value in tags.items()}
    found = mlflow_records.search_runs(to.client, [to.experiment_id], wanted)
    if found:
        return found[0]
    origin = {PREFIX + "run": to.run.name, PREFIX + "run_uri": mlflow_records.identity(to.run)}
    all_tags = {**wanted, **origin, **mlflow_records.common_tags(to.config)}
    return to.client.create_run(to.experiment_id, mlflow_records.milliseconds(begun), all_tags, name)


def _tag_steps(
    to: mlflow_records.Target, run_ids: Mapping[str, str], steps: Sequence[StepSummary], entry: SearchSummary
) -> None:
    """Tag steps with the setting that they were trained with, why it was chosen, and the folder of the search."""
    texts = {"search": entry.directory, "setting": describe(entry.values), "why": entry.why}
    for step in steps:
        for key, text in texts.items() if step.fingerprint in run_ids else ():
            to.client.set_tag(run_ids[step.fingerprint], PREFIX + key, text[:TAG_LENGTH])

"""Everything that an MLflow store holds of an experiment and a model, without ids: two stores can be compared."""

from __future__ import annotations

import json


def holdings(client, experiment: str, model: str | None = None) -> dict:
    """Runs, logged models and versions as sorted lists of plain values."""
    number = client.get_experiment_by_name(experiment).experiment_id
    runs = [client.get_run(run.info.run_id) for run in client.search_runs([number])]
    names = {run.info.run_id: run.info.run_name for run in runs}
    models = client.search_logged_models([number])
    names |= {found.model_id: found.name for found in models}
    held = {
        "runs": sorted((_run(client, run, names) for run in runs), key=_text),
        "models": sorted((_model(client, found, names) for found in models), key=_text),
    }
    if model:
        versions = client.search_model_versions(f"name = '{model}'")
        held["versions"] = sorted((_version(found, names) for found in versions), key=_text)
        aliases = client.get_registered_model(model).aliases
        held["aliases"] = {name: int(version) for name, version in aliases.items()}
    return json.loads(_text(held))


def _text(value) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _run(client, run, names: dict) -> dict:
    history = {
        key: sorted((m.step, m.timestamp, m.value) for m in client.get_metric_history(run.info.run_id, key))
        for key in run.data.metrics
    }
    return {
        "name": run.info.run_name,
        "info": (run.info.status, run.info.start_time, run.info.end_time),
        "params": run.data.params,
        "tags": _tags(run.data.tags, names),
        "metrics": history,
        "data": sorted((given.dataset.name, given.dataset.digest) for given in run.inputs.dataset_inputs),
        "models in": sorted(names[given.model_id] for given in run.inputs.model_inputs),
        "models out": sorted((names[made.model_id], made.step) for made in run.outputs.model_outputs),
        "artifacts": sorted(_artifacts(client, run.info.run_id)),
    }


def _tags(tags: dict, names: dict) -> dict:
    """With names in place of ids, without what says when a promotion was."""
    left = {key: names.get(value, value) for key, value in tags.items() if key not in ("curlora.promoted",)}
    return {key: value for key, value in left.items() if key != "mlflow.user"}


def _artifacts(client, run_id: str, path: str | None = None) -> list[tuple[str, int]]:
    found = []
    for info in client.list_artifacts(run_id, path):
        # pages name the MLflow runs, whose ids differ
        size = 0 if info.path in ("results.json", "report.html") else info.file_size
        found += _artifacts(client, run_id, info.path) if info.is_dir else [(info.path, size)]
    return found


def _model(client, found, names: dict) -> dict:
    metrics = sorted(
        (m.key, m.value, m.step, m.timestamp, m.dataset_name, names.get(m.run_id)) for m in found.metrics or []
    )
    facts = {"name": found.name, "status": str(found.status), "run": names.get(found.source_run_id)}
    return facts | {"params": found.params, "tags": _tags(found.tags, names), "metrics": metrics}


def _version(found, names: dict) -> dict:
    tags = _tags(found.tags, names) | {"curlora.model_id": names.get(found.tags["curlora.model_id"])}
    return {"version": int(found.version), "run": names.get(found.run_id), "tags": tags, "text": found.description}

"""Addresses of MLflow's web pages: of a run, of an experiment's training runs."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from pipelines.lineage.mlflow_records import PREFIX, identity, search_runs
from pipelines.lineage.store import connect, errors, quiet
from pipelines.runs.directory import RunDirectory

WORKFLOW = "workflowType=machine_learning"  # without it MLflow opens its pages for LLM applications, which are empty


def own_address(uri: str) -> str | None:
    """Address of the pages of a store that is a server itself, without its password; None for a database."""
    return re.sub(r"//[^/@]*@", "//", uri) if urlsplit(uri).scheme in ("http", "https") else None


def pages(uri: str, experiment: str | None, run: RunDirectory | None, address: str) -> dict[str, str]:
    """What a page shows → its address on the server at `address`, the most specific one first.

    Args:
        experiment: name of the run's experiment; None: the list of all experiments.
        run: of several records in MLflow (after a change of an earlier step) the newest one is meant.

    Raises:
        LineageError: the store cannot be reached.
    """
    root, found = f"{address.rstrip('/')}/#/experiments", {}
    if run is not None and experiment is not None:
        with errors(uri, "check tracking.uri"), quiet():
            client = connect(uri)
            known = client.get_experiment_by_name(experiment)
            chain = _newest_chain(client, known.experiment_id, run) if known else None
        if chain:
            found["run"] = f"{root}/{known.experiment_id}/runs/{chain}?{WORKFLOW}"
        if known:
            found["training runs"] = f"{root}/{known.experiment_id}/runs?{WORKFLOW}"
    return found or {"experiments": f"{root}?{WORKFLOW}"}


def _newest_chain(client, experiment_id: str, run: RunDirectory) -> str | None:
    tags = {PREFIX + "kind": "chain", PREFIX + "run": run.name, PREFIX + "run_uri": identity(run)}
    chains = search_runs(client, [experiment_id], tags)
    return max(chains, key=lambda found: found.info.start_time).info.run_id if chains else None

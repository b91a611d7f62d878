"""Versions of a model in MLflow's registry: the champion in use, the candidate, and their history.

`tracking.register_as` names the model. The last adapter of a finished chain becomes a version, identified by its run
and step; the alias `candidate` is on the newest version that the gate has judged, `champion` on the one in use.

    tags of a version (`curlora.` + …)  run_uri, step_directory, step_fingerprint, base_fingerprint, model_id;
                                        tasks (comma-separated, all that it has learned), domains ({task: digest});
                                        gate (passed | refused | undecided), gate_reasons; promoted, promoted_why
    tag of the model                    champions: the last changes of the champion, newest first, as JSON
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipelines.errors import NotRegistered
from pipelines.lineage.ancestry import Ancestry, Link, rows_in_words
from pipelines.lineage.mlflow_records import PREFIX, TAG_LENGTH, tag_filter
from pipelines.lineage.projection import gate_tags
from pipelines.lineage.store import connect, errors, quiet
from pipelines.runs.verdict import Verdict

CHAMPION, CANDIDATE = "champion", "candidate"
CHANGES_KEPT = 20
REMEDY = "check tracking.uri"
NOTE = (
    "Adapters of a continual-learning chain. `champion` is the version in use, `candidate` the newest one that the "
    "gate has judged; every version says which data is in it, and why it was promoted or refused."
)


@dataclass(frozen=True)
class Version:
    """A version of a registered model, read from its `curlora.*` tags.

    Attributes:
        run_uri, step_directory: location of its files.
        run_id: MLflow run of the step, with the same files as artifacts.
        tasks: every task learned so far, including those of its ancestors, in order.
        digests: task → digest of its training data.
        gate: passed | refused | undecided; empty if no gate has judged it.
        promoted: when it last became champion; empty if never.
    """

    name: str
    version: int
    run_uri: str
    step_directory: str
    step_fingerprint: str
    base_fingerprint: str
    tasks: tuple[str, ...]
    digests: dict[str, str]
    run_id: str = ""
    model_id: str = ""
    gate: str = ""
    promoted: str = ""

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"

    @classmethod
    def from_mlflow(cls, found) -> Version:
        tags = {key.removeprefix(PREFIX): value for key, value in found.tags.items()}
        texts = ("run_uri", "step_directory", "step_fingerprint", "base_fingerprint", "model_id", "gate", "promoted")
        return cls(
            name=found.name,
            version=int(found.version),
            tasks=tuple(filter(None, tags.get("tasks", "").split(","))),
            digests=json.loads(tags.get("domains", "{}")),
            run_id=found.run_id or "",
            **{name: tags.get(name, "") for name in texts},
        )


# -- reading
def champion(uri: str, name: str) -> Version | None:
    """The version in use; None if there is none yet.

    Raises:
        LineageError: MLflow cannot be reached or returns an error.
    """
    return by_alias(uri, name, CHAMPION)


def by_alias(uri: str, name: str, alias: str) -> Version | None:
    """The version with an alias; None if there is no such model or alias.

    Raises:
        LineageError: MLflow cannot be reached or returns an error.
    """
    return _version_or_none(uri, lambda client: client.get_model_version_by_alias(name, alias))


def by_number(uri: str, name: str, number: int) -> Version | None:
    """A version by its number; None if there is none.

    Raises:
        LineageError: MLflow cannot be reached or returns an error.
    """
    return _version_or_none(uri, lambda client: client.get_model_version(name, str(number)))


def _version_or_none(uri: str, request) -> Version | None:
    from mlflow.exceptions import MlflowException  # slow

    with errors(uri, REMEDY), quiet():
        try:
            return Version.from_mlflow(request(connect(uri)))
        except MlflowException as error:
            # MLflow reports a missing alias as invalid, a missing model or version as not existing
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise


def of_step(uri: str, name: str, run_uri: str, step_fingerprint: str) -> Version | None:
    """The version that a run's step was registered as; None if it was not.

    Raises:
        LineageError: MLflow cannot be reached or returns an error.
    """
    with errors(uri, REMEDY), quiet():
        return _of_step(connect(uri), name, run_uri, step_fingerprint)


def _of_step(client, name: str, run_uri: str, step_fingerprint: str) -> Version | None:
    # a run's path may contain characters that MLflow's filter cannot express, so it is compared here
    tag = tag_filter({PREFIX + "step_fingerprint": step_fingerprint})
    found = client.search_model_versions(f"name = '{name}' and {tag}")
    versions = [Version.from_mlflow(version) for version in found]
    return max((v for v in versions if v.run_uri == run_uri), key=lambda v: v.version, default=None)


# -- writing
def register(uri: str, name: str, run_id: str, ancestry: Ancestry) -> tuple[Version, bool]:
    """Register the logged model of a step's MLflow run, unless it is registered; (version, whether it is new).

    Raises:
        LineageError: MLflow cannot be reached or returns an error.
        NotRegistered: the step has no complete model in MLflow.
    """
    link = ancestry.links[-1]
    with errors(uri, REMEDY), quiet():
        client = connect(uri)
        if found := _of_step(client, name, link.run_uri, link.fingerprint):
            return found, False
        model_id = _model_of(client, run_id, link)
        model = client.get_logged_model(model_id)
        _make_model(client, name)
        tags = {
            "run_uri": link.run_uri,
            "step_directory": link.step_directory,
            "step_fingerprint": link.fingerprint,
            "base_fingerprint": ancestry.links[0].fingerprint,
            "model_id": model_id,
            "tasks": ",".join(ancestry.tasks),
            "domains": json.dumps(ancestry.digests),
        }
        made = client.create_model_version(
            name,
            model.artifact_location,
            run_id,
            {PREFIX + key: value for key, value in tags.items()},
            description=describe(ancestry),
            model_id=model_id,
        )
        _link_model(client, model, made)
        return Version.from_mlflow(made), True


def _model_of(client, run_id: str, link: Link) -> str:
    """Id of the logged model of a step's run."""
    run = client.get_run(run_id)
    if run.outputs.model_outputs:
        return run.outputs.model_outputs[-1].model_id
    reason = run.data.tags.get(PREFIX + "model_error", f"step {link.title} has no model in MLflow")
    raise NotRegistered(f"{reason}; correct it, then: curlora sync {link.run_uri}")


def _make_model(client, name: str) -> None:
    from mlflow.exceptions import MlflowException  # slow

    try:
        client.create_registered_model(name, description=NOTE)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _link_model(client, model, version) -> None:
    """Tag the logged model with its version, for its page; MLflow servers do this themselves, databases do not."""
    key, entry = "mlflow.modelVersions", {"name": version.name, "version": int(version.version)}
    known = json.loads(client.get_logged_model(model.model_id).tags.get(key, "[]"))
    if all((e["name"], int(e["version"])) != (entry["name"], entry["version"]) for e in known):
        client.set_logged_model_tags(model.model_id, {key: json.dumps([*known, entry])})


def record_verdict(uri: str, version: Version, verdict: Mapping[str, Any] | None, ancestry: Ancestry) -> None:
    """Record the gate's verdict on a version and its logged model.

    Raises:
        LineageError: MLflow cannot be reached or returns an error.
    """
    with errors(uri, REMEDY), quiet():
        client = connect(uri)
        if verdict:
            _tag(client, version, gate_tags(verdict))
            client.set_logged_model_tags(version.model_id, gate_tags(verdict))
        client.update_model_version(version.name, str(version.version), describe(ancestry, verdict))


def set_candidate(uri: str, version: Version) -> None:
    """Put the alias `candidate` on a version.

    Raises:
        LineageError: MLflow cannot be reached or returns an error.
    """
    with errors(uri, REMEDY), quiet():
        connect(uri).set_registered_model_alias(version.name, CANDIDATE, str(version.version))


def set_champion(uri: str, version: Version, why: str) -> Version | None:
    """Put the alias `champion` on a version, record when and why, and return the champion that it replaces.

    Raises:
        LineageError: MLflow cannot be reached or returns an error.
    """
    before = champion(uri, version.name)
    moment = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    change = {"version": version.version, "before": before.version if before else None, "time": moment, "why": why}
    with errors(uri, REMEDY), quiet():
        client = connect(uri)
        client.set_registered_model_alias(version.name, CHAMPION, str(version.version))
        _tag(client, version, {PREFIX + "promoted": moment, PREFIX + "promoted_why": why[:TAG_LENGTH]})
        tags = client.get_registered_model(version.name).tags
        history = [change, *json.loads(tags.get(PREFIX + "champions", "[]"))][:CHANGES_KEPT]
        client.set_registered_model_tag(version.name, PREFIX + "champions", json.dumps(history))
    return before


def changes(uri: str, name: str) -> list[dict]:
    """The last changes of the champion, newest first: `{"version", "before", "time", "why"}`.

    Raises:
        LineageError: MLflow cannot be reached or returns an error.
    """
    with errors(uri, REMEDY), quiet():
        tags = connect(uri).get_registered_model(name).tags
    return json.loads(tags.get(PREFIX + "champions", "[]"))


def _tag(client, version: Version, tags: Mapping[str, str]) -> None:
    for key, value in tags.items():
        client.set_model_version_tag(version.name, str(version.version), key, value)


# -- description
def describe(ancestry: Ancestry, verdict: Mapping[str, Any] | None = None) -> str:
    """The description of a version as Markdown: its tasks, data, scores and the gate's verdict."""
    last = ancestry.links[-1]
    lines = [f"Grown from `{ancestry.base_model}` in {len(ancestry.links) - 1} steps.", ""]
    lines += ["| step | trained on | data | digest |", "|---|---|---|---|"]
    lines += [_row(link, task, data) for link in ancestry.links for task, data in link.data.items()]
    scores = [f"- {name}: {value:.4f}" for name, value in last.scores.items()]
    lines += ["", "Scores on the test splits after the last step:", "", *scores]
    if verdict:
        lines += [
            "",
            f"**Gate: {Verdict.of(verdict)}**",
            "",
            *(f"- {text}" for text in verdict["reasons"] or ["no reason against it"]),
        ]
    return "\n".join(lines)


def _row(link: Link, task: str, data: Mapping[str, Any]) -> str:
    return f"| {link.title} | {task} | {rows_in_words(data)} | `{data['digest']}` |"

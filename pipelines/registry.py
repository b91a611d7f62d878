"""Versions of a model in MLflow's registry: which adapter serves, which one wants to, and how it came there.

`tracking.register_as` names the model. The adapter that a finished chain ends in becomes a version; the alias
`candidate` is on the newest one that the gate has judged, `champion` on the one in use.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from pipelines.store import connect, errors, quiet

PREFIX = "curlora."
CHAMPION, CANDIDATE = "champion", "candidate"


@dataclass(frozen=True)
class Version:
    """A version of a registered model, by its `curlora.*` tags.

    Attributes:
        run_uri, step_directory: where its files lie.
        tasks: every task seen so far, those of its ancestors included, in order.
        digests: task → digest of the data it was trained on.
    """

    name: str
    version: int
    run_uri: str
    step_directory: str
    step_fingerprint: str
    base_fingerprint: str
    tasks: tuple[str, ...]
    digests: dict[str, str]

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"

    @classmethod
    def from_mlflow(cls, found) -> Version:
        tags = {key.removeprefix(PREFIX): value for key, value in found.tags.items()}
        return cls(
            name=found.name,
            version=int(found.version),
            run_uri=tags.get("run_uri", ""),
            step_directory=tags.get("step_directory", ""),
            step_fingerprint=tags.get("step_fingerprint", ""),
            base_fingerprint=tags.get("base_fingerprint", ""),
            tasks=tuple(filter(None, tags.get("tasks", "").split(","))),
            digests=json.loads(tags.get("domains", "{}")),
        )


def champion(uri: str, name: str) -> Version | None:
    """The version in use; None if there is none yet.

    Raises:
        LineageError: MLflow is away or refuses.
    """
    return by_alias(uri, name, CHAMPION)


def by_alias(uri: str, name: str, alias: str) -> Version | None:
    """The version that an alias is on; None if there is no such model or alias.

    Raises:
        LineageError: MLflow is away or refuses.
    """
    with errors(uri, "check tracking.uri"), quiet():
        found = _aliased(connect(uri), name, alias)
    return Version.from_mlflow(found) if found else None


def _aliased(client, name: str, alias: str):
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        # a missing alias is "invalid", a missing model "does not exist"
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise

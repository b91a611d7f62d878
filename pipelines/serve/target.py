"""What `curlora serve CONFIG | RUN | models:/name@champion` means: a base, a registry to follow, a storage of runs."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import posixpath
import socket
from dataclasses import dataclass, replace

from pipelines.config.loading import load_config
from pipelines.config.paths import absolute_sqlite
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.sections import BaseModelConfig, check_name
from pipelines.config.serve import ServeConfig
from pipelines.errors import ConfigError, Problem
from pipelines.lineage import registry
from pipelines.lineage.registry import CHAMPION
from pipelines.runs.directory import RunDirectory

MODELS = "models:/"
DEFAULT_STORE = "sqlite:///mlflow.db"
TOKEN = "CURLORA_SERVE_TOKEN"
"""Environment variable with the bearer token."""


@dataclass(frozen=True)
class Plan:
    """What `curlora serve` found out about its source.

    Attributes:
        base: with its data type resolved.
        config: tasks that the base itself can be asked; None: none.
        storage: folder of the runs that `run/step` names.
        registry: MLflow store and registered model whose aliases are followed; None: none are.
        token: SHA-256 of the bearer token that requests must carry; None: none is needed.
        run: the run whose steps are listed among the models; None: none are.
    """

    base: BaseModelConfig
    config: PipelineConfig | None
    storage: str
    registry: tuple[str, str] | None
    settings: ServeConfig
    token: str | None = None
    run: str | None = None


def token_digest(token: str) -> str:
    """What the server keeps of its token."""
    return hashlib.sha256(token.encode()).hexdigest()


def plan_of(source: str, storage: str, uri: str | None, changes: dict) -> Plan:
    """The plan for a source, with the options of the command line in place of those of `serve:`.

    Args:
        uri: MLflow store of a `models:/` name.

    Raises:
        ConfigError: there is no such source, or it cannot be served like this.
        LineageError: MLflow cannot be reached.
    """
    if source.startswith(MODELS):
        plan = _of_model(source, uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE)
    elif source.endswith((".yaml", ".yml")):
        plan = _of_config(load_config(source))
    else:
        plan = _of_run(_open(source, storage))
    settings = ServeConfig.model_validate(plan.settings.model_dump() | changes)
    return with_token(replace(plan, settings=settings), os.environ.get(TOKEN))


def with_token(plan: Plan, token: str | None) -> Plan:
    """The plan with its token.

    Raises:
        ConfigError: it listens beyond loopback without one.
    """
    if token is not None and len(token) < 16:
        raise ConfigError([Problem(TOKEN, f"has {len(token)} characters; use at least 16 random ones")])
    if token is None and not is_loopback(plan.settings.host):
        remedy = f"set {TOKEN} in the environment, or listen on 127.0.0.1"
        raise ConfigError([Problem("serve.host", f"{plan.settings.host} can be reached by others; {remedy}")])
    return replace(plan, token=token_digest(token) if token else None)


def check_port(settings: ServeConfig) -> None:
    """Raises ConfigError if the server cannot listen on this machine: Ray Serve would try for a minute."""
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        message = f"{where} cannot be listened on ({error.strerror or error}); choose another --port or --host"
        raise ConfigError([Problem("serve.port", message)]) from error


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _open(run: str, storage: str) -> RunDirectory:
    for uri in (run, f"{storage}/{run}"):
        directory = RunDirectory(os.path.abspath(uri) if "://" not in uri else uri)
        if directory.exists("config.yaml"):
            return directory
    raise ConfigError([Problem(run, f"is no run, neither as a path nor below {storage}; curlora status lists all")])


def _of_config(config: PipelineConfig) -> Plan:
    run = RunDirectory(config.run_uri)
    begun = run.config() if run.exists("config.yaml") else None
    base = config.base_model
    if base.dtype == "auto":
        known = begun.base_model.dtype if begun and begun.base_model.path == base.path else None
        base = _with_dtype(base, known)
    return Plan(base, config if config.tasks else None, config.storage, _registry(config), config.serve, run=_uri(run))


def _with_dtype(base: BaseModelConfig, dtype: str | None) -> BaseModelConfig:
    """The base with the data type of the run, else the best one here."""
    import torch

    from pipelines.models.dtypes import best_dtype

    return base.model_copy(update={"dtype": dtype or best_dtype("cuda" if torch.cuda.is_available() else "cpu")})


def _of_run(run: RunDirectory) -> Plan:
    config = run.config()
    results = run.results()
    if not results or not any(run.metrics(step.directory) for step in results.steps):
        raise ConfigError([Problem(run.name, "has no finished step, so it has no adapter to serve")])
    storage = posixpath.dirname(run.uri)
    return Plan(config.base_model, config, storage, _registry(config), config.serve, run=_uri(run))


def _uri(run: RunDirectory) -> str | None:
    return run.uri if run.exists("config.yaml") else None


def _registry(config: PipelineConfig) -> tuple[str, str] | None:
    tracking = config.tracking
    return (tracking.uri, tracking.register_as) if tracking and tracking.register_as else None


def _of_model(source: str, uri: str) -> Plan:
    name, _, alias = source.removeprefix(MODELS).partition("@")
    uri = absolute_sqlite(uri)
    try:
        check_name(name)
    except ValueError:
        name = ""
    if not name or alias != CHAMPION:
        message = f"is no model that can be followed; write {MODELS}<name>@{CHAMPION}"
        raise ConfigError([Problem(source, message)])
    version = registry.champion(uri, name)
    if version is None:
        raise ConfigError([Problem(source, f"no version of '{name}' is champion in {uri}; see curlora promote")])
    run = RunDirectory(version.run_uri)
    if not run.exists("config.yaml"):
        message = f"the run of the champion, {version.run_uri}, is gone; serve a CONFIG that names its base"
        raise ConfigError([Problem(source, message)])
    config = run.config()
    return Plan(config.base_model, config, posixpath.dirname(run.uri), (uri, name), config.serve, run=run.uri)

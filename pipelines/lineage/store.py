"""Access to an MLflow store: a client that fails within seconds, one clear error, and the command of its web pages.

Only `MlflowClient` is used: MLflow's fluent API keeps state per thread and process. This module knows nothing of runs.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from pipelines.errors import LineageError

PROBE_SECONDS = 4.0

# MLflow's own defaults retry for four minutes; training must not wait for its records.
CLIENT_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def initialize(uri: str) -> None:
    """Create the store's missing tables; call it once, before anything writes, as it takes seconds.

    Raises:
        LineageError: the store cannot be reached or created.
    """
    with errors(uri, "check tracking.uri"), quiet():
        connect(uri).search_experiments(max_results=1)


def ui_command(uri: str, port: int = 5000) -> list[str]:
    """Command line of MLflow's own server for a database store, on loopback."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    if artifacts := artifact_root(uri):
        command += ["--default-artifact-root", artifacts]
    # One worker suffices on loopback; the default of four takes 1.5 GB.
    return [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]


def ui_environment() -> dict[str, str]:
    """Environment for `ui_command`: disables seven job processes (1.2 GB) that only LLM evaluations need."""
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return {**quiet, **os.environ}


def connect(uri: str):
    """An `MlflowClient`, after a quick check that the store can be reached."""
    for name, value in CLIENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    _probe(uri)
    # Imported here: mlflow takes 2-3 s, and most commands never need it.
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _probe(uri: str) -> None:
    """Fail within seconds where MLflow would retry for minutes: unreachable host, read-only folder.

    Raises:
        OSError: no server answers, or the folder of a sqlite file cannot be written.
    """
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        import requests  # a dependency of mlflow; any response will do, so no status is checked

        try:
            requests.get(uri, timeout=PROBE_SECONDS, allow_redirects=False)
        except requests.RequestException as error:
            raise ConnectionError("no server answers there") from error
    elif database := _sqlite_file(uri):
        database.parent.mkdir(parents=True, exist_ok=True)
        target = database if database.exists() else database.parent
        if not os.access(target, os.W_OK):
            raise PermissionError(f"{target} is not writable")
    elif parts.hostname and parts.port:
        socket.create_connection((parts.hostname, parts.port), timeout=PROBE_SECONDS).close()


def _sqlite_file(uri: str) -> Path | None:
    prefix = "sqlite:///"
    return Path(uri[len(prefix) :]).absolute() if uri.startswith(prefix) else None


def artifact_root(uri: str) -> str | None:
    """Artifact folder beside a sqlite store (MLflow's default is the current directory); None for other stores."""
    database = _sqlite_file(uri)
    return (database.parent / "mlruns").as_uri() if database else None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence MLflow's informational logs; a first migration writes forty lines."""
    loggers = [logging.getLogger(name) for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def errors(uri: str, remedy: str) -> Iterator[None]:
    """Turn any error of the client, its database driver or the network into a one-line LineageError."""
    import requests  # slow
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, requests.RequestException, OSError, ImportError) as error:
        # ImportError: the store's database driver is not installed
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise LineageError(f"MLflow at {shown(uri)} cannot be used ({reason}); {remedy}") from error


def shown(uri: str) -> str:
    """The URI without its password."""
    return re.sub(r"//[^/@]*@", "//***@", uri)

"""The command `curlora serve`."""

from __future__ import annotations

import os
import sys
import time
from importlib.util import find_spec

import click

from pipelines.errors import ConfigError, LineageError, Problem

NEEDED = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "prometheus_client": "prometheus_client",
    "watchfiles": "watchfiles",
}


@click.command()
@click.argument("source", metavar="CONFIG|RUN|MODEL")
@click.option("--host", help="Address to listen on; default: serve.host.")
@click.option("--port", type=click.IntRange(1, 65_535), help="Port; default: serve.port.")
@click.option("--canary", type=click.FloatRange(0, 1), help="Share of the champion's requests for the candidate.")
@click.option("--storage", default="./runs", show_default=True, help="Folder of the runs.")
@click.option("--uri", help="MLflow of a models:/ name; default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db.")
@click.option("--address", help="Ray cluster; default: RAY_ADDRESS, else a local one that ends with the command.")
@click.option("--verbose", is_flag=True, help="Show what Ray logs.")
def serve(source: str, host, port, canary, storage: str, uri: str | None, address: str | None, verbose: bool) -> None:
    """Serve a base and its adapters over HTTP, as OpenAI's API.

    The model `champion` follows the registry: after a promotion new requests get the new adapter within seconds.
    Listens on loopback; on other addresses only with a token in CURLORA_SERVE_TOKEN. Ctrl-C lets running requests end.

    \b
    Example:  curlora serve models:/support-bot@champion
              curlora serve my.yaml --canary 0.05
              curlora serve support-bot --port 8080
    """
    if missing := [package for module, package in NEEDED.items() if find_spec(module) is None]:
        raise ConfigError([Problem("", f"serving needs {missing[0]}; pip install 'curlora[serve]'")])
    from pydantic import ValidationError

    from pipelines.serve.target import plan_of

    given = {"host": host, "port": port, "canary": canary}
    try:
        plan = plan_of(source, storage, uri, {name: value for name, value in given.items() if value is not None})
    except LineageError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except ValidationError as error:
        found = error.errors()[0]
        raise ConfigError([Problem(f"serve.{found['loc'][0]}", found["msg"])]) from error
    _run(plan, address, verbose)


def _run(plan, address: str | None, verbose: bool) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    import ray  # slow

    from pipelines.serve.target import check_port
    from pipelines.workers.ray_cluster import connect

    settings, alone = plan.settings, not (address or os.environ.get("RAY_ADDRESS"))
    if alone:
        check_port(settings)
    click.echo(f"loading {plan.base.path}", err=True)
    connect(verbose, address)
    from pipelines.serve.deployment import serving

    try:
        with serving(plan, alone) as handle:
            click.echo(f"http://{settings.host}:{settings.port}/v1")
            try:
                _watch(handle, settings.poll)
            except KeyboardInterrupt:
                click.echo(f"stopping; running requests have {settings.drain:g} s to end", err=True)
    finally:
        ray.shutdown()


def _watch(handle, pause: float) -> None:
    """Print what serves, whenever it changes."""
    told: dict[str, str] = {}
    while True:
        try:
            found = _lines(handle.state.remote().result(timeout_s=60))
        except Exception as error:  # of Ray, while a replica that died is replaced
            found = {"server": f"does not answer ({type(error).__name__}); Ray Serve replaces it"}
        for subject, line in found.items():
            if told.get(subject) != line:
                click.echo(f"{time.strftime('%H:%M:%S')} {subject}: {line}")
        told = found
        time.sleep(pause)


def _lines(state: dict) -> dict[str, str]:
    """What serves and what does not, each in one line."""
    lines = {alias: facts["name"] for alias, facts in state["serving"].items()}
    for alias, failure in state["failing"].items():
        lines[f"{alias} (failing)"] = f"version {failure['version']} does not load: {failure['reason']}"
    if state["registry"]:
        lines["registry"] = state["registry"]
    return {"server": state["status"], **lines}

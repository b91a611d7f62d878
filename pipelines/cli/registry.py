"""Commands around the model registry and the environment: `promote`, `ui`, `doctor`."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import webbrowser

import click

from pipelines.cli.helpers import open_run
from pipelines.errors import LineageError


@click.command()
@click.argument("run")
@click.option("--to", "version", type=click.IntRange(1), help="Version of the model to promote instead.")
@click.option("--force", is_flag=True, help="Promote against the verdict of the gate; needs --reason.")
@click.option("--reason", default="", help="Reason, recorded in MLflow with the promotion.")
@click.option("--no-hook", is_flag=True, help="Do not run the command of gate.on_promotion.")
@click.option("--storage", default="./runs", show_default=True, help="Folder of the runs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def promote(run: str, version: int | None, force: bool, reason: str, no_hook: bool, storage: str, as_json: bool):
    """Make the adapter of RUN champion, if the gate permits it.

    With --to, make that version of RUN's model champion. This runs the command that gate.on_promotion in RUN's
    configuration names: promote only runs that you trust.

    \b
    Example:  curlora promote support-bot
              curlora promote support-bot --to 3 --reason "the new one misreads invoices"
    """
    from pipelines.notify.sender import Sender
    from pipelines.promotion import promotion

    if force and not reason.strip():
        raise click.UsageError("--force needs --reason TEXT, so that it can be understood later")
    directory = open_run(run, storage)
    try:
        if version is not None:
            done = promotion.restore(directory, version, force, reason, not no_hook)
        else:
            done = promotion.promote_run(directory, force, reason, not no_hook)
    except promotion.Refused as refused:
        click.echo(f"refused: {refused}", err=True)
        sys.exit(1)
    except LineageError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    before = f", before it version {done.before.version}" if done.before else ""
    words = f"{done.version.name}: version {done.version.version} is the champion ({done.why}){before}"
    click.echo(json.dumps(done.to_json(), indent=1) if as_json else words)
    for text in Sender(directory, directory.config().notify).finish():
        click.echo(f"warning: {text}", err=True)
    if done.hook_failure:
        click.echo(f"error: promoted, but {done.hook_failure}", err=True)
        sys.exit(1)


@click.command()
@click.argument("run", required=False)
@click.option("--storage", default="./runs", show_default=True, help="Folder of the runs.")
@click.option("--port", default=5000, show_default=True, help="Port of the pages.")
@click.option("--open", "opened", is_flag=True, help="Open the page in a browser.")
def ui(run: str | None, storage: str, port: int, opened: bool) -> None:
    """Show the MLflow pages of RUN in a browser.

    Prints the address of RUN's own page and of its experiment's training runs, and serves them on
    http://127.0.0.1:PORT, unless MLflow is a server already; without RUN, those of sqlite:///mlflow.db in this folder.

    \b
    Example:  curlora ui demo --open
    """
    from pipelines.lineage.pages import own_address, pages
    from pipelines.lineage.store import shown, ui_command, ui_environment

    uri, experiment, directory = "sqlite:///mlflow.db", None, open_run(run, storage) if run else None
    if directory:
        tracking = directory.config().tracking
        if tracking is None:
            raise click.UsageError(f"run '{run}' was not tracked (tracking: null); run curlora sync {run} first")
        uri, experiment = tracking.uri, tracking.experiment
    server_address = own_address(uri)
    try:
        found = pages(uri, experiment, directory, server_address or f"http://127.0.0.1:{port}")
    except LineageError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    for name, address in found.items():
        click.echo(f"{name + ':':<15}{address}")
    first = next(iter(found.values()))
    if server_address:
        if opened:
            webbrowser.open(first)
        return
    click.echo(f"MLflow on {shown(uri)}; Ctrl-C ends it")
    server = subprocess.Popen(ui_command(uri, port), env=ui_environment())
    try:
        if opened and _answers(server, port):
            webbrowser.open(first)
        sys.exit(server.wait())
    finally:
        server.terminate()


def _answers(server: subprocess.Popen, port: int) -> bool:
    """Wait until the server answers; whether it does, or has ended."""
    while server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return True
        time.sleep(0.2)
    return False


@click.command()
@click.argument("config", required=False, type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(config: str | None, as_json: bool) -> None:
    """Check whether this machine can run a chain.

    Lists what to correct in the environment and, given CONFIG, in its paths.

    \b
    Example:  curlora doctor
    """
    from pipelines.preflight.machine import examine

    findings = examine(config)
    if as_json:
        click.echo(json.dumps([finding.__dict__ for finding in findings], indent=1))
    else:
        for finding in findings:
            mark = {"ok": "ok  ", "warning": "WARN", "error": "FAIL"}[finding.level]
            click.echo(f"{mark}  {finding.subject}: {finding.text}")
    sys.exit(1 if any(finding.level == "error" for finding in findings) else 0)

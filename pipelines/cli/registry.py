"""Commands around the model registry and the environment: `promote`, `ui`, `doctor`."""

from __future__ import annotations

import json
import subprocess
import sys

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
    if done.hook_failure:
        click.echo(f"error: promoted, but {done.hook_failure}", err=True)
        sys.exit(1)


@click.command()
@click.argument("run", required=False)
@click.option("--storage", default="./runs", show_default=True, help="Folder of the runs.")
@click.option("--port", default=5000, show_default=True, help="Port of the pages.")
def ui(run: str | None, storage: str, port: int) -> None:
    """Show the MLflow pages of RUN in a browser.

    They are served on http://127.0.0.1:PORT; without RUN, those of sqlite:///mlflow.db in this folder.

    \b
    Example:  curlora ui demo
    """
    from pipelines.lineage.store import page_url, ui_command, ui_environment

    uri, page = "sqlite:///mlflow.db", f"http://127.0.0.1:{port}"
    if run:
        tracking = open_run(run, storage).config().tracking
        if tracking is None:
            raise click.UsageError(f"run '{run}' was not tracked (tracking: null); run curlora sync {run} first")
        uri = tracking.uri
    try:
        command = ui_command(uri, port)
        page = page_url(uri, tracking.experiment, page) if run else page
    except LineageError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    click.echo(f"{page}  (MLflow on {uri}; Ctrl-C ends it)")
    sys.exit(subprocess.run(command, env=ui_environment(), check=False).returncode)


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

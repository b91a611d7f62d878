"""The commands `status` and `cancel`."""

from __future__ import annotations

import json
import sys

import click

from pipelines.cli.helpers import all_runs, load_object, new_console, open_run


@click.command()
@click.argument("run", required=False)
@click.option("--storage", default="./runs", show_default=True, help="Where runs lie.")
@click.option("--address", help="Ask this cluster for its jobs instead (the dashboard's address).")
@click.option("--json", "as_json", is_flag=True)
def status(run: str | None, storage: str, address: str | None, as_json: bool) -> None:
    """What is done of one RUN (a name or a path), or a line for every run.

    \b
    Example:  curlora status demo
              curlora status demo --address http://127.0.0.1:8265
    """
    if address:
        load_object("cluster.cli:job_status")(address, run, as_json)
        return
    from pipelines.runs.status import run_status

    directories = [open_run(run, storage)] if run else all_runs(storage)
    found = [run_status(directory) for directory in directories]
    if as_json:
        click.echo(json.dumps(found[0] if run else found, indent=1))
        return
    if not found:
        click.echo(f"no runs in {storage}")
    for entry in found:
        click.echo(
            f"{entry['run']}: {entry['status']}, {entry['steps_done']} of {entry['steps']} tasks, {entry['last']}"
        )
    if run and found[0]["steps_done"]:
        from pipelines.reporting.summary import print_summary

        print_summary(directories[0].results(), new_console())


@click.command()
@click.argument("run")
@click.option("--storage", default="./runs", show_default=True, help="Where runs lie.")
@click.option("--wait", default=15.0, show_default=True, help="Seconds to wait for its end.")
@click.option("--address", help="Stop the run's job on this cluster (the dashboard's address).")
def cancel(run: str, storage: str, wait: float, address: str | None) -> None:
    """Ask RUN to write a checkpoint and end, wherever its driver is; the same configuration goes on from there.

    \b
    Example:  curlora cancel demo
              curlora cancel demo --address http://127.0.0.1:8265
    """
    if address:
        load_object("cluster.cli:cancel_job")(address, run, wait)
        return
    from pipelines.runs.status import cancel_run

    ended = cancel_run(open_run(run, storage), wait)
    if ended is None:
        click.echo("nobody is working on this run")
    elif ended:
        click.echo("stopped; run the same configuration to go on from there")
    else:
        click.echo(f"error: asked to stop, but its driver is still there after {wait:g} s", err=True)
        sys.exit(1)

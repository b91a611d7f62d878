"""Commands on runs in progress: `status` and `cancel`."""

from __future__ import annotations

import json
import sys

import click

from pipelines.cli.helpers import all_runs, load_object, new_console, open_run


@click.command()
@click.argument("run", required=False)
@click.option("--storage", default="./runs", show_default=True, help="Folder of the runs.")
@click.option("--address", help="Dashboard URL of a cluster whose jobs to list instead.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(run: str | None, storage: str, address: str | None, as_json: bool) -> None:
    """Show the progress of RUN, a name or path, or one line per run.

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
@click.option("--storage", default="./runs", show_default=True, help="Folder of the runs.")
@click.option("--wait", default=15.0, show_default=True, help="Seconds to wait until it has stopped.")
@click.option("--address", help="Dashboard URL of the cluster on which to stop the run's job.")
def cancel(run: str, storage: str, wait: float, address: str | None) -> None:
    """Stop RUN after a checkpoint, wherever its driver runs.

    The same configuration continues from there.

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
        click.echo("no driver is working on this run")
    elif ended:
        click.echo("stopped; run the same configuration to continue from there")
    else:
        click.echo(f"error: the run was asked to stop, but its driver is still running after {wait:g} s", err=True)
        sys.exit(1)

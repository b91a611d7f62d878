"""Commands on a cluster: `submit`, `tick`, `schedule`, and `status` and `cancel` with `--address`.

Each command imports what it runs when it runs (see pipelines/cli/app.py).
"""

from __future__ import annotations

import json
import sys
import time

import click


@click.command()
@click.argument("config", type=click.Path())
@click.option("--address", help="Dashboard URL of the cluster; default: RAY_API_SERVER_ADDRESS.")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override a field of CONFIG.")
@click.option("--wait/--detach", default=True, show_default=True, help="Follow the job and exit with its exit code.")
@click.option("--shared-paths", is_flag=True, help="All nodes mount the paths of CONFIG like this machine.")
@click.option("--verbose", is_flag=True, help="Show the output of Ray and DeepSpeed.")
def submit(config, address, overrides, wait, shared_paths, verbose) -> None:
    """Train the chain of CONFIG as a job on a Ray cluster.

    A job that is already running is followed instead. Submitting again after a failure continues from there. Ctrl-C
    stops following, not the job.

    \b
    Example:  curlora submit my.yaml --address http://127.0.0.1:8265 --detach
    """
    from cluster.jobs import load_for_cluster

    jobs = _cluster(address)
    chain = load_for_cluster(config, overrides, shared_paths or jobs.is_this_machine())
    job, is_new = jobs.submit(chain, verbose)
    click.echo(f"{job.id}: {'submitted' if is_new else 'is already running'}", err=True)
    stop = f"curlora cancel {job.run} --address {jobs.address}"
    if not wait:
        click.echo(f"follow it: the same command with --wait; stop it: {stop}", err=True)
        return
    try:
        job = jobs.follow(job.id, lambda lines: click.echo(lines, nl=False))
    except KeyboardInterrupt:
        click.echo(f"{job.id} continues; stop it: {stop}", err=True)
        sys.exit(1)
    click.echo(f"{job.id}: {job.status.lower()}", err=True)
    sys.exit(job.exit_code if job.exit_code is not None else int(job.status != "SUCCEEDED"))


@click.command()
@click.argument("config", type=click.Path())
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override a field of CONFIG.")
@click.option("--dry-run", is_flag=True, help="Only print what would be done.")
@click.option("--again", metavar="DOMAIN", help="First withdraw the decisions on this domain.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def tick(config, overrides, dry_run, again, as_json) -> None:
    """Look into the inbox once and train a new domain.

    The domain continues from the champion, as configured in domains: of CONFIG. For use with any scheduler: safe to
    call at any rate, and nothing is trained twice. A refused domain is considered again when it changes.

    \b
    Example:  curlora tick my.yaml --dry-run
    """
    from cluster import decisions
    from cluster import tick as schedule_tick
    from cluster.jobs import load_for_tick

    pipeline = load_for_tick(config, overrides)
    schedule_tick.check_schedule(pipeline)
    if again:
        decisions.again(pipeline, again)
    outcome = schedule_tick.tick(pipeline, lambda: _cluster(pipeline.domains.address), dry_run)
    if as_json:
        click.echo(json.dumps(outcome.to_json()))
        return
    for line in outcome.did:
        click.echo(line)


@click.command()
@click.argument("config", type=click.Path())
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override a field of CONFIG.")
@click.option("--dry-run", is_flag=True, help="Only print when it would look and what it would do now.")
@click.option("--history", is_flag=True, help="Print all decisions.")
@click.option("--pause/--resume", "paused", default=None, help="Suspend all ticks until --resume.")
@click.option("--json", "as_json", is_flag=True, help="Print the history as JSON.")
def schedule(config, overrides, dry_run, history, paused, as_json) -> None:
    """Look into the inbox at regular times, until Ctrl-C.

    The times are those of domains.cron in CONFIG. Ctrl-C stops no job.

    \b
    Example:  curlora schedule my.yaml
              curlora schedule my.yaml --history
    """
    from cluster import decisions
    from cluster import tick as scheduling_tick
    from cluster.jobs import load_for_tick
    from cluster.loop import Loop, next_times

    pipeline = load_for_tick(config, overrides)
    scheduling_tick.check_schedule(pipeline)
    if paused is not None:
        decisions.pause(pipeline, paused)
        click.echo("paused" if paused else "resumed")
    elif history:
        _print_history(decisions.history(pipeline), as_json)
    elif dry_run:
        for moment in next_times(pipeline):
            click.echo(f"would look at {moment:%Y-%m-%d %H:%M:%S %Z}")
        for line in scheduling_tick.tick(pipeline, lambda: _cluster(pipeline.domains.address), dry_run=True).did:
            click.echo(f"now: {line}")
    else:
        settings = [part for override in overrides for part in ("--set", override)]
        Loop(pipeline, [config, *settings], click.echo).run()


def _print_history(decisions: list[dict], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(decisions, indent=1))
        return
    for entry in decisions:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["time"]))
        facts = [entry.get(key) for key in ("verdict", "version", "job", "start_from") if entry.get(key)]
        details = "; ".join([*facts, *entry.get("reasons", [])])
        click.echo(f"{moment}  {entry['domain']}  {entry['kind']}" + (f": {details}" if details else ""))


def _print_jobs(jobs: list, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([job.__dict__ for job in jobs], indent=1))
        return
    for job in jobs:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.started)) if job.started else "not yet"
        message = (job.message.strip().splitlines() or [""])[-1]
        click.echo(f"{job.id}: {job.status.lower()}, started {started}" + (f"; {message}" if message else ""))
    if not jobs:
        click.echo("no jobs")


def job_status(address: str, run: str | None, as_json: bool) -> None:
    """`curlora status [RUN] --address …`: print the jobs of a cluster, or of one run."""
    _print_jobs(_cluster(address).jobs(run), as_json)


def cancel_job(address: str, run: str, wait: float) -> None:
    """`curlora cancel RUN --address …`: stop the jobs of a run."""
    jobs = _cluster(address)
    working = [job for job in jobs.jobs(run) if not job.over]
    if not working:
        click.echo(f"no job of '{run}' is running on {jobs.address}")
    for job in working:
        job = jobs.stop(job.id, wait)
        if not job.over:
            click.echo(f"error: {job.id} was asked to stop, but is still running after {wait:g} s", err=True)
            sys.exit(1)
        click.echo(f"{job.id}: {job.status.lower()}; submit the same configuration to continue from there")


def _cluster(address: str | None):
    """The cluster at an address, by default at RAY_API_SERVER_ADDRESS."""
    from cluster.jobs import Cluster, default_address

    address = address or default_address()
    if address is None:
        raise click.UsageError("no cluster: give --address (e.g. http://127.0.0.1:8265) or RAY_API_SERVER_ADDRESS")
    return Cluster(address)

"""The command line, `curlora …` = `python -m pipelines …`.

Exit codes: 0 done, 1 failed, 2 bad input. What takes seconds to import is imported by the command that needs it, so
that help and bad input answer at once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import click

CONFIGS = Path(__file__).parent / "configs"
LINE_SECONDS = 10.0


class _Commands(click.Group):
    """Errors a user can mend, as one line each, with the exit codes above."""

    def invoke(self, ctx: click.Context):
        from pipelines.config import ConfigError
        from pipelines.runs import LeaseHeld, RunDirectoryError, Unavailable

        signal.signal(signal.SIGTERM, _interrupt)  # what a scheduler sends means the same as Ctrl-C
        if "--verbose" not in sys.argv:
            warnings.simplefilter("ignore", FutureWarning)  # between libraries; nothing a user could mend
            logging.disable(logging.WARNING)
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            for problem in error.problems:
                click.echo(f"error: {problem}", err=True)
            ctx.exit(2)
        except (LeaseHeld, RunDirectoryError) as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)
        except Unavailable as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("stopped; run the same command to go on from there", err=True)
            ctx.exit(1)
        finally:
            logging.disable(logging.NOTSET)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt("SIGTERM")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="curlora")
def main() -> None:
    """Continual learning for language models: a chain of CURLoRA fine-tunes on Ray, sharded by DeepSpeed.

    \b
    Start here:  curlora demo
    Your own:    curlora run my.yaml --dry-run
    """


@main.command()
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override a field of demo.yaml.")
@click.option("--json", "as_json", is_flag=True, help="Print results.json instead of tables.")
@click.option("--verbose", is_flag=True, help="Show what Ray and DeepSpeed say.")
def demo(overrides: tuple[str, ...], as_json: bool, verbose: bool) -> None:
    """A whole chain from nothing but this environment: no data, no model, no network.

    A small model is pretrained once on the documentation of the installed packages, then learns the documentation of
    four libraries, one after another.

    \b
    Example:  curlora demo
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin starve each other on a busy machine
    from pipelines.demo import DemoError, prepare_demo

    try:
        assets = _with_bar("Preparing the demo's model (once)", prepare_demo)
    except DemoError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    os.environ["CURLORA_DEMO"] = str(assets.root)
    _run(str(CONFIGS / "demo.yaml"), overrides, as_json, verbose)


def _with_bar(title: str, work):
    """Run `work(progress=…)` under a progress bar (lines where there is no terminal); silent if nothing is to do."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = _console(err=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), TimeElapsedColumn())
    last = 0.0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task(title, text="", visible=False)

        def progress(done: int, total: int, text: str) -> None:
            nonlocal last
            bars.update(bar, completed=done, total=total, text=text, visible=True)
            if not console.is_terminal and time.time() - last > LINE_SECONDS:
                last = time.time()
                console.print(f"{title}: {text} {done}/{total}", highlight=False)

        return work(progress=progress)


@main.command()
@click.argument("config", type=click.Path())
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override any field.")
@click.option("--dry-run", is_flag=True, help="Check everything, print sizes and memory, train nothing.")
@click.option("--address", help="Ray cluster; default: RAY_ADDRESS, else a local one.")
@click.option("--segment-length", type=click.IntRange(1), help="Tasks a worker group trains before it is renewed.")
@click.option("--redo", multiple=True, metavar="TASK", help="Train this finished step again (name or position).")
@click.option("--json", "as_json", is_flag=True, help="Print results.json instead of tables.")
@click.option("--verbose", is_flag=True, help="Show what Ray and DeepSpeed say.")
def run(config, overrides, dry_run, address, segment_length, redo, as_json, verbose) -> None:
    """Train the chain of CONFIG, or what is missing of it. Ctrl-C and SIGTERM leave a run that goes on.

    \b
    Example:  curlora run pipelines/configs/paper-tiny.yaml --set deepspeed=zero3 --dry-run
    """
    if dry_run:
        _dry_run(config, overrides, as_json)
    else:
        _run(config, overrides, as_json, verbose, address, segment_length, redo)


def _run(path, overrides, as_json, verbose, address=None, segment_length=None, redo=()) -> None:
    from pipelines.config import load_config
    from pipelines.progress import ChainProgress

    config = load_config(path, overrides)
    from pipelines.hub import hub_available

    hub_available(config)
    from pipelines.workflow import run_chain

    console = _console(err=as_json)
    steps = 1 if config.is_joint else len(config.tasks)
    with _at_work(as_json), ChainProgress(console, steps, config.name) as progress:
        results = run_chain(config, progress, verbose, segment_length, address, redo)
    if as_json:
        click.echo(json.dumps(results, indent=1))
        return
    from pipelines.summary import print_summary, print_verdict

    if not results.pop("ran"):
        console.print("Everything is done already; nothing was trained.")
    print_summary(results, console)
    print_verdict(results, console)
    console.print(f"report: {config.run_uri}/report.html", soft_wrap=True, highlight=False)
    if config.tracking:
        console.print(f"MLflow: curlora ui {config.run_uri}", soft_wrap=True, highlight=False)


def _dry_run(path: str, overrides: tuple[str, ...], as_json: bool) -> None:
    from pipelines.config import ConfigError, load_config

    config = load_config(path, overrides)
    from pipelines.hub import hub_available

    online = hub_available(config)
    from pipelines.door import check_data
    from pipelines.preflight import check_model, memory_by_stage, model_facts

    warned: list[str] = []
    problems = check_data(config, warn=warned.append)
    problems, unreachable = (problems, []) if online else split_unreachable(config, problems)
    problems += check_model(config)
    if problems:
        raise ConfigError(problems)
    facts = model_facts(config)
    table = memory_by_stage(facts, config)
    if as_json:
        found = {"model": facts.__dict__, "memory_gib": table, "unchecked": unreachable, "warnings": warned}
        click.echo(json.dumps(found, indent=1))
        return
    for line in warned:
        click.echo(f"warning: {line}", err=True)
    for line in unreachable:
        click.echo(f"not checked: {line}", err=True)
    _print_facts(config, facts, table)


def split_unreachable(config, problems: list) -> tuple[list, list[str]]:
    """Problems, and (as text) those that only say that the hub could not be asked for some data."""
    from pipelines.hub import is_hub_id

    fields = {f"tasks.{i}.data": task.data for i, task in enumerate(config.tasks)}
    fields |= {f"retention.{i}.data": corpus.data for i, corpus in enumerate(config.retention)}
    remote = {field for field, data in fields.items() if is_hub_id(data)}
    unasked = sorted({f"{p.field} ({fields[p.field]})" for p in problems if p.field in remote})
    return [p for p in problems if p.field not in remote], [f"{field}: the hub cannot be reached" for field in unasked]


def _print_facts(config, facts, table: dict) -> None:
    from rich.table import Table

    from pipelines.preflight import ARITHMETIC, host_bytes

    console = _console()
    console.print(
        f"{config.name}: {len(config.tasks)} tasks, strategy {config.strategy.name}; the configuration is good."
    )
    share = facts.trainable_parameters / facts.base_parameters
    console.print(f"base parameters       {facts.base_parameters:,}")
    console.print(f"trainable parameters  {facts.trainable_parameters:,} ({share:.4%}), heads not counted")
    console.print(f"adapter file          {facts.adapter_bytes:,} bytes")
    view = Table(title=f"memory a worker (GPU), GiB, {config.resources.workers} workers (estimate)")
    for column in ("stage", "weights", "optimizer", "passes", "total"):
        view.add_column(column, justify="left" if column == "stage" else "right")
    for stage, parts in table.items():
        cells = (f"{parts[name]:.4g}" for name in ("weights", "optimizer", "passes", "total"))
        view.add_row(stage, *cells)
    console.print(view)
    if "zero3-offload" in table:
        console.print(f"host memory under zero3-offload: {host_bytes(facts, config) / 2**30:.4g} GiB a worker")
    _print_step_cost(config, console)
    console.print(ARITHMETIC, style="dim", highlight=False, soft_wrap=True)


def _print_step_cost(config, console) -> None:
    """What an optimizer step computes and sends, where there is a model of that."""
    from pipelines.cost import cost, shape_of

    try:
        found = cost(config, shape_of(config))
    except ValueError:
        return
    sent = found.traffic
    console.print(
        f"a step of a worker: {(found.forward + found.backward) / 1e12:.3g} TFLOP, {sent.total / 1e6:.4g} MB sent in "
        f"{sent.messages} messages (gradients alone need {sent.needed / 1e6:.4g} MB)",
        soft_wrap=True,
        highlight=False,
    )


@main.command()
@click.argument("config", type=click.Path())
@click.option("--methods", required=True, help="adapter or adapter+strategy, with commas; a/b+c/d: all pairs.")
@click.option("--seeds", default="0", show_default=True, help="Training seeds, separated by commas.")
@click.option("--learning-rates", default="", help="Grid for each method, judged on the first task's validation part.")
@click.option(
    "--train-examples", default="", help="Each method on so many training examples a task, e.g. 100,500,1000."
)
@click.option("--reference", help="Method that the paired intervals are against; default: the first.")
@click.option(
    "--parallel", type=click.IntRange(1), help="Runs at the same time; default: as many as the cluster holds."
)
@click.option("--catalogue", type=click.Path(path_type=Path), help="YAML of methods; default: pipelines/methods.yaml.")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override any field of CONFIG.")
@click.option("--address", help="Ray cluster; default: RAY_ADDRESS, else a local one.")
@click.option("--json", "as_json", is_flag=True)
@click.option("--verbose", is_flag=True, help="Show what Ray and DeepSpeed say.")
def compare(
    config,
    methods,
    seeds,
    learning_rates,
    train_examples,
    reference,
    parallel,
    catalogue,
    overrides,
    address,
    as_json,
    verbose,
) -> None:
    """Methods side by side on the sequence of CONFIG: a table with errors over seeds, paired intervals, a figure.

    Goes on where it was interrupted; a method or seed named later costs only its own runs.

    \b
    Example:  curlora compare domains.yaml --methods curlora,lora,lora+ewc --seeds 0,1,2 --learning-rates 1e-3,3e-3
    """
    from pipelines.compare import CATALOGUE, Comparison, markdown, read_methods
    from pipelines.compare import compare as run_comparison
    from pipelines.config import read_config

    chosen = read_methods([name.strip() for name in methods.split(",")], catalogue or CATALOGUE)
    sizes = _numbers(train_examples, int, "--train-examples")
    comparison = Comparison(
        read_config(config, overrides),
        [method.on(size) for method in chosen for size in sizes] or chosen,
        _numbers(seeds, int, "--seeds"),
        _numbers(learning_rates, float, "--learning-rates"),
        reference or chosen[0].name,
    )
    console = _console(err=as_json)

    def report(event: dict) -> None:
        if event["kind"] in ("run", "warning"):
            console.print(event.get("text") or event["name"], highlight=False)

    with _at_work(as_json):
        result = run_comparison(comparison, verbose, address, report, parallel)
    click.echo(json.dumps(result, indent=1) if as_json else markdown(result))


def _numbers(text: str, kind: type, option: str) -> list:
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise click.BadParameter(f"'{text}' is not a list of numbers such as 1,2,3", param_hint=option) from None


@main.command()
@click.argument("config", type=click.Path())
@click.option("--address", help="The cluster's dashboard; default: RAY_API_SERVER_ADDRESS.")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override any field.")
@click.option("--wait/--detach", default=True, show_default=True, help="Follow the job and end as it ends.")
@click.option("--shared-paths", is_flag=True, help="Every node mounts the paths of CONFIG as this machine does.")
@click.option("--verbose", is_flag=True, help="Show what Ray and DeepSpeed say.")
def submit(config, address, overrides, wait, shared_paths, verbose) -> None:
    """Train the chain of CONFIG as a job on a Ray cluster; a job that is at work on it already is followed instead.

    Submitting again after a failure goes on from there. Ctrl-C ends the following, not the job.

    \b
    Example:  curlora submit my.yaml --address http://127.0.0.1:8265 --detach
    """
    from cluster.submit import load_for_cluster

    jobs = _cluster(address)
    chain = load_for_cluster(config, overrides, shared_paths or jobs.is_this_machine())
    job, is_new = jobs.submit(chain, verbose)
    click.echo(f"{job.id}: {'submitted' if is_new else 'is at work already'}", err=True)
    stop = f"curlora cancel {job.run} --address {jobs.address}"
    if not wait:
        click.echo(f"follow it: the same command with --wait; stop it: {stop}", err=True)
        return
    try:
        job = jobs.follow(job.id, lambda lines: click.echo(lines, nl=False))
    except KeyboardInterrupt:
        click.echo(f"{job.id} goes on; stop it: {stop}", err=True)
        sys.exit(1)
    click.echo(f"{job.id}: {job.status.lower()}", err=True)
    sys.exit(job.exit_code if job.exit_code is not None else int(job.status != "SUCCEEDED"))


def _cluster(address: str | None):
    """The cluster at an address, as one that jobs can be sent to."""
    from cluster.submit import Cluster, default_address

    address = address or default_address()
    if address is None:
        raise click.UsageError("no cluster: give --address (e.g. http://127.0.0.1:8265) or RAY_API_SERVER_ADDRESS")
    return Cluster(address)


@main.command()
@click.argument("config", type=click.Path())
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override any field.")
@click.option("--dry-run", is_flag=True, help="Say what would be done.")
@click.option("--again", metavar="DOMAIN", help="Take back what was decided on this domain, then look.")
@click.option("--json", "as_json", is_flag=True)
def tick(config, overrides, dry_run, again, as_json) -> None:
    """Look at the inbox of CONFIG once: train what is new, complete and sound from the champion on. For any scheduler.

    Safe to call at any rate; nothing is trained twice. A domain that is refused is looked at again when it changes.

    \b
    Example:  curlora tick my.yaml --dry-run
    """
    from cluster.submit import load_for_tick
    from pipelines import schedule

    pipeline = load_for_tick(config, overrides)
    schedule.check_schedule(pipeline)
    if again:
        schedule.again(pipeline, again)
    outcome = schedule.tick(pipeline, lambda: _cluster(pipeline.domains.address), dry_run)
    if as_json:
        click.echo(json.dumps(outcome.to_json()))
        return
    for line in outcome.did:
        click.echo(line)


@main.command()
@click.argument("config", type=click.Path())
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override any field.")
@click.option("--dry-run", is_flag=True, help="Say when it would look and what it would do now.")
@click.option("--history", is_flag=True, help="Every decision so far.")
@click.option("--pause/--resume", "paused", default=None, help="No tick does anything until --resume.")
@click.option("--json", "as_json", is_flag=True, help="For --history.")
def schedule(config, overrides, dry_run, history, paused, as_json) -> None:
    """Look at the inbox of CONFIG by its cron expression until Ctrl-C, which ends the loop and no job.

    \b
    Example:  curlora schedule my.yaml
              curlora schedule my.yaml --history
    """
    from cluster.submit import load_for_tick
    from pipelines import schedule as scheduling
    from pipelines.loop import Loop, next_times

    pipeline = load_for_tick(config, overrides)
    scheduling.check_schedule(pipeline)
    if paused is not None:
        scheduling.pause(pipeline, paused)
        click.echo("paused" if paused else "goes on")
    elif history:
        _print_history(scheduling.history(pipeline), as_json)
    elif dry_run:
        for moment in next_times(pipeline):
            click.echo(f"would look at {moment:%Y-%m-%d %H:%M:%S %Z}")
        for line in scheduling.tick(pipeline, lambda: _cluster(pipeline.domains.address), dry_run=True).did:
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


@main.command()
@click.argument("config", type=click.Path())
@click.option("--task", help="Search before this task, from what is trained before it; default: the first.")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override any field of CONFIG.")
@click.option("--address", help="Ray cluster; default: RAY_ADDRESS, else a local one.")
@click.option("--json", "as_json", is_flag=True)
@click.option("--verbose", is_flag=True, help="Show what Ray and DeepSpeed say.")
def tune(config, task, overrides, address, as_json, verbose) -> None:
    """Search for the setting of a step as the section `search:` of CONFIG says, on validation data.

    Goes on where it was interrupted; more trials cost only those. A later `curlora run` uses what was found.

    \b
    Example:  curlora tune my.yaml --set search.trials=24
    """
    from pipelines.choice import describe, markdown
    from pipelines.config import load_config
    from pipelines.progress import ChainProgress

    loaded = load_config(config, overrides)
    from pipelines.hub import hub_available

    hub_available(loaded)
    from pipelines.tune import tune as search_step

    console = _console(err=as_json)
    with _at_work(as_json), ChainProgress(console, 1, loaded.name) as progress:
        result = search_step(loaded, task, progress, verbose, address)
    if as_json:
        click.echo(json.dumps(result, indent=1))
        return
    click.echo(markdown(result))
    click.echo(f"figure: {loaded.run_uri}/figures/search-{result['position']}-{result['task']}.png")
    click.echo(f"setting: {describe(result['chosen']['values'])}")


@main.command()
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
        _print_jobs(_cluster(address).jobs(run), as_json)
        return
    from pipelines.status import run_status

    directories = [_open(run, storage)] if run else _all_runs(storage)
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
        from pipelines.summary import print_summary

        print_summary(directories[0].results(), _console())


@main.command()
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
        _cancel_job(_cluster(address), run, wait)
        return
    from pipelines.status import cancel_run

    ended = cancel_run(_open(run, storage), wait)
    if ended is None:
        click.echo("nobody is working on this run")
    elif ended:
        click.echo("stopped; run the same configuration to go on from there")
    else:
        click.echo(f"error: asked to stop, but its driver is still there after {wait:g} s", err=True)
        sys.exit(1)


def _cancel_job(jobs, run: str, wait: float) -> None:
    working = [job for job in jobs.jobs(run) if not job.over]
    if not working:
        click.echo(f"no job of '{run}' is at work on {jobs.address}")
    for job in working:
        job = jobs.stop(job.id, wait)
        if not job.over:
            click.echo(f"error: asked {job.id} to stop, but it is still there after {wait:g} s", err=True)
            sys.exit(1)
        click.echo(f"{job.id}: {job.status.lower()}; submit the same configuration to go on from there")


@main.command()
@click.argument("run")
@click.option("--storage", default="./runs", show_default=True, help="Where runs lie.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete(run: str, storage: str, yes: bool) -> None:
    """Delete RUN with its adapters and results. What it sent to MLflow stays there.

    \b
    Example:  curlora delete demo
    """
    directory = _open(run, storage)
    if not yes:
        click.confirm(f"Delete {directory.uri} with all its adapters?", abort=True)
    with directory.acquire_lease():
        directory.remove("config.yaml")  # first: from here on it is no run
    directory.remove("")
    click.echo(f"deleted {directory.uri}")


@main.command()
@click.argument("run")
@click.option("--storage", default="./runs", show_default=True)
def report(run: str, storage: str) -> None:
    """Write the page and the figures of RUN anew.

    \b
    Example:  curlora report demo
    """
    from pipelines.report import ReportError, write_figures, write_report

    directory = _open(run, storage)
    try:
        write_figures(directory)
        write_report(directory)
        click.echo(f"{directory.uri}/report.html")
    except ReportError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)


@main.command()
@click.argument("run")
@click.option("--storage", default="./runs", show_default=True)
@click.option("--uri", help="MLflow store; default: the run's own.")
def sync(run: str, storage: str, uri: str | None) -> None:
    """Send RUN to MLflow (again): whatever is missing there, nothing twice.

    \b
    Example:  curlora sync demo --uri http://127.0.0.1:5000
    """
    from pipelines.publish import sync as send
    from pipelines.store import LineageError

    try:
        runs, target, warned = send(_open(run, storage), uri)
    except LineageError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    click.echo(f"{len(runs)} MLflow runs are up to date in {target}")
    for line in warned:
        click.echo(f"warning: {line}", err=True)


@main.command()
@click.argument("run")
@click.option("--to", "version", type=click.IntRange(1), help="Go (back) to this version of the run's model.")
@click.option("--force", is_flag=True, help="Whatever the gate says; needs --reason.")
@click.option("--reason", default="", help="Recorded in MLflow with the promotion.")
@click.option("--no-hook", is_flag=True, help="Do not run gate.on_promotion.")
@click.option("--storage", default="./runs", show_default=True, help="Where runs lie.")
@click.option("--json", "as_json", is_flag=True)
def promote(run: str, version: int | None, force: bool, reason: str, no_hook: bool, storage: str, as_json: bool):
    """Make the adapter of RUN the champion of its registered model, if the gate lets it; or go back to a version.

    The command of `gate.on_promotion` that RUN's configuration names is run: promote only runs that you trust.

    \b
    Example:  curlora promote support-bot
              curlora promote support-bot --to 3 --reason "the new one misreads invoices"
    """
    from pipelines import promotion
    from pipelines.store import LineageError

    if force and not reason.strip():
        raise click.UsageError("--force needs --reason TEXT: whoever asks in six months should find it")
    directory = _open(run, storage)
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


@main.command()
@click.argument("adapter")
@click.option("--json", "as_json", is_flag=True)
@click.option("--figure", type=click.Path(path_type=Path), help="Draw it too: a .png, .svg or .pdf file.")
@click.option("--uri", help="MLflow store of a models:/ name; default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db.")
@click.option("--storage", default="./runs", show_default=True, help="Where runs lie.")
def lineage(adapter: str, as_json: bool, figure: Path | None, uri: str | None, storage: str) -> None:
    """Which adapter ADAPTER grew from, on which data, with which settings and scores, down to the base.

    ADAPTER is a run (its last step), run/step, a step's folder, models:/NAME@champion or models:/NAME/3.

    \b
    Example:  curlora lineage models:/support-bot@champion --figure lineage.png
    """
    from pipelines.ancestry import as_text, find
    from pipelines.store import LineageError

    try:
        found = find(adapter, storage, uri or os.environ.get("MLFLOW_TRACKING_URI"))
    except LineageError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    if figure:
        from pipelines.figures import write_ancestry

        write_ancestry(found, figure)
    click.echo(json.dumps(found.to_json(), indent=1) if as_json else as_text(found))


@main.command()
@click.argument("run")
@click.option("--points", type=click.IntRange(2), default=5, show_default=True, help="On each line, ends included.")
@click.option("--max-examples", type=click.IntRange(1), help="Test rows a task; default: as many as RUN scored.")
@click.option("--storage", default="./runs", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def connectivity(run: str, points: int, max_examples: int | None, storage: str, as_json: bool) -> None:
    """Loss of every task on the straight line from each adapter of RUN to the next: is there a path that forgets less?

    \b
    Example:  curlora connectivity domains-tiny
    """
    from pipelines.connectivity import write

    directory = _open(run, storage)
    found = write(directory, points, max_examples)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    for line in found:
        click.echo(f"{line['from']} → {line['to']}")
        for name, values in line["loss"].items():
            click.echo(f"  {name:<20}" + "".join(f"{value:9.4f}" for value in values))
    click.echo(f"{directory.uri}/figures/connectivity.png")


@main.command()
@click.argument("run")
@click.option("--as", "form", type=click.Choice(["lora", "merged"]), required=True, help="LoRA adapter or full model.")
@click.option("--to", "target", type=click.Path(path_type=Path), required=True, help="New folder.")
@click.option("--step", help="Task name, position or fingerprint; default: the last finished step.")
@click.option("--storage", default="./runs", show_default=True)
def export(run: str, form: str, target: Path, step: str | None, storage: str) -> None:
    """Write an adapter of RUN as a plain PEFT LoRA adapter (exact; any LoRA server loads it) or as a merged model.

    \b
    Example:  curlora export demo --as lora --to ./demo-lora --step scipy
    """
    from pipelines.export import export_step

    click.echo(export_step(_open(run, storage), step, form, target))


@main.command()
@click.argument("run")
@click.option("--task", required=True, help="Name of the run's task that says how to ask.")
@click.option("--text", "texts", multiple=True, help="A text; for a task with several fields one for each, in order.")
@click.option("--file", "file", type=click.Path(path_type=Path), help="JSONL with the task's fields.")
@click.option("--step", help="Task name, position or fingerprint, or base; default: the last finished step.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a row.")
@click.option("--storage", default="./runs", show_default=True)
def predict(run: str, task: str, texts, file: Path | None, step: str | None, as_json: bool, storage: str) -> None:
    """What the trained model of RUN says of new text: a class, a choice, an answer, or the text's perplexity.

    \b
    Example:  curlora predict demo --task scipy --text "Compute the inverse of a matrix."
    """
    from pipelines.config import ConfigError, Problem

    if bool(texts) == bool(file):
        raise ConfigError([Problem("", "give either --text or --file")])
    directory = _open(run, storage)
    import transformers

    from pipelines import predict as using

    transformers.utils.logging.disable_progress_bar()
    rows = using.rows_of_file(file) if file else using.rows_of_texts(directory, task, texts)
    for found in using.predict(directory, task, rows, step):
        click.echo(json.dumps(found, ensure_ascii=False) if as_json else _in_words(found))


def _in_words(prediction: dict) -> str:
    """A prediction as one line for people."""
    if "nll" in prediction:
        if prediction["nll"] is None:
            return "too short to be scored"
        numbers = f"perplexity {prediction['perplexity']:.2f}, NLL {prediction['nll']:.4f} nats a token"
        return f"{numbers}, {prediction['tokens']} tokens"
    return str(prediction.get("label", prediction["prediction"]))


@main.command()
@click.argument("run", required=False)
@click.option("--storage", default="./runs", show_default=True)
@click.option("--port", default=5000, show_default=True)
def ui(run: str | None, storage: str, port: int) -> None:
    """MLflow's pages on http://127.0.0.1:PORT over the store of RUN (default: sqlite:///mlflow.db here).

    \b
    Example:  curlora ui demo
    """
    from pipelines.store import LineageError, page_url, ui_command, ui_environment

    uri, page = "sqlite:///mlflow.db", f"http://127.0.0.1:{port}"
    if run:
        tracking = _open(run, storage).config().tracking
        if tracking is None:
            raise click.UsageError(f"run '{run}' was not tracked (tracking: null); use curlora sync {run} first")
        uri = tracking.uri
    try:
        command = ui_command(uri, port)
        page = page_url(uri, tracking.experiment, page) if run else page
    except LineageError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    click.echo(f"{page}  (MLflow over {uri}; Ctrl-C ends it)")
    sys.exit(subprocess.run(command, env=ui_environment(), check=False).returncode)


@main.command()
@click.argument("config", required=False, type=click.Path())
@click.option("--json", "as_json", is_flag=True)
def doctor(config: str | None, as_json: bool) -> None:
    """Whether this machine and this environment can run a chain (that of CONFIG), and what to mend.

    \b
    Example:  curlora doctor
    """
    from pipelines.doctor import examine

    findings = examine(config)
    if as_json:
        click.echo(json.dumps([finding.__dict__ for finding in findings], indent=1))
    else:
        for finding in findings:
            mark = {"ok": "ok  ", "warning": "WARN", "error": "FAIL"}[finding.level]
            click.echo(f"{mark}  {finding.subject}: {finding.text}")
    sys.exit(1 if any(finding.level == "error" for finding in findings) else 0)


@contextlib.contextmanager
def _at_work(as_json: bool):
    """Around a training command: its failures in words, with exit code 1.

    Args:
        as_json: whatever libraries print (Ray tells of lost nodes) goes to stderr: a script reads stdout.
    """
    from pipelines.workflow import RunFailed, RunStopped

    try:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            yield
    except RunFailed as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except RunStopped as stop:
        click.echo(f"stopped ({stop}); run the same command to go on from there", err=True)
        sys.exit(1)


def _console(err: bool = False):
    from rich.console import Console

    return Console(stderr=err)


def _open(run: str, storage: str):
    """The run called `run`: a path or URI, or a name below `storage`."""
    from pipelines.runs import RunDirectory

    for uri in (run, f"{storage}/{run}"):
        directory = RunDirectory(os.path.abspath(uri) if "://" not in uri else uri)
        if directory.exists("config.yaml"):
            return directory
    raise click.UsageError(f"no run '{run}', neither as a path nor below {storage}; see curlora status")


def _all_runs(storage: str) -> list:
    from pipelines.runs import RunDirectory

    parent = RunDirectory(os.path.abspath(storage) if "://" not in storage else storage)
    runs = [RunDirectory(f"{parent.uri}/{name}") for name in parent.list("")]
    return [directory for directory in runs if directory.exists("config.yaml")]

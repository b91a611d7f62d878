"""`curlora demo --base`: the demo on a real pretrained model, a plain and a protected chain side by side."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

import click

from pipelines.cli.helpers import at_work, new_console, with_bar
from pipelines.config.paths import CONFIGS
from pipelines.errors import DemoError

PLAIN, PROTECTED = "plain", "protected"


def demo_on(base: str, overrides: tuple[str, ...], as_json: bool, verbose: bool) -> None:
    """Fetch the base, write the tasks, train both chains and show them side by side."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # of Transformers, a bar per part
    from pipelines.bases.fetch import fetch_base
    from pipelines.data.node_cache import cache_folder
    from pipelines.demo.pretrained import prepare_tasks

    folder, _ = fetch_base(base, say=lambda line: click.echo(line, err=True))
    try:
        assets = with_bar(
            "Writing the demo's tasks (once)",
            lambda progress: prepare_tasks(folder, cache_folder("demo"), progress),
        )
    except DemoError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    os.environ |= {"CURLORA_DEMO": str(assets.root), "CURLORA_DEMO_BASE": str(folder)}
    _run_both(base, overrides, as_json, verbose)


def _run_both(base: str, overrides: tuple[str, ...], as_json: bool, verbose: bool) -> None:
    from pipelines.comparison.side_by_side import run_side_by_side
    from pipelines.config.loading import parse_config, read_config
    from pipelines.reporting.progress import ChainProgress
    from pipelines.reporting.summary import print_verdict, side_by_side_table

    raw = read_config(str(CONFIGS / f"demo-{base}.yaml"), overrides)
    plain = parse_config(raw)
    bank = {"adapter": raw["adapter"] | {"carry": "bank"}}
    protected = parse_config(raw | bank | {"name": f"{plain.name}-{PROTECTED}"})
    console = new_console(err=as_json)

    def progress_of(config) -> ChainProgress:
        return ChainProgress(console, len(config.tasks), config.name)

    with at_work(as_json):
        found = run_side_by_side([plain, protected], progress_of, verbose)
    if as_json:
        click.echo(json.dumps({PLAIN: found[0].to_json(), PROTECTED: found[1].to_json()}, indent=1))
        return
    if not any(results.ran for results in found):
        console.print("Everything is done already; nothing was trained.")
    console.print(side_by_side_table(dict(zip((PLAIN, PROTECTED), found, strict=True))))
    for config, results in zip((plain, protected), found, strict=True):
        print_verdict(replace(results, registry=None), console)
        console.print(f"report: {config.run_uri}/report.html", soft_wrap=True, highlight=False)
    if plain.tracking:
        console.print(f"MLflow: curlora ui {protected.run_uri}", soft_wrap=True, highlight=False)

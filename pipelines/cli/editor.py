"""The first minute: `init`, `schema`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import click

from pipelines.cli.helpers import with_bar
from pipelines.errors import ConfigError, DemoError, Problem

STARTER = Path(__file__).parents[1] / "starter"
CONFIG, SCHEMA = "chain.yaml", "curlora.schema.json"
DEMO = "demo"


@click.command()
@click.option("--to", type=click.Path(path_type=Path), help="File to write it to; default: print it.")
def schema(to: Path | None) -> None:
    """Print the JSON Schema of configurations.

    An editor with a YAML language server completes and explains a configuration whose first line is
    `# yaml-language-server: $schema=curlora.schema.json`.

    \b
    Example:  curlora schema --to curlora.schema.json
    """
    text = _schema_text()
    if to is None:
        click.echo(text)
        return
    to.write_text(text + "\n", encoding="utf-8")
    click.echo(f"{to}: write this line at the top of a configuration: # yaml-language-server: $schema={to}")


def _schema_text() -> str:
    from curlora.continual.registry import STRATEGIES, describe_options  # imports torch
    from pipelines.config.schema import schema as schema_of

    return json.dumps(schema_of({name: describe_options(name) for name in STRATEGIES}), indent=1)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=".")
@click.option(
    "--base", default=DEMO, show_default=True, help="Base model: demo, smollm2, a hub id, a folder or a .gguf file."
)
def init(folder: Path, base: str) -> None:
    """Write a commented configuration with example data into FOLDER.

    It can be run as it is. The base model of the demo is made once, from the documentation of installed packages.

    \b
    Example:  curlora init my-project
    """
    written = [folder / CONFIG, folder / SCHEMA, folder / "data"]
    if taken := [path for path in written if path.exists()]:
        found = ", ".join(map(str, taken))
        raise ConfigError(
            [Problem(str(folder), f"has {found} already, which is not overwritten; name another folder")]
        )
    path = _base_of(base)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(STARTER / "data", folder / "data")
    (folder / SCHEMA).write_text(_schema_text() + "\n", encoding="utf-8")
    text = (STARTER / CONFIG).read_text(encoding="utf-8")
    (folder / CONFIG).write_text(text.replace("{base}", path), encoding="utf-8")
    move = "" if folder == Path() else f"cd {folder} && "
    click.echo(f"wrote {CONFIG} (base: {path}), {SCHEMA} and data/")
    click.echo(f"next: {move}curlora run {CONFIG} --dry-run && curlora run {CONFIG}")


def _base_of(base: str) -> str:
    """What `base_model.path` says for a base by its short name, or the path or hub id itself."""
    from pipelines.bases.sources import SOURCES

    if base in SOURCES:
        from pipelines.bases.fetch import fetch_base

        return str(fetch_base(base, say=lambda line: click.echo(line, err=True))[0])
    if base != DEMO:
        from pipelines.config.paths import absolute_path

        return absolute_path(base)
    from pipelines.demo.build import prepare_demo

    try:
        return str(with_bar("Preparing the demo's model (once)", prepare_demo).base_model)
    except DemoError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)

"""Shared by several commands: consoles, progress bars, opening runs by name."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time

import click

from pipelines.errors import RunFailed, RunStopped

LINE_SECONDS = 10.0  # between two lines of progress without a terminal


def with_bar(title: str, work):
    """Run `work(progress=…)` under a progress bar, or with lines of text if there is no terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = new_console(err=True)
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


def number_list(text: str, convert: type, option: str) -> list:
    """The numbers of a comma-separated option."""
    try:
        return [convert(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise click.BadParameter(f"'{text}' is not a list of numbers such as 1,2,3", param_hint=option) from None


@contextlib.contextmanager
def at_work(as_json: bool):
    """Report failures of a training command in one line, with exit code 1.

    Args:
        as_json: redirect the output of libraries (Ray reports lost nodes) to stderr, since a script reads stdout.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            yield
    except RunFailed as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except RunStopped as stop:
        click.echo(f"stopped ({stop}); run the same command to continue from there", err=True)
        sys.exit(1)


def new_console(err: bool = False):
    from rich.console import Console

    return Console(stderr=err)


def open_run(run: str, storage: str):
    """The run at a path or URI, or with this name below `storage`."""
    from pipelines.runs.directory import RunDirectory

    for uri in (run, f"{storage}/{run}"):
        directory = RunDirectory(os.path.abspath(uri) if "://" not in uri else uri)
        if directory.exists("config.yaml"):
            return directory
    raise click.UsageError(f"no run '{run}', neither as a path nor below {storage}; curlora status lists all runs")


def all_runs(storage: str) -> list:
    """All runs below `storage`."""
    from pipelines.runs.directory import RunDirectory

    parent = RunDirectory(os.path.abspath(storage) if "://" not in storage else storage)
    runs = [RunDirectory(f"{parent.uri}/{name}") for name in parent.list("")]
    return [directory for directory in runs if directory.exists("config.yaml")]


def load_object(target: str):
    """Import the object "module:name"."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)

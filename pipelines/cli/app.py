"""The command line: `curlora …`, also `python -m pipelines …`.

Exit codes: 0 success, 1 failure, 2 invalid input. The modules of commands import only click at their top: a command
imports what it runs when it runs, so that help and invalid input are answered at once.
"""

from __future__ import annotations

import logging
import signal
import sys
import tempfile
import traceback
import warnings

import click

from pipelines.cli.helpers import load_object
from pipelines.errors import ConfigError, LeaseHeld, RunDirectoryError, Unavailable

COMMANDS = {
    "demo": "pipelines.cli.training:demo",
    "base": "pipelines.cli.bases:base",
    "init": "pipelines.cli.editor:init",
    "schema": "pipelines.cli.editor:schema",
    "run": "pipelines.cli.training:run",
    "tune": "pipelines.cli.training:tune",
    "compare": "pipelines.cli.training:compare",
    "status": "pipelines.cli.runs:status",
    "cancel": "pipelines.cli.runs:cancel",
    "report": "pipelines.cli.results:report",
    "predict": "pipelines.cli.results:predict",
    "export": "pipelines.cli.results:export",
    "push": "pipelines.cli.results:push",
    "lineage": "pipelines.cli.results:lineage",
    "connectivity": "pipelines.cli.results:connectivity",
    "sync": "pipelines.cli.results:sync",
    "delete": "pipelines.cli.results:delete",
    "promote": "pipelines.cli.registry:promote",
    "serve": "pipelines.cli.serve:serve",
    "ui": "pipelines.cli.registry:ui",
    "doctor": "pipelines.cli.registry:doctor",
    "submit": "cluster.cli:submit",
    "tick": "cluster.cli:tick",
    "schedule": "cluster.cli:schedule",
}
"""Command → "module:function", imported on demand. This table is the only way from here up to `cluster`."""

GROUPS = {
    "Training": ("demo", "base", "init", "schema", "run", "tune", "compare"),
    "Runs and results": ("status", "cancel", "report", "predict", "export", "push", "connectivity", "delete"),
    "MLflow and registry": ("lineage", "sync", "promote", "serve", "ui"),
    "Cluster and machine": ("submit", "tick", "schedule", "doctor"),
}
"""The sections of `curlora --help`."""


class _Commands(click.Group):
    """Finds commands in the table above, and reports errors that a user can correct in one line each."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return load_object(COMMANDS[name]) if name in COMMANDS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in GROUPS.items():
            with formatter.section(title):
                rows = [(name, load_object(COMMANDS[name]).get_short_help_str(formatter.width - 16)) for name in names]
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context):
        signal.signal(signal.SIGTERM, _interrupt)  # sent by schedulers; has the effect of Ctrl-C
        if "--verbose" not in sys.argv:
            for kind in (FutureWarning, RuntimeWarning, UserWarning):  # what concerns a user is said in words of ours
                warnings.simplefilter("ignore", kind)
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
            click.echo("stopped; run the same command to continue from there", err=True)
            ctx.exit(1)
        except (click.ClickException, click.Abort, click.exceptions.Exit, BrokenPipeError):
            raise
        except Exception as error:
            if "--verbose" in sys.argv:
                raise
            click.echo(f"error: {_unforeseen(error)}", err=True)
            ctx.exit(1)
        finally:
            logging.disable(logging.NOTSET)


def _unforeseen(error: Exception) -> str:
    """One line about an error that nobody expected, with the file that its traceback was written to."""
    lines = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    try:
        with tempfile.NamedTemporaryFile("w", prefix="curlora-error-", suffix=".log", delete=False) as file:
            file.write("".join(traceback.format_exception(error)))
    except OSError:
        return f"{said}; --verbose shows where"
    return f"{said}; this should not have happened: please report it with {file.name}"


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt("SIGTERM")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="curlora")
def main() -> None:
    """Continual learning for language models: chains of CURLoRA fine-tunes on Ray and DeepSpeed, tracked in MLflow.

    `curlora COMMAND --help` explains a command with an example.

    \b
    Try it:         curlora demo
    Start:          curlora init my-project
    Your own data:  curlora run my.yaml --dry-run
    """

"""The command line, `curlora …` = `python -m pipelines …`.

Exit codes: 0 done, 1 failed, 2 bad input. What takes seconds to import is imported by the command that needs it, so
that help and bad input answer at once.
"""

from __future__ import annotations

import logging
import signal
import sys
import warnings

import click

from pipelines.cli.helpers import load_object
from pipelines.errors import ConfigError, LeaseHeld, RunDirectoryError, Unavailable

COMMANDS = {
    "demo": "pipelines.cli.training:demo",
    "run": "pipelines.cli.training:run",
    "tune": "pipelines.cli.training:tune",
    "compare": "pipelines.cli.training:compare",
    "status": "pipelines.cli.runs:status",
    "cancel": "pipelines.cli.runs:cancel",
    "report": "pipelines.cli.results:report",
    "predict": "pipelines.cli.results:predict",
    "export": "pipelines.cli.results:export",
    "lineage": "pipelines.cli.results:lineage",
    "connectivity": "pipelines.cli.results:connectivity",
    "sync": "pipelines.cli.results:sync",
    "delete": "pipelines.cli.results:delete",
    "promote": "pipelines.cli.registry:promote",
    "ui": "pipelines.cli.registry:ui",
    "doctor": "pipelines.cli.registry:doctor",
    "submit": "cluster.cli:submit",
    "tick": "cluster.cli:tick",
    "schedule": "cluster.cli:schedule",
}
"""Command → "module:function", imported when it is called for. The only way from here up to `cluster`."""

GROUPS = {
    "Train": ("demo", "run", "tune", "compare"),
    "Watch and use": ("status", "cancel", "report", "predict", "export", "connectivity", "delete"),
    "MLflow": ("lineage", "sync", "promote", "ui"),
    "Cluster": ("submit", "tick", "schedule", "doctor"),
}


class _Commands(click.Group):
    """Finds commands in the table above; reports errors that a user can mend in one line, with the exit codes."""

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

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


class _Commands(click.Group):
    """Errors a user can mend, as one line each, with the exit codes above."""

    def invoke(self, ctx: click.Context):
        from pipelines.errors import ConfigError, LeaseHeld, RunDirectoryError, Unavailable

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

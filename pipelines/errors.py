"""Errors that a user can correct. The command line reports them without a traceback (exit codes: cli/app.py)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LONGEST = 2000  # characters of a message


def printable(text: str) -> str:
    """A text as a terminal and UTF-8 can show it, without the middle if it is overlong: its end is the remedy."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} … {text[-LONGEST // 4 :]}"
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


@dataclass(frozen=True)
class Problem:
    """One problem of the input: the field or file, what was found and what to do."""

    field: str
    message: str

    def __str__(self) -> str:
        return printable(f"{self.field}: {self.message}" if self.field else self.message)


class ConfigError(ValueError):
    """Invalid input, with every problem found; the command line prints one line per problem and exits with 2."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = list(problems)
        super().__init__("\n".join(map(str, self.problems)))


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """`"did you mean 'x'?"` with the nearest of the valid names, or the list of them if none is near."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"expected one of: {', '.join(valid)}"


class RunFailed(RuntimeError):
    """The chain failed. Finished steps are kept; the same command continues from there."""


class RunStopped(RuntimeError):
    """The run was asked to stop (Ctrl-C, SIGTERM, `curlora cancel`); the same command continues from there."""


def and_then(reason: str) -> str:
    """A reason of a failure, followed by how to continue."""
    return f"{reason}\nFinished steps are kept; run the same command to continue from there."


class LeaseHeld(RuntimeError):
    """Another driver is working on this run."""


class Unavailable(RuntimeError):
    """A service that the command needs (cluster, registry) cannot be reached or refuses; a retry may help."""


class RunDirectoryError(RuntimeError):
    """The run directory cannot be used: it is not writable, damaged, or of another format."""


class LineageError(RuntimeError):
    """MLflow cannot be reached or refused what was sent. The run directory still holds everything."""


class NotRegistered(RuntimeError):
    """The last adapter of a finished run cannot become a registered version; the message says why."""


class DataError(ValueError):
    """Data that cannot be used, with the problems found."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = list(problems)
        super().__init__("\n".join(map(str, self.problems)))


class DemoError(RuntimeError):
    """The demo cannot be built in this environment; the message says what to do."""


class DivergedError(RuntimeError):
    """The loss, a weight or a score is NaN or infinite."""


class Stopped(RuntimeError):
    """A worker ended its assignment early on request of the driver, after writing a checkpoint."""

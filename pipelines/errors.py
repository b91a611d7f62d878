"""Errors that a user can mend, each with the exit code it means on the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing wrong with the input: where, and what to do."""

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


class ConfigError(ValueError):
    """Bad input. Carries every problem found; the command line prints one line each and exits with 2."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = list(problems)
        super().__init__("\n".join(map(str, self.problems)))


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the nearest of `valid`, or the list of them."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"expected one of: {', '.join(valid)}"


class RunFailed(RuntimeError):
    """The chain stopped; what was finished stays, and the same command goes on from there."""


class RunStopped(RuntimeError):
    """Somebody asked the run to stop (Ctrl-C, SIGTERM, `curlora cancel`); the same command goes on from there."""


def and_then(reason: str) -> str:
    return f"{reason}\nWhat was finished is kept; run the same command to go on from there."


class LeaseHeld(RuntimeError):
    """Another driver works on this run."""


class Unavailable(RuntimeError):
    """A service that the command needs (a cluster, a registry) is away or refuses; trying again may help."""


class RunDirectoryError(RuntimeError):
    """The run directory cannot be used as it is: not writable, or of another format."""


class LineageError(RuntimeError):
    """MLflow could not be reached or refused what was sent. The run directory still holds everything."""


class DataError(ValueError):
    """Data that cannot be used; carries the problems found."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = list(problems)
        super().__init__("\n".join(map(str, self.problems)))


class DemoError(RuntimeError):
    """The demo cannot be prepared from this environment; the message says what to do."""


class DivergedError(RuntimeError):
    """The loss, a weight or a score is no longer a number."""


class Stopped(RuntimeError):
    """Work on an assignment ended early because the driver asked for it; a checkpoint was written."""

"""Supervises the workers of an assignment: one supervisor for chains, trials and a search's reference scores.

Workers communicate only through the run directory: by events and `progress.json`. From these the supervisor sees
progress, errors that make another start pointless, and silence. Workers that are lost for any other reason are
started again as long as they make progress.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from pipelines.config.sections import DurabilityConfig
from pipelines.runs.directory import RunDirectory
from pipelines.runs.event import Event
from pipelines.workers.assignment import Assignment
from pipelines.workers.failures import GroupLost, WorkersFailed, WorkersSilent

STOP_SECONDS = 4.0  # for workers to write a checkpoint after a request to stop, before they are killed
LOOK_SECONDS = 0.25


class Supervisor:
    """Hands assignments to a worker group, one after another, and watches each.

    Args:
        group: a `WorkerGroup`, or a `RemoteGroup`.
        run: the run directory that the workers write to.
        progress: comparable state of the work; a lost group may always start again if it has changed this.
        on_event: called with each new event and progress record.
        sign_seconds: least time between two reads of events and progress.
    """

    def __init__(
        self,
        group: Any,
        run: RunDirectory,
        durability: DurabilityConfig,
        progress: Callable[[], Any] = lambda: None,
        on_event: Callable[[Event], None] = lambda event: None,
        sign_seconds: float = 0.0,
    ):
        self.group, self.run, self.durability = group, run, durability
        self.progress, self.on_event, self.sign_seconds = progress, on_event, sign_seconds
        self.failures = 0  # starts in a row that ended without progress
        self._known = {name for name, _ in run.events()}
        self._number: int | None = None
        self._before: Any = None  # progress when the assignment was submitted
        self._alive = self._looked = 0.0
        self._mark: tuple | None = None  # identifies the last progress record

    @property
    def is_idle(self) -> bool:
        """Whether no assignment is being worked on."""
        return self._number is None

    def ignore_errors_so_far(self) -> None:
        """Report new events without acting on errors among them: these are not about the next assignment."""
        for event in self._new_events():
            self.on_event(event)

    def submit(self, assignment: Assignment) -> None:
        """Submit an assignment. Errors in events written before are ignored: they are not about it."""
        self.ignore_errors_so_far()
        self._before = self.progress()
        self._alive = self._looked = time.monotonic()
        self._mark = None
        try:
            self._number = self.group.submit(assignment)
        except GroupLost as error:
            self._count_loss(error)
            raise

    def look(self, seconds: float = LOOK_SECONDS) -> dict | None:
        """The result of the assignment; None if it is not done within `seconds`.

        Raises:
            WorkersFailed: an error that another start would meet again, or too many starts without progress.
            WorkersSilent: no sign of life for `durability.start_timeout` seconds.
            GroupLost: the workers were lost; submit the assignment again.
        """
        try:
            result = self.group.wait(self._number, seconds)
        except GroupLost as error:
            self._number = None
            self._read_signs()
            self._count_loss(error)
            raise
        if result is not None:
            self._number, self.failures = None, 0
            self.ignore_errors_so_far()
        elif time.monotonic() - self._looked >= self.sign_seconds:
            self._read_signs()
            self._check_alive()
        return result

    def end(self, reason: str) -> None:
        """Give the workers a moment to write a checkpoint, then kill them."""
        self._number = None
        with contextlib.suppress(OSError, GroupLost):
            if self.run.stop_requested() is None:
                self.run.request_stop(reason)
            self.group.end(STOP_SECONDS)

    def _new_events(self) -> list[Event]:
        found = []
        for name, event in self.run.events(self._known):
            self._known.add(name)
            found.append(event)
        return found

    def _read_signs(self) -> None:
        self._looked = time.monotonic()
        for event in self._new_events():
            self._alive = time.monotonic()
            self.on_event(event)
            if event.kind == "worker_error":
                self._give_up()
                raise WorkersFailed(event.error)
        progress = self.run.progress()
        if progress and (mark := (progress.worker, progress.serial)) != self._mark:
            self._alive, self._mark = time.monotonic(), mark
            self.on_event(progress)

    def _check_alive(self) -> None:
        limit = self.durability.start_timeout
        if time.monotonic() - self._alive > limit:
            self._give_up()
            raise WorkersSilent(f"no sign of life from the workers for {limit:g} s (durability.start_timeout)")

    def _give_up(self) -> None:
        """Kill workers that have raised an error or are silent."""
        self._number = None
        self.group.kill()

    def _count_loss(self, error: GroupLost) -> None:
        self.failures = self.failures + 1 if self.progress() == self._before else 0
        if self.failures > self.durability.max_failures:
            reason = f"gave up after {self.failures} starts without progress: durability.max_failures"
            raise WorkersFailed(f"{error} ({reason})") from error

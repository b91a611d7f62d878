"""Delivers the messages of a folder from a thread of its own, so that a slow receiver delays nothing."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from pipelines.config.notify import NotifyConfig
from pipelines.config.pipeline import PipelineConfig
from pipelines.errors import ConfigError, RunStopped
from pipelines.notify.delivery import send
from pipelines.notify.outbox import DELIVERED, FAILED, begin, end, post, waiting
from pipelines.runs.directory import RunDirectory

LONGEST_PAUSE = 60.0  # seconds between two attempts


class Sender:
    """Delivers what a folder holds; `start` and `finish` do nothing without the section `notify:`."""

    def __init__(self, folder: RunDirectory, notify: NotifyConfig | None):
        self.folder, self.notify = folder, notify
        self._thread: threading.Thread | None = None
        self._problems: list[str] = []

    def start(self) -> None:
        """Begin with what is waiting, in the background."""
        if self.notify and self._thread is None:
            self._ended = threading.Event()
            self._thread = threading.Thread(target=self._deliver, args=(self._ended,), daemon=True, name="notify")
            self._thread.start()

    def finish(self, wait: float | None = None) -> list[str]:
        """Deliver what is waiting now within `wait` seconds (None: as configured); why the rest was not delivered.

        An attempt that has begun is not cut off: it may take `timeout` seconds longer.
        """
        if self.notify is None:
            return []
        self._join(0)  # its pauses may be long by now
        if wait != 0:
            self.start()
            self._join(self.notify.wait if wait is None else wait)
        return self._problems

    def _join(self, seconds: float) -> None:
        if self._thread:
            self._thread.join(seconds)
            self._ended.set()
            self._thread.join()
            self._thread = None

    def _deliver(self, ended: threading.Event) -> None:
        self._problems, unknown = [], []
        for number in range(self.notify.attempts):
            try:
                failed = self._attempt_all(ended, unknown)
            except Exception as error:  # the storage may fail; no message may end a chain
                failed = [f"notify: {type(error).__name__}: {error}"]
            self._problems = [*unknown, *failed]
            if not failed or ended.is_set():
                return
            if number + 1 < self.notify.attempts and ended.wait(min(2.0**number, LONGEST_PAUSE)):
                return

    def _attempt_all(self, ended: threading.Event, unknown: list[str]) -> list[str]:
        """One attempt of every waiting message; what failed, and adds to `unknown`."""
        failed = []
        for attempt in waiting(self.folder):
            if ended.is_set() or (message := begin(self.folder, attempt)) is None:
                continue
            outcome, reason = send(self.notify, message)
            end(self.folder, attempt, outcome, reason)
            if outcome == FAILED:
                failed.append(f"notify: {attempt.id} is not delivered ({reason}); the next command tries again")
            elif outcome != DELIVERED:
                unknown.append(f"notify: {attempt.id} may not be delivered ({reason}) and is not sent twice")
        return failed


@contextlib.contextmanager
def telling(run: RunDirectory, config: PipelineConfig, warn: Callable[[str], None]) -> Iterator[None]:
    """Deliver a run's messages, old ones while it works and new ones at its end; a failure becomes one of them."""
    sender = Sender(run, config.notify)
    sender.start()
    wait = None
    try:
        yield
    except (ConfigError, RunStopped, KeyboardInterrupt):
        wait = 0.0
        raise
    except Exception as error:
        with contextlib.suppress(OSError):  # a full disk
            text = f"{run.name} failed: {error}"
            post(run, config.notify, "failure", [time.time()], text, run=run.name, run_uri=run.uri)
        raise
    finally:
        for problem in sender.finish(wait):
            warn(problem)

"""Follows the aliases of a registered model, so that a promotion reaches users without a restart."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from pipelines.errors import LineageError
from pipelines.lineage import registry
from pipelines.lineage.registry import CANDIDATE, CHAMPION, Version
from pipelines.serve.catalogue import Catalogue
from pipelines.serve.sources import step_of_version

log = logging.getLogger(__name__)
RETRY_SECONDS = (5.0, 60.0)  # first and longest pause before a version that did not load is tried again


@dataclass(frozen=True)
class Failure:
    """A version that did not load."""

    version: int
    reason: str
    pause: float
    again: float


class Watcher:
    """Polls `champion` and `candidate` on a thread of its own.

    A version that does not load leaves the old one serving; it is tried again, ever more rarely, until it loads or the
    alias moves on.

    Attributes:
        failures: alias → the version that should serve but did not load.
        unreachable: why the registry could not be asked last; None if it was.
    """

    def __init__(
        self,
        uri: str,
        name: str,
        catalogue: Catalogue,
        poll: float,
        told: Callable[[str, str], None] = lambda alias, outcome: None,
    ):
        self.uri, self.name, self.catalogue, self.poll, self.told = uri, name, catalogue, poll, told
        self.failures: dict[str, Failure] = {}
        self.unreachable: str | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(self.poll):
            self.look()

    def look(self) -> None:
        """Ask the registry once, and follow."""
        for alias in (CHAMPION, CANDIDATE):
            try:
                version = registry.by_alias(self.uri, self.name, alias)
            except LineageError as error:
                if self.unreachable is None:
                    log.warning("the registry cannot be asked, what serves goes on serving: %s", error)
                self.unreachable = str(error)
                self.told(alias, "unreachable")
                return
            self.unreachable = None
            self._follow(alias, version)

    def _follow(self, alias: str, version: Version | None) -> None:
        if version is None:
            self.failures.pop(alias, None)
            if alias == CANDIDATE:  # a champion goes on serving until there is another one
                self.catalogue.remove(alias)
            return
        if self._serves(alias, version):
            self.failures.pop(alias, None)
            return
        failure = self.failures.get(alias)
        if failure and failure.version == version.version and time.monotonic() < failure.again:
            return
        try:
            self.catalogue.place(alias, step_of_version(version, self.uri))
        except Exception as error:  # whatever is wrong with one version must not end the watch
            self._failed(alias, version, error)
        else:
            self.failures.pop(alias, None)
            log.info("%s is now %s", alias, version.uri)
            self.told(alias, "swapped")

    def _serves(self, alias: str, version: Version) -> bool:
        served = self.catalogue.aliases.get(alias)
        return served is not None and served.step.version.version == version.version

    def _failed(self, alias: str, version: Version, error: Exception) -> None:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        before = self.failures.get(alias)
        pause = RETRY_SECONDS[0]
        if before and before.version == version.version:
            pause = min(2 * before.pause, RETRY_SECONDS[1])
        else:
            log.error("%s: %s does not load, the one before goes on serving: %s", alias, version.uri, reason)
        self.failures[alias] = Failure(version.version, reason, pause, time.monotonic() + pause)
        self.told(alias, "failed")

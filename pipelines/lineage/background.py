"""Projects a running chain into MLflow from a background thread."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

from pipelines.config.pipeline import PipelineConfig
from pipelines.errors import LineageError
from pipelines.lineage.projection import Projection, Sent
from pipelines.runs.directory import RunDirectory

LIVE_SECONDS = 5.0  # between two looks at what the step in training tells
RETRY_SECONDS = 60.0  # the same after MLflow could not be reached


class Projector:
    """Sends the run to MLflow from its own thread, so that a slow or unreachable server never delays training."""

    def __init__(self, run: RunDirectory, config: PipelineConfig, chain: Sequence[str]):
        self.run, self.tracking, self.chain = run, config.tracking, chain
        self.sent = Sent()
        self._projection = Projection(run, self.tracking.uri, self.tracking.experiment) if self.tracking else None
        self._wanted = threading.Event()
        self._pause = LIVE_SECONDS
        self._stop = self._started = False

    def notify(self) -> None:
        """Wake the thread: the run directory has changed."""
        if self.tracking is None:
            return
        if not self._started:
            self._started = True
            self._thread = threading.Thread(target=self._loop, daemon=True, name="lineage")
            self._thread.start()
        self._wanted.set()

    def finish(self) -> Sent:
        """Send what is left and wait."""
        if self.tracking is None:
            return Sent()
        self._stop = True
        self.notify()
        self._thread.join()
        self._started = self._stop = False
        return self.sent

    def _loop(self) -> None:
        while True:
            wanted = self._wanted.wait(self._pause)
            self._wanted.clear()
            last, self._pause = self._stop, LIVE_SECONDS
            try:
                if wanted:
                    self.sent = self._projection.send_all(self.chain)
                else:
                    self._projection.send_live(self.chain)
            except LineageError as error:
                self.sent, self._pause = replace(self.sent, warning=str(error)), RETRY_SECONDS
            except Exception as error:  # a bug in the projection must not fail a finished chain
                reason = f"{type(error).__name__}: {error}"
                warning = f"lineage failed ({reason}); send it later: curlora sync {self.run.uri}"
                self.sent, self._pause = replace(self.sent, warning=warning), RETRY_SECONDS
            if last:
                return

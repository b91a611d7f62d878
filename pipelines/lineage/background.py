"""Projects a running chain into MLflow from a background thread."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from pipelines.config.pipeline import PipelineConfig
from pipelines.errors import LineageError
from pipelines.lineage.projection import Projection
from pipelines.runs.directory import RunDirectory


class Projector:
    """Sends the run to MLflow from its own thread, so that a slow or unreachable server never delays training."""

    def __init__(self, run: RunDirectory, config: PipelineConfig, chain: Sequence[str]):
        self.run, self.tracking, self.chain = run, config.tracking, chain
        self.runs: dict[str, str] = {}
        self.warning: str | None = None
        self._projection = Projection(run, self.tracking.uri, self.tracking.experiment) if self.tracking else None
        self._wanted = threading.Event()
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

    def finish(self) -> tuple[dict[str, str], str | None]:
        """Send what is left and wait; (fingerprint → MLflow run id, warning if sending failed)."""
        if self.tracking is None:
            return {}, None
        self._stop = True
        self.notify()
        self._thread.join()
        self._started = self._stop = False
        return self.runs, self.warning

    def _loop(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            last = self._stop
            try:
                self.runs = self._projection.send(self.chain)
                self.warning = None
            except LineageError as error:
                self.warning = str(error)
            except Exception as error:  # a bug in the projection must not fail a finished chain
                self.warning = (
                    f"lineage failed ({type(error).__name__}: {error}); send it later: curlora sync {self.run.uri}"
                )
            if last:
                return

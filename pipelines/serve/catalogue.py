"""Names of models and the adapters behind them: `base`, `champion`, `candidate`, `run/step`.

An adapter is loaded once, whatever names point to it, and stays in memory while a request uses it or an alias names
it. Moving an alias is one assignment: requests that began with the old adapter keep it.
"""

from __future__ import annotations

import contextlib
import logging
import re
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curlora.mixed import BASE
from pipelines.config.pipeline import PipelineConfig
from pipelines.errors import ConfigError
from pipelines.inference.predict import Trained
from pipelines.runs.directory import RunDirectory
from pipelines.serve.contract import AdapterError
from pipelines.serve.engine import Engine
from pipelines.serve.sources import Step, fetch, step_of_run

log = logging.getLogger(__name__)
STEP_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]{0,63})/([A-Za-z0-9][A-Za-z0-9_-]{0,127})")


class UnknownModel(LookupError):
    """No adapter has this name; the message lists what there is."""


@dataclass(eq=False)
class Loaded:
    """An adapter in memory.

    Attributes:
        key: its name in the shared model.
        trained: the model with the tasks that it can answer; None: there is no configuration of tasks.
        users: requests that use it.
        direct: the step as a request named it; None: only aliases have.
    """

    key: str
    trained: Trained | None
    users: int = 0
    used: int = field(default=0, repr=False)
    direct: Step | None = None


@dataclass(frozen=True)
class Served:
    """An adapter under one of its names; `step` is where it comes from, None for the base."""

    loaded: Loaded
    step: Step | None

    @property
    def key(self) -> str:
        return self.loaded.key

    def facts(self) -> dict[str, Any]:
        """Which adapter this is, for responses and logs."""
        if self.step is None:
            return {"name": "base", "version": None, "fingerprint": None}
        version = self.step.version.version if self.step.version else None
        return {"name": self.step.label, "version": version, "fingerprint": self.step.fingerprint}


class Catalogue:
    """The adapters of one engine.

    Args:
        config: tasks that the base itself can be asked, None if there are none.
        base_fingerprint: identity of the base in memory.
        storage: folder of the runs that `run/step` refers to.
        most: adapters kept in memory.
    """

    def __init__(
        self,
        engine: Engine,
        config: PipelineConfig | None,
        base_fingerprint: str,
        storage: str,
        context: int,
        most: int,
    ):
        self.engine, self.base_fingerprint, self.storage = engine, base_fingerprint, storage.rstrip("/")
        self.context, self.most = context, most
        self.aliases: dict[str, Served] = {}
        self._base = Served(Loaded(BASE, self._trained(config, frozenset()) if config else None), None)
        self._loaded: dict[str, Loaded] = {}
        self._changing, self._loading, self._clock = threading.RLock(), threading.Lock(), 0

    def _trained(self, config: PipelineConfig, tasks: frozenset[str]) -> Trained:
        return Trained(config, self.engine.model.model, self.engine.tokenizer, self.context, tasks)

    # -- for requests
    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[Served]:
        """The adapter of this name, which stays in memory inside; loads that of a `run/step` if need be.

        Raises:
            UnknownModel: there is none.
            AdapterError: it cannot be loaded.
        """
        served = self.acquire(name)
        try:
            yield served
        finally:
            self.release(served)

    def acquire(self, name: str) -> Served:
        """See `using`; every adapter acquired must be released."""
        with self._changing:
            served = self._base if name == "base" else self.aliases.get(name)
            if served is not None:
                self._use(served.loaded)
                return served
        served = self._load(self._step(name))
        served.loaded.direct = served.step
        return served

    def release(self, served: Served) -> None:
        with self._changing:
            served.loaded.users -= 1

    def is_ready(self, name: str) -> bool:
        """Whether `acquire` answers without loading anything."""
        return name == "base" or name in self.aliases

    @property
    def count(self) -> int:
        """Adapters in memory."""
        return len(self._loaded)

    def steps(self) -> dict[str, Served]:
        """Adapters in memory that were asked for as `run/step`, by that name."""
        with self._changing:
            loaded = list(self._loaded.values())
        return {entry.direct.label: Served(entry, entry.direct) for entry in loaded if entry.direct}

    def _step(self, name: str) -> Step:
        found = STEP_NAME.fullmatch(name)
        if not found:
            raise UnknownModel(self._unknown(name))
        run = RunDirectory(f"{self.storage}/{found[1]}")
        if not run.exists("config.yaml"):
            raise UnknownModel(self._unknown(name))
        try:
            return step_of_run(run, found[2])
        except ConfigError as error:
            raise UnknownModel(str(error)) from error

    def _unknown(self, name: str) -> str:
        shown = name if len(name) <= 60 else name[:57] + "..."
        return f"there is no model '{shown}'; use one of: {', '.join(['base', *sorted(self.aliases)])}, <run>/<step>"

    # -- for aliases
    def place(self, alias: str, step: Step) -> Served:
        """Load a step and let the alias point to it; until then, and if it fails, it points where it did.

        Raises:
            AdapterError, ConfigError, LineageError, OSError: the step cannot be loaded.
        """
        served = self._load(step)
        with self._changing:
            self.aliases[alias] = served
        self.release(served)
        return served

    def remove(self, alias: str) -> None:
        with self._changing:
            self.aliases.pop(alias, None)

    # -- loading
    def _use(self, loaded: Loaded) -> None:
        self._clock += 1
        loaded.users, loaded.used = loaded.users + 1, self._clock

    def _load(self, step: Step) -> Served:
        """The adapter of a step, acquired."""
        key = f"s{step.fingerprint[:24]}"
        with self._loading:
            with self._changing:
                if key in self._loaded:
                    self._use(self._loaded[key])
                    return Served(self._loaded[key], step)
            self._make_room()
            with tempfile.TemporaryDirectory() as scratch:
                fetched = fetch(step, Path(scratch))
                if fetched.base_fingerprint != self.base_fingerprint:
                    reason = f"base {fetched.base_fingerprint[:12]}, the one in memory is {self.base_fingerprint[:12]}"
                    raise AdapterError(f"{step.label} was trained on {reason}")
                self.engine.call(lambda: self.engine.model.load(key, fetched.folder)).result()
            loaded = Loaded(key, self._trained(fetched.config, fetched.tasks))
            with self._changing:
                self._loaded[key] = loaded
                self._use(loaded)
            log.info("loaded %s", step.label)
            return Served(loaded, step)

    def _make_room(self) -> None:
        """Unload adapters that no request uses and no alias names, the one unused for longest first."""
        while True:
            with self._changing:
                named = {served.key for served in self.aliases.values()}
                free = [loaded for loaded in self._loaded.values() if not loaded.users and loaded.key not in named]
                if len(self._loaded) < self.most or not free:
                    return
                oldest = min(free, key=lambda loaded: loaded.used)
                del self._loaded[oldest.key]
            self.engine.call(lambda key=oldest.key: self.engine.model.unload(key)).result()

"""The thread that runs the model: requests of any adapters share one batch, which they join and leave at any token.

Everything that touches the model happens on this thread: `submit` asks for text, `call` runs any other function (an
adapter is loaded, a classification is scored) between two forward passes. Pure torch; no Ray, no HTTP.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from curlora.mixed import BASE
from pipelines.errors import ConfigError, Problem
from pipelines.models.losses import cache_argument, keep_last, position_ids
from pipelines.models.padding import pad
from pipelines.serve.cache import Batching, State, batching_of, join, keep
from pipelines.serve.contract import Ask, Busy, Draining, Listener, NotFinite
from pipelines.serve.rows import Row
from pipelines.serve.sampling import choose, token_scores, usable
from pipelines.serve.shared_model import SharedModel

log = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Limits:
    """What the engine holds at once.

    Attributes:
        tokens: prompts and longest answers of all rows of the batch, padding included; one row is always admitted.
        rows: rows of the batch.
        waiting: requests that wait for a place.
    """

    tokens: int = 16_384
    rows: int = 64
    waiting: int = 256


class Engine:
    """Generates text with a shared model.

    Raises:
        ConfigError: the base takes no key-value cache.
    """

    def __init__(self, model: SharedModel, tokenizer: Any, limits: Limits):
        self.model, self.tokenizer, self.limits = model, tokenizer, limits
        cache_name = cache_argument(model.base)
        if cache_name is None:
            raise ConfigError([Problem("base_model", "takes no key-value cache, so it cannot be served")])
        self.cache_name = cache_name
        self.batching = batching_of(self._forward([BASE], None, torch.zeros(1, 1, dtype=torch.long))[1])
        self._changed = threading.Condition()
        self._waiting: deque[Row] = deque()
        self._calls: deque[tuple[Future, Callable]] = deque()
        self._rows: list[Row] = []
        self._beginning: list[Row] = []
        self._state: State | None = None
        self._draining = self._closed = self._calling = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # -- from any thread
    @property
    def running(self) -> int:
        return len(self._rows)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, asks: Sequence[Ask], listeners: Sequence[Listener]) -> list[Row]:
        """Queue requests, all or none; each listener is told of every piece of its answer.

        Raises:
            Busy: the queue is full.
            Draining: the server is about to end.
        """
        rows = [Row.of(ask, listener, self.tokenizer) for ask, listener in zip(asks, listeners, strict=True)]
        with self._changed:
            if self._draining or self._closed:
                raise Draining("the server is ending; try again in a moment")
            if self._waiting and len(self._waiting) + len(rows) > self.limits.waiting:
                raise Busy(f"{len(self._waiting)} requests are waiting, which is all that may; try again later")
            self._waiting.extend(rows)
            self._changed.notify()
        return rows

    def cancel(self, rows: Sequence[Row]) -> None:
        """Give up answers that nobody waits for any more."""
        for row in rows:
            row.cancelled = True

    def call(self, function: Callable[[], Result]) -> Future[Result]:
        """Run a function on the engine's thread between two forward passes."""
        future: Future = Future()
        with self._changed:
            if self._closed:
                raise Draining("the server has ended")
            self._calls.append((future, function))
            self._changed.notify()
        return future

    def drain(self, seconds: float) -> bool:
        """Refuse new requests and wait for those that were accepted; whether all were answered in time."""
        with self._changed:
            self._draining = True
        end = time.monotonic() + seconds
        while self._is_busy and time.monotonic() < end:
            time.sleep(0.02)
        return not self._is_busy

    @property
    def _is_busy(self) -> bool:
        with self._changed:  # a row that is admitted meanwhile is in one of the lists
            return bool(self._waiting or self._beginning or self._rows or self._calls or self._calling)

    def close(self) -> None:
        """End the thread; requests that are left get an error."""
        with self._changed:
            self._draining = self._closed = True
            self._changed.notify()
        self._thread.join()

    # -- on the engine's thread
    @torch.no_grad()
    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._closed or self._calls or self._waiting or self._rows):
                    self._changed.wait()
                if self._closed:
                    break
            self._run_calls()
            try:
                self._leave()
                self._admit()
                if self._rows:
                    self._decode()
                    self._leave()
            except Exception as error:  # e.g. out of memory: this batch fails, the next one may not
                log.exception("the batch failed")
                self._fail_all(error)
        self._fail_all(Draining("the server has ended"))
        while self._waiting:
            self._waiting.popleft().fail(Draining("the server has ended"))
        while self._calls:
            self._calls.popleft()[0].cancel()

    def _run_calls(self) -> None:
        while self._calls:
            with self._changed:
                (future, function), self._calling = self._calls.popleft(), True
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:  # the caller's to handle
                    future.set_exception(error)
            self._calling = False

    def _fail_all(self, error: Exception) -> None:
        rows = [*self._rows, *self._beginning]
        self._rows, self._beginning, self._state = [], [], None
        for row in rows:
            row.fail(error)

    def _leave(self) -> None:
        """Drop rows that are finished, given up or late, whether they are in the batch or wait."""
        with self._changed:
            self._waiting = deque(row for row in self._waiting if not row.settle())
        staying = [number for number, row in enumerate(self._rows) if not row.settle()]
        if len(staying) < len(self._rows):
            self._rows = [self._rows[number] for number in staying]
            self._state = keep(self._state, staying, self.batching) if staying else None

    def _admit(self) -> None:
        """Let waiting rows begin, in the order of their arrival."""
        if self._rows and self.batching is not Batching.CONTINUOUS:
            return
        most = 1 if self.batching is Batching.SINGLE else self.limits.rows
        with self._changed:
            while self._waiting and len(self._rows) + len(self._beginning) < most:
                together = [*self._rows, *self._beginning, self._waiting[0]]
                cost = len(together) * max(row.length for row in together)
                if len(together) > 1 and cost > self.limits.tokens:
                    break
                self._beginning.append(self._waiting.popleft())
        if self._beginning:
            self._begin(list(self._beginning))
            self._beginning.clear()

    def _begin(self, new: list[Row]) -> None:
        """Read the prompts of new rows, generate their first tokens, and add them to the batch."""
        try:
            padded = pad([row.ask.prompt for row in new], self.model.device, side="left")
            names = [row.ask.adapter for row in new]
            logits, cache = self._forward(names, None, padded.ids, padded.mask, padded.positions)
            tokens = self._take(new, logits)
        except Exception as error:
            log.exception("the prompts of %d requests failed", len(new))
            for row in new:
                row.fail(error)
            return
        state = State(cache, padded.mask, padded.positions[:, -1:] + 1, tokens)
        staying = [number for number, row in enumerate(new) if not row.settle()]
        if not staying:
            return
        if len(staying) < len(new):
            state, new = keep(state, staying, self.batching), [new[number] for number in staying]
        self._state = state if self._state is None else join(self._state, state)
        self._rows += new

    def _decode(self) -> None:
        """One more token for every row."""
        state, names = self._state, [row.ask.adapter for row in self._rows]
        state.mask = torch.cat([state.mask, torch.ones_like(state.tokens)], 1)
        logits, state.cache = self._forward(names, state.cache, state.tokens, state.mask, state.positions)
        state.positions = state.positions + 1
        state.tokens = self._take(self._rows, logits)

    def _forward(self, names: Sequence[str], cache: Any, ids, mask=None, positions=None) -> tuple[torch.Tensor, Any]:
        """Logits (batch, vocabulary) of the last position, and the cache."""
        inputs: dict[str, Any] = {"input_ids": ids.to(self.model.device), "use_cache": True, self.cache_name: cache}
        if mask is not None and not (cache is not None and self.batching is Batching.SINGLE):
            inputs["attention_mask"] = mask
        if positions is not None:
            inputs |= position_ids(self.model.base, positions)
        with torch.no_grad():
            output = self.model(names, **inputs, **keep_last(self.model.base, inputs["input_ids"]))
        return output.logits[:, -1], getattr(output, self.cache_name)

    def _take(self, rows: Sequence[Row], logits: torch.Tensor) -> torch.Tensor:
        """Choose a token per row and tell its listener; the tokens (batch, 1)."""
        good = usable(logits)
        if not all(good):
            logits = torch.where(torch.tensor(good, device=logits.device)[:, None], logits, 0.0)
        tokens = choose(logits, [(row.ask.sampling, row.generator) for row in rows])
        scores = token_scores(logits, tokens, [row.ask.sampling.top_logprobs for row in rows])
        for row, token, score, fine in zip(rows, tokens, scores, good, strict=True):
            if row.cancelled:
                continue
            if fine:
                row.take(token, score)
            else:
                row.fail(NotFinite(f"the logits of adapter {row.ask.adapter} are not finite"))
        return torch.tensor(tokens, device=logits.device)[:, None]

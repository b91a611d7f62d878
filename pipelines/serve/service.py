"""One replica of the server without HTTP: base, engine, adapters, registry, and what a request does with them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import torch

from pipelines.errors import ConfigError
from pipelines.inference.predict import Trained
from pipelines.lineage.registry import CANDIDATE, CHAMPION
from pipelines.models.base import context_length, load_base, load_tokenizer
from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import base_fingerprint
from pipelines.serve.catalogue import Catalogue, Loaded, Served, UnknownModel
from pipelines.serve.contract import AdapterError, Ask, Busy, Draining, Piece
from pipelines.serve.engine import Engine, Limits
from pipelines.serve.metrics import Metrics
from pipelines.serve.prompts import Prompts
from pipelines.serve.responses import Writer
from pipelines.serve.schema import BadRequest, ChatRequest, CompletionRequest, Generation, PredictRequest
from pipelines.serve.shared_model import SharedModel
from pipelines.serve.sources import Step
from pipelines.serve.target import Plan
from pipelines.serve.watcher import Watcher

GRACE = 5.0  # seconds after its deadline in which the engine says that an answer is late


class Answering:
    """A request whose answers are being generated.

    Attributes:
        served: the adapter that answers, to the end.
    """

    def __init__(self, service: Service, served: Served, writer: Writer, asks: list[Ask]):
        self.served, self.writer, self.count = served, writer, len(asks)
        self._service, self._loop, self._closed = service, asyncio.get_running_loop(), False
        self._end = max(ask.deadline for ask in asks) + GRACE
        self._queue: asyncio.Queue = asyncio.Queue()
        self._rows = service.engine.submit(asks, [self._listener(index) for index in range(len(asks))])

    def _listener(self, index: int):
        def told(what: Piece | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever asked
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, what))

        return told

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(number of the answer, piece) as they come.

        Raises:
            the error of an answer that failed.
        """
        left = self.count
        while left:
            rest = self._end - time.monotonic()  # the engine sees to the deadline itself, unless it hangs
            index, what = await asyncio.wait_for(self._queue.get(), max(rest, 0))
            if isinstance(what, Exception):
                raise what
            yield index, what
            left -= what.finish is not None

    def close(self) -> None:
        """Give up what is not finished, and let go of the adapter; once is enough."""
        if not self._closed:
            self._closed = True
            self._service.engine.cancel(self._rows)
            self._service.catalogue.release(self.served)


class Service:
    """Answers the requests of one server, as its plan says."""

    def __init__(self, plan: Plan):
        self.settings, self.token, self.metrics = plan.settings, plan.token, Metrics()
        self.run = RunDirectory(plan.run) if plan.run else None
        settings = plan.settings
        base = load_base(plan.base, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.tokenizer, self.context = load_tokenizer(plan.base), context_length(base.config)
        self.model = SharedModel(base)
        limits = Limits(settings.batch_tokens, settings.batch_rows, settings.queue)
        self.engine = Engine(self.model, self.tokenizer, limits)
        vocabulary = base.get_input_embeddings().num_embeddings
        ends = getattr(base.generation_config, "eos_token_id", None)
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        self.prompts = Prompts(self.tokenizer, self.context, settings.max_new_tokens, vocabulary, ends)
        self.catalogue = Catalogue(
            self.engine, plan.config, base_fingerprint(plan.base), plan.storage, self.context, settings.max_adapters
        )
        self.watcher: Watcher | None = None
        self._chance, self._draining, self._scoring = random.Random(), False, 0
        if plan.registry:
            self.watcher = Watcher(*plan.registry, self.catalogue, settings.poll, self._alias_followed)
            self.watcher.look()
            self.watcher.start()

    def _alias_followed(self, alias: str, outcome: str) -> None:
        self.metrics.swaps.labels(alias, outcome).inc()

    # -- which adapter
    async def acquire(self, asked: str) -> tuple[Served, dict[str, Any]]:
        """The adapter that answers a request for this model, and `adapter` of the response; release it in the end.

        Raises:
            BadRequest: there is no such model (404), or it does not load (503).
        """
        name = self._or_candidate(asked)
        served = await self._acquire(name)
        return served, served.facts() | {"canary": name != asked}

    async def _acquire(self, name: str) -> Served:
        try:
            if self.catalogue.is_ready(name):
                return self.catalogue.acquire(name)
            failure = self.watcher.failures.get(name) if self.watcher else None
            if failure:
                reason = f"version {failure.version} does not load: {failure.reason}"
                raise BadRequest(f"there is no {name} yet, {reason}", "model", 503)
            return await asyncio.to_thread(self.catalogue.acquire, name)
        except UnknownModel as error:
            raise BadRequest(str(error), "model", 404) from error
        except AdapterError as error:
            raise BadRequest(f"{name} does not load: {error}", "model", 503) from error

    def _or_candidate(self, name: str) -> str:
        """`candidate` for the canary's share of the requests for the champion."""
        aliases = self.catalogue.aliases
        if name != CHAMPION or CANDIDATE not in aliases or CHAMPION not in aliases:
            return name
        differ = aliases[CANDIDATE].key != aliases[CHAMPION].key
        return CANDIDATE if differ and self._chance.random() < self.settings.canary else name

    # -- text
    async def generate(self, request: Generation) -> Answering:
        """Begin to answer; the caller closes what is returned.

        Raises:
            BadRequest: the request cannot be answered.
            Busy, Draining: not now.
        """
        chat = isinstance(request, ChatRequest)
        prompts = await asyncio.to_thread(self._encode, request)
        if len(prompts) * request.answers > self.settings.batch_rows:
            asked = f"{len(prompts)} prompts × n {request.answers}"
            raise BadRequest(f"n: {asked} is more than the {self.settings.batch_rows} answers of a batch", "n")
        served, adapter = await self.acquire(request.model)
        try:
            deadline = time.monotonic() + self.settings.timeout
            stops = self.prompts.chat_ends if chat else self.prompts.ends
            routes = await self._routed(served.key, prompts)
            if any(task for _, task in routes):
                adapter |= {"routes": [task for _, task in routes]}
            asks = []
            for prompt, (key, _) in zip(prompts, routes, strict=True):
                room = self.prompts.room(prompt, request.limit, request.usual)
                asks += [Ask(key, tuple(prompt), s, stops, deadline) for s in request.sampling(room)]
            read = sum(map(len, prompts))
            logprobs = request.top is not None
            writer = Writer(chat, request.model, adapter, self.tokenizer, logprobs, read)
            return Answering(self, served, writer, asks)
        except BaseException:
            self.catalogue.release(served)
            raise

    async def _routed(self, key: str, prompts: list[list[int]]) -> list[tuple[str, str | None]]:
        if not self.model.has_bank(key):
            return [(key, None)] * len(prompts)
        return await asyncio.wrap_future(self.engine.call(lambda: self.model.routed(key, prompts)))

    def _encode(self, request: Generation) -> list[list[int]]:
        if isinstance(request, ChatRequest):
            return [self.prompts.of_chat([message.plain() for message in request.messages])]
        assert isinstance(request, CompletionRequest)
        return [self.prompts.of_text(prompt) for prompt in request.prompts]

    # -- tasks
    async def predict(self, request: PredictRequest) -> tuple[dict[str, Any], list[dict]]:
        """Predictions of one of the adapter's tasks, by the code of `curlora predict`; (`adapter`, one per row).

        Raises:
            BadRequest: no such model or task, or rows that the task cannot read.
            Busy, Draining: not now.
            TimeoutError: it took longer than `serve.timeout`.
        """
        served, adapter = await self.acquire(request.model)
        try:
            trained = served.loaded.trained
            if trained is None:
                raise BadRequest(f"{request.model} has no tasks; ask champion or <run>/<step>", "model")
            return adapter, await self._scored(served.key, trained, request)
        except ConfigError as error:
            problem = error.problems[0]
            where = f"{problem.field}: " if problem.field.startswith("row") else ""
            raise BadRequest(f"{where}{problem.message}", "rows" if where else "task") from error
        finally:
            self.catalogue.release(served)

    async def _scored(self, key: str, trained: Trained, request: PredictRequest) -> list[dict]:
        def answer() -> list[dict]:
            with self.model.alone(key) as model:
                return replace(trained, model=model).answer(request.task, request.rows)

        if self._draining:
            raise Draining("the server is ending; try again in a moment")
        if self._scoring >= max(self.settings.queue, 1):
            raise Busy(f"{self._scoring} requests are waiting, which is all that may; try again later")
        self._scoring += 1
        try:
            return await asyncio.wait_for(asyncio.wrap_future(self.engine.call(answer)), self.settings.timeout)
        finally:
            self._scoring -= 1

    # -- state
    def models(self) -> list[dict[str, Any]]:
        """Names that requests can use now, and the adapters behind them."""
        aliases = dict(self.catalogue.aliases)
        named = {"base": {"name": "base", "version": None, "fingerprint": None}}
        named |= {alias: served.facts() for alias, served in sorted(aliases.items())}
        if self.run and (results := self.run.results()):
            steps = [Step(self.run.uri, step.directory, step.fingerprint) for step in results.steps if step.is_done]
            named |= {step.label: Served(Loaded("", None), step).facts() for step in steps}
        named |= {name: served.facts() for name, served in self.catalogue.steps().items()}
        about = {"object": "model", "created": 0, "owned_by": "curlora"}
        return [{"id": name, **about, "adapter": adapter} for name, adapter in named.items()]

    def readiness(self) -> tuple[bool, dict[str, Any]]:
        """(whether requests are answered, what serves and what does not)."""
        failures = dict(self.watcher.failures) if self.watcher else {}
        aliases = dict(self.catalogue.aliases)
        lost = CHAMPION in failures and CHAMPION not in aliases
        ready = self.engine.is_alive and not self._draining and not lost
        state = "draining" if self._draining else "ready" if ready else "not ready"
        return ready, {
            "status": state,
            "serving": {alias: served.facts() for alias, served in sorted(aliases.items())},
            "failing": {a: {"version": f.version, "reason": f.reason} for a, f in sorted(failures.items())},
            "registry": self.watcher.unreachable if self.watcher else None,
        }

    def measured(self) -> bytes:
        """All metrics, with the gauges brought up to date."""
        gauges, watcher = self.metrics, self.watcher
        gauges.running.set(self.engine.running)
        gauges.waiting.set(self.engine.waiting)
        gauges.adapters.set(self.catalogue.count)
        for alias, served in dict(self.catalogue.aliases).items():
            gauges.version.labels(alias).set(served.step.version.version)
        if watcher:
            gauges.unreachable.set(watcher.unreachable is not None)
            for alias in (CHAMPION, CANDIDATE):
                failure = watcher.failures.get(alias)
                gauges.failing.labels(alias).set(failure.version if failure else 0)
        return gauges.text()

    def drain(self, seconds: float) -> bool:
        """Take no more requests and wait for the running ones; whether all of them were answered."""
        self._draining = True
        return self.engine.drain(seconds)

    def close(self) -> None:
        self._draining = True
        if self.watcher:
            self.watcher.close()
        self.engine.close()

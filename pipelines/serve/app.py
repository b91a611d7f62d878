"""The HTTP routes: OpenAI's, one for tasks, health, readiness and metrics."""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from pipelines.serve import schema
from pipelines.serve.contract import Busy, Draining, NotFinite, Piece, TooLate
from pipelines.serve.metrics import asked_label
from pipelines.serve.responses import Choice, error_body
from pipelines.serve.schema import BadRequest
from pipelines.serve.service import Answering, Service
from pipelines.serve.target import token_digest

log = logging.getLogger(__name__)
HEADER = "X-Curlora-Adapter"
STATUS = {Busy: 429, Draining: 503, TooLate: 504, TimeoutError: 504, NotFinite: 500}
Kind = TypeVar("Kind", bound=schema.Request)


def make_app(service: Service) -> FastAPI:
    """The routes of one service."""
    app = FastAPI(title="curlora", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    guarded = [Depends(_check_token)]
    app.get("/health")(_health)
    app.get("/ready")(_ready)
    app.get("/metrics", dependencies=guarded)(_metrics)
    app.get("/v1/models", dependencies=guarded)(_models)
    app.post("/v1/chat/completions", dependencies=guarded)(_chat)
    app.post("/v1/completions", dependencies=guarded)(_completions)
    app.post("/v1/predict", dependencies=guarded)(_predict)
    app.exception_handler(BadRequest)(_refused)
    app.exception_handler(HTTPException)(_http_error)
    return app


def _service(request: Request) -> Service:
    return request.app.state.service


async def _check_token(request: Request) -> None:
    expected = _service(request).token
    if expected is None:
        return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not hmac.compare_digest(token_digest(given.strip()), expected):
        raise BadRequest("the bearer token is missing or wrong; send Authorization: Bearer TOKEN", status=401)


# -- errors
async def _refused(request: Request, error: BadRequest) -> JSONResponse:
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
    return JSONResponse(error_body(str(error), error.status, error.field), error.status, headers)


async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    """Unknown paths and wrong methods."""
    message = f"{request.method} {request.url.path}: {str(error.detail).lower()}"
    return JSONResponse(error_body(message, error.status_code), error.status_code, error.headers)


def _as_refusal(error: Exception) -> BadRequest:
    """Any error of a request as status and one line."""
    if isinstance(error, BadRequest):
        return error
    status = next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)
    if status == 500 and not isinstance(error, NotFinite):
        log.error("a request failed", exc_info=error)
    if isinstance(error, TimeoutError):
        return BadRequest("the answer was not complete in time; ask for less or raise serve.timeout", status=504)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return BadRequest(lines[0][:300], status=status)


# -- state
async def _health(request: Request) -> JSONResponse:
    alive = _service(request).engine.is_alive
    return JSONResponse({"status": "ok" if alive else "the engine has ended"}, 200 if alive else 503)


async def _ready(request: Request) -> JSONResponse:
    ready, facts = _service(request).readiness()
    return JSONResponse(facts, 200 if ready else 503)


async def _metrics(request: Request) -> Response:
    return Response(_service(request).measured(), media_type="text/plain; version=0.0.4")


def _models(request: Request) -> JSONResponse:
    return JSONResponse({"object": "list", "data": _service(request).models()})


# -- answers
async def _body(request: Request, kind: type[Kind]) -> Kind:
    """The parsed request; of one that is too large, no more is read than shows it."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > schema.MOST_BYTES:
            break
    return schema.parse(bytes(body), kind)


async def _counted(
    request: Request, kind: type[Kind], answer: Callable[[Service, Kind, _Count], Awaitable[Response]]
) -> Response:
    """Parse, answer, and count the request with its status."""
    service, count = _service(request), _Count(_service(request), request.url.path)
    try:
        parsed = await _body(request, kind)
        count.asked = asked_label(parsed.model)
        return await answer(service, parsed, count)
    except Exception as error:  # nothing that a client sends ends the server
        refusal = _as_refusal(error)
        count.end(refusal.status)
        headers = {"Retry-After": "1"} if refusal.status in (429, 503) else None
        return JSONResponse(error_body(str(refusal), refusal.status, refusal.field), refusal.status, headers)


class _Count:
    """The metrics of one request."""

    def __init__(self, service: Service, route: str):
        self.metrics, self.route, self.begun = service.metrics, route, time.monotonic()
        self.asked, self.adapter, self.first = "unknown", "", False

    def piece(self) -> None:
        if not self.first:
            self.first = True
            self.metrics.first_token.labels(self.asked).observe(time.monotonic() - self.begun)

    def end(self, status: int, read: int = 0, written: int = 0) -> None:
        self.metrics.requests.labels(self.route, str(status), self.asked, self.adapter).inc()
        self.metrics.latency.labels(self.route, self.asked).observe(time.monotonic() - self.begun)
        for kind, tokens in (("prompt", read), ("completion", written)):
            if tokens:
                self.metrics.tokens.labels(kind, self.adapter).inc(tokens)


async def _predict(request: Request) -> Response:
    async def answer(service: Service, parsed: schema.PredictRequest, count: _Count) -> Response:
        adapter, found = await service.predict(parsed)
        count.adapter = adapter["name"]
        count.end(200)
        body = {"object": "predictions", "model": parsed.model, "task": parsed.task, "adapter": adapter}
        return JSONResponse(body | {"predictions": found}, headers={HEADER: adapter["name"]})

    return await _counted(request, schema.PredictRequest, answer)


async def _chat(request: Request) -> Response:
    return await _counted(request, schema.ChatRequest, _generate)


async def _completions(request: Request) -> Response:
    return await _counted(request, schema.CompletionRequest, _generate)


async def _generate(service: Service, parsed: schema.Generation, count: _Count) -> Response:
    answering = await service.generate(parsed)
    count.adapter = answering.writer.head["adapter"]["name"]
    headers = {HEADER: count.adapter}
    pieces = answering.pieces()
    try:
        first = await anext(pieces)  # before the status is sent
        count.piece()
        if parsed.stream:
            usage = bool(parsed.stream_options and parsed.stream_options.include_usage)
            body = _stream(answering, first, pieces, usage, count)
            return _Streamed(answering, body, headers)
        choices = [Choice() for _ in range(answering.count)]
        choices[first[0]].add(first[1])
        async for index, piece in pieces:
            choices[index].add(piece)
    except BaseException:
        answering.close()
        raise
    answering.close()
    writer = answering.writer
    count.end(200, writer.prompt_tokens, sum(choice.tokens for choice in choices))
    return JSONResponse(writer.whole(choices), headers=headers)


class _Streamed(StreamingResponse):
    """Lets go of the adapter also if its client is gone before the first event."""

    def __init__(self, answering: Answering, body: AsyncIterator[str], headers: dict[str, str]):
        super().__init__(body, media_type="text/event-stream", headers=headers)
        self.answering = answering

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answering.close()


async def _stream(
    answering: Answering, first: tuple[int, Piece], pieces: AsyncIterator, usage: bool, count: _Count
) -> AsyncIterator[str]:
    """Server-sent events; an error after the first one is an event as well."""
    writer, written, status = answering.writer, [0] * answering.count, 499  # a client that goes away
    try:
        for index in range(answering.count if writer.chat else 0):
            yield _event(writer.opening(index))
        with contextlib.suppress(StopAsyncIteration):
            index, piece = first
            while True:
                written[index] = piece.tokens
                if piece.text or piece.finish or piece.scores:
                    yield _event(writer.chunk(index, piece))
                index, piece = await anext(pieces)
        if usage:
            yield _event(writer.last(sum(written)))
        status = 200
    except Exception as error:  # the status is sent already
        refusal = _as_refusal(error)
        status = refusal.status
        yield _event(error_body(str(refusal), status, refusal.field))
    finally:
        answering.close()
        count.end(status, writer.prompt_tokens, sum(written))
    yield "data: [DONE]\n\n"


def _event(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

"""Requests as OpenAI's API defines them, validated; every mistake becomes one line and an HTTP status.

What changes the answer and is not implemented is refused rather than ignored; what does not change it is accepted.
"""

from __future__ import annotations

import json
import secrets
from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pipelines.errors import did_you_mean, printable
from pipelines.serve.contract import Sampling

MOST_BYTES = 16 << 20
MOST_ANSWERS, MOST_STOPS, MOST_PROMPTS, MOST_ROWS = 16, 16, 64, 1024
IGNORED = ("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key")
NEUTRAL = {  # parameters that are not implemented, with the values that ask for nothing
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "logit_bias": ({}, None),
    "tools": ([], None),
    "tool_choice": ("none", "auto", None),
    "functions": ([], None),
    "response_format": ({"type": "text"}, None),
    "best_of": (1, None),
    "echo": (False, None),
    "suffix": ("", None),
    "modalities": (["text"], None),
    "parallel_tool_calls": (True, False, None),
}


class BadRequest(ValueError):
    """A request that cannot be answered.

    Attributes:
        status: HTTP status.
        field: the parameter that is wrong; None if it is the whole request.
    """

    def __init__(self, message: str, field: str | None = None, status: int = 400):
        super().__init__(printable(message))
        self.field, self.status = field, status


def _no_surrogates(value: Any) -> Any:
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("contains a lone surrogate, which is no character; correct the text")
    return value


Text = Annotated[str, BeforeValidator(_no_surrogates)]
Stop = Annotated[Text, Field(min_length=1, max_length=256)]


class Request(BaseModel):
    """What all routes share."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)
    model: Annotated[Text, Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _known(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        for name, values in NEUTRAL.items():
            if name in raw and raw[name] not in values:
                raise ValueError(f"{name} is not supported by this server; leave it out")
        dropped = {*IGNORED, *NEUTRAL}
        kept = {name: value for name, value in raw.items() if name not in dropped}
        for name in kept:
            if name not in cls.model_fields:
                known = did_you_mean(name, cls.model_fields)
                raise ValueError(f"there is no parameter '{printable(name[:60])}', {known}")
        return kept


class StreamOptions(BaseModel):
    """`include_usage`: one more chunk at the end, with the numbers of tokens."""

    model_config = ConfigDict(extra="ignore", strict=True)
    include_usage: bool = False


class Generation(Request):
    """What the two routes for text share."""

    usual: ClassVar[int | None] = None  # tokens of an answer to a request that names no limit; None: the server's most
    max_tokens: int | None = Field(None, gt=0, le=2**31)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MOST_ANSWERS)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self):
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream: true; leave it out")
        return self

    @property
    def answers(self) -> int:
        return self.n or 1

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    @abstractmethod
    def top(self) -> int | None:
        """Alternatives per token; None: no log-probabilities."""

    def sampling(self, max_tokens: int) -> list[Sampling]:
        """One per answer to a prompt; seeds follow each other, so that the answers differ."""
        first = secrets.randbits(62) if self.seed is None else self.seed
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        temperature = 1.0 if self.temperature is None else self.temperature
        top_p = 1.0 if self.top_p is None else self.top_p
        seeds = [(first + number) % 2**63 for number in range(self.answers)]
        return [Sampling(max_tokens, temperature, top_p, seed, stop, self.top) for seed in seeds]


class TextPart(BaseModel):
    """A part of a message that is text; other parts (images, audio) cannot be read."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    name: Text | None = None
    tool_call_id: Text | None = None
    refusal: None = None

    def plain(self) -> dict[str, str]:
        """The message as chat templates read it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Generation):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: int | None = Field(None, gt=0, le=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _top_needs_logprobs(self):
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


Token = Annotated[int, Field(ge=0, lt=2**31)]


class CompletionRequest(Generation):
    """`POST /v1/completions`: one or several prompts, as text or as token ids."""

    usual: ClassVar[int | None] = 16  # as OpenAI has it
    prompt: (
        Text
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def top(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else list(self.prompt)


class PredictRequest(Request):
    """`POST /v1/predict`: rows of one of the adapter's tasks, as for `curlora predict --file`."""

    task: Annotated[Text, Field(min_length=1)]
    rows: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MOST_ROWS)]


Kind = TypeVar("Kind", bound=Request)


def parse(body: bytes, kind: type[Kind]) -> Kind:
    """A validated request.

    Raises:
        BadRequest: what is wrong with it, in one line.
    """
    if len(body) > MOST_BYTES:
        raise BadRequest(f"the request has {len(body):,} bytes, at most {MOST_BYTES:,} are read", status=413)
    try:
        raw = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else _first_line(error)
        raise BadRequest(f"the request is not valid JSON: {reason}") from error
    if not isinstance(raw, dict):
        raise BadRequest(f"the request is {type(raw).__name__}, expected a JSON object")
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise _problem(error) from error
    except RecursionError as error:
        raise BadRequest("the request is nested too deeply") from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _problem(error: ValidationError) -> BadRequest:
    """The first problem; of a union, that of the alternative which came furthest."""
    found = max(error.errors(include_url=False, include_input=False), key=lambda item: len(item["loc"]))
    first = error.errors(include_url=False, include_input=False)[0]
    found = found if found["loc"][:1] == first["loc"][:1] else first
    # pydantic names the alternatives of a union in the path; only fields and positions help a client
    path = [str(part) for part in found["loc"] if isinstance(part, int) or str(part).isidentifier()]
    names = [part for part in path if part not in ("str", "int", "list", "lax", "function")]
    message = found["msg"].removeprefix("Value error, ")
    if not names:
        return BadRequest(message)
    return BadRequest(f"{'.'.join(names)}: {message[0].lower()}{message[1:]}", names[0])

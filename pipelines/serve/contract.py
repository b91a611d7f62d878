"""What passes between the HTTP routes and the engine: a request for text, pieces of the answer, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_tokens: longest answer in tokens.
        temperature: below `GREEDY`, the most likely token is taken.
        top_p: share of the probability mass that is sampled from.
        seed: the same seed gives the same answer, whatever else is in the batch.
        stop: texts that end the answer; they are not part of it.
        top_logprobs: alternatives reported per token; None: no log-probabilities.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


GREEDY = 1e-3


@dataclass(frozen=True)
class Ask:
    """A prompt to be continued.

    Attributes:
        adapter: name under which the shared model holds the adapter.
        prompt: token ids, at least one.
        stops: token ids that end the answer.
        deadline: `time.monotonic()` after which the answer is given up.
    """

    adapter: str
    prompt: tuple[int, ...]
    sampling: Sampling
    stops: frozenset[int] = frozenset()
    deadline: float = float("inf")


@dataclass(frozen=True)
class TokenScore:
    """Log-probability of a token of the answer, and of the most likely alternatives, as the model gives them (before
    temperature and top_p)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """A part of an answer; the last one says why it is finished.

    Attributes:
        scores: those of the tokens since the previous piece, if they were asked for.
        tokens: number of tokens generated so far.
    """

    text: str
    tokens: int
    scores: tuple[TokenScore, ...] = field(default=())
    finish: Finish | None = None


Listener = Callable[[Piece | Exception], None]
"""Called on the engine's thread with every piece of an answer, or with the error that ends it."""


class Busy(RuntimeError):
    """As many requests wait as the queue holds."""


class Draining(RuntimeError):
    """The server ends and takes no new requests."""


class TooLate(RuntimeError):
    """The answer was not complete at its deadline."""


class NotFinite(RuntimeError):
    """The model's logits are NaN or infinite."""


class AdapterError(RuntimeError):
    """An adapter cannot be loaded; the message says why, in one line."""

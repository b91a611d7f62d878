"""One answer while it is generated."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from pipelines.serve.contract import Ask, Finish, Listener, Piece, TokenScore, TooLate
from pipelines.serve.text import TextStream


@dataclass(eq=False)
class Row:
    """A request, waiting or in the batch.

    Attributes:
        tokens: number of tokens generated.
        done: whether its listener has got the last piece or an error.
    """

    ask: Ask
    listener: Listener
    text: TextStream
    generator: torch.Generator
    tokens: int = 0
    done: bool = False
    cancelled: bool = False
    scores: list[TokenScore] = field(default_factory=list)

    @classmethod
    def of(cls, ask: Ask, listener: Listener, tokenizer: Any) -> Row:
        generator = torch.Generator().manual_seed(ask.sampling.seed)
        return cls(ask, listener, TextStream(tokenizer, ask.sampling.stop), generator)

    @property
    def length(self) -> int:
        """Tokens of prompt and longest answer."""
        return len(self.ask.prompt) + self.ask.sampling.max_tokens

    def take(self, token: int, score: TokenScore | None) -> None:
        """Append a generated token and pass on the text that has become certain."""
        if token in self.ask.stops:
            self._end("", "stop")
            return
        self.tokens += 1
        if score is not None:
            self.scores.append(score)
        text = self.text.push(token)
        if self.text.stopped:
            self._end(text, "stop")
        elif self.tokens == self.ask.sampling.max_tokens:
            self._end(text, "length")
        elif text:
            self._tell(Piece(text, self.tokens, self._scores()))

    def _end(self, text: str, finish: Finish) -> None:
        text += self.text.finish()
        finish = "stop" if self.text.stopped else finish  # the text that was held back may complete a stop string
        self.done = True
        self._tell(Piece(text, self.tokens, self._scores(), finish))

    def fail(self, error: Exception) -> None:
        if not self.done:
            self.done = True
            self._tell(error)

    def settle(self) -> bool:
        """Whether the row leaves the batch: finished, given up by its client, or late."""
        if not self.done and not self.cancelled and time.monotonic() > self.ask.deadline:
            self.fail(TooLate("the answer was not complete in time; ask for fewer tokens or raise serve.timeout"))
        return self.done or self.cancelled

    def _scores(self) -> tuple[TokenScore, ...]:
        scores, self.scores = tuple(self.scores), []
        return scores

    def _tell(self, what: Piece | Exception) -> None:
        if not self.cancelled:
            self.listener(what)

"""Tokens to text while they are generated: complete characters only, and no part of a stop string."""

from __future__ import annotations

from typing import Any

HELD_TOKENS = 4
"""Tokens that an incomplete character can have: the bytes of a character in UTF-8. More are no character at all."""
BROKEN = "\ufffd"


class TextStream:
    """The text of one answer. What `push` and `finish` return, joined, is the whole answer.

    Attributes:
        stopped: whether a stop string has been found; then the text ends before it.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop, self.stopped = tokenizer, stop, False
        self._ids: list[int] = []
        self._context = self._read = 0  # tokens from _context to _read are text already; they space what follows
        self._held = ""

    def push(self, token: int) -> str:
        """Text that is certain after one more token; often empty."""
        self._ids.append(token)
        text = self._new_text()
        if text.endswith(BROKEN) and len(self._ids) - self._read < HELD_TOKENS:
            return ""
        return self._take(text)

    def finish(self) -> str:
        """The text that was held back."""
        rest = "" if self.stopped else self._take(self._new_text())
        if not self.stopped:
            rest, self._held = rest + self._held, ""
        return rest

    def _new_text(self) -> str:
        known = self._decode(self._ids[self._context : self._read])
        return self._decode(self._ids[self._context :])[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _take(self, text: str) -> str:
        self._context, self._read = self._read, len(self._ids)
        self._held += text
        found = [at for stop in self.stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped, text, self._held = True, self._held[: min(found)], ""
            return text
        kept = len(self._held) - self._possible_stop()
        text, self._held = self._held[:kept], self._held[kept:]
        return text

    def _possible_stop(self) -> int:
        """Length of the longest end of the text with which a stop string may begin."""
        longest = max((len(stop) for stop in self.stop), default=1) - 1
        lengths = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self._held[-n:]) for stop in self.stop)), 0)

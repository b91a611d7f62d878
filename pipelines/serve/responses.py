"""Responses as OpenAI's API defines them, and in each of them the adapter that answered."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.serve.contract import Finish, Piece, TokenScore
from pipelines.serve.text import BROKEN


@dataclass
class Choice:
    """One answer, as far as it is known."""

    text: str = ""
    scores: list[TokenScore] = field(default_factory=list)
    finish: Finish | None = None
    tokens: int = 0

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.scores += piece.scores
        self.finish, self.tokens = piece.finish, piece.tokens


class Writer:
    """Writes the response to one request.

    Args:
        chat: for `/v1/chat/completions`; else for `/v1/completions`.
        adapter: which adapter answers.
        prompt_tokens: of all prompts together.
    """

    def __init__(
        self, chat: bool, model: str, adapter: dict[str, Any], tokenizer: Any, logprobs: bool, prompt_tokens: int
    ):
        self.chat, self.tokenizer, self.logprobs, self.prompt_tokens = chat, tokenizer, logprobs, prompt_tokens
        self.offsets: dict[int, int] = {}
        self.head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": adapter["fingerprint"],
            "adapter": adapter,
        }

    def whole(self, choices: Sequence[Choice]) -> dict:
        """The response of a request that is not streamed."""
        written = []
        for index, choice in enumerate(choices):
            scores = self._logprobs(index, choice.text, choice.scores)
            body = {"index": index, "logprobs": scores, "finish_reason": choice.finish}
            if self.chat:
                body["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
            else:
                body["text"] = choice.text
            written.append(body)
        usage = self.usage(sum(choice.tokens for choice in choices))
        return {**self.head, "object": self._object(""), "choices": written, "usage": usage}

    def chunk(self, index: int, piece: Piece) -> dict:
        """A part of a streamed response."""
        scores = self._logprobs(index, piece.text, piece.scores) if piece.scores else None
        body = {"index": index, "logprobs": scores, "finish_reason": piece.finish}
        body |= {"delta": {"content": piece.text} if piece.text else {}} if self.chat else {"text": piece.text}
        return {**self.head, "object": self._object(".chunk"), "choices": [body]}

    def opening(self, index: int) -> dict:
        """The first chunk of a chat's answer, which names the role."""
        delta = {"role": "assistant", "content": ""}
        body = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return {**self.head, "object": self._object(".chunk"), "choices": [body]}

    def last(self, tokens: int) -> dict:
        """The chunk with the usage."""
        return {**self.head, "object": self._object(".chunk"), "choices": [], "usage": self.usage(tokens)}

    def usage(self, tokens: int) -> dict[str, int]:
        total = self.prompt_tokens + tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": tokens, "total_tokens": total}

    def _object(self, suffix: str) -> str:
        return f"chat.completion{suffix}" if self.chat else "text_completion"

    # -- log-probabilities
    def _logprobs(self, index: int, text: str, scores: Sequence[TokenScore]) -> dict | None:
        if not self.logprobs:
            return None
        if self.chat:
            content = []
            for score in scores:
                top = [self._token(*pair) for pair in score.top]
                content.append(self._token(score.token, score.logprob) | {"top_logprobs": top})
            return {"content": content, "refusal": None}
        names = [self._text(score.token) for score in scores]
        offset, offsets = self.offsets.get(index, 0), []
        for name in names:
            offsets.append(offset)
            offset += len(name)
        self.offsets[index] = offset
        top = [{self._text(token): value for token, value in score.top} for score in scores]
        values = [score.logprob for score in scores]
        return {"tokens": names, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}

    def _token(self, token: int, logprob: float) -> dict:
        text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        known = None if BROKEN in text else list(text.encode())  # half a character has no text of its own
        return {"token": self._text(token), "logprob": logprob, "bytes": known}

    def _text(self, token: int) -> str:
        """The token's text; of half a character the tokenizer's own name for it, which no other token has."""
        text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return self.tokenizer.convert_ids_to_tokens(token) if BROKEN in text else text


def error_body(message: str, status: int, field: str | None = None) -> dict:
    """An error as OpenAI's clients read it."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": field, "code": None}}

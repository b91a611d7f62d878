"""Requests to token ids: chats by the tokenizer's template, prompts as `curlora predict` encodes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.data.encoding import Encoder
from pipelines.data.kinds import kind_of
from pipelines.data.kinds.chat_template import ChatError, template_of
from pipelines.data.samples import free_text
from pipelines.serve.schema import BadRequest


class Prompts:
    """Encodes for one tokenizer and checks that prompt and answer fit.

    Attributes:
        context: tokens that the model can take in.
        longest: tokens that an answer may have.
        ends: tokens that end an answer to a plain prompt; `chat_ends` those of a chat.
    """

    def __init__(self, tokenizer: Any, context: int, longest: int, vocabulary: int, ends: Sequence[int] = ()):
        self.tokenizer, self.context, self.longest, self.vocabulary = tokenizer, context, longest, vocabulary
        self.encoder = Encoder(tokenizer, context)
        self.ends = frozenset(ends) | self._ends(chat=False)
        self.chat_ends = self.ends | (self._ends(chat=True) if tokenizer.chat_template else frozenset())

    def _ends(self, chat: bool) -> frozenset[int]:
        task = free_text(1, chat)
        return frozenset(kind_of(task).settings(task, self.encoder)["stops"])

    def of_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a chat, up to where the answer begins.

        Raises:
            BadRequest: the tokenizer has no chat template, or the template refuses the messages.
        """
        if not self.tokenizer.chat_template:
            raise BadRequest("the base's tokenizer has no chat template; use /v1/completions", "messages")
        try:
            text = template_of(self.encoder).render(messages, ask=True)
        except ChatError as error:
            reason = str(error).rpartition("; ")[0]  # the remedy is for rows of data
            raise BadRequest(f"messages: {reason}", "messages") from error
        return self.encoder.bare([text])[0]

    def of_text(self, prompt: str | list[int]) -> list[int]:
        """Token ids of a prompt; ids are taken as they are.

        Raises:
            BadRequest: an id that is not in the vocabulary, or no token at all.
        """
        if isinstance(prompt, str):
            ids = self.encoder.prompts([prompt])[0]
        else:
            ids = list(prompt)
            if (largest := max(ids)) >= self.vocabulary:
                raise BadRequest(f"prompt: token {largest} is not in the vocabulary of {self.vocabulary:,}", "prompt")
        if not ids:
            raise BadRequest("prompt: is empty, so there is nothing to continue", "prompt")
        return ids

    def room(self, prompt: Sequence[int], limit: int | None, usual: int | None = None) -> int:
        """Tokens that the answer may have.

        Args:
            usual: without a limit, at most this many; None: as many as the server writes.

        Raises:
            BadRequest: prompt and answer do not fit.
        """
        left = self.context - len(prompt)
        if left < 1:
            raise BadRequest(
                f"the prompt has {len(prompt):,} tokens, which leaves no room in the model's context of "
                f"{self.context:,}; shorten it"
            )
        if limit is None:
            return min(left, self.longest, usual or self.longest)
        if limit > self.longest:
            raise BadRequest(f"max_tokens: is {limit:,}, this server writes at most {self.longest:,}", "max_tokens")
        if limit > left:
            raise BadRequest(
                f"max_tokens: is {limit:,}, but a prompt of {len(prompt):,} tokens leaves {left:,} in the model's "
                f"context of {self.context:,}",
                "max_tokens",
            )
        return limit

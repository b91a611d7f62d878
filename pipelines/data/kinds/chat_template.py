"""What a tokenizer's chat template makes of a chat, and which of its tokens are learned.

An answer is an assistant's message with what ends its turn, as the template writes it. Where the template marks what
the assistant says by `{% generation %}`, these marks say which tokens are learned. Elsewhere an answer is what follows
the prompt for it: the chat up to the answer is rendered with and without it, and both texts must be beginnings of the
whole chat.

The template writes the special tokens itself; none are added.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pipelines.data.encoding import Encoder
from pipelines.data.kinds.chats import Message, answers_in, asked_of
from pipelines.errors import DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "qxz"})

Tools = list[dict] | None


class ChatError(DataError):
    """A template refuses a chat, or what it renders has no answer that can be told from the rest."""

    def __init__(self, message: str):
        super().__init__([Problem("", message)])


@dataclass(frozen=True)
class Tokens:
    """A part of a sequence: token ids, and for each whether it is learned."""

    ids: list[int]
    learned: list[bool]


@lru_cache(maxsize=8)
def template_of(encoder: Encoder) -> ChatTemplate:
    """The chat template of an encoder's tokenizer, examined once."""
    return ChatTemplate(encoder)


class ChatTemplate:
    """A tokenizer's chat template.

    Attributes:
        marks: whether it marks what the assistant says.
        ends: the tokens with which it ends an assistant's turn; empty if it ends it by text alone. Then the
            tokenizer's end token is added to the last answer, so that a trained model stops.
    """

    def __init__(self, encoder: Encoder):
        self.encoder, self.tokenizer = encoder, encoder.tokenizer
        template = self.tokenizer.chat_template
        self.marks = bool(MARKS.search(template if isinstance(template, str) else json.dumps(template or "")))
        self.ends = self._turn_ends()

    def _turn_ends(self) -> tuple[int, ...]:
        try:
            whole = self.render(PROBE)
        except ChatError:
            return (self.encoder.end,)
        said = PROBE[-1]["content"]
        ids = self.encoder.bare([whole[whole.rfind(said) + len(said) :]])[0]
        ends = set(self.tokenizer.all_special_ids).intersection(ids)
        # some tokenizers have the end of a turn among their added tokens, but do not call it special
        return tuple(sorted(ends.union([t for t in ids if t in self.tokenizer.added_tokens_decoder][:1])))

    def render(self, chat: Sequence[Message], tools: Tools = None, ask: bool = False, **options) -> Any:
        """The chat as text; `ask`: with the beginning of the assistant's next message.

        Raises:
            ChatError: the template refuses the chat.
        """
        import jinja2  # comes with what Transformers needs to render templates

        options = {"tools": tools, "add_generation_prompt": ask, "tokenize": False} | options
        try:
            return self.tokenizer.apply_chat_template(list(chat), **options)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ChatError(f"the chat template refuses this chat ({reason}); {self._remedy(chat, tools)}") from error

    def _remedy(self, chat: Sequence[Message], tools: Tools) -> str:
        if len(chat) > 1 and chat[0]["role"] == "system":
            try:
                self.render(chat[1:], tools)
            except ChatError:
                pass
            else:
                return "set fold_system: true, which puts the system message before the first user's"
        return "correct the row, drop it, or use a base whose template takes it"

    def prompt(self, chat: Sequence[Message], tools: Tools) -> str:
        """What the model sees before it writes the last answer."""
        return self.render(asked_of(chat), tools, ask=True)

    # -- what is learned

    def encode(self, chats: Sequence[tuple[list[Message], Tools]], learn: str) -> Iterator[tuple[Tokens, Tokens]]:
        """(all that precedes the last answer, the last answer with its end) of each chat.

        Raises:
            ChatError: `problems` names it before any work starts.
        """
        if self.marks:
            yield from (self._by_marks(chat, tools, learn) for chat, tools in chats)
            return
        texts = [self.parts(chat, tools, learn) for chat, tools in chats]
        ids = iter(self.encoder.bare([text for parts in texts for text in parts]))
        for parts in texts:
            tokens = [next(ids) for _ in parts]
            learned = [[position % 2 == 1] * len(found) for position, found in enumerate(tokens)]
            yield Tokens(_joined(tokens[:-1]), _joined(learned[:-1])), self._ended(tokens[-1], learned[-1])

    def _ended(self, ids: list[int], learned: list[bool]) -> Tokens:
        return Tokens(ids, learned) if self.ends else Tokens([*ids, self.encoder.end], [*learned, True])

    def parts(self, chat: Sequence[Message], tools: Tools, learn: str) -> list[str]:
        """The chat's text in parts: context, answer, context, answer, …; the last part is the last answer.

        Raises:
            ChatError: the template refuses the chat, or writes its beginning differently once more follows.
        """
        positions, parts, done = answers_in(chat, learn), [], 0
        whole = self.render(chat, tools)
        for position in positions:
            last = position == positions[-1]
            begin = self.render(chat[:position], tools, ask=True)
            until = whole if last else self.render(chat[: position + 1], tools)
            if not (whole.startswith(begin) and whole.startswith(until) and done <= len(begin) < len(until)):
                raise ChatError(_disagreement(position, last))
            parts += [whole[done : len(begin)], whole[len(begin) : len(until)]]
            done = len(until)
        return parts

    def _by_marks(self, chat: Sequence[Message], tools: Tools, learn: str) -> tuple[Tokens, Tokens]:
        """By the template's marks. The end of a turn is learned also where the template leaves it out of them."""
        ids, marked = self._marked(chat, tools)
        spans, wanted = _spans(marked), answers_in(chat, learn)
        before, earlier = self._count(chat[: wanted[0]], tools), self._count(chat[:-1], tools)
        if len(spans) <= earlier:
            raise ChatError("the chat template marks no answer of this chat by {% generation %}; drop the row")
        learned = [False] * len(ids)
        for begin, end in spans[before:]:
            end += end < len(ids) and ids[end] in self.ends
            learned[begin:end] = [True] * (end - begin)
        first = spans[earlier][0]
        return Tokens(ids[:first], learned[:first]), self._ended(ids[first:], learned[first:])

    def _marked(self, chat: Sequence[Message], tools: Tools) -> tuple[list[int], list[int]]:
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        found = self.render(chat, tools, tokenizer_kwargs={"verbose": False}, **options)
        return list(found["input_ids"]), list(found["assistant_masks"])

    def _count(self, chat: Sequence[Message], tools: Tools) -> int:
        """Number of marked spans of a chat's beginning."""
        said = any(message["role"] == "assistant" for message in chat)
        return len(_spans(self._marked(chat, tools)[1])) if said else 0

    # -- problems

    def problems(self, chat: Sequence[Message], tools: Tools, learn: str | None) -> Iterator[str]:
        """Why what the template makes of a chat cannot be learned (`learn`) or asked (None)."""
        try:
            prompt = self.prompt(chat, tools)
            said = None if learn is None else self._said(chat, tools, learn)
        except ChatError as error:
            yield str(error)
            return
        system = chat[0]["content"].strip() if chat[0]["role"] == "system" else ""
        if system not in prompt:
            yield "the chat template leaves out the system message; set fold_system: true, or drop the message"
        if not all(tool["function"]["name"] in prompt for tool in tools or ()):
            yield "the chat template does not show the tools; use another base, or write them into a message"
        called = [c for i in answers_in(chat, learn or "last") for c in chat[i].get("tool_calls", ())]
        if said is not None and not all(call["function"]["name"] in said for call in called):
            yield "the chat template leaves out tool_calls; use another base, or write them into content"

    def _said(self, chat: Sequence[Message], tools: Tools, learn: str) -> str:
        """What is learned, as text."""
        if not self.marks:
            return "".join(self.parts(chat, tools, learn)[1::2])
        prompt, answer = self._by_marks(chat, tools, learn)
        pairs = zip([*prompt.ids, *answer.ids], [*prompt.learned, *answer.learned], strict=True)
        return self.tokenizer.decode([token for token, learned in pairs if learned])


def _disagreement(position: int, last: bool) -> str:
    marked = "use a base whose template marks answers by {% generation %}"
    what, when, remedy = (
        ("what precedes the answer", "once the answer is there", f"{marked}, or prompt and completion without a chat")
        if last
        else (f"message {position + 1}, an answer,", "once others follow", f"set learn: last, or {marked}")
    )
    return f"the chat template writes {what} differently {when}, so which tokens to learn is unknown; {remedy}"


def _spans(marked: Sequence[int]) -> list[tuple[int, int]]:
    """(begin, end) of each run of marked tokens."""
    spans, at = [], 0
    for value, run in itertools.groupby(marked):
        length = len(list(run))
        spans += [(at, at + length)] if value else []
        at += length
    return spans


def _joined(parts: Sequence[list]) -> list:
    return list(itertools.chain.from_iterable(parts))


def template_identity(tokenizer: PreTrainedTokenizerBase | None) -> dict:
    """What of a template changes the tokens that are learned of a chat; empty where the plain rule holds."""
    if tokenizer is None or not tokenizer.chat_template:
        return {}
    template = ChatTemplate(Encoder(tokenizer, 8))
    marked = {"answers": "marked"} if template.marks else {}
    return marked | ({} if template.ends else {"turn_end": "added"})

"""Text in, token ids out: the tokenizer's own rules, truncation that keeps the answer, windows over long text.

No torch here. Everything that is scored or trained on is an `Encoded` sequence; kinds (pipelines/kinds) make them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100

PROBE = "a"  # any text: shows which tokens a tokenizer puts around it


@dataclass(frozen=True)
class Encoded:
    """One token sequence.

    Attributes:
        example: number of the row it belongs to (a row may have one sequence a choice, or several windows).
        input_ids: (length,) tokens.
        start: position of the first token that counts: the prompt before it is only context.
        choice: class, label or choice index, else -1.
        breaks: positions > 0 where another document begins; no token sees across one.
    """

    example: int
    input_ids: np.ndarray
    start: int = 0
    choice: int = -1
    breaks: tuple[int, ...] = ()


class Encoder:
    """A tokenizer with the rules of this system.

    Args:
        max_length: tokens of the longest sequence.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.end = end_token(tokenizer)
        bare, whole = self.bare([PROBE])[0], list(tokenizer(PROBE)["input_ids"])
        at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        self.prefix = tuple(whole[:at])  # a bos, say; what is put at the end (an eos) does not belong before an answer

    def bare(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids without special tokens. verbose=False: a long text is no mistake here, it is cut afterwards."""
        if not texts:
            return []
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids by the tokenizer's own rules for bos and eos, uncut."""
        return self.tokenizer(list(texts), verbose=False)["input_ids"] if texts else []

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Like `documents`, cut to `max_length` on the tokenizer's truncation side; never empty."""
        encoded = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        return [ids or [self.end] for ids in encoded]

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of what an answer follows: with the tokenizer's bos, without its eos, uncut."""
        return [[*self.prefix, *ids] for ids in self.bare(texts)]

    def cut(self, prompt: Sequence[int], room: int) -> list[int]:
        """A prompt in at most `room` tokens (at least one): its end stays, with the question; so does its bos."""
        if len(prompt) > room:
            kept = max(0, room - len(self.prefix))
            prompt = [*self.prefix[:room], *(prompt[len(prompt) - kept :] if kept else ())]
        return list(prompt) or [self.end]

    def answers(self, prompt: str, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of texts as they follow a prompt: a space between, unless the prompt ends with one."""
        space = "" if prompt[-1:].isspace() else " "
        return [tuple(ids) for ids in self.bare([space + text for text in texts])]


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands after a document and for an empty text: eos, else bos or pad, else 0."""
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        if token is not None:
            return token
    return 0


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identity of everything that decides about token ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        saved = (backend.truncation, backend.padding)
        backend.no_truncation()  # left behind by the last call; no part of the tokenizer's identity
        backend.no_padding()
        core = backend.to_str()
        if saved[0]:
            backend.enable_truncation(**saved[0])
        if saved[1]:
            backend.enable_padding(**saved[1])
    else:
        core = sorted(tokenizer.get_vocab().items())
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    sides = [type(tokenizer).__name__, tokenizer.truncation_side, tokenizer.chat_template]
    canonical = json.dumps([core, special, sides], sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def fill(template: str, row: dict) -> str:
    """A `"… {field} …"` template with a row's values in it."""
    return template.format(**row)


def token_stream(batches: Iterable[Sequence[str]], encoder: Encoder, end: bool) -> Iterator[list[int]]:
    """The tokens of document after document; `end` puts an end token after each."""
    ending = [encoder.end] if end else []
    for texts in batches:
        for ids in encoder.documents(texts):
            yield [*ids, *ending]


def windows(parts: Iterable[Sequence[int]], window: int, stride: int, example: int | None = None) -> Iterator[Encoded]:
    """Overlapping windows over a stream of tokens that score every token but the first exactly once.

    Every window but the first sees `window − stride` tokens of context before the first token it scores, and at least
    one: a model says nothing of a token that nothing precedes. Only a window's worth of the stream is held at a time.

    Args:
        parts: the stream, in pieces of any length.
        example: the example that all windows belong to; None: each is an example of its own, counted from 0.
    """
    stride = min(stride, window - 1)
    held = np.empty(0, dtype=np.int32)
    begin = number = 0  # position of the first held token; windows so far
    scored = 1  # nothing comes before the first token
    for part in itertools.chain(_blocks(parts, window), [None]):
        held = held if part is None else np.concatenate([held, part])
        while scored < begin + len(held):
            wanted = window if scored == 1 else scored + stride
            if part is not None and begin + len(held) < wanted:
                break
            stop = min(begin + len(held), wanted)
            first = max(0, stop - window)
            yield Encoded(number if example is None else example, held[first - begin : stop - begin], scored - first)
            scored, number = stop, number + 1
        kept = max(begin, scored - window)
        held, begin = held[kept - begin :], kept


def _blocks(parts: Iterable[Sequence[int]], size: int) -> Iterator[np.ndarray]:
    """The same tokens in pieces of at least `size`: few arrays are cheaper than many."""
    gathered: list[int] = []
    for part in parts:
        gathered.extend(part)
        if len(gathered) >= size:
            yield np.asarray(gathered, dtype=np.int32)
            gathered = []
    yield np.asarray(gathered, dtype=np.int32)


def pack(documents: Iterable[Sequence[int]], length: int) -> Iterator[tuple[list[int], tuple[int, ...]]]:
    """(token ids, breaks) of full blocks of `length` tokens out of documents one after another; the last is shorter.

    A break is a position > 0 in the block where a document begins. Documents longer than what is left of a block go
    on in the next one.
    """
    block: list[int] = []
    breaks: list[int] = []
    for document in documents:
        if block:
            breaks.append(len(block))
        block.extend(document)
        while len(block) >= length:
            yield block[:length], tuple(b for b in breaks if b < length)
            block, breaks = block[length:], [b - length for b in breaks if b > length]
    if len(block) > 1:
        yield block, tuple(breaks)

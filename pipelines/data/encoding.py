"""Converts text to token ids: tokenization, truncation that keeps the answer, windows over long text.

Everything that is trained on or scored is an `Encoded` sequence, made by the kinds of task (pipelines/data/kinds).
Without torch, so that a driver can validate data.
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

IGNORE = -100  # target without loss, as in PyTorch
PROBE = "a"  # any text: shows which special tokens the tokenizer adds


@dataclass(frozen=True)
class Encoded:
    """One token sequence.

    Attributes:
        example: number of its row; a row may have several sequences (one per choice, or windows).
        input_ids: (length,) tokens.
        start: position of the first token with a loss; the prompt before it is context.
        choice: index of the class or choice, else -1.
        breaks: positions > 0 at which another document begins; attention does not cross them.
        gaps: begin and end of each run of tokens after `start` without a loss, one after the other.
        cut: tokens that `max_length` left out.
    """

    example: int
    input_ids: np.ndarray
    start: int = 0
    choice: int = -1
    breaks: tuple[int, ...] = ()
    gaps: tuple[int, ...] = ()
    cut: int = 0


class Encoder:
    """A tokenizer with the conventions of this system.

    Args:
        max_length: length of the longest sequence, in tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.end = end_token(tokenizer)
        bare, whole = self.bare([PROBE])[0], list(tokenizer(PROBE)["input_ids"])
        at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        self.prefix = tuple(whole[:at])  # e.g. bos; a suffix such as eos does not belong before an answer

    def bare(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids without special tokens. verbose=False: no warning about long text, which is cut later."""
        if not texts:
            return []
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids with the tokenizer's own bos and eos, not truncated."""
        return self.tokenizer(list(texts), verbose=False)["input_ids"] if texts else []

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Like `documents`, truncated to `max_length` on the tokenizer's truncation side; never empty."""
        encoded = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        return [ids or [self.end] for ids in encoded]

    def lost(self, texts: Sequence[str], encoded: Sequence[Sequence[int]]) -> list[int]:
        """Tokens that `texts` has left out of each text."""
        full = [number for number, ids in enumerate(encoded) if len(ids) >= self.max_length]
        whole = dict(zip(full, self.documents([texts[number] for number in full]), strict=True))
        return [max(0, len(whole.get(number, ids)) - len(ids)) for number, ids in enumerate(encoded)]

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts: with the tokenizer's bos, once, without its eos, not truncated."""
        return [ids if self._begun(ids) else [*self.prefix, *ids] for ids in self.bare(texts)]

    def _begun(self, ids: Sequence[int]) -> bool:
        return tuple(ids[: len(self.prefix)]) == self.prefix

    def cut(self, prompt: Sequence[int], room: int) -> list[int]:
        """Truncate a prompt to `room` tokens (at least one), keeping bos and the end, which holds the question."""
        if len(prompt) > room:
            kept = max(0, room - len(self.prefix))
            prompt = [*self.prefix[:room], *(prompt[len(prompt) - kept :] if kept else ())]
        return list(prompt) or [self.end]

    def answers(self, prompt: str, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of texts that follow a prompt, after a space unless the prompt ends with one."""
        space = "" if prompt[-1:].isspace() else " "
        return [tuple(ids) for ids in self.bare([space + text for text in texts])]


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token after a document, which also stands for an empty text: eos, else bos or pad, else 0."""
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        if token is not None:
            return token
    return 0


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of everything that affects token ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        saved = (backend.truncation, backend.padding)
        backend.no_truncation()  # state of the last call, not part of the tokenizer's identity
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
    """Fill a template such as `"Q: {question}"` from a row."""
    return template.format(**row)


def token_stream(batches: Iterable[Sequence[str]], encoder: Encoder, end: bool) -> Iterator[list[int]]:
    """Token ids of one document after another; with `end`, an end token follows each."""
    ending = [encoder.end] if end else []
    for texts in batches:
        for ids in encoder.documents(texts):
            yield [*ids, *ending]


def windows(parts: Iterable[Sequence[int]], window: int, stride: int, example: int | None = None) -> Iterator[Encoded]:
    """Overlapping windows over a token stream that score every token but the first exactly once.

    Every window but the first has `window − stride` tokens of context before the first token it scores, and at least
    one, since a model needs a preceding token. Memory: one window of the stream.

    Args:
        parts: the stream, in pieces of any length.
        example: example number of all windows; None: each window is an example, counted from 0.
    """
    stride = min(stride, window - 1)
    held = np.empty(0, dtype=np.int32)
    begin = number = 0  # position of the first token held; number of windows so far
    scored = 1  # the first token has no context
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
    """The same tokens in pieces of at least `size`, since few large arrays are cheaper than many small ones."""
    gathered: list[int] = []
    for part in parts:
        gathered.extend(part)
        if len(gathered) >= size:
            yield np.asarray(gathered, dtype=np.int32)
            gathered = []
    yield np.asarray(gathered, dtype=np.int32)


def pack(documents: Iterable[Sequence[int]], length: int) -> Iterator[tuple[list[int], tuple[int, ...]]]:
    """(token ids, breaks) of full blocks of `length` tokens from consecutive documents; the last block is shorter.

    A break is a position > 0 in the block at which a document begins. A document that does not fit into a block
    continues in the next one.
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

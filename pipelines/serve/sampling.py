"""Next tokens from logits: greedy, or sampled per row with the row's own generator, and their log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipelines.serve.contract import GREEDY, Sampling, TokenScore

LOWEST = -9999.0  # in place of -inf, which JSON lacks; as OpenAI writes it


def usable(logits: Tensor) -> list[bool]:
    """Whether each row of logits (batch, vocabulary) has a distribution: no NaN, and a largest value that is finite.

    Single logits of -inf are tokens that the model excludes.
    """
    return torch.isfinite(logits.amax(-1)).tolist()


def choose(logits: Tensor, rows: Sequence[tuple[Sampling, torch.Generator]]) -> list[int]:
    """A token per row of logits (batch, vocabulary).

    Generators live on the CPU, so that a seed gives the same answer on every device.
    """
    tokens = logits.argmax(-1).tolist()
    for number, (sampling, generator) in enumerate(rows):
        if sampling.temperature >= GREEDY:
            tokens[number] = sample(logits[number].float().cpu(), sampling, generator)
    return tokens


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token of the nucleus (arXiv 1904.09751): the most likely tokens whose probabilities sum to at least top_p.

    Args:
        logits: (vocabulary,) fp32 on the CPU.
    """
    probabilities = (logits / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, places = probabilities.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= sampling.top_p] = 0  # the first token always stays
        probabilities = torch.zeros_like(probabilities).scatter_(0, places, ordered)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def token_scores(logits: Tensor, tokens: Sequence[int], asked: Sequence[int | None]) -> list[TokenScore | None]:
    """Log-probabilities of the chosen tokens.

    Args:
        asked: number of alternatives per row; None for rows that want no log-probabilities.
    """
    found: list[TokenScore | None] = [None] * len(tokens)
    for number, count in enumerate(asked):
        if count is not None:
            values = logits[number].float().log_softmax(-1)
            top = values.topk(count)
            pairs = tuple(
                (token, max(value, LOWEST))
                for token, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            )
            found[number] = TokenScore(tokens[number], max(float(values[tokens[number]]), LOWEST), pairs)
    return found

"""The key-value cache of a batch whose rows come and go between two tokens.

Rows are padded on the left, so that all of them end at the same position and one more column fits all; the mask hides
the padding. Only caches that consist of plain keys and values can be joined. Sliding windows let rows leave but not
join; a recurrent state tolerates no padding, so such a model answers one row at a time.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class Batching(enum.Enum):
    """What the cache of a model permits."""

    CONTINUOUS = "rows join and leave at any token"
    WAVES = "rows begin together and leave at any token"
    SINGLE = "one row at a time"


def batching_of(cache: Any) -> Batching:
    """How rows can be batched, by a cache that has seen a token."""
    kinds = {type(layer) for layer in getattr(cache, "layers", [None])}
    if kinds == {DynamicLayer}:
        return Batching.CONTINUOUS
    return Batching.WAVES if kinds <= {DynamicLayer, DynamicSlidingWindowLayer} else Batching.SINGLE


@dataclass
class State:
    """What a batch has seen.

    Attributes:
        cache: keys and values per layer, (batch, heads, length, size).
        mask: (batch, length), 1 for real tokens.
        positions: (batch, 1), position of each row's next token.
        tokens: (batch, 1), each row's last token, which the model has not seen yet.
    """

    cache: Any
    mask: Tensor
    positions: Tensor
    tokens: Tensor


def keep(state: State, rows: Sequence[int], batching: Batching) -> State:
    """Only these rows, without columns that none of them uses."""
    index = torch.tensor(list(rows), device=state.mask.device)
    state.cache.batch_select_indices(index)
    mask = state.mask[index]
    if batching is Batching.CONTINUOUS:
        first = int(mask.any(0).int().argmax())
        if first:
            mask = mask[:, first:]
            for layer in state.cache.layers:
                layer.keys, layer.values = layer.keys[..., first:, :], layer.values[..., first:, :]
    return State(state.cache, mask, state.positions[index], state.tokens[index])


def join(first: State, second: State) -> State:
    """The rows of both, in this order; `first` and `second` are used up."""
    length = max(first.mask.shape[1], second.mask.shape[1])
    for mine, other in zip(first.cache.layers, second.cache.layers, strict=True):
        mine.keys = torch.cat([_widened(mine.keys, length), _widened(other.keys, length)])
        mine.values = torch.cat([_widened(mine.values, length), _widened(other.values, length)])
    masks = [torch.nn.functional.pad(mask, (length - mask.shape[1], 0)) for mask in (first.mask, second.mask)]
    positions, tokens = (torch.cat([getattr(s, n) for s in (first, second)]) for n in ("positions", "tokens"))
    return State(first.cache, torch.cat(masks), positions, tokens)


def _widened(values: Tensor, length: int) -> Tensor:
    """(batch, heads, length, size), with zeros on the left."""
    return torch.nn.functional.pad(values, (0, 0, length - values.shape[-2], 0))

"""Pads sequences of unequal length, and picks the hidden states of their last tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch


class Padded(NamedTuple):
    """A batch as tensors (batch, length): token ids, mask (1 for real tokens) and positions."""

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor


def pad(sequences: Sequence[Sequence[int]], device: torch.device, side: Literal["left", "right"] = "right") -> Padded:
    """Pad token ids with 0, whether or not the tokenizer has a pad token: the mask hides them."""
    length = max(map(len, sequences))
    ids = np.zeros((len(sequences), length), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        real = slice(0, len(sequence)) if side == "right" else slice(length - len(sequence), length)
        ids[row, real] = sequence
        mask[row, real] = 1
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    return Padded(*(torch.from_numpy(array).to(device) for array in (ids, mask, positions)))


def last_token_features(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(batch, hidden) state of the last real token of each sequence, padded on either side."""
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]

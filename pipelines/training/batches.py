"""Global batches, identical on every rank, and the tensors of one rank's share.

A share is padded, or *packed*: its examples lie end to end in few rows of similar length, with positions that restart
at each, so that none sees another. The examples of a batch, and so the loss, are the same either way.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from curlora.continual import Example
from pipelines.data.encoding import IGNORE
from pipelines.distributed.world import World
from pipelines.models.padding import pad

ATTENTION_LENGTH = 4096  # tokens per row at which attention costs about as much as everything else
GROUPED_BATCHES = 50  # batches whose examples are sorted by length together, as many as in Transformers


@dataclass(frozen=True)
class MicroBatch:
    """One rank's share of a global micro-batch; `replayed` counts over the whole, so it is the same on every rank.

    Attributes:
        input_ids, attention_mask, labels: (batch, length); labels are `IGNORE` where nothing is predicted.
        position_ids: (batch, length) where documents or examples are packed, else None.
        places: (examples, longest) where each token of packed examples is in the flattened `input_ids`, -1 behind an
            example's end; None: example by example, one per row.
        examples: the examples of the share.
        scale: weight of each example's loss in the mean over the global micro-batch.
        replayed: replayed examples in the global micro-batch.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor | None
    places: torch.Tensor | None
    examples: list[Example]
    scale: float
    replayed: int

    def to(self, device: torch.device) -> MicroBatch:
        """A copy with its tensors on `device`."""
        names = ("input_ids", "attention_mask", "labels", "position_ids", "places")
        found = {name: getattr(self, name) for name in names}
        return replace(self, **{name: tensor.to(device) for name, tensor in found.items() if tensor is not None})


class GlobalBatches:
    """An endless stream of micro-batches: every rank follows the same global order and takes its share of each.

    Args:
        examples: the training set.
        batch_size: examples per micro-batch over all ranks; the last one of an epoch may be smaller.
        transform: the strategy's `batch` hook, applied to the global micro-batch.
        position: micro-batches already consumed (a resumed step continues with the next one).
        packing: tokens per row that the examples of a share are packed into; 0: one example per row.
        grouped: batches of examples of similar length.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        seed: int,
        world: World,
        transform: Callable,
        position: int = 0,
        packing: int = 0,
        grouped: bool = False,
    ):
        self.dataset = examples
        self.batch_size = batch_size
        self.seed = seed
        self.world = world
        self.transform = transform
        self.position = position
        self.packing = packing
        self.grouped = grouped

    @property
    def per_epoch(self) -> int:
        return math.ceil(len(self.dataset) / self.batch_size)

    def __iter__(self) -> Iterator[MicroBatch]:
        while True:
            epoch, index = divmod(self.position, self.per_epoch)
            order = self._order(epoch)
            for start in range(index * self.batch_size, len(order), self.batch_size):
                batch = self.transform([self.dataset[i] for i in order[start : start + self.batch_size]])
                self.position += 1
                yield collate(batch, self.world, self.packing)

    def _order(self, epoch: int) -> np.ndarray:
        """Numbers of the examples in the order of an epoch, the same on every rank and after every interruption."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.dataset))
        if not self.grouped:
            return order
        size = GROUPED_BATCHES * self.batch_size
        chunks = [order[start : start + size] for start in range(0, len(order), size)]
        order = np.concatenate([chunk[np.argsort(self._lengths[chunk], kind="stable")] for chunk in chunks])
        whole = len(order) // self.batch_size * self.batch_size  # a smaller batch stays the last one
        batches = order[:whole].reshape(-1, self.batch_size)
        return np.concatenate([batches[rng.permutation(len(batches))].ravel(), order[whole:]])

    @cached_property
    def _lengths(self) -> np.ndarray:
        """Tokens of each example."""
        known = getattr(self.dataset, "lengths", None)
        return np.array([len(example.input_ids) for example in self.dataset]) if known is None else known


def collate(batch: list[Example], world: World, packing: int = 0) -> MicroBatch:
    """This rank's share of a global micro-batch as tensors.

    A rank without an example (fewer examples than ranks) runs the first one with weight 0: under ZeRO every rank must
    take part in every pass.

    Args:
        packing: tokens per row that examples are packed into; 0: one example per row.
    """
    part = batch[world.rank :: world.size]
    weight = 1.0 if part else 0.0
    part = part or batch[:1]
    numbers = {"scale": weight / len(batch), "replayed": sum(example.replayed for example in batch)}
    rows = rows_of([len(example.input_ids) for example in part], packing) if packing else []
    tensors = _packed(part, rows) if 0 < len(rows) < len(part) else _padded(part)
    return MicroBatch(**tensors, examples=part, **numbers)


def _padded(part: list[Example]) -> dict[str, torch.Tensor | None]:
    """One example per row."""
    ids, mask, positions = pad([example.input_ids for example in part], torch.device("cpu"))
    packed = any(example.breaks for example in part)
    for row, example in enumerate(part):
        for position in example.breaks:
            positions[row, position:] = torch.arange(positions.shape[1] - position)
    labels = torch.full_like(ids, IGNORE)
    for row, example in enumerate(part):
        if example.labels is not None:
            labels[row, : len(example.labels)] = torch.tensor(example.labels)
    positions = positions if packed else None
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "position_ids": positions, "places": None}


def rows_of(lengths: Sequence[int], at_most: int) -> list[list[int]]:
    """Numbers of the examples in each row, with the least cost of all numbers of rows that were tried.

    Every example, longest first, goes into the row that is shortest so far (Graham's LPT rule).

    Args:
        at_most: tokens per row, if a single example is not longer.
    """
    longest, total = max(lengths), sum(lengths)
    at_most = max(at_most, longest)
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    best, least = [[number] for number in order], _cost(len(lengths), longest)
    for count in range(-(-total // at_most), len(lengths)):
        if _cost(count, longest) >= least:
            break
        rows = _spread(lengths, order, count)
        width = max(sum(lengths[number] for number in row) for row in rows)
        if width <= at_most and _cost(count, width) < least:
            best, least = rows, _cost(count, width)
    return best


def _spread(lengths: Sequence[int], order: Sequence[int], count: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, row) for row in range(count)]
    for number in order:
        load, row = loads[0]
        rows[row].append(number)
        heapq.heapreplace(loads, (load + lengths[number], row))
    return rows


def _cost(rows: int, width: int) -> float:
    """Of a pass, in tokens: masks of packed rows are dense, so attention grows with the square of the width."""
    return rows * width * (1 + width / ATTENTION_LENGTH)


def _packed(part: list[Example], rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Several examples per row. The first token of each has no target: it does not follow from the previous one."""
    longest = max(len(example.input_ids) for example in part)
    width = max(sum(len(part[number].input_ids) for number in numbers) for numbers in rows)
    ids, mask, positions = (np.zeros((len(rows), width), dtype=np.int64) for _ in range(3))
    labels = np.full_like(ids, IGNORE)
    places = np.full((len(part), longest), -1, dtype=np.int64)
    for row, numbers in enumerate(rows):
        at = 0
        for number in numbers:
            example, count = part[number], len(part[number].input_ids)
            span = slice(at, at + count)
            ids[row, span], mask[row, span] = example.input_ids, 1
            starts = (0, *example.breaks, count)
            positions[row, span] = np.concatenate([np.arange(b - a) for a, b in itertools.pairwise(starts)])
            if example.labels is not None:
                labels[row, at + 1 : at + count] = example.labels[1:]
            places[number, :count] = row * width + np.arange(at, at + count)
            at += count
        positions[row, at:] = np.arange(width - at)
    tensors = {"input_ids": ids, "attention_mask": mask, "labels": labels, "position_ids": positions, "places": places}
    return {name: torch.from_numpy(array) for name, array in tensors.items()}

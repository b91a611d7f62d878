"""Global batches, identical on every rank, and the tensors of one rank's share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from curlora.continual import Example
from pipelines.data.encoding import IGNORE
from pipelines.distributed.world import World
from pipelines.models.padding import pad


@dataclass(frozen=True)
class MicroBatch:
    """One rank's share of a global micro-batch; `replayed` counts over the whole, so it is the same on every rank.

    Attributes:
        input_ids, attention_mask, labels: (batch, length); labels are `IGNORE` where nothing is predicted.
        position_ids: (batch, length) where documents are packed, else None.
        examples: the examples behind the rows.
        scale: weight of each row's loss in the mean over the global micro-batch.
        replayed: replayed examples in the global micro-batch.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor | None
    examples: list[Example]
    scale: float
    replayed: int

    def to(self, device: torch.device) -> MicroBatch:
        """A copy with its tensors on `device`."""
        packed = self.position_ids is not None
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            labels=self.labels.to(device),
            position_ids=self.position_ids.to(device) if packed else None,
        )


class GlobalBatches:
    """An endless stream of micro-batches: every rank follows the same global order and takes its share of each.

    Args:
        examples: the training set.
        batch_size: examples per micro-batch over all ranks; the last one of an epoch may be smaller.
        transform: the strategy's `batch` hook, applied to the global micro-batch.
        position: micro-batches already consumed (a resumed step continues with the next one).
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        seed: int,
        world: World,
        transform: Callable,
        position: int = 0,
    ):
        self.dataset = examples
        self.batch_size = batch_size
        self.seed = seed
        self.world = world
        self.transform = transform
        self.position = position

    @property
    def per_epoch(self) -> int:
        return math.ceil(len(self.dataset) / self.batch_size)

    def __iter__(self) -> Iterator[MicroBatch]:
        while True:
            epoch, index = divmod(self.position, self.per_epoch)
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
            for start in range(index * self.batch_size, len(order), self.batch_size):
                batch = self.transform([self.dataset[i] for i in order[start : start + self.batch_size]])
                self.position += 1
                yield collate(batch, self.world)


def collate(batch: list[Example], world: World) -> MicroBatch:
    """This rank's share of a global micro-batch as tensors.

    A rank without an example (fewer examples than ranks) runs the first one with weight 0: under ZeRO every rank must
    take part in every pass.
    """
    part = batch[world.rank :: world.size]
    weight = 1.0 if part else 0.0
    part = part or batch[:1]
    ids, mask, positions = pad([example.input_ids for example in part], torch.device("cpu"))
    packed = any(example.breaks for example in part)
    for row, example in enumerate(part):
        for position in example.breaks:
            positions[row, position:] = torch.arange(positions.shape[1] - position)
    labels = torch.full_like(ids, IGNORE)
    for row, example in enumerate(part):
        if example.labels is not None:
            labels[row, : len(example.labels)] = torch.tensor(example.labels)
    return MicroBatch(
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        position_ids=positions if packed else None,
        examples=part,
        scale=weight / len(batch),
        replayed=sum(example.replayed for example in batch),
    )

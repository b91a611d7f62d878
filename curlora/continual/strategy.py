"""The interface of a continual-learning strategy: how training protects what was learned before.

An *adapter* is what trains, a *strategy* is how; they compose freely. A strategy is one short file that overrides
the hooks it needs, and one line in `curlora.continual.STRATEGIES`. The trainer calls the hooks in the order below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import nn


@dataclass(frozen=True)
class Example:
    """One training sequence.

    Attributes:
        task: name of the task it belongs to; the loss goes by that task's head.
        input_ids: token ids.
        labels: next-token targets aligned with `input_ids` (-100: no loss), or None for a classifier head.
        target: class index for a classifier head, else -1; -100: no loss.
        breaks: positions > 0 of packed text where another document begins; attention does not cross them.
        replayed: it comes out of a memory of earlier tasks.
    """

    task: str
    input_ids: tuple[int, ...]
    labels: tuple[int, ...] | None = None
    target: int = -1
    breaks: tuple[int, ...] = ()
    replayed: bool = False


@dataclass(frozen=True)
class TaskContext:
    """What a strategy may know of the task at hand, and the services that it may need.

    Attributes:
        position: counts from 1.
        seed: the run's.
        examples: the task's training set, the same on every rank.
        losses: (model, examples) → (batch,) loss of each example, differentiable, outside the optimizer's engine.
        write: (model, rows, length) → token sequences sampled from the model, before training, on all ranks together.
        rank, size: this process among those that train. Under ZeRO-3 all must call `losses` equally often.
        total: sum of a tensor over all ranks, on all ranks.
    """

    name: str
    position: int
    seed: int
    examples: Sequence[Example] = field(repr=False, default=())
    losses: Callable[[nn.Module, Sequence[Example]], torch.Tensor] | None = None
    write: Callable[[nn.Module, int, int], list[tuple[int, ...]]] | None = None
    rank: int = 0
    size: int = 1
    total: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor


@dataclass
class StepOutput:
    """What a forward pass gave.

    Attributes:
        loss: scalar, this rank's share of the batch mean, scaled so that the average over ranks is that mean.
        hidden_states: last layer, (batch, length, hidden).
        attention_mask: (batch, length), 1 where a token is real.
        weight: this micro-batch's share of an optimizer step. A penalty on parameters, which every rank computes
            alike, enters the loss as `weight * penalty`.
        replayed: how many examples of the global micro-batch come out of a memory.
        present: whether this rank's examples belong to the batch; False where it only keeps in step with the others.
        logits: (rows, length) → (len(rows), length, vocabulary), differentiable: what is predicted after the first
            positions of some rows that have targets from their second token on.
        held_scores: (hidden (rows, length, hidden), mask (rows, length)) → task → (rows, classes): what the held heads
            say, differentiable by the hidden states. Under ZeRO-3 all ranks call it equally often.
        ranks: how many processes share the batch. A sum over this rank's examples, times `ranks * weight / n`,
            averages over ranks to the mean over n examples.
    """

    loss: torch.Tensor
    hidden_states: torch.Tensor
    attention_mask: torch.Tensor
    weight: float = 1.0
    replayed: int = 0
    present: bool = True
    ranks: int = 1
    logits: Callable[[list[int], int], torch.Tensor] | None = None
    held_scores: Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]] | None = None


class Requires(NamedTuple):
    """The values of a configuration field that a strategy can work with, and why no others."""

    values: tuple
    reason: str


class Strategy:
    """Sequential training; subclasses override what they need.

    `model` is always the bare model (no engine, no DDP wrapper). Its trainable parameters may be partitioned by
    ZeRO-3: `curlora.continual.parameters` reads, differentiates and exchanges them in any case.

    A run may be interrupted between any two optimizer steps. What `state` returns then, put into a new object by
    `load_state` (after `before_task`), must make it go on with the same bits, on any number of ranks.

    `requirements` maps a configuration field to what this strategy can work with. `plain_at_first` says that the first
    task is trained as without any strategy, because there is nothing yet to protect. `needs_heads` says that a
    sequence without a classifier head gives it nothing to do.
    """

    name: ClassVar[str] = "sequential"
    plain_at_first: ClassVar[bool] = False
    needs_heads: ClassVar[bool] = False
    requirements: ClassVar[dict[str, Requires]] = {}

    def check(self, model: nn.Module) -> None:
        """Raise ValueError where this strategy cannot work on `model` (which may lie on the meta device)."""

    def held_heads(self) -> tuple[str, ...]:
        """Earlier tasks whose classifier heads take part as they are: for examples that `batch` adds, or in `loss`."""
        return ()

    def before_task(self, model: nn.Module, task: TaskContext) -> None:
        """Once, before the first step of a task (and again, before `load_state`, where a task is resumed)."""

    def batch(self, examples: list[Example]) -> list[Example]:
        """The *global* micro-batch, the same on every rank, before it is cut into the ranks' parts."""
        return examples

    def loss(self, model: nn.Module, examples: list[Example], output: StepOutput) -> torch.Tensor:
        """The loss to differentiate, given this rank's examples and their forward pass."""
        return output.loss

    def after_step(self, model: nn.Module, step: int) -> None:
        """After every optimizer step (`step` counts from 1)."""

    def after_task(self, model: nn.Module, task: TaskContext) -> None:
        """Once, after the last step of a task, before `evaluation_weights`."""

    def evaluation_weights(self, model: nn.Module) -> dict[str, torch.Tensor] | None:
        """Weights to publish and evaluate instead of the trained ones, by parameter name; None: the trained ones."""
        return None

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """What the next task (or a resumed one) needs: tensors for safetensors, and JSON. Not a collective call."""
        return {}, {}

    def load_state(self, tensors: dict[str, torch.Tensor], values: dict) -> None:
        """The inverse of `state`."""


def require(satisfied: bool, message: str) -> None:
    """Raise ValueError(message) unless `satisfied`: options are checked where they are taken."""
    if not satisfied:
        raise ValueError(message)

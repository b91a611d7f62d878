"""The interface of a continual-learning strategy: how training protects what was learned before.

An *adapter* is what trains, a *strategy* is how; they compose freely. A strategy is one short file that overrides
the hooks it needs, and one line in `curlora.continual.STRATEGIES`. The trainer calls the hooks in the order below.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn


@dataclass(frozen=True)
class Example:
    """One training sequence.

    Attributes:
        task: name of the task it belongs to; the loss goes by that task's head.
        input_ids: token ids.
        labels: next-token targets aligned with `input_ids` (-100: no loss), or None for a classifier head.
        target: class index for a classifier head, else -1.
        breaks: positions > 0 of packed text where another document begins; attention does not cross them.
    """

    task: str
    input_ids: tuple[int, ...]
    labels: tuple[int, ...] | None = None
    target: int = -1
    breaks: tuple[int, ...] = ()


@dataclass(frozen=True)
class TaskContext:
    """What a strategy may know of the task at hand: `position` counts from 1; `seed` is the run's."""

    name: str
    position: int
    seed: int
    examples: Any = field(repr=False, default=())


@dataclass
class StepOutput:
    """What a forward pass gave.

    Attributes:
        loss: scalar, this rank's share of the batch mean, scaled so that the average over ranks is that mean.
        hidden_states: last layer, (batch, length, hidden).
        attention_mask: (batch, length), 1 where a token is real.
    """

    loss: torch.Tensor
    hidden_states: torch.Tensor
    attention_mask: torch.Tensor


class Strategy:
    """Sequential training; subclasses override what they need.

    `requirements` maps a configuration field to the values this strategy can work with.
    """

    name: ClassVar[str] = "sequential"
    requirements: ClassVar[dict[str, tuple]] = {}

    def before_task(self, model: nn.Module, task: TaskContext) -> None:
        """Once, before the first step of a task."""

    def batch(self, examples: list[Example]) -> list[Example]:
        """The *global* micro-batch, the same on every rank, before it is cut into the ranks' parts."""
        return examples

    def loss(self, model: nn.Module, examples: list[Example], output: StepOutput) -> torch.Tensor:
        """The loss to differentiate, given this rank's examples and their forward pass."""
        return output.loss

    def after_step(self, model: nn.Module, step: int) -> None:
        """After every optimizer step (`step` counts from 1)."""

    def evaluation_weights(self, model: nn.Module) -> dict[str, torch.Tensor] | None:
        """Weights to publish and evaluate instead of the trained ones, by parameter name; None: the trained ones."""
        return None

    def after_task(self, model: nn.Module, task: TaskContext) -> None:
        """Once, after the last step of a task, before its adapter is published."""

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """What the next task (or a resumed one) needs: tensors for safetensors, and JSON."""
        return {}, {}

    def load_state(self, tensors: dict[str, torch.Tensor], values: dict) -> None:
        """The inverse of `state`."""

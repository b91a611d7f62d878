"""The interface of a continual-learning strategy: how training protects what was learned before.

An *adapter* is what trains, a *strategy* is how; the two combine freely. A strategy is one short file in
`strategies/` that declares its options and overrides the hooks it needs. The trainer calls the hooks in the order
below.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from curlora.continual.options import Option, options_of


@dataclass(frozen=True)
class Example:
    """One training sequence.

    Attributes:
        task: name of its task, whose head computes its loss.
        input_ids: token ids.
        labels: next-token targets aligned with `input_ids` (-100: no loss), or None for a classifier head.
        target: class index for a classifier head, else -1; -100: no loss.
        breaks: positions > 0 of packed text where another document begins; attention does not cross them.
        replayed: whether it was drawn from a memory of earlier tasks.
    """

    task: str
    input_ids: tuple[int, ...]
    labels: tuple[int, ...] | None = None
    target: int = -1
    breaks: tuple[int, ...] = ()
    replayed: bool = False


@dataclass(frozen=True)
class TaskContext:
    """The current task, and the services that a strategy may call.

    Attributes:
        position: of the task in the sequence, from 1.
        seed: seed of the run.
        examples: the training set, the same on every rank.
        steps: optimizer steps of the task; 0: unknown.
        losses: (model, examples) → (batch,) loss per example, differentiable, outside the optimizer's engine: in
            `after_task`, and in `before_task` inside `ready`.
        draw: (model, examples, seed) → the same examples with targets that the model itself has drawn; as `losses`.
        ready: model → a context in which it can run a forward and a backward pass before training; a collective call.
        write: (model, rows, length) → token sequences sampled from the model before training; a collective call.
        rank, size: this process and the number of training processes. Under ZeRO-3 all must call `losses` equally
            often.
        total: sums a tensor over all ranks and returns the sum on every rank.
    """

    name: str
    position: int
    seed: int
    examples: Sequence[Example] = field(repr=False, default=())
    steps: int = field(default=0, kw_only=True)
    losses: Callable[[nn.Module, Sequence[Example]], torch.Tensor] | None = None
    draw: Callable[[nn.Module, Sequence[Example], Sequence[int]], list[Example]] | None = None
    ready: Callable[[nn.Module], contextlib.AbstractContextManager] = contextlib.nullcontext
    write: Callable[[nn.Module, int, int], list[tuple[int, ...]]] | None = None
    rank: int = 0
    size: int = 1
    total: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor


@dataclass
class StepOutput:
    """The result of a forward pass.

    Attributes:
        loss: scalar, this rank's share of the batch mean, scaled so that the average over ranks is that mean.
        hidden_states: last layer, (batch, length, hidden).
        attention_mask: (batch, length), 1 for real tokens, 0 for padding.
        weight: this micro-batch's share of an optimizer step. A penalty on parameters, identical on every rank, enters
            the loss as `weight * penalty`.
        replayed: number of replayed examples in the global micro-batch.
        present: whether this rank's examples belong to the batch; False if it only keeps in step with the others.
        logits: (rows, length) → (len(rows), length, vocabulary), differentiable: predictions after the first `length`
            positions of the given rows, which must have targets from their second token on.
        held_scores: (hidden (rows, length, hidden), mask (rows, length)) → task → (rows, classes): scores of the held
            heads, differentiable with respect to the hidden states. Under ZeRO-3 all ranks call it equally often.
        ranks: number of processes that share the batch. A sum over this rank's examples times `ranks * weight / n`
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
    """The values of a configuration field that a strategy works with, and why it accepts no others."""

    values: tuple
    reason: str


class Strategy:
    """Base class; a subclass that overrides no hook is sequential training.

    `model` is always the bare model (no engine, no DDP wrapper). ZeRO-3 may have partitioned its trainable parameters:
    `curlora.continual.parameters` reads, differentiates and swaps them in either case.

    A run may be interrupted between any two optimizer steps. A new object that receives by `load_state` (after
    `before_task`) what `state` returned must continue with bitwise identical results, on any number of ranks.

    Class attributes:
        name: name in configurations, equal to the file name.
        plain_at_first: the first task is trained as by `sequential`, because nothing needs protection yet.
        needs_heads: the strategy has no effect unless some task has a classifier head.
        requirements: configuration field → the values that the strategy works with.
        options: option name → `Option`, collected from the declarations in the class body (see `options.option`).

    Options become attributes of the object. Raises ValueError for an unknown option or an impossible value.
    """

    name: ClassVar[str] = "sequential"
    plain_at_first: bool = False
    needs_heads: ClassVar[bool] = False
    requirements: ClassVar[dict[str, Requires]] = {}
    options: ClassVar[dict[str, Option]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.options = options_of(cls)

    def __init__(self, **values: Any) -> None:
        unknown = [name for name in values if name not in self.options]
        if unknown:
            close = difflib.get_close_matches(unknown[0], self.options, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"its options: {', '.join(self.options) or 'none'}"
            raise ValueError(f"strategy '{self.name}' does not take {', '.join(unknown)}; {hint}")
        for name, option in self.options.items():
            setattr(self, name, option.checked(values.get(name)))

    def check(self, model: nn.Module) -> None:
        """Raise ValueError if this strategy cannot work on `model` (which may be on the meta device)."""

    def held_heads(self) -> tuple[str, ...]:
        """Earlier tasks whose frozen classifier heads take part: for examples that `batch` adds, or in `loss`."""
        return ()

    def before_task(self, model: nn.Module, task: TaskContext) -> None:
        """Called once before the first step of a task; again, before `load_state`, when a task resumes."""

    def batch(self, examples: list[Example]) -> list[Example]:
        """Change the *global* micro-batch, identical on every rank, before it is divided among the ranks."""
        return examples

    def loss(self, model: nn.Module, examples: list[Example], output: StepOutput) -> torch.Tensor:
        """The loss to differentiate, given this rank's examples and their forward pass."""
        return output.loss

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called after every optimizer step (`step` counts from 1)."""

    def after_task(self, model: nn.Module, task: TaskContext) -> None:
        """Called once after the last step of a task, before `evaluation_weights`."""

    def evaluation_weights(self, model: nn.Module) -> dict[str, torch.Tensor] | None:
        """Weights to publish and evaluate instead of the trained ones, by parameter name; None: the trained ones."""
        return None

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """What the next task or a resumed one needs: tensors for safetensors, and JSON. Not a collective call."""
        return {}, {}

    def load_state(self, tensors: dict[str, torch.Tensor], values: dict) -> None:
        """The inverse of `state`."""


def require(satisfied: bool, message: str) -> None:
    """Raise ValueError(message) unless `satisfied`."""
    if not satisfied:
        raise ValueError(message)

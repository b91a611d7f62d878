"""I-LoRA (arXiv 2402.18865): a fast adapter learns; a slow one, its moving average, remembers and is published.

    loss = CE(batch ∪ replayed) + consistency · MSE(h(replayed; fast), stopgrad h(replayed; slow))
    slow ← λ slow + (1 − λ) fast    after every step, λ = min(1 − 1/(steps + 1), decay)

A fixed `decay` lets decay^steps of the earlier slow copy through a task: 0.30 of 120 steps at 0.99, nearly all of it
in 10 steps, nothing in 1,000. `turnover` ties λ to the length of a task instead: λ ≤ 1 − turnover / steps of the task,
so that about exp(−turnover) of what was there before is left after any task.

h are the hidden states of the last layer without padding. The method is not tied to LoRA: over CURLoRA's U the slow
copy costs r² parameters per layer. Both copies continue into the next task; the slow one is evaluated and published.

Unlike the authors' code, this follows the paper: the slow copy moves, its target has neither gradient nor dropout, and
replayed rows never enter the memory again.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from curlora.continual.options import option
from curlora.continual.parameters import adapter_parameters, read, require_adapter, write
from curlora.continual.passes import hidden_with
from curlora.continual.state import pack, unpack
from curlora.continual.strategies.replay import Replay
from curlora.continual.strategy import Example, Requires, StepOutput, TaskContext, require


class ILora(Replay):
    """Fast and slow weights over any adapter; λ is counted over the whole chain."""

    name = "ilora"
    plain_at_first = False
    requirements: ClassVar = {
        "adapter.carry": Requires(("continue",), "its slow copy is an average over tasks of one and the same adapter")
    }

    decay: float = option(0.99, "upper limit of λ; use 0.999 for long tasks", at_least=0, below=1)
    turnover: float = option(0.0, "> 0: λ's limit is 1 − turnover / steps of the task, in place of decay", at_least=0)
    consistency: float = option(1.0, "weight of the hidden-state term; 0 saves a forward pass", at_least=0)
    share: float = option(0.5, "replayed part of a batch", at_least=0, below=1)

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.slow: dict[str, Tensor] = {}
        self.fast: dict[str, Tensor] = {}  # only between tasks, when the model holds the slow weights
        self.steps = 0
        self._limit = self.decay

    def check(self, model: nn.Module) -> None:
        require_adapter(model, "it averages an adapter over time")

    def before_task(self, model: nn.Module, task: TaskContext) -> None:
        self.check(model)
        super().before_task(model, task)
        if self.turnover:
            require(task.steps > 0, "ilora's turnover needs TaskContext.steps, the number of optimizer steps")
            self._limit = max(1 - self.turnover / task.steps, 0.0)
        parameters = adapter_parameters(model)
        if self.fast:
            write(parameters, self.fast)
            self.fast = {}
        if not self.slow:
            self.slow = read(parameters)

    def loss(self, model: nn.Module, examples: list[Example], output: StepOutput) -> Tensor:
        if not (self.consistency and output.replayed):
            return output.loss
        # A rank without a replayed row uses its first one: under ZeRO-3 all ranks must run the pass.
        rows = [i for i, example in enumerate(examples) if example.replayed and output.present]
        chosen = rows or [0]
        mask = output.attention_mask[chosen]
        target = hidden_with(model, self._on(model), [examples[i] for i in chosen], mask)
        if not rows:
            return output.loss
        mask = mask.unsqueeze(-1)
        difference = (output.hidden_states[rows].float() - target.float()).square() * mask
        errors = difference.mean(2).sum(1) / mask.sum((1, 2))
        return output.loss + self.consistency * output.weight * output.ranks / output.replayed * errors.sum()

    def _on(self, model: nn.Module) -> dict[str, Tensor]:
        """The slow weights, moved once to the device of the model."""
        device = next(iter(adapter_parameters(model).values())).device
        self.slow = {name: tensor.to(device) for name, tensor in self.slow.items()}
        return self.slow

    def after_step(self, model: nn.Module, step: int) -> None:
        self.steps += 1
        rate = min(1 - 1 / (self.steps + 1), self._limit)
        fast = read(adapter_parameters(model))
        self.slow = {name: t.mul(rate).add_(fast[name], alpha=1 - rate) for name, t in self._on(model).items()}

    def after_task(self, model: nn.Module, task: TaskContext) -> None:
        super().after_task(model, task)
        self.fast = read(adapter_parameters(model))

    def evaluation_weights(self, model: nn.Module) -> dict[str, Tensor]:
        return self.slow

    def state(self):
        tensors, values = super().state()
        return tensors | pack(slow=self.slow, fast=self.fast), values | {"steps": self.steps}

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        self.slow, self.fast = unpack(tensors, "slow"), unpack(tensors, "fast")
        self.steps = values["steps"]

"""I-LoRA (arXiv 2402.18865): a fast adapter learns, a slow one, its moving average, remembers and is what is kept.

    loss = CE(batch ∪ replayed) + consistency · MSE(h(replayed; fast), stopgrad h(replayed; slow))
    slow ← λ slow + (1 − λ) fast    after every step, λ = min(1 − 1/(steps + 1), decay)

h are the last layer's hidden states, padding left out. Nothing in it is about LoRA: over CURLoRA's U the slow copy
costs r² numbers a layer. Both copies go from task to task; the slow one is evaluated and published.

Here the slow copy moves, its target carries no gradient and no dropout, and replayed rows are never inserted again;
in the authors' code none of this holds.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from curlora.continual.parameters import adapter_parameters, read, require_adapter, write
from curlora.continual.passes import hidden_with
from curlora.continual.replay import Replay
from curlora.continual.strategy import Example, Requires, StepOutput, TaskContext, require


class ILora(Replay):
    """Fast and slow weights over any adapter.

    Args:
        decay: upper limit of λ, in [0, 1); λ grows towards it over the first steps of the chain. Long tasks: 0.999.
        consistency: weight γ of the hidden-state term; 0 saves its second forward pass.
        share, size, memory: as in `Replay`; by default a replayed row for every new one.
    """

    name = "ilora"
    plain_at_first = False
    requirements: ClassVar = {
        "adapter.carry": Requires(("continue",), "its slow copy is an average over tasks of one and the same adapter")
    }

    def __init__(
        self,
        decay: float = 0.99,
        consistency: float = 1.0,
        share: float | None = None,
        size: int | None = None,
        memory: int = 500,
    ):
        super().__init__(0.5 if share is None and size is None else share, size, memory)
        require(0 <= decay < 1, f"decay is {decay}; use a number in [0, 1), e.g. 0.99")
        require(consistency >= 0, f"consistency is {consistency}; use 0 or more, e.g. 1.0")
        self.decay, self.consistency = decay, consistency
        self.slow: dict[str, Tensor] = {}
        self.fast: dict[str, Tensor] = {}  # only between tasks, when the model holds the slow weights
        self.steps = 0

    def check(self, model: nn.Module) -> None:
        require_adapter(model, "it averages an adapter over time")

    def before_task(self, model: nn.Module, task: TaskContext) -> None:
        self.check(model)
        super().before_task(model, task)
        parameters = adapter_parameters(model)
        if self.fast:
            write(parameters, self.fast)
            self.fast = {}
        if not self.slow:
            self.slow = read(parameters)

    def loss(self, model: nn.Module, examples: list[Example], output: StepOutput) -> Tensor:
        if not (self.consistency and output.replayed):
            return output.loss
        # a rank without a replayed row goes along with its first one: under ZeRO-3 all must run the pass
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
        """The slow weights, moved once to where the model is."""
        device = next(iter(adapter_parameters(model).values())).device
        self.slow = {name: tensor.to(device) for name, tensor in self.slow.items()}
        return self.slow

    def after_step(self, model: nn.Module, step: int) -> None:
        self.steps += 1
        rate = min(1 - 1 / (self.steps + 1), self.decay)
        fast = read(adapter_parameters(model))
        self.slow = {name: t.mul(rate).add_(fast[name], alpha=1 - rate) for name, t in self._on(model).items()}

    def after_task(self, model: nn.Module, task: TaskContext) -> None:
        super().after_task(model, task)
        self.fast = read(adapter_parameters(model))

    def evaluation_weights(self, model: nn.Module) -> dict[str, Tensor]:
        return self.slow

    def state(self):
        tensors, values = super().state()
        copies = {f"slow.{k}": t for k, t in self.slow.items()} | {f"fast.{k}": t for k, t in self.fast.items()}
        return tensors | {k: t.cpu() for k, t in copies.items()}, values | {"steps": self.steps}

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        self.slow = {k.removeprefix("slow."): t for k, t in tensors.items() if k.startswith("slow.")}
        self.fast = {k.removeprefix("fast."): t for k, t in tensors.items() if k.startswith("fast.")}
        self.steps = values["steps"]

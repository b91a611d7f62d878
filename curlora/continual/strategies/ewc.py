"""Elastic weight consolidation (arXiv 1612.00796), online: stay where the losses of earlier tasks are curved.

    penalty = strength / 2 · Σ_i F_i (θ_i − θ*_i)²,    F ← decay · F + F_task after each task

θ are the trainable parameters of the adapter (not of classifier heads, each of which serves one task), θ* their values
after the last task. F_task is the diagonal of the empirical Fisher information: the mean over examples of the squared
gradient of one example's loss, estimated *after* the task, on the task's own loss without the penalty.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from curlora.continual.options import option
from curlora.continual.parameters import adapter_parameters, differentiable, read, require_adapter
from curlora.continual.state import pack, unpack
from curlora.continual.strategy import Example, Requires, StepOutput, Strategy, TaskContext


class EWC(Strategy):
    """The quadratic penalty over any adapter."""

    name = "ewc"
    plain_at_first = True
    requirements: ClassVar = {
        "adapter.carry": Requires(("continue",), "its penalty holds one and the same adapter in place")
    }

    strength: float = option(
        1000.0, "λ; squared gradients are small, so useful values are large (1e2 … 1e6)", at_least=0
    )
    examples: int = option(256, "examples per task for the Fisher information, one pass each", at_least=1)
    decay: float = option(1.0, "factor on earlier Fisher information after each task", at_least=0, at_most=1)

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.fisher: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}

    def check(self, model: nn.Module) -> None:
        require_adapter(model, "its penalty is on the parameters of an adapter")

    def before_task(self, model: nn.Module, task: TaskContext) -> None:
        self.check(model)

    def loss(self, model: nn.Module, examples: list[Example], output: StepOutput) -> Tensor:
        return output.loss + output.weight * self.penalty(model) if self.strength and self.fisher else output.loss

    def penalty(self, model: nn.Module) -> Tensor:
        """Scalar; zero if no parameter has moved since the last task."""
        total = 0.0
        for name, value in differentiable(adapter_parameters(model)).items():
            # Moved to the device once; later calls find them there.
            self.fisher[name], self.anchor[name] = (t[name].to(value.device) for t in (self.fisher, self.anchor))
            total = total + (self.fisher[name] * (value.float() - self.anchor[name]).square()).sum()
        return self.strength / 2 * total

    def after_task(self, model: nn.Module, task: TaskContext) -> None:
        if not self.strength:
            return
        new = fisher_information(model, task, self.examples)
        old = {name: self.decay * tensor for name, tensor in self.fisher.items()}
        self.fisher = {name: old[name].to(t.device) + t if name in old else t for name, t in new.items()}
        self.anchor = read(adapter_parameters(model))

    def state(self):
        return pack(fisher=self.fisher, anchor=self.anchor), {}

    def load_state(self, tensors, values) -> None:
        self.fisher, self.anchor = unpack(tensors, "fisher"), unpack(tensors, "anchor")


def fisher_information(model: nn.Module, task: TaskContext, at_most: int) -> dict[str, Tensor]:
    """Mean squared per-example gradient by parameter name, fp32, over a seeded sample of the task; a collective call.

    `torch.autograd.grad` leaves DeepSpeed's gradient reduction and `.grad` alone. Examples are divided among the ranks
    and summed in fp64, so that the number of workers changes at most the last bits of the fp32 result.
    """
    if task.losses is None:
        raise ValueError("EWC needs TaskContext.losses, a function (model, examples) → loss of each example")
    chosen = np.random.default_rng([task.seed, task.position]).permutation(len(task.examples))[:at_most]
    parameters = adapter_parameters(model)
    sums = [torch.zeros(getattr(p, "ds_shape", p.shape), dtype=torch.float64) for p in parameters.values()]
    was_training = model.training
    model.eval()  # without dropout
    for start in range(0, len(chosen), task.size):
        mine = start + task.rank
        # A rank without an example repeats one and discards the result: under ZeRO-3 all ranks must run the pass.
        example = task.examples[chosen[mine if mine < len(chosen) else start]]
        loss = task.losses(model, [example]).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        if mine < len(chosen):
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total += gradient.detach().cpu().double().square()
    model.train(was_training)
    return {name: (task.total(total) / len(chosen)).float() for name, total in zip(parameters, sums, strict=True)}

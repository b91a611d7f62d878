"""Elastic weight consolidation (arXiv 1612.00796), online: stay where earlier tasks' losses are curved.

    penalty = strength / 2 · Σ_i F_i (θ_i − θ*_i)²,    F ← decay · F + F_task after each task

θ are the adapter's trained numbers (classifier heads are not part of it: each serves its own task), θ* their values
after the last task. F_task is the diagonal of the empirical Fisher information: the mean over examples of the squared
gradient of one example's loss, estimated *after* the task, on the task's own loss without the penalty.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from curlora.continual.parameters import adapter_parameters, differentiable, read, require_adapter
from curlora.continual.strategy import Example, Requires, StepOutput, Strategy, TaskContext, require


class EWC(Strategy):
    """The quadratic penalty over any adapter.

    Args:
        strength: λ; squared gradients are small, so useful values are large (1e2 … 1e6).
        examples: of a task, on which its Fisher information is estimated, one forward and backward pass each.
        decay: what is kept of the earlier tasks' Fisher information when a task is added, in [0, 1].
    """

    name = "ewc"
    plain_at_first = True
    requirements: ClassVar = {
        "adapter.carry": Requires(("continue",), "it holds one and the same adapter where it was")
    }

    def __init__(self, strength: float = 1000.0, examples: int = 256, decay: float = 1.0):
        require(strength >= 0, f"strength is {strength}; use 0 or more, e.g. 1000")
        require(examples > 0, f"examples is {examples}; use a positive number, e.g. 256")
        require(0 <= decay <= 1, f"decay is {decay}; use a number in [0, 1], e.g. 1.0")
        self.strength, self.examples, self.decay = strength, examples, decay
        self.fisher: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}

    def check(self, model: nn.Module) -> None:
        require_adapter(model, "its penalty is on an adapter's numbers")

    def before_task(self, model: nn.Module, task: TaskContext) -> None:
        self.check(model)

    def loss(self, model: nn.Module, examples: list[Example], output: StepOutput) -> Tensor:
        return output.loss + output.weight * self.penalty(model) if self.strength and self.fisher else output.loss

    def penalty(self, model: nn.Module) -> Tensor:
        """Scalar; zero where nothing moved since the last task."""
        total = 0.0
        for name, value in differentiable(adapter_parameters(model)).items():
            # to the device once; later calls find them there
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
        named = {f"fisher.{k}": t for k, t in self.fisher.items()} | {f"anchor.{k}": t for k, t in self.anchor.items()}
        return {name: tensor.cpu() for name, tensor in named.items()}, {}

    def load_state(self, tensors, values) -> None:
        self.fisher = {k.removeprefix("fisher."): t for k, t in tensors.items() if k.startswith("fisher.")}
        self.anchor = {k.removeprefix("anchor."): t for k, t in tensors.items() if k.startswith("anchor.")}


def fisher_information(model: nn.Module, task: TaskContext, at_most: int) -> dict[str, Tensor]:
    """Mean squared per-example gradient by parameter name, fp32, over a seeded sample of the task; all ranks call it.

    Gradients are taken by `torch.autograd.grad`, which leaves DeepSpeed's reduction and `.grad` alone. Examples are
    dealt out to the ranks and summed in fp64, so the worker count shows only in the last bits of fp32, if at all.
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
        # a rank without an example repeats one and throws the result away: under ZeRO-3 all must run the pass
        example = task.examples[chosen[mine if mine < len(chosen) else start]]
        loss = task.losses(model, [example]).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        if mine < len(chosen):
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total += gradient.detach().cpu().double().square()
    model.train(was_training)
    return {name: (task.total(total) / len(chosen)).float() for name, total in zip(parameters, sums, strict=True)}

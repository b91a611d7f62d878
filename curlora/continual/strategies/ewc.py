"""Elastic weight consolidation (arXiv 1612.00796), online: stay where the losses of earlier tasks are curved.

    penalty = strength / 2 · Σ_i F_i (θ_i − θ*_i)²,    F ← decay · F + F_task after each task

θ are the trainable parameters of the adapter (not of classifier heads, each of which serves one task), θ* their values
after the last task. F_task is the diagonal of the empirical Fisher information: the mean over examples of the squared
gradient of one example's loss, estimated *after* the task, on the task's own loss without the penalty.

The published form takes an example's loss as the mean over its tokens, and F is then as many times too small as it has
tokens. `summed` counts in nats per prediction instead: F is the sum of the squared gradients of summed losses, divided
by the number of predictions, and a useful λ is about 1. `base_strength` adds the base's own language as a task 0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from curlora.continual.curvature import predictions
from curlora.continual.options import option
from curlora.continual.parameters import adapter_parameters, differentiable, read, require_adapter
from curlora.continual.state import pack, unpack
from curlora.continual.strategy import Example, Requires, StepOutput, Strategy, TaskContext, require
from curlora.names import BASE_TASK


class EWC(Strategy):
    """The quadratic penalty over any adapter."""

    name = "ewc"
    requirements: ClassVar = {
        "adapter.carry": Requires(("continue",), "its penalty holds one and the same adapter in place")
    }

    strength: float = option(
        1000.0, "λ; squared gradients are small, so useful values are large (1e2 … 1e6); about 1 if summed", at_least=0
    )
    examples: int = option(256, "examples per task for the Fisher information, one pass each", at_least=1)
    decay: float = option(1.0, "factor on earlier Fisher information after each task", at_least=0, at_most=1)
    summed: bool = option(False, "whether the Fisher information is that of summed losses, in nats per prediction")
    base_strength: float = option(0.0, "λ of text that the base has written; 0: it writes none", at_least=0)
    base_rows: int = option(128, "sequences that the base writes once, before the first task", at_least=1)
    base_length: int = option(128, "tokens per written sequence", at_least=2)

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.fisher: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        self.base_fisher: dict[str, Tensor] = {}
        self.base_anchor: dict[str, Tensor] = {}

    @property
    def plain_at_first(self) -> bool:
        return not self.base_strength

    def check(self, model: nn.Module) -> None:
        require_adapter(model, "its penalty is on the parameters of an adapter")

    def before_task(self, model: nn.Module, task: TaskContext) -> None:
        self.check(model)
        if task.position == 1 and self.base_strength:
            require(task.write is not None, "ewc needs TaskContext.write, which generates text from the base")
            rows = task.write(model, self.base_rows, self.base_length)
            written = replace(task, examples=[Example(BASE_TASK, row, row) for row in rows])
            with task.ready(model):
                self.base_fisher = fisher_information(model, written, len(rows), self.summed)
            self.base_anchor = read(adapter_parameters(model))

    def loss(self, model: nn.Module, examples: list[Example], output: StepOutput) -> Tensor:
        held = (self.strength and self.fisher) or self.base_fisher
        return output.loss + output.weight * self.penalty(model) if held else output.loss

    def penalty(self, model: nn.Module) -> Tensor:
        """Scalar; zero if no parameter has moved since the last task, nor from the base."""
        values, total = differentiable(adapter_parameters(model)), 0.0
        for strength, fisher, anchor in (
            (self.strength, self.fisher, self.anchor),
            (self.base_strength, self.base_fisher, self.base_anchor),
        ):
            own = 0.0
            for name, value in values.items() if fisher else ():
                # Moved to the device once; later calls find them there.
                fisher[name], anchor[name] = fisher[name].to(value.device), anchor[name].to(value.device)
                own = own + (fisher[name] * (value.float() - anchor[name]).square()).sum()
            total = total + strength / 2 * own
        return total

    def after_task(self, model: nn.Module, task: TaskContext) -> None:
        if not self.strength:
            return
        new = fisher_information(model, task, self.examples, self.summed)
        old = {name: self.decay * tensor for name, tensor in self.fisher.items()}
        self.fisher = {name: old[name].to(t.device) + t if name in old else t for name, t in new.items()}
        self.anchor = read(adapter_parameters(model))

    def state(self):
        base = {"base_fisher": self.base_fisher, "base_anchor": self.base_anchor} if self.base_fisher else {}
        return pack(fisher=self.fisher, anchor=self.anchor, **base), {}

    def load_state(self, tensors, values) -> None:
        self.fisher, self.anchor = unpack(tensors, "fisher"), unpack(tensors, "anchor")
        self.base_fisher, self.base_anchor = unpack(tensors, "base_fisher"), unpack(tensors, "base_anchor")


def fisher_information(model: nn.Module, task: TaskContext, at_most: int, summed: bool = False) -> dict[str, Tensor]:
    """Mean squared per-example gradient by parameter name, fp32, over a seeded sample of the task; a collective call.

    `summed`: of an example's summed loss, and the mean is over predictions instead of examples.

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
        loss = task.losses(model, [example]).sum() * (predictions(example) if summed else 1)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        if mine < len(chosen):
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total += gradient.detach().cpu().double().square()
    model.train(was_training)
    count = sum(predictions(task.examples[i]) for i in chosen) if summed else len(chosen)
    return {name: (task.total(total) / max(count, 1)).float() for name, total in zip(parameters, sums, strict=True)}

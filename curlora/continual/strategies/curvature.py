"""Curvature: stay where the losses of earlier tasks, and the base's own language, are curved. Nothing is replayed.

    penalty = ½ Σ_t λ_t Σ_layers tr(Γ_t (U − U_t) S_t (U − U_t)ᵀ)

Γ_t and S_t are the Kronecker factors of task t's Fisher information in the coordinates of U (see
`continual/curvature.py`): 2 r² numbers per layer, measured *after* the task on its own loss, with targets that the
model draws. U_t is the adapter at that time. Task 0 is the base: the same factors on text that it has written itself,
around the untrained adapter, so that the penalty approximates KL(base ‖ model) in nats per token.

K-FAC: arXiv 1503.05671; as the memory of a sequence of tasks: arXiv 1805.07810. Full-space factors have m² + n²
numbers per layer. LoRA has no such coordinates: what its A reads moves while A trains.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from curlora.continual.curvature import Factors, coherence, measure, pooled, quadratic, sites
from curlora.continual.options import option
from curlora.continual.parameters import adapter_parameters, differentiable, read
from curlora.continual.state import pack, unpack
from curlora.continual.strategies.replay import Replay
from curlora.continual.strategy import Example, Requires, StepOutput, TaskContext, require
from curlora.names import BASE_TASK


class Kept(NamedTuple):
    """What is kept of a task: Γ and S, and the adapter around which they hold, by parameter name."""

    factors: Factors
    anchor: dict[str, Tensor]


class Curvature(Replay):
    """The penalty over an adapter with frozen factors; `share` replays rows of earlier tasks on top."""

    name = "curvature"
    plain_at_first = False
    requirements: ClassVar = {
        "adapter.carry": Requires(("continue",), "its penalty holds one and the same adapter in place")
    }

    strength: float = option(2.0, "λ of an earlier task, nats of the new one per nat of the old", at_least=0)
    base_strength: float = option(1.0, "λ of text that the base has written; 0: it writes none", at_least=0)
    calibrate: bool = option(True, "whether both are nats as measured, not as the factors alone predict them")
    pool: bool = option(False, "whether all earlier tasks share one Γ and S, so that the memory stays constant")
    examples: int = option(64, "examples per task on which its curvature is measured", at_least=1)
    base_rows: int = option(128, "sequences that the base writes once, before the first task", at_least=1)
    base_length: int = option(128, "tokens per written sequence", at_least=2)
    share: float = option(0.0, "replayed part of a batch", at_least=0, below=1)
    size = None  # not an option here: rows are added by share only

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.kept: dict[str, Kept] = {}  # by task, in the order of training
        self.coherence = 1.0  # of the layers: measured over predicted change, see `curvature.coherence`
        self._stacks: list[tuple[list[str], Tensor, Tensor, Tensor]] | None = None

    def check(self, model: nn.Module) -> None:
        sites(model)

    def before_task(self, model: nn.Module, task: TaskContext) -> None:
        super().before_task(model, task)
        self.check(model)
        if task.position == 1 and self.base_strength:
            require(task.write is not None, "curvature needs TaskContext.write, which generates text from the base")
            rows = task.write(model, self.base_rows, self.base_length)
            with task.ready(model):
                written = [Example(BASE_TASK, row, row) for row in rows]
                factors = measure(model, task, written, draw=False)
                if self.calibrate:
                    self.coherence = coherence(model, task, factors, written, self._some(task))
            self._keep({BASE_TASK: Kept(factors.scaled(self.coherence), read(adapter_parameters(model)))})

    def loss(self, model: nn.Module, examples: list[Example], output: StepOutput) -> Tensor:
        return output.loss + output.weight * self.penalty(model) if self.kept else output.loss

    def penalty(self, model: nn.Module) -> Tensor:
        """Scalar, in nats; zero if the adapter is where every task has left it."""
        values = differentiable(adapter_parameters(model))
        if self._stacks is None:
            self._stacks = self._stacked(values)
        total = 0.0
        for names, outputs, inputs, anchors in self._stacks:
            moved = torch.stack([values[name].float() for name in names]) - anchors
            total = total + quadratic(moved, outputs, inputs)
        return total

    def _stacked(self, values: dict[str, Tensor]) -> list[tuple[list[str], Tensor, Tensor, Tensor]]:
        """Names, λΓ, S and anchors of all matrices of one size, each (tasks, matrices, r, r), on their device."""
        groups: dict[tuple, list[str]] = {}
        for name, value in values.items():
            groups.setdefault((value.shape, value.device), []).append(name)
        stacks = []
        for (_, device), names in groups.items():
            parts = [
                torch.stack([torch.stack([named[name] for name in names]) for named in of_tasks]).to(device)
                for of_tasks in (
                    [kept.factors.outputs for kept in self.kept.values()],
                    [kept.factors.inputs for kept in self.kept.values()],
                    [kept.anchor for kept in self.kept.values()],
                )
            ]
            strengths = [self.base_strength if task == BASE_TASK else self.strength for task in self.kept]
            parts[0] *= parts[0].new_tensor(strengths).view(-1, 1, 1, 1)
            stacks.append((names, *parts))
        return stacks

    def after_task(self, model: nn.Module, task: TaskContext) -> None:
        super().after_task(model, task)
        if not self.strength:
            return
        factors = measure(model, task, self._some(task)).scaled(self.coherence)
        new = Kept(factors, read(adapter_parameters(model)))
        if self.pool and EARLIER in self.kept:
            new = Kept(_together(self.kept[EARLIER].factors, factors), new.anchor)
        self._keep(self.kept | {EARLIER if self.pool else task.name: new})

    def _some(self, task: TaskContext) -> list[Example]:
        order = np.random.default_rng([task.seed, task.position]).permutation(len(task.examples))
        return [task.examples[i] for i in order[: self.examples]]

    def _keep(self, kept: dict[str, Kept]) -> None:
        self.kept, self._stacks = kept, None

    def state(self):
        tensors, values = super().state()
        for number, (factors, anchor) in enumerate(self.kept.values()):
            named = {"outputs": factors.outputs, "inputs": factors.inputs, "anchor": anchor}
            tensors |= pack(**{f"{part}{number}": matrices for part, matrices in named.items()})
        return tensors, values | {"kept": list(self.kept), "coherence": self.coherence}

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        self.coherence = values["coherence"]
        kept = {}
        for number, task in enumerate(values["kept"]):
            outputs, inputs, anchor = (unpack(tensors, f"{part}{number}") for part in ("outputs", "inputs", "anchor"))
            kept[task] = Kept(Factors(outputs, inputs), anchor)
        self._keep(kept)


EARLIER = "earlier tasks"
"""The name under which pooled tasks are kept; no task may have it, because it contains a blank."""


def _together(old: Factors, new: Factors) -> Factors:
    """One Γ and S for both: the Kronecker product nearest to their sum, around the newer adapter."""
    outputs, inputs = {}, {}
    for name in new.outputs:
        gammas = torch.stack([old.outputs[name], new.outputs[name]])
        outputs[name], inputs[name] = pooled(gammas, torch.stack([old.inputs[name], new.inputs[name]]))
    return Factors(outputs, inputs)

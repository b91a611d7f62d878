"""CoMA (arXiv 2312.08977): after each task, average the trained weights with those before the task.

    published ← before + weight · (trained − before)

It needs no pass, no row and no penalty. Where it helps, the first part of this line brings most of the learning and
the last part costs most of the forgetting; `curlora connectivity` plots it for a chain. Between a base and one
fine-tuned model this is WiSE-FT (arXiv 2109.01903).

CURLoRA's ΔW is linear in U, so that this averages the *models*; LoRA's two factors are averaged one by one.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from curlora.continual.options import option
from curlora.continual.parameters import adapter_parameters, read, require_adapter
from curlora.continual.state import pack, unpack
from curlora.continual.strategies.rehearsal import Rehearsal
from curlora.continual.strategy import Requires, TaskContext


class CoMA(Rehearsal):
    """Average each task's adapter with the one before it; the next task starts from the average.

    Classifier heads are not averaged, because each belongs to one task. Nothing is rehearsed by default.
    """

    name = "coma"
    plain_at_first = False
    requirements: ClassVar = {
        "adapter.carry": Requires(("continue",), "it averages one and the same adapter before and after a task")
    }

    weight: float = option(0.5, "weight of the trained adapter in the average; 1 keeps it", above=0, at_most=1)
    share: float = option(0.0, "part of a batch drawn from earlier tasks", at_least=0, below=1)
    base_share: float = option(0.0, "part of a batch that the base has generated", at_least=0, below=1)

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.requirements = type(self).requirements  # stricter than those of rehearsal
        self.before: dict[str, Tensor] = {}

    def check(self, model: nn.Module) -> None:
        require_adapter(model, "it averages an adapter over tasks")

    def before_task(self, model: nn.Module, task: TaskContext) -> None:
        self.check(model)
        super().before_task(model, task)
        self.before = read(adapter_parameters(model))

    def evaluation_weights(self, model: nn.Module) -> dict[str, Tensor]:
        trained = read(adapter_parameters(model))
        return {name: self.before[name].to(t.device).lerp(t, self.weight) for name, t in trained.items()}

    def state(self):
        tensors, values = super().state()
        return tensors | pack(before=self.before), values

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        self.before = unpack(tensors, "before")

"""CoMA (arXiv 2312.08977): after each task, stop on the way between the weights before it and the trained ones.

    published ← before + weight · (trained − before)

It costs nothing: no pass, no row, no penalty. Where it helps, the first part of that line brings most of what is
learned and the last part costs most of what is forgotten; `curlora connectivity` draws it for a chain. Between a base
and one fine-tune of it this is WiSE-FT (arXiv 2109.01903).

CURLoRA's ΔW is linear in U, so that this is the average of the *models*; LoRA's factors are averaged one by one.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from curlora.continual.parameters import adapter_parameters, read, require_adapter
from curlora.continual.rehearsal import Rehearsal
from curlora.continual.strategy import Requires, TaskContext, require


class CoMA(Rehearsal):
    """Average each task's adapter with the one before it; the next task starts from that average.

    Args:
        weight: of the trained adapter in the average, in (0, 1]; 1 keeps what was trained. Default 0.5.
        share, base_share: as in `Rehearsal`, here 0: nothing is rehearsed unless asked for.
        options: the others of `Rehearsal`.

    The classifier heads are not averaged: a head belongs to one task.
    """

    name = "coma"
    plain_at_first = False
    requirements: ClassVar = {
        "adapter.carry": Requires(("continue",), "it averages one and the same adapter before and after a task")
    }

    def __init__(
        self,
        weight: float = 0.5,
        share: float = 0.0,
        base_share: float = 0.0,
        base_rows: int = 500,
        base_length: int = 128,
        memory: int = 500,
        distill: float = 3.0,
        lwf: float = 0.0,
    ):
        super().__init__(share, base_share, base_rows, base_length, memory, distill, lwf)
        require(0 < weight <= 1, f"weight is {weight}; use a number in (0, 1], e.g. 0.5")
        self.weight = weight
        self.requirements = type(self).requirements
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
        return tensors | {f"before.{name}": tensor.cpu() for name, tensor in self.before.items()}, values

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        self.before = {k.removeprefix("before."): t for k, t in tensors.items() if k.startswith("before.")}

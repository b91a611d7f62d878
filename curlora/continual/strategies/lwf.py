"""Learning without forgetting (arXiv 1606.09282): earlier tasks' heads go on saying of the new rows what they said.

    loss = CE(batch) + weight · T² · Σ_heads mean over rows of KL(p_before ‖ p_now),   p = softmax(head(features) / T)

p_before is that of the adapter with which the task began. No row of an earlier task is needed: the new rows stand for
what its head may meet. The heads do not move, so all of it falls on the adapter. A task without a classifier head is
not held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from curlora.continual.parameters import adapter_parameters, read, require_adapter
from curlora.continual.passes import hidden_with
from curlora.continual.strategy import Example, Requires, StepOutput, Strategy, TaskContext, require


class LwF(Strategy):
    """Hold what the classifier heads of earlier tasks say.

    Args:
        weight: of the divergence, nats a row and head; 0 saves its forward pass.
        temperature: T, above 0; the higher, the more the classes count that were not chosen.
    """

    name = "lwf"
    plain_at_first = True
    needs_heads = True
    requirements: ClassVar = {
        "adapter.carry": Requires(("continue", "stack"), "a new adapter is not the one that earlier heads belong to")
    }

    def __init__(self, weight: float = 1.0, temperature: float = 2.0):
        require(weight >= 0, f"weight is {weight}; use 0 or more, e.g. 1.0")
        require(temperature > 0, f"temperature is {temperature}; use a number above 0, e.g. 2.0")
        self.weight, self.temperature = weight, temperature
        self.tasks: tuple[str, ...] = ()  # earlier ones with a classifier head
        self.before: dict[str, Tensor] = {}  # the adapter with which this task began; nothing between tasks
        self._current = ""  # a task that is trained once more does not hold itself
        self._rows = 0  # of the global micro-batch

    def check(self, model: nn.Module) -> None:
        require_adapter(model, "it holds what heads say while an adapter moves")

    def held_heads(self) -> tuple[str, ...]:
        return tuple(task for task in self.tasks if task != self._current)

    def before_task(self, model: nn.Module, task: TaskContext) -> None:
        self._current = task.name
        self.before = read(adapter_parameters(model)) if self.held_heads() else {}

    def batch(self, examples: list[Example]) -> list[Example]:
        self._rows = len(examples)
        return examples

    def loss(self, model: nn.Module, examples: list[Example], output: StepOutput) -> Tensor:
        return self.held(model, examples, output, range(len(examples)), self._rows)

    def held(
        self, model: nn.Module, examples: list[Example], output: StepOutput, rows: Sequence[int], count: int
    ) -> Tensor:
        """The loss and the divergence on some of this rank's rows, of which the global micro-batch has `count`."""
        if not (self.before and count):
            return output.loss
        rows = list(rows) if output.present else []
        # a rank without a row goes along with its first one: under ZeRO-3 all must run the pass
        chosen = rows or [0]
        mask = output.attention_mask[chosen]
        before = output.held_scores(hidden_with(model, self.before, [examples[i] for i in chosen], mask), mask)
        now = output.held_scores(output.hidden_states[chosen], mask)
        total = output.hidden_states.new_zeros(())
        for task, scores in now.items():
            old, new = (s.div(self.temperature).log_softmax(-1) for s in (before[task].detach(), scores))
            total = total + (old.exp() * (old - new)).sum()
        if not rows:
            return output.loss + 0 * total
        scale = self.weight * self.temperature**2 * output.weight * output.ranks / count
        return output.loss + scale * total

    def after_task(self, model: nn.Module, task: TaskContext) -> None:
        self.before = {}
        if self.weight and task.examples and task.examples[0].labels is None and task.name not in self.tasks:
            self.tasks = (*self.tasks, task.name)

    def state(self):
        return {f"before.{name}": tensor.cpu() for name, tensor in self.before.items()}, {"tasks": list(self.tasks)}

    def load_state(self, tensors, values) -> None:
        self.tasks = tuple(values["tasks"])
        self.before = {k.removeprefix("before."): t for k, t in tensors.items() if k.startswith("before.")}

"""Learning without forgetting (arXiv 1606.09282): the heads of earlier tasks keep their predictions on the new rows.

    loss = CE(batch) + weight · T² · Σ_heads mean over rows of KL(p_before ‖ p_now),   p = softmax(head(features) / T)

p_before uses the adapter with which the task began. No row of an earlier task is needed: the new rows stand in for
its inputs. The heads are frozen, so that only the adapter is constrained. Tasks without a classifier head are not
protected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from curlora.continual.options import option
from curlora.continual.parameters import adapter_parameters, read, require_adapter
from curlora.continual.passes import hidden_with
from curlora.continual.state import pack, unpack
from curlora.continual.strategy import Example, Requires, StepOutput, Strategy, TaskContext


class LwF(Strategy):
    """Keep the predictions of earlier classifier heads."""

    name = "lwf"
    plain_at_first = True
    needs_heads = True
    requirements: ClassVar = {
        "adapter.carry": Requires(("continue", "stack"), "earlier heads do not belong to a new adapter")
    }

    weight: float = option(
        1.0, "weight of the divergence, in nats per row and head; 0 saves a forward pass", at_least=0
    )
    temperature: float = option(2.0, "T; a higher one gives unlikely classes more influence", above=0)

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.tasks: tuple[str, ...] = ()  # earlier tasks with a classifier head
        self.before: dict[str, Tensor] = {}  # the adapter with which this task began; empty between tasks
        self._current = ""  # a task that is trained again does not constrain itself
        self._rows = 0  # of the global micro-batch

    def check(self, model: nn.Module) -> None:
        require_adapter(model, "it keeps the predictions of heads while an adapter trains")

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
        """The loss plus the divergence on some of this rank's rows, of which the global micro-batch has `count`."""
        if not (self.before and count):
            return output.loss
        rows = list(rows) if output.present else []
        # A rank without a row uses its first one: under ZeRO-3 all ranks must run the pass.
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
        return pack(before=self.before), {"tasks": list(self.tasks)}

    def load_state(self, tensors, values) -> None:
        self.tasks = tuple(values["tasks"])
        self.before = unpack(tensors, "before")

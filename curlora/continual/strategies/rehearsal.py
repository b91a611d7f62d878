"""Rehearsal: replay, plus text that the untrained base model has generated (pseudo-rehearsal with distillation).

Rows of earlier tasks protect those tasks; for what the base knew before the first task there are no rows. But the base
can generate some: sequences sampled from it before training starts. Their cross-entropy under the adapted model is, up
to a constant, an unbiased estimate of KL(base ‖ adapted model) under the base's own distribution, so that training on
them keeps the model close to the base. (Pseudo-rehearsal: Robins 1995; for language models arXiv 1909.03329 and
2403.01244.) A sampled token says little about the distribution that it came from; `distill` therefore adds the
divergence itself, over the whole vocabulary (learning without forgetting: arXiv 1606.09282).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from curlora.continual.memory import ReservoirMemory
from curlora.continual.options import option
from curlora.continual.parameters import adapter_parameters, read
from curlora.continual.passes import logits_with
from curlora.continual.state import pack, unpack
from curlora.continual.strategies.lwf import LwF
from curlora.continual.strategies.replay import Quota, Replay
from curlora.continual.strategy import Example, Requires, StepOutput, TaskContext, require
from curlora.names import BASE_TASK

NO_CLASS = -100  # target of a row whose class adds no loss


class Rehearsal(Replay):
    """Mix in rows of earlier tasks, and text of the base.

    The base generates its text through `TaskContext.write`, a collective call; the rows do not depend on the number of
    ranks. `lwf` replaces the labels of replayed rows, which are few and soon memorised; without classifier heads it
    has no effect.
    """

    name = "rehearsal"
    plain_at_first = False

    share: float = option(0.1, "part of a batch drawn from earlier tasks", at_least=0, below=1)
    base_share: float = option(0.25, "part of a batch that the base has generated", at_least=0, below=1)
    base_rows: int = option(500, "sequences that the base generates once, before the first task", at_least=1)
    base_length: int = option(128, "tokens per generated sequence", at_least=2)
    distill: float = option(
        3.0, "weight of KL(base ‖ adapted model) per token of the base's rows; 0 saves a forward pass", at_least=0
    )
    lwf: float = option(0.0, "weight of LwF on new and replayed rows, in place of replayed labels", at_least=0)
    size = None  # not an option here: rows are added by share only

    def __init__(self, **options: Any):
        super().__init__(**options)
        both = self.share + self.base_share
        require(both < 1, f"share and base_share are {both} together; use less than 1")
        if not self.base_share:
            self.distill = 0.0  # no rows to distil on
        if self.distill:
            reason = "distill recovers the base from the adapter's initial state"
            self.requirements = {"adapter.carry": Requires(("continue",), reason)}
        elif self.lwf:
            self.requirements = LwF.requirements
        self.untrained: dict[str, Tensor] = {}  # the adapter's initial state, with which the model is the base
        self._written, self._rows = 0, 1  # of the global micro-batch: rows of the base, all rows
        new = 1 - self.share - self.base_share  # new part of a batch
        self.quota, self.base_quota = Quota(self.share / new), Quota(self.base_share / new)
        self.written = ReservoirMemory(self.base_rows)
        self.heads = LwF(weight=self.lwf)

    def held_heads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*super().held_heads(), *self.heads.held_heads())))

    def before_task(self, model, task: TaskContext) -> None:
        super().before_task(model, task)
        self.heads.before_task(model, task)
        self.base_quota.owed = 0.0
        if task.position == 1 and self.distill and not self.untrained:
            self.untrained = read(adapter_parameters(model))
        if task.position == 1 and self.base_quota.each:
            require(task.write is not None, "rehearsal needs TaskContext.write, which generates text from the base")
            rows = task.write(model, self.base_rows, self.base_length)
            self.written = ReservoirMemory(self.base_rows)
            self.written.add_task(BASE_TASK, [Example(BASE_TASK, row, row) for row in rows], task.seed)

    def batch(self, examples: list[Example]) -> list[Example]:
        count = self.base_quota.take(len(examples))
        batch = super().batch(examples)
        held = self.heads.held_heads()
        batch = [replace(example, target=NO_CLASS) if example.task in held else example for example in batch]
        if count and len(self.written):
            batch = batch + self.written.draw(count, (*self._seed, self._draws, 1))
        self._written, self._rows = sum(example.task == BASE_TASK for example in batch), len(batch)
        return batch

    def loss(self, model: nn.Module, examples: list[Example], output: StepOutput) -> Tensor:
        real = [i for i, example in enumerate(examples) if example.task != BASE_TASK]
        loss = self.heads.held(model, examples, output, real, self._rows - self._written)
        if not (self.distill and self._written):
            return loss
        # A rank without such a row uses its first one: under ZeRO-3 all ranks must run the pass.
        rows = [i for i, example in enumerate(examples) if example.task == BASE_TASK and output.present]
        chosen = [examples[i] for i in rows or [0]]
        base = logits_with(model, self.untrained, chosen, output.attention_mask.device)
        if not rows:
            return loss
        ours = output.logits(rows, base.shape[1]).float().log_softmax(-1)
        divergence = nn.functional.kl_div(ours, base.float().log_softmax(-1), reduction="none", log_target=True)
        each = divergence.sum(-1).mean(1)
        return loss + self.distill * output.weight * output.ranks / self._rows * each.sum()

    def after_task(self, model, task: TaskContext) -> None:
        super().after_task(model, task)
        self.heads.after_task(model, task)

    def state(self):
        tensors, values = super().state()
        written, written_values = self.written.state()
        held, held_values = self.heads.state()
        named = pack(written=written, untrained=self.untrained, lwf=held)
        values |= {"written": written_values, "base_owed": self.base_quota.owed, "lwf": held_values}
        return tensors | named, values

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        self.written.load_state(unpack(tensors, "written"), values["written"])
        self.untrained = unpack(tensors, "untrained")
        self.base_quota.owed = values["base_owed"]
        self.heads.load_state(unpack(tensors, "lwf"), values.get("lwf", {"tasks": []}))  # older runs have none

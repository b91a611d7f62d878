"""Rehearsal: replay, and beside it text that the untouched base has written itself.

Rows of earlier tasks keep those tasks; what the base knew before the first task has no rows at hand. But the base can
write some: sequences sampled from it before anything was trained. Their cross-entropy under the adapted model is, up
to a constant, an unbiased estimate of KL(base ‖ adapted model) over the base's own distribution, so that to learn them
again is to stay the model that one was. (Pseudo-rehearsal: Robins 1995; with language models arXiv 1909.03329 and
2403.01244.) A sampled token says little of the distribution that it came from, so the divergence itself, over the
whole vocabulary, can be added (`distill`; learning without forgetting: arXiv 1606.09282).
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from curlora.continual.lwf import LwF
from curlora.continual.memory import ReservoirMemory
from curlora.continual.parameters import adapter_parameters, read
from curlora.continual.passes import logits_with
from curlora.continual.replay import Quota, Replay
from curlora.continual.strategy import Example, Requires, StepOutput, TaskContext, require

BASE = "base"  # the task that these rows belong to; no task of a sequence may have this name
NO_CLASS = -100  # the target of a row whose class is not asked for


class Rehearsal(Replay):
    """Mix in earlier tasks, and the base's own text.

    Args:
        share: part of a batch that comes out of earlier tasks, as in `Replay`; default 0.1.
        base_share: part of a batch that the base has written, in [0, 1).
        base_rows: sequences that it writes, once, before the first task.
        base_length: tokens of each.
        distill: weight of KL(base ‖ adapted model), nats a token, on the rows that the base has written; 0 saves the
            base's forward pass over them.
        memory: rows that are kept of all earlier tasks together.
        lwf: weight of what earlier classifier heads said of the new and the replayed rows, as in `LwF`. It takes the
            place of the labels of replayed rows, which are few and soon known by heart. Without heads it does nothing.

    The base writes through `TaskContext.write`, on all ranks together; the rows are the same on any number of them.
    """

    name = "rehearsal"
    plain_at_first = False

    def __init__(
        self,
        share: float = 0.1,
        base_share: float = 0.25,
        base_rows: int = 500,
        base_length: int = 128,
        memory: int = 500,
        distill: float = 3.0,
        lwf: float = 0.0,
    ):
        super().__init__(share=share, memory=memory)
        require(0 <= base_share < 1, f"base_share is {base_share}; use a number in [0, 1), e.g. 0.1")
        require(share + base_share < 1, f"share and base_share are {share + base_share} together; use less than 1")
        require(base_rows > 0, f"base_rows is {base_rows}; use a positive number of sequences, e.g. 500")
        require(base_length > 1, f"base_length is {base_length}; use at least 2 tokens, e.g. 128")
        require(lwf >= 0, f"lwf is {lwf}; use 0 or more, e.g. 1.0")
        require(distill >= 0, f"distill is {distill}; use 0 or more, e.g. 1.0")
        self.base_rows, self.base_length = base_rows, base_length
        self.distill = distill if base_share else 0.0  # there is nothing to distil on
        if self.distill:
            reason = "distill finds the base again as the adapter in its first state"
            self.requirements = {"adapter.carry": Requires(("continue",), reason)}
        elif lwf:
            self.requirements = LwF.requirements
        self.untrained: dict[str, Tensor] = {}  # the adapter with which the model is the base
        self._written, self._rows = 0, 1  # rows of the base's, and all rows, of the global micro-batch
        new = 1 - share - base_share  # the part of a batch that is new
        self.quota, self.base_quota = Quota(share / new), Quota(base_share / new)
        self.written = ReservoirMemory(base_rows)
        self.lwf = LwF(lwf)

    def held_heads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*super().held_heads(), *self.lwf.held_heads())))

    def before_task(self, model, task: TaskContext) -> None:
        super().before_task(model, task)
        self.lwf.before_task(model, task)
        self.base_quota.owed = 0.0
        if task.position == 1 and self.distill and not self.untrained:
            self.untrained = read(adapter_parameters(model))
        if task.position == 1 and self.base_quota.each:
            require(task.write is not None, "rehearsal needs TaskContext.write, which lets the base write text")
            rows = task.write(model, self.base_rows, self.base_length)
            self.written = ReservoirMemory(self.base_rows)
            self.written.add_task(BASE, [Example(BASE, row, row) for row in rows], task.seed)

    def batch(self, examples: list[Example]) -> list[Example]:
        count = self.base_quota.take(len(examples))
        batch = super().batch(examples)
        held = self.lwf.held_heads()
        batch = [replace(example, target=NO_CLASS) if example.task in held else example for example in batch]
        if count and len(self.written):
            batch = batch + self.written.draw(count, (*self._seed, self._draws, 1))
        self._written, self._rows = sum(example.task == BASE for example in batch), len(batch)
        return batch

    def loss(self, model: nn.Module, examples: list[Example], output: StepOutput) -> Tensor:
        real = [i for i, example in enumerate(examples) if example.task != BASE]
        loss = self.lwf.held(model, examples, output, real, self._rows - self._written)
        if not (self.distill and self._written):
            return loss
        # a rank without such a row goes along with its first one: under ZeRO-3 all must run the pass
        rows = [i for i, example in enumerate(examples) if example.task == BASE and output.present]
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
        self.lwf.after_task(model, task)

    def state(self):
        tensors, values = super().state()
        written, written_values = self.written.state()
        held, held_values = self.lwf.state()
        named = {f"written.{name}": tensor for name, tensor in written.items()}
        named |= {f"untrained.{name}": tensor.cpu() for name, tensor in self.untrained.items()}
        named |= {f"lwf.{name}": tensor for name, tensor in held.items()}
        values |= {"written": written_values, "base_owed": self.base_quota.owed, "lwf": held_values}
        return tensors | named, values

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        written = {k.removeprefix("written."): t for k, t in tensors.items() if k.startswith("written.")}
        self.written.load_state(written, values["written"])
        self.untrained = {k.removeprefix("untrained."): t for k, t in tensors.items() if k.startswith("untrained.")}
        self.base_quota.owed = values["base_owed"]
        held = {k.removeprefix("lwf."): t for k, t in tensors.items() if k.startswith("lwf.")}
        self.lwf.load_state(held, values.get("lwf", {"tasks": []}))  # older runs had none

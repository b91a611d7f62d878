"""Rehearsal: replay, and beside it text that the untouched base has written itself.

Rows of earlier tasks keep those tasks; what the base knew before the first task has no rows at hand. But the base can
write some: sequences sampled from it before anything was trained. Their cross-entropy under the adapted model is, up
to a constant, an unbiased estimate of KL(base ‖ adapted model) over the base's own distribution, so that to learn them
again is to stay the model that one was. (Pseudo-rehearsal: Robins 1995; with language models arXiv 1909.03329 and
2403.01244.)
"""

from __future__ import annotations

from curlora.continual.memory import ReservoirMemory
from curlora.continual.replay import Quota, Replay
from curlora.continual.strategy import Example, TaskContext, require

BASE = "base"  # the task that these rows belong to; no task of a sequence may have this name


class Rehearsal(Replay):
    """Mix in earlier tasks, and the base's own text.

    Args:
        share: part of a batch that comes out of earlier tasks, as in `Replay`; default 0.1.
        base_share: part of a batch that the base has written, in [0, 1); default 0.1.
        base_rows: sequences that it writes, once, before the first task.
        base_length: tokens of each.
        memory: rows that are kept of all earlier tasks together.

    The base writes through `TaskContext.write`, on all ranks together; the rows are the same on any number of them.
    """

    name = "rehearsal"

    def __init__(
        self,
        share: float = 0.1,
        base_share: float = 0.1,
        base_rows: int = 500,
        base_length: int = 128,
        memory: int = 500,
    ):
        super().__init__(share=share, memory=memory)
        require(0 <= base_share < 1, f"base_share is {base_share}; use a number in [0, 1), e.g. 0.1")
        require(share + base_share < 1, f"share and base_share are {share + base_share} together; use less than 1")
        require(base_rows > 0, f"base_rows is {base_rows}; use a positive number of sequences, e.g. 500")
        require(base_length > 1, f"base_length is {base_length}; use at least 2 tokens, e.g. 128")
        self.base_rows, self.base_length = base_rows, base_length
        new = 1 - share - base_share  # the part of a batch that is new
        self.quota, self.base_quota = Quota(share / new), Quota(base_share / new)
        self.written = ReservoirMemory(base_rows)

    def before_task(self, model, task: TaskContext) -> None:
        super().before_task(model, task)
        self.base_quota.owed = 0.0
        if task.position == 1 and self.base_quota.each:
            require(task.write is not None, "rehearsal needs TaskContext.write, which lets the base write text")
            rows = task.write(model, self.base_rows, self.base_length)
            self.written = ReservoirMemory(self.base_rows)
            self.written.add_task(BASE, [Example(BASE, row, row) for row in rows], task.seed)

    def batch(self, examples: list[Example]) -> list[Example]:
        count = self.base_quota.take(len(examples))
        batch = super().batch(examples)
        if not count or not len(self.written):
            return batch
        return batch + self.written.draw(count, (*self._seed, self._draws, 1))

    def state(self):
        tensors, values = super().state()
        written, written_values = self.written.state()
        named = {f"written.{name}": tensor for name, tensor in written.items()}
        return tensors | named, values | {"written": written_values, "base_owed": self.base_quota.owed}

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        written = {k.removeprefix("written."): t for k, t in tensors.items() if k.startswith("written.")}
        self.written.load_state(written, values["written"])
        self.base_quota.owed = values["base_owed"]

"""Replay: every batch contains some rows of earlier tasks, drawn from a bounded memory.

A task's training set is offered to the memory when the task ends, so that no batch contains a row twice and no row
enters once per epoch. Replayed rows train the adapter only and leave the classifier heads of their tasks alone: from
the one or two rows of a batch, Adam would move a head as far as from all rows of its own task.
"""

from __future__ import annotations

import math
from typing import Any

from curlora.continual.memory import ReservoirMemory
from curlora.continual.options import option
from curlora.continual.state import pack, unpack
from curlora.continual.strategy import Example, Strategy, TaskContext, require


class Quota:
    """Number of rows that a share adds to each micro-batch; `owed` carries fractions over to the next ones.

    Args:
        each: added rows per new row.
    """

    def __init__(self, each: float):
        self.each, self.owed = each, 0.0

    def take(self, fresh: int) -> int:
        """Rows to add to a micro-batch of `fresh` new rows."""
        self.owed += fresh * self.each
        count = math.floor(self.owed)
        self.owed -= count
        return count


class Replay(Strategy):
    """Mix in rows of earlier tasks.

    Rows are added, so that a batch of n rows grows to n / (1 − share) on average. Rows are drawn for the global batch,
    before it is divided among the ranks, and therefore do not depend on the number of ranks.
    """

    name = "replay"
    plain_at_first = True

    share: float = option(0.02, "replayed part of a batch", at_least=0, below=1)
    size: int | None = option(None, "rows added to every micro-batch, instead of `share`", at_least=0)
    memory: int = option(500, "rows kept of all earlier tasks together", at_least=1)

    def __init__(self, **options: Any):
        super().__init__(**options)
        require(options.get("share") is None or options.get("size") is None, "give share or size, not both")
        self.quota = Quota(self.share / (1 - self.share))
        self.reservoir = ReservoirMemory(self.memory)
        self._draws = 0  # micro-batches of this task so far
        self._seed: tuple[int, int] = (0, 0)

    @property
    def replays(self) -> bool:
        """Whether rows are ever drawn; if not, none are kept either."""
        return bool(self.size or (self.size is None and self.quota.each))

    def held_heads(self) -> tuple[str, ...]:
        return self.reservoir.tasks if self.replays else ()

    def before_task(self, model, task: TaskContext) -> None:
        self._draws, self._seed, self.quota.owed = 0, (task.seed, task.position), 0.0

    def batch(self, examples: list[Example]) -> list[Example]:
        count = self.quota.take(len(examples)) if self.size is None else self.size
        self._draws += 1
        if not count or not len(self.reservoir):
            return examples
        return examples + self.reservoir.draw(count, (*self._seed, self._draws))

    def after_task(self, model, task: TaskContext) -> None:
        if self.replays:
            self.reservoir.add_task(task.name, task.examples, task.seed)

    def state(self):
        tensors, values = self.reservoir.state()
        return pack(memory=tensors), {"memory": values, "draws": self._draws, "owed": self.quota.owed}

    def load_state(self, tensors, values) -> None:
        self.reservoir.load_state(unpack(tensors, "memory"), values["memory"])
        self._draws, self.quota.owed = values["draws"], values["owed"]

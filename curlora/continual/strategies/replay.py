"""Replay: every batch carries some rows of earlier tasks, out of a bounded memory.

A task's training set is offered to the memory when the task ends, so a batch never meets itself and no epoch inserts a
row twice. Classifier heads stay as their own task left them, and replayed rows move the adapter only: from the one or
two rows of a batch, Adam would move a head by as much as from all the rows of its own task.
"""

from __future__ import annotations

import math

from curlora.continual.memory import ReservoirMemory
from curlora.continual.strategy import Example, Strategy, TaskContext, require


class Quota:
    """How many rows a share adds to each micro-batch; `owed` carries fractions of a row over to the next ones.

    Args:
        each: rows for every new one.
    """

    def __init__(self, each: float):
        self.each, self.owed = each, 0.0

    def take(self, fresh: int) -> int:
        self.owed += fresh * self.each
        count = math.floor(self.owed)
        self.owed -= count
        return count


class Replay(Strategy):
    """Mix earlier tasks in.

    Args:
        share: part of a batch that is replayed, in [0, 1); rows are added, so a batch of n grows to n / (1 − share)
            on average. Default 0.02 (methods: "mix in a share (2 %)").
        size: rows added to every micro-batch instead; not both.
        memory: rows that are kept of all earlier tasks together.

    Draws are global and come before a batch is cut into the ranks' parts, so they are the same on any number of ranks.
    """

    name = "replay"
    plain_at_first = True

    def __init__(self, share: float | None = None, size: int | None = None, memory: int = 500):
        require(share is None or size is None, "give share or size, not both")
        require(share is None or 0 <= share < 1, f"share is {share}; use a number in [0, 1), e.g. 0.02")
        require(size is None or size >= 0, f"size is {size}; use 0 or more rows a micro-batch")
        require(memory > 0, f"memory is {memory}; use a positive number of rows, e.g. 500")
        share = 0.02 if share is None else share
        self.size = size
        self.quota = Quota(share / (1 - share))
        self.memory = ReservoirMemory(memory)
        self._draws = 0  # micro-batches of this task so far
        self._seed: tuple[int, int] = (0, 0)

    @property
    def replays(self) -> bool:
        """Whether anything is ever drawn from the memory; if not, it keeps no row either."""
        return bool(self.size or (self.size is None and self.quota.each))

    def held_heads(self) -> tuple[str, ...]:
        return self.memory.tasks if self.replays else ()

    def before_task(self, model, task: TaskContext) -> None:
        self._draws, self._seed, self.quota.owed = 0, (task.seed, task.position), 0.0

    def batch(self, examples: list[Example]) -> list[Example]:
        count = self.quota.take(len(examples)) if self.size is None else self.size
        self._draws += 1
        if not count or not len(self.memory):
            return examples
        return examples + self.memory.draw(count, (*self._seed, self._draws))

    def after_task(self, model, task: TaskContext) -> None:
        if self.replays:
            self.memory.add_task(task.name, task.examples, task.seed)

    def state(self):
        tensors, values = self.memory.state()
        named = {f"memory.{name}": tensor for name, tensor in tensors.items()}
        return named, {"memory": values, "draws": self._draws, "owed": self.quota.owed}

    def load_state(self, tensors, values) -> None:
        memory = {k.removeprefix("memory."): t for k, t in tensors.items() if k.startswith("memory.")}
        self.memory.load_state(memory, values["memory"])
        self._draws, self.quota.owed = values["draws"], values["owed"]

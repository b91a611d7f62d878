"""Replay: every batch carries some rows of earlier tasks, out of a bounded memory.

A task's training set is offered to the memory when the task ends, so a batch never meets itself and no epoch inserts a
row twice. The heads of replayed classification tasks go on training: the adapter moves under them, and their own
examples are there to move them along.
"""

from __future__ import annotations

import math

from curlora.continual.memory import ReservoirMemory
from curlora.continual.strategy import Example, Strategy, TaskContext, require


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

    def __init__(self, share: float | None = None, size: int | None = None, memory: int = 500):
        require(share is None or size is None, "give share or size, not both")
        require(share is None or 0 <= share < 1, f"share is {share}; use a number in [0, 1), e.g. 0.02")
        require(size is None or size >= 0, f"size is {size}; use 0 or more rows a micro-batch")
        require(memory > 0, f"memory is {memory}; use a positive number of rows, e.g. 500")
        self.share = (0.02 if share is None else share) if size is None else None
        self.size = size
        self.memory = ReservoirMemory(memory)
        self._draws = 0  # micro-batches of this task so far
        self._owed = 0.0  # rows that the share asks for and that were not replayed yet: less than one
        self._seed: tuple[int, int] = (0, 0)

    def replayed_tasks(self) -> tuple[str, ...]:
        return self.memory.tasks if self.share or self.size else ()

    def before_task(self, model, task: TaskContext) -> None:
        self._draws, self._owed, self._seed = 0, 0.0, (task.seed, task.position)

    def batch(self, examples: list[Example]) -> list[Example]:
        count = self._count(len(examples))
        self._draws += 1
        if not count or not len(self.memory):
            return examples
        return examples + self.memory.draw(count, (*self._seed, self._draws))

    def _count(self, fresh: int) -> int:
        """Rows to replay beside `fresh` new ones; fractions are carried over to later micro-batches."""
        if self.share is None:
            return self.size
        self._owed += fresh * self.share / (1 - self.share)
        count = math.floor(self._owed)
        self._owed -= count
        return count

    def after_task(self, model, task: TaskContext) -> None:
        self.memory.add_task(task.name, task.examples, task.seed)

    def state(self):
        tensors, values = self.memory.state()
        named = {f"memory.{name}": tensor for name, tensor in tensors.items()}
        return named, {"memory": values, "draws": self._draws, "owed": self._owed}

    def load_state(self, tensors, values) -> None:
        memory = {k.removeprefix("memory."): t for k, t in tensors.items() if k.startswith("memory.")}
        self.memory.load_state(memory, values["memory"])
        self._draws, self._owed = values["draws"], values["owed"]

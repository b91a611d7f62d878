"""A bounded memory of training examples of earlier tasks, filled by reservoir sampling (Vitter 1985, algorithm R).

After any number of tasks it holds a uniform sample, without replacement, of everything ever added. All draws depend
on seeds and counts only, so that every rank, and a run that was interrupted, holds the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from curlora.continual.strategy import Example


class ReservoirMemory:
    """At most `capacity` examples; `seen` counts all examples offered so far, `entered` names their tasks."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.rows: list[Example] = []
        self.seen = 0
        self.entered: list[str] = []

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks with a row in the memory."""
        return tuple(sorted({row.task for row in self.rows}))

    def add_task(self, name: str, examples: Sequence[Example], seed: int) -> None:
        """Offer the training set of a finished task. A task is added once; replayed rows are never added again."""
        if name in self.entered:
            return
        self.entered.append(name)
        fresh = [example for example in examples if not example.replayed]
        generator = np.random.default_rng([seed, self.seen])
        places = generator.integers(0, np.arange(self.seen, self.seen + len(fresh)) + 1)
        for example, place in zip(fresh, places.tolist(), strict=True):
            if len(self.rows) < self.capacity:
                self.rows.append(example)
            elif place < self.capacity:
                self.rows[place] = example
        self.seen += len(fresh)

    def draw(self, count: int, seed: Sequence[int]) -> list[Example]:
        """At most `count` different rows, marked as replayed."""
        generator = np.random.default_rng(list(seed))
        chosen = generator.choice(len(self.rows), size=min(count, len(self.rows)), replace=False)
        return [replace(self.rows[i], replayed=True) for i in chosen]

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Flat int32 tokens and labels with int64 offsets; a row without labels has an empty range of labels."""
        names = list(self.tasks)
        labels = [row.labels or () for row in self.rows]
        tensors = {
            "ids": _flat([row.input_ids for row in self.rows]),
            "offsets": _offsets([row.input_ids for row in self.rows]),
            "labels": _flat(labels),
            "label_offsets": _offsets(labels),
            "breaks": _flat([row.breaks for row in self.rows]),
            "break_offsets": _offsets([row.breaks for row in self.rows]),
            "targets": torch.tensor([row.target for row in self.rows], dtype=torch.int32),
            "tasks": torch.tensor([names.index(row.task) for row in self.rows], dtype=torch.int32),
        }
        return tensors, {"tasks": names, "seen": self.seen, "entered": self.entered}

    def load_state(self, tensors: dict[str, Tensor], values: dict) -> None:
        """The inverse of `state`."""
        ids = _ranges(tensors["ids"], tensors["offsets"])
        labels = _ranges(tensors["labels"], tensors["label_offsets"])
        breaks = _ranges(tensors["breaks"], tensors["break_offsets"])
        tasks = [values["tasks"][i] for i in tensors["tasks"].tolist()]
        columns = zip(tasks, ids, labels, tensors["targets"].tolist(), breaks, strict=True)
        self.rows = [Example(task, row, label or None, target, places) for task, row, label, target, places in columns]
        self.seen, self.entered = values["seen"], list(values["entered"])


def _flat(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([token for row in rows for token in row], dtype=torch.int32)


def _offsets(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([0, *np.cumsum([len(row) for row in rows], dtype=np.int64)], dtype=torch.int64)


def _ranges(flat: Tensor, offsets: Tensor) -> list[tuple[int, ...]]:
    tokens, ends = flat.tolist(), offsets.tolist()
    return [tuple(tokens[start:end]) for start, end in pairwise(ends)]

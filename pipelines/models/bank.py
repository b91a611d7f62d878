"""A bank of adapters (`adapter.carry: bank`): every task keeps its own, and each sequence's text says which answers.

All adapters of a chain have the same form, and with CURLoRA also the same frozen factors, so that a task is one small
matrix per layer. The bank holds the trained parameters of every task and the router that tells texts apart
(`curlora/continual/routing.py`); its file in a step directory is complete by itself. Position 0 is the untrained
adapter, which computes what the base computes.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from curlora.continual import Example
from curlora.continual.parameters import adapter_parameters, read, swapped
from curlora.continual.routing import Router
from pipelines.distributed.world import World, gather_everywhere

FOLDER = "bank"
FIT_ROWS = 256
"""Training texts by which a task is known."""

BASE_ROWS, BASE_LENGTH = 128, 128
"""Texts that the base writes, by which it knows its own language."""

ROUTED_ROWS = 64
"""Sequences that are routed at a time."""

LEAST_PROMPT = 4
"""A prompt of fewer tokens says too little: then the whole training sequence counts."""


class Bank:
    """The adapters of all tasks up to a step, by position; `tasks[0]` is the base."""

    def __init__(self) -> None:
        self.tasks: list[str] = []
        self.weights: list[dict[str, Tensor]] = []
        self.router = Router()

    def __len__(self) -> int:
        return len(self.tasks)

    def begin(self, model: nn.Module, written: Sequence[Sequence[int]]) -> None:
        """The base as position 0: an untrained adapter, and text that the base has written."""
        self.weights = [read(adapter_parameters(model))]
        self.tasks = ["base"]
        self.router.fit(self.router.observe(model, written))

    def add(self, model: nn.Module, task: str, examples: Sequence[Example], weights: Mapping[str, Tensor]) -> None:
        """A trained task; a collective call. A task that is there already is replaced.

        Args:
            examples: its training set; as many as FIT_ROWS, evenly spread, are looked at.
            weights: its trained parameters by name; others are left out.
        """
        chosen = [examples[i * len(examples) // FIT_ROWS] for i in range(FIT_ROWS)]
        texts = [prompt(e) for e in (chosen if len(examples) > FIT_ROWS else examples)]
        if task in self.tasks:
            self._drop(self.tasks.index(task))
        with self.active(model, 0):
            self.router.fit(self.router.observe(model, texts))
        self.tasks.append(task)
        self.weights.append({name: weights[name].float().cpu() for name in self.weights[0]})

    def _drop(self, place: int) -> None:
        for part in (self.tasks, self.weights, self.router.matrices, self.router.margins):
            del part[place]

    @contextlib.contextmanager
    def active(self, model: nn.Module, place: int) -> Iterator[None]:
        """Inside, the model answers with the adapter at a position."""
        values = self.weights[place]
        with swapped({name: p for name, p in model.named_parameters() if name in values}, values):
            yield

    def routes(self, model: nn.Module, texts: Sequence[Sequence[int]], world: World) -> list[int]:
        """The position that each text goes to, on every rank; a collective call."""
        parts = [texts[first : first + ROUTED_ROWS] for first in range(0, len(texts), ROUTED_ROWS)]
        mine: dict[int, list[int]] = {}
        with self.active(model, 0):
            for number in range(0, len(parts), world.size):
                own = number + world.rank
                if own < len(parts):
                    mine[own] = self.router.route(self.router.observe(model, parts[own])).tolist()
                elif world.lockstep:  # every rank runs the same number of forward passes
                    self.router.observe(model, parts[number])
        found = dict(gather_everywhere(list(mine.items()), world))
        return [place for number in sorted(found) for place in found[number]]

    def named(self, adapter: str) -> Bank:
        """The same bank over an adapter of another name in its model than the one it was trained under."""
        other = Bank()
        other.tasks, other.router = self.tasks, self.router
        other.weights = [{renamed(key, adapter): value for key, value in weights.items()} for weights in self.weights]
        return other

    def attach(self, model: nn.Module) -> None:
        """Let whatever scores the model route by this bank."""
        model.curlora_bank = self

    # -- files

    def save(self, folder: Path) -> None:
        """Write `bank/` into a step's folder."""
        target = folder / FOLDER
        target.mkdir(parents=True)
        moments, values = self.router.state()
        tensors = {f"router/{name}": tensor for name, tensor in moments.items()}
        for place, weights in enumerate(self.weights):
            tensors |= {f"weights/{place}/{name}": tensor for name, tensor in weights.items()}
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, target / "state.safetensors")
        (target / "state.json").write_text(json.dumps({"tasks": self.tasks, "router": values}))

    @classmethod
    def load(cls, folder: Path) -> Bank | None:
        """The bank of a step's folder; None if it has none.

        Raises:
            ValueError: a task lacks its adapter or its moments.
        """
        source = folder / FOLDER
        if not source.exists():
            return None
        bank = cls()
        values = json.loads((source / "state.json").read_text())
        tensors = load_file(source / "state.safetensors")
        bank.tasks = list(values["tasks"])
        bank.weights = [{} for _ in bank.tasks]
        moments = {}
        for key, tensor in tensors.items():
            kind, _, rest = key.partition("/")
            if kind == "router":
                moments[rest] = tensor
            else:
                place, _, name = rest.partition("/")
                bank.weights[int(place)][name] = tensor
        bank.router.load_state(moments, values["router"])
        for place, task in enumerate(bank.tasks):
            if len(bank.router) != len(bank) or bank.weights[place].keys() != bank.weights[0].keys():
                raise ValueError(f"{source} is damaged: '{task}' lacks an adapter or moments; restore the folder")
        return bank


def renamed(parameter: str, adapter: str) -> str:
    """The name of a parameter of the adapter `default`, under another name of the adapter."""
    return re.sub(r"\.default(?=\.|$)", f".{adapter}", parameter)


def bank_of(model: nn.Module) -> Bank | None:
    """The bank that was attached to a model."""
    return getattr(model, "curlora_bank", None)


def detach(model: nn.Module) -> None:
    """Undo `Bank.attach`."""
    model.__dict__.pop("curlora_bank", None)


def prompt(example: Example) -> tuple[int, ...]:
    """What of a training sequence a user would send: the tokens before the first target, or all of a text."""
    first = 0
    if example.labels is not None:
        first = next((place for place, label in enumerate(example.labels) if label >= 0), 0)
    return example.input_ids[:first] if first >= LEAST_PROMPT else example.input_ids

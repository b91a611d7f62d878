"""One base model with any number of adapters, of which every row of a batch uses its own.

Not thread-safe: everything here runs on the engine's thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn

import curlora  # noqa: F401  registers its tuner with PEFT
from curlora.mixed import BASE
from pipelines.models import heads
from pipelines.models.bank import Bank, detach, renamed
from pipelines.serve.contract import AdapterError

MIXED = ("CURLORA", "LORA")  # types whose layers take a name per row


class SharedModel:
    """A base model and its adapters.

    Attributes:
        base: the language model; adapters are injected into it.
    """

    def __init__(self, base: nn.Module):
        self.base = base.eval()
        self._peft: peft.PeftModel | None = None
        self._heads: dict[str, nn.ModuleDict] = {}
        self._banks: dict[str, Bank] = {}
        self._bare: set[str] = set()  # names of steps that trained heads alone

    @property
    def model(self) -> nn.Module:
        return self.base if self._peft is None else self._peft

    @property
    def device(self) -> torch.device:
        return next(self.base.parameters()).device

    @property
    def names(self) -> set[str]:
        """The adapters in memory."""
        return self._bare | (set(self._peft.peft_config) if self._peft else set())

    def has_bank(self, name: str) -> bool:
        return name in self._banks

    # -- loading
    def load(self, name: str, folder: Path) -> None:
        """Add the adapter and the heads of a step's folder under a name.

        Raises:
            AdapterError: it cannot be loaded; the model is as before.
        """
        try:
            found = _heads_of(self.base, folder)
            if (folder / "adapter").exists():
                self._add(name, str(folder / "adapter"))
                if bank := Bank.load(folder):
                    self._add_bank(name, bank, str(folder / "adapter"))
            else:
                self._bare.add(name)
        except Exception as error:  # whatever is wrong with a file must not end the server
            for part in (*self._members(name), name):
                self._forget(part)
            self._banks.pop(name, None)
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise AdapterError(lines[0]) from error
        if found is not None:
            self._heads[name] = found
        self.model.eval()

    def _add(self, name: str, folder: str) -> None:
        config = peft.PeftConfig.from_pretrained(folder)
        kind = str(getattr(config.peft_type, "value", config.peft_type)).upper()
        if kind not in MIXED:
            remedy = "export it with --as merged and serve that as a base"
            raise AdapterError(f"adapters of the type {kind.lower()} cannot share a batch; {remedy}")
        present = {type(other) for other in self._peft.peft_config.values()} if self._peft else {type(config)}
        if present != {type(config)}:
            raise AdapterError(f"it is of the type {kind.lower()}, the adapters already served are not")
        config.inference_mode = True
        if self._peft is None:
            self._peft = peft.PeftModelForCausalLM(self.base, config, adapter_name=name)
        result = self._peft.load_adapter(folder, adapter_name=name, is_trainable=False)
        lacking = [key for key in result.missing_keys if f".{name}." in f"{key}."]
        if lacking or result.unexpected_keys:
            raise AdapterError(f"its file does not fit this base: {(lacking or result.unexpected_keys)[0]}")

    def _add_bank(self, name: str, bank: Bank, folder: str) -> None:
        """Add every task of a bank as an adapter of its own; they have the same form as the step's."""
        self._banks[name] = bank.named(name)
        for member, weights in zip(self._members(name), bank.weights[1:], strict=True):
            self._add(member, folder)
            parameters = dict(self._peft.named_parameters())
            for key, value in weights.items():
                parameters[renamed(key, member)].data.copy_(value)

    def _members(self, name: str) -> list[str]:
        """The adapters of the tasks of a bank, in the order of its positions from 1 on."""
        return [f"{name}_{place}" for place in range(1, len(self._banks.get(name, [BASE])))]

    def unload(self, name: str) -> None:
        """Remove an adapter with its bank; the last one stays, since PEFT needs one."""
        for member in self._members(name):
            self.unload(member)
        self._banks.pop(name, None)
        self._bare.discard(name)
        self._heads.pop(name, None)
        if self._peft is not None and name in self._peft.peft_config and len(self._peft.peft_config) > 1:
            self._peft.delete_adapter(name)

    def _forget(self, name: str) -> None:
        """Remove what a failed load has left behind."""
        self._bare.discard(name)
        if self._peft is not None and set(self._peft.peft_config) - {name}:
            for module in self.base.modules():
                if isinstance(module, BaseTunerLayer):
                    module.delete_adapter(name)
            self._peft.peft_config.pop(name, None)
            return
        self._peft = None
        for parent in list(self.base.modules()):
            for child, module in parent.named_children():
                if isinstance(module, BaseTunerLayer):
                    setattr(parent, child, module.get_base_layer())
        for attribute in ("peft_config", "_hf_peft_config_loaded"):
            if attribute in self.base.__dict__:
                delattr(self.base, attribute)

    # -- running
    def routed(self, name: str, prompts: Sequence[Sequence[int]]) -> list[tuple[str, str | None]]:
        """For each prompt the adapter that answers it and its task; the adapter itself and None, if it has no bank."""
        bank = self._banks.get(name)
        if bank is None:
            return [(name, None)] * len(prompts)
        members = [BASE, *self._members(name)]
        with self._peft.disable_adapter():
            places = bank.router.route(bank.router.observe(self._peft, prompts)).tolist()
        return [(members[place], bank.tasks[place]) for place in places]

    def __call__(self, names: Sequence[str], **inputs: Any):
        """A forward pass in which row i uses the adapter `names[i]`, or none for `BASE`."""
        if self._peft is None:
            return self.base(**inputs)
        rows = [BASE if name in self._bare else name for name in names]
        return self._peft(adapter_names=rows, **inputs)

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[nn.Module]:
        """The model with this adapter and its heads only, as `curlora predict` loads it."""
        heads.detach_heads(self.base)
        if name in self._heads:
            setattr(self.base, heads.ATTRIBUTE, self._heads[name])
        try:
            if self._peft is None:
                yield self.base
            elif name == BASE or name in self._bare:
                with self._peft.disable_adapter():
                    yield self._peft
            else:
                self._peft.set_adapter(name)
                if name in self._banks:
                    self._banks[name].attach(self._peft)
                yield self._peft
        finally:
            detach(self.model)
            heads.detach_heads(self.base)


def _heads_of(base: nn.Module, folder: Path) -> nn.ModuleDict | None:
    """The classifier heads of a step's folder; None without any."""
    file = folder / "heads.safetensors"
    if not file.exists():
        return None
    saved = load_file(file)
    classes = {name.removesuffix(".bias"): len(t) for name, t in saved.items() if name.endswith(".bias")}
    try:
        found = heads.attach_heads(base, classes, seed=0)
        heads.load_heads(base, saved)
    finally:
        heads.detach_heads(base)
    return found

"""Adapters: attached to a base model, loaded from the parent step, saved and detached.

CURLoRA and all PEFT types take the same path; with `none` only classifier heads are trained.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import curlora  # noqa: F401  registers its tuner with PEFT
from pipelines.config.sections import AdapterConfig
from pipelines.errors import ConfigError, Problem, did_you_mean
from pipelines.models import frozen_lora
from pipelines.models.heads import ATTRIBUTE, detach_heads, saved_name

CURLORA_FIELDS = ("selection", "whiten", "scale")
STACKABLE = ("curlora", "lora")


def peft_config(adapter: AdapterConfig, seed: int):
    """The PEFT config of an `adapter:` section.

    Raises:
        ConfigError: unknown type or option, or a type that a chain cannot carry on.
    """
    types = {str(getattr(key, "value", key)).lower(): cls for key, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if adapter.type.lower() not in types:
        hint = did_you_mean(adapter.type, [*types, "none"])
        raise ConfigError([Problem("adapter.type", f"unknown adapter type '{adapter.type}', {hint}")])
    if adapter.carry == "stack" and adapter.type not in STACKABLE:
        reason = f"'{adapter.type}' cannot be stacked, only {' and '.join(STACKABLE)} can; use continue or fresh"
        raise ConfigError([Problem("adapter.carry", reason)])
    frozen_lora.check(adapter)
    config_class = types[adapter.type.lower()]
    if issubclass(config_class, peft.PromptLearningConfig):
        reason = f"'{adapter.type}' puts virtual tokens before the text; use an adapter inside the layers, e.g. lora"
        raise ConfigError([Problem("adapter.type", reason)])
    known = set(inspect.signature(config_class.__init__).parameters)
    values = {"r": adapter.r, "target_modules": adapter.target_modules, "seed": seed, "task_type": "CAUSAL_LM"}
    values["lora_alpha" if "lora_alpha" in known else "alpha"] = adapter.alpha
    if adapter.type == "curlora":
        values |= {field: getattr(adapter, field) for field in CURLORA_FIELDS}
        values["carry"] = "stack" if adapter.carry == "stack" else "continue"
    values = {key: value for key, value in values.items() if key in known}
    unknown = [key for key in adapter.options if key not in known]
    if unknown:
        hint = did_you_mean(unknown[0], known)
        raise ConfigError([Problem("adapter.options", f"{adapter.type} has no option '{unknown[0]}', {hint}")])
    try:
        return config_class(**(values | adapter.options))
    except ValueError as error:
        raise ConfigError([Problem("adapter", str(error))]) from error


def attach_adapter(
    base: nn.Module, adapter: AdapterConfig, seed: int, parent: Path | None = None, extend: bool = False
) -> nn.Module:
    """Attach the adapter to `base`: new, or with the weights saved in the folder `parent`.

    Args:
        extend: to train the next task: `carry: stack` adds a block to those of `parent`, `carry: fresh` and `bank`
            replace it by a new adapter.

    Raises:
        ConfigError: the adapter does not fit the model (rank, module names, blocks).
    """
    if adapter.type == "none":
        base.requires_grad_(False)
        return base
    if extend and adapter.carry in ("fresh", "bank"):
        parent = None
    config = peft_config(adapter, seed)
    torch.manual_seed(seed)  # LoRA's A is random; it must be equal on all ranks and in all runs
    try:
        if frozen_lora.has_frozen_part(adapter):
            return frozen_lora.attach(base, config, adapter, parent, extend)
        return _attach(base, config, parent, extend)
    except ValueError as error:
        raise ConfigError([Problem("adapter", str(error))]) from error


def _attach(base: nn.Module, config, parent: Path | None, extend: bool) -> nn.Module:
    stacked = getattr(config, "carry", None) == "stack"
    if parent is not None and stacked:
        config.blocks = peft.PeftConfig.from_pretrained(str(parent)).blocks
        config.load_only = True  # C and R are read from the file
    model = peft.get_peft_model(base, config)
    if parent is not None:
        weights = peft.utils.save_and_load.load_peft_weights(str(parent), device="cpu")
        result = peft.set_peft_model_state_dict(model, weights)
        if result.unexpected_keys:
            raise RuntimeError(f"{parent} holds weights that this model lacks: {result.unexpected_keys[:3]}")
        if stacked and extend:
            model.base_model.add_block()
    return model


def attach_final_form(base: nn.Module, adapter: AdapterConfig, seed: int, steps: int) -> nn.Module:
    """Attach the adapter to `base` (on the meta device) in the form in which it is published after `steps` steps.

    Raises:
        ConfigError: a layer cannot hold as many blocks as there are steps.
    """
    if adapter.type not in STACKABLE:
        return attach_adapter(base, adapter, seed)
    config = peft_config(adapter, seed)
    if adapter.type == "lora":
        config = frozen_lora.widened(
            config, steps if adapter.carry == "stack" else 1 + frozen_lora.changes_base(adapter)
        )
    elif adapter.carry == "stack":
        config.blocks = steps
    try:
        return peft.get_peft_model(base, config)
    except ValueError as error:
        raise ConfigError([Problem("adapter", str(error))]) from error


def detach_adapter(model: nn.Module) -> nn.Module:
    """Remove adapter and heads; returns the base."""
    detach_heads(model)
    return model.unload() if hasattr(model, "unload") else model


def split_weights(weights: Mapping[str, torch.Tensor]) -> tuple[dict, dict]:
    """Split trained parameters and adapter buffers into (adapter, heads), heads under their file names."""
    heads = {saved_name(name): tensor for name, tensor in weights.items() if saved_name(name)}
    adapter = {name: tensor for name, tensor in weights.items() if f"{ATTRIBUTE}." not in name}
    return adapter, heads


def save_adapter(model: nn.Module, weights: Mapping[str, torch.Tensor], folder: Path, base: str | None = None) -> int:
    """Write `adapter/` in PEFT's format and `heads.safetensors`; returns the adapter's size in bytes (0 without one).

    Args:
        weights: whole (gathered) tensors by parameter name, including adapter buffers.
        base: name of the base to write into `adapter_config.json`; None: where it was loaded from.
    """
    adapter, heads = split_weights(weights)
    if heads:
        save_file({name: tensor.contiguous() for name, tensor in heads.items()}, folder / "heads.safetensors")
    if not hasattr(model, "peft_config"):
        return 0
    with _joined(model):
        # save_embedding_layers=False: otherwise PEFT asks the hub for the base's vocabulary
        model.save_pretrained(
            folder / "adapter",
            state_dict=_buffers(model) | frozen_lora.join(adapter),
            save_embedding_layers=False,
            selected_adapters=[frozen_lora.TRAINED],
        )
        named = {"base_model_name_or_path": base} if base else {}
        _rewrite(folder / "adapter" / "adapter_config.json", model.peft_config[frozen_lora.TRAINED], named)
    (folder / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's empty model card; ours has scores
    file = folder / "adapter" / "adapter_model.safetensors"
    _check_shapes(file, adapter)
    return file.stat().st_size


def _rewrite(file: Path, config, values: Mapping[str, str]) -> None:
    """Set values of a saved PEFT config, and sort its sets, whose order differs between processes, so that equal
    adapters have equal bytes."""
    sets = {name: sorted(value) for name, value in vars(config).items() if isinstance(value, set)}
    raw = json.loads(file.read_text()) | sets | dict(values)
    file.write_text(json.dumps(raw, indent=2, sort_keys=True))


def _buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """All persistent buffers of the model: some adapters keep projections there. PEFT saves only its own."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


@contextlib.contextmanager
def _joined(model: nn.Module):
    """Give the model the PEFT config of its published form, with trained and frozen part as one adapter."""
    trained = model.peft_config[frozen_lora.TRAINED]
    model.peft_config[frozen_lora.TRAINED] = frozen_lora.joined_config(model)
    try:
        yield
    finally:
        model.peft_config[frozen_lora.TRAINED] = trained


def _check_shapes(file: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse to publish empty tensors, which is what a partitioned parameter would be saved as."""
    with safe_open(file, "pt") as saved:
        sizes = [saved.get_slice(name).get_shape() for name in saved.keys()]  # noqa: SIM118
    if not sizes or any(0 in size for size in sizes):
        raise RuntimeError(f"{file} holds empty tensors: parameters were not gathered before saving")


def adapter_prefix(model: nn.Module) -> str:
    """Prefix of the adapter's parameter names; matches none if there is no adapter."""
    return model.base_model.prefix if hasattr(model, "peft_config") else "\0"


def adapter_parameters(model: nn.Module) -> int:
    """Number of trainable parameters without heads; partitioned ones count in full."""
    return sum(
        getattr(p, "ds_numel", p.numel())
        for name, p in model.named_parameters()
        if p.requires_grad and f"{ATTRIBUTE}." not in name
    )

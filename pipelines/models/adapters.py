"""What trains: the adapter of a configuration, put around a base model, loaded from its parent, saved and taken off.

CURLoRA and every PEFT type come by the same way; `none` leaves the base bare (only heads train).
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
    """The PEFT configuration object that an `adapter:` section means.

    Raises:
        ConfigError: unknown type or option, or a kind that cannot go through a chain.
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
        reason = (
            f"'{adapter.type}' puts virtual tokens before the text; choose an adapter inside the layers, e.g. lora"
        )
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
    """`base` with the adapter around it: new, or with the weights saved in the adapter directory `parent`.

    Args:
        extend: for training the next task: under `carry: stack` a new block comes after those of `parent`, under
            `carry: fresh` a new adapter takes its place.

    Raises:
        ConfigError: the adapter does not fit the model (rank, module names, blocks).
    """
    if adapter.type == "none":
        base.requires_grad_(False)
        return base
    if extend and adapter.carry == "fresh":
        parent = None
    config = peft_config(adapter, seed)
    torch.manual_seed(seed)  # LoRA's A is random: the same on every rank and in every run
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
        config.load_only = True  # rows and columns come out of the file
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
    """`base` (on the meta device) with the adapter as it is published after so many steps: its size and its fit.

    Raises:
        ConfigError: a layer holds fewer blocks than there are steps.
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
    """The bare base again, without heads."""
    detach_heads(model)
    return model.unload() if hasattr(model, "unload") else model


def split_weights(weights: Mapping[str, torch.Tensor]) -> tuple[dict, dict]:
    """(adapter weights, head weights under their file names) of trained parameters and adapter buffers."""
    heads = {saved_name(name): tensor for name, tensor in weights.items() if saved_name(name)}
    adapter = {name: tensor for name, tensor in weights.items() if f"{ATTRIBUTE}." not in name}
    return adapter, heads


def save_adapter(model: nn.Module, weights: Mapping[str, torch.Tensor], folder: Path) -> int:
    """Write `adapter/` as PEFT does and `heads.safetensors`; returns the adapter file's bytes (0 without adapter).

    Args:
        weights: full (gathered) tensors by parameter name, adapter buffers included.
    """
    adapter, heads = split_weights(weights)
    if heads:
        save_file({name: tensor.contiguous() for name, tensor in heads.items()}, folder / "heads.safetensors")
    if not hasattr(model, "peft_config"):
        return 0
    with _joined(model):
        # save_embedding_layers=False: PEFT would otherwise ask the model hub for the base's vocabulary
        model.save_pretrained(
            folder / "adapter",
            state_dict=_buffers(model) | frozen_lora.join(adapter),
            save_embedding_layers=False,
            selected_adapters=[frozen_lora.TRAINED],
        )
        _sort_sets(folder / "adapter" / "adapter_config.json", model.peft_config[frozen_lora.TRAINED])
    (folder / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's model card template says nothing
    file = folder / "adapter" / "adapter_model.safetensors"
    _check_shapes(file, adapter)
    return file.stat().st_size


def _sort_sets(file: Path, config) -> None:
    """PEFT writes sets in an order that differs from process to process; the same adapter shall be the same bytes."""
    sets = {name: sorted(value) for name, value in vars(config).items() if isinstance(value, set)}
    raw = json.loads(file.read_text()) | sets
    file.write_text(json.dumps(raw, indent=2, sort_keys=True))


def _buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every saved buffer of the model: some adapters keep projections in them; PEFT chooses its own."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


@contextlib.contextmanager
def _joined(model: nn.Module):
    """Inside, the model's configuration is that of its published form: trained and frozen parts as one adapter."""
    trained = model.peft_config[frozen_lora.TRAINED]
    model.peft_config[frozen_lora.TRAINED] = frozen_lora.joined_config(model)
    try:
        yield
    finally:
        model.peft_config[frozen_lora.TRAINED] = trained


def _check_shapes(file: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """A partitioned parameter would be saved as an empty shard: never publish that."""
    with safe_open(file, "pt") as saved:
        sizes = [saved.get_slice(name).get_shape() for name in saved.keys()]  # noqa: SIM118
    if not sizes or any(0 in size for size in sizes):
        raise RuntimeError(f"{file} holds empty tensors: parameters were not gathered before saving")


def adapter_prefix(model: nn.Module) -> str:
    return model.base_model.prefix if hasattr(model, "peft_config") else "\0"


def adapter_parameters(model: nn.Module) -> int:
    """Trainable numbers of the adapter, heads not counted (full sizes, also of partitioned parameters)."""
    return sum(
        getattr(p, "ds_numel", p.numel())
        for name, p in model.named_parameters()
        if p.requires_grad and f"{ATTRIBUTE}." not in name
    )

"""LoRA adapters with a trained and a frozen part, published as *one* ordinary LoRA adapter.

During training the model has two PEFT adapters: `default` (trained) and `frozen`. The frozen part is

- under `carry: stack`, the sum of the LoRAs of all earlier tasks;
- under an initialisation from the base (PiSSA, OLoRA), the negative of its factors: W + s (B A − B₀ A₀) equals what
  PEFT computes with the changed base W − s B₀ A₀, but here the base stays unchanged for the next task and for users.

Since s B A + s B' A' = s [B B'] [A; A'], the published file is a LoRA of rank r · (1 + blocks) that PEFT can load.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

from curlora.layer import gathered
from pipelines.config.sections import AdapterConfig
from pipelines.errors import ConfigError, Problem

TRAINED, FROZEN = "default", "frozen"

KEEP_BASE = (True, False, "gaussian", "orthogonal")  # initialisations that leave the base unchanged
FROM_BASE = ("pissa", "olora")  # initialisations from the base's weights


def initialisation(adapter: AdapterConfig):
    """PEFT's option init_lora_weights."""
    return adapter.options.get("init_lora_weights", True)


def changes_base(adapter: AdapterConfig) -> bool:
    """Whether the initialisation would subtract its factors from the base."""
    value = initialisation(adapter)
    return adapter.type == "lora" and isinstance(value, str) and value.split("_")[0] in FROM_BASE


def has_frozen_part(adapter: AdapterConfig) -> bool:
    """Whether an adapter is trained beside a frozen one."""
    return adapter.type == "lora" and (adapter.carry == "stack" or changes_base(adapter))


def check(adapter: AdapterConfig) -> None:
    """Raise ConfigError for a LoRA that cannot be represented beside an unchanged base."""
    if adapter.type != "lora":
        return
    value = initialisation(adapter)
    where = "adapter.options.init_lora_weights"
    if not changes_base(adapter) and value not in KEEP_BASE:
        choices = "true, false, gaussian, orthogonal, pissa, pissa_niter_16, olora"
        raise ConfigError([Problem(where, f"'{value}' needs data or a changed base; use one of: {choices}")])
    if changes_base(adapter) and adapter.carry == "stack":
        message = f"'{value}' starts every block of a stack at the same directions; use another one or carry: continue"
        raise ConfigError([Problem(where, message)])
    if has_frozen_part(adapter) and adapter.options.get("use_dora"):
        why = "DoRA rescales the whole weight, so it is not a sum of a frozen and a trained part"
        raise ConfigError([Problem("adapter.options.use_dora", f"{why}; remove it, or stack and '{value}'")])


def widened(config, parts: int):
    """A LoRA configuration of rank parts · r whose scale in every layer is that of `config`."""
    wide = copy.deepcopy(config)
    growth = math.sqrt(parts) if config.use_rslora else parts
    wide.r, wide.lora_alpha = config.r * parts, config.lora_alpha * growth
    wide.rank_pattern = {name: rank * parts for name, rank in config.rank_pattern.items()}
    wide.alpha_pattern = {name: alpha * growth for name, alpha in config.alpha_pattern.items()}
    wide.init_lora_weights = True
    return wide


def attach(base: nn.Module, config, adapter: AdapterConfig, parent: Path | None, extend: bool) -> nn.Module:
    """Attach a trained and a frozen LoRA to `base`, new or from the folder `parent`.

    Args:
        config: LoraConfig of the trained part.
        extend: train the next task from `parent`; else load `parent` as it is, for evaluation.
    """
    if parent is not None and not extend:
        saved = peft.PeftConfig.from_pretrained(str(parent))
        saved.inference_mode = False
        model = peft.get_peft_model(base, saved)
        _load(model, parent, TRAINED)
        return model
    initial = config.init_lora_weights
    config.init_lora_weights = True if changes_base(adapter) else initial
    model = peft.get_peft_model(base, config)
    config.init_lora_weights = initial
    if adapter.carry == "stack":
        if parent is not None:
            saved = peft.PeftConfig.from_pretrained(str(parent))
            _add_frozen(model, widened(config, saved.r // config.r))
            _load(model, parent, FROZEN)
        return model
    _add_frozen(model, widened(config, 1))
    if parent is not None:
        _load(model, parent, TRAINED, FROZEN)
    else:
        _take_from_base(model, initial)
    return model


def _add_frozen(model: nn.Module, config) -> None:
    model.add_adapter(FROZEN, config)
    model.base_model.set_adapter([TRAINED, FROZEN])
    for name, parameter in model.named_parameters():
        if f".{FROZEN}." in name:
            parameter.requires_grad_(False)


def _load(model: nn.Module, folder: Path, *adapters: str) -> None:
    """Copy a saved LoRA into the named adapters of the model, which share its ranks in this order."""
    weights = peft.utils.save_and_load.load_peft_weights(str(folder), device="cpu")
    for adapter in adapters:
        parts = weights
        if len(adapters) > 1:
            parts = {key: _part(model, key, value, adapter) for key, value in weights.items()}
        result = peft.set_peft_model_state_dict(model, parts, adapter_name=adapter)
        if result.unexpected_keys:
            raise RuntimeError(f"{folder} holds weights that this model lacks: {result.unexpected_keys[:3]}")


def _part(model: nn.Module, key: str, value: Tensor, adapter: str) -> Tensor:
    """The part of a saved factor of one adapter: the first ranks are the trained ones."""
    axis = _rank_axis(key)
    width = model.get_parameter(key.replace(".weight", f".{TRAINED}.weight")).shape[axis]
    first, last = value.tensor_split([width], dim=axis)
    return (first if adapter == TRAINED else last).contiguous()


def _rank_axis(name: str) -> int:
    """A is (r, n), B is (m, r)."""
    return 0 if ".lora_A." in name else 1


def _take_from_base(model: nn.Module, initial: str) -> None:
    """Initialise the trained part with A₀, B₀ and the frozen one with A₀, −B₀ of every layer; the base is unchanged.

    Layer by layer, so that at most one weight exists twice. Skipped on the meta device.
    """
    for module in model.modules():
        if TRAINED not in getattr(module, "lora_A", {}):
            continue
        base = module.get_base_layer()
        if base.weight.is_meta:
            continue
        with gathered(base.weight), torch.no_grad():
            weight = base.weight.data.clone()
            if initial.startswith("pissa"):
                module.pissa_init(TRAINED, initial)
            else:
                module.olora_init(TRAINED)
            base.weight.data = weight
        for factor, sign in ((module.lora_A, 1), (module.lora_B, -1)):
            factor[FROZEN].weight.data.copy_(sign * factor[TRAINED].weight.data)


def join(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Concatenate the weights of both parts to those of one adapter `default`, trained ranks first."""
    joined = {}
    for name, tensor in weights.items():
        if f".{FROZEN}." in name:
            continue
        beside = weights.get(name.replace(f".{TRAINED}.", f".{FROZEN}.")) if f".{TRAINED}." in name else None
        joined[name] = tensor if beside is None else torch.cat([tensor, beside], dim=_rank_axis(name)).contiguous()
    return joined


def joined_config(model: nn.Module):
    """The LoraConfig of `join`ed weights."""
    config = model.peft_config[TRAINED]
    if FROZEN not in model.peft_config:
        return config
    return widened(config, 1 + model.peft_config[FROZEN].r // config.r)

"""LoRA adapters whose frozen part lies beside the trained one, published as *one* ordinary LoRA adapter.

While it trains, the model has two PEFT adapters: `default` (trained) and `frozen`. The frozen part is

- under `carry: stack`, the sum of all earlier tasks' LoRAs;
- under an initialisation that takes A₀, B₀ out of the base (PiSSA, OLoRA), their negative: W + s (B A − B₀ A₀) is
  what PEFT computes with W − s B₀ A₀, but the base stays as it is, for the next task and for whoever loads the file.

Since s B A + s B' A' = s [B B'] [A; A'], the file is a LoRA of rank r · (1 + blocks) that any PEFT loads.
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

ON_THE_SPOT = (True, False, "gaussian", "orthogonal")  # initialisations that leave the base alone

FROM_THE_BASE = ("pissa", "olora")


def initialisation(adapter: AdapterConfig):
    return adapter.options.get("init_lora_weights", True)


def changes_base(adapter: AdapterConfig) -> bool:
    """Whether the initialisation would take its factors out of the base."""
    value = initialisation(adapter)
    return adapter.type == "lora" and isinstance(value, str) and value.split("_")[0] in FROM_THE_BASE


def has_frozen_part(adapter: AdapterConfig) -> bool:
    return adapter.type == "lora" and (adapter.carry == "stack" or changes_base(adapter))


def check(adapter: AdapterConfig) -> None:
    """Raises ConfigError for a kind of LoRA that this system cannot keep apart from its base."""
    if adapter.type != "lora":
        return
    value = initialisation(adapter)
    where = "adapter.options.init_lora_weights"
    if not changes_base(adapter) and value not in ON_THE_SPOT:
        choices = "true, false, gaussian, orthogonal, pissa, pissa_niter_16, olora"
        raise ConfigError([Problem(where, f"'{value}' needs data or a changed base; use one of: {choices}")])
    if changes_base(adapter) and adapter.carry == "stack":
        message = f"'{value}' starts every block of a stack at the same directions; use another one or carry: continue"
        raise ConfigError([Problem(where, message)])
    if has_frozen_part(adapter) and adapter.options.get("use_dora"):
        why = "DoRA rescales the whole weight, so it is no sum of a frozen and a trained part"
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
    """`base` with a trained and a frozen LoRA, new or out of the adapter directory `parent`.

    Args:
        config: LoraConfig of the trained part.
        extend: `parent` is what the next task starts from, else it is what is to be evaluated.
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
    """Copy a saved LoRA into the named adapters of the model, rank after rank."""
    weights = peft.utils.save_and_load.load_peft_weights(str(folder), device="cpu")
    for adapter in adapters:
        parts = weights
        if len(adapters) > 1:
            parts = {key: _part(model, key, value, adapter) for key, value in weights.items()}
        result = peft.set_peft_model_state_dict(model, parts, adapter_name=adapter)
        if result.unexpected_keys:
            raise RuntimeError(f"{folder} holds weights that this model lacks: {result.unexpected_keys[:3]}")


def _part(model: nn.Module, key: str, value: Tensor, adapter: str) -> Tensor:
    """The ranks of a saved factor that belong to the trained part (the first ones) or to the frozen one."""
    axis = _rank_axis(key)
    width = model.get_parameter(key.replace(".weight", f".{TRAINED}.weight")).shape[axis]
    first, last = value.tensor_split([width], dim=axis)
    return (first if adapter == TRAINED else last).contiguous()


def _rank_axis(name: str) -> int:
    """A is (r, n), B is (m, r)."""
    return 0 if ".lora_A." in name else 1


def _take_from_base(model: nn.Module, initial: str) -> None:
    """A₀, B₀ of every layer into the trained part, A₀, −B₀ into the frozen one; the base comes out unchanged.

    Layer by layer, so that no more than one weight is ever there twice. On the meta device there is nothing to take.
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
    """The weights of both parts, by parameter name, as those of one adapter `default` (trained ranks first)."""
    joined = {}
    for name, tensor in weights.items():
        if f".{FROZEN}." in name:
            continue
        beside = weights.get(name.replace(f".{TRAINED}.", f".{FROZEN}.")) if f".{TRAINED}." in name else None
        joined[name] = tensor if beside is None else torch.cat([tensor, beside], dim=_rank_axis(name)).contiguous()
    return joined


def joined_config(model: nn.Module):
    """The configuration that belongs to `join`ed weights."""
    config = model.peft_config[TRAINED]
    if FROZEN not in model.peft_config:
        return config
    return widened(config, 1 + model.peft_config[FROZEN].r // config.r)

"""A new adapter as the weighted sum of others, and one adapter replaced by another while a model serves.

Both are exact: adapters with the same rows and columns differ in U alone, in which ΔW is linear.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor

from .config import CurloraConfig
from .core import CoreSettings, CurloraCore
from .layer import Linear
from .record import check_state
from .zero import gathered

# ---------------------------------------------------------------------------------------------- weighted sums


def add_weighted(model: BaseTuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    """Add an adapter with ΔW = Σ weight · ΔW of the given ones, layer by layer.

    Raises ValueError, before anything changes, if the adapters do not share rows, columns and form in every layer.
    """
    _check_sum(model, adapters, weights, adapter_name)
    sources = {name: (layer, _weighted(layer, adapters, weights)) for name, layer in _layers_of(model, adapters)}
    model.peft_config[adapter_name] = _joint_config(model, adapters, {n: parts for n, (_, parts) in sources.items()})
    model.inject_adapter(model.model, adapter_name)
    for layer, parts in sources.values():
        core, (first, _) = layer.curlora_core[adapter_name], parts[0]
        with torch.no_grad(), gathered(core.U, modifier_rank=0):
            core.record.copy_(first.record)
            core.U.copy_(sum(_u(source) * (w * source.settings.alpha / core.settings.alpha) for source, w in parts))
            if core.settings.blocks > 1:
                core.frozen.copy_(sum(source.frozen * (w * _relative_alpha(source, core)) for source, w in parts))
        layer.rebuild(core)


def _u(core: CurloraCore) -> Tensor:
    """U as it counts: within ``max_update_norm``."""
    with gathered(core.U):
        bound = core.settings.config.max_update_norm
        return core.U.detach().float() * (1 if bound is None else core.shrinkage())


def _relative_alpha(source: CurloraCore, target: CurloraCore) -> float:
    return source.settings.alpha / target.settings.alpha


def _layers_of(model: BaseTuner, adapters: Sequence[str]) -> Iterator[tuple[str, Linear]]:
    for name, layer in model.adapted_layers():
        if any(adapter in layer.curlora_core for adapter in adapters):
            layer.refresh()
            yield name, layer


def _weighted(layer: Linear, adapters: Sequence[str], weights: Sequence[float]) -> list[tuple[CurloraCore, float]]:
    pairs = zip(adapters, weights, strict=True)
    return [(layer.curlora_core[name], weight) for name, weight in pairs if name in layer.curlora_core]


def _check_sum(model: BaseTuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    unknown = [name for name in adapters if name not in model.peft_config]
    if unknown or not adapters:
        raise ValueError(f"Adapter {[*unknown, None][0]!r} does not exist; there are {[*model.peft_config]}.")
    if len(weights) != len(adapters):
        raise ValueError(f"{len(adapters)} adapters need as many weights, but there are {len(weights)}.")
    if adapter_name in model.peft_config:
        raise ValueError(f"Adapter {adapter_name!r} already exists; choose another name or delete it first.")
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and sum(name in module.modules_to_save for name in adapters) > 1:
            raise ValueError("Adapters that both train the same of modules_to_save cannot be added.")
    for name, layer in _layers_of(model, adapters):
        cores = [core for core, _ in _weighted(layer, adapters, weights)]
        forms = {(core.place, core.settings.blocks, core.right is None, core.settings.config.scale) for core in cores}
        if len(forms) > 1 or not all(core.ready for core in cores):
            raise ValueError(
                f"{name}: the adapters {list(adapters)} differ in their rows and columns, in blocks, whiten or scale, "
                "so that their sum is no CURLoRA adapter of that rank; give them one seed and selection, or convert "
                "them by curlora.conversion.to_lora and combine those by 'cat'."
            )


def _joint_config(model: BaseTuner, adapters: Sequence[str], parts: dict[str, list]) -> CurloraConfig:
    """The first adapter's configuration, for the layers of all of them."""
    config = copy.copy(model.peft_config[adapters[0]])
    settings = {name: found[0][0].settings for name, found in parts.items()}
    config.target_modules = set(parts)
    config.exclude_modules, config.layers_to_transform, config.layers_pattern = None, None, None
    config.modules_to_save = None
    config.rank_pattern = {name: s.r for name, s in settings.items() if s.r != config.r}
    config.alpha_pattern = {name: s.alpha for name, s in settings.items() if s.alpha != config.alpha}
    config.inference_mode = False
    config.load_only = True
    return config


# --------------------------------------------------------------------------------------------------- hot swap


def hotswap(model: BaseTuner, directory: str | os.PathLike, adapter_name: str) -> None:
    """Replace an adapter by one from a directory, in place: a compiled model is not compiled again.

    Rows, columns, alpha, seed and rule may differ; layers, ranks, blocks, ``whiten``, ``dropout`` and
    ``max_update_norm`` may not. Raises ValueError, and leaves the old adapter in place, if the new one does not fit.
    """
    new, old = CurloraConfig.from_pretrained(directory), model.peft_config[adapter_name]
    for field in ("whiten", "dropout", "max_update_norm", "blocks"):
        if getattr(new, field) != getattr(old, field):
            raise ValueError(
                f"{directory} cannot be swapped in for adapter {adapter_name!r}: it has {field}="
                f"{getattr(new, field)!r} instead of {getattr(old, field)!r}; load it as another adapter."
            )
    cores = {f"base_model.model.{name}.curlora_core.": (lin, core) for name, lin, core in model.cores(adapter_name)}
    merged = next((core.settings.key for layer, core in cores.values() if layer.merged), None)
    if merged is not None:
        raise RuntimeError(f"{merged}: unmerge the adapters before one is swapped.")
    state = load_peft_weights(str(directory), device="cpu")
    extra = [key for key in state if ".curlora_core." not in key]
    if extra:
        raise ValueError(f"{directory} also holds {extra[0]!r}, which cannot be swapped; load it as another adapter.")
    wanted = {
        stem + name: tensor
        for stem, (_, core) in cores.items()
        for name, tensor in core.state_dict().items()
        if name in ("U", "record", "frozen")
    }
    check_state(adapter_name, wanted, state)
    before = {key: tensor.clone() for key, tensor in wanted.items()}
    try:
        _put(cores, state, new)
    except ValueError:
        _put(cores, before, old)
        raise
    new.inference_mode = old.inference_mode
    model.peft_config[adapter_name] = new


def _put(cores: dict[str, tuple[Linear, CurloraCore]], state: dict[str, Tensor], config: CurloraConfig) -> None:
    for stem, (layer, core) in cores.items():
        core.settings = CoreSettings.of(config, core.settings.key, core.settings.blocks)
        with torch.no_grad(), gathered(core.U, modifier_rank=0):
            for name in ("U", "record", "frozen"):
                if stem + name in state:
                    getattr(core, name).copy_(state[stem + name])
        layer.rebuild(core)

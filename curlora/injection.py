"""Putting an adapted layer in the place of a model's own, for any tuner of PEFT that injects adapters."""

from __future__ import annotations

from dataclasses import replace

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import nn

from .config import CurloraConfig
from .core import CoreSettings
from .cur import SelectionError
from .kinds import kind_of
from .layer import CurloraLayer


def inject(
    tuner: BaseTuner,
    config: CurloraConfig,
    adapter_name: str,
    target: nn.Module,
    target_name: str,
    parent: nn.Module,
    key: str,
) -> None:
    """Add the adapter to the layer named ``key``.

    Raises SelectionError if it has too few independent rows or columns; of the default targets, such a layer gets a
    smaller rank, or none.
    """
    key = key.removeprefix("_orig_mod.")
    settings = CoreSettings.of(config, key)
    while settings.r:
        try:
            return _adapt(tuner, adapter_name, target, target_name, parent, settings)
        except SelectionError as error:
            if not hasattr(config, "defaults"):
                raise
            possible = error.possible
        settings = replace(settings, r=min(possible, settings.r - 1))
        config.defaults.lower(key, settings.r, config)


def _adapt(
    tuner: BaseTuner,
    adapter_name: str,
    target: nn.Module,
    target_name: str,
    parent: nn.Module,
    settings: CoreSettings,
) -> None:
    if isinstance(target, CurloraLayer):
        target.update_layer(adapter_name, settings, inference_mode=settings.config.inference_mode)
        return
    base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    kind = kind_of(base)
    if kind is None:
        raise ValueError(
            f"{settings.key}: a layer of type {type(base).__name__} cannot be adapted, only dense layers "
            "(torch.nn.Linear, transformers' Conv1D and their quantised forms), embeddings and convolutions; "
            "remove it from target_modules."
        )
    # torchao needs these to requantise after a merge
    layer = kind(target, adapter_name, settings, **get_quantization_kwargs(tuner.model))
    if adapter_name not in tuner.active_adapters:
        layer.requires_grad_(False)
    tuner._replace_module(parent, target_name, layer, target)

"""Experts of a mixture model: which of their weights no adapter reaches."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.conv import _ConvNd

LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def fused_experts(base: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of experts that are not dense layers, by name; `base` has no adapter.

    Transformers 5 keeps the experts of a block in tensors (experts, outputs, inputs), which adapters of dense layers
    do not reach.
    """
    return {
        f"{path}.{name}": parameter
        for path, module in base.named_modules()
        if not isinstance(module, _ConvNd) and any(map(_is_fused, module.parameters(recurse=False)))
        for name, parameter in module.named_parameters(recurse=False)
    }


def _is_fused(parameter: nn.Parameter) -> bool:
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) == 3 and shape[0] > 1


def unadapted(fused: Mapping[str, nn.Parameter], model: nn.Module) -> dict[str, int]:
    """Number of parameters in `fused` tensors that no adapter of `model` changes, by name with `*` for the layer."""
    adapted = {
        id(getattr(module.get_base_layer(), getattr(module, "parameter_name", "weight"), None))
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
    }
    numbers: Counter[str] = Counter()
    for name, parameter in fused.items():
        if id(parameter) not in adapted:
            numbers[LAYER.sub("*", name)] += parameter.numel()
    return dict(numbers)

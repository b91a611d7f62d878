"""Which layers the default, all linear layers, stands for in a given model."""

from __future__ import annotations

import copy
import re

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import nn

from .config import ALL_LINEAR, CurloraConfig


def all_linear(model: nn.Module, config: CurloraConfig) -> set[str]:
    """Names of all dense layers but the output head, of the transformer layers in ``layers_to_transform``.

    Raises ValueError if the model has no such layers.
    """
    expanded = copy.copy(config)
    expanded.target_modules = ALL_LINEAR
    names = set(_maybe_include_all_linear_layers(expanded, model).target_modules)
    if config.layers_to_transform is None or config.layers_to_transform == []:
        return names
    return _in_layers(names, config)


def _in_layers(names: set[str], config: CurloraConfig) -> set[str]:
    """Those in the wanted transformer layers, counted as PEFT counts them."""
    wanted = config.layers_to_transform
    wanted = {wanted} if isinstance(wanted, int) else set(wanted)
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    expressions = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns] if patterns else [r".*?\.[^.]*\.(\d+)\."]
    matches = ((name, re.match(expression, name)) for name in names for expression in expressions)
    found = {name: int(match[1]) for name, match in matches if match is not None}
    chosen = {name for name, index in found.items() if index in wanted}
    if not chosen:
        raise ValueError(
            f"CurloraConfig: layers_to_transform={config.layers_to_transform!r} names no layer of this model, whose "
            f"linear layers are in layers {sorted(set(found.values()))} (layers_pattern={config.layers_pattern!r})."
        )
    return chosen

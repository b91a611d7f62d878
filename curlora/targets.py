"""Which layers the default, all linear layers, stands for in a given model, and at which rank.

An explicit ``target_modules`` is taken literally, and a layer that does not fit is an error. The default takes what it
can: a layer that is too small gets a smaller rank, what cannot be adapted is left out, and one warning says so.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from .config import ALL_LINEAR, CurloraConfig

HEADS = ("score", "classifier", "qa_outputs")
"""Output heads of Transformers' models for classification and question answering, by their names in the model."""

DEPENDENT = "rows or columns that are zero or dependent"

MIXER_LAYERS = ("x_proj", "dt_proj", "out_proj")
"""Layers of a state space mixer whose weights are handed to a kernel, which passes by an adapter around the layer."""


@dataclass
class Defaults:
    """What became of "all linear layers" in one model."""

    names: set[str] = field(default_factory=set)
    """Layers to adapt."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Layer → its rank, where that is smaller than the configured one."""
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Reason → what is not adapted."""

    @property
    def failed(self) -> list[str]:
        """Layers in which no rank finds independent rows and columns."""
        return self.left_out.get(DEPENDENT, [])

    def lower(self, name: str, rank: int, config: CurloraConfig) -> None:
        """Give a layer whose rows or columns are dependent a smaller rank; 0 leaves it out."""
        patterns = {key: value for key, value in config.rank_pattern.items() if key != name}
        if rank:
            self.ranks[name] = rank
            patterns = {name: rank} | patterns
        else:
            self.ranks.pop(name, None)
            self.left_out[DEPENDENT].append(name)
        config.rank_pattern = patterns

    def warn(self) -> None:
        """One warning that names everything that is not as configured."""
        if self.summary():
            warnings.warn(f"CURLoRA on all linear layers: {self.summary()}.", stacklevel=2)

    def summary(self) -> str:
        """What is not as configured, in words; empty if all is."""
        parts = []
        if self.ranks:
            lowered = Counter((_wildcard(name), rank) for name, rank in self.ranks.items())
            parts.append("a smaller rank for " + _listed({f"{name} (r={r})": n for (name, r), n in lowered.items()}))
        for reason, names in self.left_out.items():
            parts.append(f"not adapted, {reason}: " + _listed(Counter(map(_wildcard, names))))
        return "; ".join(parts)


def default_targets(model: nn.Module, config: CurloraConfig) -> Defaults:
    """All dense layers but output heads, of the transformer layers in ``layers_to_transform``.

    Raises ValueError if the model has no such layers.
    """
    expanded = copy.copy(config)
    expanded.target_modules = ALL_LINEAR
    expanded.target_modules = _maybe_include_all_linear_layers(expanded, model).target_modules
    names = {name for name in expanded.target_modules if check_target_module_exists(expanded, name)}
    if config.layers_to_transform is not None and config.layers_to_transform != []:
        names = _in_layers(names, config)
    found = Defaults()
    modules = dict(model.named_modules())
    for name in sorted(names):
        _place(name, modules, config, found)
    if not config.layers_to_transform:
        _note_fused(modules, found)
    return found


def _place(name: str, modules: dict[str, nn.Module], config: CurloraConfig, found: Defaults) -> None:
    """Add a layer to those that are adapted, at a rank that fits, or to those that are left out."""
    parent, _, own = name.rpartition(".")
    if name.partition(".")[0] in HEADS:
        if config.task_type is None:  # else PEFT trains them
            found.left_out["output heads (name them in modules_to_save to train them)"].append(name)
    elif (own in MIXER_LAYERS and hasattr(modules.get(parent), "A_log")) or isinstance(
        modules.get(parent), nn.MultiheadAttention
    ):
        found.left_out["weights that the model passes to a kernel instead of calling the layer"].append(name)
    else:
        rank, limit = rank_of(config, name), smaller_side(modules[name])
        if limit is not None and limit < rank:
            if config.carry == "stack":
                found.left_out[f"too small for r={rank}"].append(name)
                return
            found.ranks[name] = limit
        found.names.add(name)


def exclude_also(config: CurloraConfig, names: list[str]) -> None:
    """Add layers to ``exclude_modules``, so that a saved adapter does not expect them."""
    if not names:
        return
    config.target_modules = config.target_modules - set(names)
    if isinstance(config.exclude_modules, str):
        config.exclude_modules = "|".join([f"({config.exclude_modules})", *map(re.escape, names)])
    else:
        config.exclude_modules = set(config.exclude_modules or ()) | set(names)


def rank_of(config: CurloraConfig, name: str) -> int:
    """The configured rank of a layer."""
    return config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)


def smaller_side(module: nn.Module) -> int | None:
    """min(m, n) of a dense layer, which bounds its rank."""
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    sides = (
        (getattr(base, "nx", None) or getattr(base, "in_features", None)),
        (getattr(base, "nf", None) or getattr(base, "out_features", None)),
    )
    return None if None in sides else min(sides)


def _note_fused(modules: dict[str, nn.Module], found: Defaults) -> None:
    """Note tensors that hold several weights at once, as mixtures of experts do: no layer's output to gather from."""
    fused = {
        f"{name}.{key}": math.prod(shape_of(parameter))
        for name, module in modules.items()
        if not isinstance(module, nn.modules.conv._ConvNd) and ".curlora_core." not in f".{name}."
        for key, parameter in module.named_parameters(recurse=False)
        if len(shape_of(parameter)) == 3 and parameter.is_floating_point() and min(shape_of(parameter)[1:]) > 1
    }
    if fused:
        total = sum(math.prod(shape_of(parameter)) for parameter in modules[""].parameters())
        share = f"{sum(fused.values()) / total:.0%} of the parameters"
        found.left_out[f"fused expert weights, {share} (LoRA's target_parameters can)"] += fused


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """The whole shape, also of a parameter that ZeRO-3 has partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


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


def _wildcard(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _listed(counts: dict[str, int]) -> str:
    """Names with the number of layers that share each, at most eight."""
    texts = [name if count == 1 else f"{count} × {name}" for name, count in counts.items()]
    more = len(texts) - 8
    return ", ".join(texts[:8]) + (f" and {more} more" if more > 0 else "")

"""The configuration of a CURLoRA adapter, validated on construction."""

from __future__ import annotations

import difflib
import enum
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from curlora.names import CARRY_MODES, SCALES, SELECTION_RULES

from . import record


class CurloraType(str, enum.Enum):  # noqa: UP042  PEFT reads the name from str(member), which StrEnum shortens
    """The adapter type, with what PEFT and Transformers expect of a member of ``peft.PeftType``.

    That enum cannot be extended from outside. This one is equal to its name and hashes like it, as PEFT's members do.
    """

    CURLORA = "CURLORA"


PEFT_TYPE = CurloraType.CURLORA
ALL_LINEAR = "all-linear"


@dataclass
class CurloraConfig(PeftConfig):
    """Configuration of `CurloraModel`: ΔW = s · C U R with C and R from W; only U (r, r) is trained.

    Raises ValueError for an impossible value, naming the field, the value and a remedy.
    """

    r: int = field(
        default=23,
        metadata={"help": "Rank: the number of selected columns and rows; U has r² parameters per layer."},
    )
    alpha: float = field(
        default=1.0, metadata={"help": "Strength of the update: ΔW is proportional to alpha (the paper uses 1)."}
    )
    target_modules: list[str] | set[str] | str | None = field(
        default=ALL_LINEAR,
        metadata={"help": "Names (or a regular expression) of the layers to adapt; 'all-linear' takes every one."},
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names (or a regular expression) of layers that stay as they are."}
    )
    selection: str = field(
        default="inverse",
        metadata={"help": f"Rule that selects columns and rows of W: one of {', '.join(SELECTION_RULES)}."},
    )
    whiten: bool = field(
        default=True,
        metadata={"help": "Orthonormalise C and R, so that ‖ΔW‖_F = s ‖U‖_F; False is the paper's raw form."},
    )
    scale: str = field(
        default="adam",
        metadata={"help": "s: 'adam' (LoRA's step length, rates 1e-4…1e-2), 'rsqrt' (alpha/√r), 'none' (alpha)."},
    )
    seed: int = field(
        default=0,
        metadata={"help": "Seed of the selection, which depends only on it and on the name of the layer."},
    )
    dropout: float = field(
        default=0.0, metadata={"help": "Probability of dropping an entry of z = R x during training."}
    )
    carry: str = field(
        default="continue",
        metadata={"help": "From task to task: 'continue' trains the same U, 'stack' freezes it and adds a block."},
    )
    blocks: int = field(
        default=1,
        metadata={"help": "Number of stacked blocks of a saved adapter; start with 1, `add_block` adds one."},
    )
    max_update_norm: float | None = field(
        default=None,
        metadata={"help": "Upper bound of ‖ΔW‖_F / ‖W‖_F per adapted layer, kept during training; None: no bound."},
    )
    fan_in_fan_out: bool = field(
        default=False,
        metadata={"help": "The weight is stored as (in, out); only used for layers other than Linear and Conv1D."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the transformer layers to adapt; None: all of them."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Module list that `layers_to_transform` indexes, such as 'layers'."},
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Ranks that differ from `r`, by layer name or regular expression."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Alphas that differ from `alpha`, by name or regular expression."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules to train in full and to save with the adapter, such as a head."}
    )
    bias: str = field(
        default="none",
        metadata={"help": "Biases to train and save: 'none', 'all', or 'curlora_only', those of adapted layers."},
    )
    init_weights: bool = field(
        default=True, metadata={"help": "U starts at zero, so that a new adapter changes nothing; False: at random."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self._check_choices()
        self._check_numbers()
        self._check_patterns()

    def _check_choices(self) -> None:
        _one_of("selection", self.selection, tuple(SELECTION_RULES))
        _one_of("scale", self.scale, SCALES)
        _one_of("carry", self.carry, CARRY_MODES)
        _one_of("bias", self.bias, ("none", "all", "curlora_only"))

    def _check_numbers(self) -> None:
        _require("r", self.r, _positive_integer(self.r), "a positive integer, such as 16")
        _require("alpha", self.alpha, _number(self.alpha) and self.alpha > 0, "a positive number, such as 1.0")
        _require("seed", self.seed, isinstance(self.seed, int), "an integer, such as 0")
        _require("dropout", self.dropout, _number(self.dropout) and 0 <= self.dropout < 1, "a number in [0, 1)")
        _require("blocks", self.blocks, _positive_integer(self.blocks), "a positive integer; start with 1")
        if self.blocks > 1:
            _require("blocks", self.blocks, self.carry == "stack", "1, or set carry='stack'")
        if self.max_update_norm is not None:
            bounded = _number(self.max_update_norm) and self.max_update_norm > 0
            _require("max_update_norm", self.max_update_norm, bounded, "a positive number, such as 0.05, or None")

    def _check_patterns(self) -> None:
        for name, rank in self.rank_pattern.items():
            _require(f"rank_pattern[{name!r}]", rank, _positive_integer(rank), "a positive integer")
        for name, alpha in self.alpha_pattern.items():
            _require(f"alpha_pattern[{name!r}]", alpha, _number(alpha) and alpha > 0, "a positive number")
        if isinstance(self.target_modules, str) and self.target_modules.lower() != ALL_LINEAR:
            for name in ("layers_to_transform", "layers_pattern"):
                value = getattr(self, name)
                _require(name, value, value is None, "None when target_modules is a regular expression")
        if self.layers_pattern:
            needed = self.layers_to_transform is not None
            _require("layers_pattern", self.layers_pattern, needed, "None, or set layers_to_transform too")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any):
        """Read the configuration of a saved adapter; its layers then expect saved indices (see `load_only`)."""
        config = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        config.load_only = True
        _check_readable(os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        return config

    load_only = False
    """Indices come from a file, so that no selection runs. Not a field, because it is never saved."""

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write adapter_config.json, and the checksums into the adapter's file, which PEFT has written before."""
        super().save_pretrained(save_directory, **kwargs)
        if (Path(save_directory) / SAFETENSORS_WEIGHTS_NAME).is_file():
            record.seal(save_directory, replace=False)


def _check_readable(directory: str) -> None:
    """Raise ValueError with file and remedy if a local adapter is truncated; PEFT's own error would name neither."""
    path = os.path.join(directory, SAFETENSORS_WEIGHTS_NAME)
    if not os.path.isfile(path):
        return
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); restore it from a copy.") from error


def _require(name: str, value: Any, satisfied: bool, remedy: str) -> None:
    if not satisfied:
        raise ValueError(f"CurloraConfig: {name}={value!r} is not possible; use {remedy}.")


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"CurloraConfig: {name}={value!r} is not known; use one of {', '.join(choices)}.{hint}")


def _positive_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

"""The names that configurations and `curlora` share: selection rules, scales, carry modes, strategies.

Imports nothing but the standard library. Importing it as `curlora.names` imports the package, which registers the
tuner with PEFT and therefore imports torch (5 s); `pipelines.config.names` reads this file alone.
"""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Literal, get_args

SELECTION_RULES = {
    "inverse": "curlora.cur:select_inverse",
    "uniform": "curlora.cur:select_uniform",
    "importance": "curlora.cur:select_importance",
    "leverage": "curlora.cur:select_leverage",
    "deim": "curlora.cur:select_deim",
    "activation": "curlora.cur:select_activation",
}
"""Selection rules by name, each as "module:function". A new rule is a function like these and one line here."""

Scale = Literal["adam", "rsqrt", "none"]
SCALES: tuple[str, ...] = get_args(Scale)
"""How the factor s of ΔW = s · C U R is derived from alpha."""

Carry = Literal["continue", "stack"]
CARRY_MODES: tuple[str, ...] = get_args(Carry)
"""What becomes of an adapter when the next task begins: it is trained further, or frozen below a new block."""

JOINT = "joint"
"""The strategy that trains on all tasks in one step."""

BASE_TASK = "base"
"""The task name of text that the base model has generated; no task of a sequence may have it."""


def strategies() -> tuple[str, ...]:
    """Names of all strategies, alphabetically: the files of curlora/continual/strategies/, listed but not imported."""
    folder = Path(__file__).parent / "continual" / "strategies"
    return tuple(sorted(module.name for module in pkgutil.iter_modules([str(folder)])))

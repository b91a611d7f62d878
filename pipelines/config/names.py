"""Names that the configuration shares with `curlora`, read without importing it.

Importing any part of `curlora` registers its tuner with PEFT and imports torch, which takes seconds. Validation must
not take that long, so `curlora/names.py`, which imports nothing, is loaded by its path.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path


def _curlora_names():
    package = importlib.util.find_spec("curlora")  # located, not imported
    file = Path(package.submodule_search_locations[0]) / "names.py"
    spec = importlib.util.spec_from_file_location("_curlora_names", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_names = _curlora_names()
SELECTION_RULES: tuple[str, ...] = tuple(_names.SELECTION_RULES)
STRATEGIES: tuple[str, ...] = _names.strategies()
JOINT: str = _names.JOINT

"""Defaults that belong to the type of adapter: rank, scale and learning rate.

What the fields' own defaults are suits CURLoRA, and is what a run recorded before there were others. For any other
type, a rank, scale or learning rate that a user leaves out is filled in while the configuration is read, so that the
run's `config.yaml` and its fingerprints hold the number.
"""

from __future__ import annotations

from typing import Any

OWN_DEFAULTS = ("curlora", "none")  # the fields' defaults are theirs
LORA_LIKE = ("lora", "adalora", "loha", "lokr", "gralora")  # scaled by alpha / r
LORA_LEARNING_RATE = 2.0e-4
ALPHA_PER_RANK = 2
RANK = 8
RANKS = {  # of PEFT's own configurations, where they differ from 8
    "adamss": 100,
    "gralora": 32,
    "hira": 32,
    "lily": 32,
    "miss": 64,
    "peanut": 32,
    "psoft": 32,
    "pvera": 256,
    "randlora": 32,
    "shira": 32,
    "tinylora": 2,
    "unilora": 4,
    "vblora": 4,
    "vera": 256,
}


def with_type_defaults(raw: dict) -> dict:
    """A configuration as written, with the fields that its type of adapter decides on."""
    adapter = raw.get("adapter")
    kind = adapter.get("type", OWN_DEFAULTS[0]) if isinstance(adapter, dict) else None
    if not isinstance(kind, str) or kind.lower() in OWN_DEFAULTS:
        return raw
    kind = kind.lower()
    adapter = {"r": RANKS.get(kind, RANK)} | adapter
    if kind not in LORA_LIKE:
        return raw | {"adapter": adapter}
    if isinstance(adapter["r"], int):
        adapter = {"alpha": ALPHA_PER_RANK * adapter["r"]} | adapter
    return raw | {"adapter": adapter} | _with_learning_rate(raw)


def _with_learning_rate(raw: dict) -> dict[str, Any]:
    training = raw.get("training", {})
    return {"training": {"learning_rate": LORA_LEARNING_RATE} | training} if isinstance(training, dict) else {}

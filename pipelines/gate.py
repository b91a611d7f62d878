"""Whether a finished chain keeps the limits of `gate:`. A pure function of its results."""

from __future__ import annotations

from pipelines.config import GateConfig


def judge(results: dict, gate: GateConfig) -> dict:
    """`{"passed": bool, "reasons": [...]}`; a missing figure (one task has no forgetting) binds nothing."""
    transfer = results["nll_backward_transfer"]
    limits = [
        ("forgetting", results["forgetting"], gate.max_forgetting, False),
        ("nll increase", None if transfer is None else -transfer, gate.max_nll_increase, False),
        ("perplexity ratio", results["perplexity_ratio"], gate.max_perplexity_ratio, False),
        ("learning accuracy", results["learning_accuracy"], gate.min_learning_accuracy, True),
    ]
    reasons = []
    for name, value, limit, at_least in limits:
        if value is None or limit is None:
            continue
        if (value < limit) if at_least else (value > limit):
            word = "below" if at_least else "above"
            reasons.append(f"{name} {value:.4f} is {word} the limit {limit:g}")
    return {"passed": not reasons, "reasons": reasons}

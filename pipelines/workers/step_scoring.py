"""Scores the cells of a step on a worker."""

from __future__ import annotations

import math

SELF_TEST_TOKENS = 32

SELF_TEST_LOGITS = 64


def is_finite(cell: dict) -> bool:
    return all(math.isfinite(value) for value in (cell["value"], cell["nll"]) if value is not None)

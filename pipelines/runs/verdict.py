"""The gate's verdict as one word, used in tags, events, decisions and pages."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    """`gate.passed` of `results.json`: true, false, or null while MLflow cannot be asked for the champion."""

    PASSED = "passed"
    REFUSED = "refused"
    UNDECIDED = "undecided"

    @classmethod
    def of(cls, gate: Mapping[str, Any]) -> Verdict:
        """The verdict of the section `gate` of `results.json`."""
        return {True: cls.PASSED, False: cls.REFUSED}.get(gate.get("passed"), cls.UNDECIDED)

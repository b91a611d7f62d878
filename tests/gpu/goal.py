"""What CURLoRA aims at: at most 1.02 of the frozen base's time from 2048 on, and below LoRA everywhere."""

from __future__ import annotations

from measure import Ratio
from models import CURLORA, Variant
from results import Result, Table

GOAL = 1.02
GOAL_COLUMNS = ["layer", "tokens", "CURLoRA / frozen", "goal met", "quickest LoRA / frozen", "below it", "floor"]


def judge(result: Result, table: Table, case: tuple, ratios: dict[Variant, Ratio], floor: float | None) -> None:
    """One row: whether CURLoRA keeps its goal in this case."""
    mine = ratios[CURLORA].median
    loras = [ratio.median for variant, ratio in ratios.items() if variant.adapter == "lora"]
    if not loras:
        return
    result.row(table, *case, mine, mine <= GOAL, min(loras), mine < min(loras), floor)

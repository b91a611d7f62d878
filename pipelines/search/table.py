"""A search's trials as a table and a figure."""

from __future__ import annotations

import math

from pipelines.config.search_space import value_text
from pipelines.reporting.drawing import colors, new_figure, render
from pipelines.reporting.formatting import number, percent


def markdown(result: dict) -> str:
    """All trials by objective; the last column marks the winner and the Pareto set."""
    paths = list(dict.fromkeys(path for record in result["trials"] for path in record["values"]))
    fields = [path.split(".", 1)[1] for path in paths]
    titles = ["trial", *fields, "steps", "learning", "retention loss", "objective", ""]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    order = sorted(result["trials"], key=lambda r: (r["status"] != "finished", -(r["objective"] or -math.inf)))
    for record in order:
        marks = [record["status"] if record["status"] != "finished" else ""]
        marks += ["chosen"] if record["number"] == result["chosen"]["number"] else []
        marks += ["Pareto"] if record["number"] in result["pareto"] else []
        numbers = (record["learning"], record["retention_loss"], record["objective"])
        cells = [str(record["number"]), *(value_text(record["values"].get(path, "·")) for path in paths)]
        cells += [f"{record['steps']}/{record['total_steps'] or '?'}"]
        cells += [number(value, 4) for value in numbers]
        lines.append("| " + " | ".join([*cells, ", ".join(mark for mark in marks if mark)]) + " |")
    spent, whole = result["steps"]["spent"], result["steps"]["whole"]
    lines += ["", f"Chosen: {result['why']}.", f"Rule: {result['rule']}."]
    lines += [f"Training steps: {spent} of {whole} ({percent(spent / max(whole, 1), 0)})."]
    return "\n".join(lines) + "\n"


def figure(result: dict) -> bytes:
    """PNG: learning against the learning rate, one line per rank; open markers for trials that ended early."""
    drawing, (axis,) = new_figure(6.4, 4.0)
    records = [record for record in result["trials"] if record["learning"] is not None]
    ranks = sorted({record["setting"]["adapter"]["r"] for record in records})
    ordered = colors(i / max(len(ranks), 2) for i in range(len(ranks)))  # by rank
    for rank, (color, _) in zip(ranks, ordered, strict=True):
        mine = sorted((r for r in records if r["setting"]["adapter"]["r"] == rank), key=_rate)
        whole = [r for r in mine if r["status"] == "finished"]
        axis.plot([_rate(r) for r in whole], [r["learning"] for r in whole], "o-", color=color, label=f"rank {rank}")
        early = [r for r in mine if r["status"] != "finished"]
        axis.plot([_rate(r) for r in early], [r["learning"] for r in early], "o", color=color, markerfacecolor="none")
    chosen = result["chosen"]
    axis.plot([_rate(chosen)], [chosen["learning"]], "*", color="black", markersize=14, label="chosen", zorder=5)
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    axis.set_ylabel(f"{result['task']}: learning on validation")
    axis.legend(fontsize=8, frameon=False, title="open: ended at a rung", title_fontsize=8)
    return render(drawing)


def _rate(record: dict) -> float:
    return record["setting"]["training"]["learning_rate"]

"""What a part has found: tables of plain numbers, written at once as `<part>.json` and, with all parts, `results.md`.

{"part": "layers", "status": "done", "reason": "", "hardware": "NVIDIA H200, torch 2.11.0", "seconds": 71.2,
 "notes": ["..."], "tables": [{"title": "...", "note": "...", "columns": ["..."], "rows": [["...", 1.02]]}]}
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

PARTS = {
    "layers": "One layer and 12 layers at 7B shapes",
    "model7b": "A Mistral-7B-shaped model",
    "worker": "The worker: Ray, DeepSpeed ZeRO-2 and 3",
    "domains": "Methods on a sequence of domains",
    "quantised": "Quantised bases",
    "faults": "Faults as a user sees them",
    "cost": "The cost model beside the measurements",
}
"""Part → heading, most telling first."""


class SkipPart(Exception):
    """A part cannot run here; the message says why."""


@dataclass
class Table:
    title: str
    columns: list[str]
    note: str = ""
    rows: list[list] = field(default_factory=list)


@dataclass
class Result:
    """The findings of one part; every change is on disk before the next measurement starts."""

    part: str
    out: Path
    hardware: str = ""
    status: str = "running"
    reason: str = ""
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    begun: float = field(default_factory=time.time)

    def table(self, title: str, columns: list[str], note: str = "") -> Table:
        self.tables.append(Table(title, columns, note))
        return self.tables[-1]

    def row(self, table: Table, *cells) -> None:
        table.rows.append(list(cells))
        self.save()

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.save()

    def end(self, status: str, reason: str = "") -> None:
        self.status, self.reason = status, reason
        self.save()

    def save(self) -> None:
        raw = asdict(self) | {"out": str(self.out), "seconds": round(time.time() - self.begun, 1)}
        _write(self.out / f"{self.part}.json", json.dumps(raw, indent=1))
        write_markdown(self.out)


def read(out: Path, part: str) -> dict | None:
    """A part's JSON, or None if it has not run."""
    file = out / f"{part}.json"
    return json.loads(file.read_text()) if file.exists() else None


def end_abandoned(out: Path, part: str, reason: str) -> None:
    """Mark a part whose process ended without a last word as failed; its rows stay."""
    raw = read(out, part) or {"part": part, "hardware": "", "seconds": 0, "notes": [], "tables": []}
    _write(out / f"{part}.json", json.dumps(raw | {"status": "failed", "reason": reason}, indent=1))
    write_markdown(out)


def write_markdown(out: Path) -> None:
    found = [raw for part in PARTS if (raw := read(out, part))]
    _write(out / "results.md", "\n".join(line for raw in found for line in _section(raw)))


def _section(raw: dict) -> list[str]:
    lines = [f"## {PARTS[raw['part']]}", "", f"{raw['hardware']}; {raw['status']} after {raw['seconds']:.0f} s."]
    if raw["reason"]:
        lines += ["", raw["reason"]]
    for table in raw["tables"]:
        lines += ["", f"### {table['title']}", ""]
        if table["note"]:
            lines += [table["note"], ""]
        lines += [_line(table["columns"]), _line(["---"] * len(table["columns"]))]
        lines += [_line([_cell(value) for value in row]) for row in table["rows"]]
    return [*lines, "", *(f"- {note}" for note in raw["notes"]), ""]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _write(path: Path, text: str) -> None:
    """Whole or not at all: a part may be ended at any moment."""
    temporary = path.with_suffix(".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)

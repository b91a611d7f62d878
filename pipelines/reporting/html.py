"""Tables and images as HTML."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from pipelines.reporting.drawing import colors, render
from pipelines.reporting.formatting import NONE, number, signed
from pipelines.reporting.summary import trained_row


def heat_cells(results: dict, t: int, shades: list[float | None]) -> str:
    cells = []
    for i, (value, shade) in enumerate(zip(results["scores"][t], shades, strict=True)):
        if value is None:
            cells.append(f'<td class="none">{NONE}</td>')
            continue
        ((background, ink),) = colors([shade])
        own = ' class="own"' if trained_row(results, i) == t else ""
        cells.append(f'<td{own} style="background:{background};color:{ink};outline-color:{ink}">{number(value)}</td>')
    return "".join(cells)


def change_cell(change: float | None) -> str:
    if change is None or signed(change) == number(0):
        return f"<td>{signed(change)}</td>"
    kind, arrow = ("worse", "▼") if change < 0 else ("better", "▲")
    return f'<td class="{kind}">{arrow} {signed(change)}</td>'


def table_tag(headers: Sequence[str], rows: Sequence[str], foot: str = "") -> str:
    head = "".join(f'<th scope="col">{escape(header)}</th>' for header in headers)
    foot = f"<tfoot>{foot}</tfoot>" if foot else ""
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody>{foot}</table></div>'
    )


def image_tag(figure: Any, alt: str) -> str:
    data = base64.b64encode(render(figure, "svg")).decode()
    return (
        f'<figure><div class="scroll"><img alt="{escape(alt)}" src="data:image/svg+xml;base64,{data}"></div></figure>'
    )


def number_cells(values: Iterable[float | None], digits: int) -> str:
    return "".join(f"<td>{number(value, digits)}</td>" for value in values)


def code_tag(value: str | None) -> str:
    return f"<code>{escape(value)}</code>" if value else NONE

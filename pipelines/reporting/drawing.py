"""Creates and renders every figure, in one style."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe & Ito, safe for any colour vision, without its yellow, which is invisible on white.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = "osD^vPX"
LINES = ("-", "--", ":")


def series_style(index: int) -> dict:
    """Colour, marker and line style of a series; the first 21 series differ."""
    line = LINES[index // len(COLORS) % len(LINES)]
    return {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)], "linestyle": line}


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of the given size in inches, and its panels, row by row."""
    from matplotlib.figure import Figure  # slow; needs neither a backend nor global state

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=share_y)
    for ax in axes.flat:
        ax.set_prop_cycle(color=COLORS)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e3e7ec", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=9)
    return figure, list(axes.flat)


def render(figure: Figure, kind: str = "png") -> bytes:
    """The figure as a file in the format `kind`: png, svg or pdf."""
    from matplotlib import rc_context  # slow

    buffer = io.BytesIO()
    # without a date and with fixed ids, the same run always gives the same file
    with rc_context({"svg.hashsalt": "curlora"}):
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    return buffer.getvalue()


def colors(values: Iterable[float]) -> list[tuple[str, str]]:
    """(background, text) colours of values in [0, 1]: viridis, whose order shows with any colour vision and in grey.

    The text is black or white, whichever has the higher contrast (at least 4.6 : 1; WCAG 2 luminance).
    """
    from matplotlib import colormaps  # slow
    from matplotlib.colors import to_hex

    pairs = []
    for value in values:
        rgb = colormaps["viridis"](value)[:3]
        linear = [channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4 for channel in rgb]
        light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        pairs.append((to_hex(rgb), "#000000" if light > 0.179 else "#ffffff"))
    return pairs


def axis_limits(ax: Axes, values: Sequence[float], least: float) -> None:
    """Fit the y axis to the values, but let it span at least `least`, so that a flat line looks flat."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = max(0.1 * (high - low), (least - (high - low)) / 2)
    ax.set_ylim(low - margin, high + margin)

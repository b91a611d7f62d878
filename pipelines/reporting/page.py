"""Writes the report of a run: figures, and one self-contained page.

It is generated from the run directory (`results.json`, the steps' `metrics.json`, `config.yaml`) and can be
regenerated at any time. The page loads nothing: styles and charts (SVG) are inline. Jinja2 escapes every value that
the templates print.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipelines.reporting import formatting
from pipelines.reporting.drawing import render
from pipelines.reporting.figures import FIGURES
from pipelines.reporting.view import page_values
from pipelines.runs.directory import RunDirectory
from pipelines.runs.records import current_steps
from pipelines.runs.results import Results
from pipelines.runs.step_record import StepRecord

TEMPLATES = Path(__file__).parent / "templates"
FILTERS = ("number", "signed", "whole", "size", "duration", "probability", "moment")  # of formatting.py


class ReportError(RuntimeError):
    """The run has no results yet."""


def write_figures(run: RunDirectory) -> list[str]:
    """Write `figures/*.png`; returns their paths in the run. Figures without data are left out.

    Raises:
        ReportError: no results yet.
    """
    results, steps = _load(run)
    written = []
    for name, draw in FIGURES.items():
        figure = draw(results, steps)
        if figure is not None:
            run.write_bytes(f"figures/{name}.png", render(figure, "png"))
            written.append(f"figures/{name}.png")
    return written


def write_report(run: RunDirectory) -> str:
    """Write `report.html`, which needs no network; returns its path in the run.

    Raises:
        ReportError: no results yet.
    """
    results, steps = _load(run)
    values = page_values(run, results, steps, run.read_bytes("config.yaml").decode())
    run.write_bytes("report.html", environment().get_template("report.html").render(values).encode())
    return "report.html"


def _load(run: RunDirectory) -> tuple[Results, list[StepRecord]]:
    results = run.results()
    if results is None:
        raise ReportError(f"run '{run.name}' has no results yet; start it with `curlora run`")
    return results, [metrics for _, metrics in current_steps(run)]


def environment() -> Environment:
    """The Jinja2 environment, with escaping in every template and an error for undefined values."""
    found = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters.update({name: getattr(formatting, name) for name in FILTERS})
    return found

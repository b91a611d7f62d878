"""A comparison as a Markdown table and as CSV."""

from __future__ import annotations

import csv
import io

from pipelines.reporting.formatting import compact, interval, with_error

AGGREGATES = (  # key in results.json, heading, digits
    ("learning_accuracy", "learning acc.", 3),
    ("average_accuracy", "average acc.", 3),
    ("backward_transfer", "backward tr.", 3),
    ("forgetting", "forgetting", 3),
    ("forward_transfer", "forward tr.", 3),
    ("nll_learning", "NLL learning", 3),
    ("nll_backward_transfer", "NLL backward tr.", 3),
    ("nll_average", "NLL average", 3),
    ("perplexity_ratio", "ppl ratio", 3),
    ("trainable_parameters", "parameters", 0),
    ("adapter_bytes", "adapter bytes", 0),
    ("kept_bytes", "bytes kept", 0),
    ("train_seconds", "training s", 0),
    ("tokens_per_second", "tokens/s", 0),
    ("peak_memory_bytes", "peak memory", 0),
)


def columns_of(result: dict) -> list[tuple[str, str, int]]:
    """The aggregates that at least one method has."""
    return [f for f in AGGREGATES if any(m[f[0]][0] is not None for m in result["methods"].values())]


def markdown(result: dict) -> str:
    """The table of all methods, then the paired intervals where there is a reference method, then the fronts."""
    columns = columns_of(result)
    lines = ["| method | lr | runs | " + " | ".join(title for _, title, _ in columns) + " |"]
    lines.append("|---|---|---|" + "---|" * len(columns))
    for name, summary in result["methods"].items():
        rate = compact(summary["learning_rate"]) if summary["learning_rate"] else "config"
        cells = [with_error(*summary[key], digits) for key, _, digits in columns]
        lines.append(f"| {name} | {rate} | {summary['runs']} | " + " | ".join(cells) + " |")
    if result["reference"]:
        lines += ["", f"Difference to {result['reference']}, 95 % interval over test examples:", ""]
        lines += ["| method | learning | forgetting |", "|---|---|---|"]
        for name, summary in result["methods"].items():
            if against := summary.get("against_reference"):
                lines.append(f"| {name} | {interval(against['learning'])} | {interval(against['forgetting'])} |")
    if result.get("fronts"):
        lines += ["", *_fronts(result["fronts"])]
    return "\n".join(lines) + "\n"


def _fronts(found: dict) -> list[str]:
    target = f"{found['learning']:.3f}"
    lines = [f"At a learning of {target}, 95 % of the best of {found['reference']}, over all learning rates:", ""]
    lines += ["| method | best learning | forgetting there | seeds that learn as much |", "|---|---|---|---|"]
    for name, front in found["methods"].items():
        cells = [with_error(*front[key], 3) for key in ("best", "forgetting")]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {front['seeds']} |")
    return lines


def as_csv(result: dict) -> str:
    columns = columns_of(result)
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["method", "learning_rate", "runs", *(f"{k}{s}" for k, _, _ in columns for s in ("", "_se"))])
    for name, summary in result["methods"].items():
        cells = [v for key, _, _ in columns for v in summary[key]]
        writer.writerow([name, summary["learning_rate"], summary["runs"], *cells])
    return out.getvalue()

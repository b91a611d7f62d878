"""The main methods over seeds on a sequence of domains, by `python -m pipelines compare`."""

from __future__ import annotations

import json
from pathlib import Path

from commands import NEEDED, at_once, finish, require, start
from measure import Plan
from results import Result, SkipPart

METHODS = "curlora,curlora+rehearsal,lora,lora-all"
SEEDS = "0,1,2"


def run(plan: Plan, result: Result) -> None:
    if plan.domains is None:
        raise SkipPart("no configuration was given (--domains CONFIG)")
    require(*NEEDED)
    methods, seeds = ("curlora,lora", "0") if plan.tiny else (METHODS, SEEDS)
    arguments = ["compare", str(plan.domains.resolve()), "--methods", methods, "--seeds", seeds, "--json"]
    # several runs on one GPU: each asks for its share of it
    arguments += ["--parallel", str(at_once()), "--set", f"resources.gpus_per_worker={1 / at_once():.2f}"]
    arguments += ["--set", "resources.workers=1"]
    found = finish(start(arguments, Path.cwd()), plan.left())
    if found.code != 0:
        raise RuntimeError(f"compare ended with code {found.code}: {found.last_words}")
    from pipelines.comparison.tables import columns_of  # needs what `require` has looked for

    compared = json.loads(found.out)
    columns = columns_of(compared)
    table = result.table(
        f"{plan.domains.name}, seeds {seeds}, {found.seconds:.0f} s",
        ["method", "lr", "runs", *(title for _, title, _ in columns)],
        "Means over seeds ± standard error.",
    )
    for name, summary in compared["methods"].items():
        cells = [_mean(summary[key], digits) for key, _, digits in columns]
        result.row(table, name, summary["learning_rate"], summary["runs"], *cells)


def _mean(value: list, digits: int) -> str | None:
    mean, error = value
    if mean is None:
        return None
    return f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")

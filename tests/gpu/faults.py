"""Out of memory and a loss that is not a number, in the words that a user reads."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from commands import NEEDED, Chain, require, save_text
from measure import DEVICE, GPU, Plan, free
from results import Result, SkipPart, Table

BATCH, WORDS = 8192, 256
"""Rows of one batch, words of each: two million tokens, whose activations (140 KB each) no card holds."""


def run(plan: Plan, result: Result) -> None:
    table = result.table("What a user reads", ["fault", "where", "code", "message", "says what to do"])
    try:
        explained(result, table)
    except ModuleNotFoundError as error:
        result.note(f"pipelines cannot be imported: {error}")
    try:
        through_the_worker(plan, result, table)
    except SkipPart as skipped:
        result.note(f"not through the worker: {skipped}")


def explained(result: Result, table: Table) -> None:
    """Torch's own error, as `pipelines` explains it."""
    from pipelines.workers.failures import explain

    text = explain(out_of_memory())
    result.row(
        table, "out of memory", "pipelines.workers.failures.explain", None, text, "gradient_accumulation" in text
    )


def out_of_memory() -> torch.OutOfMemoryError:
    """The real error of this card; on a CPU one that reads like it."""
    if not GPU:
        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore that nobody reads.")
    error = None
    try:
        torch.empty(torch.cuda.mem_get_info()[1], dtype=torch.float32, device=DEVICE)
    except torch.OutOfMemoryError as raised:
        error = raised.with_traceback(None)
    free()
    if error is None:
        raise RuntimeError("four times the card's memory could be allocated")
    return error


def through_the_worker(plan: Plan, result: Result, table: Table) -> None:
    require(*NEEDED)
    if plan.tiny:
        raise SkipPart("a rehearsal does not start Ray here; part `worker` does")
    with tempfile.TemporaryDirectory() as scratch:
        chain = Chain.make(Path(scratch), plan, steps=20)
        training = chain.raw["training"]
        faults = {"loss is not a number": {"training": training | {"learning_rate": 100.0, "weight_decay": 100.0}}}
        if GPU:
            long = save_text(chain.root / "long", {"train": BATCH, "test": 8}, words=WORDS)
            task = {"name": "long", "kind": "language-modeling", "data": str(long)}
            changed = training | {"batch_size": BATCH, "max_length": 256}
            faults["out of memory"] = {"training": changed, "tasks": [task]}
        for name, changes in faults.items():
            found = chain.run(name.replace(" ", "-"), max(plan.left(), 30.0), **changes)
            text = found.last_words
            result.row(table, name, "python -m pipelines run", found.code, text, "training." in text)

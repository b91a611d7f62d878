"""Scores a model on a benchmark of lm-evaluation-harness: a cell like any other, with the outcome of each example.

All ranks run the harness on the same questions and divide the forward passes (evaluation/harness.py). The value of a
cell is the mean over all examples of all tasks, so that paired tests on the outcomes judge the same number.
"""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from pipelines.data.benchmarks import FEWSHOT_SEED, LoadedBenchmark, undisturbed
from pipelines.distributed.world import World
from pipelines.metrics import score_matrix
from pipelines.runs.identity import fingerprint
from pipelines.runs.step_record import Cell


def evaluate_benchmark(
    model: nn.Module,
    loaded: LoadedBenchmark,
    tokenizer,
    context: int,
    world: World,
    batch_tokens: int,
    key: str,
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> tuple[Cell, list[dict]] | None:
    """Score a benchmark; (cell, outcomes) on rank 0, None on the others.

    An outcome is `{"id": "<task>/<number>", "task", "reference", "prediction", "correct" | "score"}`; of whole texts
    `{"id", "nll", "tokens"}`, summed over the words, which are the tokens here.

    Args:
        context: longest input in tokens.
    """
    from lm_eval.evaluator import evaluate  # slow, and an extra

    from pipelines.evaluation.harness import WorkersModel

    begin, was_training, benchmark = time.perf_counter(), model.training, loaded.benchmark
    model.eval()
    with _undisturbed():
        found = evaluate(
            WorkersModel(model, tokenizer, context, world, batch_tokens, progress),
            {"tasks": dict(loaded.tasks), "groups": {}, "group_map": {}},
            limit=benchmark.limit,
            bootstrap_iters=0,
            apply_chat_template=benchmark.chat_template,
            fewshot_as_multiturn=benchmark.chat_template,
        )
    model.train(was_training)
    if world.rank:
        return None
    outcomes = list(_outcomes(loaded, found["samples"]))
    return _cell(loaded, outcomes, _extras(loaded, found["results"]), key, time.perf_counter() - begin), outcomes


def _cell(loaded: LoadedBenchmark, outcomes: list[dict], extras: dict[str, float], key: str, seconds: float) -> Cell:
    value, nll, tokens = _summary(loaded, outcomes)
    return Cell(
        name=loaded.benchmark.name,
        role="retention" if loaded.is_text else "benchmark",
        metric=loaded.metric,
        value=value,
        nll=nll,
        perplexity=score_matrix.perplexity(nll),
        count=len(outcomes),
        tokens=tokens,
        majority=None,
        digest=fingerprint([(outcome["id"], outcome.get("reference")) for outcome in outcomes]),
        key=key,
        seconds=seconds,
        time=time.time(),
        higher_is_better=score_matrix.higher_is_better(loaded.metric),
        extras=extras,
    )


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """The harness works with its own seeds and without progress bars; then PyTorch's generator is as it was."""
    before = torch.get_rng_state()
    torch.manual_seed(FEWSHOT_SEED)
    try:
        with undisturbed(), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        torch.set_rng_state(before)


def _outcomes(loaded: LoadedBenchmark, samples: dict[str, list[dict]]) -> Iterator[dict]:
    """The outcome of each example, in the order of tasks and examples."""
    rows = [
        (task, sample)
        for task in loaded.tasks
        for sample in sorted(samples[task], key=lambda sample: sample["doc_id"])
        if sample["filter"] == loaded.metrics[task][1]
    ]
    values = [sample[loaded.metrics[task][0]] for task, sample in rows]
    if loaded.is_text:
        for (task, sample), (likelihood, words) in zip(rows, values, strict=True):
            yield {"id": f"{task}/{sample['doc_id']}", "nll": -likelihood, "tokens": words}
        return
    binary = all(value in (0, 1) for value in values)
    for (task, sample), value in zip(rows, values, strict=True):
        yield {
            "id": f"{task}/{sample['doc_id']}",
            "task": task,
            "reference": str(sample["target"]),
            "prediction": str(_prediction(loaded.tasks[task], sample["filtered_resps"])),
            **({"correct": bool(value)} if binary else {"score": float(value)}),
        }


def _prediction(task: Any, responses: list) -> Any:
    """What the model chose or wrote, as a person reads it."""
    if task.OUTPUT_TYPE == "multiple_choice":
        likelihoods = [likelihood for likelihood, _ in responses]
        return likelihoods.index(max(likelihoods))
    return responses[0][0] if isinstance(responses[0], tuple | list) else responses[0]


def _summary(loaded: LoadedBenchmark, outcomes: list[dict]) -> tuple[float, float | None, int | None]:
    """(value, nats per word, words) of a cell; the last two of whole texts alone."""
    if loaded.is_text:
        words = sum(outcome["tokens"] for outcome in outcomes)
        nll = math.fsum(outcome["nll"] for outcome in outcomes) / words
        return nll, nll, words
    return (
        math.fsum(outcome.get("score", outcome.get("correct", 0)) for outcome in outcomes) / len(outcomes),
        None,
        None,
    )


def _extras(loaded: LoadedBenchmark, results: dict[str, dict]) -> dict[str, float]:
    """Every other metric of the harness, of each task where there are several; its own errors are left out."""
    found = {}
    for task in loaded.tasks:
        for name, value in results[task].items():
            metric, _, used = name.partition(",")
            if isinstance(value, int | float) and used and not metric.endswith("_stderr") and math.isfinite(value):
                label = metric if used == "none" else f"{metric}_{used}"
                found[f"{task}.{label}" if len(loaded.tasks) > 1 else label] = float(value)
    return {name: value for name, value in found.items() if name != loaded.metric}

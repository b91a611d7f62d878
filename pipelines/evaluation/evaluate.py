"""Scores a model on encoded evaluation sets of any kind: by a head, by likelihood, or by generation.

Evaluation is sharded so that each example counts exactly once on any number of workers: batches are formed from the
globally sorted sequences (so their content does not depend on the world size) and assigned to the ranks round-robin;
rank 0 gathers the outcomes. Under ZeRO-3 every rank runs the same number of forward passes, because each one is a
collective operation. The task kind turns the scores of sequences into outcomes and metrics (`pipelines/data/kinds`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from pipelines.data.kinds import KINDS
from pipelines.data.kinds.base import EvaluationSet, Scored
from pipelines.distributed.world import World, gather
from pipelines.evaluation.batching import make_batches, make_question_batches
from pipelines.evaluation.scorers import SCORERS
from pipelines.metrics import score_matrix
from pipelines.metrics.answers import majority_rate
from pipelines.runs.step_record import Cell

Progress = Callable[[int, int, float], None]
"""Called after every batch with the number of examples scored so far on all ranks, the number of all of them, and the
share of the tokens that has been computed (long sequences come first, so it is ahead of the share of the examples)."""


def evaluate(
    model: nn.Module,
    evaluation: EvaluationSet,
    world: World,
    batch_tokens: int,
    role: str,
    key: str,
    progress: Progress = lambda *_: None,
) -> tuple[Cell, list[dict]] | None:
    """Score `evaluation`; (cell, outcomes in order of example) on rank 0, None on the others.

    An outcome is `{"id", "label", "prediction", "correct"}`; of generation `{"id", "reference", "prediction",
    "correct", "score", …}`; of text `{"id", "nll", "tokens"}`, summed over the tokens.
    """
    begin = time.perf_counter()
    scored = score(model, evaluation, world, batch_tokens, progress)
    if scored is None:
        return None
    kind = KINDS[evaluation.kind]
    outcomes = kind.outcomes(evaluation, scored)
    summary = kind.summary(evaluation, outcomes)
    cell = Cell(
        name=evaluation.name,
        role=role,
        metric=evaluation.metric,
        value=summary.value,
        nll=summary.nll,
        perplexity=score_matrix.perplexity(summary.nll),
        count=len(outcomes),
        tokens=summary.tokens,
        majority=majority_rate(evaluation.labels),
        digest=evaluation.digest,
        key=key,
        seconds=time.perf_counter() - begin,
        time=time.time(),
        higher_is_better=score_matrix.higher_is_better(evaluation.metric),
        extras=summary.extras,
        loss=kind.loss(evaluation, scored),
    )
    return cell, outcomes


def score(
    model: nn.Module,
    evaluation: EvaluationSet,
    world: World,
    batch_tokens: int,
    progress: Progress = lambda *_: None,
) -> list[Scored] | None:
    """Scored sequences, unordered, on rank 0; None on the others."""
    return gather(score_part(model, evaluation, world, batch_tokens, progress), world)


def score_part(
    model: nn.Module,
    evaluation: EvaluationSet,
    world: World,
    batch_tokens: int,
    progress: Progress = lambda *_: None,
) -> list[Scored]:
    """Scored sequences of this rank's share."""
    scorer = KINDS[evaluation.kind].scorer
    if scorer == "choices":
        batches = make_question_batches(evaluation.items, batch_tokens)
    else:
        batches = make_batches(evaluation.items, batch_tokens, evaluation.max_new_tokens)
    run = SCORERS[scorer]
    tokens = [sum(len(item.input_ids) for item in batch) for batch in batches]
    examples = len({item.example for item in evaluation.items})
    seen: set[int] = set()
    was_training = model.training
    model.eval()
    local: list[Scored] = []
    with torch.no_grad():
        for number in range(0, len(batches), world.size):
            mine = number + world.rank
            if mine < len(batches):
                local += run(model, evaluation, batches[mine], world)
            elif world.lockstep:
                run(model, evaluation, batches[-1], world)
            done = batches[number : number + world.size]
            seen.update(item.example for batch in done for item in batch)
            progress(len(seen), examples, sum(tokens[: number + world.size]) / sum(tokens))
    model.train(was_training)
    return local

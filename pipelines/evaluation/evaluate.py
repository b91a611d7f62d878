"""Scores a model on encoded evaluation sets of any kind: by a head, by likelihood, or by generation.

Evaluation is sharded so that each example counts exactly once on any number of workers: batches are formed from the
globally sorted sequences (so their content does not depend on the world size) and assigned to the ranks round-robin;
rank 0 gathers the outcomes. Under ZeRO-3 every rank runs the same number of forward passes, because each one is a
collective operation. The task kind turns the scores of sequences into outcomes and metrics (`pipelines/data/kinds`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from pipelines.data.kinds import KINDS
from pipelines.data.kinds.base import EvaluationSet, Scored, Summary
from pipelines.distributed.world import World, gather
from pipelines.evaluation.batching import make_batches, make_question_batches
from pipelines.evaluation.scorers import SCORERS
from pipelines.metrics import score_matrix
from pipelines.metrics.answers import majority_rate
from pipelines.models.bank import Bank, bank_of
from pipelines.runs.step_record import Cell

Progress = Callable[[int, int, float], None]
"""Called after every batch with the number of examples scored so far on all ranks, the number of all of them, and the
share of the tokens that has been computed (long sequences come first, so it is ahead of the share of the examples)."""

Routes = Mapping[int, int]
"""Example → position in the model's bank of the adapter that answers it."""


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
    "correct", "score", …}`; of text `{"id", "nll", "tokens"}`, summed over the tokens. With a bank of adapters,
    `route` is the task whose adapter answered.
    """
    begin = time.perf_counter()
    routes = routes_of(model, evaluation, world)
    scored = score(model, evaluation, world, batch_tokens, progress, routes)
    if scored is None:
        return None
    kind = KINDS[evaluation.kind]
    outcomes = kind.outcomes(evaluation, scored)
    summary = kind.summary(evaluation, outcomes)
    if routes:
        outcomes, summary = _with_routes(bank_of(model), evaluation, outcomes, summary, routes)
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
    routes: Routes | None = None,
) -> list[Scored] | None:
    """Scored sequences, unordered, on rank 0; None on the others."""
    return gather(score_part(model, evaluation, world, batch_tokens, progress, routes), world)


def score_part(
    model: nn.Module,
    evaluation: EvaluationSet,
    world: World,
    batch_tokens: int,
    progress: Progress = lambda *_: None,
    routes: Routes | None = None,
) -> list[Scored]:
    """Scored sequences of this rank's share, each by the adapter that `routes` (by default the bank) chooses."""
    routes = routes_of(model, evaluation, world) if routes is None else routes
    if not routes:
        return _score_alike(model, evaluation, world, batch_tokens, progress)
    local: list[Scored] = []
    examples, behind = len(routes), 0
    for place in sorted(set(routes.values())):
        part = replace(evaluation, items=[item for item in evaluation.items if routes[item.example] == place])
        here = sum(chosen == place for chosen in routes.values())

        def report(done: int, count: int, share: float, behind: int = behind, here: int = here) -> None:
            progress(behind + done, examples, (behind + share * here) / examples)

        with bank_of(model).active(model, place):
            local += _score_alike(model, part, world, batch_tokens, report)
        behind += here
    return local


def routes_of(model: nn.Module, evaluation: EvaluationSet, world: World) -> Routes:
    """The adapter that the model's bank chooses for each example, by what a user would send of it; a collective call.

    Empty if the model has no bank. Of alternatives to a prompt only the prompt counts.
    """
    bank = bank_of(model)
    if bank is None:
        return {}
    asked = KINDS[evaluation.kind].scorer == "choices"
    texts: dict[int, Sequence[int]] = {}
    for item in evaluation.items:
        texts.setdefault(item.example, item.input_ids[: item.start] if asked and item.start else item.input_ids)
    return dict(zip(texts, bank.routes(model, list(texts.values()), world), strict=True))


def _with_routes(
    bank: Bank, evaluation: EvaluationSet, outcomes: list[dict], summary: Summary, routes: Routes
) -> tuple[list[dict], Summary]:
    """Each outcome with its route, and the share that went where it belongs: to its task, or to the base."""
    home = bank.tasks.index(evaluation.name) if evaluation.name in bank.tasks else 0
    outcomes = [o | {"route": bank.tasks[routes[number]]} for number, o in enumerate(outcomes)]
    share = sum(place == home for place in routes.values()) / len(routes)
    return outcomes, replace(summary, extras=summary.extras | {"routed_home": share})


def _score_alike(
    model: nn.Module, evaluation: EvaluationSet, world: World, batch_tokens: int, progress: Progress
) -> list[Scored]:
    """Scored sequences of this rank's share, by the adapter that is active."""
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

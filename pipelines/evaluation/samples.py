"""Answers to sample prompts, by the same scorers and the same sharding as an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from pipelines.data.kinds import KINDS
from pipelines.data.samples import Part
from pipelines.distributed.world import World
from pipelines.evaluation.evaluate import score
from pipelines.runs.samples import Question, Sample


def answer(
    model: nn.Module,
    questions: Sequence[Question],
    parts: Sequence[Part],
    world: World,
    batch_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Sample]:
    """The model's answers in the order of `questions`, on rank 0; an empty list on the others.

    Args:
        parts: the questions encoded (`data.samples.parts_of`).
        progress: called with the number of prompts run so far, each counted once per part that holds it.
    """
    found: dict[str, dict[str, str]] = {question.key: {} for question in questions}
    done = 0
    for part in parts:
        progress(done)
        scored = score(model, part.evaluation, world, batch_tokens)
        done += len(part.questions)
        if scored is None:
            continue
        predictions = KINDS[part.evaluation.kind].predictions(part.evaluation, scored)
        for question, field, prediction in zip(part.questions, part.fields, predictions, strict=True):
            text = prediction.get("label", prediction["prediction"])
            found[question.key][field] = text
    return [Sample.of(question, **found[question.key]) for question in questions] if world.rank == 0 else []

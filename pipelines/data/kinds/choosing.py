"""Scoring a set of alternative answers to a prompt, shared by verbalizer and multiple choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from pipelines.data.encoding import Encoded, Encoder, fill
from pipelines.data.kinds.base import EvaluationSet, Scored, rows_of, short


def prompted(template: str, rows: Iterable[Mapping[str, list]], encoder: Encoder) -> Iterator[tuple[list[int], dict]]:
    """(prompt tokens, not truncated; row) of every row."""
    for batch in rows:
        unpacked = list(rows_of(batch))
        yield from zip(encoder.prompts([fill(template, row) for row in unpacked]), unpacked, strict=True)


def continued(number: int, prompt: list[int], answer: Sequence[int], encoder: Encoder, choice: int = -1) -> Encoded:
    """Prompt and answer in `max_length` tokens; only the prompt is truncated."""
    kept = encoder.cut(prompt, encoder.max_length - len(answer))
    return Encoded(number, [*kept, *answer], start=len(kept), choice=choice, cut=max(0, len(prompt) - len(kept)))


def alternatives(number: int, prompt: list[int], answers: Sequence[Sequence[int]], encoder: Encoder):
    """One sequence per answer, all with the same truncated prompt."""
    kept = encoder.cut(prompt, encoder.max_length - max(map(len, answers)))
    for choice, answer in enumerate(answers):
        lost = max(0, len(prompt) - len(kept))
        yield Encoded(number, [*kept, *answer], start=len(kept), choice=choice, cut=lost)


def likeliest(scored: Sequence[Scored], divisor: Callable[[Scored], float] = lambda entry: 1.0) -> list[int]:
    """Per example, the choice with the smallest NLL / divisor; the first one of a tie."""
    best: dict[int, tuple[float, int]] = {}
    for entry in scored:
        found = (entry.nll / divisor(entry), entry.choice)
        best[entry.example] = min(best.get(entry.example, (math.inf, -1)), found)
    return [choice for _, (_, choice) in sorted(best.items())]


def loss_among_choices(evaluation: EvaluationSet, scored: Sequence[Scored]) -> float:
    """Mean −log p(correct choice), with the likelihoods of an example's choices normalised to a sum of 1."""
    choices: dict[int, dict[int, float]] = {}
    for entry in scored:
        choices.setdefault(entry.example, {})[entry.choice] = entry.nll
    losses = []
    for (_, nll), label in zip(sorted(choices.items()), evaluation.labels, strict=True):
        least = min(nll.values())
        losses.append(nll[label] - least + math.log(math.fsum(math.exp(least - value) for value in nll.values())))
    return math.fsum(losses) / len(losses)


def compared(evaluation: EvaluationSet, predicted: Sequence[int]) -> list[dict]:
    """Outcomes of one predicted class per example."""
    return [
        {"id": number, "label": label, "prediction": prediction, "correct": prediction == label}
        for number, label, prediction in zip(evaluation.row_numbers, evaluation.labels, predicted, strict=True)
    ]


def answer_problems(encoder: Encoder, prompt: str, texts: Sequence[str]) -> Iterator[str]:
    """Problems of answers that have no tokens or leave no room for the prompt."""
    for text, ids in zip(texts, encoder.answers(prompt, texts), strict=True):
        if not ids or not text.strip():
            yield f"the answer {text!r} has no tokens; give it text"
        elif len(ids) >= encoder.max_length:
            yield (
                f"the answer {short(text)} has {len(ids)} tokens, training.max_length is {encoder.max_length}: "
                "nothing of the prompt would be left; raise max_length or shorten the answer"
            )

"""pipelines.data.kinds.choosing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from pipelines.data.encoding import Encoded, Encoder, fill
from pipelines.data.kinds.base import EvaluationSet, Scored, rows_of, short


def prompted(template: str, rows: Iterable[Mapping[str, list]], encoder: Encoder) -> Iterator[tuple[list[int], dict]]:
    """(uncut prompt tokens, row) of every row."""
    for batch in rows:
        unpacked = list(rows_of(batch))
        yield from zip(encoder.prompts([fill(template, row) for row in unpacked]), unpacked, strict=True)


def continued(number: int, prompt: list[int], answer: Sequence[int], encoder: Encoder, choice: int = -1) -> Encoded:
    """Prompt and answer in `max_length` tokens; the answer stays whole."""
    kept = encoder.cut(prompt, encoder.max_length - len(answer))
    return Encoded(number, [*kept, *answer], start=len(kept), choice=choice)


def alternatives(number: int, prompt: list[int], answers: Sequence[Sequence[int]], encoder: Encoder):
    """One sequence an answer, all after the same cut prompt."""
    kept = encoder.cut(prompt, encoder.max_length - max(map(len, answers)))
    for choice, answer in enumerate(answers):
        yield Encoded(number, [*kept, *answer], start=len(kept), choice=choice)


def likeliest(scored: Sequence[Scored], divisor: Callable[[Scored], float] = lambda entry: 1.0) -> list[int]:
    """The choice of the smallest NLL (divided) of each example, the first of equals."""
    best: dict[int, tuple[float, int]] = {}
    for entry in scored:
        found = (entry.nll / divisor(entry), entry.choice)
        best[entry.example] = min(best.get(entry.example, (math.inf, -1)), found)
    return [choice for _, (_, choice) in sorted(best.items())]


def loss_among_choices(evaluation: EvaluationSet, scored: Sequence[Scored]) -> float:
    """Mean −log p(right), where p is the likelihood of a choice's text, made to add up to 1 over the choices."""
    choices: dict[int, dict[int, float]] = {}
    for entry in scored:
        choices.setdefault(entry.example, {})[entry.choice] = entry.nll
    losses = []
    for (_, nll), label in zip(sorted(choices.items()), evaluation.labels, strict=True):
        least = min(nll.values())
        losses.append(nll[label] - least + math.log(math.fsum(math.exp(least - value) for value in nll.values())))
    return math.fsum(losses) / len(losses)


def compared(evaluation: EvaluationSet, predicted: Sequence[int]) -> list[dict]:
    """Outcomes of one predicted class an example."""
    return [
        {"id": number, "label": label, "prediction": prediction, "correct": prediction == label}
        for number, label, prediction in zip(evaluation.row_numbers, evaluation.labels, predicted, strict=True)
    ]


def answer_problems(encoder: Encoder, prompt: str, texts: Sequence[str]) -> Iterator[str]:
    """Answers that have no tokens, or leave no room for the prompt."""
    for text, ids in zip(texts, encoder.answers(prompt, texts), strict=True):
        if not ids or not text.strip():
            yield f"the answer {text!r} has no tokens; give it a text"
        elif len(ids) >= encoder.max_length:
            yield (
                f"the answer {short(text)} has {len(ids)} tokens, training.max_length is {encoder.max_length}: "
                "nothing of the prompt would be left; raise max_length or shorten the answer"
            )

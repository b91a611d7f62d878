"""Multiple choice: the likeliest of several continuations of a prompt.

A row looks like `{"question": "…", "endings": ["…", "…"], "label": 0}`, or has one column per choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.config.tasks import MultipleChoiceTask, template_fields
from pipelines.data.encoding import Encoder, fill
from pipelines.data.kinds.base import (
    EvaluationSet,
    Kind,
    Row,
    Scored,
    Summary,
    short,
    template_problems,
    text_problems,
)
from pipelines.data.kinds.choosing import (
    alternatives,
    answer_problems,
    compared,
    continued,
    likeliest,
    loss_among_choices,
    prompted,
)
from pipelines.data.sources import records
from pipelines.metrics import answers as metrics

if TYPE_CHECKING:
    import datasets


def choices_of(task: MultipleChoiceTask, row: Row) -> list[str]:
    """The texts of a row's choices."""
    if isinstance(task.choices, str):
        return list(row[task.choices])
    return [fill(template, row) for template in task.choices]


def right_choice(value: Any, choices: Sequence[str]) -> int | None:
    """Index of the correct choice, given by text, index from 0, or letter (A, B, …); None for anything else."""
    if value in choices:
        return choices.index(value)
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    elif isinstance(value, str) and len(value.strip()) == 1:
        value = ord(value.strip().upper()) - ord("A")
    return int(value) if isinstance(value, int | float) and value in range(len(choices)) else None


class MultipleChoice(Kind):
    name = "multiple-choice"
    scorer = "choices"

    def inputs(self, task: MultipleChoiceTask) -> list[str]:
        templates = [] if isinstance(task.choices, str) else task.choices
        fields = [field for template in (task.prompt, *templates) for field in template_fields(template)]
        return list(dict.fromkeys([*fields, *([task.choices] if isinstance(task.choices, str) else [])]))

    def answers(self, task: MultipleChoiceTask) -> list[str]:
        return [task.label]

    def input_problems(self, task: MultipleChoiceTask, row: Row) -> Iterator[str]:
        yield from template_problems(task.prompt, row)
        if not isinstance(task.choices, str):
            for template in task.choices:
                yield from template_problems(template, row)
            return
        found = row[task.choices]
        if not isinstance(found, list) or len(found) < 2:
            yield f"'{task.choices}' is {short(found)}, expected a list of at least two texts; write it as a list"
            return
        for choice in found:
            yield from text_problems(task.choices, choice)

    def task_problems(self, task: MultipleChoiceTask, encoder: Encoder | None) -> Iterator[str]:
        if encoder is not None and not isinstance(task.choices, str):
            fixed = [template for template in task.choices if not template_fields(template)]
            yield from answer_problems(encoder, task.prompt, [fill(template, {}) for template in fixed])

    def reader(self, task: MultipleChoiceTask) -> Callable[[Row], int | None]:
        return lambda row: right_choice(row[task.label], choices_of(task, row))

    def question(self, task: MultipleChoiceTask, row: Row) -> str:
        return fill(task.prompt, row)

    def reference(self, task: MultipleChoiceTask, row: Row) -> str | None:
        choices = choices_of(task, row)
        found = right_choice(row[task.label], choices)
        return None if found is None else choices[found]

    def train(self, task: MultipleChoiceTask, rows: Iterable[Mapping[str, list]], encoder: Encoder):
        for number, (prompt, row) in enumerate(prompted(task.prompt, rows, encoder)):
            choices = choices_of(task, row)
            answer = encoder.answers(task.prompt, [choices[right_choice(row[task.label], choices)]])[0]
            yield continued(number, prompt, answer[: encoder.max_length - 1], encoder)

    def items(self, task: MultipleChoiceTask, rows: Iterable[Mapping[str, list]], encoder: Encoder):
        for number, (prompt, row) in enumerate(prompted(task.prompt, rows, encoder)):
            answers = encoder.answers(task.prompt, choices_of(task, row))
            yield from alternatives(number, prompt, [ids[: encoder.max_length - 1] for ids in answers], encoder)

    def targets(self, task: MultipleChoiceTask, rows: datasets.Dataset, encoder: Encoder) -> dict[str, Any]:
        labels = tuple(right_choice(row[task.label], choices_of(task, row)) for row in records(rows))
        return {"labels": labels}

    def settings(self, task: MultipleChoiceTask, encoder: Encoder) -> dict[str, Any]:
        return {"normalization": task.normalization}

    def predictions(self, evaluation: EvaluationSet, scored: Sequence[Scored]) -> list[dict]:
        texts = _texts(evaluation)
        chosen = enumerate(self._predicted(evaluation, scored))
        return [{"prediction": choice, "label": texts[example, choice]} for example, choice in chosen]

    def outcomes(self, evaluation: EvaluationSet, scored: Sequence[Scored]) -> list[dict]:
        return compared(evaluation, self._predicted(evaluation, scored))

    def _predicted(self, evaluation: EvaluationSet, scored: Sequence[Scored]) -> list[int]:
        if evaluation.normalization == "none":
            return likeliest(scored)
        if evaluation.normalization == "tokens":
            return likeliest(scored, lambda entry: max(1, entry.tokens))
        texts = _texts(evaluation)
        return likeliest(scored, lambda entry: max(1, len(texts[entry.example, entry.choice])))

    def loss(self, evaluation: EvaluationSet, scored: Sequence[Scored]) -> float | None:
        return loss_among_choices(evaluation, scored)

    def summary(self, evaluation: EvaluationSet, outcomes: Sequence[dict]) -> Summary:
        return Summary(metrics.accuracy([o["prediction"] for o in outcomes], [o["label"] for o in outcomes]))


def _texts(evaluation: EvaluationSet) -> dict[tuple[int, int], str]:
    """(example, choice) → text of the choice."""
    return {
        (item.example, item.choice): evaluation.tokenizer.decode(item.input_ids[item.start :]).strip()
        for item in evaluation.items
    }

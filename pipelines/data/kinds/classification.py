"""Classification by a linear head on the last token, or by the likeliest label text after a prompt.

A row looks like `{"sentence": "a charming journey", "label": 1}`.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.config.tasks import ClassificationTask, template_fields
from pipelines.data.encoding import Encoded, Encoder, fill
from pipelines.data.files import read_sibling
from pipelines.data.kinds.base import EvaluationSet, Kind, Row, Scored, Summary, short, template_problems
from pipelines.data.kinds.choosing import (
    alternatives,
    answer_problems,
    compared,
    continued,
    likeliest,
    loss_among_choices,
    prompted,
)
from pipelines.data.sources import load_split, records
from pipelines.errors import DataError, Problem
from pipelines.metrics import answers as metrics

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class LabelSet:
    """Class names in order, and the class index of every raw label value."""

    names: tuple[str, ...]
    index: dict[Any, int]

    def __len__(self) -> int:
        return len(self.names)

    def of(self, value: Any) -> int | None:
        """Class index of a raw value; None if it is not in the set."""
        return self.index.get(value) if isinstance(value, str | int | float) else None


def label_set(task: ClassificationTask) -> LabelSet:
    """Classes of a task: `labels:`, else labels.json beside the data, the hub's class names, or the labels in train.

    A number may also be written as text, as in a CSV file.

    Raises:
        DataError: labels.json is not a list of names.
    """
    if isinstance(task.labels, dict):
        return LabelSet(tuple(task.labels.values()), _spellings(task.labels))
    names = task.labels or _labels_file(task.data) or _feature_names(task)
    if names is None:
        values = _occurring(task)
        return LabelSet(tuple(map(str, values)), _spellings(values))
    return LabelSet(tuple(names), _spellings(range(len(names))) | {name: i for i, name in enumerate(names)})


def _spellings(values: Iterable) -> dict[Any, int]:
    """value → position, with integers both as number and as text."""
    index: dict[Any, int] = {}
    for position, value in enumerate(values):
        if isinstance(value, int) and not isinstance(value, bool):
            index.setdefault(str(value), position)
        elif isinstance(value, str) and value.isdecimal() and value.isascii():
            index.setdefault(int(value), position)
        index[value] = position
    return index


def _labels_file(data: str) -> list[str] | None:
    content = read_sibling(data, "labels.json")
    if content is None:
        return None
    file = f"{data.rstrip('/')}/labels.json"
    try:
        names = json.loads(content)
    except ValueError as error:
        raise DataError([Problem(file, f"not valid JSON ({error}); expected a list of class names")]) from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise DataError([Problem(file, f"expected a list of class names, found {short(names)}")])
    return names


def _feature_names(task: ClassificationTask) -> list[str] | None:
    return getattr(load_split(task, "train").features.get(task.label), "names", None)


def _occurring(task: ClassificationTask) -> list:
    """The sorted values of the label column in train; numbers by value, even if written as text."""
    values = {
        row[task.label] for row in records(load_split(task, "train"), [task.label]) if _is_label(row[task.label])
    }
    if values and all(isinstance(value, str) and value.isdecimal() for value in values):
        return sorted(values, key=lambda value: (int(value), value))
    return sorted(values, key=lambda value: (str(type(value)), value))


def _is_label(value: Any) -> bool:
    return isinstance(value, str | int) or (isinstance(value, float) and not math.isnan(value))


class _Classification(Kind):
    """Common to both heads: labels, and outcomes from one predicted class per example."""

    def answers(self, task: ClassificationTask) -> list[str]:
        return [task.label]

    def classes(self, task: ClassificationTask) -> tuple[str, ...]:
        return label_set(task).names

    def reader(self, task: ClassificationTask) -> Callable[[Row], int | None]:
        labels = label_set(task)
        return lambda row: labels.of(row[task.label])

    def reference(self, task: ClassificationTask, row: Row) -> str | None:
        labels = label_set(task)
        found = labels.of(row[task.label])
        return None if found is None else labels.names[found]

    def targets(self, task: ClassificationTask, rows: datasets.Dataset, encoder: Encoder) -> dict[str, Any]:
        labels = label_set(task)
        return {"labels": tuple(labels.of(row[task.label]) for row in records(rows, [task.label]))}

    def settings(self, task: ClassificationTask, encoder: Encoder) -> dict[str, Any]:
        return {"class_names": label_set(task).names}

    @abstractmethod
    def predicted(self, scored: Sequence[Scored]) -> list[int]:
        """Index of the chosen class per example."""

    def predictions(self, evaluation: EvaluationSet, scored: Sequence[Scored]) -> list[dict]:
        chosen = self.predicted(scored)
        return [{"prediction": choice, "label": evaluation.class_names[choice]} for choice in chosen]

    def outcomes(self, evaluation: EvaluationSet, scored: Sequence[Scored]) -> list[dict]:
        return compared(evaluation, self.predicted(scored))

    def summary(self, evaluation: EvaluationSet, outcomes: Sequence[dict]) -> Summary:
        score = metrics.accuracy if evaluation.metric == "accuracy" else metrics.macro_f1
        return Summary(score([o["prediction"] for o in outcomes], [o["label"] for o in outcomes]))


class Classifier(_Classification):
    """A linear head on the last token."""

    name = "classifier"
    scorer = "head"

    def inputs(self, task: ClassificationTask) -> list[str]:
        return task.text_fields

    def train(self, task: ClassificationTask, rows: Iterable[Mapping[str, list]], encoder: Encoder):
        labels, number = label_set(task), 0
        for batch in rows:
            for (ids, lost), raw in zip(_cut_texts(task, batch, encoder), batch[task.label], strict=True):
                yield Encoded(number, ids, choice=labels.index[raw], cut=lost)
                number += 1

    def items(self, task: ClassificationTask, rows: Iterable[Mapping[str, list]], encoder: Encoder):
        number = 0
        for batch in rows:
            for ids, lost in _cut_texts(task, batch, encoder):
                yield Encoded(number, ids, cut=lost)
                number += 1

    def predicted(self, scored: Sequence[Scored]) -> list[int]:
        return [entry.choice for entry in sorted(scored)]

    def loss(self, evaluation: EvaluationSet, scored: Sequence[Scored]) -> float | None:
        pairs = zip(sorted(scored), evaluation.labels, strict=True)
        return math.fsum(entry.losses[label] for entry, label in pairs) / len(scored)


class Verbalizer(_Classification):
    """The label whose text is the likeliest continuation of the prompt."""

    name = "verbalizer"
    scorer = "choices"

    def inputs(self, task: ClassificationTask) -> list[str]:
        return template_fields(task.prompt)

    def input_problems(self, task: ClassificationTask, row: Row) -> Iterator[str]:
        return template_problems(task.prompt, row)

    def question(self, task: ClassificationTask, row: Row) -> str:
        return fill(task.prompt, row)

    def task_problems(self, task: ClassificationTask, encoder: Encoder | None) -> Iterator[str]:
        names = label_set(task).names
        if task.verbalizer and len(task.verbalizer) != len(names):
            yield f"verbalizer has {len(task.verbalizer)} texts for {len(names)} labels; give one text per label"
        elif encoder is not None:
            yield from answer_problems(encoder, task.prompt, task.verbalizer or names)

    def train(self, task: ClassificationTask, rows: Iterable[Mapping[str, list]], encoder: Encoder):
        labels, texts = label_set(task), self._answers(task, encoder)
        for number, (prompt, row) in enumerate(prompted(task.prompt, rows, encoder)):
            yield continued(number, prompt, texts[labels.index[row[task.label]]], encoder)

    def items(self, task: ClassificationTask, rows: Iterable[Mapping[str, list]], encoder: Encoder):
        texts = self._answers(task, encoder)
        for number, (prompt, _) in enumerate(prompted(task.prompt, rows, encoder)):
            yield from alternatives(number, prompt, texts, encoder)

    def _answers(self, task: ClassificationTask, encoder: Encoder) -> list[tuple[int, ...]]:
        return encoder.answers(task.prompt, list(task.verbalizer or label_set(task).names))

    def predicted(self, scored: Sequence[Scored]) -> list[int]:
        return likeliest(scored)

    def loss(self, evaluation: EvaluationSet, scored: Sequence[Scored]) -> float | None:
        return loss_among_choices(evaluation, scored)


def _cut_texts(task: ClassificationTask, batch: Mapping[str, list], encoder: Encoder) -> Iterator[tuple]:
    """(token ids in `max_length`, tokens left out) of each row."""
    texts = joined(batch, task.text_fields)
    encoded = encoder.texts(texts)
    return zip(encoded, encoder.lost(texts, encoded), strict=True)


def joined(batch: Mapping[str, list], fields: Sequence[str]) -> list[str]:
    """The text fields of each row, joined by newlines."""
    return ["\n".join(parts) for parts in zip(*(batch[field] for field in fields), strict=True)]

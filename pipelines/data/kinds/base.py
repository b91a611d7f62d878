"""The interface of a kind of task, and the data that passes between kinds and scorers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pipelines.config.tasks import template_fields
from pipelines.data.encoding import Encoded, Encoder

if TYPE_CHECKING:
    import datasets

Row = Mapping[str, Any]


@dataclass(frozen=True, order=True)
class Scored:
    """What a scorer says of one sequence.

    Attributes:
        example, choice: of the sequence (a classifier head: its prediction in place of the choice).
        nll: summed over the counted tokens, in nats.
        tokens: how many were counted.
        output: token ids that the model wrote (greedy).
        losses: NLL of every class (a classifier head).
    """

    example: int
    choice: int
    nll: float = 0.0
    tokens: int = 0
    output: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class EvaluationSet:
    """What one score cell is computed from.

    Attributes:
        kind: key in `KINDS`.
        labels: one class index an example (empty where there are none).
        row_numbers: the row of the split that each example is (of text in a stream: the window's number).
        class_names: of a classification.
        references: the right answer of each example of a generation task.
        normalization: what a choice's likelihood is divided by.
        max_new_tokens, stops: of greedy decoding: its limit, and the tokens that end an answer.
    """

    name: str
    kind: str
    metric: str
    items: Sequence[Encoded]
    labels: tuple[int, ...]
    row_numbers: tuple[int, ...]
    class_names: tuple[str, ...]
    digest: str
    references: tuple[str, ...] = ()
    normalization: str = "none"
    max_new_tokens: int = 0
    stops: tuple[int, ...] = ()
    tokenizer: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Summary:
    """The figures of one cell: `value` is what the metric says; `extras` are other metrics of the same outcomes."""

    value: float
    nll: float | None = None
    tokens: int | None = None
    extras: dict[str, float] = field(default_factory=dict)


class Kind:
    """One kind of task; subclasses override what they need. Stateless: the task comes as an argument.

    Attributes:
        name: key in `KINDS`.
        scorer: how a model is run: head | likelihood | choices | greedy.
    """

    name: ClassVar[str]
    scorer: ClassVar[str] = "likelihood"

    # -- rows

    def inputs(self, task) -> list[str]:
        """Columns that a model sees."""
        raise NotImplementedError

    def answers(self, task) -> list[str]:
        """Columns that hold what the model should say."""
        return []

    def columns(self, task) -> list[str]:
        return list(dict.fromkeys([*self.inputs(task), *self.answers(task)]))

    def input_problems(self, task, row: Row) -> Iterator[str]:
        """What is wrong with the inputs of one row, each as `'column' is …; remedy`."""
        for column in self.inputs(task):
            yield from text_problems(column, row[column])

    def row_problems(self, task, row: Row) -> Iterator[str]:
        """What is wrong with one row of train or test, its class apart."""
        return self.input_problems(task, row)

    def task_problems(self, task, encoder: Encoder | None) -> Iterator[str]:
        """What is wrong with the task itself, given its data (and tokenizer, where there is one)."""
        yield from ()

    def classes(self, task) -> tuple[str, ...]:
        """Names of the classes of a classification."""
        return ()

    def reader(self, task) -> Callable[[Row], int | None]:
        """A function that gives the class index of a row; None where it is unknown, or the kind has no classes."""
        return lambda row: None

    def text(self, task, row: Row) -> str:
        """A row's input as one text: what identifies it when splits are compared, and tells whether it is empty."""
        return "\n".join(str(row[column]) for column in self.inputs(task))

    # -- sequences

    def train(self, task, rows: Iterable[Mapping[str, list]], encoder: Encoder) -> Iterator[Encoded]:
        """Sequences to learn: loss from `start` on, or class `choice` for a classifier head.

        Args:
            rows: batches of rows as columns.
        """
        raise NotImplementedError

    def items(self, task, rows: Iterable[Mapping[str, list]], encoder: Encoder) -> Iterator[Encoded]:
        """Sequences to score, from the inputs only: the same for an evaluation and for `predict`."""
        raise NotImplementedError

    def targets(self, task, rows: datasets.Dataset, encoder: Encoder) -> dict[str, Any]:
        """Fields of `EvaluationSet` that say what is right."""
        return {}

    def settings(self, task, encoder: Encoder) -> dict[str, Any]:
        """Fields of `EvaluationSet` that scoring needs beside its sequences."""
        return {}

    # -- scores

    def predictions(self, evaluation: EvaluationSet, scored: Sequence[Scored]) -> list[dict]:
        """What the model says of each example, in their order, without knowing what is right."""
        raise NotImplementedError

    def outcomes(self, evaluation: EvaluationSet, scored: Sequence[Scored]) -> list[dict]:
        """`predictions` against what is right: `{"id", …, "correct" | "score" | "nll"}` an example."""
        raise NotImplementedError

    def loss(self, evaluation: EvaluationSet, scored: Sequence[Scored]) -> float | None:
        """Mean cross-entropy of the right class, in nats; None where there are no classes. It moves before they do."""
        return None

    def summary(self, evaluation: EvaluationSet, outcomes: Sequence[dict]) -> Summary:
        raise NotImplementedError


def text_problems(column: str, value: Any, empty: bool = True) -> Iterator[str]:
    """Why a value is no usable text."""
    if value is None:
        yield f"'{column}' is missing; fill it or drop the row"
    elif isinstance(value, float) and math.isnan(value):
        yield f"'{column}' is NaN, a missing value; fill it or drop the row"
    elif not isinstance(value, str):
        yield f"'{column}' is a {type(value).__name__} ({short(value)}), expected text; write it as a string"
    elif empty and not value.strip():
        yield f"'{column}' is empty text; fill it or drop the row"
    elif any("\ud800" <= character <= "\udfff" for character in value):
        yield f"'{column}' holds half of a surrogate pair, which is no character; mend the text"


def template_problems(template: str, row: Row) -> Iterator[str]:
    """Why a template cannot be filled from a row. Numbers may stand in a template, missing values may not."""
    fields = template_fields(template)
    for column in fields:
        value = row[column]
        if isinstance(value, bool | int) or (isinstance(value, float) and not math.isnan(value)):
            continue
        # a template of several fields may have an empty one
        yield from text_problems(column, value, empty=len(fields) == 1)


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def rows_of(batch: Mapping[str, list]) -> Iterator[dict]:
    """A batch of columns as rows."""
    names = list(batch)
    for values in zip(*batch.values(), strict=True):
        yield dict(zip(names, values, strict=True))

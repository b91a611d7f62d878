"""Interface of a kind of task, and the data exchanged between kinds and scorers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
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
    """Result of a scorer for one sequence.

    Attributes:
        example, choice: of the sequence; for a classifier head, choice is the predicted class.
        nll: sum over the scored tokens, in nats.
        tokens: number of scored tokens.
        output: generated token ids (greedy).
        losses: NLL of every class (classifier head).
    """

    example: int
    choice: int
    nll: float = 0.0
    tokens: int = 0
    output: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class EvaluationSet:
    """Everything that a score cell is computed from.

    Attributes:
        kind: key in `KINDS`.
        labels: class index per example (empty if there are no classes).
        row_numbers: row of the split per example (for text in one stream: number of the window).
        class_names: names of the classes (classification).
        references: correct answer per example (generation).
        normalization: what the log-likelihood of a choice is divided by.
        max_new_tokens, stops: longest answer of greedy decoding, and the tokens that end one.
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
    """Numbers of one score cell: `value` is the task's metric, `extras` are other metrics of the same outcomes."""

    value: float
    nll: float | None = None
    tokens: int | None = None
    extras: dict[str, float] = field(default_factory=dict)


class Kind(ABC):
    """One kind of task; subclasses override what they need. Stateless: the task is an argument.

    Attributes:
        name: key in `KINDS`.
        scorer: how the model is run: head, likelihood, choices or greedy.
    """

    name: ClassVar[str]
    scorer: ClassVar[str] = "likelihood"

    # -- rows

    @abstractmethod
    def inputs(self, task) -> list[str]:
        """Columns that the model sees."""

    def answers(self, task) -> list[str]:
        """Columns with the expected answer."""
        return []

    def columns(self, task) -> list[str]:
        """Input and answer columns, each once."""
        return list(dict.fromkeys([*self.inputs(task), *self.answers(task)]))

    def input_problems(self, task, row: Row) -> Iterator[str]:
        """Problems of the inputs of one row, each as `'column' is …; remedy`."""
        for column in self.inputs(task):
            yield from text_problems(column, row[column])

    def row_problems(self, task, row: Row) -> Iterator[str]:
        """Problems of one row of train or test, apart from its class."""
        return self.input_problems(task, row)

    def rendering_problems(self, task, row: Row, encoder: Encoder, training: bool) -> Iterator[str]:
        """Problems of what becomes of a row without other problems, e.g. by a chat template."""
        yield from ()

    def unused_columns(self, task, columns: Sequence[str]) -> Iterator[str]:
        """Hints about columns of the data that the task leaves unused, but probably should not."""
        yield from ()

    def task_problems(self, task, encoder: Encoder | None) -> Iterator[str]:
        """Problems of the task itself, given its data and, if available, its tokenizer."""
        yield from ()

    def classes(self, task) -> tuple[str, ...]:
        """Names of the classes; empty if the kind has none."""
        return ()

    def reader(self, task) -> Callable[[Row], int | None]:
        """A function from a row to its class index; None if unknown, or if the kind has no classes."""
        return lambda row: None

    def text(self, task, row: Row) -> str:
        """The input of a row as one text, to compare splits and to find empty rows."""
        return "\n".join(str(row[column]) for column in self.inputs(task))

    def question(self, task, row: Row) -> str:
        """What a row asks, as a person reads it; for tasks with a prompt, the text that the model continues."""
        return self.text(task, row)

    def reference(self, task, row: Row) -> str | None:
        """The expected answer of a row, as a person reads it; None if there is none."""
        return None

    # -- sequences

    def train(self, task, rows: Iterable[Mapping[str, list]], encoder: Encoder) -> Iterator[Encoded]:
        """Training sequences: loss from `start` on, or class `choice` for a classifier head.

        Args:
            rows: batches of rows as columns.
        """
        raise TypeError(f"nothing trains on {self.name}")

    @abstractmethod
    def items(self, task, rows: Iterable[Mapping[str, list]], encoder: Encoder) -> Iterator[Encoded]:
        """Sequences to score, made from the inputs alone: the same in an evaluation and in `predict`."""

    def targets(self, task, rows: datasets.Dataset, encoder: Encoder) -> dict[str, Any]:
        """Fields of `EvaluationSet` with the expected answers."""
        return {}

    def settings(self, task, encoder: Encoder) -> dict[str, Any]:
        """Fields of `EvaluationSet` that scoring needs besides the sequences."""
        return {}

    # -- scores

    @abstractmethod
    def predictions(self, evaluation: EvaluationSet, scored: Sequence[Scored]) -> list[dict]:
        """The answer of the model per example, in order; needs no expected answers."""

    @abstractmethod
    def outcomes(self, evaluation: EvaluationSet, scored: Sequence[Scored]) -> list[dict]:
        """`predictions` compared with the expected answers: `{"id", …, "correct" | "score" | "nll"}` per example."""

    def loss(self, evaluation: EvaluationSet, scored: Sequence[Scored]) -> float | None:
        """Mean cross-entropy of the correct class in nats, which is finer than the score; None without classes."""
        return None

    @abstractmethod
    def summary(self, evaluation: EvaluationSet, outcomes: Sequence[dict]) -> Summary:
        """The numbers of a score cell from its outcomes."""


def text_problems(column: str, value: Any, empty: bool = True) -> Iterator[str]:
    """Why a value is not usable as text."""
    if value is None:
        yield f"'{column}' is missing; fill it or drop the row"
    elif isinstance(value, float) and math.isnan(value):
        yield f"'{column}' is NaN, a missing value; fill it or drop the row"
    elif not isinstance(value, str):
        yield f"'{column}' is a {type(value).__name__} ({short(value)}), expected text; write it as a string"
    elif empty and not value.strip():
        yield f"'{column}' is empty text; fill it or drop the row"
    elif any("\ud800" <= character <= "\udfff" for character in value):
        yield f"'{column}' contains a lone surrogate, which is no character; correct the text"


def template_problems(template: str, row: Row) -> Iterator[str]:
    """Why a template cannot be filled from a row. Numbers are allowed, missing values are not."""
    fields = template_fields(template)
    for column in fields:
        value = row[column]
        if isinstance(value, bool | int) or (isinstance(value, float) and not math.isnan(value)):
            continue
        # one of several fields may be empty
        yield from text_problems(column, value, empty=len(fields) == 1)


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def rows_of(batch: Mapping[str, list]) -> Iterator[dict]:
    """The rows of a batch of columns."""
    names = list(batch)
    for values in zip(*batch.values(), strict=True):
        yield dict(zip(names, values, strict=True))

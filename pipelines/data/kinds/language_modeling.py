"""Language modelling: text of a domain as a task, or as a retention corpus that is never trained on.

A row is one document, e.g. `{"text": "…"}`. Scores are nats per token; lower is better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from pipelines.config.tasks import LanguageModelingTask, RetentionCorpus
from pipelines.data.encoding import Encoded, Encoder, pack, token_stream, windows
from pipelines.data.kinds.base import EvaluationSet, Kind, Row, Scored, Summary, text_problems
from pipelines.metrics import score_matrix

BEGINNING = 160  # characters of a document that a sample continues
CONTINUATION = 400  # characters of its own continuation that are shown

Batches = Iterable[Mapping[str, list]]


class _Text(Kind):
    """Common to all text: outcomes from the summed NLL of windows."""

    def inputs(self, task: LanguageModelingTask | RetentionCorpus) -> list[str]:
        return [task.text]

    def input_problems(self, task, row: Row) -> Iterator[str]:
        # empty documents are harmless, and WikiText is full of them
        return text_problems(task.text, row[task.text], empty=False)

    def predictions(self, evaluation: EvaluationSet, scored: Sequence[Scored]) -> list[dict]:
        found = _sums(scored)
        means = [found[n][0] / found[n][1] if n in found else None for n in range(len(evaluation.row_numbers))]
        return [
            {"nll": mean, "perplexity": score_matrix.perplexity(mean), "tokens": found[n][1] if n in found else 0}
            for n, mean in enumerate(means)
        ]

    def outcomes(self, evaluation: EvaluationSet, scored: Sequence[Scored]) -> list[dict]:
        return [
            {"id": evaluation.row_numbers[example], "nll": nll, "tokens": tokens}
            for example, (nll, tokens) in _sums(scored).items()
        ]

    def summary(self, evaluation: EvaluationSet, outcomes: Sequence[dict]) -> Summary:
        tokens = sum(outcome["tokens"] for outcome in outcomes)
        nll = math.fsum(outcome["nll"] for outcome in outcomes) / tokens
        return Summary(nll, nll, tokens)


def _sums(scored: Sequence[Scored]) -> dict[int, tuple[float, int]]:
    """example → (sum of NLL, tokens) over its windows, in order of examples."""
    parts: dict[int, list[Scored]] = {}
    for entry in sorted(scored):
        parts.setdefault(entry.example, []).append(entry)
    return {
        example: (math.fsum(entry.nll for entry in entries), sum(entry.tokens for entry in entries))
        for example, entries in parts.items()
    }


class LanguageModeling(_Text):
    """Text of a domain. Training packs documents into full blocks; evaluation uses sliding windows."""

    name = "language-modeling"

    def question(self, task: LanguageModelingTask, row: Row) -> str:
        return _parts(row[task.text])[0]

    def reference(self, task: LanguageModelingTask, row: Row) -> str | None:
        return _parts(row[task.text])[1]

    def train(self, task: LanguageModelingTask, rows: Batches, encoder: Encoder) -> Iterator[Encoded]:
        separate = task.documents == "separate"
        for number, (block, breaks) in enumerate(pack(_documents(task, rows, encoder), encoder.max_length)):
            yield Encoded(number, block, breaks=breaks if separate else ())

    def items(self, task: LanguageModelingTask, rows: Batches, encoder: Encoder) -> Iterator[Encoded]:
        stride = max(1, encoder.max_length // 2)
        if task.documents == "joined":
            stream = token_stream((batch[task.text] for batch in rows), encoder, end=True)
            yield from windows(stream, encoder.max_length, stride)
            return
        for number, document in enumerate(_documents(task, rows, encoder)):
            yield from windows([document], encoder.max_length, stride, example=number)


class Retention(_Text):
    """A corpus as one stream, in windows of the model's context."""

    name = "retention"

    def items(self, task: RetentionCorpus, rows: Batches, encoder: Encoder) -> Iterator[Encoded]:
        stream = token_stream(([text + "\n" for text in batch[task.text]] for batch in rows), encoder, end=False)
        yield from windows(stream, encoder.max_length, task.stride or max(1, encoder.max_length // 2))


def _parts(document: str) -> tuple[str, str]:
    """(beginning, what follows it) of a document, for reading: the beginning ends between two words if it can."""
    text = document.strip()
    length = min(BEGINNING, (len(text) + 1) // 2)
    words = text[: length + 1].rsplit(maxsplit=1)
    shown = words[0] if len(words) > 1 else text[:length]
    rest = text[len(shown) :].strip()
    return shown, rest if len(rest) <= CONTINUATION else f"{rest[:CONTINUATION]}…"


def _documents(task: LanguageModelingTask, rows: Batches, encoder: Encoder) -> Iterator[list[int]]:
    """Tokens of each document, followed by an end token."""
    for batch in rows:
        for ids in encoder.documents(batch[task.text]):
            yield [*ids, encoder.end]

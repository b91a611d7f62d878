"""Training and evaluation sets: encoded once per node, cached by digest, memory-mapped.

`sources` reads rows, `kinds` interprets them, `encoding` tokenizes them; preflight/data.py has validated them. A set
is a pure function of (source, split, seed, tokenizer), so all workers of all runs see the same examples in the same
order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipelines.config.pipeline import PipelineConfig
from pipelines.config.tasks import LanguageModelingTask, RetentionCorpus, Source, TaskSource
from pipelines.data.encoding import IGNORE, Encoded, Encoder
from pipelines.data.identity import data_identity, score_identity
from pipelines.data.kinds import kind_of
from pipelines.data.kinds.base import EvaluationSet
from pipelines.data.sources import batches, digest_of, load_split
from pipelines.data.token_cache import Sequences, cached_sequences

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from curlora.continual import Example


def subset_indices(count: int, at_most: int | None, seed: int) -> np.ndarray:
    """A seeded sample of at most `at_most` row numbers, ascending; all rows for None."""
    if at_most is None or at_most >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng([seed, count]).choice(count, at_most, replace=False))


class Examples(Sequence):
    """Training examples of one or several tasks, read from memory-mapped sequences on access."""

    def __init__(self, parts: Sequence[tuple[TaskSource, Sequences]]):
        self.parts = list(parts)
        self.ends = np.cumsum([len(sequences) for _, sequences in self.parts])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return np.concatenate([sequences.numbers("lengths") for _, sequences in self.parts])

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = index + len(self) if index < 0 else index
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        part = int(np.searchsorted(self.ends, index, side="right"))
        task, sequences = self.parts[part]
        return _example(task, sequences[int(index) - (int(self.ends[part - 1]) if part else 0)])


def _example(task: TaskSource, encoded: Encoded) -> Example:
    from curlora.continual.strategy import Example  # imports PEFT, which a driver does not need

    ids = tuple(encoded.input_ids.tolist())
    if kind_of(task).scorer == "head":
        return Example(task.name, ids, target=encoded.choice)
    labels = [IGNORE] * encoded.start + list(ids[encoded.start :])
    for begin, end in zip(encoded.gaps[::2], encoded.gaps[1::2], strict=True):
        labels[begin:end] = [IGNORE] * (end - begin)
    for position in encoded.breaks:
        labels[position] = IGNORE  # the first token of a document does not follow from the previous one
    return Example(task.name, ids, labels=tuple(labels), breaks=encoded.breaks)


def training_examples(
    tasks: TaskSource | Iterable[TaskSource],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    at_most: int | None,
    seed: int,
    split: str = "train",
) -> Examples:
    """The training splits of tasks as token sequences of at most `max_length`.

    Args:
        at_most: rows per task; None for all.
        split: `validation` for rows of that split, encoded in the same way.
    """
    tasks = [tasks] if isinstance(tasks, TaskSource) else tasks
    chosen = (at_most, seed, split)
    return Examples([(task, training_sequences(task, tokenizer, max_length, *chosen)) for task in tasks])


def training_sequences(
    task, tokenizer, max_length: int, at_most: int | None, seed: int, split: str = "train"
) -> Sequences:
    """The training split of one task, encoded; arguments as of `training_examples`."""
    rows = load_split(task, split)
    rows = _subset(rows, at_most, seed)
    encoder, kind = Encoder(tokenizer, max_length), kind_of(task)
    identity = {"part": split, "at_most": at_most, "seed": seed if at_most else None} | data_identity(task)
    if split != "train":  # whose classes the rows are read with
        identity["rows"] = digest_of(task, split)
    return cached_sequences(identity, encoder, lambda: kind.train(task, batches(rows, kind.columns(task)), encoder))


def _subset(rows: datasets.Dataset, at_most: int | None, seed: int) -> datasets.Dataset:
    chosen = subset_indices(len(rows), at_most, seed)
    return rows if len(chosen) == len(rows) else rows.select(chosen)


def evaluation_set(
    source: Source, tokenizer: PreTrainedTokenizerBase, config: PipelineConfig, context: int
) -> EvaluationSet:
    """The test split of a task, or a retention corpus, encoded for scoring.

    Args:
        context: the model's context in tokens; the default window of a retention corpus (at most 1024).
    """
    split = source.split if isinstance(source, RetentionCorpus) else "test"
    rows = load_split(source, split)
    numbers = np.arange(len(rows))
    if isinstance(source, TaskSource):
        chosen = (config.evaluation.max_examples, config.evaluation.seed)
        numbers, rows = subset_indices(len(rows), *chosen), _subset(rows, *chosen)
    encoder, kind = Encoder(tokenizer, scored_length(source, config, context)), kind_of(source)
    identity = {"part": split} | score_identity(source, config)
    at_most = config.evaluation.max_retention_tokens if isinstance(source, RetentionCorpus) else None

    def encode() -> Iterable[Encoded]:
        return _beginning(kind.items(source, batches(rows, kind.inputs(source)), encoder), at_most)

    items = cached_sequences(identity, encoder, encode)
    examples = items.last_example + 1
    return EvaluationSet(
        name=source.name,
        kind=kind.name,
        metric=getattr(source, "metric", "nll"),
        items=items,
        # text in one stream has windows in place of rows
        row_numbers=tuple(int(n) for n in (numbers if examples == len(numbers) else range(examples))),
        digest=digest_of(source, split),
        tokenizer=tokenizer,
        **({"labels": (), "class_names": ()} | kind.targets(source, rows, encoder) | kind.settings(source, encoder)),
    )


def _beginning(items: Iterable[Encoded], at_most: int | None) -> Iterator[Encoded]:
    """The first items, until `at_most` tokens are scored."""
    scored = 0
    for item in items:
        if at_most is not None and scored >= at_most:
            return
        scored += len(item.input_ids) - max(item.start, 1)
        yield item


def scored_length(source: Source, config: PipelineConfig, context: int) -> int:
    """Length of the longest scored sequence in tokens; a generated answer must fit into the context as well."""
    if isinstance(source, RetentionCorpus):
        return min(source.window or 1024, context)
    return min(config.training.max_length, context - getattr(source, "max_new_tokens", 0))


def prediction_set(
    task: TaskSource,
    rows: list[dict],
    tokenizer: PreTrainedTokenizerBase,
    config: PipelineConfig,
    context: int,
    max_length: int | None = None,
) -> EvaluationSet:
    """New rows (with the task's input columns) encoded like `evaluation_set`; text as one document per row.

    Args:
        max_length: tokens that a sequence is cut to; default: as in an evaluation.
    """
    if isinstance(task, LanguageModelingTask):
        task = task.model_copy(update={"documents": "separate"})
    encoder, kind = Encoder(tokenizer, max_length or scored_length(task, config, context)), kind_of(task)
    columns = {name: [row[name] for row in rows] for name in kind.inputs(task)}
    items = tuple(
        Encoded(item.example, np.asarray(item.input_ids, dtype=np.int32), item.start, item.choice)
        for item in kind.items(task, [columns], encoder)
    )
    settings = {"class_names": ()} | kind.settings(task, encoder)
    numbers = tuple(range(len(rows)))
    return EvaluationSet(
        task.name, kind.name, task.metric, items, (), numbers, digest="", tokenizer=tokenizer, **settings
    )

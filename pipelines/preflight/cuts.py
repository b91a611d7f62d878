"""Counts what `max_length` cuts off, before any work starts.

The sequences are those that workers train on and score; they are made here and found again in the node's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from pipelines.config.pipeline import PipelineConfig
from pipelines.config.tasks import LanguageModelingTask, TaskSource
from pipelines.data.kinds import kind_of
from pipelines.data.sets import evaluation_set, scored_length, subset_indices, training_sequences
from pipelines.data.sources import load_split
from pipelines.data.token_cache import Sequences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def cut_rows(config: PipelineConfig, tokenizer: PreTrainedTokenizerBase, context: int) -> Iterator[str]:
    """One line per split with rows that are too long: how many, what they lose, and the longest of them.

    Text is cut into windows and blocks, which lose nothing.

    Args:
        context: of the base in tokens.
    """
    training, evaluation = config.training, config.evaluation
    length = min(training.max_length, context)
    for task in config.tasks:
        if isinstance(task, LanguageModelingTask):
            continue
        sequences = training_sequences(task, tokenizer, length, training.max_train_examples, training.seed)
        numbers = subset_indices(len(load_split(task, "train")), training.max_train_examples, training.seed)
        yield from _cut_of(task, "train", sequences, numbers, length, training.max_length)
        found = evaluation_set(task, tokenizer, config, context)
        numbers = subset_indices(len(load_split(task, "test")), evaluation.max_examples, evaluation.seed)
        scored = scored_length(task, config, context)
        yield from _cut_of(task, "test", found.items, numbers, scored, training.max_length)


def _cut_of(
    task: TaskSource, split: str, sequences: Sequences, numbers: np.ndarray, length: int, wanted: int
) -> Iterator[str]:
    """
    Args:
        numbers: row of each example.
        length, wanted: tokens per sequence, as it is and as `training.max_length` asks for.
    """
    cut, lengths, examples = (sequences.numbers(name) for name in ("cut", "lengths", "example"))
    if not cut.any():
        return
    rows = len(np.unique(examples[cut > 0]))
    longest = int(np.argmax(cut + lengths))
    part = "ends" if kind_of(task).scorer == "head" else "the beginnings of their prompts"
    remedy = "raise training.max_length" if length == wanted else "the base's context holds no more"
    yield (
        f"{task.name}/{split}: {rows:,} of {len(numbers):,} rows have more than {length:,} tokens and lose {part}, "
        f"{cut.sum() / (cut + lengths).sum():.1%} of all tokens; the longest, row {numbers[examples[longest]] + 1:,}, "
        f"has {cut[longest] + lengths[longest]:,}; {remedy} or shorten them"
    )

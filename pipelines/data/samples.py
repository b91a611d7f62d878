"""Which sample prompts a configuration asks (`evaluation.samples`), and how the model sees them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipelines.config.pipeline import PipelineConfig
from pipelines.config.sections import SamplesConfig
from pipelines.config.tasks import GenerationTask, TaskSource
from pipelines.data.kinds import kind_of
from pipelines.data.kinds.base import EvaluationSet
from pipelines.data.sets import prediction_set
from pipelines.data.sources import digest_of, load_split
from pipelines.runs.identity import fingerprint
from pipelines.runs.samples import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTINUED = ("choices", "likelihood")  # scorers of tasks whose prompt is also continued by greedy decoding


# -- what is asked
def questions_of(config: PipelineConfig) -> tuple[Question, ...]:
    """The general prompts, then rows of each task's test split; the same rows whatever the number of rows."""
    samples = config.evaluation.samples
    if samples is None:
        return ()
    return (*_general(samples), *(q for task in config.tasks for q in _of_task(task, config, samples)))


def _general(samples: SamplesConfig) -> Iterator[Question]:
    for prompt in samples.prompts:
        key = fingerprint({"prompt": prompt, "max_new_tokens": samples.max_new_tokens})
        yield Question(key, None, None, prompt, None)


def _of_task(task: TaskSource, config: PipelineConfig, samples: SamplesConfig) -> Iterator[Question]:
    kind, rows = kind_of(task), load_split(task, "test")
    order = np.random.default_rng([config.evaluation.seed, len(rows)]).permutation(len(rows))
    asked = ((int(number), rows[int(number)]) for number in order)
    readable = ((number, row) for number, row in asked if kind.question(task, row).strip())
    identity = _identity(task, config, samples)
    for number, row in itertools.islice(readable, samples.per_task):
        key = fingerprint(identity | {"row": number})
        yield Question(key, task.name, number, kind.question(task, row), kind.reference(task, row))


def _identity(task: TaskSource, config: PipelineConfig, samples: SamplesConfig) -> dict:
    """Everything that an answer to a row of the task depends on, apart from the model and the row."""
    kind = kind_of(task)
    fields = {name: value for name, value in task.scoring_identity().items() if name not in ("metric", "splits")}
    longest = {"samples_max_new_tokens": samples.max_new_tokens} if kind.scorer in CONTINUED else {}
    digest = {"digest": digest_of(task, "test"), "classes": kind.classes(task)}
    return fields | digest | longest | {"max_length": config.training.max_length}


# -- how the model sees it
@dataclass(frozen=True)
class Part:
    """Questions that are answered in one way.

    Attributes:
        fields: the field of `Sample` that the prediction becomes, by question.
        evaluation: one example per question, in the same order.
    """

    questions: tuple[Question, ...]
    fields: tuple[str, ...]
    evaluation: EvaluationSet


def parts_of(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, config: PipelineConfig, context: int
) -> list[Part]:
    """The questions encoded: general prompts by the chat template, rows of tasks as in an evaluation.

    Args:
        context: the model's context in tokens.
    """
    longest = config.evaluation.samples.max_new_tokens
    scorers = {None: None} | {task.name: kind_of(task).scorer for task in config.tasks}
    parts: list[Part] = []

    def add(task: TaskSource, asked: list[Question], rows: list[dict], chosen: str = "answer", length=None) -> None:
        if asked:
            fields = tuple(chosen if scorers[question.task] == "choices" else "answer" for question in asked)
            parts.append(Part(tuple(asked), fields, prediction_set(task, rows, tokenizer, config, context, length)))

    general = [question for question in questions if question.task is None]
    chat = bool(tokenizer.chat_template)
    add(free_text(longest, chat), general, _as_rows(general), length=context - longest)
    for task in config.tasks:
        asked = [question for question in questions if question.task == task.name]
        if scorers[task.name] != "likelihood":
            split = load_split(task, "test")
            add(task, asked, [split[question.row] for question in asked])
    continued = [question for question in questions if scorers[question.task] in CONTINUED]
    add(free_text(longest), continued, _as_rows(continued), chosen="generated")
    return parts


def free_text(max_new_tokens: int, chat: bool = False) -> GenerationTask:
    """A task whose rows are prompts and whose answers have no reference."""
    return GenerationTask(
        name="samples",
        kind="generation",
        data="samples",
        prompt="{prompt}",
        completion="{prompt}",
        chat=chat,
        max_new_tokens=max_new_tokens,
    )


def _as_rows(questions: Sequence[Question]) -> list[dict]:
    return [{"prompt": question.prompt} for question in questions]

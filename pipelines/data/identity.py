"""The facts about data that enter the fingerprint of a step and the key of a score cell."""

from __future__ import annotations

import hashlib

from pipelines.config.benchmarks import Benchmark
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.tasks import GenerationTask, RetentionCorpus, Source, TaskSource
from pipelines.data.benchmarks import benchmark_identity
from pipelines.data.held_out import validation_part
from pipelines.data.kinds import kind_of
from pipelines.data.kinds.chat_template import template_identity
from pipelines.data.kinds.chats import answers_in, chat_of, chat_problems
from pipelines.data.node_cache import cache_folder, published
from pipelines.data.sources import digest_of, load_split, records


def data_identity(task: TaskSource, tokenizer=None) -> dict:
    """Everything about a task's data that affects training, for the fingerprint of a step.

    What a chat's settings and template change is in it only where it changes the tokens that are learned.

    Args:
        tokenizer: of the base; only tasks with chats need it.
    """
    identity = {"digest": digest_of(task, "train"), "classes": kind_of(task).classes(task)}
    if isinstance(task, GenerationTask) and task.is_chat:
        identity |= template_identity(tokenizer)
        if task.messages and task.learn == "all" and _has_earlier_answers(task, identity["digest"]):
            identity["learn"] = "all"
    return task.training_identity() | identity


def step_data_identity(config: PipelineConfig, task: TaskSource, tokenizer=None) -> dict:
    """`data_identity` of a task of a training view, with the rows that decide which state its step keeps."""
    identity = data_identity(task, tokenizer)
    if not config.training.validate_every:
        return identity
    return identity | {"validation": digest_of(validation_part(task), "validation")}


def _has_earlier_answers(task: GenerationTask, digest: str) -> bool:
    """Whether `learn: all` learns more of the training data than its last answers; found once per node."""
    form = hashlib.sha256(f"{task.messages}/{task.format}".encode()).hexdigest()[:8]
    memo = cache_folder("digests") / f"{digest}-{form}-answers"
    if not memo.exists():
        rows, columns = load_split(task, "train"), kind_of(task).columns(task)
        found = set(columns) <= set(rows.column_names) and any(
            len(answers_in(chat_of(task, row), "all")) > 1
            for row in records(rows, columns)
            if not any(chat_problems(task, row))  # these rows are refused before training
        )
        with published(memo) as temporary:
            temporary.write_text(str(found))
    return memo.read_text() == str(True)


def score_identity(source: Source | Benchmark, config: PipelineConfig) -> dict:
    """Everything that affects a score, for the key of a score cell: an equal key needs no new evaluation."""
    if isinstance(source, Benchmark):
        return benchmark_identity(source)
    if isinstance(source, RetentionCorpus):
        fields = source.model_dump(include={"name", "text", "window", "stride"})
        if source.stride and (source.window is None or source.stride == source.window):
            fields["least_context"] = 1  # see `windows`; scores made before this rule have another key
        at_most = config.evaluation.max_retention_tokens
        return fields | {"digest": digest_of(source, source.split), "metric": "nll", "max_tokens": at_most}
    at_most = config.evaluation.max_examples
    return source.scoring_identity() | {
        "digest": digest_of(source, "test"),
        "metric": source.metric,
        "classes": kind_of(source).classes(source),
        "max_length": config.training.max_length,
        "max_examples": at_most,
        "seed": config.evaluation.seed if at_most else None,
    }

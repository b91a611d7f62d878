"""The facts about data that enter the fingerprint of a step and the key of a score cell."""

from __future__ import annotations

from pipelines.config.pipeline import PipelineConfig
from pipelines.config.tasks import RetentionCorpus, Source, TaskSource
from pipelines.data.kinds import kind_of
from pipelines.data.sources import digest_of


def data_identity(task: TaskSource) -> dict:
    """Everything about a task's data that affects training, for the fingerprint of a step."""
    return task.training_identity() | {"digest": digest_of(task, "train"), "classes": kind_of(task).classes(task)}


def score_identity(source: Source, config: PipelineConfig) -> dict:
    """Everything that affects a score, for the key of a score cell: an equal key needs no new evaluation."""
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

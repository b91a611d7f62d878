"""Views of a configuration for what is decided on validation data, which is neither tested nor trained on: searches,
and the state that a step keeps."""

from __future__ import annotations

import contextlib

from pipelines.config.benchmarks import Benchmark
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.tasks import RetentionCorpus, TaskSource
from pipelines.data.sources import digest_of, load_split
from pipelines.errors import ConfigError, DataError, Problem

HELD, KEPT = "@held-out", "@kept"  # parts of a training split, see sources.load_split


def validation_view(task: TaskSource) -> TaskSource:
    """The task scored on its validation split, or on a part of `train` that is then left out of training."""
    if "validation" not in task.splits:
        try:
            load_split(task, "validation")
        except DataError:
            train = task.splits.get("train", "train")
            return task.model_copy(update={"splits": {"train": train + KEPT, "test": train + HELD}})
    return task.model_copy(update={"splits": {**task.splits, "test": task.splits.get("validation", "validation")}})


def needs_held_out(config: PipelineConfig) -> bool:
    """Whether something is decided on validation rows before or while the chain is trained."""
    return bool(config.training.validate_every or (config.search and config.search.when))


def training_view(config: PipelineConfig) -> PipelineConfig:
    """The configuration as its chain is trained: tasks without validation split hold a tenth of `train` out."""
    tasks = []
    for task in config.tasks:
        if KEPT in task.splits.get("train", ""):  # the view of a view
            tasks.append(task)
            continue
        train = validation_view(task).splits.get("train", "train")
        tasks.append(task.model_copy(update={"splits": {**task.splits, "train": train}}) if KEPT in train else task)
    return config.model_copy(update={"tasks": tasks})


def validation_part(task: TaskSource) -> TaskSource:
    """The task whose split `validation` is what it holds out of train, if it has no such split itself."""
    train = task.splits.get("train", "train")
    held = train.replace(KEPT, HELD) if KEPT in train else validation_view(task).splits["test"]
    if HELD not in held:
        return task
    return task.model_copy(update={"splits": {**task.splits, "validation": held}})


def training_digests(task: TaskSource) -> set[str]:
    """Digests of all of `train`, and of what is trained on where a tenth of it is held out."""
    train = task.splits.get("train", "train").replace(KEPT, "")
    parts = [{**task.splits, "train": train + part} for part in ("", KEPT)]
    return {digest_of(task.model_copy(update={"splits": splits}), "train") for splits in parts}


def trial_view(config: PipelineConfig, position: int) -> PipelineConfig:
    """A training view for the trials before step `position`: everything up to there is scored on validation data.

    Raises:
        ConfigError: a retention corpus has no split but the one it is tested on.
    """
    seen = len(config.tasks) if config.is_joint else position
    tasks = [
        _scored_on_held_out(task) if KEPT in task.splits.get("train", "") else validation_view(task)
        for task in config.tasks
    ]
    limits = config.search.objective
    evaluation = {
        "max_examples": limits.max_examples,
        "max_retention_tokens": limits.max_retention_tokens,
        "samples": None,
    }
    return config.model_copy(
        update={
            "tasks": [*tasks[:seen], *config.tasks[seen:]],
            "retention": _retention_without_test(config) if limits.retention_weight else [],
            "evaluation": config.evaluation.model_copy(update=evaluation),
            "search": None,
            "tracking": None,
            "gate": None,
        }
    )


def _scored_on_held_out(task: TaskSource) -> TaskSource:
    """A task of a training view, scored on its held-out tenth of train."""
    held = task.splits["train"].replace(KEPT, HELD)
    return task.model_copy(update={"splits": {**task.splits, "test": held}})


def _retention_without_test(config: PipelineConfig) -> list[RetentionCorpus]:
    """The retention corpora on their validation or train split; benchmarks have only what they are tested on."""
    texts, problems = [], []
    for index, corpus in enumerate(config.retention):
        if isinstance(corpus, Benchmark):
            continue
        for split in ("validation", "train"):
            if split == corpus.split:
                continue
            with contextlib.suppress(DataError):
                load_split(corpus, split)
                texts.append(corpus.model_copy(update={"split": split}))
                break
        else:
            reason = (
                f"'{corpus.name}' has only its test split '{corpus.split}', which a search must not see; give it a "
                "validation or train split, or set search.objective.retention_weight: 0"
            )
            problems.append(Problem(f"retention.{index}", reason))
    if problems:
        raise ConfigError(problems)
    return texts

"""Predictions of a trained run on new rows: one process, no Ray, and the same code path as evaluation."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pipelines.config.pipeline import PipelineConfig
from pipelines.config.tasks import GenerationTask, LanguageModelingTask, TaskSource
from pipelines.data.kinds import kind_of
from pipelines.data.kinds.base import EvaluationSet
from pipelines.data.kinds.chats import asked_row
from pipelines.data.sets import prediction_set
from pipelines.distributed.world import World
from pipelines.errors import ConfigError, Problem, RunDirectoryError, did_you_mean
from pipelines.evaluation.evaluate import Routes, score
from pipelines.models import heads
from pipelines.models.bank import Bank, bank_of
from pipelines.models.base import context_length, load_base, load_tokenizer
from pipelines.runs.directory import RunDirectory
from pipelines.runs.records import choose_step

BASE = ("base", "0")  # names of row 0, the base model


@dataclass(frozen=True)
class Trained:
    """A run's model after one of its steps; `tasks` are those trained up to then."""

    config: PipelineConfig
    model: torch.nn.Module
    tokenizer: Any
    context: int
    tasks: frozenset[str]

    def answer(self, task: str, rows: Sequence[dict]) -> list[dict]:
        """See `predict`."""
        source = _task(self.config, task)
        _check(source, rows)
        if kind_of(source).scorer == "head" and task not in self.tasks:
            reason = "its head is untrained at this step; choose its own step or a later one"
            raise ConfigError([Problem(task, reason)])
        evaluation = prediction_set(source, rows, self.tokenizer, self.config, self.context)
        world = World(0, 1, next(self.model.parameters()).device)
        scored = score(
            self.model, evaluation, world, self.config.evaluation.batch_tokens, routes=self._routes(task, evaluation)
        )
        return kind_of(source).predictions(evaluation, scored)

    def _routes(self, task: str, evaluation: EvaluationSet) -> Routes | None:
        """With a bank, the task's own adapter if it has one: whoever names the task need not have it guessed."""
        bank = bank_of(self.model)
        if bank is None or task not in bank.tasks:
            return None
        place = bank.tasks.index(task)
        return {item.example: place for item in evaluation.items}


def predict(run: RunDirectory, task: str, rows: Sequence[dict], step: str | None = None) -> list[dict]:
    """Predictions of a run's model, one per row and in the same order.

    Args:
        task: name of one of the run's tasks; it determines prompt and output.
        rows: mappings with the task's input columns (see `input_columns`).
        step: task name, position or fingerprint of the step whose adapter to use, or `base`; default: the last
            finished step (with `carry: fresh` the task's own).

    Returns:
        Depending on the task's type: `{"prediction": class or choice index, "label": its text}`, `{"prediction":
        text}`, or `{"nll", "perplexity", "tokens"}`.

    Raises:
        ConfigError: no such task or step, or an invalid row.
    """
    config = run.config()
    _check(_task(config, task), rows)  # before anything is loaded
    if step is None and config.adapter.carry == "fresh":
        step = task
    return load_trained(run, step).answer(task, rows)


def load_trained(run: RunDirectory, step: str | None) -> Trained:
    """Load base, adapter and heads of a finished step for inference.

    Raises:
        ConfigError: no such step, or it is not finished.
    """
    config = run.config()
    if step in BASE:
        return load_folder(None, config, frozenset())
    directory = choose_step(run, step)
    with tempfile.TemporaryDirectory() as scratch:
        return load_folder(run.download(directory, Path(scratch)), config, _tasks_until(run, directory))


def nll_of_texts(
    run: RunDirectory, directory: str, task: LanguageModelingTask, texts: Sequence[str]
) -> tuple[float, int]:
    """(nats per token, tokens) of texts, each a document of its own, after the step in a directory of a run."""
    config = run.config().model_copy(update={"tasks": [task]})
    with tempfile.TemporaryDirectory() as scratch:
        trained = load_folder(run.download(directory, Path(scratch)), config, ())
        answers = trained.answer(task.name, [{task.text: text} for text in texts])
    tokens = sum(answer["tokens"] for answer in answers)
    return math.fsum(answer["nll"] * answer["tokens"] for answer in answers if answer["tokens"]) / tokens, tokens


def load_folder(folder: Path | None, config: PipelineConfig, tasks: Iterable[str]) -> Trained:
    """Load the base with adapter and heads of a folder (a step directory or a copy of it); None: the base alone."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_base(config.base_model, device)
    context = context_length(model.config)
    if folder is not None:
        model = _with_adapter(model, folder, config)
    return Trained(config, model.to(device).eval(), load_tokenizer(config.base_model), context, frozenset(tasks))


def _with_adapter(model: torch.nn.Module, folder: Path, config: PipelineConfig) -> torch.nn.Module:
    if (folder / "adapter").exists():
        import peft  # slow

        import curlora  # noqa: F401  registers its tuner with PEFT

        model = peft.PeftModel.from_pretrained(model, str(folder / "adapter"))
    if (folder / "heads.safetensors").exists():
        saved = load_file(folder / "heads.safetensors")
        classes = {name.removesuffix(".bias"): len(t) for name, t in saved.items() if name.endswith(".bias")}
        heads.attach_heads(model, classes, config.training.seed)
        heads.load_heads(model, saved)
    if bank := Bank.load(folder):
        bank.attach(model)
    return model


def _tasks_until(run: RunDirectory, directory: str) -> frozenset[str]:
    """Tasks that a step and its ancestors were trained on."""
    tasks: set[str] = set()
    try:
        for _, _, metrics in run.ancestors(directory):
            tasks |= set(metrics.tasks)
    except RunDirectoryError:  # the run that it started from is gone; results.json lists the tasks learned there
        results = run.results()
        tasks |= {name for name, row in results.learned_at.items() if row == 0} if results else set()
    return frozenset(tasks)


# -- rows
def input_columns(run: RunDirectory, task: str) -> list[str]:
    """Names of the columns that a row for `task` must have."""
    return kind_of(_task(run.config(), task)).inputs(_task(run.config(), task))


def rows_of_texts(run: RunDirectory, task: str, texts: Sequence[str]) -> list[dict]:
    """Rows from plain texts: one text per input column of the task, in order.

    Raises:
        ConfigError: the number of texts is not a multiple of the columns, or a column is not plain text.
    """
    source, columns = _task(run.config(), task), input_columns(run, task)
    if isinstance(source, GenerationTask) and (source.messages or source.format):
        return [asked_row(source, text) for text in texts]
    if isinstance(getattr(source, "choices", None), str):
        remedy = f"give rows with {', '.join(columns)} by --file"
        raise ConfigError([Problem("--text", f"'{source.choices}' is a list of choices; {remedy}")])
    if len(texts) % len(columns):
        wanted = f"--text must be given {len(columns)} times per row: {', '.join(columns)}"
        raise ConfigError([Problem("--text", f"found {len(texts)}; {wanted}")])
    groups = [texts[start : start + len(columns)] for start in range(0, len(texts), len(columns))]
    return [dict(zip(columns, group, strict=True)) for group in groups]


def rows_of_file(path: Path) -> list[dict]:
    """Rows of a JSONL file.

    Raises:
        ConfigError: the file cannot be read, or a line is not a JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem(str(path), f"cannot be read as UTF-8 text ({error})")]) from error
    rows, problems = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                row = None
                problems.append(Problem(f"{path}:{number}", f"not valid JSON ({error}); correct or delete the line"))
            else:
                if not isinstance(row, dict):
                    problems.append(Problem(f"{path}:{number}", f"expected an object, found {type(row).__name__}"))
            rows.append(row)
    if problems:
        raise ConfigError(problems)
    return rows


def _task(config: PipelineConfig, name: str) -> TaskSource:
    names = [task.name for task in config.tasks]
    if name not in names:
        raise ConfigError([Problem("--task", f"the run has no task '{name}', {did_you_mean(name, names)}")])
    return config.task(name)


def _check(task: TaskSource, rows: Sequence[dict]) -> None:
    kind, problems = kind_of(task), []
    for number, row in enumerate(rows, 1):
        missing = [column for column in kind.inputs(task) if column not in row]
        reasons = [f"has no '{c}', {did_you_mean(c, row)}" for c in missing] or list(kind.input_problems(task, row))
        problems += [Problem(f"row {number}", reason) for reason in reasons]
    if problems or not rows:
        raise ConfigError(problems or [Problem("", "there is nothing to predict; give --text or --file")])

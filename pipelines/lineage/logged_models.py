"""Adapters as MLflow logged models: a pyfunc from code, linked to their run, parent, data and scores.

A step's model is found by its tag `curlora.step_fingerprint` within its chain, or created; it is READY once its files
are uploaded, FAILED if they could not be written. pipelines/inference/pyfunc.py loads it.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.config.paths import is_gguf
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.tasks import ClassificationTask, GenerationTask, MultipleChoiceTask, TaskSource
from pipelines.data.kinds import kind_of
from pipelines.data.kinds.chats import asked_row
from pipelines.lineage.mlflow_records import PARAMS_PER_BATCH, PREFIX, TAG_LENGTH, flatten, tag_filter
from pipelines.lineage.own_wheel import write_wheel
from pipelines.runs.directory import RunDirectory
from pipelines.runs.environment import versions
from pipelines.runs.records import Steps
from pipelines.runs.step_record import StepRecord

MODEL_TYPE = "curlora-adapter"
READY, FAILED = "READY", "FAILED"
CODE = Path(__file__).parents[1] / "inference" / "pyfunc_entry.py"
NEEDED = {"name", "base_model", "adapter", "training", "evaluation", "resources", "tasks"}  # fields for inference
# What loading and predicting imports, beside the project itself, which is in the model. A test reads the imports.
REQUIREMENTS = ("mlflow", "torch", "transformers", "peft", "safetensors", "datasets", "pydantic", "pyyaml", "fsspec")
REQUIREMENTS += ("numpy", "pandas", "pyarrow", "jinja2", "filelock", "tokenizers", "accelerate")
QUANTISED, GGUF = ("bitsandbytes",), ("gguf",)  # for bases that need them


class ModelNotWritten(Exception):
    """An adapter could not be written as an MLflow model: its files are gone, or MLflow refuses them."""


@dataclass(frozen=True)
class Adapter:
    """The parts of a logged model.

    Attributes:
        config: configuration of the run, with the tasks that the adapter and its ancestors learned.
        base_fingerprint: identity of the base model.
    """

    run: RunDirectory
    directory: str
    metrics: StepRecord
    config: PipelineConfig
    base_fingerprint: str

    @property
    def tasks(self) -> list[str]:
        return [task.name for task in self.config.tasks]

    @property
    def task(self) -> str:
        """The task learned last, which is the default for inference."""
        return self.metrics.tasks[-1]

    @property
    def name(self) -> str:
        return f"{self.run.name}-{self.metrics.position}-{self.task}"[:200]


def write_model(adapter: Adapter, target: Path, model_id: str | None = None) -> None:
    """Write the folder that `mlflow.pyfunc.load_model` loads: MLmodel, code, requirements, adapter, heads, example."""
    import mlflow.pyfunc  # slow
    from mlflow.models import Model

    with tempfile.TemporaryDirectory() as scratch, _silent():
        step = Path(scratch) / "step"
        _write_step(adapter, step)
        mlflow.pyfunc.save_model(
            str(target),
            mlflow_model=Model(model_id=model_id),
            python_model=str(CODE),
            artifacts={"step": str(step)},
            signature=signature(adapter.config, adapter.task),
            input_example=example(adapter.config.task(adapter.task)),
            pip_requirements=requirements(adapter.config),
            code_paths=[str(write_wheel(Path(scratch)))],
            model_config={"base_model": None},
            metadata={"curlora": facts(adapter)},
        )


def requirements(config: PipelineConfig) -> list[str]:
    """The installed versions of what loading and predicting needs, without build tags, which no index knows."""
    base = config.base_model
    names = [*REQUIREMENTS, *(QUANTISED if base.quantization else ()), *(GGUF if is_gguf(base.path) else ())]
    return [f"{name}=={number.split('+')[0]}" for name, number in versions(names).items()]


def facts(adapter: Adapter) -> dict:
    """The adapter's identity, for readers and for the code that loads it."""
    return {
        "run_uri": adapter.run.uri,
        "step_directory": adapter.directory,
        "step_fingerprint": adapter.metrics.fingerprint,
        "parent_fingerprint": adapter.metrics.parent,
        "base_fingerprint": adapter.base_fingerprint,
        "task": adapter.task,
        "tasks": adapter.tasks,
    }


def _write_step(adapter: Adapter, step: Path) -> None:
    """Write adapter and heads as published, with a configuration that does not need the data."""
    step.mkdir()
    run, source = adapter.run, adapter.run.path(adapter.directory)
    for name in adapter.metrics.files or {}:
        if not name.startswith("strategy/"):
            (step / name).parent.mkdir(parents=True, exist_ok=True)
            (step / name).write_bytes(run.fs.cat_file(f"{source}/{name}"))
    settings = adapter.config.model_dump(mode="json", include=NEEDED)
    (step / "config.json").write_text(json.dumps(settings | {"tracking": None}, indent=1), encoding="utf-8")
    (step / "model.json").write_text(json.dumps(facts(adapter), indent=1), encoding="utf-8")


@contextmanager
def _silent():
    """Silence MLflow's advice on type hints, which cannot describe several task types."""
    logger = logging.getLogger("mlflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# -- logging to MLflow
class LoggedModels:
    """The logged models of one chain in one store, by step fingerprint.

    Attributes:
        steps: the chain's finished steps.
    """

    def __init__(self, client, experiment_id: str, chain_id: str, run: RunDirectory, config: PipelineConfig):
        self.client, self.experiment_id, self.chain_id = client, experiment_id, chain_id
        self.run, self.config = run, config
        self.steps: Steps = ()
        condition = tag_filter({PREFIX + "chain": chain_id})
        self.found = {model.tags[PREFIX + "step_fingerprint"]: model for model in self._search(condition)}

    def _search(self, condition: str) -> list:
        models, token = [], None
        while True:
            page = self.client.search_logged_models([self.experiment_id], condition, max_results=100, page_token=token)
            models.extend(page)
            token = page.token
            if not token:
                return models

    def send(self, child, directory: str, metrics: StepRecord) -> str:
        """Create or complete a step's model and link it to the child run; returns its id.

        Raises:
            ModelNotWritten: the model stays FAILED; the next call tries again.
        """
        adapter = self._adapter(directory, metrics)
        model = self.found.get(metrics.fingerprint) or self._create(child, adapter)
        if not is_ready(model):
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / "model"
                try:
                    write_model(adapter, folder, model.model_id)
                except Exception as error:  # whatever is wrong with this adapter concerns no other record
                    self.found[metrics.fingerprint] = self.client.finalize_logged_model(model.model_id, FAILED)
                    reason = str(error).strip().splitlines() or [type(error).__name__]
                    raise ModelNotWritten(reason[0]) from error
                self.client.log_model_artifacts(model.model_id, str(folder))
            model = self.client.finalize_logged_model(model.model_id, READY)
        self.found[metrics.fingerprint] = model
        self._link(child.info.run_id, model, metrics)
        return model.model_id

    def _create(self, child, adapter: Adapter):
        setting = adapter.metrics.setting
        values = {key: str(value) for key, value in facts(adapter).items() if not isinstance(value, list)}
        tags = values | {"chain": self.chain_id, "tasks": ",".join(adapter.tasks), "run": self.run.name}
        return self.client.create_logged_model(
            self.experiment_id,
            adapter.name,
            child.info.run_id,
            {PREFIX + key: value[:TAG_LENGTH] for key, value in tags.items()},
            # more than one request's worth is refused by servers with limits
            dict(itertools.islice(flatten(setting.to_json() if setting else {}).items(), PARAMS_PER_BATCH)),
            MODEL_TYPE,
        )

    def _link(self, run_id: str, model, metrics: StepRecord) -> None:
        """Link the model as output of its run and the parent adapter as input, unless already linked."""
        from mlflow.entities import LoggedModelInput  # slow

        run = self.client.get_run(run_id)
        self._add_outputs(run, {model.model_id: metrics.position})
        given = {found.model_id for found in run.inputs.model_inputs}
        parent = self.found.get(metrics.parent)
        if parent and is_ready(parent) and parent.model_id not in given:
            self.client.log_inputs(run_id, models=[LoggedModelInput(parent.model_id)])

    def link_chain(self, chain) -> None:
        """Link all models as outputs of the chain's run `chain`, as last read from MLflow."""
        positions = {metrics.fingerprint: metrics.position for _, metrics in self.steps}
        made = {m.model_id: positions[name] for name, m in self.found.items() if name in positions and is_ready(m)}
        self._add_outputs(chain, made)

    def _add_outputs(self, run, made: Mapping[str, int]) -> None:
        """Add the outputs (model id → position) that a run lacks."""
        from mlflow.entities import LoggedModelOutput  # slow

        known = {output.model_id for output in run.outputs.model_outputs}
        missing = [LoggedModelOutput(model_id, step) for model_id, step in made.items() if model_id not in known]
        if missing:
            self.client.log_outputs(run.info.run_id, missing)

    def _adapter(self, directory: str, metrics: StepRecord) -> Adapter:
        tasks = learned_tasks(self._history(metrics.position))
        base = self._earlier[-1][1].fingerprint if self._earlier else self.steps[0][1].fingerprint
        return Adapter(self.run, directory, metrics, self.config.model_copy(update={"tasks": tasks}), base)

    def _history(self, position: int) -> list[tuple[PipelineConfig, StepRecord]]:
        """(configuration, metrics.json) of every step up to a position, including those of earlier runs."""
        earlier = [(config, metrics) for config, metrics in reversed(self._earlier) if metrics.position]
        return earlier + [(self.config, m) for _, m in self.steps if 0 < m.position <= position]

    @functools.cached_property
    def _earlier(self) -> list[tuple[PipelineConfig, StepRecord]]:
        """Ancestors of the chain's first step in earlier runs, nearest first, the base last."""
        first_directory, first = next((d, m) for d, m in self.steps if m.position)
        if not first.parent_run:
            return []
        configs: dict[str, PipelineConfig] = {}
        found = []
        for run, _, metrics in list(self.run.ancestors(first_directory))[1:]:
            config = configs.setdefault(run.uri, run.config())
            found.append((config, metrics))
        return found


def is_ready(model) -> bool:
    """Whether a logged model is complete."""
    return str(model.status) == READY


# -- tasks
def learned_tasks(links: Sequence[tuple[PipelineConfig, StepRecord]]) -> list[TaskSource]:
    """The tasks of an ancestry, each as configured in its own run, with the class names that its step recorded.

    Args:
        links: (configuration, metrics.json) of every step, from the first on.
    """
    found: dict[str, TaskSource] = {}
    for config, metrics in links:
        known = {task.name: task for task in config.tasks}
        for name in metrics.tasks:
            if name in known:
                found[name] = _with_classes(known[name], metrics)
    return list(found.values())


def _with_classes(task: TaskSource, metrics: StepRecord) -> TaskSource:
    classes = (metrics.classes or {}).get(task.name)
    if classes and isinstance(task, ClassificationTask):
        return task.model_copy(update={"labels": list(classes)})
    return task


# -- signature and example
def signature(config: PipelineConfig, default: str):
    """Input columns of all tasks (a request gives those of one task), the parameter `task`, and output columns."""
    from mlflow.models import ModelSignature  # slow
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    columns: dict[str, list] = {}
    for task in config.tasks:
        for name in kind_of(task).inputs(task):
            columns.setdefault(name, []).append(_type_of(task, name))
    count = len(config.tasks)  # a column that not all tasks read is optional
    inputs = Schema([ColSpec(_common(types), name, required=len(types) == count) for name, types in columns.items()])
    outputs = Schema([ColSpec(kind, name, required=False) for name, kind in _outputs(config.tasks).items()])
    return ModelSignature(inputs, outputs, ParamSchema([ParamSpec("task", "string", default)]))


def _common(types: Sequence):
    """The type of a column that several tasks read; any value if one reads text in it and another a list."""
    from mlflow.types.schema import AnyType  # slow

    return types[0] if all(found == types[0] for found in types) else AnyType()


def _type_of(task: TaskSource, column: str):
    """The column's type: text, except for chat messages (a list of mappings), tools and lists of choices."""
    from mlflow.types import DataType  # slow
    from mlflow.types.schema import AnyType, Array, Map

    if isinstance(task, GenerationTask) and column == task.messages:
        return Array(Map(AnyType()))  # an Object would refuse fields besides role and content
    if isinstance(task, GenerationTask) and column == task.tools:
        return AnyType()  # a list of schemas, its JSON text, or nothing
    if isinstance(task, MultipleChoiceTask) and column == task.choices:
        return Array(DataType.string)
    return DataType.string


def _outputs(tasks: Sequence[TaskSource]) -> dict[str, Any]:
    from mlflow.types import DataType  # slow
    from mlflow.types.schema import AnyType

    columns: dict[str, Any] = {}
    for task in tasks:
        if kind_of(task).name == "language-modeling":
            columns |= {"nll": DataType.double, "perplexity": DataType.double, "tokens": DataType.long}
        elif isinstance(task, GenerationTask):
            columns.setdefault("prediction", DataType.string)
        else:
            columns |= {"label": DataType.string}
            columns.setdefault("prediction", DataType.long)
    kinds = {isinstance(task, GenerationTask) for task in tasks if kind_of(task).name != "language-modeling"}
    return columns | ({"prediction": AnyType()} if len(kinds) > 1 else {})


def example(task: TaskSource):
    """A data frame of one made-up row: the model must not contain rows of the data.

    MLflow reads a plain mapping as one row or as columns, depending on the types of other tasks' columns.
    """
    import pandas as pd  # slow

    row: dict[str, Any] = {}
    for column in kind_of(task).inputs(task):
        row[column] = f"This stands where the {column} goes."
        if isinstance(task, GenerationTask) and column == task.messages:
            row |= {column: asked_row(task, "What is asked stands here.")[column]}
        if isinstance(task, GenerationTask) and column == task.tools:
            row[column] = "[]"
        if isinstance(task, MultipleChoiceTask) and column == task.choices:
            row[column] = ["The first choice.", "The second choice."]
    return pd.DataFrame([row])

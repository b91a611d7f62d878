"""Tasks of lm-evaluation-harness: what they are, whether they can be scored, and what identifies their scores.

The harness (`pip install 'curlora[lm-eval]'`) is imported only where a benchmark is configured. A task's YAML file is
read as the harness reads it; relative `data_files` are those beside the file.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.config.benchmarks import Benchmark, is_file
from pipelines.errors import DataError, Problem

PACKAGE = "lm_eval"
ROLLING = "loglikelihood_rolling"
WORDS = "word_perplexity"  # of a rolling task; the others differ from it by what is counted
SEED, FEWSHOT_SEED = 0, 1234  # the harness's own defaults


@dataclass(frozen=True)
class LoadedBenchmark:
    """A benchmark with its tasks.

    Attributes:
        tasks: name → task object of the harness.
        metrics: name → (metric, filter) of the score of each example.
    """

    benchmark: Benchmark
    tasks: Mapping[str, Any]
    metrics: Mapping[str, tuple[str, str]]

    @property
    def is_text(self) -> bool:
        """Whether it scores the likelihood of whole texts, per word."""
        return all(task.OUTPUT_TYPE == ROLLING for task in self.tasks.values())

    @property
    def metric(self) -> str:
        """`nll` for whole texts; else the metric of the tasks, or `score` where they differ."""
        found = {metric for metric, _ in self.metrics.values()}
        return "nll" if self.is_text else found.pop() if len(found) == 1 else "score"


def _error(text: str) -> DataError:
    return DataError([Problem("", text)])


def missing_suite() -> str | None:
    """Why no benchmark can be scored; None if the harness is installed."""
    if importlib.util.find_spec(PACKAGE):
        return None
    return "lm-eval is not installed; pip install 'curlora[lm-eval]', or remove the benchmark"


def benchmark_identity(benchmark: Benchmark) -> dict:
    """Everything that affects a benchmark's score: version of the harness, definitions and local data of its tasks.

    Raises:
        DataError: the harness is not installed, or a file is missing or broken.
    """
    if reason := missing_suite():
        raise _error(reason)
    tasks = [_file_identity(Path(task)) if is_file(task) else task for task in benchmark.tasks]
    return benchmark.model_dump() | {"tasks": tasks, "version": importlib.metadata.version(PACKAGE)}


def _file_identity(path: Path) -> dict:
    """Digests of a task's definition with its functions, and of its data."""
    definition = read_task(path, functions=False)
    data = {str(place): _sha256(Path(file)) for place, file in _files_of(definition, path)}
    text = json.dumps(definition, sort_keys=True, default=str).replace(str(path.resolve().parent), "")
    code = [_sha256(file) for file in sorted(path.parent.glob("*.py"))]  # what !function may name
    return {"definition": hashlib.sha256(text.encode()).hexdigest(), "code": code, "data": data}


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def read_task(path: Path, functions: bool = True) -> dict:
    """The definition in a YAML file, with what it includes; local data by absolute path.

    Args:
        functions: import what `!function` names; else keep it as text.

    Raises:
        DataError: the file or its data is missing, or it is no definition of a task.
    """
    from lm_eval.tasks._yaml_loader import load_yaml  # slow, and an extra

    try:
        definition = load_yaml(path, resolve_func=functions)
    except Exception as error:  # of the file system, the parser, or the code that a file names
        raise _error(f"{path} cannot be read as a task of lm-eval ({error}); correct it") from error
    if "task" not in definition:
        raise _error(f"{path} has no field 'task', the name of the task; add it")
    settings = definition.get("dataset_kwargs") or {}
    if "data_files" in settings:
        settings["data_files"] = _absolute(settings["data_files"], path)
        definition["dataset_kwargs"] = settings
    return definition


def _absolute(files: Any, path: Path) -> Any:
    if isinstance(files, Mapping):
        return {split: _absolute(value, path) for split, value in files.items()}
    if isinstance(files, list):
        return [_absolute(value, path) for value in files]
    if "://" in files:
        return files
    file = path.resolve().parent / files
    if not file.is_file():
        raise _error(f"{path}: data_files names {files}, and {file} does not exist; correct the path")
    return str(file)


def _files_of(definition: dict, path: Path) -> Iterator[tuple[str, str]]:
    """(position, local path) of the data files."""
    files = (definition.get("dataset_kwargs") or {}).get("data_files", ())
    named = files if isinstance(files, Mapping) else {"all": files}
    for split, value in named.items():
        for number, file in enumerate([value] if isinstance(value, str) else value):
            if "://" not in file:
                yield f"{split}/{number}", file


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """The harness works quietly and with its own seeds, so that all ranks agree; then the generators are as before."""
    logger = logging.getLogger(PACKAGE)
    before = random.getstate(), np.random.get_state(), logger.level
    random.seed(SEED)
    np.random.seed(FEWSHOT_SEED)
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        logger.setLevel(before[2])


@functools.cache
def _manager(own_tasks: bool):
    """The harness's index of tasks; its own ones take seconds to list."""
    from lm_eval.tasks import TaskManager  # slow, and an extra

    return TaskManager(include_defaults=own_tasks)


def load_benchmark(benchmark: Benchmark) -> LoadedBenchmark:
    """The tasks with their data, which may be downloaded.

    Raises:
        DataError: the harness is not installed, a task is unknown, cannot be loaded, or has no score that fits.
    """
    if reason := missing_suite():
        raise _error(reason)
    manager = _manager(len(benchmark.files) < len(benchmark.tasks))
    tasks: dict[str, Any] = {}
    with undisturbed():
        for name in benchmark.tasks:
            if not is_file(name) and name not in manager.all_tasks:
                close = difflib.get_close_matches(name, manager.all_tasks, n=1)
                hint = f", did you mean '{close[0]}'?" if close else ""
                raise _error(f"lm-eval has no task '{name}'{hint}; a task of your own is given by its YAML file")
            specification = read_task(Path(name)) if is_file(name) else name
            try:
                found = manager.load([specification])["tasks"]
            except Exception as error:  # whatever a task's own code, or the download of its data, raises
                raise _error(f"{name} cannot be loaded ({type(error).__name__}: {error})") from error
            if twice := sorted(found.keys() & tasks.keys()):
                raise _error(f"{name} brings {', '.join(twice)} again; name each task once")
            tasks |= found
    for name, task in tasks.items():
        _configure(benchmark, name, task)
    if len({task.OUTPUT_TYPE == ROLLING for task in tasks.values()}) > 1:
        raise _error("some tasks score whole texts, others do not; make two entries of them")
    return LoadedBenchmark(benchmark, tasks, {name: _metric_of(benchmark, name, task) for name, task in tasks.items()})


def _configure(benchmark: Benchmark, name: str, task: Any) -> None:
    """Solved examples as `simple_evaluate` of the harness sets them; refuses what cannot be scored here."""
    if getattr(task, "UNSAFE_CODE", False):
        raise _error(f"{name} runs code that the model writes; choose another task")
    if getattr(task, "MULTIMODAL", False):
        raise _error(f"{name} shows images, which a language model does not see; choose another task")
    own = task.get_config("num_fewshot")
    if own is None or (benchmark.num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=benchmark.num_fewshot or 0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    settings = task.get_config("generation_kwargs") or {}
    if task.OUTPUT_TYPE == "generate_until" and settings.get("do_sample") and settings.get("temperature"):
        raise _error(f"{name} samples its answers (generation_kwargs.do_sample); only greedy decoding is scored")


def _metric_of(benchmark: Benchmark, name: str, task: Any) -> tuple[str, str]:
    """(metric, filter) of a task: a mean over examples, better when higher; of whole texts the likelihood."""
    filters = [found.name for found in task._filters]
    if task.OUTPUT_TYPE == ROLLING:
        return WORDS, filters[0]
    better, combined = task.higher_is_better(), task.aggregation()
    fit = [metric for metric, how in combined.items() if how.__name__ == "mean" and better.get(metric, True)]
    wanted, _, chosen = (benchmark.metric or "").partition(",")
    if wanted and wanted not in fit:
        raise _error(f"{name} has no score '{wanted}' for each example; it has {', '.join(fit) or 'none'}")
    if chosen and chosen not in filters:
        raise _error(f"{name} has no filter '{chosen}'; it has {', '.join(filters)}")
    if not fit:
        raise _error(f"{name} has no metric that is a mean over examples and better when higher; choose another task")
    return wanted or fit[0], chosen or filters[0]

"""Resolves `start_from`: the finished step of an earlier run that a chain starts from instead of the base model.

`<run URI or path>/<step>` names a step by task, position, fingerprint or directory. `models:/name@alias` is resolved
in the model registry *once* per run: aliases move, and a resumed run must not change its parent. Plain PEFT adapters
are the business of `adapter_folder.py`.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Iterator

from pipelines.chain.adapter_folder import find_folder, misfits, start_of_folder
from pipelines.config.pipeline import PipelineConfig
from pipelines.errors import ConfigError, LineageError, Problem
from pipelines.lineage.registry import by_alias
from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import base_fingerprint
from pipelines.runs.records import choose_step, lineage, trained_on
from pipelines.runs.start import RECORD, Start
from pipelines.runs.step_record import PublishedFile

HEADS = "heads.safetensors"


def find_start(config: PipelineConfig, run: RunDirectory | None = None) -> Start | None:
    """The step that `start_from` names; None if the chain starts from the base model.

    Args:
        run: the run to be resumed; it records the step that `start_from` resolved to at first.

    Raises:
        ConfigError: no such run, step, model or alias, or it does not fit this configuration.
    """
    if config.start_from is None:
        return None
    record = run.read_json(RECORD) if run else None
    if record and record["named"] == config.start_from:
        start = Start(**record)
    elif folder := _plain_adapter(config.start_from):
        start = start_of_folder(config, folder)
    else:
        start = _read(config, *_run_and_step(config))
    problems = list(_misfits(config, start))
    if problems:
        raise ConfigError(problems)
    return start


def dtype_of_start(config: PipelineConfig) -> str | None:
    """Data type of the base that the step of `start_from` was trained on; None if there is none or it is not known.

    Raises:
        ConfigError: no such run, step, model or alias.
    """
    if config.start_from is None or _plain_adapter(config.start_from):
        return None
    return _read(config, *_run_and_step(config)).base["dtype"]


# -- resolution
def _fault(message: str) -> ConfigError:
    return ConfigError([Problem("start_from", message)])


def _plain_adapter(named: str) -> RunDirectory | None:
    """The folder of an adapter that is not the step of a run."""
    return None if _is_published(named) else find_folder(named)


def _is_published(named: str) -> bool:
    """Whether `named` is `<run>/steps/<step>/adapter`."""
    step, _, last = named.rstrip("/").rpartition("/")
    return last == "adapter" and RunDirectory(step).exists("metrics.json")


def _run_and_step(config: PipelineConfig) -> tuple[str, str]:
    """(run URI, step) of `start_from`."""
    named = config.start_from
    if named.startswith("models:/"):
        return _registered(config)
    if _is_published(named):
        named = named.rstrip("/").rpartition("/")[0]
    run, _, step = named.rstrip("/").rpartition("/")
    if posixpath.basename(run) == "steps":
        run = posixpath.dirname(run)
    return run, step


def _registered(config: PipelineConfig) -> tuple[str, str]:
    name, _, alias = config.start_from.removeprefix("models:/").partition("@")
    if not name or not alias:
        raise _fault(f"'{config.start_from}' has no alias; write models:/<name>@champion")
    if config.tracking is None:
        raise _fault(f"'{config.start_from}' needs a model registry; set tracking.uri, or name <run>/<step>")
    try:
        version = by_alias(config.tracking.uri, name, alias)
    except LineageError as error:
        raise _fault(str(error)) from error
    if version is None:
        raise _fault(
            f"no version of '{name}' has the alias '{alias}' in {config.tracking.uri}; "
            "register a run first (tracking.register_as), or name <run>/<step>"
        )
    return version.run_uri, posixpath.basename(version.step_directory)


def _read(config: PipelineConfig, run_uri: str, step: str) -> Start:
    run = RunDirectory(run_uri)
    results = run.results()
    if results is None:
        remedy = "write <run URI or path>/<step>, or a folder with adapter_config.json"
        raise _fault(f"'{config.start_from}': {run_uri} is not a run with results; {remedy}")
    named = [f"steps/{step}"] if run.metrics(f"steps/{step}") else []
    try:
        directory = named[0] if named else choose_step(run, step)
    except ConfigError as error:
        raise _fault(error.problems[0].message) from error
    metrics, base = run.metrics(directory), run.config().base_model
    if metrics.position == 0:
        raise _fault(f"'{config.start_from}' is what that run started from; name a step that it trained")
    return Start(
        named=config.start_from,
        run_uri=run_uri,
        directory=directory,
        fingerprint=metrics.fingerprint,
        base_fingerprint=results.base_fingerprint,
        depth=metrics.position if metrics.depth is None else metrics.depth,
        digests=_learned(run, directory),
        base={"path": base.path, "dtype": base.dtype, "quantization": base.quantization},
        adapter=metrics.setting.adapter,
        strategy=metrics.setting.strategy["name"] if run.exists(f"{directory}/strategy") else None,
    )


def _learned(run: RunDirectory, directory: str) -> dict[str, str]:
    """`Start.digests` of a step: those recorded for the start of its own run, then those of the run's steps."""
    record, newest_first = run.read_json(RECORD), []
    for metrics in lineage(run, directory):
        newest_first += reversed(trained_on(metrics).items())
        if metrics.parent_run and record and record["fingerprint"] == metrics.parent:
            newest_first += reversed(record["digests"].items())
            break  # the record covers all earlier runs, so none of them is read
    return dict(reversed(newest_first))


# -- files
def file_problems(config: PipelineConfig, start: Start) -> Iterator[Problem]:
    """What is wrong with the files of the start: missing, damaged, or made for another model or other classes."""
    if start.source:
        yield from misfits(config, start)
        if start.run.metrics(start.directory) is None:
            return  # not imported yet
    run, metrics = start.run, start.run.metrics(start.directory)
    files = {"metrics.json": None} if metrics is None else metrics.files or {}
    damaged = [name for name in files if not _is_intact(run, f"{start.directory}/{name}", files[name])]
    for name in damaged:
        message = f"{start.run_uri}/{start.directory}/{name} is missing or damaged; restore it, or start elsewhere"
        yield Problem("start_from", message)
    if HEADS in files and HEADS not in damaged:
        yield from _head_misfits(config, start)


def _is_intact(run: RunDirectory, path: str, published: PublishedFile | None) -> bool:
    if published is None or not run.exists(path):
        return False
    content = run.read_bytes(path)
    same = published.sha256 is None or published.sha256 == hashlib.sha256(content).hexdigest()
    return len(content) == published.bytes and same


def _head_misfits(config: PipelineConfig, start: Start) -> Iterator[Problem]:
    """Classification tasks with another number of classes than their trained head."""
    from safetensors.numpy import load  # imports numpy, as does the next

    from pipelines.data.kinds import kind_of

    heads = load(start.run.read_bytes(f"{start.directory}/{HEADS}"))
    for number, task in enumerate(config.tasks):
        head = heads.get(f"{task.name}.bias")
        if head is None or kind_of(task).scorer != "head":
            continue
        classes = len(kind_of(task).classes(task))
        if len(head) != classes:
            message = f"'{task.name}' has {classes} classes, but its trained head in {start.named} has {len(head)}"
            yield Problem(f"tasks.{number}", f"{message}; give the task with other classes another name")


# -- compatibility
def _misfits(config: PipelineConfig, start: Start) -> Iterator[Problem]:
    """Fields of the configuration that are incompatible with the start, each with the value to set."""
    ours = config.base_model
    if base_fingerprint(ours) != start.base_fingerprint:
        theirs = ", ".join(f"{field}: {'null' if value is None else value}" for field, value in start.base.items())
        yield Problem(
            "base_model",
            f"'{ours.path}' ({ours.dtype}, quantization: {ours.quantization or 'null'}) is not the base that "
            f"{start.named} was trained on; set base_model.{theirs}, or start from another run",
        )
    section = config.adapter.model_dump()
    if start.adapter.get("type", section["type"]) != section["type"]:
        section = {"type": section["type"]}  # the other fields follow from it
    for field, value in section.items():
        theirs = start.adapter.get(field, value)
        if theirs != value:
            yield Problem(
                f"adapter.{field}",
                f"is {value}, but the adapter of {start.named} has {theirs}; set adapter.{field}: {theirs}",
            )
    if start.strategy not in (None, config.strategy.name):
        yield Problem(
            "strategy.name",
            f"is {config.strategy.name}, but {start.named} carries the state of '{start.strategy}'; "
            f"set strategy.name: {start.strategy}",
        )

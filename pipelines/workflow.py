"""The chain: which steps and cells are missing, in which segments they run, and watching them.

The driver decides and watches; it never trains. What is done stands in the run directory, so a second call of `run`
does only what is missing, after a crash as after a change of the configuration.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import metrics as formulas
from pipelines.config import BaseModelConfig, ClassificationTask, ConfigError, PipelineConfig, Problem, looks_local
from pipelines.runs import RunDirectory, StepPlan, fingerprint

WHOLE_FILE = 1 << 30  # larger weight files are fingerprinted by samples
POLL_SECONDS = 0.25
WORKER_FAILURES = 2


class RunFailed(RuntimeError):
    """The chain stopped; what was finished stays, and the same command goes on from there."""


@dataclass(frozen=True)
class Plan:
    """A configuration turned into steps and score cells.

    Attributes:
        base_directory: the step directory of row 0.
        cell_keys: name of a task or corpus → identity of its score (test digest, metric, how it is scored).
        needed: step directory → names of all cells of that row.
    """

    base_fingerprint: str
    base_directory: str
    steps: tuple[StepPlan, ...]
    cell_keys: dict[str, str]
    needed: dict[str, tuple[str, ...]]

    def missing_cells(self, run: RunDirectory) -> dict[str, list[str]]:
        """step directory → cells that are not there yet."""
        missing = {}
        for directory, names in self.needed.items():
            row = run.metrics(directory)
            keys = {cell["key"] for cell in row["cells"]} if row else set()
            missing[directory] = [name for name in names if self.cell_keys[name] not in keys]
        return missing

    def missing_steps(self, run: RunDirectory) -> list[StepPlan]:
        return [step for step in self.steps if run.metrics(step.directory) is None]


# -- identity


def base_fingerprint(base: BaseModelConfig) -> str:
    """Identity of a base model: its files' content (samples of very large files), or hub id and commit; and dtype."""
    if not looks_local(base.path):
        return fingerprint({"hub": base.path, "commit": _hub_commit(base), "dtype": base.dtype})
    folder = Path(base.path)
    names = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin") or p.name == "config.json")
    return fingerprint({"files": {p.name: _file_digest(p) for p in names}, "dtype": base.dtype})


def _hub_commit(base: BaseModelConfig) -> str | None:
    # slow import, needed for hub models only
    from transformers.utils.hub import cached_file, extract_commit_hash

    file = cached_file(base.path, "config.json", revision=base.revision)
    return extract_commit_hash(file, None)


def _file_digest(path: Path) -> str:
    """SHA-256 of a file; of size, first MiB and 64 spread MiB where it is larger than a GiB."""
    size = path.stat().st_size
    sha = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= WHOLE_FILE:
            while block := file.read(1 << 20):
                sha.update(block)
        else:
            for part in range(65):
                file.seek(part * (size - (1 << 20)) // 64)
                sha.update(file.read(1 << 20))
    return sha.hexdigest()


def make_plan(config: PipelineConfig) -> Plan:
    """Steps with their fingerprints, and the cells that the metrics need."""
    from pipelines.data import data_identity  # imports `datasets`

    base = base_fingerprint(config.base_model)
    parent: str | None = None
    groups = [tuple(task.name for task in config.tasks)] if config.is_joint else [(t.name,) for t in config.tasks]
    steps = []
    for position, names in enumerate(groups, 1):
        tasks = [config.task(name) for name in names]
        identity = {
            "base": base,
            "parent": parent or base,
            "adapter": config.adapter.model_dump(),
            "strategy": config.strategy.model_dump(),
            "training": config.training.model_dump(),
            "tasks": [data_identity(task) for task in tasks],
        }
        step = StepPlan(position, names, fingerprint(identity), parent or base)
        steps.append(step)
        parent = step.fingerprint
    base_directory = f"steps/0-base-{base[:8]}"
    return Plan(base, base_directory, tuple(steps), _cell_keys(config), _needed(config, base_directory, steps))


def _cell_keys(config: PipelineConfig) -> dict[str, str]:
    from pipelines.data import score_identity

    return {source.name: fingerprint(score_identity(source, config)) for source in [*config.tasks, *config.retention]}


def _needed(config: PipelineConfig, base_directory: str, steps: Sequence[StepPlan]) -> dict[str, tuple[str, ...]]:
    """Row 0, then columns 1 … t + 1 of row t, and retention everywhere. A head that is untrained has no score."""
    names = [task.name for task in config.tasks]
    corpora = tuple(corpus.name for corpus in config.retention)
    needed = {base_directory: tuple(n for n in names if not has_untrained_head(config, n)) + corpora}
    for step in steps:
        seen = names if config.is_joint else names[: step.position]
        ahead = [n for n in names[len(seen) : len(seen) + 1] if not has_untrained_head(config, n)]
        needed[step.directory] = (*seen, *ahead, *corpora)
    return needed


def has_untrained_head(config: PipelineConfig, name: str) -> bool:
    """Whether a task cannot be scored before its own training."""
    task = config.task(name)
    return isinstance(task, ClassificationTask) and task.head == "classifier"


# -- results


def build_results(config: PipelineConfig, plan: Plan, run: RunDirectory, status: str) -> dict:
    """`results.json`: the score matrix and everything computed from it."""
    names = [task.name for task in config.tasks]
    rows = [run.metrics(plan.base_directory), *(run.metrics(step.directory) for step in plan.steps)]
    cells = [_cells_of(row, plan.cell_keys) for row in rows]
    scores = [[_value(row, name) for name in names] for row in cells]
    nll = {c.name: [_value(row, c.name, "nll") for row in cells] for c in config.retention}
    done = [row for row in rows[1:] if row]
    metric_names = [task.metric for task in config.tasks]
    first = next((row for row in done), {})
    results = {
        "run": config.name,
        "status": status,
        "base_model": config.base_model.path,
        "base_fingerprint": plan.base_fingerprint,
        "adapter": {"type": config.adapter.type, "r": config.adapter.r},
        "strategy": config.strategy.name,
        "tasks": names,
        "metric": dict(zip(names, metric_names, strict=True)),
        "trainable_parameters": first.get("trainable_parameters"),
        "head_parameters": sum(row.get("head_parameters", 0) for row in done),
        "adapter_bytes": done[-1]["adapter_bytes"] if done else None,
        "scores": scores,
        "perplexity": {name: [formulas.perplexity(v) for v in series] for name, series in nll.items()},
        "nll": nll,
        "majority": {name: next((r[name]["majority"] for r in cells if name in r), None) for name in names},
        "extras": {name: found for name in names if any(found := [r.get(name, {}).get("extras") for r in cells])},
        **formulas.aggregates(scores, metric_names, nll),
        "gate": None,
        "seconds": _seconds(run, [row for row in rows if row]),
        "steps": [_step_summary(step, row) for step, row in zip(plan.steps, rows[1:], strict=True)],
    }
    if config.gate is not None and status == "finished":
        from pipelines.gate import judge

        results["gate"] = judge(results, config.gate)
    return results


def _cells_of(row: dict | None, keys: dict[str, str]) -> dict[str, dict]:
    """name → cell, of the cells that this configuration asks for."""
    cells = row["cells"] if row else []
    return {cell["name"]: cell for cell in cells if keys.get(cell["name"]) == cell["key"]}


def _value(row: dict[str, dict], name: str, field: str = "value") -> float | None:
    return row[name][field] if name in row else None


def _step_summary(step: StepPlan, row: dict | None) -> dict:
    row = row or {}
    return {
        "task": step.label,
        "fingerprint": step.fingerprint,
        "directory": step.directory,
        "mlflow_run_id": None,
        "seconds": row.get("seconds", {}),
        "tokens_per_second": row.get("training", {}).get("tokens_per_second"),
        "peak_memory_bytes": row.get("peak_memory_bytes"),
    }


def _seconds(run: RunDirectory, rows: list[dict]) -> dict:
    """Where the time went; what is neither training nor evaluation is overhead (start-up, loading, saving)."""
    train = sum(row["seconds"]["train"] for row in rows)
    evaluate = sum(row["seconds"]["evaluate"] for row in rows)
    segments = sum(event["seconds"] for _, event in run.events() if event["kind"] == "segment_finished")
    total = max(segments, sum(row["seconds"]["total"] for row in rows))
    return {"total": total, "train": train, "evaluate": evaluate, "overhead": total - train - evaluate}


# -- running


def run_chain(
    config: PipelineConfig,
    on_event: Callable[[dict], None] = lambda event: None,
    verbose: bool = False,
    segment_length: int | None = None,
    address: str | None = None,
) -> dict:
    """Do what is missing of a run and return its results.

    Args:
        on_event: called with every event of the run as it happens (progress bars).
        segment_length: steps a worker group does before the driver looks again; None: as many as possible.
        address: Ray cluster; None: RAY_ADDRESS, else a local one.

    Raises:
        ConfigError: bad input, before any training.
        LeaseHeld: another driver works on this run.
        RunFailed: training stopped.
    """
    from pipelines.door import check_data

    problems = check_data(config, warn=lambda text: on_event({"kind": "warning", "text": text}))
    if problems:
        raise ConfigError(problems)
    plan = make_plan(config)
    run = RunDirectory(config.run_uri)
    with run.acquire_lease():
        run.open_for_writing(config)
        projector = Projector(run, config, [step.fingerprint for step in plan.steps])
        ran = False
        if plan.missing_steps(run) or any(plan.missing_cells(run).values()):
            ran = True
            _check_model(config)
            run.event("started", steps=len(plan.steps), done=len(plan.steps) - len(plan.missing_steps(run)))
            _save_results(run, config, plan, "running")
            with _Cluster(config, verbose, address):
                _run_segments(config, plan, run, on_event, verbose, segment_length, projector)
            run.event("finished")
        results = _save_results(run, config, plan, "finished")
        return _publish(run, config, results, projector, on_event) | {"ran": ran}


def _publish(run: RunDirectory, config: PipelineConfig, results: dict, projector: Projector, on_event) -> dict:
    """Report and lineage; they follow the run directory and are made anew only where it has changed."""
    identity = fingerprint([results["scores"], results["nll"], [s["fingerprint"] for s in results["steps"]]])
    stamp = run.read_json("published.json") or {}
    if stamp.get("identity") == identity and (stamp.get("lineage") or config.tracking is None):
        return results | {"steps": _with_run_ids(results["steps"], stamp.get("runs", {}))}
    from pipelines.report import write_figures, write_report

    on_event({"kind": "reporting"})
    write_figures(run)
    write_report(run)
    runs, warning = projector.finish()
    results["steps"] = _with_run_ids(results["steps"], runs)
    run.write_json("results.json", results)
    if runs and warning is None:
        runs, warning = projector.finish()  # once more: now results.json names the MLflow runs
    run.write_json("published.json", {"identity": identity, "lineage": warning is None, "runs": runs})
    if warning:
        on_event({"kind": "warning", "text": warning})
    return results


def _with_run_ids(steps: list[dict], runs: dict[str, str]) -> list[dict]:
    return [step | {"mlflow_run_id": runs.get(step["fingerprint"])} for step in steps]


def _save_results(run: RunDirectory, config: PipelineConfig, plan: Plan, status: str) -> dict:
    results = build_results(config, plan, run, status)
    run.write_json("results.json", results)
    return results


def _check_model(config: PipelineConfig) -> None:
    from pipelines.preflight import check_model

    problems = check_model(config)
    if problems:
        raise ConfigError(problems)


def _run_segments(config, plan: Plan, run: RunDirectory, on_event, verbose, segment_length, projector) -> None:
    missing_steps = plan.missing_steps(run)
    length = segment_length or max(1, len(missing_steps))
    cuts = [tuple(missing_steps[i : i + length]) for i in range(0, len(missing_steps), length)] or [()]
    for steps in cuts:
        begun = time.time()
        assignment = {
            "run_uri": run.uri,
            "config": config.model_dump(),
            "steps": [step.to_json() for step in steps],
            "base_directory": plan.base_directory,
            "base_fingerprint": plan.base_fingerprint,
            "missing": plan.missing_cells(run),
            "cell_keys": plan.cell_keys,
            "verbose": verbose,
        }
        try:
            _watch(_start_segment(config, assignment, steps), run, config, plan, on_event, projector)
        finally:
            run.event("segment_finished", seconds=time.time() - begun, steps=[step.fingerprint for step in steps])


def _start_segment(config: PipelineConfig, assignment: dict, steps: Sequence[StepPlan]):
    import ray

    name = fingerprint([assignment["run_uri"], [step.fingerprint for step in steps], assignment["missing"]])[:16]
    remote = ray.remote(num_cpus=0, max_retries=0)(fit_segment)
    return remote.remote(assignment, f"segment-{name}", gpus_per_worker(config))


def fit_segment(assignment: dict, name: str, gpus: float) -> dict:
    """One `TorchTrainer.fit`, as a Ray task: the workers do every step of the segment."""
    import ray.train
    from ray.train.torch import TorchTrainer

    config = PipelineConfig.model_validate(assignment["config"])
    resources = {"CPU": config.resources.cpus_per_worker} | ({"GPU": gpus} if gpus else {})
    trainer = TorchTrainer(
        work,
        train_loop_config=assignment,
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.resources.workers, use_gpu=bool(gpus), resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=f"{assignment['run_uri']}/train",
            failure_config=ray.train.FailureConfig(max_failures=WORKER_FAILURES, controller_failure_limit=3),
            logging_config=ray.train.LoggingConfig(log_level="INFO" if assignment["verbose"] else "ERROR"),
        ),
    )
    return trainer.fit().return_value


def work(assignment: dict) -> dict:
    """What Ray Train calls in a worker. Imports there, so that the processes around it stay small."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    from pipelines.worker import train_steps

    return train_steps(assignment)


def _watch(reference, run: RunDirectory, config, plan: Plan, on_event, projector) -> None:
    """Follow a segment through the run directory until its Ray task ends."""
    import ray

    seen = max((name for name, event in run.events() if event["kind"] == "started"), default="")
    ended = False
    while not ended:
        ended = bool(ray.wait([reference], timeout=POLL_SECONDS)[0])
        for name, event in run.events(after=seen):
            seen = name
            on_event(event)
            if event["kind"] == "worker_error":
                ray.cancel(reference, force=True)
                _fail(run, config, plan, event["error"])
            if event["kind"] == "published":
                _save_results(run, config, plan, "running")
                projector.poke()
    try:
        ray.get(reference)
    except ray.exceptions.RayError as error:
        _fail(run, config, plan, _root_cause(error), error)
    train = run.path("train")
    if run.fs.exists(train):
        run.fs.rm(train, recursive=True)


def _fail(run: RunDirectory, config, plan: Plan, reason: str, cause: BaseException | None = None) -> None:
    run.event("failed", error=reason)
    _save_results(run, config, plan, "failed")
    raise RunFailed(f"{reason}\nWhat was finished is kept; run the same command to go on from there.") from cause


def _root_cause(error: BaseException) -> str:
    """The worker's own last line out of a nest of Ray errors."""
    causes = getattr(getattr(error, "cause", None), "worker_failures", None) or getattr(error, "worker_failures", None)
    text = str(next(iter(causes.values()))) if causes else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else repr(error))


# -- cluster


class _Cluster:
    """A Ray cluster for the time of a run: the given one, RAY_ADDRESS, or a local one that ends with the run."""

    def __init__(self, config: PipelineConfig, verbose: bool, address: str | None):
        self.config, self.verbose, self.address = config, verbose, address

    def __enter__(self) -> None:
        import ray

        self.mine = not ray.is_initialized()
        if self.mine:
            connect(self.verbose, self.address)
        try:
            check_cluster(self.config, ray.cluster_resources())
        except ConfigError:
            self.__exit__()
            raise

    def __exit__(self, *_: Any) -> None:
        import ray

        if self.mine:
            ray.shutdown()


def connect(verbose: bool = False, address: str | None = None) -> None:
    """`ray.init`, without its plumbing on the user's terminal."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    ray.init(
        address=address or os.environ.get("RAY_ADDRESS"),
        log_to_driver=verbose,
        logging_level="INFO" if verbose else "ERROR",
        include_dashboard=None if address else False,
    )


def check_cluster(config: PipelineConfig, resources: dict) -> None:
    """Raises ConfigError if the workers can never be placed: Ray itself would wait for ever."""
    workers = config.resources.workers
    gpus = gpus_per_worker(config, resources)
    for field, kind, each in (("cpus_per_worker", "CPU", config.resources.cpus_per_worker), ("gpus", "GPU", gpus)):
        there = resources.get(kind, 0)
        if workers * each > there:
            raise ConfigError(
                [
                    Problem(
                        "resources.workers",
                        f"{workers} workers need {workers * each:g} {kind}, the cluster has {there:g}; "
                        f"lower resources.workers or resources.{field}, or add nodes",
                    )
                ]
            )


def gpus_per_worker(config: PipelineConfig, resources: dict | None = None) -> float:
    """`auto` means one each where the cluster has any."""
    value = config.resources.gpus_per_worker
    if value != "auto":
        return value
    if resources is None:
        import ray

        resources = ray.cluster_resources()
    return 1.0 if resources.get("GPU", 0) else 0.0


# -- lineage beside the run


class Projector:
    """Sends the run to MLflow from a thread of its own: a slow or absent server never holds up training."""

    def __init__(self, run: RunDirectory, config: PipelineConfig, chain: Sequence[str]):
        self.run, self.tracking, self.chain = run, config.tracking, chain
        self.runs: dict[str, str] = {}
        self.warning: str | None = None
        self._wanted = threading.Event()
        self._stop = self._started = False

    def poke(self) -> None:
        """There is something new to send."""
        if self.tracking is None:
            return
        if not self._started:
            self._started = True
            self._thread = threading.Thread(target=self._loop, daemon=True, name="lineage")
            self._thread.start()
        self._wanted.set()

    def finish(self) -> tuple[dict[str, str], str | None]:
        """Send the rest and wait; (fingerprint → MLflow run id, warning if it could not be sent)."""
        if self.tracking is None:
            return {}, None
        self._stop = True
        self.poke()
        self._thread.join()
        self._started = self._stop = False
        return self.runs, self.warning

    def _loop(self) -> None:
        from pipelines.lineage import LineageError, project

        while True:
            self._wanted.wait()
            self._wanted.clear()
            last = self._stop
            try:
                self.runs = project(self.run, self.tracking.uri, self.tracking.experiment, self.chain)
                self.warning = None
            except LineageError as error:
                self.warning = str(error)
            except Exception as error:  # a fault in the projection must not cost the user a finished chain
                self.warning = (
                    f"lineage failed ({type(error).__name__}: {error}); send it later: curlora sync {self.run.uri}"
                )
            if last:
                return

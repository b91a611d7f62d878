"""One trial of a search: it has its own run directory, is trained by a warm worker group and driven by Ray Tune.

Tune's actor trains nothing and reserves no CPU: it hands the trial to a worker group, reports its scores at each rung
to Tune, and lets it continue. `trial.json`, written last, records the outcome; a trial that has one is not repeated,
its recorded scores are reported to Tune again.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from pipelines.config.pipeline import PipelineConfig
from pipelines.config.search_space import Values
from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import StepPlan
from pipelines.runs.step_record import Setting, StepRecord
from pipelines.search.trial_spec import Spec
from pipelines.workers.assignment import RungScores, verdict_file
from pipelines.workers.failures import GroupLost, WorkersFailed, WorkersSilent
from pipelines.workers.supervision import Supervisor

REPORT_SECONDS = 5.0  # a trial reports to Tune at least this often, so that Tune can stop it
POLL_SECONDS = 0.1  # interval at which the run directory is polled
CHECK_SECONDS = 1.0  # interval at which errors and heartbeats of the workers are checked


class TrialBlocked(RuntimeError):
    """The trial cannot continue for a reason outside the trial."""


class Trial:
    """Drives one trial; Tune calls `advance` until it reports `done` or the scheduler stops the trial."""

    def __init__(self, spec: Spec, number: int, values: Values, group: Any):
        self.spec, self.number, self.values = spec, number, values
        self.run, self.config, self.step = spec.run(values), spec.setting(values), spec.step(values)
        self.begun = time.time()
        self._rungs = list(spec.rungs)  # not reported yet
        self._reported: float | None = None  # the rung of the last report; its workers wait for permission to go on
        self.supervisor = Supervisor(
            group,
            self.run,
            self.config.durability,
            progress=lambda: self.run.list(self.step.checkpoints),
            sign_seconds=CHECK_SECONDS,
        )

    def advance(self, seconds: float = REPORT_SECONDS) -> dict:
        """The next report to Tune: scores at a rung, the end, or `waiting` if nothing happens within `seconds`.

        Raises:
            TrialBlocked: the workers stopped responding, or were asked to stop.
        """
        if self._reported is not None:
            self.run.write_json(verdict_file(self._reported), {"go_on": True})
            self._reported = None
        end = time.monotonic() + seconds
        while True:
            if (report := self._next_report()) is not None:
                return report
            if time.monotonic() >= end:
                return {"waiting": True}
            self._poll_workers()

    def _next_report(self) -> dict | None:
        """The next report that the run directory supports; None until the workers have reached it."""
        record = self.run.read_json("trial.json") or {}
        if record.get("status") == "failed":
            return {"done": True}
        metrics = self.run.metrics(self.step.directory)
        while self._rungs:
            found = RungScores.read(self.run, self._rungs[0])
            if found is None and metrics is None:
                return None
            rung = self._rungs.pop(0)
            if found is not None and (assessment := self.spec.assess(found)):
                self._reported = rung
                return self._report(assessment.objective, rung) | {"signal": assessment.signal}
        if metrics is None:
            return None
        if record.get("status") != "finished":
            record = self._finish(metrics)
        return self._report(record["objective"], 1.0) | {"done": True}

    def _report(self, objective: float | None, rung: float) -> dict:
        if objective is None:
            return {}
        return {"objective": objective, "resource": round(rung * self.spec.reduction ** len(self.spec.rungs))}

    # -- workers

    def _poll_workers(self) -> None:
        """Poll the workers once; hand them the trial if they are idle."""
        try:
            if self.supervisor.is_idle:
                self._submit()
            result = self.supervisor.look(POLL_SECONDS)
        except GroupLost:
            return  # new workers continue from the last checkpoint
        except WorkersFailed as error:
            self._fail(str(error))
            return
        except WorkersSilent as error:
            raise TrialBlocked(str(error)) from error
        if result and result.get("error"):
            self._fail(result["error"])
        elif result and result["stopped"]:
            raise TrialBlocked("the workers were asked to stop")

    def _submit(self) -> None:
        self.run.remove("stop.json")  # a request to an earlier driver, or from an earlier pruning of this trial
        self.run.open_for_writing(self.config)
        self.spec.copy_parent(self.run)
        missing = {self.step.directory: list(self.spec.names)}
        assignment = self.spec.assignment(self.run, self.config, [self.step], missing)
        self.supervisor.submit(replace(assignment, rungs=self.spec.rungs, trial=True))

    # -- record

    def _finish(self, metrics: StepRecord) -> dict:
        assessment = self.spec.assess(metrics)
        if assessment is None:
            return self._fail("a validation score is not a number; lower training.learning_rate")
        train = metrics.seconds.train
        scored = metrics.seconds.evaluate + rung_seconds(self.run, self.spec)
        total = max(time.time() - self.begun, train + scored)  # part of it may have happened in an earlier start
        return write_record(
            self.run,
            self.spec,
            self.number,
            self.values,
            "finished",
            **assessment.to_json(),
            scores={cell.name: cell.value for cell in metrics.cells},
            steps=metrics.training.steps,
            total_steps=metrics.training.steps,
            trainable_parameters=metrics.trainable_parameters + metrics.head_parameters,
            seconds={"total": total, "train": train, "evaluate": scored, "overhead": total - train - scored},
            started=metrics.started,
        )

    def _fail(self, reason: str) -> dict:
        return write_record(self.run, self.spec, self.number, self.values, "failed", error=reason)


def write_record(run: RunDirectory, spec: Spec, number: int, values: Values, status: str, **fields: Any) -> dict:
    """Write `trial.json`, the outcome of a trial (finished, pruned or failed), and return it."""
    nothing = dict.fromkeys(("objective", "learning", "retention_loss", "total_steps", "error", "seconds"))
    step = spec.step(values)
    config = spec.setting(values)
    record = nothing | {
        "number": number,
        "values": values,
        "status": status,
        "scores": {},
        "steps": 0,
        "fingerprint": step.fingerprint,
        "directory": step.directory,
        "setting": Setting.of(config).to_json(),
        "rungs": rungs_of(run, spec),
        "started": None,
        "finished": time.time(),
    }
    record |= fields
    run.write_json("results.json", _results(config, step, record))
    run.write_json("trial.json", record)
    return record


def _results(config: PipelineConfig, step: StepPlan, record: dict) -> dict:
    """The part of `results.json` that `status`, `predict` and `export` read; a trial has no score matrix."""
    entry = {"task": step.label, "fingerprint": step.fingerprint, "directory": step.directory}
    return {
        "run": config.name,
        "status": {"pruned": "stopped"}.get(record["status"], record["status"]),
        "base_model": config.base_model.path,
        "tasks": [task.name for task in config.tasks],
        "steps": [entry | {"seconds": record["seconds"] or {}}],
    }


def rungs_of(run: RunDirectory, spec: Spec) -> list[dict]:
    """Scores of a trial at the rungs that it reached."""
    found = []
    for rung in spec.rungs:
        scored = RungScores.read(run, rung)
        assessment = spec.assess(scored) if scored else None
        if assessment:
            position = {"rung": scored.rung, "step": scored.step, "steps": scored.steps, "time": scored.time}
            found.append(position | assessment.to_json())
    return found


def rung_seconds(run: RunDirectory, spec: Spec) -> float:
    """Seconds spent on scoring at rungs."""
    scored = [RungScores.read(run, rung) for rung in spec.rungs]
    return sum(cell.seconds for found in scored if found for cell in found.cells)


def prune(spec: Spec, number: int, values: Values) -> dict:
    """Stop a trial at the last rung it reached and record it; a trial that has already finished is left as it is."""
    run = spec.run(values)
    record = run.read_json("trial.json")
    if record and record["status"] == "finished":
        return record
    rungs = rungs_of(run, spec)
    last = rungs[-1]
    run.request_stop(f"behind the others at {last['rung']:.0%} of its training")
    run.write_json(verdict_file(last["rung"]), {"go_on": False})
    assessment = {key: last[key] for key in ("objective", "learning", "retention_loss", "signal")}
    steps = {"steps": last["step"], "total_steps": last["steps"]}
    return write_record(run, spec, number, values, "pruned", **assessment, **steps)

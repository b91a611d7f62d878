"""One trial of a search: a run directory of its own, trained by a warm worker group, driven by Ray Tune step by step.

Tune's actor trains nothing and takes no CPU: it hands the trial to a worker group, tells Tune what it scored at each
rung, and lets it go on. `trial.json`, written last, records its outcome; a trial that has one is not
repeated, its scores are reported to Tune again.
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

STEP_SECONDS = 5.0  # after which Tune hears from a trial even if there is no news

LOOK_SECONDS = 0.1  # between two looks at the run directory

SIGN_SECONDS = 1.0  # between two looks for errors and signs of life


class TrialBlocked(RuntimeError):
    """The trial cannot continue for a reason outside itself."""


class Trial:
    """Drives one trial; `advance` is called until it reports `done`, or no more where the scheduler ends it."""

    def __init__(self, spec: Spec, number: int, values: Values, group: Any):
        self.spec, self.number, self.values = spec, number, values
        self.run, self.config, self.step = spec.run(values), spec.setting(values), spec.step(values)
        self.begun = time.time()
        self._rungs = list(spec.rungs)  # not reported yet
        self._passed: float | None = None  # the rung of the last report
        self.supervisor = Supervisor(
            group,
            self.run,
            self.config.durability,
            progress=lambda: self.run.list(self.step.checkpoints),
            sign_seconds=SIGN_SECONDS,
        )

    def advance(self, seconds: float = STEP_SECONDS) -> dict:
        """The next report to Tune: scores at a rung, the end, or nothing new within `seconds`.

        Raises:
            TrialBlocked: the workers gave no sign of life, or were asked to stop.
        """
        if self._passed is not None:
            self.run.write_json(verdict_file(self._passed), {"go_on": True})
            self._passed = None
        end = time.monotonic() + seconds
        while True:
            if (report := self._news()) is not None:
                return report
            if time.monotonic() >= end:
                return {"waiting": True}
            self._work()

    def _news(self) -> dict | None:
        """The next report that can be made from the run directory; None while the workers are not that far."""
        record = self.run.read_json("trial.json") or {}
        if record.get("status") == "failed":
            return {"done": True}
        metrics = self.run.metrics(self.step.directory)
        while self._rungs:
            found = RungScores.read(self.run, self._rungs[0])
            if found is None and metrics is None:
                return None
            rung = self._rungs.pop(0)
            if found is not None and (worth := self.spec.assess(found)):
                self._passed = rung
                return self._report(worth.objective, rung) | {"signal": worth.signal}
        if metrics is None:
            return None
        if record.get("status") != "finished":
            record = self._finish(metrics)
        return self._report(record["objective"], 1.0) | {"done": True}

    def _report(self, objective: float | None, rung: float) -> dict:
        if objective is None:
            return {}
        return {"objective": objective, "resource": round(rung * self.spec.reduction ** len(self.spec.rungs))}

    # -- with the workers

    def _work(self) -> None:
        """Look once at what the workers do; start them if they do nothing."""
        try:
            if self.supervisor.is_idle:
                self._submit()
            result = self.supervisor.look(LOOK_SECONDS)
        except GroupLost:
            return  # others go on from the last checkpoint
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
        self.run.remove("stop.json")  # it was meant for an earlier driver, or the trial was to end at a rung
        self.run.open_for_writing(self.config)
        self.spec.bring_parent(self.run)
        missing = {self.step.directory: list(self.spec.names)}
        assignment = self.spec.assignment(self.run, self.config, [self.step], missing)
        self.supervisor.submit(replace(assignment, rungs=self.spec.rungs, trial=True))

    # -- its record

    def _finish(self, metrics: StepRecord) -> dict:
        worth = self.spec.assess(metrics)
        if worth is None:
            return self._fail("a validation score is not a number; lower training.learning_rate")
        train = metrics.seconds.train
        scored = metrics.seconds.evaluate + rung_seconds(self.run, self.spec)
        total = max(time.time() - self.begun, train + scored)  # some of it may lie in an earlier start
        return write_record(
            self.run,
            self.spec,
            self.number,
            self.values,
            "finished",
            **worth.to_json(),
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
    """`trial.json`: the outcome of a trial (finished, pruned or failed)."""
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
    """What `status`, `predict` and `export` need of a trial's run; a score matrix it has none."""
    entry = {"task": step.label, "fingerprint": step.fingerprint, "directory": step.directory}
    return {
        "run": config.name,
        "status": {"pruned": "stopped"}.get(record["status"], record["status"]),
        "base_model": config.base_model.path,
        "tasks": [task.name for task in config.tasks],
        "steps": [entry | {"seconds": record["seconds"] or {}}],
    }


def rungs_of(run: RunDirectory, spec: Spec) -> list[dict]:
    """What a trial scored at the rungs that it reached."""
    found = []
    for rung in spec.rungs:
        scored = RungScores.read(run, rung)
        worth = spec.assess(scored) if scored else None
        if worth:
            where = {"rung": scored.rung, "step": scored.step, "steps": scored.steps, "time": scored.time}
            found.append(where | worth.to_json())
    return found


def rung_seconds(run: RunDirectory, spec: Spec) -> float:
    scored = [RungScores.read(run, rung) for rung in spec.rungs]
    return sum(cell.seconds for found in scored if found for cell in found.cells)


def prune(spec: Spec, number: int, values: Values) -> dict:
    """End a trial at the rung that it has reached last; one that an earlier start has seen to its end stays so."""
    run = spec.run(values)
    record = run.read_json("trial.json")
    if record and record["status"] == "finished":
        return record
    rungs = rungs_of(run, spec)
    last = rungs[-1]
    run.request_stop(f"behind the others at {last['rung']:.0%} of its training")
    run.write_json(verdict_file(last["rung"]), {"go_on": False})
    worth = {key: last[key] for key in ("objective", "learning", "retention_loss", "signal")}
    steps = {"steps": last["step"], "total_steps": last["steps"]}
    return write_record(run, spec, number, values, "pruned", **worth, **steps)

"""The work of one Ray Train worker, in order: take an assignment; load the base; score missing cells; for each step,
attach the parent's adapter, train, save, score, publish.

The base is loaded once per segment. A step starts from its parent's *published* adapter, so that the results are
bitwise the same however the steps are split into segments. All output of a worker goes to the run directory; rank 0
writes it, `metrics.json` last.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import resource
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from pipelines.config.pipeline import PipelineConfig
from pipelines.config.tasks import TaskSource
from pipelines.data.held_out import validation_part
from pipelines.data.kinds import kind_of
from pipelines.data.sources import digest_of, load_split
from pipelines.distributed import engine, zero_settings
from pipelines.distributed.world import World, current_world
from pipelines.errors import Stopped
from pipelines.lineage.model_card import CARD, ancestry_of, model_card
from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import StepPlan
from pipelines.runs.samples import Sample
from pipelines.runs.step_record import Cell, Seconds, Split, StepRecord, TaskData, TrainedStep
from pipelines.workers.assignment import Assignment, Queue
from pipelines.workers.context import WorkContext
from pipelines.workers.control import Control
from pipelines.workers.device import slow_dtype
from pipelines.workers.failures import CONCERTED, explain, is_permanent
from pipelines.workers.heartbeat import Heartbeat
from pipelines.workers.resident_model import ResidentModel
from pipelines.workers.step_scoring import StepScoring
from pipelines.workers.step_training import StepTraining

QUEUE_SECONDS = 0.1  # between two checks for the next assignment
IDLE_SECONDS = 60.0  # after which all ranks synchronise, so that no collective operation times out


def serve(queue: Queue, verbose: bool) -> None:
    """Entry point of a Ray Train worker: take assignments from the queue until it ends."""
    _quiet(verbose)
    engine.prepare_environment()
    worker = Worker(current_world())
    number = 0
    while (received := _next(queue, number, worker.world))[0] != "end":
        kind, raw = received
        if kind == "task":
            result = worker.work(Assignment.from_json(raw))
            if worker.world.rank == 0:
                queue.finish(number, result)
        number += kind != "wait"


def _next(queue: Queue, number: int, world: World) -> tuple[str, dict | None]:
    """The next assignment: rank 0 asks and broadcasts the answer."""
    received = [_ask(queue, number) if world.rank == 0 else None]
    if world.size > 1:
        torch.distributed.broadcast_object_list(received, src=0, group=world.group)
    return received[0]


def _ask(queue: Queue, number: int) -> tuple[str, dict | None]:
    """("task", assignment), ("done", None) if an earlier start of this group did it, ("end", None), or
    ("wait", None) after `IDLE_SECONDS`."""
    end = time.monotonic() + IDLE_SECONDS
    while time.monotonic() < end:
        if queue.result(number):
            return "done", None
        if raw := queue.get(number):
            return "task", raw
        if queue.ended:
            return "end", None
        time.sleep(QUEUE_SECONDS)
    return "wait", None


def _quiet(verbose: bool) -> None:
    """Silence the libraries: messages for the user go through the run directory."""
    if verbose:
        return
    warnings.filterwarnings("ignore")
    for name in ("DeepSpeed", "deepspeed", "accelerate", "torch", "peft", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


class Worker:
    """One process of a worker group; its resident model is kept across assignments."""

    def __init__(self, world: World):
        self.world = world
        self.resident = ResidentModel()

    def work(self, assignment: Assignment) -> dict:
        """Do an assignment; returns `{"stopped"}`, plus `"error"` for a trial that cannot succeed."""
        run = RunDirectory(assignment.run_uri)
        config = PipelineConfig.model_validate(assignment.config)
        heartbeat = Heartbeat(run, self.world.rank == 0, config.durability.hang_timeout)
        try:
            stage = zero_settings.stage_of(zero_settings.deepspeed_settings(config.deepspeed))
            self.world = replace(self.world, lockstep=stage == 3)
            work = WorkContext.of(assignment, config, run, self.world, heartbeat)
            self.resident.prepare(work)
            Segment(work, self.resident).run()
            return {"stopped": False}
        except Stopped:
            self.resident.detach()
            return {"stopped": True}
        except Exception as error:
            if assignment.trial and isinstance(error, CONCERTED):
                self.resident.forget()
                return {"stopped": False, "error": explain(error)}
            if is_permanent(error):
                # tells the driver: Ray would only restart the workers into the same error
                with contextlib.suppress(OSError):  # a full disk cannot take the event; the error itself still arrives
                    run.event("worker_error", error=explain(error), traceback=traceback.format_exc())
            raise
        finally:
            self.resident.release()
            heartbeat.close()


class Segment:
    """The work of one assignment: score missing cells of finished steps, then train, score and publish its steps."""

    def __init__(self, work: WorkContext, resident: ResidentModel):
        self.work, self.resident = work, resident
        self.control = Control(work)
        self.scoring = StepScoring(work, resident)
        self.training = StepTraining(work, resident, self.scoring, self.control)

    def run(self) -> None:
        work = self.work
        work.event("segment_started", world_size=work.world.size)
        if warning := slow_dtype(work.config, work.world.device.type):
            work.event("warning", text=warning)
        self._score_finished_steps()
        for plan in work.assignment.steps:
            self.control.stop_if_requested()
            if work.run.metrics(plan.directory) is None:
                self._step(plan)
            work.finished[plan.fingerprint] = (work.run, plan.directory)

    def _score_finished_steps(self) -> None:
        """Score row 0, and cells that finished steps lack because a task or corpus was added later."""
        work = self.work
        for directory, names in work.assignment.missing.items():
            self.control.stop_if_requested()
            begun = time.time()
            metrics = work.run.metrics(directory)
            if metrics is None and directory == work.assignment.base_directory:
                metrics = self._row_zero()
            if metrics is None or not (names or work.assignment.questions_for(directory)):
                continue  # a step that is still to be trained scores its own row
            model = self.resident.of_step(metrics)
            cells = self.scoring.score(model, directory, names) if names else []
            samples = self.scoring.sample(model, directory)
            self.resident.detach(model)
            if work.is_writer:
                scored = _with_scores(metrics, cells, samples, time.time() - begun)
                self._write_card(directory, scored)
                work.run.write_json(f"{directory}/metrics.json", scored)
                work.run.event("evaluated", directory=directory, cells=tuple(cells))
            work.world.barrier()

    def _row_zero(self) -> StepRecord:
        """`metrics.json` of row 0, without cells."""
        work = self.work
        return StepRecord(
            fingerprint=work.start.fingerprint if work.start else work.assignment.base_fingerprint,
            position=0,
            tasks=(),
            parent=None,
            parent_run=work.start.run_uri if work.start else None,
            peak_memory_bytes=_peak_memory(work.world.device),
            finished=time.time(),
            started=work.begun,
            cells=(),
            seconds=Seconds(train=0.0, evaluate=0.0, overhead=0.0, total=0.0),
            environment=work.environment(),
        )

    def _step(self, plan: StepPlan) -> None:
        """Train, save, score and publish a step; a step that an earlier start trained is only scored and published."""
        work = self.work
        trained = work.run.trained(plan.directory)
        if trained is None:
            work.event("step_started", plan)
            model, trained = self.training.learn(plan)
        else:
            work.world.barrier()  # until all ranks have read it
            work.finished[plan.fingerprint] = (work.run, plan.directory)
            model = self.resident.attach(plan.fingerprint)
        self.control.stop_if_requested()
        begun = time.time()
        cells = self.scoring.score(model, plan.directory, work.assignment.missing.get(plan.directory, []))
        samples = self.scoring.sample(model, plan.directory)
        self_test = self.scoring.self_test(model)
        evaluate_seconds = time.time() - begun
        held, whole = engine.parameters_held(self.resident.base)
        self.resident.detach(model)
        gc.collect()
        total = trained.seconds.total + time.time() - begun
        overhead = total - trained.seconds.train - evaluate_seconds
        record = replace(
            self._record(plan, trained),
            cells=tuple(cells),
            samples=tuple(samples) or None,
            self_test=self_test,
            seconds=replace(trained.seconds, evaluate=evaluate_seconds, overhead=overhead, total=total),
            environment=work.environment() | {"base_numbers_held": held, "base_numbers": whole},
        )
        self._publish(plan, record)

    def _record(self, plan: StepPlan, trained: TrainedStep) -> StepRecord:
        """`metrics.json` of a trained step, without cells and timings of evaluation."""
        work = self.work
        return replace(
            work.record(plan),
            data={name: _training_data(work.config, name) for name in plan.tasks},
            classes=_class_names(work.config, plan.tasks),
            peak_memory_bytes=_peak_memory(work.world.device),
            trainable_parameters=trained.trainable_parameters,
            head_parameters=trained.head_parameters,
            adapter_bytes=trained.adapter_bytes,
            files=trained.files,
            training=trained.training,
            started=trained.started,
            seconds=trained.seconds,
            environment={},
            other=trained.other,
        )

    def _publish(self, plan: StepPlan, metrics: StepRecord) -> None:
        """Write `metrics.json`, which marks the step as done."""
        work = self.work
        self.control.check_lease()
        if work.is_writer:
            self._write_tokenizer(plan.directory, metrics)
            self._write_card(plan.directory, metrics)
            work.run.write_json(f"{plan.directory}/metrics.json", metrics)
            work.event("published", plan, cells=metrics.cells, seconds=metrics.seconds)
            work.run.remove(f"{plan.directory}/trained.json")
        work.world.barrier()

    def _write_tokenizer(self, directory: str, metrics: StepRecord) -> None:
        """Write the base's tokenizer with its chat template into the adapter's folder."""
        if metrics.adapter_bytes and not self.work.assignment.trial:
            with tempfile.TemporaryDirectory() as scratch:
                self.resident.tokenizer.save_pretrained(scratch)
                self.work.run.upload(Path(scratch), f"{directory}/adapter")

    def _write_card(self, directory: str, metrics: StepRecord) -> None:
        """Write the model card into the adapter's folder."""
        work = self.work
        if not metrics.adapter_bytes or metrics.position == 0 or work.assignment.trial:
            return
        parent = work.finished.get(metrics.parent)
        base = None if parent or work.start else work.run.metrics(work.assignment.base_directory)
        ancestors = ancestry_of(*parent) if parent else [base] if base else []
        card = model_card("adapter", work.run.name, work.config, [metrics, *ancestors])
        work.run.write_bytes(f"{directory}/adapter/{CARD}", card.encode())


def _with_scores(metrics: StepRecord, cells: Sequence[Cell], samples: Sequence[Sample], took: float) -> StepRecord:
    """The record of a step with further cells and sample answers."""
    before = metrics.seconds
    seconds = replace(before, evaluate=before.evaluate + took, total=before.total + took)
    answered = (*(metrics.samples or ()), *samples) or None
    cells = (*metrics.cells, *cells)
    return replace(metrics, cells=cells, samples=answered, seconds=seconds, finished=time.time())


def _training_data(config: PipelineConfig, name: str) -> TaskData:
    task = validation_part(config.task(name))
    validated = _split(task, "validation") if config.training.validate_every else None
    return TaskData(_split(task, "train"), validated)


def _split(task: TaskSource, split: str) -> Split:
    return Split(digest_of(task, split), len(load_split(task, split)))


def _class_names(config: PipelineConfig, names: Sequence[str]) -> dict[str, list[str]]:
    """Class names of the step's classification tasks, for use of the adapter where their data is not available."""
    classes = {name: kind_of(config.task(name)).classes(config.task(name)) for name in names}
    return {name: list(found) for name, found in classes.items() if found}


def _peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: allocated on this process's GPU, or else its resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

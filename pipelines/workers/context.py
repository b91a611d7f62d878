"""The context that all parts of a worker share during one assignment."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from pipelines.config.pipeline import PipelineConfig
from pipelines.distributed import zero_settings
from pipelines.distributed.world import World
from pipelines.models.base import hidden_size
from pipelines.runs import environment
from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import StepPlan
from pipelines.runs.start import Start
from pipelines.runs.step_record import Seconds, Setting, StepRecord
from pipelines.workers.assignment import Assignment
from pipelines.workers.heartbeat import Heartbeat


@dataclass
class WorkContext:
    """An assignment with everything that is derived from it once.

    Attributes:
        run: the run directory that the worker writes to.
        settings: the complete DeepSpeed settings.
        start: the step of another run that the chain continues from.
        finished: fingerprint → (run, step directory) of every finished step, including that of `start`.
        begun: Unix time at which the assignment began.
    """

    assignment: Assignment
    config: PipelineConfig
    run: RunDirectory
    world: World
    settings: dict
    heartbeat: Heartbeat
    start: Start | None
    finished: dict[str, tuple[RunDirectory, str]]
    begun: float = field(default_factory=time.time)

    @classmethod
    def of(
        cls, assignment: Assignment, config: PipelineConfig, run: RunDirectory, world: World, heartbeat: Heartbeat
    ) -> WorkContext:
        hidden = hidden_size(config.base_model) if zero_settings.asks_for_sizes(config.deepspeed) else None
        settings = zero_settings.complete_settings(config, world.size, hidden)
        start = Start(**assignment.start) if assignment.start else None
        finished = {name: (run, directory) for name, directory in run.finished_steps().items()}
        if start:
            finished[start.fingerprint] = (start.run, start.directory)
        return cls(assignment, config, run, world, settings, heartbeat, start, finished)

    @property
    def is_writer(self) -> bool:
        """Whether this is rank 0, the only one that writes to the run directory."""
        return self.world.rank == 0

    def event(self, kind: str, plan: StepPlan | None = None, **fields) -> None:
        if self.is_writer:
            self.run.event(kind, **(plan.identity if plan else {}), **fields)

    def record(self, plan: StepPlan) -> StepRecord:
        """The record of a step that begins now: who it is, and nothing yet of what its training produces."""
        now = time.time()
        return StepRecord(
            fingerprint=plan.fingerprint,
            position=plan.position,
            tasks=plan.tasks,
            parent=plan.parent,
            parent_run=self.start.run_uri if self.start and plan.parent == self.start.fingerprint else None,
            depth=plan.depth,
            setting=Setting.of(self.config),
            started=now,
            finished=now,
            cells=(),
            seconds=Seconds(),
            environment=self.environment(),
        )

    def environment(self) -> dict:
        return environment.describe(self.world.size, zero_settings.stage_of(self.settings), self.world.device.type)

"""Loss curve, progress and checkpoints of one step, across interruptions."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping

from pipelines.runs.identity import StepPlan
from pipelines.training import checkpoint
from pipelines.training.checkpoint import Checkpoint
from pipelines.training.reports import Reports
from pipelines.training.validation import Validation
from pipelines.workers.context import WorkContext
from pipelines.workers.control import Control


class TrainingLog:
    """Records the training of a step.

    Args:
        history: values of the checkpoint that training resumes from, or initial ones.
        first_step: optimizer steps done before this process started.
        moments: optimizer step → Unix time at which an interrupted process has reported it.

    Attributes:
        points: [optimizer step, loss, learning rate, Unix time] of every step.
        trained: seconds inside the training loop.
        scored: seconds of these spent at rungs, since this process started.
        validated: seconds spent on validation, since this process started.
        reports: other tools that the curve is sent to (rank 0).
        tokens: returns the tokens that this rank has trained on since this process started.
    """

    def __init__(
        self,
        work: WorkContext,
        control: Control,
        plan: StepPlan,
        steps: int,
        history: dict,
        first_step: int,
        moments: Mapping[int, float],
    ):
        self.work, self.control, self.plan, self.moments = work, control, plan, moments
        self.steps, self.first_step, self.history = steps, first_step, history
        self.points: list[list[float]] = list(history["curve"])
        self.trained: float = history.get("trained", 0.0)
        self.scored = self.validated = 0.0
        self.resumed_at = [*history["resumed_at"], *([first_step] if first_step else [])]
        self.tokens: Callable[[], int] = lambda: 0
        self.reports: Reports | None = None
        self.begun = time.time()

    def add(self, points: list[tuple[int, float, float, float]]) -> None:
        # a point that is sent again is the same one only with the time at which it was sent first
        self.points += [[step, loss, rate, self.moments.get(step, now)] for step, loss, rate, now in points]
        step, loss, _, _ = self.points[-1]
        elapsed = max(time.time() - self.begun, 1e-9)
        self.work.heartbeat.report(
            "training",
            **self.plan.identity,
            step=step,
            steps=self.steps,
            loss=loss,
            seconds_left=elapsed / (step - self.first_step) * (self.steps - step),
            tokens_per_second=self.all_tokens() / elapsed,
        )
        if self.reports:
            for step, loss, rate, _ in points:
                if step not in self.moments:  # otherwise an interrupted process has reported it
                    self.reports.log(step, {"loss": loss, "learning_rate": rate})
            self.reports.log(step, {"tokens_per_second": self.all_tokens() / elapsed})

    def all_tokens(self) -> int:
        """About how many tokens all ranks have trained on since this process started: rank 0 knows only its own."""
        return self.work.world.size * self.tokens()

    def validate(self, validation: Validation, step: int) -> None:
        """Measure the state after an optimizer step."""
        begun = time.perf_counter()
        self.work.heartbeat.report("validating", **self.plan.identity, step=step, steps=self.steps)
        loss = validation.measure(step)
        if self.reports:
            self.reports.log(step, {"eval_loss": loss})
        self.validated += time.perf_counter() - begun
        if validation.is_over and step < self.steps:
            best = validation.best
            text = f"stops after step {step} of {self.steps}: the validation loss was lowest ({best.loss:.4g}) at step"
            self.work.event("stopped_early", self.plan, step=step, text=f"{self.plan.label} {text} {best.step}")

    def recent_loss(self) -> float:
        """Mean training loss of the second half of the steps so far."""
        losses = [loss for _, loss, _, _ in self.points[len(self.points) // 2 :]]
        return math.fsum(losses) / len(losses)

    def write_checkpoint(self, take: Callable[[], Checkpoint]) -> None:
        """Write a checkpoint; `take` gathers it from all ranks."""
        begun = time.perf_counter()
        taken = take()
        if self.work.is_writer:
            elapsed = time.time() - self.begun
            values = {
                "started": self.history["started"],
                "seconds": self.history["seconds"] + elapsed - self.scored,
                "trained": self.trained + elapsed - self.scored - self.validated,
                "curve": self.points,
                "resumed_at": self.resumed_at,
            }
            taken = dataclasses.replace(taken, values=taken.values | values)
            size = checkpoint.save(self.work.run, self.plan, taken)
            seconds = time.perf_counter() - begun
            self.work.event("checkpoint", self.plan, step=taken.step, bytes=size, seconds=seconds)
        self.control.checkpoint_written()

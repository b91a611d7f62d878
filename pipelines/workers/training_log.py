"""Loss curve, progress and checkpoint cadence of one step, over interruptions."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable

from pipelines.runs.identity import StepPlan
from pipelines.training import checkpoint
from pipelines.training.checkpoint import Checkpoint
from pipelines.workers.worker import Worker


class TrainingLog:
    """Curve, progress and checkpoints of one step, over its interruptions."""

    def __init__(self, worker: Worker, plan: StepPlan, steps: int, history: dict, first_step: int):
        self.worker, self.plan, self.steps, self.first_step = worker, plan, steps, first_step
        self.history = history
        self.points: list[list[float]] = list(history["curve"])
        self.trained: float = history.get("trained", 0.0)  # seconds inside the training loop
        self.scored = 0.0  # of these, seconds at rungs, since this process began
        self.resumed_at = [*history["resumed_at"], *([first_step] if first_step else [])]
        self.tokens: Callable[[], int] = lambda: 0  # of this rank, since this process began
        self.begun = time.time()

    def add(self, points: list[tuple[int, float, float, float]]) -> None:
        self.points += [list(point) for point in points]
        step, loss, _, _ = self.points[-1]
        elapsed = max(time.time() - self.begun, 1e-9)
        self.worker.pulse.say(
            "training",
            **step_identity(self.plan),
            step=step,
            steps=self.steps,
            loss=loss,
            seconds_left=elapsed / (step - self.first_step) * (self.steps - step),
            tokens_per_second=self.worker.world.size * self.tokens() / elapsed,
        )

    def recent_loss(self) -> float:
        """Mean training loss of the second half of the steps so far."""
        losses = [loss for _, loss, _, _ in self.points[len(self.points) // 2 :]]
        return math.fsum(losses) / len(losses)

    def keep(self, take: Callable[[], Checkpoint]) -> None:
        """Write a checkpoint; `take` gathers it from all ranks."""
        begun = time.perf_counter()
        taken = take()
        if self.worker.world.rank == 0:
            elapsed = time.time() - self.begun
            values = {
                "started": self.history["started"],
                "seconds": self.history["seconds"] + elapsed - self.scored,
                "trained": self.trained + elapsed - self.scored,
                "curve": self.points,
                "resumed_at": self.resumed_at,
            }
            taken = dataclasses.replace(taken, values=taken.values | values)
            size = checkpoint.save(self.worker.run_directory, self.plan, taken)
            seconds = time.perf_counter() - begun
            self.worker._event("checkpoint", self.plan, step=taken.step, bytes=size, seconds=seconds)
        self.worker._kept = time.monotonic()


def step_identity(plan: StepPlan) -> dict:
    return {"fingerprint": plan.fingerprint, "task": plan.label, "position": plan.position}

"""Writes what a step tells during training (`runs/live.py`), from a thread of rank 0, so that training never waits."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import psutil
import torch

from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import StepPlan
from pipelines.runs.live import MOST_SAMPLES, LiveStep, read_curve, read_live, write_curve, write_live
from pipelines.runs.step_record import Series, StepRecord
from pipelines.workers.context import WorkContext

WRITE_SECONDS = 5.0  # between two writes, and two measurements at first
MEGABYTE = 1.0e6  # as MLflow's own system metrics count


class LiveFeed:
    """The feed of one step, across interruptions.

    Args:
        step: record of the step, without what training decides.

    Attributes:
        curve: returns the curve so far, [optimizer step, loss, learning rate, Unix time] of every step.
        validation: returns the validations so far, [optimizer step, loss, Unix time] of each.
        tokens: returns the tokens that all ranks have trained on since this process started.
        started: Unix time at which the step was begun, before any interruption.
        series: measurements so far; when they are more than `MOST_SAMPLES`, every other one is dropped.
        moments: optimizer step → Unix time, of the steps that an interrupted process had reported.
        validated: the same of its validations.
    """

    def __init__(self, run: RunDirectory, folder: str, step: StepRecord, device: torch.device):
        self.run, self.folder, self.step, self.device = run, folder, step, device
        before = read_live(run, folder)
        self.started = before.step.started if before else step.started
        self.series: Series = before.series if before else {}
        self._earlier = read_curve(run, folder)
        self.moments = {int(point[0]): point[3] for point in self._earlier}
        earlier = before.validation if before else []
        self._earlier_validation = [list(point) for point in earlier]
        self.validated = {int(point[0]): point[2] for point in earlier}
        self.validation: Callable[[], Sequence[Sequence[float]]] = list
        self.curve: Callable[[], Sequence[Sequence[float]]] = list
        self.tokens: Callable[[], int] = lambda: 0
        self._pause = WRITE_SECONDS
        self._written = 0  # optimizer steps that are in the files
        self._counted: tuple[float, int] | None = None  # time and tokens at the last measurement
        self._stop = threading.Event()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside, a thread measures and writes; at the end everything is written."""
        psutil.cpu_percent()  # the first call has nothing to compare with
        self._counted = (time.monotonic(), self.tokens())
        thread = threading.Thread(target=self._loop, daemon=True, name="live")
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _loop(self) -> None:
        measured = time.monotonic()
        while not self._stop.wait(WRITE_SECONDS):
            if time.monotonic() - measured >= self._pause - WRITE_SECONDS / 2:
                self._measure()
                measured = time.monotonic()
            self._write()
        self._measure()
        self._write()

    def _write(self) -> None:
        points = list(self.curve())
        if not points:
            return
        last = int(points[-1][0])
        ahead = [point for point in self._earlier if point[0] > last]  # reported before an interruption
        with contextlib.suppress(OSError):  # a full disk surfaces where a write is required
            write_curve(self.run, self.folder, [*points, *ahead], self._written)
            write_live(self.run, self.folder, LiveStep(self.step, dict(self.series), self._validated_so_far()))
            self._written = last

    def _validated_so_far(self) -> list[list[float]]:
        points = [list(point) for point in self.validation()]
        last = points[-1][0] if points else 0
        return [*points, *(point for point in self._earlier_validation if point[0] > last)]

    def _measure(self) -> None:
        points = self.curve()
        if not points:
            return
        now, tokens = time.monotonic(), self.tokens()
        before, counted = self._counted
        self._counted = (now, tokens)
        values = {"train/tokens_per_second": (tokens - counted) / max(now - before, 1e-9), **load(self.device)}
        moment = time.time()
        for name, value in values.items():
            self.series.setdefault(name, []).append([int(points[-1][0]), round(value, 3), moment])
        if max(map(len, self.series.values())) > MOST_SAMPLES:
            self.series = {name: rows[::2] for name, rows in self.series.items()}
            self._pause *= 2


def feed_of(work: WorkContext, plan: StepPlan) -> LiveFeed:
    """The feed of a step that is about to be trained, or to be resumed."""
    return LiveFeed(work.run, plan.live, work.record(plan), work.world.device)


def load(device: torch.device) -> dict[str, float]:
    """Load of this machine, under the names of MLflow's system metrics."""
    memory = psutil.virtual_memory()
    values = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system/system_memory_usage_percentage": memory.percent,
    }
    return values | (_gpu_load(device) if device.type == "cuda" else {})


def _gpu_load(device: torch.device) -> dict[str, float]:
    free, total = torch.cuda.mem_get_info(device)
    number = device.index or 0
    values = {
        f"system/gpu_{number}_memory_usage_megabytes": (total - free) / MEGABYTE,
        f"system/gpu_{number}_memory_usage_percentage": 100 * (total - free) / total,
    }
    with contextlib.suppress(ModuleNotFoundError, RuntimeError):  # without NVML only memory is known
        values[f"system/gpu_{number}_utilization_percentage"] = float(torch.cuda.utilization(device))
    return values

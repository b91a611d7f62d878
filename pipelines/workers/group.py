"""A warm worker group: one Ray Train job whose workers process assignments from a queue of files, one after another.

Starting workers takes far longer than a short step, so segments, compared methods and trials of a search share a
group. The queue lies in the storage: workers that Ray Train restarts skip the assignments that are marked as done.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable
from typing import Any

from pipelines.config.pipeline import PipelineConfig
from pipelines.workers.assignment import Assignment, Queue
from pipelines.workers.failures import GroupLost, root_cause
from pipelines.workers.ray_cluster import LOCAL

POLL_SECONDS = 0.25
END_SECONDS = 20.0  # for workers to exit by themselves


class WorkerGroup:
    """The driver's side of the queue. Starts the Ray Train job with the first assignment, and again after a loss.

    Args:
        config: its `resources` and `durability` determine the group.
        uri: storage of the queue and of Ray Train's own files (below `train/`).
    """

    def __init__(self, config: PipelineConfig, uri: str, gpus_per_worker: float, verbose: bool = False):
        self.config, self.uri, self.gpus, self.verbose = config, uri, gpus_per_worker, verbose
        self._reference: Any = None
        self._number = 0

    def submit(self, assignment: Assignment) -> int:
        """Hand out an assignment; returns its number."""
        self.start()
        number, self._number = self._number, self._number + 1
        self.queue.put(number, assignment.to_json())
        return number

    def wait(self, number: int, seconds: float = POLL_SECONDS) -> dict | None:
        """The result of an assignment, or None if it is not done within `seconds`.

        Raises:
            GroupLost: no worker is working on it any more.
        """
        import ray  # slow

        if self._reference is None:
            raise GroupLost("the workers are gone")
        end = time.monotonic() + seconds
        while True:
            if result := self.queue.result(number):
                return result
            over = bool(ray.wait([self._reference], timeout=min(POLL_SECONDS, seconds))[0])
            if result := self.queue.result(number):
                return result
            if over:
                self._raise_loss()
            if time.monotonic() >= end:
                return None

    def close(self) -> None:
        """Let the workers exit."""
        import ray  # slow

        if self._reference is None:
            return
        with contextlib.suppress(OSError):
            self.queue.end()
            if ray.wait([self._reference], timeout=END_SECONDS)[0]:
                self._reference = None  # done: cancelling a task that is completing makes Ray abort the driver
        self.kill()

    def end(self, seconds: float) -> None:
        """Wait up to `seconds` for the last assignment, then kill the workers."""
        if self._reference is not None and self._number:
            with contextlib.suppress(OSError, GroupLost):
                self.wait(self._number - 1, seconds)
        self.kill()

    def kill(self) -> None:
        """Kill the workers now."""
        import ray  # slow

        reference, self._reference = self._reference, None
        if reference is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.cancel(reference, force=True)
            self._give_back()

    def _give_back(self) -> None:
        """Release the workers' resources: Ray Train's own cleaner needs a dashboard, which is off."""
        import ray  # slow
        from ray.util.placement_group import PlacementGroup, remove_placement_group

        with contextlib.suppress(OSError):
            if place := self.queue.placement_group:
                remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(place))))

    def start(self) -> None:
        """Start the workers unless they are running; they wait for the first assignment."""
        if self._reference is not None:
            return
        # a new name per start: Ray Train would restore the state of an earlier start with the same name
        name = f"{self.config.name}-{uuid.uuid4().hex[:8]}"
        self.queue, self._number = Queue(f"{self.uri}/train/{name}-queue"), 0
        settings = {"queue": self.queue.uri, "verbose": self.verbose, "gpus": self.gpus}
        self._reference = _here(fit_group).remote(self.config.model_dump(), f"{self.uri}/train", name, settings)

    def _raise_loss(self) -> None:
        import ray  # slow

        reference, self._reference = self._reference, None
        try:
            ray.get(reference)
        except ray.exceptions.RayError as error:
            raise GroupLost(root_cause(error)) from error
        raise GroupLost("the workers exited before their work was done")


class RemoteGroup:
    """A `WorkerGroup` in its own actor, with the same methods, for several processes that take turns."""

    def __init__(self, config: PipelineConfig, uri: str, gpus_per_worker: float, verbose: bool = False):
        import ray  # slow

        # restarts, without workers, if its node is lost
        remote = ray.remote(num_cpus=0, max_restarts=-1)(WorkerGroup)
        self._actor = remote.remote(config, uri, gpus_per_worker, verbose)

    def submit(self, assignment: Assignment) -> int:
        return self._call("submit", assignment)

    def wait(self, number: int, seconds: float = POLL_SECONDS) -> dict | None:
        return self._call("wait", number, seconds)

    def close(self) -> None:
        self._call("close")

    def end(self, seconds: float) -> None:
        self._call("end", seconds)

    def kill(self) -> None:
        self._call("kill")

    def _call(self, method: str, *arguments: Any) -> Any:
        import ray  # slow

        try:
            return ray.get(getattr(self._actor, method).remote(*arguments))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, GroupLost):
                raise GroupLost(str(error.cause)) from None
            raise
        except ray.exceptions.RayActorError as error:
            raise GroupLost(f"the process that started the workers was lost ({str(error).splitlines()[0]})") from error


def groups_that_fit(config: PipelineConfig, resources: dict, gpus_per_worker: float) -> int:
    """Number of groups of `config.resources.workers` that fit on a cluster with these resources; at least one."""
    workers = config.resources.workers
    needs = {"CPU": workers * config.resources.cpus_per_worker, "GPU": workers * gpus_per_worker}
    return max(1, min(int(resources.get(kind, 0) / need + 1e-6) for kind, need in needs.items() if need))


def _here(function: Callable):
    """A Ray task on this node, which stays when other nodes leave."""
    import ray  # slow
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(function)


def fit_group(raw_config: dict, storage: str, name: str, settings: dict) -> None:
    """Run `TorchTrainer.fit`, as a Ray task."""
    import ray.train  # slow

    from pipelines.workers.lean_trainer import LeanTorchTrainer

    if not os.environ.get(LOCAL):  # there is a dashboard, whose page of training runs reads this
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
    config = PipelineConfig.model_validate(raw_config)
    gpus = settings["gpus"]
    resources = {"CPU": config.resources.cpus_per_worker} | ({"GPU": gpus} if gpus else {})
    LeanTorchTrainer(
        work,
        train_loop_config=settings,
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.resources.workers, use_gpu=bool(gpus), resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage,
            failure_config=ray.train.FailureConfig(
                max_failures=config.durability.max_failures, controller_failure_limit=3
            ),
            logging_config=ray.train.LoggingConfig(log_level="INFO" if settings["verbose"] else "ERROR"),
        ),
    ).fit()


def work(settings: dict) -> None:
    """Entry point of a worker under Ray Train. Imports lazily, so that the processes around it stay small."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    import ray.train  # slow
    from ray.util import get_current_placement_group

    from pipelines.workers.worker import serve

    queue, here = Queue(settings["queue"]), get_current_placement_group()
    if here and ray.train.get_context().get_world_rank() == 0:
        queue.place(here.id.hex())
    serve(queue, settings["verbose"])

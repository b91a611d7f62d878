"""A worker's checks for requests to stop, a lost lease and preemption notices."""

from __future__ import annotations

import time

import torch

from pipelines.distributed.world import World
from pipelines.errors import Stopped
from pipelines.runs.directory import RunDirectory
from pipelines.training.trainer import ControlRequests
from pipelines.workers.context import WorkContext

STOP_CHECK_SECONDS = 2.0  # between two checks of the run directory for a request to stop
SYNCHRONISATIONS_PER_NOTICE = 5  # synchronisation points per query to Ray about preemption


class Control:
    """Decides when training writes a checkpoint and when an assignment stops."""

    def __init__(self, work: WorkContext):
        self.work = work
        self._synchronisations = 0
        self._checked = self._checkpointed = time.monotonic()

    def requests(self) -> ControlRequests:
        """Requests of this rank at a synchronisation point of the trainer; every rank must call it."""
        self._synchronisations += 1
        notice = self._synchronisations % SYNCHRONISATIONS_PER_NOTICE == 0 and node_is_leaving(self.work.world)
        if not self.work.is_writer:
            return ControlRequests(checkpoint=notice)
        due = time.monotonic() - self._checkpointed >= self.work.config.durability.checkpoint_seconds
        return ControlRequests(checkpoint=due or notice, stop=self.stop_requested())

    def checkpoint_written(self) -> None:
        """Makes the next checkpoint due `durability.checkpoint_seconds` from now."""
        self._checkpointed = time.monotonic()

    def stop_requested(self) -> bool:
        """Whether a stop was requested or another driver has taken over (rank 0; checked at intervals)."""
        if time.monotonic() - self._checked < STOP_CHECK_SECONDS:
            return False
        self._checked = time.monotonic()
        return self._must_stop()

    def stop_if_requested(self) -> None:
        """Raises Stopped on every rank if a stop was requested; every rank must call it."""
        if self.work.world.sum(int(self.work.is_writer and self._must_stop())):
            raise Stopped("stopped between two steps")

    def check_lease(self) -> None:
        """Raises Stopped on every rank if another driver has taken over: this one must publish nothing more."""
        if self.work.world.sum(int(self.work.is_writer and not self._lease_is_ours())):
            raise Stopped("another driver has taken over this run")

    def _must_stop(self) -> bool:
        return self.work.run.stop_requested() is not None or not self._lease_is_ours()

    def _lease_is_ours(self) -> bool:
        token, uri = self.work.assignment.lease, self.work.assignment.lease_uri
        lease = (RunDirectory(uri) if uri else self.work.run).read_json("lease.json")
        return not token or (lease is not None and lease["token"] == token)


def node_is_leaving(world: World) -> bool:
    """Whether a node of this worker group is about to be preempted; every rank must call it."""
    if world.size == 1 and not torch.distributed.is_initialized():
        return False
    import ray.train  # slow, and absent where a worker runs without Ray

    return ray.train.get_preemption_info() is not None

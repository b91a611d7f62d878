"""Requests to stop, leases and preemption notices, as a worker checks them."""

from __future__ import annotations

import torch

from pipelines.distributed.world import World

ASK_SECONDS = 2.0  # between two looks at the run directory for a request to stop

NOTICE_LOOKS = 5  # looks between two questions to Ray whether a node is about to be taken away


def node_is_leaving(world: World) -> bool:
    """Whether Ray was told that a node of this worker group will be taken away (all ranks must ask together)."""
    if world.size == 1 and not torch.distributed.is_initialized():
        return False
    import ray.train

    return ray.train.get_preemption_info() is not None

"""The device that the workers of a configuration compute on, asked before there are workers."""

from __future__ import annotations

import os

import torch

from pipelines.config.pipeline import PipelineConfig
from pipelines.models.dtypes import EMULATED, best_dtype, computes_bfloat16
from pipelines.workers.ray_cluster import cluster, gpus_per_worker


def dtype_of_workers(config: PipelineConfig, address: str | None = None) -> str:
    """What `base_model.dtype: auto` means on the workers.

    On a cluster elsewhere one task asks, with the resources of a worker; nodes are taken to be alike.

    Args:
        address: the cluster; None: RAY_ADDRESS, else this machine.

    Raises:
        ConfigError: the workers can never be placed there.
    """
    if not (address or os.environ.get("RAY_ADDRESS")):
        return best_dtype(local_device(config))
    import ray  # slow

    with cluster(config, address=address):
        gpus = gpus_per_worker(config)
        ask = ray.remote(num_cpus=0, num_gpus=gpus, max_retries=3)(best_dtype)
        return ray.get(ask.remote("cuda" if gpus else "cpu"))


def local_device(config: PipelineConfig) -> str:
    """What a worker on this machine computes on: "cuda" or "cpu"."""
    wanted = config.resources.gpus_per_worker
    return "cuda" if wanted and torch.cuda.is_available() else "cpu"


def slow_dtype(config: PipelineConfig, device: str) -> str | None:
    """A warning if the base's data type is emulated on the device; None if it is not."""
    if config.base_model.dtype != "bfloat16" or computes_bfloat16(device):
        return None
    where = "this GPU" if device == "cuda" else "this processor"
    return (
        f"base_model.dtype: bfloat16 is emulated on {where} and takes about {EMULATED:g} times as long as float32; "
        "set float32 or auto"
    )

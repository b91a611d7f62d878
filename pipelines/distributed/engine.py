"""DeepSpeed around a step: the settings, an engine for inference, and a clean end.

A worker trains several steps on one base, so every engine must leave the model as it found it. DeepSpeed's
`destroy` leaves forward hooks behind; `hooks_restored` takes them off.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

import torch
from torch import nn

from pipelines.distributed.world import World

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def prepare_environment() -> None:
    """Before the first engine of a process.

    DeepSpeed's shared-memory op for CPU all-reduce takes a compiler and a minute to build, waits for ever on the
    lock of a builder that was killed, and serves inference only: it is declared incompatible, which skips it.
    """
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    with _not_imported("mlflow"):  # the autotuner would, for a second of each worker's start; nobody tunes here
        import deepspeed  # slow
    import deepspeed.ops  # slow

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.distributed.is_initialized():
        # joins the process group that is there; without it zero.Init believes in a world of one
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False)


@contextlib.contextmanager
def _not_imported(name: str) -> Iterator[None]:
    """Inside, a package that nobody has imported yet seems not to be installed."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None
    try:
        yield
    finally:
        del sys.modules[name]


@contextlib.contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Inside, memory that is freed goes back to the system at once, where the C library is glibc.

    Partitioning frees each layer's whole weights right after they were read. glibc would keep them for later, in
    pieces between the shards that stay, and a worker under ZeRO-3 would grow by a whole copy of the model.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(M_TRIM_THRESHOLD, 1 << 16)
    mallopt(M_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:  # where glibc's own adaptation would end: training allocates and frees the same sizes again and again
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 64 << 20)


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 holds the model in shards."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


def local_numbers(model: nn.Module) -> tuple[int, int]:
    """(numbers of the model held by this rank, numbers of the whole model)."""
    held = sum(p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel() for p in model.parameters())
    return held, sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


@contextlib.contextmanager
def ready_for_inference(model: nn.Module, settings: dict, world: World) -> Iterator[nn.Module]:
    """Inside, `model` can be called: as it is, or through a ZeRO-3 engine if its weights are partitioned."""
    if not is_partitioned(model):
        yield model.to(world.device)
        return
    import deepspeed  # slow

    with hooks_restored(model):
        engine, *_ = deepspeed.initialize(model=model, config=settings)
        try:
            yield model
        finally:
            engine.destroy()


@contextlib.contextmanager
def hooks_restored(model: nn.Module) -> Iterator[None]:
    """DeepSpeed's forward hooks are gone afterwards (others, such as Transformers' own recorders, stay)."""
    try:
        yield
    finally:
        for module in model.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key in [key for key, hook in hooks.items() if _is_deepspeeds(hook)]:
                    del hooks[key]


def _is_deepspeeds(hook) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("deepspeed")


def gathered_copy(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Full fp32 copies on the CPU of possibly partitioned parameters. Every rank must call it."""
    copies = {}
    for name, parameter in parameters.items():
        if hasattr(parameter, "ds_id"):
            import deepspeed  # slow

            with deepspeed.zero.GatheredParameters([parameter]):
                copies[name] = parameter.detach().float().cpu().clone()
        else:
            copies[name] = parameter.detach().float().cpu().clone()
    return copies


@contextlib.contextmanager
def writable(parameter: nn.Parameter):
    """A parameter that can be written as a whole, also when partitioned."""
    if hasattr(parameter, "ds_id"):
        import deepspeed  # slow

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            yield
    else:
        yield

"""DeepSpeed engines that leave the model as they found it, since a worker trains several steps on one base.

`destroy` of DeepSpeed leaves forward hooks behind; `hooks_restored` removes them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from pipelines.distributed.world import World

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h


def prepare_environment() -> None:
    """Set DeepSpeed up, once per process before its first engine.

    Its shared-memory op for CPU all-reduce needs a compiler and a minute to build, waits forever on the lock of a
    build that was killed, and serves inference only; declaring it incompatible skips it.
    """
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    with _not_imported("mlflow"):  # only the autotuner uses it; importing it costs each worker a second
        import deepspeed  # slow
    import deepspeed.ops  # slow

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.distributed.is_initialized():
        # join the existing process group; otherwise zero.Init assumes a world of one rank
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False)


@contextlib.contextmanager
def _not_imported(name: str) -> Iterator[None]:
    """Make a package that is not imported yet appear not to be installed."""
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
    """Return freed memory to the system at once (glibc only).

    Partitioning frees the whole weights of each layer right after reading them. glibc would keep them, fragmented
    between the shards, and a worker under ZeRO-3 would grow by a whole copy of the model.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(M_TRIM_THRESHOLD, 1 << 16)
    mallopt(M_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:  # values that glibc's own adaptation would reach, since training reuses the same sizes
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 64 << 20)


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 has partitioned the model."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


def parameters_held(model: nn.Module) -> tuple[int, int]:
    """(parameters held by this rank, parameters of the whole model)."""
    held = sum(p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel() for p in model.parameters())
    return held, sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


@contextlib.contextmanager
def ready_for_inference(model: nn.Module, settings: dict, world: World) -> Iterator[nn.Module]:
    """Make `model` callable: as it is, or through a ZeRO-3 engine if its weights are partitioned.

    Backward passes may follow, by `torch.autograd.grad`. They leave parameters gathered: the next forward pass with
    gradients, or leaving the block, partitions them again.
    """
    if not is_partitioned(model):
        yield model.to(world.device)
        return
    import deepspeed  # slow

    with hooks_restored(model):
        engine, *_ = deepspeed.initialize(model=model, config=settings)

        def release(*_) -> None:
            if torch.is_grad_enabled():
                engine.optimizer.empty_partition_cache()

        hook = model.register_forward_pre_hook(release)
        try:
            yield model
        finally:
            hook.remove()
            release()
            engine.destroy()


@contextlib.contextmanager
def hooks_restored(model: nn.Module) -> Iterator[None]:
    """Remove DeepSpeed's forward hooks afterwards; other hooks, such as those of Transformers, stay."""
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
    """Whole fp32 copies on the CPU of possibly partitioned parameters. All ranks must call it."""
    copies = {}
    for name, parameter in parameters.items():
        if hasattr(parameter, "ds_id"):
            import deepspeed  # slow

            with deepspeed.zero.GatheredParameters([parameter]):
                copies[name] = parameter.detach().float().cpu().clone()
        else:
            copies[name] = parameter.detach().float().cpu().clone()
    return copies


def put_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Write whole weights into a model's parameters, whether partitioned or not. All ranks must call it."""
    parameters = dict(model.named_parameters())
    for name, tensor in weights.items():
        with writable(parameters[name]):
            parameters[name].data.copy_(tensor)


@contextlib.contextmanager
def writable(parameter: nn.Parameter):
    """Make a parameter writable as a whole even if it is partitioned. All ranks must enter it."""
    if hasattr(parameter, "ds_id"):
        import deepspeed  # slow

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            yield
    else:
        yield

"""DeepSpeed around a step: the settings, an engine for inference, and a clean end.

A worker trains several steps on one base, so every engine must leave the model as it found it. DeepSpeed's
`destroy` leaves forward hooks behind; `hooks_restored` takes them off.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import torch
from torch import nn

from pipelines.config import ConfigError, PipelineConfig, Problem, did_you_mean
from pipelines.evaluation import World

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
SHIPPED = ("zero1", "zero2", "zero3", "zero3-offload")


def deepspeed_settings(value: str | dict) -> dict:
    """The `deepspeed:` field as a mapping: a shipped name, a JSON path, or the mapping itself.

    Raises:
        ConfigError: unknown name, unreadable file, or an impossible stage.
    """
    settings = value if isinstance(value, dict) else _read_settings(value)
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError([Problem("deepspeed", f"zero_optimization.stage is {stage!r}; use 0, 1, 2 or 3")])
    if "optimizer" in settings or "scheduler" in settings:
        raise ConfigError(
            [Problem("deepspeed", "remove its optimizer and scheduler blocks; training: sets learning rates")]
        )
    return settings


def _read_settings(value: str) -> dict:
    if value in SHIPPED:
        return json.loads(resources.files("cluster").joinpath(f"deepspeed/{value}.json").read_text())
    if not value.endswith(".json"):
        raise ConfigError([Problem("deepspeed", f"unknown setting '{value}', {did_you_mean(value, SHIPPED)}")])
    try:
        return json.loads(Path(value).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError([Problem("deepspeed", f"'{value}' cannot be read as JSON ({error})")]) from error


def stage_of(settings: dict) -> int:
    return settings.get("zero_optimization", {}).get("stage", 0)


def complete_settings(config: PipelineConfig, world_size: int) -> dict:
    """The settings with every number that DeepSpeed wants filled in (no "auto": `zero.Init` cannot read it)."""
    training = config.training
    micro = -(-training.batch_size // training.gradient_accumulation // world_size)
    return deepspeed_settings(config.deepspeed) | {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "train_batch_size": micro * training.gradient_accumulation * world_size,
        "gradient_clipping": training.max_grad_norm,
        "bf16": {"enabled": config.base_model.dtype == "bfloat16"},
        "fp16": {"enabled": config.base_model.dtype == "float16"},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def prepare_environment() -> None:
    """Before the first engine of a process.

    DeepSpeed's shared-memory op for CPU all-reduce takes a compiler and a minute to build, waits for ever on the
    lock of a builder that was killed, and serves inference only: it is declared incompatible, which skips it.
    """
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    with _not_imported("mlflow"):  # the autotuner would, for a second of each worker's start; nobody tunes here
        import deepspeed
    import deepspeed.ops

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
    import deepspeed

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
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                copies[name] = parameter.detach().float().cpu().clone()
        else:
            copies[name] = parameter.detach().float().cpu().clone()
    return copies


# -- what a checkpoint holds of an engine

MOMENTS = ("exp_avg", "exp_avg_sq")


def training_state(engine, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Full fp32 weights and Adam moments, on the CPU: `weight/<name>`, `exp_avg/<name>`, `exp_avg_sq/<name>`.

    Any number of ranks and any ZeRO stage give the same. Every rank must call it.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    _link_moments(engine)
    state = {}
    for name, parameter in parameters.items():
        if _is_plain(parameter):
            moments = _base_optimizer(engine).state[parameter]
            state[f"weight/{name}"] = parameter.detach().float()
            state |= {f"{key}/{name}": moments[key] for key in MOMENTS}
        else:
            state[f"weight/{name}"] = safe_get_full_fp32_param(parameter)
            state |= {f"{key}/{name}": safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
    # clones: some of these are views of buffers that the next step writes to
    return {key: tensor.detach().to("cpu", torch.float32).clone() for key, tensor in state.items()}


def restore_training_state(engine, parameters: dict[str, nn.Parameter], state: dict, step: int) -> None:
    """The inverse of `training_state`, on an engine that has not stepped yet; `step` is Adam's step count.

    The parameters themselves must hold the weights already (an engine copies them when it is made); this sets the fp32
    masters, which differ where the model is bf16, and the moments.
    """
    for flat in _flat_partitions(engine, parameters):
        zeros = {key: torch.zeros_like(flat) for key in MOMENTS}
        _base_optimizer(engine).state[flat] = {"step": torch.tensor(float(step)), **zeros}
    _link_moments(engine)
    for name, parameter in parameters.items():
        _set_full(engine, parameter, None, state[f"weight/{name}"])
        for key in MOMENTS:
            _set_full(engine, parameter, key, state[f"{key}/{name}"])


def _link_moments(engine) -> None:
    """ZeRO 1 and 2 link parameters to their moments after the first *group* of the first step: too early for the
    others."""
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def adam_step(engine) -> int:
    """Steps that Adam has counted; fewer than the trainer's where fp16 overflows were skipped."""
    return int(next(iter(_base_optimizer(engine).state.values()))["step"])


def _set_full(engine, parameter: nn.Parameter, key: str | None, value: torch.Tensor) -> None:
    """Set an optimizer state (None: the fp32 master) of a parameter on every rank's part of it."""
    import deepspeed.utils as ds

    if _is_plain(parameter):
        target = parameter.data if key is None else _base_optimizer(engine).state[parameter][key]
        target.copy_(value)
    elif hasattr(parameter, "ds_id"):
        # DeepSpeed's "full" setter fails where the last rank's part is padded
        part = parameter.ds_tensor.numel()
        whole = torch.zeros(part * torch.distributed.get_world_size(parameter.ds_process_group))
        whole[: value.numel()] = value.flatten()
        mine = whole.narrow(0, part * torch.distributed.get_rank(parameter.ds_process_group), part)
        if key is None:
            ds.safe_set_local_fp32_param(parameter, mine)
        else:
            ds.safe_set_local_optimizer_state(parameter, mine, key)
    elif key is None:
        ds.safe_set_full_fp32_param(parameter, value)
    else:
        ds.safe_set_full_optimizer_state(parameter, value, key)


def _is_plain(parameter: nn.Parameter) -> bool:
    """Whether the optimizer holds the parameter itself (stage 0), not a flat partition of many."""
    return not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping")


def _base_optimizer(engine) -> torch.optim.Optimizer:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _flat_partitions(engine, parameters: dict[str, nn.Parameter]) -> list[torch.Tensor]:
    """The tensors that the base optimizer steps on: flat fp32 partitions, or the parameters themselves."""
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if hasattr(engine.optimizer, attribute):
            return list(getattr(engine.optimizer, attribute))
    return list(parameters.values())


def loss_scale(engine) -> dict | None:
    """The dynamic loss scaler's numbers under fp16, else None."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
    return {n: getattr(scaler, n) for n in names} if hasattr(scaler, "cur_hysteresis") else None


def restore_loss_scale(engine, values: dict | None) -> None:
    for name, value in (values or {}).items():
        setattr(engine.optimizer.loss_scaler, name, value)

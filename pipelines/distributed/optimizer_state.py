"""Reads and writes whole weights and Adam moments of an engine under any ZeRO stage, for checkpoints."""

from __future__ import annotations

import torch
from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq")


def training_state(engine, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Whole fp32 weights and Adam moments on the CPU: `weight/<name>`, `exp_avg/<name>`, `exp_avg_sq/<name>`.

    Independent of the number of ranks and the ZeRO stage. All ranks must call it.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state  # slow

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
    # clones, because some are views of buffers that the next step overwrites
    return {key: tensor.detach().to("cpu", torch.float32).clone() for key, tensor in state.items()}


def restore_training_state(engine, parameters: dict[str, nn.Parameter], state: dict, step: int) -> None:
    """The inverse of `training_state`, for an engine that has not stepped yet; `step` is Adam's step count.

    The parameters must hold the weights already, since an engine copies them when it is created; this sets the fp32
    master weights, which differ in a bf16 model, and the moments.
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
    """Link parameters to their moments again: ZeRO-1 and -2 do it after the first *group* of the first step, before
    the other groups have moments."""
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def adam_step(engine) -> int:
    """Adam's step count; less than the trainer's if steps were skipped after fp16 overflows."""
    return int(next(iter(_base_optimizer(engine).state.values()))["step"])


def _set_full(engine, parameter: nn.Parameter, key: str | None, value: torch.Tensor) -> None:
    """Set an optimizer state (None: the fp32 master weight) of a parameter in each rank's part."""
    import deepspeed.utils as ds  # slow

    if _is_plain(parameter):
        target = parameter.data if key is None else _base_optimizer(engine).state[parameter][key]
        target.copy_(value)
    elif hasattr(parameter, "ds_id"):
        # DeepSpeed's "full" setter fails if the last rank's part is padded
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
    """Whether the optimizer holds the parameter itself (stage 0) rather than a flat partition of several."""
    return not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping")


def _base_optimizer(engine) -> torch.optim.Optimizer:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _flat_partitions(engine, parameters: dict[str, nn.Parameter]) -> list[torch.Tensor]:
    """The tensors that the base optimizer updates: flat fp32 partitions, or the parameters themselves."""
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if hasattr(engine.optimizer, attribute):
            return list(getattr(engine.optimizer, attribute))
    return list(parameters.values())


def loss_scale(engine) -> dict | None:
    """State of the dynamic loss scaler under fp16, else None."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
    return {n: getattr(scaler, n) for n in names} if hasattr(scaler, "cur_hysteresis") else None


def restore_loss_scale(engine, values: dict | None) -> None:
    """The inverse of `loss_scale`."""
    for name, value in (values or {}).items():
        setattr(engine.optimizer.loss_scaler, name, value)

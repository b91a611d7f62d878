"""The tuner: finds the layers, wraps them, and guards what is saved and loaded."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import get_pattern_key
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .config import CurloraConfig
from .layer import CoreSettings, CurloraCore, CurloraLayer, Linear, checksum


class CurloraModel(BaseTuner):
    """A model whose chosen layers compute W x + s · C U R x with C, R from W and only U trained."""

    prefix = "curlora_"
    tuner_layer_cls = CurloraLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    # ---------------------------------------------------------------------------------------------- injection

    def _prepare_adapter_config(self, peft_config: CurloraConfig, model_config: dict) -> CurloraConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        return peft_config

    def _check_new_adapter_config(self, config: CurloraConfig) -> None:
        super()._check_new_adapter_config(config)
        merged = next((name for name, layer in self.layers() if layer.merged), None)
        if merged is not None:
            raise RuntimeError(
                f"{merged}: an adapter is merged into the weight, but a new one must choose its rows and columns from "
                "the base itself; call unmerge_adapter() first."
            )

    def _create_and_replace(
        self,
        peft_config: CurloraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        key = current_key.removeprefix("_orig_mod.")
        settings = CoreSettings(
            key=key,
            r=peft_config.rank_pattern.get(get_pattern_key(peft_config.rank_pattern.keys(), key), peft_config.r),
            alpha=peft_config.alpha_pattern.get(
                get_pattern_key(peft_config.alpha_pattern.keys(), key), peft_config.alpha
            ),
            blocks=peft_config.blocks,
            config=peft_config,
        )
        if isinstance(target, CurloraLayer):
            target.update_layer(adapter_name, settings, inference_mode=peft_config.inference_mode)
            return
        layer = self._create_new_module(target, adapter_name, settings)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _create_new_module(self, target: nn.Module, adapter_name: str, settings: CoreSettings) -> Linear:
        kwargs = get_quantization_kwargs(self.model)  # torchao needs them to quantise again after a merge
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if not isinstance(base, (nn.Linear, Conv1D)) and not hasattr(base, "in_features"):
            raise ValueError(
                f"{settings.key}: a layer of type {type(base).__name__} cannot be adapted, only dense layers "
                "(torch.nn.Linear, transformers' Conv1D and their quantised forms); remove it from target_modules."
            )
        return Linear(target, adapter_name, settings, **kwargs)

    def layers(self) -> list[tuple[str, Linear]]:
        """All adapted layers with their names in the base model."""
        return [(name, module) for name, module in self.model.named_modules() if isinstance(module, Linear)]

    def cores(self, adapter_name: str) -> list[tuple[str, Linear, CurloraCore]]:
        """Name, layer and core of every layer that has the adapter."""
        return [
            (name, layer, layer.curlora_core[adapter_name])
            for name, layer in self.layers()
            if adapter_name in layer.curlora_core
        ]

    # ------------------------------------------------------------------------------------------ save and load

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        state = super()._get_adapter_state_dict(*args, **kwargs)
        return seal(state)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: CurloraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_state(model, adapter_name, remapped)
        return remapped


# -------------------------------------------------------------------------------------------- adapter state dicts


def seal(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of an adapter's state dict whose records carry a checksum of its U: what is written to a file.

    Raises ValueError where U is an empty shard of ZeRO-3: such a file would look valid and hold nothing.
    """
    sealed = dict(state)
    for key in state:
        if not key.endswith(".record"):
            continue
        stem = key.removesuffix("record")
        current, frozen = state[stem + "U"], state.get(stem + "frozen")
        if current.dim() != 2 or current.numel() == 0:
            raise ValueError(
                f"{stem}U has shape {tuple(current.shape)}: ZeRO-3 has partitioned it. Save through "
                "Trainer.save_model, or pass the gathered state_dict to save_pretrained."
            )
        record = state[key].clone()
        if not record.is_meta:
            record[-1] = checksum(current, frozen)
        sealed[key] = record
    return sealed


def check_state(model: nn.Module, adapter_name: str, state: dict[str, Tensor]) -> None:
    """Refuse a state dict (with the model's keys) that is incomplete, foreign, of another rank, or damaged."""
    expected = _adapter_entries(model, adapter_name)
    found = {key: value for key, value in state.items() if ".curlora_core." in key}
    _refuse(adapter_name, "lacks", [key for key in expected if key not in found])
    _refuse(adapter_name, "has no layer in this model for", [key for key in found if key not in expected])
    for key, tensor in found.items():
        if tensor.shape != expected[key].shape:
            raise ValueError(
                f"{key} has shape {tuple(tensor.shape)} in the file, but adapter_config.json says "
                f"{tuple(expected[key].shape)}: the file was saved with another r, rank_pattern or number of blocks."
            )
    for key, record in found.items():
        if not key.endswith(".record") or record.is_meta or record[-1] == 0:
            continue
        stem = key.removesuffix("record")
        if int(record[-1]) != checksum(found[stem + "U"], found.get(stem + "frozen")):
            raise ValueError(
                f"{stem}U does not match the checksum that was saved with it: the adapter file is damaged. Restore it "
                "from a copy (or, if you changed U on purpose, pass the state dict through curlora.seal)."
            )


def _adapter_entries(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    entries = {}
    for name, module in model.named_modules():
        if isinstance(module, CurloraLayer) and adapter_name in module.curlora_core:
            core = module.curlora_core[adapter_name]
            stem = f"{name}.curlora_core.{adapter_name}." if name else f"curlora_core.{adapter_name}."
            r = core.settings.r
            entries[stem + "U"] = torch.empty(r, r, device="meta")
            entries.update({stem + n: b for n, b in core.named_buffers() if n in ("record", "frozen")})
    return entries


def _refuse(adapter_name: str, problem: str, keys: list[str]) -> None:
    if keys:
        raise ValueError(
            f"The file of adapter {adapter_name!r} {problem} {len(keys)} entries, such as {keys[0]!r}: it is "
            "truncated or was saved with other target_modules; load the file that belongs to this adapter_config.json."
        )

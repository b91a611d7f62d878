"""The tuner: wraps the target layers and validates adapter files when they are saved and loaded."""

from __future__ import annotations

import contextlib
import copy
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from .combining import add_weighted, hotswap
from .config import ALL_LINEAR, CurloraConfig
from .core import CurloraCore
from .cur import SelectionError
from .injection import inject
from .layer import CurloraLayer, Linear
from .mixed import adapter_rows
from .record import check_state, check_whole
from .targets import default_targets, exclude_also
from .zero import gathered, set_master_copy


class CurloraModel(BaseTuner):
    """A model whose target layers compute W x + s · C U R x with C and R from W; only U is trained."""

    prefix = "curlora_"
    tuner_layer_cls = CurloraLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    # ---------------------------------------------------------------------------------------------- injection

    def _prepare_adapter_config(self, peft_config: CurloraConfig, model_config: dict) -> CurloraConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = ALL_LINEAR
        if isinstance(peft_config.target_modules, str) and peft_config.target_modules.lower() == ALL_LINEAR:
            defaults = default_targets(self.model, peft_config)
            peft_config.target_modules, peft_config.defaults = defaults.names, defaults
            # first, since the first matching pattern counts
            peft_config.rank_pattern = defaults.ranks | peft_config.rank_pattern | defaults.ranks
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Also one warning about what the default, all linear layers, could not take as configured."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        defaults = vars(config).pop("defaults", None)
        if defaults is not None:
            if not self.cores(adapter_name):
                raise SelectionError(f"No layer of this model can be adapted: {defaults.summary()}.")
            failed = defaults.failed
            self.targeted_module_names = [name for name in self.targeted_module_names if name not in failed]
            exclude_also(config, failed)
            defaults.warn()

    def _check_new_adapter_config(self, config: CurloraConfig) -> None:
        super()._check_new_adapter_config(config)
        merged = next((name for name, layer in self.adapted_layers() if layer.merged), None)
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
        inject(self, peft_config, adapter_name, target, target_name, parent, current_key)

    def adapted_layers(self) -> list[tuple[str, Linear]]:
        """Name in the base model and layer, for all adapted layers."""
        return [(name, module) for name, module in self.model.named_modules() if isinstance(module, Linear)]

    def cores(self, adapter_name: str) -> list[tuple[str, Linear, CurloraCore]]:
        """Name, layer and core of each layer that has the adapter."""
        return [
            (name, layer, layer.curlora_core[adapter_name])
            for name, layer in self.adapted_layers()
            if adapter_name in layer.curlora_core
        ]

    # ----------------------------------------------------------------------------------------------- public API

    def describe(self, adapter_name: str | None = None) -> list[dict[str, Any]]:
        """One dict per layer: rank, blocks, norms and condition numbers of C and R, ‖ΔW‖_F."""
        return [
            {
                "module": name,
                "r": core.settings.r,
                "blocks": core.settings.blocks,
                "norm_columns": core.norms["columns"],
                "norm_rows": core.norms["rows"],
                "condition_columns": core.conditions["columns"],
                "condition_rows": core.conditions["rows"],
                "update_norm": core.update_norm(),
            }
            for name, _, core in self._ready_cores(adapter_name)
        ]

    def project(self, adapter_name: str | None = None) -> None:
        """Scale every U down to ``max_update_norm``; call it after an optimizer step.

        The forward pass keeps the bound in any case; this keeps the optimizer's own values within it. Under DeepSpeed
        it also updates the fp32 master copy, and all ranks must call it.
        """
        for _, _, core in self._ready_cores(adapter_name):
            if core.settings.config.max_update_norm is not None:
                with gathered(core.U, modifier_rank=0):
                    core.project_()
                    projected = core.U.detach().clone()
                set_master_copy(core.U, projected)

    def calibrate(self, batches: Iterable[Any], adapter_name: str | None = None) -> None:
        """Select rows and columns for ``selection="activation"`` from the activations of the base on some batches.

        ``batches``: mappings of model inputs, or single tensors; tokens that an attention_mask excludes are ignored.
        In a distributed run the statistics of all ranks are summed. Raises RuntimeError if they are selected already.
        """
        adapter_name = adapter_name or self.active_adapters[0]
        for name, _, core in self.cores(adapter_name):
            if core.ready:
                raise RuntimeError(f"{name}: adapter {adapter_name!r} has already chosen its rows and columns.")
        statistics = self._measure(batches, adapter_name)
        for name, layer, core in self.cores(adapter_name):
            layer.choose(core, activations=statistics[name].means(name))

    def add_block(self, adapter_name: str | None = None, batches: Iterable[Any] | None = None) -> None:
        """Freeze the trained block and append one for the next task (``carry="stack"``); then create a new optimizer.

        ``batches`` are only needed for ``selection="activation"``. Raises ValueError if a layer has no room.
        """
        adapter_name = adapter_name or self.active_adapters[0]
        config = self.peft_config[adapter_name]
        if config.carry != "stack":
            raise ValueError(f"add_block needs carry='stack', but adapter {adapter_name!r} has {config.carry!r}.")
        cores = self._ready_cores(adapter_name)
        for _, layer, core in cores:
            layer.check_fit(replace(core.settings, blocks=core.settings.blocks + 1))
        statistics = None if batches is None else self._measure(batches, adapter_name)
        for name, layer, _ in cores:
            layer.add_block(adapter_name, (None, None) if statistics is None else statistics[name].means(name))
        self._set_blocks(adapter_name, config.blocks + 1)

    def remove_block(self, adapter_name: str | None = None) -> None:
        """Remove the last block of a stack: the model computes exactly what it did before `add_block`."""
        adapter_name = adapter_name or self.active_adapters[0]
        config = self.peft_config[adapter_name]
        if config.blocks == 1:
            raise ValueError(f"Adapter {adapter_name!r} has one block; use delete_adapter to remove all of it.")
        for _, layer, _ in self._ready_cores(adapter_name):
            layer.remove_block(adapter_name)
        self._set_blocks(adapter_name, config.blocks - 1)

    def _set_blocks(self, adapter_name: str, blocks: int) -> None:
        """In a copy of the configuration: the object is the user's and may belong to another adapter as well."""
        config = copy.copy(self.peft_config[adapter_name])
        config.blocks = blocks
        self.peft_config[adapter_name] = config

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add the adapter Σ weight · ΔW, exactly: the adapters must share rows and columns (one seed and selection).

        Raises ValueError for adapters that do not, and for another combination than ``linear``.
        """
        if combination_type != "linear":
            raise ValueError(
                f"combination_type={combination_type!r} is not possible for CURLoRA, whose linear combination is "
                "exact; use 'linear'."
            )
        add_weighted(self, adapters, weights, adapter_name)

    def hotswap_adapter(self, directory: str | os.PathLike, adapter_name: str | None = None) -> None:
        """Replace an adapter by a saved one, in place and without recompiling; see `combining.hotswap`."""
        hotswap(self, directory, adapter_name or self.active_adapters[0])

    def _ready_cores(self, adapter_name: str | None) -> list[tuple[str, Linear, CurloraCore]]:
        cores = self.cores(adapter_name or self.active_adapters[0])
        for _, layer, _ in cores:
            layer.refresh()
        pending = next((name for name, _, core in cores if not core.ready), None)
        if pending is not None:
            raise RuntimeError(f"{pending}: rows and columns are not chosen yet; load the adapter or calibrate it.")
        return cores

    def _measure(self, batches: Iterable[Any], adapter_name: str) -> dict[str, Activations]:
        """Run the base without adapters over the batches and accumulate the activations of each layer."""
        layers = {name: layer for name, layer, _ in self.cores(adapter_name)}
        statistics = {name: Activations(layer) for name, layer in layers.items()}
        was_training, was_disabled = self.model.training, {n: x._disable_adapters for n, x in layers.items()}
        try:
            self.model.eval()
            for name, layer in layers.items():
                layer._disable_adapters = True
                statistics[name].attach()
            with torch.no_grad():
                for batch in batches:
                    self._run(batch, statistics.values())
        finally:
            self.model.train(was_training)
            for name, layer in layers.items():
                layer._disable_adapters = was_disabled[name]
                statistics[name].detach()
        return statistics

    def _run(self, batch: Any, statistics: Iterable[Activations]) -> None:
        device = next(self.model.parameters()).device
        inputs = {"input": batch} if torch.is_tensor(batch) else dict(batch)
        inputs = {key: value.to(device) if torch.is_tensor(value) else value for key, value in inputs.items()}
        for statistic in statistics:
            statistic.mask = inputs.get("attention_mask")
        if torch.is_tensor(batch):
            self.model(inputs["input"])
        else:
            self.model(**inputs)

    # ----------------------------------------------------------------------------------------- mixed batches

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Called by PEFT around forward and generate: ``adapter_names`` gives each row of the batch its adapter."""
        known = {name for _, layer in self.adapted_layers() for name in layer.curlora_core}
        with adapter_rows(self, kwargs.get("adapter_names"), known, kwargs.get("num_beams")):
            yield

    # ------------------------------------------------------------------------------------------------- merge

    def _check_tied_modules(self, model: nn.Module, peft_config: CurloraConfig) -> None:
        """No warning: an adapter on a tied layer changes only that layer, and a merge unties it."""

    def _check_merge_allowed(self) -> None:
        # PEFT's own check only warns about tied weights; here each layer learns of the tie and undoes it in a merge.
        users = Counter(
            id(parameter) for module in self.model.modules() for parameter in module.parameters(recurse=False)
        )
        for _, layer in self.adapted_layers():
            layer.shares_weight = users[id(layer.get_base_layer().weight)] > 1

    # ------------------------------------------------------------------------------------------ save and load

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        state = super()._get_adapter_state_dict(*args, **kwargs)
        check_whole(state)
        return state

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: CurloraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        found = {key: value for key, value in remapped.items() if ".curlora_core." in key}
        check_state(adapter_name, _adapter_entries(model, adapter_name), found)
        return remapped


class Activations:
    """Sums of squared inputs (n) and outputs (m, without bias) of one base layer over all unmasked tokens."""

    def __init__(self, layer: Linear) -> None:
        self.base = layer.get_base_layer()
        device = self.base.weight.device
        self.sums = [
            torch.zeros(size, dtype=torch.float64, device=device) for size in (layer.out_features, layer.in_features)
        ]
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.mask: Tensor | None = None
        self.handle = None

    def attach(self) -> None:
        self.handle = self.base.register_forward_hook(self._observe)

    def detach(self) -> None:
        if self.handle is not None:
            self.handle.remove()

    def _observe(self, base: nn.Module, args: tuple, output: Tensor) -> None:
        bias = getattr(base, "bias", None)
        for total, values in zip(self.sums, (output if bias is None else output - bias, args[0]), strict=True):
            total += self._unmasked(values).double().square().sum(dim=0)
        self.count += self._unmasked(args[0]).shape[0]

    def _unmasked(self, values: Tensor) -> Tensor:
        if self.mask is not None and self.mask.shape == values.shape[:-1]:
            return values[self.mask.bool()]
        return values.reshape(-1, values.shape[-1])

    def means(self, name: str) -> tuple[Tensor, Tensor]:
        """Mean squares of outputs (m) and inputs (n) over all ranks, float64 on the CPU."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for tensor in (*self.sums, self.count):
                torch.distributed.all_reduce(tensor)
        if self.count == 0:
            raise ValueError(f"{name}: no token of the calibration batches reached this layer; pass more batches.")
        return tuple((total / self.count).cpu() for total in self.sums)


def _adapter_entries(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Keys and shapes that a file of the adapter must contain."""
    entries = {}
    for name, module in model.named_modules():
        if isinstance(module, CurloraLayer) and adapter_name in module.curlora_core:
            core = module.curlora_core[adapter_name]
            stem = f"{name}.curlora_core.{adapter_name}." if name else f"curlora_core.{adapter_name}."
            r = core.settings.r
            entries[stem + "U"] = torch.empty(r, r, device="meta")
            entries.update({stem + n: b for n, b in core.named_buffers() if n in ("record", "frozen")})
    return entries

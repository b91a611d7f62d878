"""The adapted layer: a frozen base layer, and per adapter a `CurloraCore` with U and the selected factors.

C and the r×r whitening matrices are derived from the base and never saved; R is not stored at all (see `functional`).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import cur
from . import record as records
from .core import CoreSettings, CurloraCore
from .functional import cur_linear, cur_residual
from .rounding import check_factors
from .zero import gathered


class CurloraLayer(BaseTunerLayer):
    """Base of adapted layers: the cores by adapter name, and access to the base weight as (m, n)."""

    adapter_layer_names = ("curlora_core",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, fan_in_fan_out: bool = False, **kwargs) -> None:
        self.base_layer = base_layer
        self.curlora_core = nn.ModuleDict()
        base = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(
            base, get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.in_features, self.out_features = _features(base)
        self.fan_in_fan_out = _stored_transposed(base, fan_in_fan_out)
        self._disable_adapters = False
        self.merged_adapters = []
        self._merged_factors: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.shares_weight = False
        """Set by the model if another module uses the same weight, which a merge must then untie."""
        self._tied_weight: nn.Parameter | None = None

    # ------------------------------------------------------------------------------------------- base weight

    @contextlib.contextmanager
    def base_tensors(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Weight as (m, n) and bias of the base layer for reading: gathered, dequantised, transposed if necessary."""
        base = self.get_base_layer()
        bias = getattr(base, "bias", None)
        with gathered(base.weight, bias), torch.no_grad():
            weight = self.get_base_weight()
            yield (weight.t() if self.fan_in_fan_out else weight), bias

    def get_base_weight(self) -> Tensor:
        """The base weight in its stored orientation, dequantised if necessary."""
        self._unpack()
        return super().get_base_weight()

    def _unpack(self) -> None:
        """Undo the repacking of a 4 bit weight by bitsandbytes, for evaluation on a CPU with AVX512.

        A packed weight dequantises to noise and its product has no gradient; building the state dict unpacks it.
        """
        base = self.get_base_layer()
        if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
            base.state_dict()

    # ---------------------------------------------------------------------------------------------- adapters

    def update_layer(self, adapter_name: str, settings: CoreSettings, inference_mode: bool = False) -> None:
        """Add an adapter: check that it fits, select rows and columns, derive the factors.

        Raises ValueError if it does not fit, RuntimeError while another adapter is merged.
        """
        self.check_fit(settings)
        if self.merged:
            raise RuntimeError(
                f"{settings.key}: cannot add adapter {adapter_name!r} while {self.merged_adapters} is merged into the "
                "weight, because rows and columns must come from the base itself; call unmerge_adapter() first."
            )
        core = CurloraCore(settings, self.get_base_layer().weight.device)
        self.curlora_core[adapter_name] = core
        self._initialise(core)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def check_fit(self, settings: CoreSettings) -> None:
        """Raise ValueError if the weight is too small for the rank or the number of blocks."""
        limit = min(self.out_features, self.in_features)
        shape = f"({self.out_features}, {self.in_features})"
        if settings.r > limit:
            raise ValueError(
                f"{settings.key}: r={settings.r} is larger than the smaller side of its weight {shape}; use "
                f"r <= {limit}, a smaller value for it in rank_pattern, or name it in exclude_modules."
            )
        if settings.r * settings.blocks > limit:
            raise ValueError(
                f"{settings.key}: {settings.blocks} blocks of r={settings.r} do not fit its weight {shape}, "
                f"which holds {limit // settings.r}; use a smaller r (rank_pattern), or name it in exclude_modules."
            )

    def _initialise(self, core: CurloraCore) -> None:
        base = self.get_base_layer()
        if core.U.is_meta:
            if base.weight.is_meta and not hasattr(base.weight, "ds_id"):
                core.derive_on_meta(_meta_like(self), getattr(base, "bias", None))
            return  # otherwise PEFT's low_cpu_mem_usage: the indices come from the file
        config = core.settings.config
        if config.load_only or config.selection == "activation" or core.settings.blocks > 1:
            return  # indices come from the file, or from `calibrate`
        self.choose(core)

    def choose(
        self,
        core: CurloraCore,
        previous: tuple[Tensor | None, Tensor | None] = (None, None),
        activations: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> None:
        """Select rows and columns of the last block by the configured rule and derive the factors.

        ``previous``: rows and columns of the earlier blocks of a stack, which are excluded. ``activations``: mean
        squares of the layer's outputs (m) and inputs (n), for ``selection="activation"``.
        """
        settings = core.settings
        with self.base_tensors() as (weight, bias):
            weight = _floating(weight)
            rows = self._select(settings, weight.t(), "rows", previous[0], activations[0])
            columns = self._select(settings, weight, "columns", previous[1], activations[1])
            found = records.fingerprint(weight, rows, columns, settings.r)
            core.write_record(rows.indices, columns.indices, found)
            core.derive(rows, columns, weight, bias)

    def _select(
        self, settings: CoreSettings, matrix: Tensor, what: str, previous: Tensor | None, activation: Tensor | None
    ) -> cur.Factor:
        selection, seed, key = settings.config.selection, settings.config.seed, f"{settings.key}|{what}"
        try:
            return cur.select(
                matrix, settings.r, selection, seed=seed, key=key, previous=previous, activation=activation
            )
        except cur.SelectionError as error:
            raise cur.SelectionError(
                f"{settings.key}: selection={selection!r} of {settings.r} {what} failed: {error}. "
                "Use a smaller r, another selection, or name the layer in exclude_modules."
            ) from error

    # ------------------------------------------------------------------------------------------------ blocks

    def add_block(self, adapter_name: str, activations: tuple[Tensor | None, Tensor | None] = (None, None)) -> None:
        """Freeze the trained block and append a new one, starting at zero, on unused rows and columns."""
        old = self.curlora_core[adapter_name]
        new = self._resized(old, old.settings.blocks + 1)
        with gathered(old.U), torch.no_grad():
            old.project_()
            finished = old.U.detach().float()[None]
            new.frozen.copy_(finished if old.settings.blocks == 1 else torch.cat([old.frozen, finished]))
        rows, columns, _ = old.read_record()
        self.choose(new, (rows, columns), activations)
        self.curlora_core[adapter_name] = new

    def remove_block(self, adapter_name: str) -> None:
        """Remove the last block: the one before it is trainable again, and the layer computes what it did before."""
        old = self.curlora_core[adapter_name]
        new = self._resized(old, old.settings.blocks - 1)
        rows, columns, fingerprints = old.read_record()
        new.write_record(rows[: new.size], columns[: new.size], fingerprints[: new.settings.blocks])
        with torch.no_grad():
            new.U.copy_(old.frozen[-1])
            if new.settings.blocks > 1:
                new.frozen.copy_(old.frozen[:-1])
        self.rebuild(new)
        self.curlora_core[adapter_name] = new

    def _resized(self, core: CurloraCore, blocks: int) -> CurloraCore:
        if self.merged:
            raise RuntimeError(f"{core.settings.key}: unmerge the adapters before blocks are added or removed.")
        new = CurloraCore(replace(core.settings, blocks=blocks), core.record.device)
        new.train(core.training)
        new.U.requires_grad_(core.U.requires_grad)
        return new

    def rebuild(self, core: CurloraCore) -> None:
        """Derive the factors from the indices in the record and check that the base is the adapter's own.

        Raises ValueError for invalid indices and BaseMismatchError for another base.
        """
        settings = core.settings
        if self.merged:
            raise RuntimeError(f"{settings.key}: unmerge the adapters before loading one.")
        if core.assigned:
            with gathered(core.U):
                records.check_sum(settings.key, core.record, core.U, getattr(core, "frozen", None))
        row_indices, column_indices, expected = core.read_record()
        records.check_indices(settings.key, "row", row_indices, self.out_features)
        records.check_indices(settings.key, "column", column_indices, self.in_features)
        with self.base_tensors() as (weight, bias):
            weight = _floating(weight)
            if weight.is_meta:
                core.derive_on_meta(weight, bias)
                core.accept()
                return
            device = weight.device
            rows = cur.Factor(row_indices, cur.triangle_of(weight[row_indices.to(device)].t()))
            columns = cur.Factor(column_indices, cur.triangle_of(weight[:, column_indices.to(device)]))
            found = records.fingerprint(weight, rows, columns, settings.r)
            block_norms = records.block_norms(weight, rows, columns, settings.r)
            quantised = self.quantization_backend is not None
            deviation = records.check_base(settings.key, expected, found, block_norms, quantised)
            whiten = settings.config.whiten
            check_factors(settings.key, self.get_base_layer(), weight, rows, columns, whiten, deviation)
            core.derive(rows, columns, weight, bias)
        core.accept()

    def refresh(self) -> None:
        """Derive the factors of every core whose record was loaded since; raises as `rebuild` does."""
        for core in self.curlora_core.values():
            if core.stale:
                self.rebuild(core)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own version also casts to the dtype of the base, which would round a trained U to bf16.
        if adapter_name not in self.curlora_core:
            return
        core = self.curlora_core[adapter_name]
        target = device if device is not None else self.get_base_layer().weight.device
        if not core.U.is_meta and target != torch.device("meta"):
            core.to(target)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class Linear(nn.Module, CurloraLayer):
    """A dense layer (Linear, Conv1D of Transformers, quantised) with CURLoRA adapters."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, settings: CoreSettings, **kwargs) -> None:
        super().__init__()
        CurloraLayer.__init__(self, base_layer, settings.config.fan_in_fan_out, **kwargs)
        self._active_adapter = adapter_name
        self.register_load_state_dict_post_hook(_refresh_loaded)
        self.update_layer(adapter_name, settings, inference_mode=settings.config.inference_mode)

    def train(self, mode: bool = True) -> Linear:
        """Transformers' own `load_adapter` ends with a call of `eval`: an adapter of another base fails here."""
        self.refresh()
        return super().train(mode)

    # ----------------------------------------------------------------------------------------------- forward

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        cores = [self.curlora_core[name] for name in self.active_adapters if name in self.curlora_core]
        if self.merged or not cores:
            return self.base_layer(x, *args, **kwargs)
        if any(core.stale for core in cores):
            self.refresh()
        # Before the base layer, and through __call__, so that ZeRO-3's hooks gather each U.
        middles = [core() for core in cores]
        rows, cols, bias_rows, middle, columns = _joined(cores, middles)
        mask = _joined_mask(cores, x)
        base = self.base_layer
        if self.training and self.quantization_backend is not None:
            self._unpack()
        if not args and not kwargs and _plain(base, x):
            kernel = base.weight if self.fan_in_fan_out else base.weight.t()
            return cur_linear(x, kernel, base.bias, rows, cols, bias_rows, middle, columns, mask)
        return cur_residual(base(x, *args, **kwargs), rows, bias_rows, middle, columns, mask)

    # ------------------------------------------------------------------------------------------------- merge

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW in the orientation of the stored base weight, at least fp32."""
        delta = _product(self.factors(adapter))
        return delta.t() if self.fan_in_fan_out else delta

    @torch.no_grad()
    def factors(self, adapter: str) -> tuple[Tensor, Tensor, Tensor]:
        """C (m, k), M (k, k), R (k, n) of an adapter, at least fp32; other adapters may be merged into the base."""
        if adapter in self._merged_factors:
            return self._merged_factors[adapter]
        self.refresh()
        core = self.curlora_core[adapter]
        with gathered(core.U):
            middle = core()
        with self.base_tensors() as (weight, _):
            rows = _floating(weight)[core.rows].to(middle.dtype)
        for columns, other, right in self._merged_factors.values():
            rows = rows - columns[core.rows] @ other @ right
        return core.columns.to(middle.dtype), middle, rows

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of the adapters (default: the active ones) to the base weight.

        ``safe_merge`` raises ValueError, before anything changes, if the result is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.curlora_core:
                continue
            factors = self.factors(name)
            self._untie()
            self._add_to_base(factors, sign=1, check=name if safe_merge else None)
            self._merged_factors[name] = factors
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract the merged updates; exact up to rounding in the dtype of the base."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            self._add_to_base(self._merged_factors.pop(name), sign=-1)
        if self._tied_weight is not None:
            self.get_base_layer().weight, self._tied_weight = self._tied_weight, None

    def _untie(self) -> None:
        """Give the layer its own weight, so that merging into lm_head does not change the embedding."""
        base = self.get_base_layer()
        if self.shares_weight and self._tied_weight is None:
            self._tied_weight = base.weight
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)

    @torch.no_grad()
    def _add_to_base(self, factors: tuple[Tensor, Tensor, Tensor], sign: int, check: str | None = None) -> None:
        base = self.get_base_layer()
        with gathered(base.weight, modifier_rank=0):
            weight = self.get_base_weight()
            delta = _product(factors)
            delta = delta.t() if self.fan_in_fan_out else delta
            # Added in fp32 and rounded once; a bf16 sum with a bf16 update would round twice.
            result = weight.to(delta.dtype).add(delta, alpha=sign).to(weight.dtype)
            if check is not None and not torch.isfinite(result).all():
                raise ValueError(f"Merging adapter {check!r} gives weights that are not finite; nothing was changed.")
            if self.quantization_backend is None:
                weight.copy_(result)
            else:
                self.set_base_weight(result)

    def __repr__(self) -> str:
        return "curlora." + super().__repr__()


# ------------------------------------------------------------------------------------------------------- helpers


def _refresh_loaded(layer: Linear, incompatible_keys) -> None:
    layer.refresh()


def _features(base: nn.Module) -> tuple[int, int]:
    if isinstance(base, Conv1D):
        return base.nx, base.nf
    return base.in_features, base.out_features


def _stored_transposed(base: nn.Module, fan_in_fan_out: bool) -> bool:
    """Whether the weight is stored as (n, m). Known types decide, also for square layers; then ``fan_in_fan_out``."""
    if isinstance(base, Conv1D):
        return True
    if isinstance(base, nn.Linear):
        if fan_in_fan_out:
            warnings.warn("fan_in_fan_out=True is ignored for torch.nn.Linear, which stores (out, in).", stacklevel=2)
        return False
    return fan_in_fan_out


def _floating(weight: Tensor) -> Tensor:
    return weight if weight.dtype in _DIRECT else weight.float()


_DIRECT = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _meta_like(layer: CurloraLayer) -> Tensor:
    dtype = layer.get_base_layer().weight.dtype
    return torch.empty(layer.out_features, layer.in_features, dtype=dtype, device="meta")


def _product(factors: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    columns, middle, rows = factors
    return columns @ (middle @ rows)


def _joined(cores: list[CurloraCore], middles: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """I, J, b[I], M and C of all active adapters concatenated: one gather, before any update, serves them all."""
    if len(cores) == 1:
        core = cores[0]
        return core.rows, core.cols, core.bias_rows, middles[0], core.columns
    rows, cols = torch.cat([core.rows for core in cores]), torch.cat([core.cols for core in cores])
    bias_rows = None if cores[0].bias_rows is None else torch.cat([core.bias_rows for core in cores])
    columns = torch.cat([core.columns for core in cores], dim=1)
    return rows, cols, bias_rows, torch.block_diag(*middles), columns


def _joined_mask(cores: list[CurloraCore], x: Tensor) -> Tensor | None:
    masks = [core.mask(x) for core in cores]
    if all(mask is None for mask in masks):
        return None
    ones = (x.new_ones(*x.shape[:-1], core.size) for core in cores)
    return torch.cat([one if mask is None else mask for mask, one in zip(masks, ones, strict=True)], dim=-1)


def _plain(base: nn.Module, x: Tensor) -> bool:
    """Whether base and update can run as one function: a frozen, unpartitioned, unhooked dense layer in x's dtype."""
    if base._forward_hooks or base._forward_pre_hooks:
        return False  # before the weight is accessed: under ZeRO-3 that would gather it once more
    weight = getattr(base, "weight", None)
    return (
        type(base) in (nn.Linear, Conv1D)
        and type(weight) is nn.Parameter
        and weight.dtype == x.dtype
        and not weight.requires_grad
        and not (base.bias is not None and base.bias.requires_grad)
        and not hasattr(weight, "ds_id")
        and not (torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type))
        and "forward" not in base.__dict__
    )

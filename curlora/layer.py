"""The adapted layer: a frozen base layer, and per adapter a `CurloraCore` with U and the selected factors.

C and the r×r whitening matrices are derived from the base and never saved; R is not stored at all (see `functional`).
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn

from . import cur
from . import record as records
from .active import alone, join, joined_mask, plain
from .base import BaseAccess, features, stored_transposed
from .core import CoreSettings, CurloraCore
from .functional import HALF, cur_added, cur_linear, cur_residual
from .merging import Merging, floating
from .mixed import RowNames, add_rows, grouped
from .rounding import check_factors
from .zero import gathered, peek

CHANGED = (
    "The base weight of an adapted layer has changed since its adapter was attached or loaded. The adapter's rows and "
    "columns are read from it again, and its file will belong to the changed base."
)


class CurloraLayer(BaseAccess, Merging, BaseTunerLayer):
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
        self.in_features, self.out_features = features(base)
        self.fan_in_fan_out = stored_transposed(base, fan_in_fan_out)
        self._disable_adapters = False
        self.cast_input_dtype_enabled = True  # of no effect: the update takes the dtype of the base's output
        self.merged_adapters = []
        self._merged_factors: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.shares_weight = False
        """Set by the model if another module uses the same weight, which a merge must then untie."""
        self._tied_weight: nn.Parameter | None = None

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
        weight = self.get_base_layer().weight
        core = CurloraCore(settings, weight.device)
        if weight.dtype in HALF and not core.U.is_meta:
            core.U.data = core.U.data.to(weight.dtype)  # PEFT casts it to fp32, unless autocast_adapter_dtype=False
        if not settings.config.init_weights and not core.U.is_meta:
            nn.init.normal_(core.U, std=settings.r**-0.5)
        self.curlora_core[adapter_name] = core
        try:
            self._initialise(core)
        except ValueError:
            del self.curlora_core[adapter_name]
            raise
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
                core.derive_on_meta(_meta_like(self), self._bias())
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
            weight = floating(weight)
            rows = self._select(settings, weight.t(), "rows", previous[0], activations[0])
            columns = self._select(settings, weight, "columns", previous[1], activations[1])
            found = records.fingerprint(weight, rows, columns, settings.r)
            core.write_record(rows.indices, columns.indices, found)
            self._derive(core, rows, columns, weight, bias)

    def _select(
        self, settings: CoreSettings, matrix: Tensor, what: str, previous: Tensor | None, activation: Tensor | None
    ) -> cur.Factor:
        selection, seed, key = settings.config.selection, settings.config.seed, f"{settings.key}|{what}"
        try:
            return cur.select(
                matrix, settings.r, selection, seed=seed, key=key, previous=previous, activation=activation
            )
        except cur.SelectionError as error:
            named = cur.SelectionError(
                f"{settings.key}: selection={selection!r} of {settings.r} {what} failed: {error}. "
                "Use a smaller r, another selection, or name the layer in exclude_modules."
            )
            named.possible = error.possible
            raise named from error

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
            weight = floating(weight)
            if weight.is_meta:
                core.derive_on_meta(weight, bias)
                core.accept()
                return
            rows, columns = _factors_at(weight, row_indices, column_indices)
            found = records.fingerprint(weight, rows, columns, settings.r)
            block_norms = records.block_norms(weight, rows, columns, settings.r)
            quantised = self.quantization_backend is not None
            deviation = records.check_base(settings.key, expected, found, block_norms, quantised)
            whiten = settings.config.whiten
            check_factors(settings.key, self.get_base_layer(), weight, rows, columns, whiten, deviation)
            self._derive(core, rows, columns, weight, bias)
        core.accept()

    def refresh(self, thorough: bool = False) -> None:
        """Derive factors again whose record was loaded, or whose base has changed, since they were derived.

        ``thorough`` also compares values, which notices a weight that was changed through ``.data``. Raises as
        `rebuild` does.
        """
        self._keep_current(list(self.curlora_core.values()), thorough)

    def _keep_current(self, cores: list[CurloraCore], thorough: bool = False) -> None:
        for core in cores:
            if core.stale:
                self.rebuild(core)
            elif core.ready and not self.merged:
                state = self._base_state(core)
                if state is not None and (state != core.source or (thorough and self.quantization_backend is None)):
                    self._follow_base(core)

    def _base_state(self, core: CurloraCore) -> object:
        """What differs when the base weight has been changed or replaced; cheap enough for every forward pass.

        On a CPU one element is read as well: writing through ``.data`` leaves no other trace. None where the base's
        own weight cannot be read now: partitioned by ZeRO-3, offloaded, or with an adapter of another type merged.
        """
        weight = peek(self.get_base_layer(), "weight")
        if hasattr(weight, "ds_id") or weight.is_meta or not core.ready or core.rows.is_meta:
            return None
        if self._nested() and self.base_layer.merged:
            return None
        if type(weight) is not nn.Parameter or weight.is_inference():
            return id(weight)
        element = weight[core.probe].item() if weight.device.type == "cpu" else None
        return id(weight), weight._version, weight.data_ptr(), element

    def _follow_base(self, core: CurloraCore) -> None:
        """Derive the factors again if the base has other values by now; its record then describes that base."""
        key = core.settings.key
        row_indices, column_indices, _ = core.read_record()
        with self.base_tensors() as (weight, bias):
            weight = floating(weight)
            # Unmerging an adapter of another type restores the weight up to rounding.
            if not core.matches(weight, 2 * torch.finfo(weight.dtype).eps if self._nested() else 0):
                rows, columns = _factors_at(weight, row_indices, column_indices)
                if not max(rows.condition, columns.condition) <= cur.MAX_CONDITION:
                    raise cur.SelectionError(
                        f"{key}: the base weight has changed since the adapter was attached, and its rows and columns "
                        "are no longer independent; attach a new adapter to this base."
                    )
                warnings.warn(CHANGED, stacklevel=2)
                core.write_record(
                    row_indices, column_indices, records.fingerprint(weight, rows, columns, core.settings.r)
                )
                self._derive(core, rows, columns, weight, bias)
        core.source = self._base_state(core)

    def accept_base(self) -> None:
        """After unmerging, which rounds the weight: take the base as it is now, with its C, for the adapters' own."""
        readable = self.quantization_backend is None and not self.get_base_layer().weight.is_meta
        readable = readable and not self._nested()
        for core in self.curlora_core.values():
            if core.ready and readable:
                with self.base_tensors() as (weight, _):
                    core.read_columns(floating(weight))
            core.source = self._base_state(core)

    def _derive(
        self, core: CurloraCore, rows: cur.Factor, columns: cur.Factor, weight: Tensor, bias: Tensor | None
    ) -> None:
        base = self.get_base_layer()
        unreadable = self.quantization_backend is not None or hasattr(base.weight, "ds_id")
        core.derive(rows, columns, weight, bias, keep_rows=self._nested() or (bias is not None and unreadable))
        place = int(rows.indices[0]), int(columns.indices[0])
        core.probe = self._stored_place(*place)
        core.source = self._base_state(core)

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
    """A dense layer (Linear, Conv1D of Transformers, quantised) with CURLoRA adapters; others derive from it."""

    like_input = True
    """Whether the input has the output's shape but for its last dimension."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, settings: CoreSettings, **kwargs) -> None:
        super().__init__()
        CurloraLayer.__init__(self, base_layer, settings.config.fan_in_fan_out, **kwargs)
        self._active_adapter = adapter_name
        self.register_load_state_dict_post_hook(_refresh_loaded)
        self.update_layer(adapter_name, settings, inference_mode=settings.config.inference_mode)

    def train(self, mode: bool = True) -> Linear:
        """Transformers' own `load_adapter` ends with a call of `eval`: an adapter of another base fails here."""
        self.refresh(thorough=mode != self.training)
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True) -> Linear:
        current = [core for core in self.curlora_core.values() if core.source == self._base_state(core)]
        super()._apply(fn, recurse)
        for core in current:  # moved or cast with the base, not left behind by it
            core.source = self._base_state(core)
        return self

    # ----------------------------------------------------------------------------------------------- forward

    def forward(self, x: Tensor, *args, adapter_names: list[str] | None = None, **kwargs) -> Tensor:
        self._check_names(x, adapter_names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed(x, adapter_names, *args, **kwargs)
        cores = [self.curlora_core[name] for name in self.active_adapters if name in self.curlora_core]
        if self.merged or not cores:
            return self.base_layer(x, *args, **kwargs)
        if not torch.compiler.is_compiling():
            self._keep_current(cores)
        active, base = join(cores), self.base_layer  # join before the base is called: see there
        if self.training and self.quantization_backend is not None:
            self._unpack()
        if not args and not kwargs and plain(base, x):
            kernel, mask = base.weight if self.fan_in_fan_out else base.weight.t(), joined_mask(cores, x)
            return cur_linear(x, kernel, base.bias, active.rows, active.cols, active.middle, active.columns, mask)
        y = self.channels_last(base(x, *args, **kwargs))
        mask = joined_mask(cores, x if self.like_input else y)
        z = self._rows_output(x, y, active)
        if z is not None:
            return self._channels_back(cur_added(y, z, active.middle, active.columns, mask))
        bias_rows = self._bias_rows(active)
        return self._channels_back(cur_residual(y, active.rows, bias_rows, active.middle, active.columns, mask))

    def _mixed(self, x: Tensor, names: list[str], *args, **kwargs) -> Tensor:
        """The output with an adapter of its own for each row of x (B, ..., n)."""
        names = names if isinstance(names, RowNames) else RowNames(names)
        base_output = y = self.channels_last(self.base_layer(x, *args, **kwargs))
        for cores, rows in grouped(names, self.curlora_core):
            self._keep_current(cores)
            z = self.rows_output(x, base_output, alone(cores[0]))
            y = add_rows(y, z, cores, rows)
        return self._channels_back(y)

    def _check_names(self, x: Tensor, names: list[str] | None) -> None:
        if names is None:
            return
        if len(x) != len(names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def __repr__(self) -> str:
        return "curlora." + super().__repr__()


# ------------------------------------------------------------------------------------------------------- helpers


def _refresh_loaded(layer: Linear, incompatible_keys) -> None:
    layer.refresh()


def _factors_at(weight: Tensor, rows: Tensor, columns: Tensor) -> tuple[cur.Factor, cur.Factor]:
    """The factors of W (m, n) at given rows and columns (k) int64."""
    device = weight.device
    return (
        cur.Factor(rows, cur.triangle_of(weight[rows.to(device)].t())),
        cur.Factor(columns, cur.triangle_of(weight[:, columns.to(device)])),
    )


def _meta_like(layer: CurloraLayer) -> Tensor:
    dtype = layer.get_base_layer().weight.dtype
    return torch.empty(layer.out_features, layer.in_features, dtype=dtype, device="meta")

"""The core of an adapter on one layer: the trainable U, the record of its rows and columns, and the middle matrix M.

The core is a module rather than a parameter because DeepSpeed ZeRO-3 gathers the parameters of a module when that
module is *called*: the layer's forward pass calls the core to get M.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from . import cur
from . import record as records
from .config import CurloraConfig
from .functional import without_autocast


@dataclass(frozen=True)
class CoreSettings:
    """The configuration as it applies to one layer: patterns for rank and alpha are resolved."""

    key: str
    r: int
    alpha: float
    blocks: int
    config: CurloraConfig

    @classmethod
    def of(cls, config: CurloraConfig, key: str, blocks: int | None = None) -> CoreSettings:
        """Those of the layer of that name."""
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), key), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), key), config.alpha)
        return cls(key, rank, alpha, config.blocks if blocks is None else blocks, config)


class CurloraCore(nn.Module):
    """One adapter on one layer: the trainable U, its record, and tensors derived from the base.

    ``stale``: the record has been loaded, but the factors are not derived from it yet. ``assigned``: it was loaded in
    a way that has not compared it with the file's configuration and checksum. ``source``: the state of the base that
    the factors come from, as the layer identifies it; ``probe``: the place of one element of the base in both factors;
    ``place``: I and J as numbers.

    Saved: ``U`` (r, r) float32, trained; ``frozen`` (blocks−1, r, r), only in a stack; ``record`` int32 (see
    `record`).

    Derived, not saved, k = blocks·r: ``rows`` I and ``cols`` J (k), ``columns`` C (m, k), ``bias_rows`` b[I] (k),
    ``row_weight`` R (k, n) where it cannot be read from the base in a forward pass, and, in fp32 whatever the dtype of
    the model, ``left``, ``right`` (M = left · U · right) and ``norm_left``, ``norm_right`` (‖ΔW‖_F = ‖norm_left · U ·
    norm_right‖_F).
    """

    DERIVED = ("rows", "cols", "columns", "bias_rows", "row_weight", "left", "right", "norm_left", "norm_right")
    EXACT = ("left", "right", "norm_left", "norm_right")

    def __init__(self, settings: CoreSettings, device: torch.device) -> None:
        super().__init__()
        self.settings = settings
        r, blocks = settings.r, settings.blocks
        self.U = nn.Parameter(torch.zeros(r, r, device=device))
        if blocks > 1:
            self.register_buffer("frozen", torch.zeros(blocks - 1, r, r, device=device))
        self.register_buffer(
            "record", torch.zeros(records.length(self.size, blocks), dtype=torch.int32, device=device)
        )
        for name in self.DERIVED:
            self.register_buffer(name, None, persistent=False)
        self.weight_norm = math.nan
        self.stale = False
        self.assigned = False
        self.source: object = None
        self.probe = (0, 0)
        self.place: tuple[int, ...] = ()

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        # Transformers' own load_adapter assigns tensors one by one; there is no load_state_dict whose end to wait for.
        if name == "record":
            self.stale = self.assigned = True

    @property
    def size(self) -> int:
        """k: the number of rows, and of columns, of all blocks together."""
        return self.settings.r * self.settings.blocks

    @property
    def ready(self) -> bool:
        """Whether rows and columns are selected and the factors derived."""
        return self.rows is not None

    # ------------------------------------------------------------------------------------------- the record

    def write_record(self, rows: Tensor, columns: Tensor, fingerprint: Tensor) -> None:
        """Store indices (k) int64 and fingerprint (blocks, 3) float32."""
        self.record.copy_(records.pack(rows, columns, fingerprint))

    def read_record(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (k) int64, columns (k) int64 and fingerprint (blocks, 3) float32, on the CPU."""
        return records.unpack(self.record, self.size)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.stale = self.stale or prefix + "record" in state_dict

    def accept(self) -> None:
        """Take a loaded record for this adapter's own, after everything has been checked."""
        self.stale = self.assigned = False
        if not self.record.is_meta:
            self.record[-1] = 0  # from here on U may change

    # ---------------------------------------------------------------------------------------------- factors

    def derive(
        self, rows: cur.Factor, columns: cur.Factor, weight: Tensor, bias: Tensor | None, keep_rows: bool = False
    ) -> None:
        """Set all derived tensors from the base weight (m, n) and bias (m) for the selected factors."""
        device = weight.device
        self._keep("rows", rows.indices.to(device))
        self._keep("cols", columns.indices.to(device))
        self.place = (*rows.indices.tolist(), *columns.indices.tolist())
        self.read_columns(weight)
        self._keep("bias_rows", None if bias is None else bias[self.rows].detach().clone())
        self._keep("row_weight", weight[self.rows].detach().clone() if keep_rows else None)
        scales = torch.diag(self._scales(rows, columns, weight.shape[0]))
        if self.settings.config.whiten:
            self._set_exact("left", cur.whitening(columns.triangle) @ scales, device)
            self._set_exact("right", cur.whitening(rows.triangle).t(), device)
            self._set_exact("norm_left", scales, device)
            self._set_exact("norm_right", torch.eye(self.size, dtype=scales.dtype), device)
        else:
            self._set_exact("left", scales, device)
            self._set_exact("norm_left", columns.triangle @ scales, device)
            self._set_exact("norm_right", rows.triangle.t(), device)
        self.conditions = {"rows": rows.condition, "columns": columns.condition}
        self.norms = {"rows": rows.norm, "columns": columns.norm}
        if self.settings.config.max_update_norm is not None:
            self.weight_norm = float(torch.linalg.vector_norm(weight, dtype=self.left.dtype))

    def read_columns(self, weight: Tensor) -> None:
        """C from the base weight (m, n)."""
        # (m, k) with contiguous columns, which makes both products with C faster than contiguous rows.
        self._keep("columns", weight[:, self.cols].detach().t().contiguous().t())
        self.row_norm = _norm(weight[self.rows])

    @torch.no_grad()
    def matches(self, weight: Tensor, tolerance: float = 0) -> bool:
        """Whether the factors come from this weight (m, n): by its values, up to a relative tolerance."""
        if not math.isclose(_norm(weight[self.rows]), self.row_norm, rel_tol=1e-4 + tolerance):
            return False
        columns = weight[:, self.cols].to(self.columns.dtype)
        if tolerance == 0:
            return torch.equal(self.columns, columns)
        return _norm(self.columns - columns) <= tolerance * _norm(columns)

    def derive_on_meta(self, weight: Tensor, bias: Tensor | None) -> None:
        """Set shapes only, for a model on the meta device; the indices are meaningless."""
        k = self.size
        self.rows = self.cols = torch.empty(k, dtype=torch.int64, device="meta")
        self.columns = torch.empty(weight.shape[0], k, dtype=weight.dtype, device="meta")
        self.bias_rows = None if bias is None else torch.empty(k, dtype=bias.dtype, device="meta")
        for name in self.EXACT:
            setattr(self, name, torch.empty(k, k, device="meta"))

    def _set_exact(self, name: str, matrix: Tensor, device: torch.device) -> None:
        self._keep(name, matrix.to(device=device, dtype=torch.float32).contiguous())

    def _keep(self, name: str, value: Tensor | None) -> None:
        """Set a derived tensor, in place where it was one of its kind: a compiled model reads it where it is."""
        current = getattr(self, name)
        alike = current is not None and value is not None and current.shape == value.shape
        if alike and current.dtype == value.dtype and current.device == value.device and not current.is_inference():
            with torch.no_grad():
                current.copy_(value)
        else:
            setattr(self, name, value)

    def _scales(self, rows: cur.Factor, columns: cur.Factor, out_features: int) -> Tensor:
        """s per selected index (k) float64.

        Raw factors are rescaled per block, so that a new block leaves the scale of earlier ones unchanged.
        """
        settings, r = self.settings, self.settings.r
        scales = []
        for start in range(0, self.size, r):
            norms = 1.0
            if not settings.config.whiten:
                block = slice(start, start + r)
                norms = float(columns.triangle[:, block].norm() * rows.triangle[:, block].norm()) / r
            scales.append(cur.scale_factor(settings.config.scale, settings.alpha, out_features, r, norms))
        return torch.tensor(scales, dtype=torch.float64).repeat_interleave(r)

    def _apply(self, fn, recurse: bool = True):
        # These follow the device of the model but not its dtype: bf16 factors are orthonormal only to 7e-3, and a
        # frozen block belongs to a finished task.
        exact = {name: getattr(self, name, None) for name in (*self.EXACT, "frozen")}
        super()._apply(fn, recurse)
        for name, tensor in exact.items():
            if tensor is not None and tensor.device == getattr(self, name).device:
                setattr(self, name, tensor)
            elif tensor is not None:
                setattr(self, name, tensor.to(getattr(self, name).device))
        return self

    # ---------------------------------------------------------------------------------------------- forward

    def forward(self) -> Tensor:
        """The middle matrix M (k, k), at least fp32: ΔW = C M R."""
        if not self.ready:
            raise RuntimeError(_not_ready(self.settings))
        with without_autocast(self.record.device.type):
            stacked = self._bounded(self._stacked())
            middle = self.left.to(stacked.dtype) @ stacked
            return middle if self.right is None else middle @ self.right.to(stacked.dtype)

    def _stacked(self) -> Tensor:
        """Block diagonal (k, k) matrix of all U, at least fp32."""
        current = self.U.to(torch.promote_types(self.U.dtype, torch.float32))
        if self.settings.blocks == 1:
            return current
        return torch.block_diag(*self.frozen.to(current.dtype), current)

    def _bounded(self, stacked: Tensor) -> Tensor:
        """``stacked`` with its last block scaled down so that ‖ΔW‖_F ≤ max_update_norm · ‖W‖_F."""
        if self.settings.config.max_update_norm is None:
            return stacked
        start = self.size - self.settings.r
        factor = torch.ones(self.size, 1, dtype=stacked.dtype, device=stacked.device)
        factor[start:] = self.shrinkage(stacked)
        return stacked * factor

    @torch.no_grad()
    def shrinkage(self, stacked: Tensor | None = None) -> Tensor:
        """The largest c in [0, 1], as a 0-dim tensor, for which c · (last block) satisfies the bound on ‖ΔW‖_F.

        Root of ‖A + c B‖² = bound², with A the update of the frozen blocks and B that of the last one.
        """
        stacked = self._stacked() if stacked is None else stacked
        left, right = self.norm_left.to(stacked.dtype), self.norm_right.to(stacked.dtype)
        start = self.size - self.settings.r
        old = left[:, :start] @ stacked[:start] @ right
        new = left[:, start:] @ stacked[start:] @ right
        # Slightly below the bound, so that rounding of the products cannot exceed it.
        bound = self.settings.config.max_update_norm * self.weight_norm * (1 - 1e-6)
        a, b, c = new.square().sum(), (old * new).sum(), old.square().sum() - bound**2
        root = (-b + (b * b - a * c).clamp_min(0).sqrt()) / a.clamp_min(torch.finfo(a.dtype).tiny)
        inside = a + 2 * b + c <= 0
        return torch.where(inside, torch.ones_like(root), root.clamp(0, 1))

    @torch.no_grad()
    def project_(self) -> None:
        """Scale U itself down to the bound, so that the optimizer continues from inside it."""
        if self.settings.config.max_update_norm is not None:
            self.U.mul_(self.shrinkage().to(self.U.dtype))

    @torch.no_grad()
    def update_norm(self) -> float:
        """‖ΔW‖_F, computed from (k, k) matrices only."""
        stacked = self._bounded(self._stacked())
        update = self.norm_left.to(stacked.dtype) @ stacked @ self.norm_right.to(stacked.dtype)
        return float(torch.linalg.matrix_norm(update))

    def mask(self, x: Tensor) -> Tensor | None:
        """Dropout mask for z, (..., k) with entries 0 or 1/(1−p); None if nothing is dropped."""
        p = self.settings.config.dropout
        if not (self.training and p > 0):
            return None
        return nn.functional.dropout(x.new_ones(*x.shape[:-1], self.size), p)

    def extra_repr(self) -> str:
        return f"r={self.settings.r}, blocks={self.settings.blocks}, ready={self.ready}"


def _norm(matrix: Tensor) -> float:
    return float(matrix.detach().float().norm())


def _not_ready(settings: CoreSettings) -> str:
    if settings.blocks > 1:
        return (
            f"{settings.key}: a stack of {settings.blocks} blocks can only be loaded; start with blocks=1 and call "
            "add_block() before each further task."
        )
    if settings.config.selection == "activation" and not settings.config.load_only:
        return (
            f"{settings.key}: selection='activation' needs a calibration batch before the first forward; call "
            "model.calibrate([batch, ...])."
        )
    return (
        f"{settings.key}: the configuration was read from a saved adapter, but no weights were loaded for this layer; "
        "use PeftModel.from_pretrained(base, directory), or build a new CurloraConfig for a new adapter."
    )

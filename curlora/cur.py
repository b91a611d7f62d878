"""CUR mathematics on plain tensors: selection of columns and rows of a matrix, and their whitening.

Pure functions: no modules, no global random state, no files. "Columns" are columns of the given matrix; rows of W are
selected by passing ``W.T``. Source: CURLoRA (arXiv 2408.14572, section 3) for the inverted probabilities; the other
rules name their own.
"""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from curlora.names import SELECTION_RULES

MAX_CONDITION = 1e4
"""A factor with a larger condition number is drawn again: its whitening would amplify rounding errors."""

GOOD_CONDITION = 1e3
"""Up to this condition number the first draw is taken; above it, a better one is looked for."""

ATTEMPTS = 8
"""Number of draws before dependent vectors are passed over, one by one."""

DEPENDENT = 0.01
"""A vector is passed over if less than this part of its norm is outside the span of those taken before it."""

RANKED = 4096
"""How many vectors, in the order of the rule, are looked at for independent ones."""

EXACT_SVD_LIMIT = 512
"""Singular vectors are exact up to this smaller dimension; above it, a randomised range finder computes them."""


class SelectionError(ValueError):
    """No acceptable set of columns or rows exists for this matrix, rank and rule.

    ``possible``: how many independent ones were found.
    """

    possible = 0


@dataclass(frozen=True)
class Candidates:
    """The input of a selection rule, which chooses among the k columns of a matrix."""

    matrix: torch.Tensor
    """(d, k), any float dtype and device."""
    energy: torch.Tensor
    """(k,) squared column norms, float64 on the CPU."""
    allowed: torch.Tensor
    """(k,) bool: whether a column is neither zero nor excluded."""
    activation: torch.Tensor | None = None
    """(k,) mean squared activation on calibration batches, float64 on the CPU; only for the rule ``activation``."""


@dataclass(frozen=True)
class Factor:
    """Chosen columns of a matrix, C = matrix[:, indices] = Q T with orthonormal Q."""

    indices: torch.Tensor
    """(k,) int64 on the CPU."""
    triangle: torch.Tensor
    """(k, k) upper triangular T with non-negative diagonal, float64 on the CPU."""

    @property
    def condition(self) -> float:
        """Ratio of the largest to the smallest singular value of C."""
        values = torch.linalg.svdvals(self.triangle)
        return float(values[0] / values[-1]) if values[-1] > 0 else math.inf

    @property
    def norm(self) -> float:
        """Frobenius norm of C."""
        return float(torch.linalg.matrix_norm(self.triangle))


Rule = Callable[[Candidates, int, torch.Generator], torch.Tensor]
"""A selection rule: maps (candidates, rank, generator) to `rank` distinct allowed indices."""


def rule_named(name: str) -> Rule:
    """The selection rule that the registry has under ``name``."""
    module, _, function = SELECTION_RULES[name].partition(":")
    return getattr(importlib.import_module(module), function)


# ---------------------------------------------------------------------------------------------- probabilities


def squared_norms(matrix: torch.Tensor) -> torch.Tensor:
    """Squared norms of the columns of a (d, k) matrix as (k,) float64 on the CPU; half precision is summed in fp32.

    Sums slices of rows that fit the cache: a reduction across the stride of the whole matrix is 15 times slower.
    """
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    if matrix.t().is_contiguous():
        return torch.linalg.vector_norm(matrix, dim=0, dtype=dtype).double().square().cpu()
    total = torch.zeros(matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for rows in matrix.split(256):
        total += rows.to(dtype).square().sum(dim=0)
    return total.cpu()


def probabilities(energy: torch.Tensor) -> torch.Tensor:
    """p_j = ‖W[:, j]‖² / ‖W‖_F² from squared norms (k,)."""
    return energy / energy.sum()


def inverted(p: torch.Tensor) -> torch.Tensor:
    """p̃_j = (1/p_j) / Σ(1/p_i) (CURLoRA, eq. 7); entries with p_j = 0 get probability 0, not infinity."""
    weights = torch.where(p > 0, p.clamp_min(torch.finfo(p.dtype).tiny).reciprocal(), 0.0)
    return weights / weights.sum()


def sample(p: torch.Tensor, rank: int, generator: torch.Generator) -> torch.Tensor:
    """Draw ``rank`` distinct indices with probabilities proportional to p (k,), one after another.

    The largest values of log p + Gumbel noise are distributed exactly like sequential draws without replacement
    (Gumbel top-k), and need one random number per index, independently of the order of evaluation.
    """
    noise = torch.rand(p.shape, generator=generator, dtype=torch.float64)
    keys = p.double().log() - noise.clamp_min(1e-300).log().neg().log()
    return keys.topk(rank).indices


# --------------------------------------------------------------------------------------------- selection rules


def select_inverse(candidates: Candidates, rank: int, generator: torch.Generator) -> torch.Tensor:
    """The rule of the paper: prefers columns of small norm, so that ΔW starts in rarely used directions."""
    energy = torch.where(candidates.allowed, candidates.energy, 0.0)
    return sample(inverted(probabilities(energy)), rank, generator)


def select_uniform(candidates: Candidates, rank: int, generator: torch.Generator) -> torch.Tensor:
    """All non-zero columns with equal probability: the control that shows whether a rule matters."""
    return sample(candidates.allowed.double(), rank, generator)


def select_importance(candidates: Candidates, rank: int, generator: torch.Generator) -> torch.Tensor:
    """Prefers columns of large norm: classical CUR sampling."""
    return sample(torch.where(candidates.allowed, candidates.energy, 0.0), rank, generator)


def select_leverage(candidates: Candidates, rank: int, generator: torch.Generator) -> torch.Tensor:
    """Prefers columns that the best rank-r approximation uses (Mahoney & Drineas, 2009)."""
    vectors = right_singular_vectors(_remaining(candidates), rank, generator)
    scores = vectors.square().sum(dim=1).clamp_min(1e-12)
    return sample(torch.where(candidates.allowed, scores, 0.0), rank, generator)


def select_deim(candidates: Candidates, rank: int, generator: torch.Generator) -> torch.Tensor:
    """Greedy interpolation points of the leading singular vectors (Sorensen & Embree, 2016, algorithm 1).

    Each index is where interpolation of the next vector at the earlier indices has the largest error.
    """
    vectors = right_singular_vectors(_remaining(candidates), rank, generator)
    chosen: list[int] = []
    for j in range(rank):
        residual = vectors[:, j]
        if chosen:
            basis = vectors[:, :j]
            residual = residual - basis @ torch.linalg.lstsq(basis[chosen], residual[chosen, None]).solution[:, 0]
        size = torch.where(candidates.allowed, residual.abs(), -1.0)
        size[chosen] = -1.0
        chosen.append(int(size.argmax()))
    return torch.tensor(chosen, dtype=torch.int64)


def select_activation(candidates: Candidates, rank: int, generator: torch.Generator) -> torch.Tensor:
    """Indices with the smallest activations on calibration batches: with a small z = (W x)[I], the update is small."""
    if candidates.activation is None:
        raise SelectionError("it needs a calibration batch; call model.calibrate([batch, ...])")
    energy = torch.where(candidates.allowed, candidates.activation.double().cpu(), math.inf)
    return energy.argsort(stable=True)[:rank]


def _remaining(candidates: Candidates) -> torch.Tensor:
    """The matrix with its excluded columns set to zero."""
    if bool(candidates.allowed.all()):
        return candidates.matrix
    return candidates.matrix * candidates.allowed.to(candidates.matrix)


def right_singular_vectors(matrix: torch.Tensor, rank: int, generator: torch.Generator) -> torch.Tensor:
    """Leading ``rank`` right singular vectors of a (d, k) matrix as (k, rank) float64 on the CPU.

    Exact for small matrices; above EXACT_SVD_LIMIT by a randomised range finder with 8 extra vectors and two power
    iterations (Halko, Martinsson & Tropp, 2011, algorithm 4.4), which reads the matrix six times.
    """
    rank_limit = min(matrix.shape)
    if rank_limit <= EXACT_SVD_LIMIT:
        return torch.linalg.svd(matrix.detach().cpu().double(), full_matrices=False).Vh[:rank].t()
    work = matrix.detach() if matrix.dtype == torch.float64 else matrix.detach().float()
    width = min(rank + 8, rank_limit)
    start = torch.randn(matrix.shape[0], width, generator=generator, dtype=torch.float64).to(work)
    basis = torch.linalg.qr(work.t() @ start).Q
    for _ in range(2):
        basis = torch.linalg.qr(work.t() @ torch.linalg.qr(work @ basis).Q).Q
    small = torch.linalg.svd((work @ basis).cpu().double(), full_matrices=False).Vh
    return basis.cpu().double() @ small[:rank].t()


# -------------------------------------------------------------------------------------------------- selection


def generator_for(seed: int, *key: object) -> torch.Generator:
    """A CPU generator that depends on seed and key only, not on rank, world size, order or global state."""
    digest = hashlib.sha256("|".join(map(str, (seed, *key))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def triangle_of(columns: torch.Tensor) -> torch.Tensor:
    """T of the thin QR decomposition C = Q T with non-negative diagonal, for C (d, k), as (k, k) float64 on the CPU.

    The sign convention makes T unique, so that the first blocks of a stack keep their Q when a block is appended.
    Computed on the CPU in fp64, so that every rank and device gets the same result.
    """
    triangle = torch.linalg.qr(columns.detach().cpu().double(), mode="r").R
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(triangle.dtype)
    return signs[:, None] * triangle


def select(
    matrix: torch.Tensor,
    rank: int,
    selection: str = "inverse",
    *,
    seed: int = 0,
    key: str = "",
    previous: torch.Tensor | None = None,
    activation: torch.Tensor | None = None,
) -> Factor:
    """Choose ``rank`` columns of a (d, k) matrix that are well conditioned together with the ``previous`` ones.

    Deterministic in (seed, key). Columns in ``previous`` (int64) are not chosen again and come first in the result,
    whose triangle covers both. The rule ``activation`` ranks by ``activation`` (k,). Where the draws are dependent, as
    among copied rows, the vectors are taken in the order of the rule, and those in the span of earlier ones are passed
    over. Raises SelectionError if too few non-zero or too few independent columns are left.
    """
    candidates = _candidates(matrix, previous, activation)
    available = int(candidates.allowed.sum())
    head = torch.empty(0, dtype=torch.int64) if previous is None else previous.cpu()
    if available < rank:
        error = SelectionError(
            f"{available} non-zero, unused vectors are left of {matrix.shape[1]}, {rank} are needed"
        )
        error.possible = len(_independent(candidates, head, available, selection, generator_for(seed, key)))
        raise error
    best: Factor | None = None
    for attempt in range(ATTEMPTS):
        drawn = rule_named(selection)(candidates, rank, generator_for(seed, key, attempt, len(head)))
        best = _better(best, _factor(matrix, head, drawn))
        if best.condition <= GOOD_CONDITION:
            return best
    found = _independent(candidates, head, rank, selection, generator_for(seed, key, 0, len(head)))
    if len(found) == rank:
        best = _better(best, _factor(matrix, head, found))
    if best.condition <= MAX_CONDITION:
        return best
    error = SelectionError(
        f"the best of {ATTEMPTS} draws has condition number {best.condition:.1e}, more than {MAX_CONDITION:.0e}, and "
        f"{len(found)} independent ones were found in the order of the rule"
    )
    error.possible = len(found)
    raise error


def _factor(matrix: torch.Tensor, head: torch.Tensor, drawn: torch.Tensor) -> Factor:
    indices = torch.cat([head, drawn.to(torch.int64)])
    return Factor(indices, triangle_of(matrix[:, indices.to(matrix.device)]))


def _better(first: Factor | None, second: Factor) -> Factor:
    return second if first is None or second.condition < first.condition else first


def _independent(
    candidates: Candidates, head: torch.Tensor, rank: int, selection: str, generator: torch.Generator
) -> torch.Tensor:
    """Up to ``rank`` columns in the order of the rule, without those in the span of ``head`` and of earlier ones."""
    limit = min(int(candidates.allowed.sum()), RANKED)
    if selection in ("leverage", "deim"):  # their order is that of singular vectors, of which only few are meaningful
        limit = min(limit, 4 * rank, *candidates.matrix.shape)
    ranked = rule_named(selection)(candidates, limit, generator)
    others = candidates.allowed.clone()
    others[ranked] = False
    others = sample(others.double(), min(int(others.sum()), RANKED - limit), generator)  # where that was too few
    basis = torch.empty(candidates.matrix.shape[0], 0, dtype=torch.float64)
    taken: list[int] = []
    for index in [*head.tolist(), *ranked.tolist(), *others.tolist()]:
        vector = candidates.matrix[:, index].detach().cpu().double()
        rest = vector
        for _ in range(2):  # once more, since rounding leaves a part in the span
            rest = rest - basis @ (basis.t() @ rest)
        if rest.norm() > DEPENDENT * vector.norm():
            basis = torch.cat([basis, (rest / rest.norm())[:, None]], dim=1)
            taken.append(index)
        if len(taken) == len(head) + rank:
            break
    return torch.tensor([index for index in taken if index not in set(head.tolist())], dtype=torch.int64)


def _candidates(matrix: torch.Tensor, previous: torch.Tensor | None, activation: torch.Tensor | None) -> Candidates:
    energy = squared_norms(matrix)
    allowed = energy > 0
    if previous is not None:
        allowed[previous.cpu()] = False
    return Candidates(matrix, energy, allowed, activation)


# -------------------------------------------------------------------------------------- whitening, scale, norms


def whitening(triangle: torch.Tensor) -> torch.Tensor:
    """T⁻¹ (k, k) float64 for an upper triangular T: C T⁻¹ has orthonormal columns."""
    identity = torch.eye(len(triangle), dtype=triangle.dtype)
    return torch.linalg.solve_triangular(triangle, identity, upper=True)


def scale_factor(scale: str, alpha: float, rows: int, rank: int, norms: float = 1.0) -> float:
    """s of ΔW = s · C U R for W with ``rows`` outputs.

    ``none``: α. ``rsqrt``: α/√r. ``adam``: one Adam step at rate η changes ‖ΔW‖_F as much as for LoRA, which is about
    0.58 √(m r) η against s · c̄ r̄ · r η here; ``norms`` = c̄ r̄ is the product of the root-mean-square norms of the
    chosen columns and rows (1 if whitened).
    """
    if scale == "none":
        return alpha
    if scale == "rsqrt":
        return alpha / math.sqrt(rank)
    return alpha * 0.58 * math.sqrt(rows / rank) / norms

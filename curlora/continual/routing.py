"""Routing: which of several tasks a text looks like, told by the base model alone.

In the first blocks of the frozen base, a few coordinates of every adapted layer's output are observed. A task is the
matrix of their second moments, S = E[z zᵀ] per layer, over its training text; a text with the moments Ŝ has under it

    ℓ = −½ Σ_layers [tr(S⁻¹ Ŝ) + logdet S]

nats per token, up to a constant: the likelihood of a Gaussian. An invertible map of z changes ℓ of all tasks alike, so
no whitening is needed. A text goes to its likeliest task, or to none if the base's own language (task 0) is likelier,
or if hardly any training text of that task was as unlikely under it.

Compared with a gate that is trained (GainLoRA, arXiv 2505.15424) nothing is learned and nothing is forgotten: a new
task adds its matrices and changes no others.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

COORDINATES = 32
"""Observed outputs of a layer."""

BLOCKS = 4
"""Observed blocks, from the input on."""

ROWS = 8
"""Sequences per pass."""

SHRINKAGE = 0.01
"""Part of the mean variance that is added to every coordinate's own."""

RARE = 0.02
"""A text is none of a task's if less than this part of the task's training texts was as unlikely."""

Moments = dict[str, Tensor]
"""Name of an observed layer → (rows, k, k), mean z zᵀ over the tokens of each row, fp32 on the CPU."""


class Router:
    """Second moments of tasks; position 0 is the base, to which whatever looks like no task goes."""

    def __init__(self, coordinates: int = COORDINATES, blocks: int = BLOCKS, shrinkage: float = SHRINKAGE):
        self.coordinates, self.blocks, self.shrinkage = coordinates, blocks, shrinkage
        self.matrices: list[Moments] = []  # per position: (k, k) per layer
        self.floors: list[float] = []  # ℓ under itself below which a text is not the task's

    def __len__(self) -> int:
        return len(self.matrices)

    def fit(self, seen: Moments) -> None:
        """Append a task (at first: the base) with the moments of its texts, at least two.

        The floor is found on the half of the texts that the other half's moments have not seen.
        """
        rows = len(next(iter(seen.values())))
        if rows < 2:
            raise ValueError(f"{rows} text is too little to know a task by; at least 2 are needed")
        halves = [{name: values[first::2].mean(0) for name, values in seen.items()} for first in (0, 1)]
        unseen = [{name: values[second::2] for name, values in seen.items()} for second in (1, 0)]
        own = torch.cat([self._likelihood(half, other) for half, other in zip(halves, unseen, strict=True)])
        self.floors.append(float(own.quantile(RARE)))
        self.matrices.append({name: values.mean(0) for name, values in seen.items()})

    def likelihoods(self, seen: Moments) -> Tensor:
        """(rows, positions) ℓ in nats per token, fp64."""
        return torch.stack([self._likelihood(matrices, seen) for matrices in self.matrices], 1)

    def route(self, seen: Moments) -> Tensor:
        """(rows,) position of each row, int64; 0 is the base."""
        found = self.likelihoods(seen)
        best = found.argmax(1)
        floors = torch.tensor(self.floors, dtype=found.dtype)[best]
        return torch.where(found.gather(1, best[:, None])[:, 0] < floors, 0, best)

    def _likelihood(self, matrices: Mapping[str, Tensor], seen: Moments) -> Tensor:
        total = torch.zeros(len(next(iter(seen.values()))), dtype=torch.float64)
        for name, own in matrices.items():
            scale = self._scale(name, own)
            s = own.double() / scale[:, None] / scale
            s = s + self.shrinkage * torch.eye(len(s), dtype=torch.float64)
            measured = seen[name].double() / scale[:, None] / scale
            total -= (torch.linalg.inv(s) * measured).sum((1, 2)) + torch.logdet(s)
        return total / 2

    def _scale(self, name: str, own: Tensor) -> Tensor:
        """(k,) root mean square of each coordinate on the base's text, so that shrinkage has no unit."""
        reference = self.matrices[0][name] if self.matrices else own
        return reference.double().diagonal().clamp_min(1e-12).sqrt()

    # ------------------------------------------------------------------------------------------ observation

    @torch.no_grad()
    def observe(self, model: nn.Module, texts: Sequence[Sequence[int]], pad: int = 0) -> Moments:
        """Moments of token sequences in a PEFT model that computes what its base computes.

        The first of several tokens is left out: attention sinks make it unlike all others. Passes stop after the last
        observed layer, unless the model is partitioned (ZeRO-3), where every pass is a collective call.
        """
        layers = self._observed(model)
        found: dict[str, list[Tensor]] = {name: [] for name in layers}
        was_training = model.training
        model.eval()
        for first in range(0, len(texts), ROWS):
            ids, mask = _padded(texts[first : first + ROWS], pad, next(model.parameters()).device)
            with _outputs(layers, stop=not _is_partitioned(model)) as seen, contextlib.suppress(_Enough):
                model(input_ids=ids, attention_mask=mask, use_cache=False)
            weights = mask.float()
            weights[:, 0] = (mask.sum(1) == 1).float()
            weights = weights / weights.sum(1, keepdim=True)
            for name, values in seen.items():
                if values.dim() != 3:
                    continue  # an expert sees only the tokens that are sent to it
                z = values[..., self._places(name, values.shape[-1]).to(values.device)].float()
                found[name].append(torch.einsum("bt,bti,btj->bij", weights, z, z).cpu())
        model.train(was_training)
        return {name: torch.cat(parts) for name, parts in found.items() if parts}

    def _observed(self, model: nn.Module) -> dict[str, nn.Module]:
        """Name → base layer of the adapted layers in the first blocks."""
        adapted = {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
        numbers = sorted({_block(name) for name in adapted})[: self.blocks]
        return {name: m.get_base_layer() for name, m in adapted.items() if _block(name) in numbers}

    def _places(self, name: str, width: int) -> Tensor:
        """The observed coordinates of a layer: evenly spread, the same in every process."""
        count = min(self.coordinates, width)
        return torch.arange(count) * width // count

    # ------------------------------------------------------------------------------------------------ state

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Tensors and JSON values, for `load_state`."""
        tensors = {f"{place}/{name}": m for place, part in enumerate(self.matrices) for name, m in part.items()}
        values = {name: getattr(self, name) for name in ("coordinates", "blocks", "shrinkage", "floors")}
        return tensors, values

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping) -> None:
        """The inverse of `state`."""
        self.coordinates, self.blocks = values["coordinates"], values["blocks"]
        self.shrinkage, self.floors = values["shrinkage"], list(values["floors"])
        self.matrices = [{} for _ in self.floors]
        for key, tensor in tensors.items():
            place, _, name = key.partition("/")
            self.matrices[int(place)][name] = tensor


class _Enough(Exception):
    """All observed layers have run."""


@contextlib.contextmanager
def _outputs(layers: Mapping[str, nn.Module], stop: bool) -> Iterator[dict[str, Tensor]]:
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module, inputs, output) -> None:
            seen[name] = output
            if stop and len(seen) == len(layers):
                raise _Enough

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _block(name: str) -> int:
    """Number of the block that a module is in: the first number in its name; 0 without one."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found.group(1)) if found else 0


def _is_partitioned(model: nn.Module) -> bool:
    return any(hasattr(p, "ds_id") for p in model.parameters())


def _padded(texts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    length = max(len(text) for text in texts)
    ids = torch.full((len(texts), length), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.as_tensor(text)
        mask[row, : len(text)] = 1
    return ids.to(device), mask.to(device)

"""Routing: which of several tasks a text looks like, told by the base model alone.

In the first blocks of the frozen base, a few coordinates of every adapted layer's output are observed. A task is the
matrix of their second moments, S = E[z zᵀ] per layer, over its training text. A text with the moments Ŝ over n tokens
has under it the log-likelihood of a Gaussian,

    ℓ = −n/2 Σ_layers [tr(S⁻¹ Ŝ) + logdet S]

up to a constant. The last tokens are observed a second time by themselves: that is where a template ends, and tells
tasks apart whose words are alike. An invertible map of z changes ℓ of all tasks alike, so no whitening is needed. A
text goes to its likeliest task, or to none (the base, position 0) where the base's own language is likelier, or where
hardly any training text of that task was as near to the base's language.

Compared with a gate that is trained (GainLoRA, arXiv 2505.15424) nothing is learned and nothing is forgotten: a new
task adds its matrices and changes no others.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

COORDINATES = 32
"""Observed outputs of a layer."""

BLOCKS = 4
"""Observed blocks, from the input on."""

LAST = 4
"""Tokens at the end of a text that are observed by themselves."""

MOST = 128
"""A text counts as no more tokens than these against its last ones."""

ROWS = 8
"""Sequences per pass."""

SHRINKAGE = 0.1
"""What is added to the variance of each coordinate, in units of its variance on the base's text."""

RARE = 0.01
"""A text is none of a task's if less than this part of its training texts was as near to the base's language."""


@dataclass(frozen=True)
class Moments:
    """Second moments of some texts: per observed layer (rows, k, k), mean z zᵀ, fp32 on the CPU.

    `whole`: over all tokens of a text but the first; `last`: over its last tokens. `tokens` (rows,): their number.
    """

    whole: dict[str, Tensor]
    last: dict[str, Tensor]
    tokens: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows) -> Moments:
        parts = ({name: values[rows] for name, values in part.items()} for part in (self.whole, self.last))
        return Moments(*parts, self.tokens[rows])

    def mean(self) -> dict[str, Tensor]:
        """(k, k) per layer, over the texts; the moments of the last tokens have names that end with @last."""
        ends = {name + AT_LAST: values.mean(0) for name, values in self.last.items()}
        return {name: values.mean(0) for name, values in self.whole.items()} | ends


AT_LAST = "@last"


class Router:
    """Second moments of tasks; position 0 is the base, to which whatever looks like no task goes."""

    def __init__(self, coordinates: int = COORDINATES, blocks: int = BLOCKS):
        self.coordinates, self.blocks = coordinates, blocks
        self.matrices: list[dict[str, Tensor]] = []  # per position, as `Moments.mean` gives them
        self.margins: list[float] = []  # how much likelier than under the base a text of the task is, per token

    def __len__(self) -> int:
        return len(self.matrices)

    def fit(self, seen: Moments) -> None:
        """Append a task (at first: the base) with the moments of its texts, at least two.

        The margin is found on the half of the texts that the other half's moments have not seen.
        """
        if len(seen) < 2:
            raise ValueError(f"{len(seen)} text is too little to know a task by; at least 2 are needed")
        margin = 0.0
        if self.matrices:
            base = self._likelihood(self.matrices[0], seen)
            own = torch.empty_like(base)
            for first in (0, 1):
                own[1 - first :: 2] = self._likelihood(seen[first::2].mean(), seen[1 - first :: 2])
            margin = float((own - base).quantile(RARE))
        self.matrices.append(seen.mean())
        self.margins.append(margin)

    def likelihoods(self, seen: Moments) -> Tensor:
        """(rows, positions) ℓ in nats per token, fp64."""
        return torch.stack([self._likelihood(matrices, seen) for matrices in self.matrices], 1)

    def route(self, seen: Moments) -> Tensor:
        """(rows,) position of each row, int64; 0 is the base."""
        found = self.likelihoods(seen)
        margins = torch.tensor(self.margins, dtype=found.dtype)
        return found.where(found - found[:, :1] >= margins, -torch.inf).argmax(1)

    def _likelihood(self, matrices: Mapping[str, Tensor], seen: Moments) -> Tensor:
        count = seen.tokens.double().clamp(max=MOST)
        total = torch.zeros(len(seen), dtype=torch.float64)
        for name, own in matrices.items():
            layer = name.removesuffix(AT_LAST)
            times = count if layer == name else count.clamp(max=LAST)
            measured = (seen.whole if layer == name else seen.last)[layer]
            scale = self._scale(name, own)
            s = own.double() / scale[:, None] / scale + SHRINKAGE * torch.eye(len(own), dtype=torch.float64)
            measured = measured.double() / scale[:, None] / scale
            total -= times / 2 * ((torch.linalg.inv(s) * measured).sum((1, 2)) + torch.logdet(s))
        return total / count

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
        found: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        was_training = model.training
        model.eval()
        for first in range(0, len(texts), ROWS):
            ids, mask = _padded(texts[first : first + ROWS], pad, next(model.parameters()).device)
            with _outputs(layers, stop=not _is_partitioned(model)) as seen, contextlib.suppress(_Enough):
                model(input_ids=ids, attention_mask=mask, use_cache=False)
            weights = _weights(mask)
            for name, values in seen.items():
                if values.dim() != 3:
                    continue  # an expert sees only the tokens that are sent to it
                z = values[..., self._places(values.shape[-1]).to(values.device)].float()
                for parts, w in zip(found.setdefault(name, ([], [])), weights, strict=True):
                    parts.append(torch.einsum("bt,bti,btj->bij", w, z, z).cpu())
        model.train(was_training)
        whole, last = ({name: torch.cat(parts[kind]) for name, parts in found.items()} for kind in (0, 1))
        return Moments(whole, last, torch.tensor([max(len(text) - 1, 1) for text in texts]))

    def _observed(self, model: nn.Module) -> dict[str, nn.Module]:
        """Name → base layer of the adapted layers in the first blocks."""
        adapted = {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
        numbers = sorted({_block(name) for name in adapted})[: self.blocks]
        return {name: m.get_base_layer() for name, m in adapted.items() if _block(name) in numbers}

    def _places(self, width: int) -> Tensor:
        """The observed coordinates of a layer: evenly spread, the same in every process."""
        count = min(self.coordinates, width)
        return torch.arange(count) * width // count

    # ------------------------------------------------------------------------------------------------ state

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Tensors and JSON values, for `load_state`."""
        tensors = {f"{place}/{name}": m for place, part in enumerate(self.matrices) for name, m in part.items()}
        return tensors, {name: getattr(self, name) for name in ("coordinates", "blocks", "margins")}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping) -> None:
        """The inverse of `state`."""
        self.coordinates, self.blocks = values["coordinates"], values["blocks"]
        self.margins = list(values["margins"])
        self.matrices = [{} for _ in self.margins]
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


def _weights(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, length) each: what a token counts in the moments of all tokens but the first, and of the last ones."""
    place, length = mask.cumsum(1), mask.sum(1, keepdim=True)
    whole = mask.bool() & ((place > 1) | (length == 1))
    last = whole & (place > length - LAST)
    return tuple(chosen.float() / chosen.sum(1, keepdim=True) for chosen in (whole, last))

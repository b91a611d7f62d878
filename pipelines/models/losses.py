"""Next-token losses from the last hidden states, without materialising the logits of a batch.

The output layer is frozen, so the gradient with respect to its input is available as soon as the loss is. Both are
computed for a few rows at a time, and only for positions with a target. With a vocabulary of 150,000 and 8,192 tokens
this saves 5 GB of fp32 logits and as much for their gradient. Cut cross-entropy (arXiv 2411.09009) and Liger Kernel
(arXiv 2410.10989) do this in Triton, for trained output layers as well.

Models whose logits are not one linear layer of the hidden states (soft caps, scales, an adapter on the output layer),
or whose output layer is partitioned by ZeRO-3, materialise the logits of all positions with a target.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pipelines.data.encoding import IGNORE
from pipelines.models.heads import causal_lm

CHUNK_NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 26}  # logits at a time: fits a CPU's cache, keeps a GPU busy


class Likelihoods(NamedTuple):
    """Result of a forward pass.

    Attributes:
        losses: (batch, length) fp32 cross-entropy of the target at each position given the tokens before it; 0 without
            target.
        hidden: (batch, length, hidden) states of the last layer.
        logits: function (rows, length) → (len(rows), length, vocabulary), differentiable: logits of the first `length`
            positions of these rows, which must have targets from position 1 on.
    """

    losses: Tensor
    hidden: Tensor
    logits: Callable[[list[int], int], Tensor]


def next_token_losses(model: nn.Module, targets: Tensor, places: Tensor | None = None, **inputs) -> Likelihoods:
    """Run `model` on `inputs` (`input_ids`, `attention_mask`, …).

    Args:
        targets: (batch, length) token ids, -100 for positions without loss; position 0 never has one.
        places: (examples, longest) where each token of packed examples is in the flattened inputs, -1 behind an
            example's end. Then the results have this shape.
    """
    where = (
        (targets[:, 1:] != IGNORE).flatten().nonzero()[:, 0]
    )  # before the pass, because it synchronises with the device
    layer = plain_output_layer(model)
    if layer is not None or not len(where):
        found = _by_hidden_states(model, targets, where, layer, places, inputs)
        if found is not None:
            return found
    return _by_logits(model, targets, where, places, inputs)


def unpacked(values: Tensor, places: Tensor | None) -> Tensor:
    """(examples, longest, …) of packed values (rows, length, …); behind an example's end stands an arbitrary one."""
    return values if places is None else values.flatten(0, 1)[places.clamp(min=0)]


def _unpacked_losses(losses: Tensor, places: Tensor | None) -> Tensor:
    return losses if places is None else unpacked(losses, places) * (places >= 0)


def _by_hidden_states(model, targets, where, layer: nn.Linear | None, places, inputs: dict) -> Likelihoods | None:
    """None if the model's logits turn out to differ from those of its output layer."""
    checks = layer is not None and layer not in _IS_PLAIN
    hidden, last = last_hidden(model, **inputs, **keep_last(model, targets, int(checks or layer is None)))
    if checks:
        with torch.no_grad():
            _IS_PLAIN[layer] = torch.equal(layer(hidden[:, [-1]]).float(), last[:, -1:].float())
        if not _IS_PLAIN[layer]:
            return None
    losses = torch.zeros(targets.shape, device=hidden.device)
    if len(where):
        seen, wanted = hidden[:, :-1].flatten(0, 1)[where], targets[:, 1:].flatten()[where]
        flat = losses[:, 1:].flatten().index_copy(0, where, frozen_layer_losses(seen, layer, wanted))
        losses = nn.functional.pad(flat.view(len(targets), -1), (1, 0))
    hidden = unpacked(hidden, places)
    return Likelihoods(_unpacked_losses(losses, places), hidden, lambda rows, length: layer(hidden[rows, :length]))


def _by_logits(model, targets, where, places, inputs: dict) -> Likelihoods:
    first = int(
        (where % (targets.shape[1] - 1)).min()
    )  # no logits are needed before the first position that predicts a target
    positions = torch.arange(first, targets.shape[1] - 1, device=targets.device)
    keep = keep_logits(model, positions)
    hidden, logits = last_hidden(model, **inputs, **keep)
    logits = logits if keep else logits[:, positions]
    losses = nn.functional.pad(token_nll(logits, targets[:, first + 1 :]), (first + 1, 0))

    def logits_of(rows: list[int], length: int) -> Tensor:
        if places is None:
            return logits[rows, :length]
        place, width = places[rows, :length].clamp(min=0), targets.shape[1]
        return logits[place // width, (place % width - first).clamp(0, logits.shape[1] - 1)]

    return Likelihoods(_unpacked_losses(losses, places), unpacked(hidden, places), logits_of)


_IS_PLAIN: WeakKeyDictionary[nn.Module, bool] = (
    WeakKeyDictionary()
)  # output layer -> whether it alone gives the logits


def plain_output_layer(model: nn.Module) -> nn.Linear | None:
    """The output layer if it is linear, frozen, whole on this rank, and not known to give other logits; else None."""
    layer = causal_lm(model).get_output_embeddings()
    whole = type(layer) is nn.Linear and not any(hasattr(p, "ds_id") or p.requires_grad for p in layer.parameters())
    return layer if whole and accepts(model, "logits_to_keep") and _IS_PLAIN.get(layer, True) else None


def last_hidden(model: nn.Module, **inputs) -> tuple[Tensor, Tensor]:
    """((batch, length, hidden) of the last layer, logits).

    By a hook: `output_hidden_states` would keep those of all layers in memory.
    """
    decoder = causal_lm(model).get_decoder()
    if decoder is causal_lm(model):
        output = model(**inputs, output_hidden_states=True, use_cache=False)
        return output.hidden_states[-1], output.logits
    with _outputs_of(decoder) as seen:
        logits = model(**inputs, use_cache=False).logits
    return seen[-1][0], logits


@contextlib.contextmanager
def _outputs_of(module: nn.Module) -> Iterator[list]:
    seen: list = []
    hook = module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        hook.remove()


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the language model's forward has an argument of this name."""
    return argument in inspect.signature(causal_lm(model).forward).parameters


CACHE_ARGUMENTS = ("cache", "past_key_values")
"""Names of the key-value cache in Transformers, newest first: an argument of the forward, a field of its output."""


def cache_argument(model: nn.Module) -> str | None:
    """The name under which the language model's forward takes its cache; None if it takes none."""
    return next((name for name in CACHE_ARGUMENTS if accepts(model, name)), None)


def keep_logits(model: nn.Module, positions: Tensor | int) -> dict:
    """`logits_to_keep` for models that accept it: in a small model, unused logits cost more than everything else."""
    return {"logits_to_keep": positions} if accepts(model, "logits_to_keep") else {}


def keep_last(model: nn.Module, ids: Tensor, count: int = 1) -> dict:
    """`keep_logits` of the last `count` positions of ids (batch, length).

    Positions as a tensor: behind an int, Transformers slices, and on a CPU `linear` of a slice copies the weight once
    per row: 630 ms for 8 rows of a vocabulary of 49,152.
    """
    length = ids.shape[1]
    return keep_logits(model, torch.arange(length - count, length, device=ids.device))


def position_ids(model: nn.Module, positions: Tensor) -> dict:
    """`position_ids` for models that accept them; others derive positions from the mask."""
    return {"position_ids": positions} if accepts(model, "position_ids") else {}


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """(batch, length) fp32 cross-entropy of logits (batch, length, vocabulary); 0 where the target is -100.

    Flattened, because on a CPU the softmax over a strided dimension is many times slower.
    """
    losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape)


def frozen_layer_losses(hidden: Tensor, layer: nn.Linear, targets: Tensor) -> Tensor:
    """(tokens,) fp32 cross-entropy of `layer(hidden)`, hidden (tokens, hidden), differentiable in `hidden` alone."""
    return _FrozenLayerLoss.apply(hidden, layer.weight, layer.bias, targets)


class _FrozenLayerLoss(torch.autograd.Function):
    """With e = exp(logits − max) and s = Σe: loss = log s + max − logits[target], and
    ∂loss/∂hidden = (e W) / s − W[target]."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets):
        wants = ctx.needs_input_grad[0]
        losses = torch.empty(len(hidden), device=hidden.device)
        gradient = torch.empty_like(hidden) if wants else None
        rows = max(1, CHUNK_NUMBERS.get(hidden.device.type, 1 << 24) // len(weight))
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                logits = nn.functional.linear(hidden[part], weight, bias).float()
                top, wanted = logits.amax(1, keepdim=True), targets[part, None]
                at_target = logits.gather(1, wanted)
                exponentials = logits.sub_(top).exp_()
                total = exponentials.sum(1, keepdim=True)
                losses[part] = (total.log() + top - at_target)[:, 0]
                if wants:
                    mean = (exponentials.to(weight.dtype) @ weight) / total
                    gradient[part] = (mean - weight[targets[part]]).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient_of_losses):
        (gradient,) = ctx.saved_tensors
        return (gradient * gradient_of_losses[:, None]).to(gradient.dtype), None, None, None

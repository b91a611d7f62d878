"""A Mistral-7B-shaped model with random weights: tokens/s, share of the card's peak, memory, of a training pass."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from measure import (
    DEVICE,
    DTYPE,
    Plan,
    Ratio,
    interleaved,
    mib,
    milliseconds,
    own_grads,
    peak_bytes,
    peak_flops,
    step,
    unless_out_of_memory,
)
from models import CURLORA, FROZEN, LINEAR, LORA, LORA_STOCK, QKV, Decoder, Variant, adapted, mistral
from results import Result
from torch import nn

LAYERS = 32
LENGTH = 2048
BATCHES = [8, 4, 2, 1]
ROUNDS = 5
CASES = (
    ("–", FROZEN),
    ("q/k/v", CURLORA),
    ("q/k/v", LORA),
    ("all linear", CURLORA),
    ("all linear", LORA),
    ("all linear", LORA_STOCK),
)
COLUMNS = [
    *("adapted", "variant", "trained", "batch", "ms a pass", "/ frozen base", "tokens/s", "TFLOP/s"),
    *("share of peak", "peak GiB", "attached in, s"),
]


@dataclass(frozen=True)
class Adapted:
    """A variant on the model: where, how many numbers train, seconds to attach it."""

    label: str
    variant: Variant
    model: nn.Module
    trained: int
    seconds: float


def run(plan: Plan, result: Result) -> None:
    torch.manual_seed(0)
    begun = time.perf_counter()
    base = mistral(LAYERS, plan.tiny, head=True)
    count = sum(p.numel() for p in base.parameters())
    result.note(f"{count:,} random weights made in {time.perf_counter() - begun:.1f} s")
    length = 32 if plan.tiny else LENGTH
    peak = peak_flops()
    note = (
        f"Sequences of {length}, {DTYPE}, forward with loss and backward, no recomputation, no optimizer step. "
        "Embeddings take a gradient: the frozen base does the same work. FLOPs: the frozen model's, forward and input "
        "gradients (no weight gradients), attention over the whole square; the adapter's own are not counted. "
    )
    note += f"Peak assumed: {peak[0] / 1e12:.0f} TFLOP/s ({peak[1]}, dense bf16)." if peak else "Peak unknown."
    table = result.table("A training pass", COLUMNS, note)
    variants = [attach(base, label, variant) for label, variant in CASES]
    batch, fitting = fit(plan, result, base, variants, length)
    embeddings, labels = batch_of(base, batch, length)
    functions = {v: step(Decoder(v.model, labels), embeddings) for v in fitting}
    seconds = interleaved(functions, 3 if plan.tiny else ROUNDS, plan, warm_up=1)
    frozen = next(v for v in fitting if v.variant == FROZEN)
    flops = pass_flops(base, batch, length)
    for found in fitting:
        pace = milliseconds(seconds[found]) / 1e3
        result.row(
            table,
            *(found.label, found.variant.name, found.trained, batch, pace * 1e3),
            *(Ratio.of(seconds[found], seconds[frozen]).median, batch * length / pace, flops / pace / 1e12),
            *(round(flops / pace / peak[0], 3) if peak else None, fitting[found], round(found.seconds, 2)),
        )


def attach(base: nn.Module, label: str, variant: Variant) -> Adapted:
    begun = time.perf_counter()
    model = adapted(base, variant, QKV if label == "q/k/v" else LINEAR)
    seconds = time.perf_counter() - begun
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Adapted(label, variant, model, trained, seconds)


def fit(
    plan: Plan, result: Result, base: nn.Module, variants: list[Adapted], length: int
) -> tuple[int, dict[Adapted, float | None]]:
    """The largest batch that frozen base, CURLoRA and LoRA fit in, and peak GiB of every variant that does.

    What PEFT does by default may not fit: it then is said, and left out.
    """
    needed = [v for v in variants if v.variant != LORA_STOCK]
    # most memory first, so that a batch that is too large is noticed at once
    order = sorted(needed, key=lambda v: -v.trained)
    for batch in [2] if plan.tiny else BATCHES:
        found, said = unless_out_of_memory(lambda batch=batch: {v: peak_gib(base, v, batch, length) for v in order})
        if found is None:
            result.note(f"batch {batch}: {said}")
            continue
        for other in [v for v in variants if v not in found]:
            peak, said = unless_out_of_memory(lambda v=other, batch=batch: (peak_gib(base, v, batch, length),))
            if peak is None:
                result.note(f"{other.variant.name}, {other.label}, batch {batch}: {said}")
            else:
                found[other] = peak[0]
        return batch, {v: found[v] for v in variants if v in found}
    raise RuntimeError("not even one sequence fits into the memory of this card")


def peak_gib(base: nn.Module, found: Adapted, batch: int, length: int) -> float | None:
    """GiB at the peak of a pass, weights included (they are shared: other variants' adapters count too)."""
    embeddings, labels = batch_of(base, batch, length)
    run_once = step(Decoder(found.model, labels), embeddings)
    with own_grads(found.model):
        run_once()
        extra = mib(peak_bytes(run_once))
    if extra is None:
        return None
    weights = sum(t.numel() * t.element_size() for t in (*found.model.parameters(), *found.model.buffers()))
    return round(extra / 1024 + weights / 2**30, 2)


def batch_of(base: nn.Module, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of random tokens, which take a gradient, and their labels."""
    tokens = torch.randint(base.config.vocab_size, (batch, length), device=DEVICE)
    return base.get_input_embeddings()(tokens).detach().requires_grad_(), tokens


def pass_flops(base: nn.Module, batch: int, length: int) -> float:
    """Forward and input gradients of the frozen base: 4 a weight and token, attention 12 · length · width a block."""
    config = base.config
    weights = sum(m.weight.numel() for m in base.modules() if isinstance(m, nn.Linear))
    attention = 12 * length * config.hidden_size * config.num_hidden_layers
    return batch * length * (4 * weights + attention)

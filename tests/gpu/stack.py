"""A stack of 12 decoder layers of Mistral-7B's shape, with every adapter on the same weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from goal import GOAL_COLUMNS, judge
from measure import (
    DEVICE,
    DTYPE,
    Plan,
    Ratio,
    free,
    interleaved,
    memory_of,
    mib,
    milliseconds,
    step,
    unless_out_of_memory,
)
from models import CURLORA, FROZEN, LINEAR, LORA, QKV, VARIANTS, Decoder, Variant, adapted, mistral
from results import Result, Table
from torch import Tensor, nn

LAYERS = 12
LENGTH = 2048
TOKENS = [4096, 16384]
ROUNDS = 7
COLUMNS = ["time, ms", "/ frozen base", "quartiles", "bytes kept", "peak MiB"]


@dataclass(frozen=True)
class Stack:
    """Decoder layers with every adapter on them, all on the same weights."""

    models: dict[Variant, nn.Module]

    @classmethod
    def of(cls, plan: Plan, targets: list[str], variants: tuple[Variant, ...]) -> Stack:
        torch.manual_seed(0)
        base = mistral(LAYERS, plan.tiny, head=False)
        return cls({v: Decoder(adapted(base, v, targets)) for v in variants})

    def inputs(self, plan: Plan, tokens: int) -> tuple[Tensor, Tensor]:
        """Embeddings that take a gradient, and the gradient of the output."""
        hidden = next(iter(self.models.values())).model.config.hidden_size
        length = 16 if plan.tiny else LENGTH
        shape = (max(tokens // length, 1), length, hidden)
        x, grad = (torch.randn(shape, dtype=DTYPE, device=DEVICE) for _ in range(2))
        return x.requires_grad_(), grad


def measure_stacks(plan: Plan, result: Result) -> None:
    columns = ["adapted", "tokens", "variant", *COLUMNS]
    note = "Forward + backward from embeddings that take a gradient to the last hidden state, sequences of 2048."
    table = result.table(f"A stack of {LAYERS} Mistral-7B layers, {DTYPE}", columns, note)
    goals = result.table("The stack against the goal", GOAL_COLUMNS)
    for targets, label, variants in ((LINEAR, "all linear", VARIANTS), (QKV, "q/k/v", (FROZEN, CURLORA, LORA))):
        found = Stack.of(plan, targets, variants)
        for tokens in [32] if plan.tiny else TOKENS:
            ratios = measure_stack(plan, result, table, found, label, tokens)
            if CURLORA in ratios:
                judge(result, goals, (f"stack, {label}", tokens), ratios, None)
        del found
        free()


def measure_stack(
    plan: Plan, result: Result, table: Table, layers: Stack, label: str, tokens: int
) -> dict[Variant, Ratio]:
    x, grad = layers.inputs(plan, tokens)
    functions, memory, kept = {}, {}, {}
    for variant, model in layers.models.items():
        run_once = step(model, x, grad)
        found, said = unless_out_of_memory(lambda model=model, run_once=run_once: memory_of(model, run_once, x))
        if found is None:
            result.row(table, label, tokens, variant.name, None, None, said, None, None)
            continue
        memory[variant], kept[variant] = found
        functions[variant] = run_once
    seconds = interleaved(functions, 3 if plan.tiny else ROUNDS, plan)
    ratios = {variant: Ratio.of(values, seconds[FROZEN]) for variant, values in seconds.items()}
    for variant, ratio in ratios.items():
        cells = (milliseconds(seconds[variant]), ratio.median, ratio.spread, kept[variant], mib(memory[variant]))
        result.row(table, label, tokens, variant.name, *cells)
    return ratios

"""Adapters over bases that bitsandbytes has quantised to 4 (nf4) and 8 bit."""

from __future__ import annotations

import importlib.util

import torch
from measure import DEVICE, DTYPE, Plan, Ratio, free, interleaved, memory_of, mib, milliseconds, step
from models import CURLORA, FROZEN, LORA, LORA_STOCK, Variant, adapted
from results import Result, SkipPart, Table
from torch import Tensor, nn

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336)]  # outputs, inputs
TOKENS = 4096
ROUNDS = 15
VARIANTS = (FROZEN, CURLORA, LORA, LORA_STOCK)
COLUMNS = ["base", "layer", "variant", "time, ms", "/ frozen base", "quartiles", "bytes kept", "peak MiB"]


class One(nn.Module):
    """A frozen layer, quantised when it is moved to the device."""

    def __init__(self, outputs: int, inputs: int, bits: int) -> None:
        super().__init__()
        import bitsandbytes as bnb  # not every machine has it

        dense = nn.Linear(inputs, outputs, bias=False)
        if bits == 4:
            self.lin = bnb.nn.Linear4bit(inputs, outputs, bias=False, compute_dtype=DTYPE, quant_type="nf4")
            self.lin.weight = bnb.nn.Params4bit(dense.weight.data, requires_grad=False, quant_type="nf4")
        else:
            self.lin = bnb.nn.Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False)
            self.lin.weight = bnb.nn.Int8Params(dense.weight.data, requires_grad=False, has_fp16_weights=False)
        self.to(DEVICE)
        self.is_loaded_in_4bit, self.is_loaded_in_8bit = bits == 4, bits == 8  # as Transformers tells PEFT

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


def run(plan: Plan, result: Result) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SkipPart("bitsandbytes is not installed")
    tokens = 32 if plan.tiny else TOKENS
    table = result.table(f"Forward + backward of one layer, {tokens} tokens, {DTYPE}", COLUMNS)
    exact = result.table(
        "CURLoRA over the quantised base against x (W + ΔW)ᵀ, dense and in fp32, W dequantised",
        ["base", "layer", "largest output", "largest difference", "‖difference‖ / ‖output‖", "of the base alone"],
        "*Of the base alone*: the same for the quantised layer without an adapter, by its dequantised weight.",
    )
    for bits, label in ((4, "nf4"), (8, "int8")):
        for outputs, inputs in [(64, 64)] if plan.tiny else SHAPES:
            x = torch.randn(tokens, inputs, dtype=DTYPE, device=DEVICE, requires_grad=True)
            models = {variant: quantised(outputs, inputs, bits, variant) for variant in VARIANTS}
            measure(plan, result, table, (label, f"{outputs}×{inputs}"), models, x, outputs)
            compare(result, exact, (label, f"{outputs}×{inputs}"), models, x)
            del models, x
            free()


def quantised(outputs: int, inputs: int, bits: int, variant: Variant) -> nn.Module:
    """A variant on a layer of its own: an 8 bit weight hands its scales to the first layer that uses it."""
    torch.manual_seed(0)
    return adapted(One(outputs, inputs, bits), variant, ["lin"])


def measure(plan: Plan, result: Result, table: Table, case: tuple, models: dict, x: Tensor, outputs: int) -> None:
    grad = torch.randn(len(x), outputs, dtype=DTYPE, device=DEVICE)
    functions = {variant: step(model, x, grad) for variant, model in models.items()}
    memory, kept = {}, {}
    for variant, model in models.items():
        memory[variant], kept[variant] = memory_of(model, functions[variant], x)
    seconds = interleaved(functions, 5 if plan.tiny else ROUNDS, plan)
    for variant, values in seconds.items():
        ratio = Ratio.of(values, seconds[FROZEN])
        cells = (milliseconds(values), ratio.median, ratio.spread, kept[variant], mib(memory[variant]))
        result.row(table, *case, variant.name, *cells)


@torch.no_grad()
def compare(result: Result, table: Table, case: tuple, models: dict, x: Tensor) -> None:
    layer = models[CURLORA].base_model.model.lin
    weight, delta = layer.get_base_weight().float(), layer.get_delta_weight("default").float()
    expected = x.float() @ (weight + delta).t()
    difference = models[CURLORA](x).float() - expected
    plain = x.float() @ weight.t()
    alone = (models[FROZEN](x).float() - plain).norm() / plain.norm()
    result.row(
        table,
        *case,
        *(float(expected.abs().max()), float(difference.abs().max())),
        *(float(difference.norm() / expected.norm()), float(alone)),
    )

"""One adapted layer at 7B shapes and a stack of 12: what an adapter adds to the frozen base, and where time goes."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from goal import GOAL, GOAL_COLUMNS, judge
from measure import (
    DEVICE,
    DTYPE,
    GPU,
    Function,
    Plan,
    Ratio,
    copy_bandwidth,
    first_line,
    free,
    graphed,
    interleaved,
    kernels,
    memory_of,
    mib,
    milliseconds,
    product_flops,
    step,
)
from models import CURLORA, FROZEN, LINEAR, LORA, VARIANTS, Variant, adapted
from results import Result, Table
from stack import LAYERS, Stack, measure_stacks
from torch import Tensor, nn

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (2048, 2048), (1024, 4096)]  # outputs, inputs
TOKENS = [4096, 16384]
ROUNDS = 25


@dataclass(frozen=True)
class Ceilings:
    """What this card reaches: bytes/s of a copy, FLOP/s of a large product."""

    bandwidth: float
    flops: float


def run(plan: Plan, result: Result) -> None:
    size = (1 << 20, 128) if plan.tiny else (1 << 30, 8192)
    ceilings = Ceilings(copy_bandwidth(size[0]), product_flops(size[1]))
    reached = f"copy {ceilings.bandwidth / 1e12:.3g} TB/s, product {ceilings.flops / 1e12:.3g} TFLOP/s"
    result.note(f"ceilings measured here: {reached}")
    one_layer(plan, result, ceilings)
    measure_stacks(plan, result)
    for describe in (layer_kernels, stack_kernels, compiled):
        if plan.left() < 0:
            result.note(f"no time was left for {describe.__name__}")
            continue
        try:
            describe(plan, result)
        except RuntimeError as error:  # of a profiler or compiler that does not work here: the tables above stand
            result.note(f"{describe.__name__}: {first_line(error)}")


# -- one layer


class One(nn.Module):
    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.lin = nn.Linear(inputs, outputs, bias=False, dtype=DTYPE, device=DEVICE).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


@dataclass(frozen=True)
class Case:
    """A layer of (outputs, inputs) weights with every adapter on it, and what goes through it."""

    models: dict[Variant, nn.Module]
    x: Tensor
    grad: Tensor

    @classmethod
    def of(cls, outputs: int, inputs: int, tokens: int, variants: tuple[Variant, ...] = VARIANTS) -> Case:
        torch.manual_seed(0)
        base = One(outputs, inputs)
        x = torch.randn(tokens, inputs, dtype=DTYPE, device=DEVICE, requires_grad=True)
        grad = torch.randn(tokens, outputs, dtype=DTYPE, device=DEVICE)
        return cls({variant: adapted(base, variant, ["lin"]) for variant in variants}, x, grad)

    def steps(self) -> dict[Variant, Function]:
        return {variant: step(model, self.x, self.grad) for variant, model in self.models.items()}


def one_layer(plan: Plan, result: Result, ceilings: Ceilings) -> None:
    note = (
        "Forward + backward, random values everywhere. *Eager* is what a loop over the one layer takes, gaps between "
        "launches included; *graph* replays the same kernels as a CUDA graph: the time of the GPU alone, which counts "
        "in a model whose kernels queue up. Ratios to the frozen base of the same round, medians."
    )
    columns = ["layer", "tokens", "variant", "eager, ms", "/ frozen", "graph, ms", "/ frozen"]
    columns += ["quartiles", "bytes kept", "peak MiB"]
    table = result.table(f"One layer, {DTYPE}, outputs × inputs", columns, note)
    goals = result.table(
        f"CURLoRA against its goal: at most {GOAL} of the frozen base, below LoRA everywhere (graph times)",
        GOAL_COLUMNS,
        "*Floor*: frozen base plus one more reading and writing of output and input gradient at copy speed, what an "
        "update that is not fused into the product's kernel must take at least.",
    )
    shapes, tokens = ([(64, 64), (96, 64)], [32]) if plan.tiny else (SHAPES, TOKENS)
    for count in tokens:
        for outputs, inputs in shapes:
            case = Case.of(outputs, inputs, count)
            ratios, base = measure_case(plan, result, table, case)
            floor = 1 + 2 * DTYPE.itemsize * count * (outputs + inputs) / ceilings.bandwidth / base
            judge(result, goals, (f"{outputs}×{inputs}", count), ratios, round(floor, 3))
            del case
            free()


def measure_case(plan: Plan, result: Result, table: Table, case: Case) -> tuple[dict[Variant, Ratio], float]:
    """Fill in the rows of a case; ratios to the frozen base and its seconds, as graphs where there is a GPU."""
    functions, memory, kept = case.steps(), {}, {}
    for variant, model in case.models.items():
        memory[variant], kept[variant] = memory_of(model, functions[variant], case.x)
    rounds = 5 if plan.tiny else ROUNDS
    eager = interleaved(functions, rounds, plan)
    queued = interleaved(as_graphs(functions, result), rounds, plan) if GPU else {}
    for variant in case.models:
        ratio = Ratio.of(eager[variant], eager[FROZEN])
        graph = Ratio.of(queued[variant], queued[FROZEN]) if queued else None
        outputs, inputs = case.grad.shape[1], case.x.shape[1]
        result.row(
            table,
            *(f"{outputs}×{inputs}", len(case.x), variant.name, milliseconds(eager[variant]), ratio.median),
            *((milliseconds(queued[variant]), graph.median, graph.spread) if graph else (None, None, ratio.spread)),
            *(kept[variant], mib(memory[variant])),
        )
    found = queued or eager
    return {v: Ratio.of(found[v], found[FROZEN]) for v in found}, statistics.median(found[FROZEN])


def as_graphs(functions: dict[Variant, Function], result: Result) -> dict[Variant, Function]:
    """The functions as CUDA graphs; none at all if one of them cannot be captured, because ratios need all."""
    try:
        return {variant: graphed(function) for variant, function in functions.items()}
    except RuntimeError as error:
        result.note(f"no CUDA graph: {first_line(error)}")
        return {}


# -- where the time goes


def layer_kernels(plan: Plan, result: Result) -> None:
    outputs, inputs, tokens = (64, 64, 32) if plan.tiny else (4096, 4096, 4096)
    case = Case.of(outputs, inputs, tokens, (FROZEN, CURLORA, LORA))
    breakdown(result, f"one {outputs}×{inputs} layer, {tokens} tokens", case.steps(), 3 if plan.tiny else 10)


def stack_kernels(plan: Plan, result: Result) -> None:
    free()
    found = Stack.of(plan, LINEAR, (FROZEN, CURLORA, LORA))
    x, grad = found.inputs(plan, 32 if plan.tiny else TOKENS[0])
    functions = {variant: step(model, x, grad) for variant, model in found.models.items()}
    breakdown(result, f"{LAYERS} layers, all linear adapted, {x.shape[0] * x.shape[1]} tokens", functions, 2)


def breakdown(result: Result, title: str, functions: dict[Variant, Function], steps: int, shown: int = 14) -> None:
    """Kernels by what CURLoRA adds to them, the largest first; the rest in one row."""
    found = {variant: kernels(function, steps) for variant, function in functions.items()}
    times = {variant: {name: time for name, (_, time) in kernel.items()} for variant, kernel in found.items()}
    names = sorted(
        set().union(*found.values()),
        key=lambda name: times[FROZEN].get(name, 0.0) - times[CURLORA].get(name, 0.0),
    )
    columns = ["kernel", "calls, CURLoRA", "frozen, µs", "CURLoRA, µs", "LoRA, µs", "CURLoRA adds, µs"]
    table = result.table(f"Kernels of a step: {title}", columns)
    order = (FROZEN, CURLORA, LORA)
    for name in names[:shown]:
        row = [times[variant].get(name, 0.0) for variant in order]
        result.row(table, short(name), found[CURLORA].get(name, (0.0, 0.0))[0], *row, row[1] - row[0])
    for label, some in (("all others", names[shown:]), ("all", names)):
        row = [sum(times[variant].get(name, 0.0) for name in some) for variant in order]
        calls = sum(found[CURLORA].get(name, (0.0, 0.0))[0] for name in some)
        result.row(table, label, calls, *row, row[1] - row[0])


def short(kernel: str, most: int = 70) -> str:
    """A kernel's name without what all of PyTorch's have in common."""
    for noise in ("void ", "at::native::", "(anonymous namespace)::", "cutlass::"):
        kernel = kernel.replace(noise, "")
    return kernel[:most]


# -- torch.compile


def compiled(plan: Plan, result: Result) -> None:
    note = "Every graph break is an error here. Ratios to the frozen base compiled alike; graph times."
    columns = ["layer", "tokens", "variant", "time, ms", "/ frozen base", "says"]
    table = result.table("One layer under torch.compile", columns, note)
    for outputs, inputs in [(64, 64)] if plan.tiny else [(4096, 4096), (14336, 4096)]:
        if plan.left() < 0:
            result.note(f"no time was left to compile {outputs}×{inputs}")
            break
        case = Case.of(outputs, inputs, 32 if plan.tiny else TOKENS[0], (FROZEN, CURLORA, LORA))
        functions, said = {}, {}
        torch._dynamo.reset()
        backend = "aot_eager" if plan.tiny else "inductor"  # a rehearsal waits for no C++ compiler
        for variant, model in case.models.items():
            compiled_model = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
            function = step(compiled_model, case.x, case.grad)
            try:
                function()
                functions[variant] = graphed(function) if GPU else function
            except Exception as error:  # whatever the compiler raises is the finding
                said[variant] = first_line(error)
        seconds = interleaved(functions, 5 if plan.tiny else ROUNDS, plan)
        for variant in case.models:
            time = milliseconds(seconds[variant]) if variant in seconds else None
            both = variant in seconds and FROZEN in seconds
            ratio = Ratio.of(seconds[variant], seconds[FROZEN]).median if both else None
            row = (f"{outputs}×{inputs}", len(case.x), variant.name, time, ratio, said.get(variant, "compiles"))
            result.row(table, *row)

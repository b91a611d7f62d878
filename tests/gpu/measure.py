"""Time, memory and kernels of forward + backward passes, on a GPU (CUDA events) or, for a rehearsal, on a CPU."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from layer import saved_bytes  # of tests/benchmarks
from torch import Tensor, nn

Function = Callable[[], None]
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
WARM_UP = 2

PEAKS = {  # dense bf16 FLOP/s by NVIDIA's datasheets; the longest name that fits counts
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


@dataclass(frozen=True)
class Plan:
    """What a part is told.

    Attributes:
        tiny: a rehearsal in seconds, on shapes that mean nothing.
        end: `time.monotonic()` at which the part should be done.
        out: folder of the results, those of earlier parts included.
        model: base for the worker; None: a small random one is made.
        domains: configuration for `compare`; None: that part is skipped.
    """

    tiny: bool
    end: float
    out: Path
    model: Path | None = None
    domains: Path | None = None

    def left(self) -> float:
        return self.end - time.monotonic()


def hardware() -> str:
    name = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


def peak_flops() -> tuple[float, str] | None:
    """(dense bf16 FLOP/s of this card by its datasheet, the name it goes by), or None for an unknown one."""
    name = torch.cuda.get_device_name() if GPU else ""
    fitting = [card for card in PEAKS if all(word in name for word in card.split())]
    card = max(fitting, key=len, default=None)
    return (PEAKS[card], card) if card else None


def step(model: nn.Module, x: Tensor, grad: Tensor | None = None) -> Function:
    """One forward and backward pass; gradients are written, not added to those of the pass before."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run() -> None:
        for tensor in (x, *parameters):
            tensor.grad = None
        model(x).backward(grad)

    return run


def interleaved(
    functions: dict[Key, Function], rounds: int, plan: Plan, warm_up: int = WARM_UP
) -> dict[Key, list[float]]:
    """Seconds of each function in each round. Every round has its own order; the last ones are left out when the
    part's time is up, but never the first three."""
    found: dict[Key, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        for _ in range(warm_up):
            function()
    order, shuffle = list(functions), random.Random(0).shuffle
    for number in range(rounds):
        if number >= 3 and plan.left() < 0:
            break
        shuffle(order)
        for name, seconds in _round(functions, order).items():
            found[name].append(seconds)
    return found


def _round(functions: dict[Key, Function], order: list[Key]) -> dict[Key, float]:
    if not GPU:
        return {name: _host_seconds(functions[name]) for name in order}
    events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in order}
    for name in order:
        torch.cuda.synchronize()
        events[name][0].record()
        functions[name]()
        events[name][1].record()
    torch.cuda.synchronize()
    return {name: start.elapsed_time(end) / 1e3 for name, (start, end) in events.items()}


def _host_seconds(function: Function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Ratio:
    """Time over that of the reference in the same round: quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, seconds: list[float], reference: list[float]) -> Ratio:
        low, middle, high = statistics.quantiles([s / r for s, r in zip(seconds, reference, strict=True)], n=4)
        return cls(round(low, 3), round(middle, 3), round(high, 3))

    @property
    def spread(self) -> str:
        return f"{self.low:.3f}–{self.high:.3f}"


def milliseconds(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e3


def graphed(function: Function) -> Function:
    """The function as the replay of a CUDA graph: its kernels without the gaps that launching them leaves."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def peak_bytes(function: Function) -> int | None:
    """Bytes that a call takes at most beside what is there already; None without a GPU."""
    if not GPU:
        function()
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def memory_of(model: nn.Module, function: Function, x: Tensor) -> tuple[int | None, int]:
    """(bytes at the peak of a warm pass, bytes kept for the backward pass)."""
    with own_grads(model):
        function()
        return peak_bytes(function), saved_bytes(model, x)


def mib(size: int | None) -> float | None:
    return None if size is None else round(size / 2**20, 1)


def free() -> None:
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


@contextmanager
def own_grads(model: nn.Module) -> Iterator[None]:
    """Gradients made inside are dropped on exit, so that no variant holds memory while another one is measured."""
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)


def unless_out_of_memory(function: Callable[[], Value]) -> tuple[Value | None, str]:
    """(what the function returns, ""), or (None, what the error says) with its memory freed."""
    try:
        return function(), ""
    except torch.OutOfMemoryError as error:
        said = first_line(error)
    free()  # only here: while the error is handled, its traceback still holds the tensors
    return None, said


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


# -- ceilings and kernels


def copy_bandwidth(size: int = 1 << 30) -> float:
    """Bytes/s of a device-to-device copy, reads and writes counted."""
    source = torch.randn(size // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source))


def product_flops(size: int = 8192) -> float:
    """FLOP/s of one large matrix product."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=DTYPE) for _ in range(2))
    return 2 * size**3 / _best(lambda: a @ b)


def _best(function: Function, repeats: int = 12) -> float:
    for _ in range(3):
        function()
    return statistics.median(_round({"it": function}, ["it"])["it"] for _ in range(repeats))


def kernels(function: Function, steps: int) -> dict[str, tuple[float, float]]:
    """Kernel (on a CPU: operator) → (calls, microseconds) a step."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(WARM_UP):
        function()
    activities = [ProfilerActivity.CUDA, ProfilerActivity.CPU] if GPU else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            function()
        if GPU:
            torch.cuda.synchronize()
    found = {}
    for event in profiler.key_averages():
        if GPU and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        time_of = event.self_device_time_total if GPU else event.self_cpu_time_total
        if time_of > 0:
            found[event.key] = (event.count / steps, time_of / steps)
    return found

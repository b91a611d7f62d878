"""One adapted layer: time of forward + backward, bytes kept for the backward pass, and initialisation.

Everything runs in one process; a round runs every variant once, each round in another order, and a ratio compares
variants of the same round, so that a busy machine slows both sides. Prints Markdown tables: median (and quartiles).

    python tests/benchmarks/layer.py [--sizes 1024 2048 4096] [--rounds 25] [--no-init]

On a machine that others use, ``OMP_NUM_THREADS=1 … --cpu-time`` counts the processor time of this process instead.
With a GPU it runs there in bf16 on the shapes of a 7B model.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from curlora import CurloraConfig, Linear

R = 16


class One(nn.Module):
    def __init__(self, size: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.lin = nn.Linear(size, size, bias=False, dtype=dtype, device=device).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


class ThreeProducts(nn.Module):
    """y + ((x Rᵀ) Uᵀ) Cᵀ with C and R stored, by autograd."""

    def __init__(self, layer: Linear) -> None:
        super().__init__()
        core = layer.curlora_core["default"]
        self.base, self.u = layer.get_base_layer(), nn.Parameter(core.U.detach().clone())
        self.c, self.r = core.columns.clone(), self.base.weight[core.rows].clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.r.t() @ self.u.t().to(x.dtype) @ self.c.t()


class DenseFormula(ThreeProducts):
    """x (W + C U R)ᵀ, formed in every forward: what the authors' code does."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.base.weight + self.c @ self.u.to(x.dtype) @ self.r)


def variants(size: int, dtype: torch.dtype, device: str) -> dict[str, nn.Module]:
    def curlora(**config) -> nn.Module:
        return get_peft_model(One(size, dtype, device), CurloraConfig(r=R, target_modules=["lin"], **config))

    fused, gather = curlora(), curlora()
    gathered_layer = gather.base_model.model.lin
    gathered_layer.get_base_layer().register_forward_hook(lambda *_: None)  # forbids the fused function
    lora = get_peft_model(One(size, dtype, device), LoraConfig(r=R, target_modules=["lin"]))
    return {
        "frozen base": One(size, dtype, device),
        "CURLoRA": fused,
        "CURLoRA on the base output": gather,
        "LoRA (PEFT)": lora,
        "three products": ThreeProducts(curlora(whiten=False, scale="none").base_model.model.lin),
        "dense formula": DenseFormula(curlora(whiten=False, scale="none").base_model.model.lin),
    }


def step(model: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    def run() -> None:
        x.grad = None
        model(x).backward(grad)

    return run


def interleaved(
    functions: dict[str, Callable[[], None]], rounds: int, device: str, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each function in each round; every round has its own order."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
        function()
    order, shuffle = list(functions), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            synchronise(device)
            start = clock()
            functions[name]()
            synchronise(device)
            seconds[name].append(clock() - start)
    return seconds


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def spread(values: list[float], digits: int = 3) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of the tensors that autograd keeps besides parameters and buffers.

    The input counts where a layer keeps it: in a model it is an activation that could be freed.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    own |= {t.untyped_storage().data_ptr() for t in vars(model).values() if torch.is_tensor(t)}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in own:
            kept[pointer] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(kept.values())


def timing_table(
    sizes: list[int], tokens: int, rounds: int, dtype: torch.dtype, device: str, clock: Callable[[], float]
) -> None:
    print(f"\n### Forward + backward of one layer: {tokens} tokens, r = {R}, {dtype}, {hardware(device)}\n")
    print("Ratio to the frozen base in the same round, median (quartiles); bytes kept for the backward pass.\n")
    print("| variant | " + " | ".join(f"{n}×{n}" for n in sizes) + f" | bytes kept at {sizes[-1]} |")
    print("|---|" + "---|" * (len(sizes) + 1))
    cells: dict[str, list[str]] = {}
    for size in sizes:
        torch.manual_seed(0)
        models = variants(size, dtype, device)
        x = torch.randn(tokens, size, dtype=dtype, device=device, requires_grad=True)
        grad = torch.randn(tokens, size, dtype=dtype, device=device)
        functions = {name: step(model, x, grad) for name, model in models.items()}
        seconds = interleaved(functions, rounds, device, clock)
        base = seconds["frozen base"]
        for name, values in seconds.items():
            ratios = [value / reference for value, reference in zip(values, base, strict=True)]
            text = f"{statistics.median(base) * 1e3:.1f} ms" if name == "frozen base" else spread(ratios)
            cells.setdefault(name, []).append(text)
        kept = {name: saved_bytes(model, x) for name, model in models.items()}
        del models, functions
        gc.collect()
    for name, texts in cells.items():
        print(f"| {name} | " + " | ".join(texts) + f" | {kept[name]:,} |")
    print(f"\ntokens·r = {tokens * R * x.element_size():,} bytes in {dtype}")


# ---------------------------------------------------------------------------------------------- initialisation

METHODS = {
    "CURLoRA inverse": lambda: CurloraConfig(r=R, target_modules=["lin"]),
    "CURLoRA uniform": lambda: CurloraConfig(r=R, target_modules=["lin"], selection="uniform"),
    "LoRA": lambda: LoraConfig(r=R, target_modules=["lin"]),
    "OLoRA": lambda: LoraConfig(r=R, target_modules=["lin"], init_lora_weights="olora"),
    "PiSSA (full SVD)": lambda: LoraConfig(r=R, target_modules=["lin"], init_lora_weights="pissa"),
    "PiSSA (16 iterations)": lambda: LoraConfig(r=R, target_modules=["lin"], init_lora_weights="pissa_niter_16"),
}


def initialise(method: str, size: int, repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds and additional peak memory of initialisations in this (fresh) process."""
    torch.manual_seed(0)
    get_peft_model(One(64, torch.float32, "cpu"), METHODS[method]())  # imports and first-call costs
    models = [One(size, torch.float32, "cpu") for _ in range(repeats)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for model in models:
        start = clock()
        get_peft_model(model, METHODS[method]())
        seconds.append(clock() - start)
    mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": statistics.median(seconds), "mib": mib}


def initialisation_table(sizes: list[int], flags: list[str]) -> None:
    print(f"\n### Initialisation of one layer, fp32, {hardware('cpu')}\n")
    print("Seconds (median of 3; full SVD above 2048: once) and additional peak memory, in a process each.\n")
    print("| method | " + " | ".join(f"{n}×{n}" for n in sizes) + " |")
    print("|---|" + "---|" * len(sizes))
    for method in METHODS:
        texts = []
        for size in sizes:
            repeats = 1 if "full" in method and size > 2048 else 3
            command = [sys.executable, __file__, "--one-init", method, str(size), str(repeats), *flags]
            found = json.loads(subprocess.check_output(command))
            texts.append(f"{found['seconds']:.3f} s, {found['mib']:.0f} MiB")
        print(f"| {method} | " + " | ".join(texts) + " |", flush=True)


def file_table(size: int = 4096) -> None:
    print(f"\n### Adapter of one {size}×{size} layer on disk, r = {R}\n")
    print("| adapter | numbers, bytes | file, bytes |\n|---|---|---|")
    found = {}
    for name, config in (("CURLoRA", METHODS["CURLoRA inverse"]()), ("LoRA", METHODS["LoRA"]())):
        model = get_peft_model(One(size, torch.float32, "cpu"), config)
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            file = Path(directory) / "adapter_model.safetensors"
            whole = file.stat().st_size
            header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        found[name] = whole - header
        print(f"| {name} | {whole - header:,} | {whole:,} |")
    print(f"\nLoRA / CURLoRA = {found['LoRA'] / found['CURLoRA']:.0f} in numbers")


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads, load {os.getloadavg()[0]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--tokens", type=int, default=None, help="512 on a CPU, 4096 on a GPU")
    parser.add_argument("--rounds", type=int, default=25, help="0 leaves the timing out")
    parser.add_argument("--cpu-time", action="store_true", help="processor time instead of elapsed time")
    parser.add_argument("--no-init", action="store_true", help="leave the initialisation out: it takes minutes")
    parser.add_argument("--one-init", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    if arguments.one_init:
        method, size, repeats = arguments.one_init
        print(json.dumps(initialise(method, int(size), int(repeats), clock)))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tokens = arguments.tokens or (4096 if device == "cuda" else 512)
    if arguments.rounds:
        timing_table(arguments.sizes, tokens, arguments.rounds, dtype, device, clock)
    file_table()
    if not arguments.no_init:
        initialisation_table(arguments.sizes, ["--cpu-time"] if arguments.cpu_time else [])


if __name__ == "__main__":
    main()

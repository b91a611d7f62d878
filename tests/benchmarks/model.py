"""A whole model: 12 Llama layers, about 115 M parameters, every dense layer adapted.

Forward + backward against the frozen base in the same round (see layer.py), then initialisation, adapter file and
loading. Prints Markdown tables.

    python tests/benchmarks/model.py [--rounds 11] [--tokens 512] [--cpu-time]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from layer import R, hardware, interleaved, spread
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from curlora import CurloraConfig

QKV = ["q_proj", "k_proj", "v_proj"]
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "CURLoRA, all linear": lambda: CurloraConfig(r=R),
    "LoRA, all linear": lambda: LoraConfig(r=R, target_modules="all-linear"),
    "CURLoRA, q/k/v": lambda: CurloraConfig(r=R, target_modules=QKV),
    "LoRA, q/k/v": lambda: LoraConfig(r=R, target_modules=QKV),
}
SLOW_INITIALISATIONS = {
    "OLoRA, all linear": lambda: LoraConfig(r=R, target_modules="all-linear", init_lora_weights="olora"),
}


def base_model(dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        vocab_size=4096,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).to(device, dtype).requires_grad_(False)


def step(model: nn.Module, embeddings: Tensor, labels: Tensor) -> Callable[[], None]:
    """One forward and backward; the embeddings require a gradient, so that the frozen base has a backward pass too."""

    def run() -> None:
        embeddings.grad = None
        model(inputs_embeds=embeddings, labels=labels).loss.backward()

    return run


def timing_table(rounds: int, tokens: int, dtype: torch.dtype, device: str, clock: Callable[[], float]) -> None:
    models = {"frozen base": base_model(dtype, device)}
    models |= {name: get_peft_model(base_model(dtype, device), config()) for name, config in CONFIGS.items()}
    ids = torch.randint(0, 4096, (tokens // 128, 128), device=device)
    embeddings = models["frozen base"].get_input_embeddings()(ids).detach().requires_grad_()
    functions = {name: step(model, embeddings, ids) for name, model in models.items()}
    seconds = interleaved(functions, rounds, device, clock)
    base = seconds["frozen base"]
    size = sum(p.numel() for p in models["frozen base"].parameters())
    setting = f"{tokens} tokens, r = {R}, {dtype}, {hardware(device)}"
    print(f"\n### Forward + backward of a {size / 1e6:.0f} M model: {setting}\n")
    print("| variant | ratio to the frozen base, median (quartiles) | trainable numbers |\n|---|---|---|")
    for name, values in seconds.items():
        ratios = [value / reference for value, reference in zip(values, base, strict=True)]
        trainable = sum(p.numel() for p in models[name].parameters() if p.requires_grad)
        text = f"{statistics.median(base) * 1e3:.0f} ms" if name == "frozen base" else spread(ratios)
        print(f"| {name} | {text} | {trainable:,} |")


def file_table(dtype: torch.dtype, device: str) -> None:
    print(f"\n### Initialisation, file and loading, {hardware(device)}\n")
    print("| adapter | initialise | adapter file, bytes | load |\n|---|---|---|---|")
    for name, config in (CONFIGS | SLOW_INITIALISATIONS).items():
        base = base_model(dtype, device)
        start = time.perf_counter()
        model = get_peft_model(base, config())
        initialise = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            size = (Path(directory) / "adapter_model.safetensors").stat().st_size
            loads = [load(base_model(dtype, device), directory) for _ in range(3)]
        print(f"| {name} | {initialise:.2f} s | {size:,} | {statistics.median(loads):.2f} s |")


def load(base: nn.Module, directory: str) -> float:
    start = time.perf_counter()
    PeftModel.from_pretrained(base, directory)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--cpu-time", action="store_true", help="processor time instead of elapsed time")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    timing_table(arguments.rounds, arguments.tokens, dtype, device, clock)
    file_table(dtype, device)


if __name__ == "__main__":
    main()

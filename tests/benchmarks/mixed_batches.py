"""A batch in which every row has its own adapter: time against one adapter for all rows, and against PEFT's LoRA.

    python tests/benchmarks/mixed_batches.py [--adapters 64] [--tokens 32] [--hidden 576] [--layers 4] [--rounds 15]

One process, the same batch; a round runs every variant once, each round in another order, and a ratio compares
variants of the same round, so that a busy machine slows all of them. Prints a Markdown table: median (and quartiles),
the adapters' parameters, and the largest deviation of the mixed logits from those of one adapter at a time.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from layer import hardware, interleaved, spread
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from curlora import CurloraConfig

R = 16
CONFIGS = {
    "CURLoRA": lambda: CurloraConfig(r=R, init_weights=False),
    "LoRA (PEFT)": lambda: LoraConfig(r=R, target_modules="all-linear", init_lora_weights=False),
}


def base(hidden: int, layers: int, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 8 // 3, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": max(1, hidden // 192)}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=8192)).to(device, dtype).eval()


def with_adapters(model: LlamaForCausalLM, kind: str, count: int) -> PeftModel:
    adapted = get_peft_model(model, CONFIGS[kind](), adapter_name="a0")
    for number in range(1, count):
        adapted.add_adapter(f"a{number}", CONFIGS[kind]())
    return adapted.eval()


def mixed(model: PeftModel, ids: Tensor, names: list[str]) -> Callable[[], Tensor]:
    return torch.inference_mode()(lambda: model(ids, adapter_names=names).logits)


def deviation(model: PeftModel, ids: Tensor, names: list[str]) -> float:
    """Largest difference between the mixed batch and its rows one at a time, relative to the adapters' effect."""
    together = mixed(model, ids, names)()
    with torch.inference_mode():
        alone = []
        for row, name in zip(ids, names, strict=True):
            model.set_adapter(name)
            alone.append(model(row[None]).logits[0])
        with model.disable_adapter():
            plain = model(ids).logits
    alone = torch.stack(alone)
    return float((together - alone).abs().max() / (alone - plain).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"adapters": 64, "tokens": 32, "hidden": 576, "layers": 4, "rounds": 15}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--cpu-time", action="store_true", help="processor time instead of elapsed time")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    make = partial(base, options.hidden, options.layers, device, dtype)
    names = [f"a{number}" for number in range(options.adapters)]
    ids = torch.randint(0, 8192, (options.adapters, options.tokens), device=device)
    frozen = make()
    functions = {"frozen base": torch.inference_mode()(lambda: frozen(ids).logits)}
    parameters, deviations = {"frozen base": 0}, {}
    for kind in CONFIGS:
        model = with_adapters(make(), kind, options.adapters)
        deviations[f"{kind}, {options.adapters} adapters"] = deviation(model, ids, names)
        functions[f"{kind}, {options.adapters} adapters"] = mixed(model, ids, names)
        single = with_adapters(make(), kind, 1)
        functions[f"{kind}, one adapter"] = torch.inference_mode()(lambda single=single: single(ids).logits)
        own = {name: p.numel() for name, p in model.named_parameters() if model.base_model.prefix in name}
        parameters[f"{kind}, {options.adapters} adapters"] = sum(own.values())
        parameters[f"{kind}, one adapter"] = sum(own.values()) // options.adapters
    clock = time.process_time if options.cpu_time else time.perf_counter
    seconds = interleaved(functions, options.rounds, device, clock)
    print(f"{options.adapters} rows of {options.tokens} tokens, {options.layers} layers of width {options.hidden},")
    print(f"r = {R}, all linear layers, {dtype}, {hardware(device)}, {options.rounds} rounds\n")
    print("| variant | time / frozen base | adapters' parameters | deviation from one at a time |\n|---|---|---|---|")
    for name, values in seconds.items():
        ratios = [value / reference for value, reference in zip(values, seconds["frozen base"], strict=True)]
        text = f"{statistics.median(values) * 1e3:.0f} ms" if name == "frozen base" else spread(ratios)
        error = f"{deviations[name]:.1e}" if name in deviations else ""
        print(f"| {name} | {text} | {parameters[name]:,} | {error} |")


if __name__ == "__main__":
    main()

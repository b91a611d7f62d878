r"""The cost model (`pipelines/cost.py`): what it predicts for large models, and how well it predicts measurements.

1. Llama-2-7B, Mistral-7B and Llama-2-70B shapes under ZeRO-3 on 1, 8 and 64 GPUs: predictions alone, at the hardware
   that the arguments assume. Seconds: all communication hidden behind computation, and nothing hidden.
2. Seconds of a step of random Llamas in one process: FLOP/s from the first shape, ratios for the others. Processor
   seconds, because the machine may be busy; one thread.
3. Bytes that two ranks ask for (`communication.py`), measured over predicted.

Run by hand:

    python tests/benchmarks/cost_model.py --model ../shared/models/tiny-llama
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import communication
import transformers
from communication import ADAPTERS, STAGES, Case, print_table
from zero3_loading import save_random

from pipelines.config.pipeline import PipelineConfig
from pipelines.distributed.zero_settings import deepspeed_settings
from pipelines.preflight import cost

LARGE = {
    "Llama-2-7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "heads": (32, 32)},
    "Mistral-7B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "heads": (32, 8)},
    "Llama-2-70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "heads": (64, 8)},
}
SMALL = {
    "4 × 256": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "heads": (4, 4)},
    "4 × 512": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "heads": (8, 8)},
    "12 × 256": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 12, "heads": (4, 4)},
    "8 × 384": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "heads": (6, 3)},
}
BATCH, LENGTH = 8, 64  # of the small ones
GPUS = (1, 8, 64)
NODE = 8


def llama(sizes: dict, vocabulary: int) -> transformers.LlamaConfig:
    """A Llama's config; Mistral-7B has the same layers."""
    heads, groups = sizes["heads"]
    rest = {key: value for key, value in sizes.items() if key != "heads"}
    return transformers.LlamaConfig(
        **rest, num_attention_heads=heads, num_key_value_heads=groups, vocab_size=vocabulary
    )


def large_config(model: Path, adapter: str, gpus: int, length: int) -> PipelineConfig:
    return PipelineConfig.model_validate(
        {
            "name": "cost",
            "base_model": {"path": str(model), "dtype": "bfloat16"},
            "adapter": ADAPTERS[adapter],
            "tasks": [{"name": "task", "kind": "language-modeling", "data": "."}],
            "training": {"batch_size": gpus, "max_length": length},
            "resources": {"workers": gpus},
            "deepspeed": "zero3",
        }
    )


def predictions(arguments: argparse.Namespace) -> Iterator[Sequence]:
    for base, sizes in LARGE.items():
        for adapter in ADAPTERS:
            with tempfile.TemporaryDirectory() as folder:
                llama(sizes, 32000).save_pretrained(folder)
                configs = [large_config(Path(folder), adapter, gpus, arguments.length) for gpus in GPUS]
                shape = cost.shape_of(configs[0])
            for config in configs:
                found = cost.cost(config, shape)
                hidden, apart = found.seconds(hardware(arguments, config.resources.workers))
                traffic, flops = found.traffic, found.forward + found.backward
                yield (
                    *(base, adapter, config.resources.workers, f"{sum(shape.trained):,}", f"{flops / 1e12:.1f}"),
                    *(f"{traffic.needed / 1e6:.2f}", f"{(traffic.gradients + traffic.updates) / 1e6:.2f}"),
                    *(f"{traffic.weights / 1e9:.2f}", f"{traffic.messages:,}"),
                    *(f"{found.memory['total'] / 2**30:.1f}", f"{hidden:.3f} … {apart:.3f}"),
                )


def hardware(arguments: argparse.Namespace, gpus: int) -> cost.Hardware:
    if gpus <= NODE:
        return cost.Hardware(arguments.flops, arguments.node_bandwidth, arguments.node_latency)
    return cost.Hardware(arguments.flops, arguments.network_bandwidth, arguments.network_latency)


def step_times() -> Iterator[Sequence]:
    """The first row sets the FLOP/s by which all are predicted."""
    speed = None
    for name, sizes in SMALL.items():
        with tempfile.TemporaryDirectory() as folder:
            save_random(llama(sizes, 4096), Path(folder))
            cases = [Case("zero2", adapter, BATCH, LENGTH) for adapter in ADAPTERS]
            for found in communication.measure(folder, 1, cases):
                config = communication.configuration(folder, found.case, 1)
                predicted = cost.cost(config, cost.shape_of(config))
                flops, measured = predicted.forward + predicted.backward, found.processor_seconds
                speed = speed or cost.Hardware(flops / measured, 1, 0)
                expected, _ = predicted.seconds(speed)
                numbers = (flops / 1e9, flops / measured / 1e9)
                yield (
                    *(name, found.case.adapter, *(f"{number:.1f}" for number in numbers)),
                    *(f"{measured:.3f}", f"{expected:.3f}", f"{measured / expected:.2f}"),
                )


def traffic_measured(model: str) -> Iterator[Sequence]:
    cases = [Case(stage, adapter) for stage in STAGES for adapter in ADAPTERS]
    for found in communication.measure(model, 2, cases):
        config = communication.configuration(model, found.case, 2)
        sharding = cost.Sharding.of(deepspeed_settings(config.deepspeed))
        predicted = cost.traffic(cost.shape_of(config), sharding, 2, found.element)
        yield (
            *(found.case.stage, found.case.adapter, f"{found.asked:,.0f}", f"{predicted.total:,.0f}"),
            *(f"{found.asked / predicted.total:.3f}", f"{found.messages:.0f}", predicted.messages),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="measured under two ranks")
    parser.add_argument("--length", type=int, default=2048, help="tokens a GPU and step")
    parser.add_argument(
        "--flops", type=float, default=400e12, help="FLOP/s that a GPU reaches (an H100's peak: 989e12)"
    )
    parser.add_argument("--node-bandwidth", type=float, default=300e9, help="bytes/s a GPU sends inside a node")
    parser.add_argument("--node-latency", type=float, default=20e-6, help="seconds a message inside a node")
    parser.add_argument("--network-bandwidth", type=float, default=40e9, help="bytes/s a GPU sends between nodes")
    parser.add_argument("--network-latency", type=float, default=100e-6, help="seconds a message between nodes")
    arguments = parser.parse_args()
    print(
        f"### Predicted: ZeRO-3, bf16, {arguments.length} tokens a GPU and step\n\n"
        f"Assumed: {arguments.flops:.3g} FLOP/s a GPU; up to {NODE} GPUs {arguments.node_bandwidth:.3g} bytes/s and "
        f"{arguments.node_latency:.0e} s a message, beyond {arguments.network_bandwidth:.3g} and "
        f"{arguments.network_latency:.0e}\n"
    )
    heads = ["base", "adapter", "GPUs", "trainables", "TFLOP", "gradients need, MB", "gradients and updates, MB"]
    heads += ["weights gathered, GB", "messages", "memory a GPU, GiB", "seconds a step"]
    print_table(heads, predictions(arguments))
    print(f"\n### Processor seconds of a step: one process, one thread, fp32, {BATCH} × {LENGTH} tokens\n")
    heads = ["layers × width", "adapter", "GFLOP", "GFLOP/s", "measured, s", "predicted, s", "measured / predicted"]
    print_table(heads, step_times())
    print("\n### Bytes that one of two ranks asks for in a step, 4 × 64 tokens\n")
    heads = ["ZeRO", "adapter", "measured", "predicted", "measured / predicted", "messages", "messages predicted"]
    print_table(heads, traffic_measured(arguments.model))


if __name__ == "__main__":
    main()

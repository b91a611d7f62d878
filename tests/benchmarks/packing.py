r"""Tokens a second of training passes over padded, grouped and packed batches of real rows, on one thread.

The ways take turns at each batch, and seconds are those of the processor, so that other work on the machine matters
little; a figure is all tokens over all seconds. Padding is what the passes compute beside the tokens. Run by hand:

    python tests/benchmarks/packing.py --model $(curlora base smollm2) --data ../shared/data/agnews
"""

from __future__ import annotations

import argparse
import itertools
import time

import torch

from curlora.continual import Sequential
from pipelines.config.sections import AdapterConfig
from pipelines.config.tasks import GenerationTask
from pipelines.data.sets import training_examples
from pipelines.distributed.world import World
from pipelines.models.adapters import attach_adapter
from pipelines.training.batches import GlobalBatches
from pipelines.training.example_losses import example_losses

WAYS = {"padded": {}, "grouped by length": {"grouped": True}, "packed": {"packing": 1}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="folder with the fields text and label")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=192)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--steps", type=int, default=8)
    compare(parser.parse_args())


def compare(arguments: argparse.Namespace) -> None:
    import transformers

    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    chat = {"chat": True, "prompt": "To which desk does this story go?\n\n{text}", "completion": "Desk {label}."}
    task = GenerationTask(name="desk", kind="generation", data=arguments.data, **chat)
    examples = training_examples(task, tokenizer, arguments.length, arguments.rows, 0)
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    model = attach_adapter(model, AdapterConfig(type="curlora"), 0)
    world = World(0, 1, torch.device("cpu"))
    streams = {
        way: GlobalBatches(
            examples,
            arguments.batch,
            0,
            world,
            Sequential().batch,
            **{name: value * 4 * arguments.length for name, value in options.items()},
        )
        for way, options in WAYS.items()
    }
    tokens, computed, seconds = (dict.fromkeys(WAYS, 0.0) for _ in range(3))
    taken = {way: itertools.islice(iter(stream), arguments.steps + 1) for way, stream in streams.items()}
    for step, batches in enumerate(zip(*taken.values(), strict=True)):
        for way, batch in zip(WAYS, batches, strict=True):
            begun = time.process_time()
            losses, _ = example_losses(model, batch)
            (losses.sum() * batch.scale).backward()
            if step:  # the first pass warms up
                seconds[way] += time.process_time() - begun
                tokens[way] += sum(len(example.input_ids) for example in batch.examples)
                computed[way] += batch.input_ids.numel()
    print("| batches | tokens/s | padding |\n|---|---|---|")
    for way in WAYS:
        print(f"| {way} | {tokens[way] / seconds[way]:.0f} | {1 - tokens[way] / computed[way]:.0%} |", flush=True)


if __name__ == "__main__":
    main()

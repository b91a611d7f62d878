r"""Tokens a second: training here against a bare PyTorch loop and stock Trainer with LoRA; scoring against training.

The same blocks of tokens, on one thread. Each way runs in a process of its own, the ways in turn, so that a machine
that slows down slows all of them; a way's figure is the median over its steps of all rounds, the first ones left out.
Run by hand:

    python tests/benchmarks/throughput.py --model ../shared/models/tiny-llama
    python tests/benchmarks/throughput.py --hidden 768 --layers 12 --vocabulary 16384 --batch 4
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from types import SimpleNamespace

ROUNDS = 3
WARM_UP = 2  # steps of a process that are not counted
RESULT = "result "
SIZES = {"hidden": 768, "layers": 12, "vocabulary": 16384, "batch": 16, "length": 128, "steps": 12}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a local causal language model; none: random weights in the sizes below")
    for name, size in {
        "hidden": 768,
        "layers": 12,
        "vocabulary": 16384,
        "batch": 16,
        "length": 128,
        "steps": 12,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(RESULT + json.dumps(WAYS[arguments.way](arguments)))
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    memory: dict[str, float] = {}
    for _ in range(ROUNDS):
        for way in WAYS:
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
            environment = os.environ | {
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            }
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            line = next((line for line in done.stdout.splitlines() if line.startswith(RESULT)), None)
            if line is None:
                raise SystemExit(f"{way} failed:\n{done.stderr}")
            result = json.loads(line.removeprefix(RESULT))
            seconds[way] += result["seconds"]
            memory[way] = max(memory.get(way, 0), result["peak_memory"])
    tokens = arguments.batch * arguments.length
    rate = {way: tokens / statistics.median(found) for way, found in seconds.items()}
    headings = "", "tokens/s", "/ bare loop", "/ stock Trainer, LoRA", "/ training here", "peak memory, MiB"
    print(table_row(*headings), table_row(*["---"] * len(headings)), sep="\n")
    for way, value in rate.items():
        adapter = way.partition(", ")[0]
        others = f"{adapter}, bare loop", "LoRA, stock Trainer", f"{adapter}, here"
        ratios = [f"{value / rate[other]:.2f}" for other in others]
        print(table_row(way, f"{value:,.0f}", *ratios, f"{memory[way] / 2**20:,.0f}"))


def table_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


# -- the ways, each in a process of its own: {"seconds": of each counted step, "peak_memory": bytes}


def bare_loop(arguments: argparse.Namespace, adapter: str) -> dict:
    """What anybody would write."""
    import torch

    model = adapted(arguments, adapter)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    clock = Clock()
    for block in blocks(arguments, arguments.steps):
        ids = torch.tensor(block)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()
    return clock.result()


def stock_trainer(arguments: argparse.Namespace, adapter: str) -> dict:
    """Trainer as its documentation shows it."""
    import transformers

    rows = [{"input_ids": row, "labels": row} for block in blocks(arguments, arguments.steps) for row in block]
    with tempfile.TemporaryDirectory() as scratch:
        settings = transformers.TrainingArguments(
            scratch,
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch,
            use_cpu=True,
            learning_rate=1e-3,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(adapted(arguments, adapter), settings, train_dataset=rows)
        return timed(trainer)


def here(arguments: argparse.Namespace, adapter: str) -> dict:
    """`ContinualTrainer` on DeepSpeed ZeRO-2, as a worker runs it."""
    from accelerate.state import AcceleratorState

    from curlora.continual import Example, Sequential, TaskContext
    from pipelines.config.loading import parse_config
    from pipelines.config.sections import TrainingConfig
    from pipelines.distributed import zero_settings
    from pipelines.training.arguments import training_arguments
    from pipelines.training.trainer import ContinualTrainer

    world = join_world()
    AcceleratorState._reset_state()
    examples = [Example("text", tuple(r), tuple(r)) for block in blocks(arguments, arguments.steps) for r in block]
    training = TrainingConfig(max_steps=arguments.steps, batch_size=arguments.batch, learning_rate=1e-3)
    task = {"name": "text", "kind": "language-modeling", "data": "."}
    config = parse_config(
        {
            "name": "x",
            "base_model": {"path": ".", "dtype": "float32"},
            "tasks": [task],
            "training": training.model_dump(),
        }
    )
    model, strategy = adapted(arguments, adapter), Sequential()
    strategy.before_task(model, TaskContext("text", 1, 0, examples))
    with tempfile.TemporaryDirectory() as scratch:
        settings = zero_settings.complete_settings(config, world.size)
        given = training_arguments(training, arguments.steps, settings, scratch, cpu=True, bf16=False, world_size=1)
        trainer = ContinualTrainer(
            model, given, examples, strategy, training, world, arguments.steps, lambda points: None
        )
        return timed(trainer)


def scoring(arguments: argparse.Namespace, adapter: str) -> dict:
    """`evaluation.score`, a batch at a time."""
    import torch

    from pipelines.data.encoding import Encoded
    from pipelines.distributed.world import World
    from pipelines.evaluation.evaluate import score_part

    world = World(0, 1, torch.device("cpu"))
    model, clock = adapted(arguments, adapter), Clock()
    for block in blocks(arguments, arguments.steps):
        items = [Encoded(number, tuple(row), 1) for number, row in enumerate(block)]
        text = SimpleNamespace(items=items, kind="language-modeling", name="text", max_new_tokens=0)
        score_part(model, text, world, batch_tokens=8192)
        clock.tick()
    return clock.result()


# -- what they share


class Clock:
    """Seconds between ticks, and the process's peak memory."""

    def __init__(self):
        self.times = [time.perf_counter()]

    def tick(self) -> None:
        self.times.append(time.perf_counter())

    def result(self) -> dict:
        import resource

        seconds = [after - before for before, after in itertools.pairwise(self.times)][WARM_UP:]
        return {"seconds": seconds, "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def timed(trainer) -> dict:
    """Train, with a tick after each optimizer step."""
    import transformers

    clock = Clock()

    class Ticks(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.tick()

    trainer.add_callback(Ticks())
    trainer.train()
    return clock.result()


def join_world():
    """A process group of one, as Ray Train makes it."""
    import torch

    from pipelines.distributed import engine
    from pipelines.distributed.world import World

    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29871",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
    }
    torch.distributed.init_process_group("gloo")
    engine.prepare_environment()
    return World(0, 1, torch.device("cpu"), group=torch.distributed.group.WORLD)


def blocks(arguments: argparse.Namespace, count: int) -> list[list[list[int]]]:
    """`count` batches of token ids."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (count, arguments.batch, arguments.length)
    return torch.randint(5, vocabulary(arguments), shape, generator=generator).tolist()


def vocabulary(arguments: argparse.Namespace) -> int:
    import transformers

    return (
        transformers.AutoConfig.from_pretrained(arguments.model).vocab_size
        if arguments.model
        else arguments.vocabulary
    )


def adapted(arguments: argparse.Namespace, adapter: str):
    """A frozen base with its adapter."""
    import peft
    import torch
    import transformers

    from curlora import CurloraConfig

    torch.manual_seed(0)
    if arguments.model:
        base = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    else:
        config = transformers.LlamaConfig(
            hidden_size=arguments.hidden,
            intermediate_size=arguments.hidden * 8 // 3,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.hidden // 64,
            num_key_value_heads=arguments.hidden // 64,
            vocab_size=arguments.vocabulary,
        )
        base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if adapter == "LoRA":
        config = peft.LoraConfig(
            r=8, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM"
        )
    else:
        config = CurloraConfig(r=23, target_modules="all-linear", whiten=True, scale="adam", task_type="CAUSAL_LM")
    return peft.get_peft_model(base, config)


def _way(run: Callable, adapter: str) -> Callable:
    return lambda arguments: run(arguments, adapter)


WAYS = {
    "LoRA, stock Trainer": _way(stock_trainer, "LoRA"),
    "LoRA, bare loop": _way(bare_loop, "LoRA"),
    "LoRA, here": _way(here, "LoRA"),
    "LoRA, scoring": _way(scoring, "LoRA"),
    "CURLoRA, bare loop": _way(bare_loop, "CURLoRA"),
    "CURLoRA, here": _way(here, "CURLoRA"),
    "CURLoRA, scoring": _way(scoring, "CURLoRA"),
}

if __name__ == "__main__":
    main()

r"""Bytes that a rank sends an optimizer step, by kind of collective and by who asked, against what the method needs.

1, 2 and 4 processes (gloo on loopback) train a few steps with `ContinualTrainer` under the shipped ZeRO-2 and ZeRO-3
settings, and under ZeRO-3 with nothing kept between forward and backward, which is how a model far above
`stage3_max_live_parameters` (1e9 numbers) runs. Two countings:

- *asked*: every call of a torch.distributed collective (DeepSpeed's go through them) is counted at the cost of a ring
  over N ranks (Patarasu and Yuan 2009): a tensor of b bytes in all costs a rank 2 b (N-1)/N as an all-reduce and
  b (N-1)/N as anything else; of an all-gather b is the output, of a reduce-scatter the input.
- *written*: what the process really wrote, to sockets and anything else (`wchar` of /proc/self/io, Linux only).

Needed are, at ring cost too, the gradients' all-reduce (ZeRO-2 does it as reduce-scatter and all-gather of the stepped
weights, arXiv 1910.02054 section 7) and under ZeRO-3 the frozen weights gathered for forward and again for backward.
Run by hand:

    python tests/benchmarks/communication.py --model ../shared/models/tiny-llama
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

KINDS = (
    *("all_reduce", "all_gather_into_tensor", "all_gather", "reduce_scatter_tensor", "reduce_scatter"),
    *("broadcast", "reduce", "all_to_all_single", "gather", "scatter"),
)
ADAPTERS = {
    "CURLoRA r 23, all linear": {"type": "curlora", "r": 23, "target_modules": "all-linear"},
    "LoRA r 8, q/k/v": {"type": "lora", "r": 8, "alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj"]},
}
STAGES = {
    "zero2": {},
    "zero3": {},
    "zero3, nothing kept": {"max_live_parameters": 0, "max_reuse_distance": 0},
    "zero3, part kept": {"max_live_parameters": 0, "max_reuse_distance": 2_000_000},
}
SHOWN = ("zero2", "zero3", "zero3, nothing kept")
STEPS, FIRST = 8, 4  # ZeRO-3 records the order of the modules in the first steps and fetches ahead afterwards
LENGTH = 64


@dataclass(frozen=True)
class Case:
    """One training: keys of `STAGES` and `ADAPTERS`, and the batch."""

    stage: str
    adapter: str
    batch: int = 4
    length: int = LENGTH


@dataclass(frozen=True)
class Message:
    """A call of a collective: its kind, who asked for it, and the bytes of the whole tensor."""

    kind: str
    caller: str
    size: int

    def sent(self, ranks: int) -> float:
        """Bytes that a rank sends for it, at ring cost."""
        return (2 if self.kind == "all_reduce" else 1) * self.size * (ranks - 1) / ranks


@dataclass(frozen=True)
class Measured:
    """An optimizer step of a case, on one rank: the mean over the steps from `FIRST` on (of times the median)."""

    case: Case
    ranks: int
    trained: int  # numbers that train
    frozen: int  # numbers that do not
    element: int  # bytes a number
    seconds: float
    processor_seconds: float
    written: float
    messages: float
    by_kind: dict[str, float]
    by_caller: dict[str, float]

    @property
    def asked(self) -> float:
        return sum(self.by_kind.values())

    @property
    def needed(self) -> tuple[float, float]:
        """(bytes for gradients, bytes for frozen weights)."""
        ring = (self.ranks - 1) / self.ranks * self.element
        gathered = 2 * self.frozen * self.case.stage.startswith("zero3")
        return 2 * self.trained * ring, gathered * ring


def measure(model: str | Path, ranks: int, cases: Sequence[Case]) -> list[Measured]:
    """Train every case in so many processes; the measurements of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        told, found = Path(folder) / "cases.json", Path(folder) / "found.json"
        told.write_text(json.dumps([asdict(case) for case in cases]))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = [*launcher, __file__, "--model", str(model), "--cases", str(told), "--found", str(found)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(result.stderr[-4000:])
        return [Measured(**(raw | {"case": Case(**raw["case"])})) for raw in json.loads(found.read_text())]


# -- in a worker


def count_collectives(messages: list[Message]) -> None:
    """From now on, every collective of this process is written down; before DeepSpeed takes hold of the functions."""
    import torch.distributed.distributed_c10d as inner

    for kind in KINDS:
        call = getattr(inner, kind)

        @functools.wraps(call)
        def counted(*arguments, kind=kind, call=call, **named):
            size = max(_bytes(value) for value in (*arguments, *named.values()))
            messages.append(Message(kind, _caller(), size))
            return call(*arguments, **named)

        for module in (inner, sys.modules["torch.distributed"]):
            setattr(module, kind, counted)


def _bytes(value) -> int:
    if isinstance(value, list | tuple):
        return sum(map(_bytes, value))
    return value.numel() * value.element_size() if hasattr(value, "element_size") else 0


def _caller() -> str:
    """Module and function that asked: the first frame outside this file, torch and deepspeed.comm."""
    frame = sys._getframe(2)
    while frame.f_globals["__name__"].startswith(("torch.", "deepspeed.comm", "deepspeed.utils", "contextlib")):
        frame = frame.f_back
    return f"{frame.f_globals['__name__'].removeprefix('deepspeed.runtime.')}: {frame.f_code.co_name}"


def _written() -> int:
    """Bytes that this process has written so far; 0 where the system does not say."""
    counters = Path("/proc/self/io")
    lines = counters.read_text().splitlines() if counters.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("wchar")), 0)


def work(model: str, cases: list[Case], found: Path) -> None:
    """In a worker: train the cases one after the other; rank 0 writes down what it saw."""
    import torch.distributed

    messages: list[Message] = []
    count_collectives(messages)
    from pipelines.distributed import engine
    from pipelines.distributed.world import World

    torch.set_num_threads(1)
    engine.prepare_environment()
    import deepspeed

    deepspeed.init_distributed("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    measured = []
    for case in cases:
        lockstep = case.stage.startswith("zero3")
        world = World(rank, size, torch.device("cpu"), lockstep=lockstep, group=torch.distributed.group.WORLD)
        measured.append(asdict(train(model, case, world, messages)))
    if rank == 0:
        found.write_text(json.dumps(measured))
    torch.distributed.barrier()


def train(model: str, case: Case, world, messages: list[Message]) -> Measured:
    """Load, adapt and train as a chain's worker does, `STEPS` optimizer steps on random tokens."""
    import torch
    from accelerate.state import AcceleratorState

    from curlora.continual import Example, make_strategy
    from pipelines.distributed import engine, zero_settings
    from pipelines.models.adapters import attach_adapter
    from pipelines.training.arguments import training_arguments
    from pipelines.training.trainer import ContinualTrainer
    from pipelines.workers.resident_model import load_frozen_base
    from pipelines.workers.step_training import end_engine

    config = configuration(model, case, world.size)
    settings = zero_settings.complete_settings(config, world.size)
    base, _, _partitioning = load_frozen_base(config.base_model, settings, world)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, base.config.vocab_size, (case.batch * STEPS, case.length), generator=generator).tolist()
    examples = [Example("task", tuple(row), tuple(row)) for row in rows]
    adapted = attach_adapter(base, config.adapter, config.training.seed)
    AcceleratorState._reset_state()
    steps = _Steps(messages)
    with tempfile.TemporaryDirectory() as scratch, engine.hooks_restored(adapted):
        arguments = training_arguments(config.training, STEPS, settings, scratch, True, False, world.size)
        strategy = make_strategy("sequential")
        trainer = ContinualTrainer(
            adapted, arguments, examples, strategy, config.training, world, STEPS, lambda points: None
        )
        trainer.add_callback(steps.callback())
        trainer.train()
        end_engine(trainer)
    sizes = Counter()
    for parameter in adapted.parameters():
        sizes[parameter.requires_grad] += getattr(parameter, "ds_numel", parameter.numel())
    return steps.summary(case, world.size, sizes[True], sizes[False], next(base.parameters()).element_size())


def configuration(model: str, case: Case, workers: int):
    """The pipeline's configuration of a case, with the shipped DeepSpeed settings."""
    from pipelines.config.pipeline import PipelineConfig
    from pipelines.distributed import zero_settings

    deepspeed = zero_settings.deepspeed_settings(case.stage.split(",")[0])
    deepspeed["zero_optimization"] |= {f"stage3_{name}": value for name, value in STAGES[case.stage].items()}
    return PipelineConfig.model_validate(
        {
            "name": "communication",
            "base_model": {"path": str(model), "dtype": "float32"},
            "adapter": ADAPTERS[case.adapter],
            "tasks": [{"name": "task", "kind": "language-modeling", "data": "."}],
            "training": {"max_steps": STEPS, "batch_size": case.batch, "max_length": case.length},
            "resources": {"workers": workers},
            "deepspeed": deepspeed,
        }
    )


@dataclass(frozen=True)
class _Mark:
    time: float
    processor: float
    written: int
    messages: int


class _Steps:
    """Cuts the messages, the bytes written and the time into optimizer steps."""

    def __init__(self, messages: list[Message]):
        self.messages = messages
        self.marks: list[_Mark] = []  # the end of each step

    def mark(self) -> None:
        self.marks.append(_Mark(time.perf_counter(), time.process_time(), _written(), len(self.messages)))

    def callback(self):
        import transformers

        mark = self.mark

        class AtStepEnd(transformers.TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                mark()

        return AtStepEnd()

    def summary(self, case: Case, ranks: int, trained: int, frozen: int, element: int) -> Measured:
        marks = self.marks[FIRST - 2 :]  # the end of the step before the first one that counts
        count = len(marks) - 1
        messages = self.messages[marks[0].messages : marks[-1].messages]
        by_kind, by_caller = Counter(), Counter()
        for message in messages:
            by_kind[message.kind] += message.sent(ranks) / count
            by_caller[f"{message.kind} by {message.caller}"] += message.sent(ranks) / count
        return Measured(
            case=case,
            ranks=ranks,
            trained=trained,
            frozen=frozen,
            element=element,
            seconds=statistics.median(b.time - a.time for a, b in itertools.pairwise(marks)),
            processor_seconds=statistics.median(b.processor - a.processor for a, b in itertools.pairwise(marks)),
            written=(marks[-1].written - marks[0].written) / count,
            messages=len(messages) / count,
            by_kind=dict(by_kind),
            by_caller=dict(by_caller),
        )


# -- the tables


def print_table(heads: Sequence[str], rows: Iterable[Sequence]) -> None:
    """A Markdown table; it appears once all rows are there."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    print("\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *lines]))


def print_tables(measured: list[Measured]) -> None:
    kinds = [kind for kind in KINDS if any(kind in found.by_kind for found in measured)]
    heads = ["ranks", "ZeRO", "adapter", *kinds, "asked", "written", "messages", "gradients need", "weights need"]
    rows = []
    for found in measured:
        numbers = [*(found.by_kind.get(kind, 0) for kind in kinds), found.asked, found.written, found.messages]
        cells = [found.ranks, found.case.stage, found.case.adapter]
        rows.append([*cells, *(f"{number:,.0f}" for number in (*numbers, *found.needed))])
    print_table(heads, rows)
    most = max(found.ranks for found in measured)
    print()
    print_table(
        [f"{most} ranks: ZeRO", "adapter", "collective and who asked", "bytes"],
        [
            (found.case.stage, found.case.adapter, who, f"{size:,.0f}")
            for found in measured
            if found.ranks == most
            for who, size in sorted(found.by_caller.items(), key=lambda item: -item[1])
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--cases", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--found", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cases:
        work(arguments.model, [Case(**raw) for raw in json.loads(arguments.cases.read_text())], arguments.found)
        return
    cases = [Case(stage, adapter) for stage in SHOWN for adapter in ADAPTERS]
    measured = [found for ranks in arguments.ranks for found in measure(arguments.model, ranks, cases)]
    print(f"bytes a rank and optimizer step, {cases[0].batch} × {cases[0].length} tokens over all ranks, fp32\n")
    print_tables(measured)


if __name__ == "__main__":
    main()

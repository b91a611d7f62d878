"""One rank of the test of users' DeepSpeed settings: each trains a task, and again from a checkpoint; see
test_deepspeed_files.py.

Run by torchrun as ``deepspeed_files_worker.py NAMES BASE OUT``. Stages must ascend: processes that have trained under
ZeRO-3 cannot train under a lower stage afterwards.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import peft
import torch
import transformers

from curlora import CurloraConfig
from curlora.continual import TaskContext, make_strategy
from curlora.continual.parameters import adapter_parameters, read, write
from pipelines.config.pipeline import PipelineConfig
from pipelines.distributed import engine, zero_settings
from pipelines.distributed.world import World
from pipelines.models.base import hidden_size
from pipelines.training.arguments import training_arguments
from pipelines.training.checkpoint import Checkpoint
from pipelines.training.trainer import ContinualTrainer, ControlRequests
from tests.deepspeed_files import FILES
from tests.integration.strategies_zero_worker import examples, start, total

STEPS = 4


def configuration(name: str, base: str) -> PipelineConfig:
    training = {"max_steps": STEPS, "batch_size": 8, "gradient_accumulation": 2, "learning_rate": 1e-2}
    task = {"name": "first", "kind": "language-modeling", "data": "unused"}
    raw = {"name": "files", "base_model": {"path": base, "dtype": "float32"}, "training": training, "tasks": [task]}
    return PipelineConfig.model_validate(raw | {"deepspeed": FILES[name]})


def train(config: PipelineConfig, settings: dict, world: World, resume: Checkpoint | None = None) -> tuple:
    """(trained weights, checkpoint after the first optimizer step)."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    keep = transformers.integrations.HfDeepSpeedConfig(settings) if world.lockstep else None
    base = transformers.AutoModelForCausalLM.from_pretrained(config.base_model.path)
    base.requires_grad_(False)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, CurloraConfig(r=4, task_type="CAUSAL_LM"))
    if resume:
        weights = resume.part("weight")
        write({name: p for name, p in model.named_parameters() if name in weights}, weights)
    task, taken = TaskContext("first", 1, 0, examples("first", 1), rank=world.rank, size=world.size, total=total), []
    strategy = make_strategy("sequential")
    strategy.before_task(model, task)
    with tempfile.TemporaryDirectory() as scratch, engine.hooks_restored(model):
        done = resume.step if resume else 0
        arguments = training_arguments(config.training, STEPS, settings, scratch, True, False, world.size, done)
        trainer = ContinualTrainer(
            model,
            arguments,
            task.examples,
            strategy,
            config.training,
            world,
            STEPS,
            lambda points: None,
            requests=lambda: ControlRequests(checkpoint=True),
            on_checkpoint=lambda take: taken.append(take()),
            resume=resume,
        )
        trainer.train()
        trained = read(adapter_parameters(model))
        trainer.model_wrapped.destroy()
        trainer.accelerator.free_memory()
    del keep
    return trained, taken[0] if taken else None


def report(names: list[str], base: str, out: Path) -> None:
    world, found = start(), {}
    for name in names:
        config = configuration(name, base)
        hidden = hidden_size(config.base_model)
        stage = zero_settings.stage_of(zero_settings.deepspeed_settings(config.deepspeed))
        placed = dataclasses.replace(world, lockstep=stage == 3)
        results = []
        for checkpoint in (None, "taken"):
            settings = zero_settings.complete_settings(config, world.size, hidden)
            trained, taken = train(config, settings, placed, results[0][1] if checkpoint else None)
            results.append((trained, taken))
        found[name] = [{key: t.flatten().tolist() for key, t in trained.items()} for trained, _ in results]
    (out / f"rank{world.rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()


if __name__ == "__main__":
    report(sys.argv[1].split(","), sys.argv[2], Path(sys.argv[3]))
